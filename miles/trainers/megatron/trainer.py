"""One rank of the megatron trainer: what the cluster's actors drive.

    TrainBatch -> [reference log-probs] -> [old log-probs] -> [values] -> for each optimizer step, of critic and actor:
                  forward and backward over micro-batches -> all finite? -> clip, step, schedule
    named_weights -> HF-named tensors for the engines        save / finish_save / load_initial -> checkpoints

All ranks call each method together, in the same order. Nothing here knows of Ray, engines or rewards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.algo import finish_metrics
from miles.config.groups import Config
from miles.config.parallel import parallel_sizes
from miles.errors import CheckpointError, DataError, NonFiniteError
from miles.observe.timers import Timers
from miles.trainers import checkpoints
from miles.trainers.losses import build_loss
from miles.types import TrainBatch

from . import checkpoint, cpu, rng
from .critic import Critic
from .hf_files import write_hf_directory
from .learner import Learner, NonFiniteStep, reduce_metrics
from .model import build_model, build_scalar_model, params_dtype, shares_prompts
from .model_weights import ModelWeights, name_map
from .packing import MicroBatch, pack, split_rows, traced_log_probs, with_last_inputs
from .parallel import Parallel
from .preparation import critic_advantages, entropy_mask, token_advantage_spec, token_advantages
from .roles import SleepingWeights
from .scores import ScorePasses
from .step import KnownLogProbs, Mismatched, Passes
from .teacher import Teacher

logger = logging.getLogger(__name__)

#: Metrics that compare the trainer with the engine.
_MISMATCH = ("train_rollout_logprob_abs_diff", "train_rollout_logprob_abs_diff_max", "train_rollout_kl", "ess")


class MegatronTrainer:
    """The policy and its optimizer, where KL is wanted its frozen reference, and for PPO its critic, on one rank."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        master_addr: str,
        master_port: int,
        run_dir: Path,
        total_optimizer_steps: int,
    ):
        """Joins the process group and builds model and optimizer; `load_initial` then gives them weights.

        `total_optimizer_steps` is the run's, which the learning rate decays over. Files for a post-mortem go to `run_dir`.
        """
        self.config, self.run_dir = config, Path(run_dir)
        self.traced: dict[int, np.ndarray] = {}
        """Log-probs, before the first update, of the samples that the last batch had traced; see `traced_log_probs`."""
        self._total_steps = total_optimizer_steps
        self._loss = build_loss(config)
        if config.cluster.deterministic_mode:
            _deterministic_kernels()
        backend = config.cluster.distributed_backend
        if backend == "auto":
            backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.parallel = Parallel(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            master_addr=master_addr,
            master_port=master_port,
            backend=backend,
            timeout_s=60 * config.cluster.distributed_timeout_minutes,
            sizes=parallel_sizes(config),
        )
        try:
            rng.seed(config.cluster.seed)
            self.dtype = params_dtype(self.parallel.device)
            self._names = name_map(config, self.parallel)
            with cpu.cuda_means_cpu():
                build = build_scalar_model if self._loss.of_scores else build_model
                self._model = build(config, self.parallel)
            tied = not config.model.untie_embeddings_and_output_weights
            self._weights = ModelWeights(self._model, self._names, self.parallel, tied=tied)
            self._critic: Critic | None = None
            self._teacher = Teacher(config, self.parallel) if config.ckpt.teacher_load is not None else None
            if config.grpo.advantage_estimator == "ppo":
                self._critic = Critic(config, self._names, self.parallel, total_steps=total_optimizer_steps)
        except BaseException:
            self.close()
            raise
        self._share_prompts = shares_prompts(config, self.parallel.device)
        self._reference: SleepingWeights | None = None
        self._old_actor: SleepingWeights | None = None
        """The weights that made the rollout which comes next."""
        self._timers = Timers()

    @property
    def global_step(self) -> int:
        """The actor's optimizer steps so far."""
        return self._actor.steps

    # ------------------------------------------------------------------------------------------------------------ weights

    def load_initial(self, resume_from: Path | None) -> int:
        """Gives the actor its weights, and the reference where KL is used. Returns the rollout to begin with.

        `resume_from`, a whole checkpoint, is continued; without one the actor starts from --ref-load, else
        --hf-checkpoint, at rollout 0. Raises CheckpointError.
        """
        ckpt = self.config.ckpt
        warm_start = ckpt.ref_load or ckpt.hf_checkpoint
        if self._loss.needs_reference or resume_from is None:
            if warm_start is None:
                raise CheckpointError(
                    "--hf-checkpoint, got none: there are no weights to start from; name an HF directory"
                )
            self.load_weights(warm_start)
        if self._loss.needs_reference:
            self._reference = SleepingWeights(self._model)
        if self.config.grpo.keep_old_actor and self.config.rollout.rollouts_ahead:
            self._old_actor = SleepingWeights(self._model)
        if self._critic is not None:
            self._critic.start(warm_start if resume_from is None else None)
        self._build_training()
        return self.load(resume_from) if resume_from is not None else 0

    def load_weights(self, path: str) -> None:
        """Fills the model from an HF directory or a Megatron checkpoint (one, or the current one of a series)."""
        self._weights.load(path)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """HF-named full tensors, streamed in a fixed order; every rank iterates. A tied output weight is not sent.

        In the model's dtype and on its device. A tensor may be the model's own memory: copy it before the next step.
        """
        return self._weights.stream()

    # ----------------------------------------------------------------------------------------------------------- training

    def _build_training(self) -> None:
        """Gradient buffers, optimizer and schedule, around the weights as they are now: masters are copied from them."""
        config = self.config
        extra = config.grpo.num_critic_only_steps * (config.rollout.num_steps_per_rollout or 1)
        self._actor = Learner(
            self._model, config.optimizer, config.perf, self.parallel, total_steps=max(1, self._total_steps - extra)
        )
        self._passes: Passes | ScorePasses
        if self._loss.of_scores:
            self._passes = ScorePasses(self._actor.ddp, self.parallel, self._loss)
            return
        self._passes = Passes(
            self._actor.ddp,
            self.parallel,
            vocab_size=self._names.shape.vocab_size,
            chunk_tokens=config.perf.log_probs_chunk_size,
            loss=self._loss,
            teacher=self._teacher,
            use_rollout_logprobs=config.grpo.use_rollout_logprobs,
        )

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """All optimizer steps of one rollout. Returns metrics, equal on all ranks.

        Raises NonFiniteError before the optimizer moves anything, with the batch saved in the run directory, where the
        loss or a gradient is not finite; DataError where the batch lacks the engine's log-probs and a flag needs them.
        """
        self._check(batch)
        steps = self._pack(batch)
        known, prepared = self._prepare(batch, steps)
        if self._old_actor is not None:
            self._old_actor.take()
        per_step: list[dict[str, float]] = [{} for _ in steps]
        if self._critic is not None:
            assert known.values is not None
            assert known.returns is not None
            with self._timers.phase("critic_train"):
                for number, micro_batches in enumerate(steps):
                    with self._keeping_non_finite(batch, number, "critic's "):
                        per_step[number] |= self._critic.step(micro_batches, known.values, known.returns)
            self._critic.learner.finish()
        self.traced = {}
        if batch.rollout_id >= self.config.grpo.num_critic_only_steps:
            self._train_actor(batch, steps, known, per_step)
        interval = self.config.ckpt.ref_update_interval
        if interval is not None and self._reference is not None and (batch.rollout_id + 1) % interval == 0:
            self._reference.take()
        return {**self._metrics(batch, steps, per_step), **prepared}

    def _train_actor(
        self,
        batch: TrainBatch,
        steps: Sequence[Sequence[MicroBatch]],
        known: KnownLogProbs,
        per_step: list[dict[str, float]],
    ) -> None:
        """The actor's optimizer steps; their metrics go into `per_step`."""
        is_traced = bool(batch.metadata.get("traced")) and batch.num_rows > 0
        if is_traced and known.old is None:
            num_tokens = int(batch.rows["response_lengths"].sum())
            self._passes.seen = torch.full((num_tokens,), math.nan, device=self.parallel.device)
        first = known.old
        mismatched = self._mismatched(batch)
        with self._timers.phase("actor_train"):
            for number, micro_batches in enumerate(steps):
                backward = functools.partial(self._passes.loss_and_gradients, micro_batches, known, mismatched[number])
                with self._keeping_non_finite(batch, number):
                    made = self._actor.step(backward)
                if self._passes.seen is not None:  # later steps compute those of a policy that has moved
                    first, self._passes.seen = self._passes.seen, None
                # The engine's policy is the one before the first step: later steps would measure the update as well.
                if number > 0 and self.config.grpo.use_rollout_logprobs:
                    made = {k: v for k, v in made.items() if k not in _MISMATCH}
                per_step[number] |= made
        self._actor.finish()
        if is_traced and first is not None:
            self.traced = traced_log_probs(first, batch)

    def evaluate(self, batch: TrainBatch) -> dict[str, float]:
        """The loss of `batch`, one optimizer step, with its metrics and without a gradient. Equal on all ranks."""
        self._check(batch)
        steps = self._pack(batch)
        known, _ = self._prepare(batch, steps)
        [micro_batches], [mismatched] = steps, self._mismatched(batch)
        reduced = reduce_metrics(self._passes.evaluate(micro_batches, known, mismatched), self.parallel)
        self._timers.take()
        return finish_metrics(reduced)

    def _pack(self, batch: TrainBatch) -> list[list[MicroBatch]]:
        """The micro-batches of each optimizer step."""
        if self._loss.of_scores:
            batch = with_last_inputs(batch)
        return pack(batch, self.parallel.device, share_prompts=self._share_prompts, split=self.parallel.token_split)

    def _check(self, batch: TrainBatch) -> None:
        if not batch.steps or any(not step for step in batch.steps):
            raise DataError(
                f"batch of rollout {batch.rollout_id}, got micro-batches {[len(s) for s in batch.steps]}: every optimizer "
                "step needs one, an empty one where there are no rows"
            )
        if self._loss.needs_rollout_log_probs and "rollout_log_probs" not in batch.ragged:
            raise DataError(
                f"batch of rollout {batch.rollout_id}, got no rollout_log_probs: --use-tis, --off-policy-correction, "
                "--policy-loss dppo and --use-rollout-logprobs need them; let the generation function keep the engine's log-probs"
            )

    def _prepare(
        self, batch: TrainBatch, steps: Sequence[Sequence[MicroBatch]]
    ) -> tuple[KnownLogProbs, dict[str, float]]:
        """The passes that come before the first update and what is made of them, with its metrics."""
        grpo = self.config.grpo
        flat = [micro_batch for step in steps for micro_batch in step]
        num_tokens = len(batch.ragged["tokens"]) and int(batch.rows["response_lengths"].sum())
        spec = token_advantage_spec(grpo)
        metrics: dict[str, float] = {}
        teacher = scores = advantages = policy_mask = values = returns = None
        reference = self._reference_log_probs(batch, steps)
        if "teacher_log_probs" in batch.ragged:
            teacher = torch.from_numpy(batch.ragged["teacher_log_probs"]).to(self.parallel.device)
        elif grpo.use_opd:
            assert self._teacher is not None, "checked at launch"
            with self._timers.phase("teacher_log_probs"):
                teacher = self._teacher.log_probs(flat, num_tokens)
        compares = spec.kl_coef != 0 or spec.opd_kl_coef != 0
        old_actor = self._old_actor
        needs_old = (len(steps) > 1 or compares or old_actor is not None) and self._loss.needs_old_log_probs
        if needs_old or grpo.entropy_quantile < 1:
            behind_it = old_actor.awake() if old_actor is not None else contextlib.nullcontext()
            with self._timers.phase("old_log_probs"), behind_it:
                scores = self._passes.score(flat, num_tokens)
        old = scores.log_probs if scores is not None and needs_old else None
        if not spec.is_identity:
            behind = self._rollout_log_probs(batch) if grpo.use_rollout_logprobs else old
            if self._critic is not None:
                with self._timers.phase("values"):
                    values = self._critic.values(flat, num_tokens)
                advantages, returns, made = critic_advantages(
                    batch, spec, self.parallel, values, behind, reference, teacher
                )
            else:
                advantages, made = token_advantages(batch, spec, self.parallel, behind, reference, teacher)
            metrics |= {f"train/{name}": value for name, value in made.items()}
        if grpo.entropy_quantile < 1:
            assert scores is not None
            policy_mask = entropy_mask(batch, scores.entropies, grpo.entropy_quantile, self.parallel)
        if len(steps) == 1 and old_actor is None:  # the step's own log-probs are the old ones, to the last bit
            old = None
        return KnownLogProbs(old, reference, advantages, policy_mask, values, returns), metrics

    def _mismatched(self, batch: TrainBatch) -> list[Mismatched | None]:
        """Of each optimizer step, with the reference's log-probs where the loss has one."""
        if batch.mismatched is None:
            return [None] * len(batch.steps)
        steps = pack(
            batch.mismatched, self.parallel.device, share_prompts=self._share_prompts, split=self.parallel.token_split
        )
        known = KnownLogProbs(reference=self._reference_log_probs(batch.mismatched, steps))
        return [Mismatched(micro_batches, known) for micro_batches in steps]

    def _reference_log_probs(self, batch: TrainBatch, steps: Sequence[Sequence[MicroBatch]]) -> Tensor | None:
        """[response tokens of the batch]; None where the loss has no reference."""
        if "ref_log_probs" in batch.ragged:
            return torch.from_numpy(batch.ragged["ref_log_probs"]).to(self.parallel.device)
        if self._reference is None:
            return None
        num_tokens = len(batch.ragged["tokens"]) and int(batch.rows["response_lengths"].sum())
        with self._timers.phase("ref_log_probs"), self._reference.awake():
            return self._passes.score([m for step in steps for m in step], num_tokens).log_probs

    def _rollout_log_probs(self, batch: TrainBatch) -> Tensor:
        return torch.from_numpy(batch.ragged["rollout_log_probs"]).to(self.parallel.device)

    @contextlib.contextmanager
    def _keeping_non_finite(self, batch: TrainBatch, number: int, whose: str = "") -> Iterator[None]:
        """Of a step that is not finite, the batch is kept and the error names it."""
        try:
            yield
        except NonFiniteStep as found:
            raise self._non_finite(batch, number, whose, found.loss, found.norm) from None

    def _metrics(
        self, batch: TrainBatch, steps: Sequence[Sequence[MicroBatch]], per_step: Sequence[dict[str, float]]
    ) -> dict[str, float]:
        """Means over the optimizer steps that have a value; the largest of maxima; totals of counts."""
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(name for step in per_step for name in step):
            values = [step[name] for step in per_step if name in step]
            if name.endswith("_max"):
                metrics[f"train/{name}"] = max(values)
            elif name == "scored_tokens":
                metrics[f"train/{name}"] = sum(values)
            else:
                metrics[f"train/{name}"] = sum(values) / len(values)
        if "ratio" in per_step[0]:  # not where all rows of the first step were skipped
            metrics["train/ratio_first"] = per_step[0]["ratio"]
        metrics["train/rows_skipped"] = float(sum(total.num_skipped_rows for total in batch.totals))
        metrics["train/global_step"] = float(self.global_step)
        tokens = torch.tensor([float(len(batch.ragged["tokens"]))], dtype=torch.float64, device=self.parallel.device)
        metrics["perf/train_tokens"] = float(self.parallel.sum_over_data(tokens))
        if self.parallel.device.type == "cuda":
            metrics["memory/trainer_cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.parallel.device))
            torch.cuda.reset_peak_memory_stats(self.parallel.device)
        return metrics | self._timers.take()

    def _non_finite(self, batch: TrainBatch, number: int, whose: str, loss: float, norm: float) -> NonFiniteError:
        path = self.run_dir / f"nonfinite-{batch.rollout_id}-rank{self.parallel.rank}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {**batch.rows, **batch.ragged}
        arrays |= {f"step{s}.micro_batch{m}": rows for s, step in enumerate(batch.steps) for m, rows in enumerate(step)}
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return NonFiniteError(
            f"{whose}optimizer step {number} of rollout {batch.rollout_id}, got loss {loss} and gradient norm {norm}: the weights "
            f"were not touched and the batch is in {path}; look for extreme log-probs or rewards there"
        )

    def reference_log_probs(self, batch: TrainBatch) -> np.ndarray:
        """The reference's log-probs of the response tokens, in the batch's order; float32."""
        steps = pack(batch, self.parallel.device, share_prompts=self._share_prompts, split=self.parallel.token_split)
        found = self._reference_log_probs(batch, steps)
        assert found is not None, "checked at launch: the loss has a reference"
        self._timers.take()
        return found.float().cpu().numpy()

    def drop_reference(self) -> None:
        """Frees the reference: from now on every batch brings its log-probs."""
        self._reference = None

    def log_probs(self, batch: TrainBatch) -> list[np.ndarray]:
        """The actor's log-probs of each row's response tokens, at the row's temperature."""
        flat = [
            micro_batch
            for step in pack(
                batch, self.parallel.device, share_prompts=self._share_prompts, split=self.parallel.token_split
            )
            for micro_batch in step
        ]
        num_tokens = int(batch.rows["response_lengths"].sum())
        scores = self._passes.score(flat, num_tokens)
        return list(split_rows(scores.log_probs.cpu().numpy(), batch))

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def save(self, directory: str | Path, iteration: int, extra: dict[str, Any] | None = None) -> None:
        """Writes everything that `load` needs, under a temporary name; `finish_save` makes it current. Every rank calls it.

        `iteration` counts finished training rollouts, so it is also the rollout that a resumed run begins with. `extra` is
        the caller's own state, JSON-ready: `checkpoints.read_state` gives it back.
        """
        with_optimizer = not self.config.ckpt.no_save_optim
        critic = self._critic
        checkpoint.save_state(
            directory,
            iteration,
            model=self._model,
            optimizer=self._actor.optimizer if with_optimizer else None,
            critic=(critic.model, critic.learner.optimizer if with_optimizer else None) if critic is not None else None,
            state={
                "global_step": self.global_step,
                "critic_steps": critic.learner.steps if critic is not None else None,
                "optimizer": self.config.optimizer.optimizer if with_optimizer else None,
                "distributed_optimizer": self.config.perf.use_distributed_optimizer,
                "model": dataclasses.asdict(self.config.model),
                "world_size": self.parallel.world_size,
                "extra": extra or {},
            },
            parallel=self.parallel,
            others=self._sleeping(),
        )
        if critic is not None and self.config.ckpt.critic_save is not None:
            critic.save_hf(self.config.ckpt.critic_save)

    def finish_save(self, directory: str | Path, iteration: int) -> None:
        """Makes a checkpoint that every rank has saved the current one, then removes those that --save-retain-interval
        does not keep. The main rank alone calls it."""
        checkpoints.finish(directory, iteration)
        if (interval := self.config.ckpt.save_retain_interval) is not None:
            checkpoints.prune(directory, interval)

    def load(self, found: Path) -> int:
        """Continues from a whole checkpoint: weights, moments, steps, rate and random streams.

        Hyper-parameters are the flags', not the checkpoint's. Returns the rollout to begin with. Raises CheckpointError
        where the checkpoint does not fit.
        """
        state = checkpoints.read_state(found)
        checkpoints.check_kind(
            found,
            state,
            optimizer=self.config.optimizer.optimizer,
            with_critic=self._critic is not None,
            distributed=self.config.perf.use_distributed_optimizer,
        )
        self._load_others(found)
        with_optimizer = state.get("optimizer") is not None
        optimizer = self._actor.optimizer if with_optimizer else None
        checkpoint.load_state(found, model=self._model, optimizer=optimizer, parallel=self.parallel)
        if not with_optimizer:
            logger.warning("checkpoint %s has no optimizer state: its moments start at zero", found)
        self._actor.continue_from(int(state["global_step"]), with_optimizer=with_optimizer)
        if self._critic is not None:
            self._critic.load(found, steps=int(state.get("critic_steps") or 0), with_optimizer=with_optimizer)
        checkpoint.load_rng(found, self.parallel)
        return int(state["iteration"])

    def _sleeping(self) -> dict[str, SleepingWeights]:
        """Further weights that a checkpoint needs, by the name of their directory in it."""
        found = {}
        if self._reference is not None and not self._reference.is_first:
            found[checkpoint.REFERENCE] = self._reference
        if self._old_actor is not None:
            found[checkpoint.OLD_ACTOR] = self._old_actor
        return found

    def _load_others(self, found: Path) -> None:
        """Further weights of a checkpoint; before the actor's, since they pass through the model. Where it has none of an earlier
        actor, no rollout was made ahead of it: the next one is made by its own weights."""
        for name, weights in ((checkpoint.REFERENCE, self._reference), (checkpoint.OLD_ACTOR, self._old_actor)):
            if weights is None:
                continue
            if (found / name).is_dir():
                checkpoint.load_state(found / name, model=self._model, optimizer=None, parallel=self.parallel)
                weights.take()
            elif name == checkpoint.OLD_ACTOR:
                checkpoint.load_state(found, model=self._model, optimizer=None, parallel=self.parallel)
                weights.take()

    def save_hf(self, path: str | Path) -> None:
        """Writes an HF directory that transformers loads, with the tokenizer of --hf-checkpoint. Every rank calls it."""
        source = self.config.ckpt.hf_checkpoint
        if source is None:
            raise CheckpointError("--save-hf, got no --hf-checkpoint: config and tokenizer are copied from it; name it")
        if self.parallel.is_main:
            tensors = itertools.chain(self.named_weights(), self._weights.untrained(source))
            write_hf_directory(path, tensors, source=source, dtype=self.dtype, one_score=self._loss.of_scores)
        else:
            for _ in self.named_weights():
                pass
        self.parallel.barrier()

    def close(self) -> None:
        """Leaves the process group. Safe to call twice."""
        self.parallel.close()


def _deterministic_kernels() -> None:
    """Refuses kernels whose result depends on timing. The variables are read when CUDA's libraries start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
