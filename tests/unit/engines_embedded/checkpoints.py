"""Tiny random checkpoints of every family the engine computes, and an engine in this process to run them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from miles.engines.embedded.__main__ import Engine
from miles.engines.embedded.options import EngineOptions
from miles.engines.embedded.requests import Job, Limits, parse_generate

CHARACTERS = "0123456789+-*=abcdefghijklmnopqrstuvwxyz ."
SPECIAL = ("<pad>", "<end>", "<unk>")
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
EOS = 1
CONTEXT_LENGTH = 256

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Any] = {
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=False),
    "qwen3_tied": lambda: Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3_untied": lambda: Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama_biased_llama3_rope": lambda: LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3_ROPE
    ),
    "mistral_every_head_its_own_kv": lambda: MistralConfig(
        **_SHAPE | {"num_key_value_heads": 4}, sliding_window=None, head_dim=8
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE | {"num_hidden_layers": 3},
        **{"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"decoder_sparse_step": 2, "norm_topk_prob": True, "tie_word_embeddings": False},
    ),
    "qwen2_one_kv_head": lambda: Qwen2Config(**_SHAPE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
}


#: Sharp distributions: rows differ, answers end at different times. Float32 rounding reaches some 1e-5 in a log-prob.
SHARP = 0.3
#: Logits up to about 8, as trained models have them; float32 rounding stays below 5e-6.
WELL_CONDITIONED = 0.15


def make_model(family: str, seed: int = 0, initializer_range: float = SHARP) -> PreTrainedModel:
    """A random model in eval mode; norms and biases are random too, so that none can be left out unseen."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.initializer_range = initializer_range
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Of transformers' ways to compute experts the one that also takes double.
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=[],
    )


def save_checkpoint(
    directory: Path, family: str = "qwen3_tied", seed: int = 0, initializer_range: float = SHARP
) -> PreTrainedModel:
    model = make_model(family, seed, initializer_range)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model


class InProcessEngine:
    """The production engine without its HTTP side."""

    def __init__(self, directory: Path, **options: Any) -> None:
        options = {"max_running_requests": 16, "device": "cpu", **options}
        self.engine = Engine(EngineOptions(model_path=str(directory), **options), token="unused")
        self.scheduler = self.engine.scheduler
        self.limits: Limits = self.engine.info.limits

    def submit(self, **body: Any) -> Any:
        return self.scheduler.submit(parse_generate(body, self.limits))

    def generate(self, **body: Any) -> Job:
        job: Job = self.submit(**body).result(60)
        return job

    def run(self, function: Any) -> Any:
        return self.scheduler.run(function).result(60)


@contextmanager
def running_engine(directory: Path, **options: Any) -> Iterator[InProcessEngine]:
    engine = InProcessEngine(directory, **options)
    engine.scheduler.start()
    try:
        yield engine
    finally:
        engine.scheduler.stop(10)
