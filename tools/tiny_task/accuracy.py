"""Accuracy on held-out problems by Hugging Face's own generation: a score that owes nothing to our engine or trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 4  # three digits and <|end|>


@dataclass(frozen=True)
class Accuracy:
    """Shares of exactly right answers, both over the same problems."""

    sampled: float
    """At temperature 1, over all samples of all problems."""
    greedy: float
    """At temperature 0."""
    num_problems: int
    num_samples: int
    """Samples per problem behind `sampled`."""

    def __str__(self) -> str:
        return (
            f"sampled {self.sampled:.3f} (T=1, {self.num_problems} problems x {self.num_samples})   "
            f"greedy {self.greedy:.3f} (T=0, {self.num_problems} problems)"
        )


def measure(model_dir: Path, prompt_file: Path, *, num_samples: int = 4, seed: int = 0) -> Accuracy:
    """Scores a Hugging Face checkpoint with its tokenizer on a prompt file of `{"prompt": messages, "label": text}`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in prompt_file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32).eval()
    texts = tokenizer.apply_chat_template([row["prompt"] for row in rows], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    prompt_tokens = inputs["input_ids"].shape[1]

    def share_correct(samples: int, **sampling: object) -> float:
        with torch.inference_mode():
            outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=samples, **sampling)
        answers = [_answer(ids, tokenizer) for ids in outputs[:, prompt_tokens:].tolist()]
        labels = [row["label"] for row in rows for _ in range(samples)]
        return sum(map(str.__eq__, answers, labels)) / len(labels)

    torch.manual_seed(seed)
    return Accuracy(
        sampled=share_correct(num_samples, do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
        greedy=share_correct(1, do_sample=False),
        num_problems=len(rows),
        num_samples=num_samples,
    )


def _answer(response: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before the end of the message, or "" when the message did not end in time."""
    end = tokenizer.eos_token_id
    return str(tokenizer.decode(response[: response.index(end)])) if end in response else ""
