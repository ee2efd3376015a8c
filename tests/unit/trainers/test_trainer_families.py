"""Each family of models against transformers: from config.json alone to the same logits and gradients, and every tensor back.

docs/models.md is the table of what is checked here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from miles.config import Config, make_config
from miles.config.parallel import ParallelSizes
from miles.errors import CheckpointError
from miles.trainers.megatron import cpu
from miles.trainers.megatron.attention import PackedSequences
from miles.trainers.megatron.model import PolicyModel, build_model, padded_vocab_size
from miles.trainers.megatron.model_weights import ModelWeights, name_map
from miles.trainers.megatron.parallel import Parallel

from .families import CASES, VOCAB, save_model

#: Longest first; one token alone, and one that a window of 5 or 7 does not hold.
_LENGTHS = [70, 23, 23, 9, 1]


@dataclass(frozen=True)
class Loaded:
    """One case in both libraries."""

    directory: Path
    hf: PreTrainedModel
    config: Config
    model: PolicyModel
    weights: ModelWeights


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    group = Parallel(
        rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=0, backend="gloo", timeout_s=60
    )
    yield group
    group.close()


@pytest.fixture(scope="module", params=list(CASES))
def loaded(request: pytest.FixtureRequest, parallel: Parallel, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("model")
    hf = save_model(request.param, directory)
    config = make_config(hf_checkpoint=str(directory))
    with cpu.cuda_means_cpu():
        [model] = build_model(config, parallel)
    tied = not config.model.untie_embeddings_and_output_weights
    weights = ModelWeights([model], name_map(config, parallel), parallel, tied=tied)
    weights.load(directory)
    return Loaded(directory, hf, config, model, weights)


def _tokens() -> Tensor:
    return torch.randint(0, VOCAB, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(1))


def _logits(model: PolicyModel, tokens: Tensor) -> Tensor:
    """[T, V] of packed sequences."""
    sequences = PackedSequences.of(_LENGTHS, torch.device("cpu"))
    with cpu.cuda_means_cpu():
        hidden = model(tokens[None], sequences.positions[None], None, packed_seq_params=sequences)
    return hidden.squeeze(1) @ model.head_weight.t()


def _their_logits(hf: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The same, each sequence by itself."""
    return torch.cat([hf(row[None], use_cache=False).logits[0] for row in tokens.split(_LENGTHS)])


def test_logits_and_gradients_are_those_of_transformers(loaded: Loaded) -> None:
    tokens = _tokens()
    up = torch.randn(len(tokens), VOCAB, generator=torch.Generator().manual_seed(2))
    loaded.hf.zero_grad()
    loaded.model.zero_grad()
    theirs, ours = _their_logits(loaded.hf, tokens), _logits(loaded.model, tokens)
    assert theirs.std() > 0.1, "logits that say something"
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()), rtol=0)
    (theirs * up).sum().backward()
    (ours * up).sum().backward()
    names = name_map(loaded.config, loaded.weights._parallel)
    expected = _their_gradients(loaded.hf)
    for name, parameter in loaded.model.named_parameters():
        match = names.match(name)
        assert parameter.grad is not None, name
        for hf_name, grad in zip(match.hf, match.layout.split([parameter.grad], names.shape), strict=True):
            other = expected.get(hf_name)
            assert other is not None, hf_name
            other = other[match.expert] if match.rule.stacked else other
            torch.testing.assert_close(grad, other, atol=1e-4 * max(1.0, other.abs().max().item()), rtol=1e-4)


def _their_gradients(hf: PreTrainedModel) -> dict[str, Tensor | None]:
    """Under the names of the file, where transformers has experts one by one and in memory all in one."""
    found = {name: parameter.grad for name, parameter in hf.named_parameters()}
    for name, grad in list(found.items()):
        prefix, _, part = name.rpartition("experts.")
        for number, expert in enumerate(grad) if prefix and part in _IN_ONE and grad is not None else ():
            pieces = expert.chunk(len(_IN_ONE[part]))
            found |= {f"{prefix}experts.{number}.{n}.weight": p for n, p in zip(_IN_ONE[part], pieces, strict=True)}
    return found


_IN_ONE = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def test_layers_that_predict_further_tokens_stay_as_they_are(parallel: Parallel, tmp_path: Path) -> None:
    """DeepSeek-V3 has one after its own layers; others that the model has no place for are an error."""
    save_model("deepseek_v3", tmp_path)
    config = make_config(hf_checkpoint=str(tmp_path))
    with cpu.cuda_means_cpu():
        weights = ModelWeights(build_model(config, parallel), name_map(config, parallel), parallel, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors that the model has no place for, such as model\.layers\.2\."):
        weights.load(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    weights.load(tmp_path)
    assert [name for name, _ in weights.untrained(tmp_path)] == ["model.layers.2.eh_proj.weight"]


def test_every_tensor_comes_back_bitwise(loaded: Loaded) -> None:
    saved = load_file(loaded.directory / "model.safetensors")
    back = dict(loaded.weights.stream()) | dict(loaded.weights.untrained(loaded.directory))
    assert set(back) == set(saved)
    for name, tensor in saved.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_two_ranks_that_share_the_experts_have_each_once(loaded: Loaded) -> None:
    saved = load_file(loaded.directory / "model.safetensors")
    names = name_map(loaded.config, loaded.weights._parallel)
    half = (loaded.config.model.num_experts or 0) // 2
    held = []
    for rank in range(2):
        for name, _ in loaded.model.named_parameters():
            match = names.match(name, expert_offset=rank * half)
            if match.expert is not None and match.expert < (rank + 1) * half:
                held += [(hf_name, match.expert) for hf_name in match.hf]
    stacked = {name for name in saved if ".experts." in name and not re.search(r"\.experts\.\d", name)}
    wanted = [(name, expert) for name in stacked for expert in range(2 * half)]
    wanted += [(name, int(n[1])) for name in saved if (n := re.search(r"\.experts\.(\d+)\.", name))]
    assert sorted(held) == sorted(wanted)


@pytest.mark.parametrize("first_layer", [0, 1], ids=["stage 0", "stage 1"])
def test_shards_hold_every_tensor_bitwise(loaded: Loaded, first_layer: int) -> None:
    """Each weight as the ranks of a tensor-parallel group would hold it, also of a later pipeline stage."""
    saved = load_file(loaded.directory / "model.safetensors")
    names, tensor = name_map(loaded.config, loaded.weights._parallel), 2
    rows = padded_vocab_size(loaded.config, ParallelSizes(tensor=tensor))
    shape = dataclasses.replace(names.shape, padded_vocab_size=rows)
    for name, _ in loaded.model.named_parameters():
        match = names.match(name, first_layer)
        if not all(hf_name in saved for hf_name in match.hf):
            assert first_layer, name
            continue
        parts = [saved[hf_name] for hf_name in match.hf]
        if match.rule.stacked:
            parts = [part[match.expert] for part in parts]
        shards = [match.layout.merge(parts, shape, rank, tensor) for rank in range(tensor)]
        assert {shard.shape for shard in shards} == {shards[0].shape}
        for back, part in zip(match.layout.split(shards, shape), parts, strict=True):
            assert torch.equal(back, part), name
