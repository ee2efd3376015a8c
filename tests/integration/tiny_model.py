"""The smallest model that an engine serves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_qwen3(vocab_size: int, *, seed: int, **config: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of two layers with tied embeddings; the same weights for the same seed."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **shape, **config)).eval()
