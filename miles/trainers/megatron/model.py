"""The transformer: configuration, layer specs and the model itself.

    config.model -> TransformerConfig -> layer spec (--spec, Transformer Engine, or our own) -> PolicyModel | ScalarModel

Weights are not initialized here: they always come from a checkpoint. Both models end before their head, so that it is
computed only for the tokens that need it: `PolicyModel` has the output layer, which `logprobs` applies in pieces,
`ScalarModel` one row of weights for a number a token (a critic's value, a reward model's score).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor

from miles.config.groups import Config, ModelArgs
from miles.config.layer_pattern import expanded, linear_layers, listed
from miles.config.parallel import ParallelSizes
from miles.errors import ConfigError, HookError

from .attention import PackedCoreAttention, PackedSelfAttention, uses_flash_attn
from .latent import latent_attention_spec
from .layers import GatedMLP, LayerNorm, PackedLayer, PostNormLayer, RMSNorm, ZeroCentredRMSNorm
from .moe import Router, mark_experts, moe_fields, moe_spec
from .parallel import Parallel
from .rope import inverse_frequencies, yarn_mscale

M = TypeVar("M", bound=GPTModel)

#: Megatron's modules whose weight is cut over tensor-parallel ranks, and the dimension.
_CUT_ALONG = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}


def params_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, with fp32 masters in the optimizer; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def transformer_config(config: Config, sizes: ParallelSizes, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of our model: no dropout, and no scaling of the loss, whose denominators are in the batch."""
    model = config.model
    dtype = params_dtype(device)
    on_gpu = device.type == "cuda"
    engine = uses_transformer_engine(config, device)
    latent = _latent_fields(model)
    transformer = (MLATransformerConfig if latent else TransformerConfig)(
        **latent,
        num_layers=_set(model.num_layers),
        hidden_size=_set(model.hidden_size),
        ffn_hidden_size=_set(model.ffn_hidden_size),
        num_attention_heads=_set(model.num_attention_heads),
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=_set(model.kv_channels),
        normalization=model.normalization or "RMSNorm",
        layernorm_epsilon=model.norm_epsilon if model.norm_epsilon is not None else 1e-6,
        layernorm_zero_centered_gamma=bool(model.apply_layernorm_1p),
        attention_output_gate=bool(model.attention_output_gate),
        **_linear_attention_fields(model),
        qk_layernorm=bool(model.qk_layernorm),
        gated_linear_unit=bool(model.swiglu or model.quick_geglu),
        activation_func=F.silu if model.swiglu else quick_gelu if model.quick_geglu else F.gelu,
        activation_func_clamp_value=model.activation_func_clamp_value,
        glu_linear_offset=model.glu_linear_offset or 0.0,
        softmax_type=model.softmax_type or "vanilla",
        rotary_interleaved=bool(model.rotary_interleaved) and not latent,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=bool(model.add_qkv_bias),
        # Shapes that vary are refused with megatron's default dispatcher, also where there are no experts.
        **{"moe_token_dispatcher_type": "alltoall"} | moe_fields(model, _layers_of_experts(config), with_engine=engine),
        window_size=model.window_size,
        window_attn_skip_freq=None if model.window_attn_skip_freq is None else listed(model.window_attn_skip_freq),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        # DDP must not average: every rank's loss is its own term of the step's sum.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        num_layers_in_first_pipeline_stage=config.perf.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=config.perf.decoder_last_pipeline_num_layers,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        sequence_parallel=sizes.sequence_parallel,
        recompute_granularity=config.perf.recompute_granularity,
        recompute_method=(config.perf.recompute_method or "uniform") if config.perf.recompute_granularity else None,
        recompute_num_layers=(config.perf.recompute_num_layers or 1) if config.perf.recompute_granularity else None,
        deterministic_mode=config.cluster.deterministic_mode,
        # The fused kernels come with Transformer Engine or Apex.
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=engine,
        bias_activation_fusion=on_gpu and bool(model.swiglu),
        bias_dropout_fusion=on_gpu,
        # Stages tell each other the shape of what they send: packed micro-batches differ in tokens.
        variable_seq_lengths=sizes.pipeline > 1,
        batch_p2p_comm=on_gpu and sizes.virtual == 1,
        overlap_p2p_comm=on_gpu and sizes.virtual > 1,
    )
    # Megatron has no place for these: what scaled rotary embeddings multiply cos and sin by, and, of latent attention, its
    # frequencies, which of its dimensions turn together, and what its softmax's scale is multiplied by.
    transformer.rotary_frequencies, transformer.rotary_scale = _frequencies(config)
    transformer.latent_interleaved = bool(model.rotary_interleaved)
    transformer.softmax_factor = 1.0
    if latent and model.rope_scaling is not None:
        transformer.softmax_factor = (
            yarn_mscale(model.rope_scaling["factor"], model.rope_scaling.get("mscale_all_dim", 0)) ** 2
        )
    return transformer


