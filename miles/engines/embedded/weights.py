"""The live parameters: fused for speed, reachable under their HF names, replaced bucket by bucket.

    safetensors --load--> Parameters (qkv and gate/up fused, tied head) <--read, write, adopt-- HF names
    /update_weights_from_tensor --> WeightState.load_bucket ... --> WeightState.finish(version)

`WeightState` knows whether the weights are whole. From the first bucket of an update until `finish` they are not, and
the scheduler serves nothing.

A bucket is copied into the live parameters, or adopted: when the update is complete, the sender's segments become their
memory, and nothing is copied. Where HF tensors that are fused lie one behind the other in the segment, the fused parameter is a view of it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import safe_open

from miles.errors import CheckpointError, WeightUpdateError

from .model_config import DTYPE_NAMES, ModelConfig
from .segment import Bucket, Segments, TensorSpec


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of a layer's MLP."""

    router: torch.Tensor
    """[experts, hidden]"""
    gate_up: tuple[torch.Tensor, ...]
    """[2 * expert size, hidden] of each"""
    down: tuple[torch.Tensor, ...]
    """[hidden, expert size] of each"""


@dataclass(frozen=True)
class Mlp:
    """Weights of a dense layer's gated MLP."""

    gate_up: torch.Tensor
    """[2 * intermediate, hidden]"""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    """[hidden, intermediate]"""
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, `[out, in]` as HF stores them."""

    input_norm: torch.Tensor
    """[hidden]"""
    qkv: torch.Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values"""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[heads + kv_heads, head_dim]: q_norm repeated for each query head, then k_norm for each key head"""
    o: torch.Tensor
    """[hidden, heads * head_dim]"""
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    """[hidden]"""
    mlp: Mlp | Experts


@dataclass(frozen=True, eq=False)
class _Fused:
    """A tensor that the model computes with, and the HF tensors in it, one below the other. Usually it is one."""

    live: torch.Tensor
    """The same object for good; its memory is exchanged."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Slot:
    """Where an HF tensor lives: some rows of a fused one."""

    fused: _Fused
    first_row: int
    num_rows: int
    shape: tuple[int, ...]

    @property
    def target(self) -> torch.Tensor:
        """The live rows, written by a broadcasting copy."""
        return self.rows_of(self.fused.live)

    @property
    def repeated(self) -> bool:
        """Whether every row is the whole HF tensor."""
        return self.fused.live.dim() != len(self.shape)

    def rows_of(self, fused: torch.Tensor) -> torch.Tensor:
        return fused[self.first_row : self.first_row + self.num_rows]

    def read(self) -> torch.Tensor:
        """The live tensor in its HF shape."""
        return self.target[0] if self.repeated else self.target


@dataclass(frozen=True)
class Adoption:
    """Tensors in segments that are to be the live ones."""

    shared: list[tuple[_Fused, torch.Tensor]] = field(default_factory=list)
    """Memory that lies as the model needs it."""
    copied: list[tuple[_Fused, list[tuple[_Slot, torch.Tensor]]]] = field(default_factory=list)


