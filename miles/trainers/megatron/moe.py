"""Mixture of experts: megatron's layer, of parts that run on any device.

    hidden [T, 1, H] -> router -> probabilities [T, E], 0 where a token does not go -> dispatcher -> this rank's experts
                                                                  hidden [T, 1, H] <- weighted sum <- dispatcher <-'

Legend: `T` tokens of this rank, `E` experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

# Megatron looks for this name also where Transformer Engine, which would have it, is not installed.
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


if not torch.cuda.is_available():
    # Collectives take counts of tokens as numpy arrays; megatron's own function converts those of a GPU alone.
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host


class _LinearOfExpert(RowParallelLinear):
    """Megatron's MLP adds an expert's bias to what this returns, in place, which autograd allows to no view."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, bias = super().forward(x)
        return (out if bias is None else out.clone()), bias


def moe_spec(router: type[TopKRouter]) -> ModuleSpec:
    """A layer of experts in the place of the MLP."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=_LinearOfExpert)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=router,
            experts=ModuleSpec(module=SequentialMLP, submodules=linears),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
        ),
    )


class Router(TopKRouter):
    """Megatron's router, whose balancing loss is a mean over all tokens of an optimizer step, however they are cut.

    Our losses are sums with their denominators inside, so nothing divides this one afterwards as megatron expects.
    """

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """`activation` as it is; its backward pass adds the gradient of `aux_loss`, this rank's part of a micro-batch's."""
        tokens = activation.shape[0] * reduce_group.size()
        scaled: Tensor = moe_utils.MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens / self.config.step_tokens)
        return scaled


def mark_experts(model: torch.nn.Module) -> None:
    """Gradients of experts are summed once, over the ranks that hold the same ones, and all of them count in the norm.

    Megatron says so only of weights, and only where experts are shared out. Where each tensor-parallel rank holds all experts,
    and a part of the tokens, it would not sum weights at all, sum biases twice, and count those on one rank alone.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False
                parameter.sequence_parallel = False
                parameter.tensor_model_parallel = True


def set_step_tokens(transformer: TransformerConfig, tokens_of_micro_batches: Iterable[int]) -> None:
    """Tells routers how many tokens their optimizer step has on all ranks. Every rank calls it; a no-op without balancing."""
    if transformer.num_moe_experts is None or not transformer.moe_aux_loss_coeff:
        return
    total = torch.tensor(float(sum(tokens_of_micro_batches)), device=torch.cuda.current_device())
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    transformer.step_tokens = total


def moe_fields(model: Any, layers: list[int], *, with_engine: bool) -> dict[str, Any]:
    """Megatron's configuration of the experts. `layers`: 1 for each that has some. `with_engine`: Transformer Engine's kernels
    are there."""
    if model.num_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        # A list says that layers differ, and checkpoints then keep each under its own name.
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": bool(model.moe_shared_expert_gate),
        "moe_router_score_function": model.moe_router_score_function or "softmax",
        "moe_router_pre_softmax": bool(model.moe_router_pre_softmax),
        "moe_router_num_groups": model.moe_router_num_groups,
        "moe_router_group_topk": model.moe_router_group_topk,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": bool(model.moe_router_enable_expert_bias),
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": with_engine and model.moe_grouped_gemm,
        "moe_permute_fusion": with_engine and model.moe_permute_fusion,
    }
