"""GB/s of the path that weights take from a trainer to its engines, beside memcpy of as many bytes in the same run.

    python benchmarks/weight_sync.py                      64 MB, 256 MB and 1 GB, to one and to two engines
    python benchmarks/weight_sync.py --megabytes 256 --engines 1

This process is the trainer: it holds the tensors of a random Qwen3 in fp32 and calls `miles.weights.publish` as a trainer
rank does, over connections that are kept as there. The engines are real ones, started as a run starts them. A publication is counted from the call
until every engine serves: pausing, shared memory, checksums of every tensor on both sides, version, continuing.

memcpy is `numpy.copyto` between two warm buffers, one thread, and takes turns with the publications. Bytes are counted
once, however many engines get them. All processes are bound to the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common import interleave, median, pin, report, spread

if TYPE_CHECKING:
    import torch

    from miles.engines.client import EngineClient
    from miles.engines.launch import EngineProcess
    from miles.weights import PublishStats

TOKEN = secrets.token_hex(16)
#: hidden size and vocabulary by megabytes; layers fill up the rest. The embedding is a quarter to a third, as in small models.
SHAPES = {64: (512, 8192), 256: (1024, 16384), 1024: (1024, 65536)}
MB = 10**6


def main() -> None:
    args = _parse()
    cores = pin(args.cores or sorted(os.sched_getaffinity(0))[-2:])
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict[str, object]] = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(prefix="miles-weight-sync-") as directory:
            weights = make_checkpoint(Path(directory), megabytes)
            with engines(Path(directory), max(args.engines)) as running:
                for count in args.engines:
                    rows.append(measure(weights, running[:count], args.repeats, args.buffer_bytes))
                    print(rows[-1], file=sys.stderr, flush=True)
    settings = {"cores": cores, "repeats": args.repeats, "buffer_bytes": args.buffer_bytes}
    notes = ["ms of the phases overlap; check_ms is what --check-weight-update-equal adds and is not part of total_ms"]
    report("weight_sync", rows, settings=settings, json_path=args.json, notes=notes)


def measure(
    weights: list[tuple[str, torch.Tensor]], running: Sequence[EngineProcess], repeats: int, buffer_bytes: int
) -> dict[str, object]:
    """The row of publications to these engines."""
    from miles.engines.client import EngineClient
    from miles.weights import SharedMemoryTransport, publish

    nbytes = sum(tensor.nbytes for _, tensor in weights)
    transport, loop = SharedMemoryTransport(), asyncio.new_event_loop()
    clients = [EngineClient(engine.name, engine.url, TOKEN) for engine in running]
    stats: list[PublishStats] = []

    def publication(*, check: bool = False) -> float:
        version = secrets.token_hex(4)
        publishing = publish(iter(weights), clients, transport, version, buffer_bytes, check_equal=check)
        stats.append(loop.run_until_complete(publishing))
        return stats[-1].total_s

    try:
        # Each of the segments that take turns is new once; one publication more, and memory is as in a run.
        times = interleave({"memcpy": make_memcpy(nbytes), "publish": publication}, repeats=repeats, warm_up=3)
        publication(check=True)
    finally:
        loop.run_until_complete(close(clients))
        transport.close()
        loop.close()
    memcpy_s, total_s, counted = median(times["memcpy"]), median(times["publish"]), stats[3:-1]
    return {
        "MB": round(nbytes / MB),
        "tensors": len(weights),
        "engines": len(running),
        "GB/s": nbytes / total_s / 1e9,
        "memcpy GB/s": nbytes / memcpy_s / 1e9,
        "ratio": memcpy_s / total_s,
        "spread": spread(times["publish"]),
        "total_ms": 1e3 * total_s,
        **{f"{name}_ms": 1e3 * median([getattr(s, f"{name}_s") for s in counted]) for name in
           ("pause", "gather", "wire", "load")},
        "check_ms": 1e3 * stats[-1].check_s,
        "first_ms": 1e3 * stats[0].total_s,
    }  # fmt: skip


async def close(clients: Sequence[EngineClient]) -> None:
    await asyncio.gather(*(client.close() for client in clients))


def make_memcpy(nbytes: int) -> Callable[[], None]:
    import numpy as np

    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return lambda: np.copyto(target, source)


def make_checkpoint(directory: Path, megabytes: int) -> list[tuple[str, torch.Tensor]]:
    """Writes a random Qwen3 of about that size; returns other weights of the same shapes, those to publish."""
    import torch
    from safetensors.torch import save_file

    from miles.engines.embedded.model_config import ModelConfig
    from miles.engines.embedded.weights import Parameters

    hidden, vocabulary = SHAPES[megabytes]
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    }

    def parameters(layers: int) -> Parameters:
        (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        return Parameters(ModelConfig.from_directory(directory), torch.device("meta"), torch.float32)

    outside = parameters(1).num_bytes
    layer = parameters(2).num_bytes - outside
    chosen = parameters(1 + max(0, round((megabytes * MB - outside) / layer)))
    shapes = {name: chosen.shape(name) or () for name in chosen.names}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return [(name, torch.randn(shape)) for name, shape in shapes.items()]


@contextmanager
def engines(directory: Path, count: int) -> Iterator[list[EngineProcess]]:
    from miles.engines.launch import launch_embedded

    async def start() -> list[EngineProcess]:
        return await asyncio.gather(
            *(
                launch_embedded(
                    name=f"engine-{i}",
                    model_path=str(directory),
                    token=TOKEN,
                    log_path=directory / f"engine-{i}.log",
                    server_args={"skip_tokenizer_init": True, "max_running_requests": 8},
                    device="cpu",
                )
                for i in range(count)
            )
        )

    running = asyncio.run(start())
    try:
        yield running
    finally:
        for engine in running:
            engine.terminate()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument(
        "--engines", type=int, nargs="+", default=[1, 2], metavar="N", help="engines that get the weights"
    )
    parser.add_argument("--buffer-bytes", type=int, default=512 * 1024**2, help="--update-weight-buffer-size of a run")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cores", type=int, nargs="+", help="default: the last two that this process may use")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
