"""Supervised training on the careless teacher's answers.

    question  <|user|> 2 7 + 4 8 = <|assistant|>
    right     '- 7 5 <|end|>        weight 0.4     both continue the same question and cannot see each other, so that
    careless  '- 6 5 <|end|>        weight 0.6     a question is computed once for its two answers

Weighting both answers is the expectation of drawing one of them, without the noise of the draw. RL needs what this leaves
behind: both answers with probability. Fewer steps leave some seeds with problems that no sample gets right, and where
no sample is right there is no reward to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .muon import Muon
from .problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

_PADDING = -100  # a target that is none, as F.cross_entropy has it


@dataclass(frozen=True)
class SftSpec:
    """How the base model is trained. Changing any value makes another base model."""

    careless_share: float = 0.6
    """How often the teacher drops the carries."""
    steps: int = 200
    questions_per_step: int = 96
    muon_lr: float = 0.03
    """For the matrices inside the layers."""
    muon_momentum: float = 0.85
    """The usual 0.95 averages over more steps than so short a training can afford."""
    adamw_lr: float = 3e-3
    """For the embedding and the norms."""
    muon_warmup_steps: int = 10
    adamw_warmup_steps: int = 30
    clip_grad_norm: float = 1.0


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    spec: SftSpec,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Trains `model` in place; `on_step(step, loss)` follows each step. Same seed and thread count, same weights."""
    generator = torch.Generator().manual_seed(seed)
    lessons = Lessons.make(tokenizer, problems, spec.careless_share)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_matrices = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_matrices]
    optimizers = [
        Muon(matrices, lr=spec.muon_lr, momentum=spec.muon_momentum),
        torch.optim.AdamW(others, lr=spec.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(warmup_steps, spec.steps))
        for optimizer, warmup_steps in zip(optimizers, (spec.muon_warmup_steps, spec.adamw_warmup_steps), strict=True)
    ]
    model.train()
    for step in range(1, spec.steps + 1):
        chosen = torch.randint(len(problems), (spec.questions_per_step,), generator=generator)
        loss = lessons.loss(model, chosen)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    model.eval()


def _warmup_cosine(warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate after `done` steps: a linear rise times a cosine that falls to 2 %."""

    def factor(done: int) -> float:
        step = done + 1
        return min(1.0, step / warmup_steps) * max(0.02, 0.5 * (1.0 + math.cos(math.pi * step / steps)))

    return factor


@dataclass(frozen=True)
class Lessons:
    """Every question with its two answers, as the model reads them.

    `N` questions of `P` tokens, answers of up to `A` tokens with `<|end|>`; a row is the question and then all but the
    last token of both answers: `S = P + 2 * (A - 1)` tokens.
    """

    tokens: torch.Tensor
    """[N, S]"""
    targets: torch.Tensor
    """[N, 2 * A], right answer first; `_PADDING` after its end."""
    weights: torch.Tensor
    """[2 * A]: how often the teacher gives this answer."""
    attention_mask: torch.Tensor
    """[1, 1, S, S] bool: causal, and no answer sees the other."""
    position_ids: torch.Tensor
    """[1, S]: both answers start right after the question."""
    predicting: torch.Tensor
    """[2 * A]: the positions whose logits are compared with `targets`."""

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], careless_share: float) -> Lessons:
        chats = [problem.as_row()["prompt"] for problem in problems]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        # Questions are all equally long; a ragged one would be an error of torch.tensor.
        prompts = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        answers = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for problem in problems
            for text in (problem.answer, problem.careless_answer)
        ]
        width = max(map(len, answers))
        targets = torch.tensor([ids + [_PADDING] * (width - len(ids)) for ids in answers])
        targets = targets.view(len(problems), 2, width)
        inputs = targets[:, :, :-1]
        inputs = inputs.masked_fill(inputs == _PADDING, tokenizer.pad_token_id)

        question, answer = prompts.shape[1], width - 1
        part = torch.tensor([0] * question + [1] * answer + [2] * answer)
        sees = (part[:, None] == part) | (part == 0)
        positions = [*range(question), *range(question, question + answer), *range(question, question + answer)]
        last = question - 1
        predicting = [last, *range(question, question + answer), last, *range(question + answer, len(part))]
        return cls(
            tokens=torch.cat([prompts, inputs.flatten(1)], dim=1),
            targets=targets.flatten(1),
            weights=torch.tensor([1.0 - careless_share] * width + [careless_share] * width),
            attention_mask=sees.tril()[None, None],
            position_ids=torch.tensor([positions]),
            predicting=torch.tensor(predicting),
        )

    def loss(self, model: Qwen3ForCausalLM, chosen: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of a token of the chosen questions' answers, over the teacher's habits."""
        rows = len(chosen)
        targets = self.targets[chosen]
        logits = model(
            input_ids=self.tokens[chosen],
            attention_mask=self.attention_mask.expand(rows, -1, -1, -1),
            position_ids=self.position_ids.expand(rows, -1),
            logits_to_keep=self.predicting,
            use_cache=False,
        ).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=_PADDING, reduction="none"
        ).view_as(targets)
        weights = self.weights * (targets != _PADDING)
        return (losses * weights).sum() / weights.sum()
