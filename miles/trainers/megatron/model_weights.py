"""A model's weights, in from checkpoints and out under HF names.

HF directory, Miles checkpoint --load--> megatron parameters --stream--> HF-named full tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from miles.config.groups import Config, ModelArgs
from miles.errors import CheckpointError
from miles.trainers import checkpoints

from . import checkpoint
from .hf_files import HfReader, is_hf_directory, read_config
from .hf_names import UNTRAINED, Match, NameMap, Shape, trained_tensors
from .model import ScalarModel, padded_vocab_size
from .parallel import Parallel

_SCORE, _OUTPUT = "score.weight", "lm_head.weight"
#: Of megatron; where they are tied, the last of several pipeline stages has a copy of the embedding as its output layer.
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class _Held(NamedTuple):
    """A parameter of some pipeline stage."""

    name: str
    layer_offset: int
    """Layers that come before those of its piece of the model."""
    shape: torch.Size
    dtype: torch.dtype


class ModelWeights:
    """Reads and streams one model's weights. Every rank calls each method."""

    def __init__(self, model: Sequence[GPTModel], names: NameMap, parallel: Parallel, *, tied: bool):
        """model: this rank's pieces, in order. tied: the checkpoint's output weight is its embedding, so one that it has
        beside that is not missed."""
        self._model, self._names, self._parallel, self._tied = model, names, parallel, tied
        self._stages: list[list[list[_Held]]] | None = None
        self._is_scalar = isinstance(model[0], ScalarModel)
        self._unused = {_OUTPUT} if tied or self._is_scalar else set()

    def load(self, path: str | Path) -> None:
        """Fills the model from an HF directory or a Miles checkpoint (one, or the current one of a series).

        A scalar model takes its head, where there is none in it, as zeros: so a language model becomes a critic. Of a
        checkpoint with a critic it takes the critic. Raises CheckpointError.
        """
        if is_hf_directory(path):
            self._load_hf(path)
        elif checkpoints.holds_checkpoints(path):
            self._load_checkpoint(self._find(path))
        else:
            raise CheckpointError(
                f"checkpoint, got {path}: it holds neither config.json nor {checkpoints.LATEST}; "
                "name an HF directory or a directory of Miles checkpoints"
            )

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """HF-named full tensors in a fixed order; every rank iterates. A tied output weight is not among them.

        In the model's dtype and on its device. A tensor may be the model's own memory: copy it before the next step.
        """
        if self._stages is None:
            own = [
                [_Held(n, self._offset(part), t.shape, t.dtype) for n, t in self._sent(part)] for part in self._model
            ]
            self._stages = self._parallel.from_all_stages(own)
        # HF name -> pieces of experts, of a tensor that holds all of them.
        stacks: dict[str, dict[int, Tensor]] = {}
        for match, tensor in self._matched(self._stages):
            shards = self._parallel.gather_tensor_shards(tensor, of_expert=match.expert is not None)
            parts = match.layout.split(shards, self._names.shape)
            if match.expert is None:
                yield from zip(match.hf, parts, strict=True)
                continue
            for position, part in enumerate(parts):
                pieces = self._parallel.gather_expert_shards(part)
                for expert, piece in zip(self._same_on_other_ranks(match), pieces, strict=True):
                    hf_name = match.names(expert)[position]
                    if not match.rule.stacked:
                        yield hf_name, piece
                        continue
                    stack = stacks.setdefault(hf_name, {})
                    stack[expert] = piece
                    if len(stack) == self._num_experts:
                        yield hf_name, torch.stack([stack[number] for number in sorted(stack)])
                        del stacks[hf_name]

    def _matched(self, stages: list[list[list[_Held]]]) -> Iterator[tuple[Match, Tensor]]:
        """This rank's shard of each tensor of the whole model; those of other pipeline stages are on their way for a moment."""
        rank = self._parallel.groups.pp.rank()
        for number, part in enumerate(self._model):
            own = dict(self._sent(part))
            for stage, held in enumerate(pieces[number] for pieces in stages):
                for name, offset, shape, dtype in held:
                    if stage == rank:
                        shard = own[name].detach()
                    else:
                        shard = torch.empty(shape, dtype=dtype, device=self._parallel.device)
                    yield self._match(name, offset), self._parallel.tensor_from_stage(stage, shard)

    def _sent(self, part: GPTModel) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are no copy of another's."""
        return ((name, tensor) for name, tensor in trained_tensors(part) if not (self._tied and name == _HEAD))

    @torch.no_grad()
    def _load_hf(self, path: str | Path) -> None:
        reader = HfReader(path)
        # Names of experts that other ranks read.
        elsewhere: set[str] = set()
        for part in self._model:
            for name, param in trained_tensors(part):
                if self._is_scalar and name == _SCORE and _SCORE not in reader:
                    self._reset_head()
                    continue
                match = self._match(_EMBEDDING if self._tied and name == _HEAD else name, self._offset(part))
                param.copy_(self._shard(reader, match, name, param.shape))
                elsewhere.update(
                    hf_name for expert in self._same_on_other_ranks(match) for hf_name in match.names(expert)
                )
        unread = set.intersection(*self._parallel.from_all_stages(reader.unread - elsewhere))
        untrained = self._untrained(path)
        unknown = sorted(
            n for n in unread - self._unused if not n.endswith("rotary_emb.inv_freq") and not n.startswith(untrained)
        )
        if unknown:
            raise CheckpointError(
                f"HF checkpoint {path}, got {len(unknown)} tensors that the model has no place for, such as {unknown[0]}: "
                "they would be lost; check the MODEL flags and --model-name"
            )

    def _shard(self, reader: HfReader, match: Match, name: str, wanted: torch.Size) -> Tensor:
        """This rank's part of what the reader has for the weight `name`. Raises CheckpointError where it does not fit."""
        groups = self._parallel.groups
        tp = groups.tp if match.expert is None else groups.expt_tp
        parts = [reader[hf_name] for hf_name in match.hf]
        if match.rule.stacked:
            parts = [part[match.expert] for part in parts]
        shard = match.layout.merge(parts, self._names.shape, tp.rank(), tp.size())
        if shard.shape != wanted:
            raise CheckpointError(
                f"HF checkpoint {reader.path}, got {' + '.join(match.hf)} of shape {[tuple(p.shape) for p in parts]}: the model "
                f"takes {tuple(wanted)} for {name}; check the MODEL flags"
            )
        return shard

    def untrained(self, path: str | Path) -> Iterator[tuple[str, Tensor]]:
        """What an HF directory has beside the model, as it is there: an export is whole with it. Read by one rank alone."""
        reader, beginnings = HfReader(path), self._untrained(path)
        for name in sorted(reader.unread):
            if name.startswith(beginnings):
                yield name, reader[name]

    def _untrained(self, path: str | Path) -> tuple[str, ...]:
        """Beginnings of names. Layers that predict further tokens come after the model's own."""
        more = read_config(path).get("num_nextn_predict_layers") or 0
        first = self._model[0].config.num_layers
        return (*UNTRAINED, *(f"model.layers.{first + i}." for i in range(more)))

    def _match(self, name: str, layer_offset: int) -> Match:
        return self._names.match(name, layer_offset, self._expert_rank * self._experts_per_rank)

    def _same_on_other_ranks(self, match: Match) -> list[int]:
        """Experts that the ranks which share them have in the place of this rank's, in rank order."""
        if match.expert is None:
            return []
        ranks = range(int(self._parallel.groups.ep.size()))
        return [match.expert + (rank - self._expert_rank) * self._experts_per_rank for rank in ranks]

    @property
    def _num_experts(self) -> int:
        return self._model[0].config.num_moe_experts or 0

    @property
    def _expert_rank(self) -> int:
        return int(self._parallel.groups.ep.rank())

    @property
    def _experts_per_rank(self) -> int:
        return self._num_experts // int(self._parallel.groups.ep.size())

    def _load_checkpoint(self, found: Path) -> None:
        without = frozenset[str]()
        if self._is_scalar:
            found = found / checkpoint.CRITIC if (found / checkpoint.CRITIC).is_dir() else found
            if not checkpoint.holds_tensor(found, _SCORE):
                without = frozenset({_SCORE})
                self._reset_head()
        checkpoint.load_state(found, model=self._model, optimizer=None, parallel=self._parallel, without=without)

    def _reset_head(self) -> None:
        assert isinstance(self._model[-1], ScalarModel)
        self._model[-1].reset_head()

    def _find(self, directory: str | Path) -> Path:
        """Verified by the main rank alone, whose verdict all ranks share: checksums are read once."""
        verdict: Path | CheckpointError
        try:
            verdict = checkpoints.find(directory) if self._parallel.is_main else Path(directory)
        except CheckpointError as error:
            verdict = error
        verdict = self._parallel.from_main(verdict)
        if isinstance(verdict, CheckpointError):
            raise verdict
        return verdict

    @staticmethod
    def _offset(part: GPTModel) -> int:
        return int(get_transformer_layer_offset(part.config, part.vp_stage))


def _delta_rows(model: ModelArgs) -> tuple[int, int, int, int]:
    keys, values = model.linear_num_key_heads or 0, model.linear_num_value_heads or 0
    return keys, keys * (model.linear_key_head_dim or 0), values * (model.linear_value_head_dim or 0), values


def name_map(config: Config, parallel: Parallel) -> NameMap:
    """The HF names of the configuration's model. Raises CheckpointError where the kind of model is not known."""
    model, ckpt = config.model, config.ckpt
    model_type = ckpt.model_name
    if model_type is None:
        if ckpt.hf_checkpoint is None:
            raise CheckpointError(
                "--hf-checkpoint, got none: the kind of model is read there; name it, or give --model-name"
            )
        model_type = str(read_config(ckpt.hf_checkpoint).get("model_type"))
    heads, groups = model.num_attention_heads or 0, model.num_query_groups or model.num_attention_heads or 0
    shape = Shape(
        num_query_groups=groups,
        heads_per_group=heads // groups,
        head_dim=model.kv_channels or 0,
        vocab_size=model.vocab_size or 0,
        padded_vocab_size=padded_vocab_size(config, parallel.sizes),
        delta_rows=_delta_rows(model),
    )
    return NameMap(model_type, shape)
