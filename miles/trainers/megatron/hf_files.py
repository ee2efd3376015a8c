"""Hugging Face checkpoint directories: tensors read one at a time, and written in shards as they stream by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miles.errors import CheckpointError
from miles.trainers.checkpoints import fsync, replace_directory

#: Bytes of one file of a saved model, as the hub likes them.
MAX_SHARD_BYTES = 5 * 1000**3
_INDEX = "model.safetensors.index.json"
#: Of the source directory, everything small goes along (tokenizer, chat template, generation config) but weights and code.
_CARRIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def is_hf_directory(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of an HF directory. Raises CheckpointError where it is missing or not JSON."""
    file = Path(path) / "config.json"
    try:
        loaded: dict[str, Any] = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(
            f"HF checkpoint, got {path}: config.json cannot be read ({error}); name an HF directory"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file}, got invalid JSON ({error}): copy the checkpoint again") from error
    return loaded


class HfReader:
    """The tensors of an HF directory by name; files stay mapped, and nothing is read before it is asked for."""

    def __init__(self, path: str | Path):
        """Raises CheckpointError where there are no safetensors, or one that the index names is missing or torn."""
        self.path = Path(path)
        index = self.path / _INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"HF checkpoint, got {path}: it has no *.safetensors; save the model with save_pretrained first"
            )
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.path / file}, got an unreadable file ({error}): the copy is not whole; copy it again"
                ) from error
            self._files |= dict.fromkeys(handle.keys(), handle)
        self._unread = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file. Raises CheckpointError where there is none of that name."""
        if name not in self._files:
            raise CheckpointError(
                f"HF checkpoint {self.path}, got no tensor {name}: the model needs it; is config.json that of these weights?"
            )
        self._unread.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    @property
    def unread(self) -> set[str]:
        """Names that nobody has asked for yet."""
        return set(self._unread)


def write_hf_directory(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    dtype: torch.dtype,
    one_score: bool = False,
) -> None:
    """Writes a directory that transformers loads: weights, and config and tokenizer files of `source`.

    one_score: the model has a head of one number; AutoModelForSequenceClassification loads it.
    At most one shard is held in memory. The directory appears under its name once it is whole, in the place of what was there.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix in _CARRIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, partial / file.name)
    config = read_config(source)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if one_score:
        config |= _one_score(config)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_shards(partial, tensors)
    for file in partial.iterdir():
        fsync(file)
    replace_directory(partial, path)


def _one_score(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a head of one number."""
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config.get("architectures") or ()]
    return {"architectures": names, "id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > MAX_SHARD_BYTES:
            flush()
        # A copy: the stream may reuse its memory, and safetensors refuses tensors that share some.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held_bytes += size
        total_bytes += size
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