class Parameters:
    """All weights of a model on one device, in one dtype, and their HF names."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._slots: dict[str, _Slot] = {}
        self._borrowed: set[_Fused] = set()
        """Those whose memory is a sender's segment."""
        self.embedding = self._new("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [self._new_layer(i) for i in range(config.num_layers)]
        self.norm = self._new("model.norm.weight", config.hidden_size)
        self.head = (
            self.embedding if config.tied else self._new("lm_head.weight", config.vocab_size, config.hidden_size)
        )

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _new(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._empty(*shape)
        self._slots[name] = _Slot(_Fused(tensor, (name,)), 0, shape[0], shape)
        return tensor

    def _new_fused(self, prefix: str, parts: Sequence[tuple[str, int]], suffix: str, *rest: int) -> torch.Tensor:
        names = tuple(f"{prefix}{name}{suffix}" for name, _ in parts)
        fused, first = _Fused(self._empty(sum(rows for _, rows in parts), *rest), names), 0
        for name, (_, rows) in zip(names, parts, strict=True):
            self._slots[name] = _Slot(fused, first, rows, (rows, *rest))
            first += rows
        return fused.live

    def _new_layer(self, number: int) -> Layer:
        c, prefix = self.config, f"model.layers.{number}."
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = f"{prefix}self_attn."
        qkv_parts = [("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)]
        return Layer(
            input_norm=self._new(f"{prefix}input_layernorm.weight", c.hidden_size),
            qkv=self._new_fused(attention, qkv_parts, ".weight", c.hidden_size),
            qkv_bias=self._new_fused(attention, qkv_parts, ".bias") if c.qkv_bias else None,
            qk_norm=self._new_qk_norm(attention) if c.qk_norm else None,
            o=self._new(f"{attention}o_proj.weight", c.hidden_size, q_rows),
            o_bias=self._new(f"{attention}o_proj.bias", c.hidden_size) if c.o_bias else None,
            post_norm=self._new(f"{prefix}post_attention_layernorm.weight", c.hidden_size),
            mlp=self._new_experts(f"{prefix}mlp.") if number in c.expert_layers else self._new_mlp(f"{prefix}mlp."),
        )

    def _new_mlp(self, prefix: str) -> Mlp:
        c = self.config
        parts = [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)]
        return Mlp(
            gate_up=self._new_fused(prefix, parts, ".weight", c.hidden_size),
            gate_up_bias=self._new_fused(prefix, parts, ".bias") if c.mlp_bias else None,
            down=self._new(f"{prefix}down_proj.weight", c.hidden_size, c.intermediate_size),
            down_bias=self._new(f"{prefix}down_proj.bias", c.hidden_size) if c.mlp_bias else None,
        )

    def _new_experts(self, prefix: str) -> Experts:
        c = self.config
        parts = [("gate_proj", c.expert_size), ("up_proj", c.expert_size)]
        each = [f"{prefix}experts.{number}." for number in range(c.num_experts)]
        return Experts(
            router=self._new(f"{prefix}gate.weight", c.num_experts, c.hidden_size),
            gate_up=tuple(self._new_fused(expert, parts, ".weight", c.hidden_size) for expert in each),
            down=tuple(self._new(f"{expert}down_proj.weight", c.hidden_size, c.expert_size) for expert in each),
        )

    def _new_qk_norm(self, attention: str) -> torch.Tensor:
        c = self.config
        q, k = f"{attention}q_norm.weight", f"{attention}k_norm.weight"
        table = _Fused(self._empty(c.num_heads + c.num_kv_heads, c.head_dim), (q, k))
        self._slots[q] = _Slot(table, 0, c.num_heads, (c.head_dim,))
        self._slots[k] = _Slot(table, c.num_heads, c.num_kv_heads, (c.head_dim,))
        return table.live

    @property
    def names(self) -> list[str]:
        """HF names, in the checkpoint's customary order."""
        return list(self._slots)

    @property
    def num_bytes(self) -> int:
        return sum(slot.target.numel() * slot.target.element_size() for slot in self._slots.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """HF shape of a parameter; None where the model has none of that name."""
        slot = self._slots.get(name)
        return None if slot is None else slot.shape

    def read(self, name: str) -> torch.Tensor:
        """The live parameter in its HF shape (a view)."""
        return self._slots[name].read()

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> str:
        """Replaces the live parameter by its bytes in HF shape, given in order; returns its checksum as read back."""
        slot = self._slots[name]
        self._own(slot.fused)
        if self.device.type == "cpu" and not slot.repeated:
            return _copy_and_hash(slot.target, chunks)
        staged = torch.empty(slot.shape, dtype=self.dtype)
        _copy_and_hash(staged, chunks)
        slot.target.copy_(staged)
        return self.checksum(name)

    @property
    def can_adopt(self) -> bool:
        """Whether the model can compute with tensors in the host's shared memory."""
        return self.device.type == "cpu"

    def plan_adoption(self, offered: Mapping[str, tuple[Bucket, TensorSpec]]) -> Adoption:
        """How tensors in segments become the live ones, all of them. Reads none of them."""
        plan = Adoption()
        for fused in {self._slots[name].fused: None for name in offered}:
            places = [offered[name] for name in fused.names if name in offered]
            whole = len(places) == len(fused.names) and not self._slots[fused.names[0]].repeated
            if whole and all(a[0].adjoins(a[1], *b) for a, b in itertools.pairwise(places)):
                [bucket, spec], *_ = places
                plan.shared.append((fused, bucket.tensor(spec, fused.live.shape)))
            else:
                plan.copied.append((fused, [(self._slots[spec.name], bucket.tensor(spec)) for bucket, spec in places]))
        return plan

    def adopt(self, plan: Adoption) -> None:
        """Makes tensors in segments the live ones; copies those that do not lie as the model needs them."""
        for fused, memory in plan.shared:
            fused.live.data = memory
        self._borrowed.update(fused for fused, _ in plan.shared)
        for fused, parts in plan.copied:
            self._own(fused)
            for slot, memory in parts:
                slot.target.copy_(memory)

    def _own(self, fused: _Fused) -> None:
        """Gives a tensor memory that may be written, with what it holds now."""
        if fused in self._borrowed:
            fused.live.data = fused.live.clone()
            self._borrowed.discard(fused)

    def checksum(self, name: str) -> str:
        """xxh3_64 (hex) of the live parameter's bytes, in its own dtype."""
        tensor = self.read(name).contiguous().cpu()
        return xxhash.xxh3_64_hexdigest(tensor.view(-1).view(torch.uint8).numpy().data)

    def load_directory(self, directory: Path) -> None:
        """Fills every parameter from `*.safetensors`. Raises `CheckpointError` naming what is missing or does not fit."""
        missing = set(self._slots)
        for name, tensor in _iter_safetensors(directory):
            slot = self._slots.get(name)
            if slot is None:
                if _is_redundant(name, self.config):
                    continue
                raise CheckpointError(
                    f"{directory}, got the tensor {name!r}: a {self.config.model_type} of this config.json has no such "
                    "parameter; check config.json"
                )
            if tuple(tensor.shape) != slot.shape:
                raise CheckpointError(
                    f"{name} of {directory}, got shape {tuple(tensor.shape)}: config.json says {slot.shape}; "
                    "check which of the two is right"
                )
            slot.target.copy_(tensor)
            missing.discard(name)
        if missing:
            raise CheckpointError(
                f"{directory}, got {len(self._slots) - len(missing)} of {len(self._slots)} parameters: {_some(missing)} "
                "missing; give a complete checkpoint"
            )


class WeightState:
    """Whole or in the middle of an update, and which version. Used from the decode thread only."""

    def __init__(self, parameters: Parameters, version: str) -> None:
        self._parameters = parameters
        self._segments = Segments()
        self._version = version
        self._written: set[str] | None = None
        self._offered: dict[str, tuple[Bucket, TensorSpec]] = {}
        """What becomes live once the update is complete."""
        self._adopted: dict[str, Bucket] = {}
        """Where live tensors lie in segments."""

    @property
    def version(self) -> str:
        """Version of the last whole weights."""
        return self._version

    @property
    def updating(self) -> bool:
        """True from the first bucket until `finish`: the weights are a mixture and must not be served."""
        return self._written is not None

    def restart(self) -> None:
        """A sender begins anew: what an abandoned update wrote or offered no longer counts towards a whole one."""
        if self._written is not None:
            self._written = set()
        self._offered.clear()

    def load_bucket(
        self,
        segment: str,
        specs: Sequence[TensorSpec],
        progress_bytes: int | None = None,
        serial: int | None = None,
        samples_bytes: int | None = None,
    ) -> dict[str, str]:
        """Reads a bucket and returns the checksum of each tensor: of the live parameter that it was copied to, or, where
        it is to be adopted, of the tensor in the segment.

        Where the sender is still filling the segment, `progress_bytes` is the place at which it says how far it is.
        With a `serial` number it offers the segment for adoption, as long as the number in the segment is the same.
        With `samples_bytes`, the place of the sender's samples, what is adopted is compared with these, and no checksum is
        returned.
        Names, shapes and places are checked before the first byte is written. Whatever goes wrong raises
        `WeightUpdateError`, and the weights then count as torn until a full update: the sender's idea of what was loaded
        is no longer ours.
        """
        written = set() if self._written is None else self._written
        self._written = set()
        for spec in specs:
            self._check(spec)
        bucket = self._segments.open(segment, specs, progress_bytes, serial, samples_bytes)
        adopted = serial is not None and self.can_adopt
        if samples_bytes is not None and not adopted:
            raise WeightUpdateError(
                f"samples, got {samples_bytes}: this engine copies, and what is copied is compared by checksums; leave it out"
            )
        for spec in specs:
            self._offered.pop(spec.name, None)
            if adopted:
                self._offered[spec.name] = bucket, spec
            else:
                self._adopted.pop(spec.name, None)
        whole = not self._missing(written | {spec.name for spec in specs})
        # Before the sender is done, not after.
        plan = self._parameters.plan_adoption(self._offered) if whole else None
        checksums: dict[str, str] = {}
        if samples_bytes is not None:
            bucket.compare_samples(specs, samples_bytes)
            bucket.check_kept()
        elif adopted:
            checksums = {spec.name: _hash(bucket.chunks(spec)) for spec in specs}
            bucket.check_kept()
        else:
            checksums = {spec.name: self._parameters.write(spec.name, bucket.chunks(spec)) for spec in specs}
        self._written = written | {spec.name for spec in specs}
        if plan is not None:
            self._adopt(plan)
        return checksums

    def holds(self, version: str, segment: str, serial: int | None) -> bool:
        """Whether the weights are whole, have that version, and lie in that filling of that segment, among others."""
        adopted = any(bucket.offered_as(segment, serial) for bucket in set(self._adopted.values()))
        return adopted and not self.updating and self._version == version

    @property
    def can_adopt(self) -> bool:
        """Whether offered segments become the weights; else they are copied."""
        return self._parameters.can_adopt

    def check_kept(self) -> None:
        """Raises `WeightUpdateError` where a sender fills a segment again that the weights lie in."""
        for bucket in set(self._adopted.values()):
            bucket.check_kept()

    def check_completes(self, names: Sequence[str] = ()) -> None:
        """Raises `WeightUpdateError` where an update, `names` included, would leave a parameter unwritten."""
        if self._written is None and not names:
            return
        if missing := self._missing((self._written or set()) | set(names)):
            raise WeightUpdateError(
                f"weight update, got {len(self._parameters.names) - len(missing)} of {len(self._parameters.names)} "
                f"parameters: {_some(missing)} not sent; send all buckets before the version"
            )

    def finish(self, version: str) -> None:
        """Names the weights; ends an update. Raises `WeightUpdateError` where one is incomplete."""
        self.check_completes()
        self._written, self._version = None, version

    def _missing(self, written: set[str]) -> set[str]:
        return set(self._parameters.names) - written

    def _adopt(self, plan: Adoption) -> None:
        """Makes what was offered live."""
        buckets = {name: bucket for name, (bucket, _) in self._offered.items()}
        for bucket in set(buckets.values()):
            bucket.check_kept()
        self._parameters.adopt(plan)
        self._adopted.update(buckets)
        self._offered = {}

    def checksums(self) -> dict[str, str]:
        """HF name -> checksum over all live parameters."""
        return {name: self._parameters.checksum(name) for name in self._parameters.names}

    def _check(self, spec: TensorSpec) -> None:
        shape = self._parameters.shape(spec.name)
        if shape is None:
            why = "its head is the embedding" if spec.name == "lm_head.weight" else "the model has no such parameter"
            raise WeightUpdateError(f"tensor name, got {spec.name!r}: {why}; send the checkpoint's own names")
        if spec.shape != shape:
            raise WeightUpdateError(f"shape of {spec.name}, got {list(spec.shape)}: the engine holds {list(shape)}")
        if spec.dtype != self._parameters.dtype:
            raise WeightUpdateError(
                f"dtype of {spec.name}, got {DTYPE_NAMES[spec.dtype]}: the engine holds "
                f"{DTYPE_NAMES[self._parameters.dtype]}; convert it, or start the engine with --dtype"
            )


def _hash(chunks: Iterable[np.ndarray]) -> str:
    """xxh3_64 (hex) of all chunks."""
    hasher = xxhash.xxh3_64()
    for chunk in chunks:
        hasher.update(chunk.data)
    return hasher.hexdigest()


def _copy_and_hash(target: torch.Tensor, chunks: Iterable[np.ndarray]) -> str:
    """xxh3_64 (hex) of the target, each chunk of it read back while the processor's cache holds it."""
    raw, hasher, begin = target.view(-1).view(torch.uint8).numpy(), xxhash.xxh3_64(), 0
    for chunk in chunks:
        copied = raw[begin : begin + len(chunk)]
        np.copyto(copied, chunk)
        hasher.update(copied.data)
        begin += len(chunk)
    return hasher.hexdigest()


def _iter_safetensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted({directory / str(shard) for shard in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"--model-path, got {str(directory)!r}: there are no *.safetensors; convert the checkpoint (pickles are not read)"
        )
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a mapping)
                    yield name, shard.get_tensor(name)
        except OSError as error:
            raise CheckpointError(f"{file}, got a file that cannot be read ({error}): restore the shard") from error


def _is_redundant(name: str, config: ModelConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
