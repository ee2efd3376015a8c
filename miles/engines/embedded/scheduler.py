"""Continuous batching: the decode thread, and the only code that touches model, cache and weights while the engine runs.

    submit(job) --> waiting rows --admit--> running rows --step--> ... --> finished --> the job's future
                                   prefill          sample, drop finished, decode
    run(fn)     --> executed between two steps: pause, abort, weight updates, statistics

Admission is first come, first served, and reserves room for all that a row may become, so a running row is never evicted.
Equal prompts are computed once, also against rows that are already running, and shared by copy.

Deterministic inference: prompts are prefilled one at a time, every step has the full batch's shape, and the cache has its
final size from the start. A row's arithmetic then depends on its own tokens, seed and length alone.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from miles.errors import EngineError, WeightUpdateError

from .batch import Batch, Feature
from .cache import EXTENT_STEP, KVCache, round_extent
from .model import DecoderModel
from .requests import Job, Row, Token, max_new_tokens
from .sampler import Sampler, top_tokens
from .sampling import log_probs
from .segment import TensorSpec
from .text import Tokenizer, find_text_stops
from .weights import WeightState

logger = logging.getLogger(__name__)
T = TypeVar("T")
PauseMode = Literal["abort", "retract", "in_place"]

#: Padded tokens of one prefill pass, unless a single prompt is longer.
PREFILL_TOKENS = 8192
#: Prompts of one pass are at least this fraction of the longest one's length.
PREFILL_MIN_FILL = 0.75
#: Positions whose prompt log-probs are computed at once: bounds the [positions, vocab] buffer.
PROMPT_LOGITS_CHUNK = 256
#: An idle engine starts when no request has come for this long, or after GATHER_LIMIT_S.
ARRIVAL_GAP_S = 0.001
GATHER_LIMIT_S = 0.01
#: Where more rows wait than fit, they join a running batch when this fraction of it is free: a prefill pass for a row or two
#: costs about as much as a decode step of the whole batch.
JOIN_FRACTION = 0.125
#: In a fixed batch the number of rows is a multiple of this, so that no row falls into a vector loop's scalar remainder.
FIXED_ROWS_STEP = 32


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes, fixed at launch."""

    max_running_requests: int
    max_total_tokens: int
    """rows x longest row; a multiple of EXTENT_STEP"""
    context_length: int
    deterministic: bool
    random_seed: int | None = None


@dataclass
class Counters:
    """Totals since the start."""

    decode_steps: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    shared_prompt_tokens: int = 0
    """Prompt tokens that were copied instead of computed."""
    finished_rows: int = 0
    failures: int = 0


@dataclass
class _Prompt:
    """A prompt that some running row still holds in the cache."""

    hidden: torch.Tensor
    """[H] of its last token"""
    rows: set[Row] = field(default_factory=set)