def _linear_attention_fields(model: ModelArgs) -> dict[str, Any]:
    """Megatron's configuration of layers with linear attention; empty where the model has none."""
    if model.linear_attention_freq is None:
        return {}
    names = (
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
    )
    layers = linear_layers(model.linear_attention_freq, _set(model.num_layers))
    return {name: getattr(model, name) for name in names} | {"linear_attention_freq": layers}


def _latent_fields(model: ModelArgs) -> dict[str, Any]:
    """Megatron's configuration of latent attention; empty where the model has none."""
    if not model.multi_latent_attention:
        return {}
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    # Scaled rotary embeddings are ours; megatron only learns that its softmax is not to be scaled.
    return {name: getattr(model, name) for name in names} | {"rope_type": "rope", "rotary_scaling_factor": 1.0}


def _frequencies(config: Config) -> tuple[Tensor, float]:
    """Of --rotary-base and --rope-scaling; see `inverse_frequencies`."""
    model = config.model
    dim = int(_set(model.kv_channels) * (1.0 if model.rotary_percent is None else model.rotary_percent))
    if model.multi_latent_attention:
        dim = _set(model.qk_pos_emb_head_dim)
    return inverse_frequencies(dim, model.rotary_base or 10000, model.rope_scaling)


def uses_transformer_engine(config: Config, device: torch.device) -> bool:
    """Whether layers come from Transformer Engine: on a GPU that has it, unless flags ask for other kernels."""
    return (
        device.type == "cuda"
        and config.perf.attention_backend in ("auto", "fused")
        and not _has_parts_of_ours(config)
        # Sequences that ranks share are packed for our attention.
        and config.perf.context_parallel_size == 1
        and importlib.util.find_spec("transformer_engine") is not None
    )


def _has_parts_of_ours(config: Config) -> bool:
    """Whether the model has something that Transformer Engine's layers, as megatron puts them together, do not compute."""
    model = config.model
    return (
        _frequencies(config)[1] != 1.0
        or _has_post_norms(config)
        or model.softmax_type == "learnable"
        or bool(model.quick_geglu)
        or bool(model.multi_latent_attention)
        or bool(model.attention_output_gate)
        or bool(model.apply_layernorm_1p)
    )


def _has_post_norms(config: Config) -> bool:
    return bool(config.model.post_self_attn_layernorm or config.model.post_mlp_layernorm)


def shares_prompts(config: Config, device: torch.device) -> bool:
    """Whether attention understands prompts that several rows share: ours does, on torch's kernels."""
    return (
        config.model.spec is None
        and not uses_transformer_engine(config, device)
        and not uses_flash_attn(device, config.perf.attention_backend)
    )


def layer_spec(config: Config, transformer: TransformerConfig, device: torch.device, stage: int | None = None) -> Any:
    """The spec of all layers: what --spec names, else Transformer Engine's, else ours.

    `stage`: which piece of this rank's model it is for, where there are several.
    """
    if config.model.spec is not None:
        return _custom_spec(config, transformer, stage)
    if uses_transformer_engine(config, device):
        block = get_gpt_decoder_block_spec(transformer, use_transformer_engine=True, vp_stage=stage)
        for layer in block.layer_specs:
            if isinstance(layer.submodules.mlp.submodules, MoESubmodules):
                layer.submodules.mlp.submodules.router = Router
        return block
    backend = config.perf.attention_backend
    kinds = [local_layer_spec(transformer, backend=backend, experts=experts) for experts in (False, True)]
    if _has_post_norms(config):
        after = {
            "after_attention": bool(config.model.post_self_attn_layernorm),
            "after_mlp": bool(config.model.post_mlp_layernorm),
        }
        for kind in kinds:
            kind.module, kind.params = PostNormLayer, after
    first = get_transformer_layer_offset(transformer, stage)
    mine = range(first, first + get_num_layers_to_build(transformer, vp_stage=stage))
    layers = [kinds[experts] for experts in _layers_of_experts(config)[mine.start : mine.stop]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_class(transformer))


def _layers_of_experts(config: Config) -> list[int]:
    """[layers of the whole model] 1 for each that has experts."""
    model = config.model
    layers = _set(model.num_layers)
    return [0] * layers if model.num_experts is None else expanded(model.moe_layer_freq or "1", layers)


def local_layer_spec(transformer: TransformerConfig, *, backend: str = "auto", experts: bool = False) -> ModuleSpec:
    """A layer of megatron's own parts, with norms and packed attention that run on any device."""
    norm = norm_class(transformer)
    qk_norm = norm if transformer.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=functools.partial(PackedCoreAttention, backend=backend),
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=PackedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=latent_attention_spec(backend) if transformer.multi_latent_attention else attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=moe_spec(Router) if experts else GatedMLP,
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine keeps these norms inside the linear layers; checkpoints of either spec fit the other.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


