"""An engine's side of miles_shm, written from the protocol alone: opens the segment by path and copies what is listed."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
from collections.abc import Callable

import torch
import xxhash

from miles.errors import EngineError, WeightUpdateError

SEGMENT = re.compile(r"/proc/\d+/fd/\d+|/dev/shm/miles-[\w-]+")


class Receiver:
    """Implements `miles.interfaces.Engine` in this process and keeps a record of the calls."""

    def __init__(
        self,
        name: str = "receiver-0",
        *,
        fail_on: str | None = None,
        corrupt: str | None = None,
        delay_s: float = 0.0,
        adopts: bool = False,
    ):
        self.name = name
        self.adopts = adopts
        self.segments: list[str] = []
        self.sampled: list[bool] = []
        self.resumed_by: list[str] = []
        self.fail_on, self.corrupt, self.delay_s = fail_on, corrupt, delay_s
        self.calls: list[str] = []
        self.held: dict[str, torch.Tensor] = {}
        self.serving = True
        self.live_version = "0"
        self.loads = self.most_loads = 0
        self.refuses_to_pause = self.refuses_to_serve = False
        self._offered: dict[str, Callable[[], torch.Tensor]] = {}
        self._live: dict[str, Callable[[], torch.Tensor]] = {}

    @property
    def identity(self) -> str:
        return f"{self.name} {id(self)}"

    async def health(self) -> None: ...

    async def pause(self, mode: str = "abort") -> None:
        self.calls.append("pause")
        if self.refuses_to_pause:
            raise EngineError(f"engine {self.name}: POST /pause_generation, got HTTP 500: no")
        self.serving = False
        self._offered = {}

    async def resume(self) -> None:
        self.serving = True

    async def update_weights(self, payload: dict) -> dict:
        assert not self.serving, "weights may change only while the engine is paused"
        assert payload["load_format"] == "miles_shm"
        assert SEGMENT.fullmatch(payload["segment"])
        self.calls.append("bucket")
        self.segments.append(payload["segment"])
        adopt = self.adopts and "adopt" in payload
        self.loads += 1
        self.most_loads = max(self.most_loads, self.loads)
        await asyncio.sleep(self.delay_s)
        checksums: dict[str, str] = {}
        self.sampled.append("samples" in payload)
        assert adopt or not self.sampled[-1], "samples are for what is adopted"
        fd = os.open(payload["segment"], os.O_RDONLY)
        needed = max((e["offset"] + _nbytes(e) for e in payload["tensors"]), default=0)
        while (ready := int.from_bytes(os.pread(fd, 8, payload["progress"]), "little", signed=True)) < needed:
            if ready < 0:
                self.loads -= 1
                os.close(fd)
                raise WeightUpdateError(f"engine {self.name}: HTTP 400: the sender gave up")
            await asyncio.sleep(0.001)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            for index, entry in enumerate(payload["tensors"]):
                if entry["name"] == self.fail_on:
                    self.loads -= 1
                    os.close(fd)
                    raise WeightUpdateError(f"engine {self.name}: HTTP 400: {entry['name']} has the wrong shape")
                dtype = getattr(torch, entry["dtype"])
                raw = memory[entry["offset"] : entry["offset"] + _nbytes(entry)]
                flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                self.held[entry["name"]] = flat.reshape(entry["shape"])
                if adopt:
                    self._offered[entry["name"]] = self._in_place(fd, entry)
                if self.sampled[-1]:
                    place = payload["samples"] + 8 * index
                    sample = int.from_bytes(memory[place : place + 8], "little")
                    assert sample == xxhash.xxh3_64_intdigest(raw[:64] + raw[-64:]), entry["name"]
                else:
                    checksums[entry["name"]] = self._checksum(entry["name"], raw)
        os.close(fd)
        self.loads -= 1
        resume = payload.get("continue_generation", False)
        if resume:
            await self._serve(payload["weight_version"], "bucket")
        kept = {"kept": True, "sampled": self.sampled[-1]} if adopt else {}
        return {"success": True, "message": "", "checksums": checksums, **kept, "serving": resume}

    def _in_place(self, fd: int, entry: dict) -> Callable[[], torch.Tensor]:
        """Reads the tensor where it lies, whenever it is called."""
        memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        begin, end = entry["offset"], entry["offset"] + _nbytes(entry)
        dtype = getattr(torch, entry["dtype"])
        return lambda: torch.frombuffer(bytearray(memory[begin:end]), dtype=dtype).reshape(entry["shape"])

    def adopted(self) -> dict[str, torch.Tensor]:
        """What it serves now, as its memory says."""
        return {name: read() for name, read in self._live.items()}

    def _checksum(self, name: str, raw: bytes) -> str:
        return "0" * 16 if name == self.corrupt else xxhash.xxh3_64_hexdigest(raw)

    async def serve(self, version: str) -> None:
        await self._serve(version, "serve")

    async def _serve(self, version: str, by: str) -> None:
        self.resumed_by.append(by)
        self.calls.append(f"serve {version}")
        if self.refuses_to_serve:
            raise EngineError(f"engine {self.name}: POST /update_weight_version, got HTTP 500: no")
        self.live_version, self.serving = version, True
        self._live |= self._offered
        self._offered = {}

    async def version(self) -> str:
        return self.live_version

    async def checksums(self) -> dict[str, str]:
        self.calls.append("checksums")
        return {
            name: xxhash.xxh3_64_hexdigest(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for name, t in self.held.items()
        }


def _nbytes(entry: dict) -> int:
    return torch.Size(entry["shape"]).numel() * getattr(torch, entry["dtype"]).itemsize
