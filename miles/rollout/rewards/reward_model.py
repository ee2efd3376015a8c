"""reward_model: the score that a trained scalar head gives a whole sample, prompt and response.

    --rm-model DIR --once a worker--> HF sequence-classification model
    samples that wait --longest together, up to a budget--> one forward pass --> a score each

The model is given the tokens that the engine made; text is never tokenized a second time. So it must share the policy's
tokenizer, which launch checks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.errors import ConfigError
from miles.interfaces import Args
from miles.types import Sample

from .registry import register_reward

#: Tokens of a forward pass, padding included, unless one sample alone has more.
_BATCH_TOKENS = 16384

_models: dict[str, RewardModel] = {}


class RewardModel:
    """A model and the samples that wait for it, in one event loop."""

    def __init__(self, directory: str):
        """Loads the model: on a GPU where the worker sees one, in bf16; else on the CPU in the dtype of the files."""
        import torch
        from transformers import AutoModelForSequenceClassification

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self._device.type == "cuda" else "auto"
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
        self._model: Any = model.to(self._device).eval()
        self._waiting: list[tuple[Sequence[int], asyncio.Future[float]]] = []
        self._running: asyncio.Task[None] | None = None

    async def score(self, tokens: Sequence[int]) -> float:
        """The score of one text, in a pass with whatever else waits."""
        if not tokens:
            raise ValueError("sample, got no tokens: a reward model scores the last one; give prompt or response")
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        await asyncio.sleep(0)  # let the others of the same message join
        while self._waiting:
            batch = self._next_batch()
            try:
                scores = await asyncio.to_thread(self.forward, [tokens for tokens, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), score in zip(batch, scores, strict=True):
                if not future.done():  # a sample whose time is up waits no more
                    future.set_result(score)

    def _next_batch(self) -> list[tuple[Sequence[int], asyncio.Future[float]]]:
        """The longest that wait, so that little is padding."""
        self._waiting.sort(key=lambda entry: -len(entry[0]))
        size = max(1, _BATCH_TOKENS // len(self._waiting[0][0]))
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        return batch

    def forward(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The head at each text's last token, whatever that is: a text may end with the padding token."""
        import torch

        lengths = torch.tensor([len(tokens) for tokens in texts])
        padded = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for row, tokens in enumerate(texts):
            padded[row, : len(tokens)] = torch.as_tensor(tokens)
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        with torch.inference_mode():
            hidden = self._model.base_model(
                input_ids=padded.to(self._device), attention_mask=mask.to(self._device), use_cache=False
            ).last_hidden_state
            last = hidden[torch.arange(len(texts)), lengths - 1]
            scores: list[float] = self._model.score(last).squeeze(1).float().tolist()
        return scores


def _prepare(args: Args) -> None:
    """Loads the model at a worker's start, so that no sample pays for it out of its time."""
    if args.rm_model is not None and args.rm_model not in _models:
        _models[args.rm_model] = RewardModel(args.rm_model)


def _lacks(args: Args) -> tuple[str, str, str] | None:
    if args.rm_model is None:
        return "--rm-model", "asks a model", "give the directory of a reward model, such as run_qwen3_rm.sh exports"
    wrong = wrong_model(Path(args.rm_model), args.hf_checkpoint)
    return wrong and ("--rm-model", f"cannot be scored by {args.rm_model}: {wrong[0]}", wrong[1])


def wrong_model(directory: Path, policy: str | None) -> tuple[str, str] | None:
    """Why the directory is no reward model for this policy, and what to do; None if it is one."""
    fix = "name a directory that --loss-type rm exported"
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        return f"its config.json cannot be read ({type(error).__name__})", fix
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return f"it is a {', '.join(kinds) or 'model of no kind'}, which has no score", fix
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        return f"it has {labels} labels, and a reward is one number", fix
    ours, theirs = ((Path(place) / "tokenizer.json" if place else None) for place in (policy, directory))
    if ours and theirs and ours.is_file() and theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
        return (
            "its tokenizer.json is not that of --hf-checkpoint, and it scores tokens",
            "train one from the same family",
        )
    return None


@register_reward("reward_model", modules=("torch", "transformers"), lacks=_lacks, prepare=_prepare)
async def reward_model(args: Args, sample: Sample) -> float:
    """The model's score of prompt and response, as tokens."""
    if args.rm_model is None:
        raise ConfigError("--rm-model, got nothing: --rm-type reward_model asks a model; give its directory")
    _prepare(args)
    return await _models[args.rm_model].score(list(sample.tokens))
