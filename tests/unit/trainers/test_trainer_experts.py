"""What the flags of experts do, and the loss that balances them, against its formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from miles.config import make_config, resolve
from miles.trainers.megatron import cpu
from miles.trainers.megatron.attention import PackedSequences
from miles.trainers.megatron.model import PolicyModel, build_model
from miles.trainers.megatron.model_weights import ModelWeights, name_map
from miles.trainers.megatron.moe import set_step_tokens
from miles.trainers.megatron.parallel import Parallel

from .families import VOCAB, save_model

_TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    group = Parallel(
        rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=0, backend="gloo", timeout_s=60
    )
    yield group
    group.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model("qwen3_moe", path)
    return path


def _model(directory: Path, parallel: Parallel, **flags: Any) -> PolicyModel:
    config = make_config(hf_checkpoint=str(directory), **flags)
    with cpu.cuda_means_cpu():
        [model] = build_model(config, parallel)
    ModelWeights([model], name_map(config, parallel), parallel, tied=False).load(directory)
    return model


def _hidden(model: PolicyModel) -> Tensor:
    sequences = PackedSequences.of([25, 15], torch.device("cpu"))
    with cpu.cuda_means_cpu():
        hidden: Tensor = model(_TOKENS[None], sequences.positions[None], None, packed_seq_params=sequences)
    return hidden


def test_dispatchers_differ_and_agree(directory: Path, parallel: Parallel) -> None:
    models = {kind: _model(directory, parallel, moe_token_dispatcher_type=kind) for kind in ("alltoall", "allgather")}
    names = {kind: type(model.decoder.layers[0].mlp.token_dispatcher).__name__ for kind, model in models.items()}
    assert names == {"alltoall": "MoEAlltoAllTokenDispatcher", "allgather": "MoEAllGatherTokenDispatcher"}
    hidden = {kind: _hidden(model) for kind, model in models.items()}
    torch.testing.assert_close(hidden["alltoall"], hidden["allgather"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("flag", "dtype"), [(None, torch.float32), ("fp32", torch.float32), ("fp64", torch.float64)])
def test_the_router_computes_in_its_precision(
    directory: Path, parallel: Parallel, flag: str | None, dtype: torch.dtype
) -> None:
    router = _model(directory, parallel, moe_router_dtype=flag).decoder.layers[0].mlp.router
    with cpu.cuda_means_cpu():
        assert router.gating(torch.randn(3, 1, 64)).dtype == dtype


def test_the_balancing_loss_is_a_mean_over_the_tokens_of_the_step(
    directory: Path, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`coefficient * E * sum over experts of (share of choices * mean probability)`, arXiv 2101.03961."""
    # Megatron's schedules, which are not used here, set it for the process.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))
    flags = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
    model = _model(directory, parallel, **flags)
    router = model.decoder.layers[-1].mlp.router
    seen: list[Tensor] = []
    router.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for rest in (0, 120):
        model.zero_grad()
        with cpu.cuda_means_cpu():
            set_step_tokens(model.config, [40, rest])
        (_hidden(model) * 0).sum().backward()
        weight = router.weight.detach().clone().requires_grad_()
        probabilities = (seen[-1].squeeze(1) @ weight.t()).softmax(-1)
        choices = torch.zeros(40, 4).scatter(1, probabilities.topk(2).indices, 1)
        loss = 0.5 * 4 * (choices.mean(0) / 2 * probabilities.mean(0)).sum() * 40 / (40 + rest)
        [expected] = torch.autograd.grad(loss, weight)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(router.weight.grad, expected, atol=1e-7, rtol=1e-4)


def test_without_a_coefficient_nothing_is_balanced(directory: Path, parallel: Parallel) -> None:
    model = _model(directory, parallel)
    (_hidden(model) * 0).sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_kernels_of_a_gpu_are_listed_as_not_in_effect(directory: Path) -> None:
    words = ["--hf-checkpoint", str(directory), "--moe-grouped-gemm", "--moe-permute-fusion", "--debug-train-only"]
    words += ["--load-debug-rollout-data", "{rollout_id}.jsonl", "--num-rollout", "1", "--rollout-batch-size", "2"]
    words += ["--n-samples-per-prompt", "2"]
    listed = [item.flag for item in resolve(words).not_in_effect]
    assert {"--moe-grouped-gemm", "--moe-permute-fusion"} <= set(listed)
