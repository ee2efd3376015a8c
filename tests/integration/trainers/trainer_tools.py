"""What the trainer tests share: tiny HF models, batches, an independent loss, and spawned ranks."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles.config import Config, make_config
from miles.trainers import checkpoints, make_trainer
from miles.trainers.megatron import MegatronTrainer
from miles.types import StepTotals, TrainBatch

VOCAB = 67
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def make_hf(kind: str, *, tied: bool = False, seed: int = 0, **other_sizes: Any) -> PreTrainedModel:
    """A tiny model with weights that are nowhere trivial: norms off 1, biases off 0."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, **other_sizes}
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=tied))
    elif kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        options = {"head_dim": 16, "tie_word_embeddings": tied, "router_aux_loss_coef": 0.0}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **options))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, rope_theta=5000.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.float().eval()


def save_hf_model(directory: Path, kind: str = "qwen3", **options: Any) -> Path:
    make_hf(kind, **options).save_pretrained(directory)
    return directory


def config_for(hf: Path, **flags: Any) -> Config:
    """Resolved flags of a small run, where the batch-size arithmetic plays no part."""
    defaults: dict[str, Any] = {
        "hf_checkpoint": str(hf),
        "prompt_data": "unused.jsonl",
        "rm_type": "random",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "num_rollout": 10,
        "rollout_max_response_len": 32,
        "lr": 1e-3,
    }
    return make_config(**{**defaults, **flags})


@contextmanager
def trainer_for(
    config: Config, run_dir: Path, *, rank: int = 0, world_size: int = 1, port: int = 0, steps: int = 100
) -> Iterator[MegatronTrainer]:
    """A trainer with its initial weights, taken down at the end."""
    trainer = make_trainer(
        config,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        master_addr="127.0.0.1",
        master_port=port,
        run_dir=run_dir,
        total_optimizer_steps=steps,
    )
    try:
        chosen = checkpoints.choose(config.ckpt.load) if config.ckpt.load is not None else None
        trainer.load_initial(chosen.checkpoint if chosen is not None else None)
        yield trainer
    finally:
        trainer.close()


def make_batch(
    lengths: list[tuple[int, int]] = [(5, 2), (9, 4), (30, 20), (17, 16), (12, 5), (3, 1), (41, 25), (9, 4)],  # noqa: B006
    *,
    steps: int = 1,
    micro_batches: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    masked: float = 0.2,
    rollout_id: int = 0,
) -> TrainBatch:
    """Random rows of (total, response) tokens, divided evenly into optimizer steps, token-mean weights."""
    rng = np.random.default_rng(seed)
    total = np.array([t for t, _ in lengths])
    response = np.array([r for _, r in lengths])
    rows = len(lengths)
    loss_mask = (rng.random(response.sum()) > masked).astype(np.uint8)
    divided = np.array_split(np.arange(rows), steps)
    of_row = np.repeat(np.arange(rows), response)
    trained = np.bincount(of_row, weights=loss_mask, minlength=rows)
    weight, totals = np.zeros(rows, np.float32), []
    for part in divided:
        weight[part] = 1.0 / trained[part].sum()
        totals.append(StepTotals(num_trajectories=len(part), num_tokens=int(trained[part].sum()), num_rows=len(part)))
    return TrainBatch(
        rollout_id=rollout_id,
        rows={
            "total_lengths": total,
            "response_lengths": response,
            "rewards": rng.normal(size=rows).astype(np.float32),
            "raw_rewards": np.zeros(rows, np.float32),
            "temperature": np.full(rows, temperature, np.float32),
            "loss_weight": weight,
            "sample_index": np.arange(rows),
            "trajectory_id": np.arange(rows),
            "group_index": np.arange(rows) // 4,
        },
        ragged={"tokens": rng.integers(0, VOCAB, total.sum()), "loss_mask": loss_mask},
        steps=tuple(tuple(np.array_split(part, micro_batches)) for part in divided),
        totals=tuple(totals),
    )


def with_rollout_log_probs(batch: TrainBatch, rows: list[np.ndarray]) -> TrainBatch:
    values = np.concatenate(rows).astype(np.float32)
    return dataclasses.replace(batch, ragged={**batch.ragged, "rollout_log_probs": values})


def share(batch: TrainBatch, rows_of_step: list[np.ndarray], micro_batches: int) -> TrainBatch:
    """The part of a batch that one rank gets: `rows_of_step[s]` of the whole batch."""
    mine = np.concatenate(rows_of_step).astype(np.int64)
    token_parts = np.split(batch.ragged["tokens"], np.cumsum(batch.rows["total_lengths"])[:-1])

    def pick(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype)] + [parts[i] for i in mine]).astype(dtype)

    ragged = {"tokens": pick(token_parts, np.int64)}
    for name in batch.ragged.keys() - {"tokens"}:
        parts = np.split(batch.ragged[name], np.cumsum(batch.rows["response_lengths"])[:-1])
        ragged[name] = pick(parts, batch.ragged[name].dtype)
    starts = np.cumsum([0] + [len(part) for part in rows_of_step])
    steps = tuple(
        tuple(np.array_split(np.arange(starts[s], starts[s + 1]), micro_batches)) for s in range(len(rows_of_step))
    )
    return dataclasses.replace(batch, rows={k: v[mine] for k, v in batch.rows.items()}, ragged=ragged, steps=steps)


def hf_rows(batch: TrainBatch) -> list[tuple[torch.Tensor, int]]:
    """(tokens, response length) of each row."""
    parts = np.split(batch.ragged["tokens"], np.cumsum(batch.rows["total_lengths"])[:-1])
    return [(torch.from_numpy(part), int(n)) for part, n in zip(parts, batch.rows["response_lengths"], strict=True)]


def hf_log_probs(model: PreTrainedModel, batch: TrainBatch) -> list[torch.Tensor]:
    """Response log-probs of each row by itself, with gradient."""
    out = []
    for (tokens, response), temperature in zip(hf_rows(batch), batch.rows["temperature"], strict=True):
        logits = model(tokens[None]).logits[0, -response - 1 : -1] / float(temperature)
        out.append(torch.log_softmax(logits, -1).gather(1, tokens[-response:, None]).squeeze(1))
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, limit_s: float = 120) -> list[Any]:
    """`body(rank, world_size, port, *args)` in a fresh process per rank; their results in rank order."""
    # A server imports torch and megatron once, and forks every rank.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "miles.trainers.megatron"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(theirs, body, rank, world_size, port, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            # Whichever rank ends first: where one fails, the others wait for it.
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, limit_s)
            if not ready:
                raise TimeoutError(
                    f"ranks {sorted(set(range(world_size)) - set(results))} gave no result in {limit_s} s"
                )
            for pipe in ready:
                assert isinstance(pipe, multiprocessing.connection.Connection)
                rank = pipes.index(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    processes[rank].join(10)
                    raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
                if not ok:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(10 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()


def _rank_main(
    pipe: Any, body: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        # Plain pickle: multiprocessing would send tensors as descriptors, which die with this process.
        pipe.send_bytes(pickle.dumps((True, body(rank, world_size, port, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