class PolicyModel(GPTModel):
    """GPTModel whose forward ends with the final hidden states [T, 1, H] on every stage."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary / TP, H] of the last stage; the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        head: Tensor = self.output_layer.weight
        return head


class ScalarModel(GPTModel):
    """GPTModel with a head of one number in the place of the output layer; its forward ends with the hidden states [T, 1, H].

    The head is whole on every tensor-parallel rank. A new one is zero: all values are 0, whatever the topology, and the first
    update moves the head alone.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.score = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)
            self.reset_head()

    def reset_head(self) -> None:
        """A new head, where this stage has it."""
        if self.post_process:
            torch.nn.init.zeros_(self.score.weight)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def values(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R], fp32."""
        return F.linear(hidden.float(), self.score.weight.float()).squeeze(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        # GPTModel's and LanguageModule's own look for the output layer.
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def build_model(config: Config, parallel: Parallel) -> list[PolicyModel]:
    """This rank's part of the policy on its device, parameters uninitialized: one piece, or several where the pipeline is
    interleaved, in the order of their layers."""
    return _build(PolicyModel, config, parallel)


def build_scalar_model(config: Config, parallel: Parallel) -> list[ScalarModel]:
    """The same with a head of one number, which is 0; the other parameters uninitialized."""
    return _build(ScalarModel, config, parallel)


def _build(kind: type[M], config: Config, parallel: Parallel) -> list[M]:
    model, sizes, device = config.model, parallel.sizes, parallel.device
    transformer = transformer_config(config, sizes, device)
    pieces = [
        kind(
            transformer,
            layer_spec(config, transformer, device, stage if sizes.virtual > 1 else None),
            vocab_size=padded_vocab_size(config, sizes),
            max_sequence_length=_set(model.max_position_embeddings),
            position_embedding_type="rope" if model.use_rotary_position_embeddings else "learned_absolute",
            rotary_base=model.rotary_base or 10000,
            rotary_percent=model.rotary_percent if model.rotary_percent is not None else 1.0,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            pre_process=parallel.groups.pp.rank() == 0 and stage == 0,
            post_process=parallel.is_last_stage and stage == sizes.virtual - 1,
            pg_collection=parallel.groups,
            vp_stage=stage if sizes.virtual > 1 else None,
        ).to(device)
        for stage in range(sizes.virtual)
    ]
    for piece in pieces:
        _mark_shards(piece)
        mark_experts(piece)
        if model.use_rotary_position_embeddings and not model.multi_latent_attention:
            piece.rotary_pos_emb.inv_freq = _frequencies(config)[0].to(device)
    return pieces


def _mark_shards(model: GPTModel) -> None:
    """Megatron marks what is cut over tensor-parallel ranks where it initializes a weight, which it does not do here.

    By the mark gradient norms count every shard, and once what all ranks have.
    """
    for module in model.modules():
        dim = next((dim for kind, dim in _CUT_ALONG.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def padded_vocab_size(config: Config, sizes: ParallelSizes) -> int:
    """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
    multiple = (config.model.make_vocab_size_divisible_by or 1) * sizes.tensor
    return -(-_set(config.model.vocab_size) // multiple) * multiple


def norm_class(transformer: TransformerConfig) -> type[torch.nn.Module]:
    """Of the norms of layers, of heads, and after the last layer."""
    if transformer.normalization != "RMSNorm":
        return LayerNorm
    return ZeroCentredRMSNorm if transformer.layernorm_zero_centered_gamma else RMSNorm


def _custom_spec(config: Config, transformer: TransformerConfig, stage: int | None) -> Any:
    """What `--spec MODULE NAME` holds: a spec, or a function of any of `args`, `config` and `vp_stage` that returns one."""
    from miles.config import args_view

    spec = load_spec(config.model.spec or ())
    if not inspect.isfunction(spec):
        return spec
    offered: dict[str, Callable[[], Any]] = {
        "args": lambda: args_view(config),
        "config": lambda: transformer,
        "vp_stage": lambda: stage,
    }
    wanted = inspect.signature(spec).parameters
    return spec(**{name: offered[name]() for name in wanted if name in offered})


def load_spec(path: tuple[str, ...]) -> Any:
    """The object that --spec names. Raises HookError where there is none."""
    if len(path) != 2:
        raise HookError(f"--spec, got {' '.join(path)!r}: it takes a module and a name in it; write --spec MODULE NAME")
    module, name = path
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise HookError(f"--spec, got {module} {name}: {error}; check the module path and the name") from error


def _set(value: int | None) -> int:
    if value is None:
        raise ConfigError("model shape, got None: the configuration was not resolved; make it with miles.config")
    return value