class Scheduler:
    """Owns the decode thread. `submit` and `run` may be called from any thread; the rest runs on the decode thread."""

    _is_outdated: bool
    """Rows of the batch have hidden states of other weights."""

    def __init__(
        self,
        model: DecoderModel,
        weights: WeightState,
        limits: SchedulerLimits,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        """`on_fatal` is called from the decode thread when it cannot go on (a broken device context)."""
        self.limits, self.counters, self.weights = limits, Counters(), weights
        self._model, self._tokenizer, self._eos_token_ids = model, tokenizer, tuple(sorted(eos_token_ids))
        self._on_fatal = on_fatal
        config, parameters = model.config, model.parameters
        self._device = parameters.device
        rows = limits.max_running_requests
        if limits.deterministic:
            rows = fixed_rows(rows)
        self._num_places = rows
        self._fixed_rows = rows if limits.deterministic else None
        self._cache = KVCache(
            config,
            self._device,
            parameters.dtype,
            max_tokens=limits.max_total_tokens,
            fixed=(rows, round_extent(limits.context_length)) if limits.deterministic else None,
        )
        self._reset()
        self._hidden = torch.zeros(rows, config.hidden_size, device=self._device, dtype=parameters.dtype)
        self._waiting: deque[Row] = deque()
        self._futures: dict[Job, Future[Job]] = {}
        self._paused = self._stopping = False
        self._seeds = np.random.default_rng(secrets.randbits(128) if limits.random_seed is None else limits.random_seed)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="decode", daemon=True)

    # ------------------------------------------------------------------------------------------------- any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the decode thread; what runs or waits is answered as aborted."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> Future[Job]:
        """The future holds the same job, its rows filled in, or `EngineError` where the decode thread failed on it."""
        future: Future[Job] = Future()
        self._inbox.put(lambda: self._enqueue(job, future))
        return future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Calls `function` on the decode thread, between two steps."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(call)
        return future

    # ---------------------------------------------------------------------------------------------- decode thread

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self, mode: PauseMode = "abort") -> None:
        """Stops between two steps; later requests wait for `resume`. Pausing again keeps those waiting.

        What runs ends with what it has (abort, and what waits ends too), goes on from its tokens after a new prefill (retract),
        or stays where it is, its cache of the old weights included (in_place).
        """
        if mode == "abort":
            waits = self._paused
            self.abort(lambda row: not waits or row.index >= 0, "the engine was paused")
        elif mode == "retract":
            self._retract()
        self._paused = True
        self.weights.restart()

    def resume(self) -> None:
        """Raises `WeightUpdateError` while the weights are not whole, or are not what was loaded."""
        if self.weights.updating:
            raise WeightUpdateError(
                "continue_generation, got a request in the middle of a weight update: the weights are not whole; "
                "send all buckets and /update_weight_version first"
            )
        self.weights.check_kept()
        if self._is_outdated:
            self._compute_last_tokens_again()
            self._is_outdated = False
        self._paused = False

    def abort(self, matches: Callable[[Row], bool], message: str) -> int:
        """Ends matching rows with what they have; returns how many."""
        reason = {"type": "abort", "message": message, "status_code": None, "err_type": None}
        waiting = [row for row in self._waiting if matches(row)]
        if waiting:
            gone = set(waiting)
            self._waiting = deque(row for row in self._waiting if row not in gone)
            for row in waiting:
                self._complete(row, row.made_ids, row.made_log_probs, reason)
        running = [row.index for row in self._batch.rows if matches(row)]
        self._finish(np.array(sorted(running), np.int64), [reason] * len(running))
        return len(waiting) + len(running)

    def load_bucket(
        self,
        segment: str,
        specs: Sequence[TensorSpec],
        version: str | None,
        progress_bytes: int | None = None,
        serial: int | None = None,
        samples_bytes: int | None = None,
        *,
        resume: bool = False,
    ) -> dict[str, str]:
        """Loads one bucket of a weight update, completes the update where `version` is given, and serves it with `resume`.

        See `WeightState.load_bucket`. Raises `WeightUpdateError`; the weights are then torn.
        """
        if resume and not self._paused and version is not None and self.weights.holds(version, segment, serial):
            # Sent again, since the answer was lost.
            return {}
        if not self._paused:
            raise WeightUpdateError(
                "update_weights_from_tensor, got a bucket while serving: rows would mix two weight versions; "
                "POST /pause_generation first"
            )
        self._is_outdated = self._batch.num_rows > 0
        if version is not None:
            self.weights.check_completes([spec.name for spec in specs])
        checksums = self.weights.load_bucket(segment, specs, progress_bytes, serial, samples_bytes)
        if version is not None:
            self.set_version(version)
        if resume:
            self.resume()
        return checksums

    def set_version(self, version: str) -> None:
        """Completes a weight update, or renames whole weights; running rows note where the new name begins."""
        self.weights.finish(version)
        for row in self._batch.rows:
            row.versions.append((version, int(self._batch.columns[row.index]["step"])))

    def flush_cache(self) -> bool:
        """Drops the KV cache; False where rows hold some of it or wait to be served."""
        if self._batch.num_rows or (self._waiting and not self._paused):
            return False
        self._cache.clear()
        return True

    def stats(self) -> dict[str, Any]:
        """What /server_info reports of the moment."""
        return {
            "num_running_reqs": self._batch.num_rows,
            "num_waiting_reqs": len(self._waiting),
            "paused": self._paused,
            "updating_weights": self.weights.updating,
            "weight_version": self.weights.version,
            "kv_cache_bytes": self._cache.num_bytes,
            **vars(self.counters),
        }

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException as error:
            logger.exception("decode thread died")
            self._on_fatal(error)

    def _serve(self) -> None:
        while not self._stopping:
            busy = not self._paused and (self._batch.num_rows or self._waiting)
            if not busy:
                self._inbox.get()()
                self._gather_arrivals()
            while not self._inbox.empty():
                self._inbox.get()()
            if self._stopping or self._paused:
                continue
            admitted: list[Row] = []
            try:
                self._admit(admitted)
                if self._batch.num_rows:
                    self._step()
            except Exception as error:
                self._recover(error, admitted)

    def _gather_arrivals(self) -> None:
        """From idle, waits while requests keep coming: those of one rollout then start, and step, together."""
        until = time.monotonic() + GATHER_LIMIT_S
        while self._waiting and not self._paused and not self._stopping and time.monotonic() < until:
            try:
                self._inbox.get(timeout=ARRIVAL_GAP_S)()
            except queue.Empty:
                return

    def _reset(self) -> None:
        """An empty batch."""
        vocab_size = self._model.config.vocab_size
        self._batch = Batch(self._num_places, vocab_size)
        self._sampler = Sampler(self._batch, vocab_size, self._device)
        self._prompts: dict[bytes, _Prompt] = {}
        self._is_outdated = False

    def _stop(self) -> None:
        self._stopping = True
        self.abort(lambda row: True, "the engine is shutting down")

    def _enqueue(self, job: Job, future: Future[Job]) -> None:
        if self._stopping:
            future.set_exception(EngineError("generate, got a request while shutting down: ask another engine"))
            return
        if not future.set_running_or_notify_cancel():
            return
        self._futures[job] = future
        self._waiting.extend(job.rows)

    # ---- admission and prefill

    def _admit(self, admitted: list[Row]) -> None:
        """Moves waiting rows into the batch; `admitted` names them, so that a failure half-way can be answered."""
        batch, limits = self._batch, self.limits
        free = limits.max_running_requests - batch.num_rows
        if batch.num_rows and free < min(len(self._waiting), int(JOIN_FRACTION * limits.max_running_requests)):
            return
        extent = int(batch.live["capacity"].max()) if batch.num_rows else 0
        while self._waiting and batch.num_rows + len(admitted) < limits.max_running_requests:
            row = self._waiting[0]
            extent = max(extent, len(row.input_ids) + max_new_tokens(row.input_ids, row.params, limits.context_length))
            num_rows = batch.num_rows + len(admitted) + 1
            if not limits.deterministic and num_rows * round_extent(extent) > limits.max_total_tokens:
                break
            admitted.append(self._waiting.popleft())
        if not admitted:
            return
        version = self.weights.version
        for row in admitted:
            if not row.versions or row.versions[-1][0] != version:
                row.versions.append((version, len(row.made_ids)))
        longest = max(len(row.context) for row in admitted)
        held = int(batch.live["length"].max()) if batch.num_rows else 0
        self._cache.reserve(batch.num_rows + len(admitted), max(longest, held) + 1, kept_rows=batch.num_rows)

        shared: list[Row] = []
        computed: dict[bytes, list[Row]] = {}
        for row in admitted:
            if row.prompt_key in self._prompts and not row.wants_prompt_scores:
                shared.append(row)
            else:
                computed.setdefault(row.prompt_key, []).append(row)
        if shared:
            self._share(shared)
        prompts = list(computed.values())
        for group in plan_prefill([len(rows[0].context) for rows in prompts], one_at_a_time=limits.deterministic):
            self._prefill([prompts[i] for i in group])
        self._finish_exhausted_at_once()

    def _share(self, rows: Sequence[Row]) -> None:
        """Rows whose prompt a running row holds: copies its cache."""
        # Chosen before any row is added: a newcomer's own cache holds nothing yet.
        sources = [next(iter(self._prompts[row.prompt_key].rows)).index for row in rows]
        targets = []
        for row in rows:
            prompt = self._prompts[row.prompt_key]
            targets.append(self._add(row, prompt))
            self._hidden[targets[-1]] = prompt.hidden
            row.cached_tokens = len(row.input_ids)
            self.counters.shared_prompt_tokens += len(row.context)
        self._cache.copy_rows(sources, targets, max(len(row.context) for row in rows))

    def _prefill(self, prompts: Sequence[Sequence[Row]]) -> None:
        """One pass over distinct prompts; `prompts[i]` are the rows that share prompt `i`."""
        lengths = np.array([len(rows[0].context) for rows in prompts])
        padded = np.zeros((len(prompts), int(lengths.max())), np.int64)
        for i, rows in enumerate(prompts):
            padded[i, : lengths[i]] = rows[0].context
        sources = np.repeat(np.arange(len(prompts)), [len(rows) for rows in prompts])
        first_row, places = self._batch.num_rows, torch.as_tensor(sources, device=self._device)
        hidden = self._model.prefill(torch.as_tensor(padded, device=self._device), self._cache, first_row, places)
        self.counters.prefilled_tokens += int(lengths.sum())
        last = hidden[
            torch.arange(len(prompts), device=self._device), torch.as_tensor(lengths - 1, device=self._device)
        ]
        self._hidden[first_row : first_row + len(sources)] = last[places]
        for i, rows in enumerate(prompts):
            prompt = self._prompts.setdefault(rows[0].prompt_key, _Prompt(last[i]))
            for j, row in enumerate(rows):
                self._add(row, prompt)
                if j:
                    row.cached_tokens = len(row.input_ids)
                    self.counters.shared_prompt_tokens += int(lengths[i])
                if row.wants_prompt_scores:
                    self._score_prompt(row, hidden[i])

    def _add(self, row: Row, prompt: _Prompt) -> int:
        p = row.params
        if row.seed is None:
            row.seed = int(self._seeds.integers(0, 2**63))
        index = self._batch.add(
            row,
            seed=row.seed & 0xFFFFFFFFFFFFFFFF,
            max_new=max_new_tokens(row.input_ids, p, self.limits.context_length),
            stop_ids=() if p.ignore_eos else tuple(dict.fromkeys((*self._eos_token_ids, *p.stop_token_ids))),
        )
        prompt.rows.add(row)
        if p.penalised:
            self._sampler.reset_counts(index, row.made_ids)
        return index

    def _score_prompt(self, row: Row, hidden: torch.Tensor) -> None:
        """Log-probs of prompt tokens after `logprob_start_len`, at temperature 1 as SGLang's; `hidden` `[T, H]` of the prompt."""
        first, end = row.logprob_start_len, len(row.input_ids) - 1
        targets = torch.as_tensor(row.input_ids[1:], device=self._device)
        found = [np.empty(0, np.float32)]
        for begin in range(first, end, PROMPT_LOGITS_CHUNK):
            stop = min(begin + PROMPT_LOGITS_CHUNK, end)
            scores = log_probs(self._model.logits(hidden[begin:stop]), None)
            found.append(scores.gather(1, targets[begin:stop, None])[:, 0].cpu().numpy())
            if row.top_logprobs_num:
                top = top_tokens(scores, dict.fromkeys(range(stop - begin), row.top_logprobs_num))
                row.input_top.extend(top.values())
        row.input_log_probs = np.concatenate(found)

    def _finish_exhausted_at_once(self) -> None:
        """Rows that asked for no token at all: their prompt was what they wanted."""
        exhausted = np.flatnonzero(self._batch.exhausted())
        self._finish(exhausted, [{"type": "length", "length": 0}] * len(exhausted))

    # ---- decoding

    def _step(self) -> None:
        """Samples one token for every row from its hidden state, drops what is finished, feeds the rest."""
        batch = self._batch
        sampled = self._sampler.sample(self._model.logits(self._hidden[: self._fixed_rows or batch.num_rows]))
        if not np.isfinite(sampled.log_probs).all():
            raise EngineError(
                f"log-probs, got a value that is not finite with weights {self.weights.version!r}: the weights or the "
                "dtype are broken; check the last weight update"
            )
        batch.record(sampled.tokens, sampled.log_probs)
        for index, top in sampled.top.items():
            batch.rows[index].output_top.append(top)
        self.counters.decode_steps += 1
        self.counters.generated_tokens += batch.num_rows
        self._finish_completed()
        if not batch.num_rows:
            return
        if batch.features & Feature.STREAMED:
            self._stream()
        self._cache.reserve(batch.num_rows, int(batch.live["length"].max()) + 1, kept_rows=batch.num_rows)
        columns = batch.columns[: self._fixed_rows or batch.num_rows]
        self._feed(columns["length"].copy(), columns["token"].copy())
        batch.live["length"] += 1

    def _feed(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """One token for every row, after the first `lengths` of its cache; its hidden state is then that of the token."""
        num_rows = self._batch.num_rows
        if self._fixed_rows:  # idle rows do what the first row does, in their own place, and are never looked at
            lengths[num_rows:], tokens[num_rows:] = lengths[0], tokens[0]
        plan = self._cache.plan(lengths)
        fed = torch.as_tensor(tokens, device=self._device)
        self._model.decode(fed, self._cache, plan, self._hidden[: len(lengths)])

    # ---- pauses that keep what runs

    def _retract(self) -> None:
        """Running rows wait again, before those that wait already, in their order of arrival."""
        rows = list(self._batch.rows)
        for row in rows:
            row.retract(*self._batch.output(row.index))
        places = {row: place for job in self._futures for place, row in enumerate(job.rows)}
        arrival = {job: number for number, job in enumerate(self._futures)}
        rows.sort(key=lambda row: (arrival[row.job], places[row]))
        self._batch.remove(np.arange(len(rows)))
        self._prompts.clear()
        self._waiting.extendleft(reversed(rows))

    def _compute_last_tokens_again(self) -> None:
        """Under new weights, rows that stayed go on from their last token's state, which was of the old ones.

        Their cache is theirs alone from here: what they hold of a prompt is no newcomer's.
        """
        batch = self._batch
        self._prompts.clear()
        for row in batch.rows:
            row.prompt_key = f"outdated {id(row)}".encode()
            self._prompts[row.prompt_key] = _Prompt(self._hidden[row.index], {row})
        columns = batch.columns[: self._fixed_rows or batch.num_rows]
        tokens = columns["token"].copy()
        for row in batch.rows:
            if not columns["step"][row.index]:
                tokens[row.index] = row.context[-1]
        self._feed(np.maximum(columns["length"] - 1, 0), tokens)

    def _stream(self) -> None:
        """Tells who listens what the rows that go on have got."""
        batch = self._batch
        made: dict[Job, list[Token]] = {}
        for i in batch.having(Feature.STREAMED).tolist():
            row = batch.rows[i]
            tokens, values = batch.output(i)
            made.setdefault(row.job, []).append(Token(row, int(tokens[-1]), float(values[-1])))
        for job, news in made.items():
            assert job.listener is not None
            job.listener(news)

    def _finish_completed(self) -> None:
        """A stop token wins over a stop text, and both over the length limit."""
        batch = self._batch
        stopped, exhausted = batch.stopped(), batch.exhausted()
        text_stops: dict[int, Any] = {}
        if batch.features & Feature.TEXT_STOP:
            candidates = [i for i in batch.having(Feature.TEXT_STOP).tolist() if not stopped[i]]
            assert self._tokenizer is not None
            pending = [(batch.rows[i].params, batch.output(i)[0].tolist()) for i in candidates]
            found = find_text_stops(self._tokenizer, pending)
            text_stops = {i: stop for i, stop in zip(candidates, found, strict=True) if stop is not None}
        done = stopped | exhausted
        done[list(text_stops)] = True
        indices = np.flatnonzero(done)
        reasons: list[dict[str, Any]] = []
        for i in indices.tolist():
            if stopped[i]:
                reasons.append({"type": "stop", "matched": int(batch.columns[i]["token"])})
            elif i in text_stops:
                stop = text_stops[i]
                reasons.append({"type": "stop", "matched": stop if isinstance(stop, str) else stop.pattern})
            else:
                reasons.append({"type": "length", "length": int(batch.columns[i]["step"])})
        self._finish(indices, reasons)

    def _finish(self, indices: np.ndarray, reasons: Sequence[dict[str, Any]]) -> None:
        """Answers rows and closes the gaps they leave."""
        if not len(indices):
            return
        batch = self._batch
        for i, reason in zip(indices.tolist(), reasons, strict=True):
            row = batch.rows[i]
            tokens, values = batch.output(i)
            prompt = self._prompts[row.prompt_key]
            prompt.rows.discard(row)
            if not prompt.rows:
                del self._prompts[row.prompt_key]
            self._complete(row, tokens.copy(), values.copy(), reason)
        moves = batch.remove(indices)
        if len(moves.targets):
            held = int(batch.columns["length"][moves.targets].max())
            self._cache.copy_rows(moves.sources, moves.targets, held)
            # Rows may leave between two steps (abort): the state that the next sample reads moves along.
            self._hidden[torch.as_tensor(moves.targets, device=self._device)] = self._hidden[
                torch.as_tensor(moves.sources, device=self._device)
            ]
            self._sampler.on_moved(moves)

    def _complete(self, row: Row, tokens: np.ndarray, values: np.ndarray, reason: dict[str, Any]) -> None:
        row.output_ids, row.output_log_probs, row.finish_reason = tokens, values, reason
        if not row.versions:
            row.versions.append((self.weights.version, 0))
        self.counters.finished_rows += 1
        if row.job.listener is not None:
            row.job.listener([Token(row, None)])
        row.job.num_unfinished -= 1
        if not row.job.num_unfinished:
            self._futures.pop(row.job).set_result(row.job)

    # ---- failure

    def _recover(self, error: Exception, admitted: Sequence[Row]) -> None:
        """Fails the jobs in flight and starts over with an empty batch; a broken device ends the engine."""
        logger.exception("decode thread: %d rows failed", self._batch.num_rows)
        self.counters.failures += 1
        # Rows that were admitted in this turn may have ended in it, too, and their job been answered.
        jobs = {row.job for row in (*self._batch.rows, *admitted) if row.job in self._futures}
        self._waiting = deque(row for row in self._waiting if row.job not in jobs)
        self._reset()
        self._cache.clear()  # what broke may have left NaN where later rows see zeros
        text = f"generation failed, got {type(error).__name__}: {error}"
        for job in jobs:
            self._futures.pop(job).set_exception(EngineError(text))
        if self._device.type == "cuda" and not isinstance(error, torch.cuda.OutOfMemoryError | EngineError):
            # After a device-side fault every later call fails too; the launcher replaces the process.
            self._stopping = True
            self._on_fatal(error)


def fixed_rows(max_running_requests: int) -> int:
    """Rows of every step under deterministic inference."""
    return -(-max_running_requests // FIXED_ROWS_STEP) * FIXED_ROWS_STEP


def plan_prefill(lengths: Sequence[int], *, one_at_a_time: bool) -> list[list[int]]:
    """Groups prompts (numbers into `lengths`) that are padded to one length and computed together.

    Longest first; a group stays within PREFILL_TOKENS padded tokens, and its shortest prompt is at least PREFILL_MIN_FILL
    of its longest, so that little is spent on padding.
    """
    if one_at_a_time:
        return [[i] for i in range(len(lengths))]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            longest = lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * longest <= PREFILL_TOKENS
            if fits and lengths[i] >= PREFILL_MIN_FILL * longest:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def default_max_total_tokens(config_bytes_per_token: int, device: torch.device) -> int:
    """KV-cache tokens that fit: a quarter of the free memory on a CPU, 70 % of it on a GPU."""
    if device.type == "cuda":
        budget = int(0.7 * torch.cuda.mem_get_info(device)[0])
    else:
        import psutil

        budget = psutil.virtual_memory().available // 4
    return max(budget // config_bytes_per_token // EXTENT_STEP, 1) * EXTENT_STEP
