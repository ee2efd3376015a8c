"""Each policy loss and each correction against loops over tokens written from the papers, and against what must not change
them: splits into micro-batches, padding, order of rows, poison in masked tokens, nothing to train on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from miles.algo import PolicyLossSpec, finish_metrics, merge_metrics, policy_loss, surrogates
from miles.algo.corrections import corrections
from miles.types import LossInputs

from . import test_policy_loss
from .test_policy_loss import COLUMNS, select

LOSSES: dict[str, PolicyLossSpec] = {
    "ppo_clip with c": PolicyLossSpec(eps_clip_c=1.4),
    "dual_clip": PolicyLossSpec(policy_loss="dual_clip", eps_clip_c=1.3),
    "two_sided": PolicyLossSpec(policy_loss="two_sided", eps_clip_high=0.28, two_sided_delta=1.35),
    "gspo": PolicyLossSpec(policy_loss="gspo", eps_clip=0.03, eps_clip_high=0.04),
    "cispo": PolicyLossSpec(policy_loss="cispo", eps_clip=0.1, eps_clip_high=0.2),
    "sapo": PolicyLossSpec(policy_loss="sapo", sapo_tau_pos=0.8, sapo_tau_neg=1.4),
    "dppo tv": PolicyLossSpec(policy_loss="dppo", dppo_threshold=0.03),
    "dppo kl": PolicyLossSpec(policy_loss="dppo", dppo_divergence="kl", dppo_threshold=0.01),
}
CORRECTIONS: dict[str, PolicyLossSpec] = {
    "token_truncate": PolicyLossSpec(off_policy_correction="token_truncate", tis_clip=1.2, tis_clip_low=0.9),
    "token_mask": PolicyLossSpec(off_policy_correction="token_mask", tis_clip=1.2),
    "icepop": PolicyLossSpec(off_policy_correction="icepop", tis_clip=1.2, tis_clip_low=0.9),
    "sequence_truncate": PolicyLossSpec(off_policy_correction="sequence_truncate", tis_clip=1.3, tis_clip_low=0.9),
    "sequence_mask": PolicyLossSpec(off_policy_correction="sequence_mask", tis_clip=1.3, tis_clip_low=0.7),
    "geometric": PolicyLossSpec(off_policy_correction="geometric", tis_clip=1.1, tis_clip_low=0.9),
    "opsm": PolicyLossSpec(use_opsm=True, opsm_delta=0.01),
    "opsm and tis": PolicyLossSpec(use_opsm=True, opsm_delta=0.0, use_tis=True, tis_clip=1.1),
}
REGULARISED = PolicyLossSpec(
    use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", use_unbiased_kl=True, entropy_coef=0.01
)
SPECS = {
    **{f"loss {name}": spec for name, spec in LOSSES.items()},
    **{f"correction {name}": spec for name, spec in CORRECTIONS.items()},
    "unbiased kl": REGULARISED,
    "all at once": dataclasses.replace(REGULARISED, policy_loss="gspo", eps_clip=0.05, use_opsm=True, use_tis=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make_inputs(**options: Any) -> LossInputs:
    """Log-probs of a rollout are negative: the divergences of dppo are of probabilities."""
    inputs = test_policy_loss.make_inputs(**options)
    return dataclasses.replace(inputs, rollout_log_probs=inputs.rollout_log_probs.clamp(max=-0.01))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


class Row:
    """One row's trained tokens as plain floats, and the papers' formulas over them."""

    def __init__(self, inputs: LossInputs, row: int):
        keep = [t for t in range(len(inputs.row)) if int(inputs.row[t]) == row and bool(inputs.token_weight[t] != 0)]
        keep = [t for t in keep if inputs.loss_mask[t]]
        for name in ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "entropy"):
            setattr(self, name, [getattr(inputs, name)[t].item() for t in keep])
        self.weights = [inputs.token_weight[t].item() for t in keep]
        self.tokens = range(len(keep))

    def ratio(self, t: int) -> float:
        return math.exp(self.log_probs[t] - self.old_log_probs[t])

    def surrogate(self, t: int, spec: PolicyLossSpec) -> float:
        adv, r = self.advantages[t], self.ratio(t)
        low = 1 - spec.eps_clip
        high = 1 + (spec.eps_clip if spec.eps_clip_high is None else spec.eps_clip_high)
        match spec.policy_loss:
            case "ppo_clip" | "dual_clip":
                value = min(r * adv, clip(r, low, high) * adv)
                if adv < 0 and spec.eps_clip_c is not None:
                    value = max(value, spec.eps_clip_c * adv)
                return -value
            case "two_sided":
                return -min(min(r, spec.two_sided_delta) * adv, clip(r, low, high) * adv)
            case "gspo":
                s = math.exp(sum(math.log(self.ratio(u)) for u in self.tokens) / len(self.tokens))
                return -min(s * adv, clip(s, low, high) * adv)
            case "cispo":
                return -clip(r, low, high) * adv * self.log_probs[t]
            case "sapo":
                tau = spec.sapo_tau_pos if adv > 0 else spec.sapo_tau_neg
                return -adv * 4 / tau / (1 + math.exp(-tau * (r - 1)))
            case "dppo":
                p, q = math.exp(self.log_probs[t]), math.exp(self.rollout_log_probs[t])
                distance = abs(p - q)
                if spec.dppo_divergence == "kl":
                    distance = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
                away = (adv > 0 and p > q) or (adv < 0 and p < q)
                return 0.0 if away and distance > spec.dppo_threshold else -p / q * adv
        raise AssertionError

    def factor(self, t: int, name: str, spec: PolicyLossSpec) -> float:
        log_w = [o - r for o, r in zip(self.old_log_probs, self.rollout_log_probs, strict=True)]
        low, high = spec.tis_clip_low, spec.tis_clip
        if name == "opsm":
            gap = sum(o - n for o, n in zip(self.old_log_probs, self.log_probs, strict=True)) / len(self.tokens)
            return 0.0 if self.advantages[t] < 0 and gap > spec.opsm_delta else 1.0
        if name.startswith("sequence"):
            w = math.exp(sum(log_w))
        elif name == "geometric":
            return float(low <= math.exp(sum(log_w) / len(log_w)) <= high)
        else:
            w = math.exp(log_w[t])
        if name.endswith("truncate"):
            return clip(w, low, high)
        return w if low <= w <= high else 0.0


def reference(inputs: LossInputs, spec: PolicyLossSpec) -> float:
    loss = 0.0
    for row in (Row(inputs, number) for number in range(inputs.num_rows)):
        for t in row.tokens:
            value = row.surrogate(t, spec)
            for name in spec.corrections:
                value *= row.factor(t, name, spec)
            if spec.use_kl_loss:
                d = row.ref_log_probs[t] - row.log_probs[t]
                divergence = math.exp(d) - 1 - d
                value += spec.kl_loss_coef * divergence * (row.ratio(t) if spec.use_unbiased_kl else 1.0)
            value -= spec.entropy_coef * row.entropy[t]
            loss += row.weights[t] * value
    return loss


@every_spec
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_papers_formula(spec: PolicyLossSpec, seed: int) -> None:
    inputs = make_inputs(seed=seed, lengths=(5, 1, 7, 3, 4, 6))
    assert policy_loss(inputs, spec).loss.item() == pytest.approx(reference(inputs, spec), rel=1e-10)


@every_spec
def test_float32_agrees_with_float64(spec: PolicyLossSpec) -> None:
    one, other = policy_loss(make_inputs(), spec), policy_loss(make_inputs(dtype=torch.float32), spec)
    assert other.loss.dtype == torch.float32
    torch.testing.assert_close(other.loss.double(), one.loss, rtol=1e-5, atol=1e-6)


@every_spec
def test_gradient_matches_finite_differences(spec: PolicyLossSpec) -> None:
    if spec.policy_loss == "cispo":
        pytest.skip("its gradient is not that of its value: see test_cispo_keeps_the_gradient_of_every_token")
    inputs = make_inputs()

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        return policy_loss(dataclasses.replace(inputs, log_probs=log_probs), spec).loss

    assert torch.autograd.gradcheck(loss, (inputs.log_probs,))


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    inputs = make_inputs(mask_share=0)
    spec = LOSSES["cispo"]
    policy_loss(inputs, spec).loss.backward()
    weight = (inputs.log_probs - inputs.old_log_probs).detach().exp().clamp(0.9, 1.2)
    torch.testing.assert_close(inputs.log_probs.grad, -weight * inputs.advantages * inputs.token_weight)


def test_losses_agree_on_policy() -> None:
    """Where new, old and rollout policy are one, every loss has the plain policy gradient."""
    for name in surrogates:
        inputs = make_inputs()
        now = inputs.log_probs.detach()
        same = dataclasses.replace(inputs, old_log_probs=now, rollout_log_probs=now)
        spec = PolicyLossSpec(policy_loss=name)
        policy_loss(same, spec).loss.backward()
        expected = -inputs.advantages * inputs.token_weight
        if name == "gspo":  # a row's gradient is spread evenly over its tokens
            for row in range(inputs.num_rows):
                mine = (inputs.row == row) & (inputs.token_weight != 0)
                expected[mine] = expected[mine].sum() / mine.sum()
        torch.testing.assert_close(inputs.log_probs.grad, expected)


def test_dual_clip_is_two_sided() -> None:
    inputs = make_inputs(seed=4)
    dual = policy_loss(inputs, PolicyLossSpec(policy_loss="dual_clip", eps_clip_c=1.5))
    two = policy_loss(inputs, PolicyLossSpec(policy_loss="two_sided", two_sided_delta=1.5))
    torch.testing.assert_close(dual.loss, two.loss)


def test_corrections_act_through_the_trainers_own_log_probs() -> None:
    inputs = make_inputs()
    spec = CORRECTIONS["sequence_truncate"]
    other = dataclasses.replace(inputs, old_log_probs=inputs.rollout_log_probs, train_log_probs=inputs.old_log_probs)
    one, two = (finish_metrics(policy_loss(i, spec).metrics) for i in (inputs, other))
    assert one["tis"] == pytest.approx(two["tis"])


def test_hand_worked_corrections() -> None:
    """Two rows of two tokens with w = 2, 2 and 4, 1/4: W = 4 and 1, geometric means 2 and 1."""
    log2 = math.log(2)
    inputs = LossInputs(
        log_probs=torch.zeros(4, dtype=torch.float64),
        old_log_probs=torch.zeros(4, dtype=torch.float64),
        advantages=-torch.ones(4, dtype=torch.float64),
        loss_mask=torch.ones(4, dtype=torch.bool),
        token_weight=torch.ones(4, dtype=torch.float64),
        row=torch.tensor([0, 0, 1, 1]),
        num_rows=2,
        rollout_log_probs=torch.tensor([-log2, -log2, -2 * log2, 2 * log2], dtype=torch.float64),
    )
    expected = {
        "token_truncate": [2, 2, 3, 0.5],
        "token_mask": [2, 2, 0, 0],
        "sequence_truncate": [3, 3, 1, 1],
        "sequence_mask": [0, 0, 1, 1],
        "geometric": [1, 1, 1, 1],
    }
    for name, values in expected.items():
        spec = PolicyLossSpec(off_policy_correction=name, tis_clip=3.0, tis_clip_low=0.5)
        got = corrections.get(name)(inputs, spec).values
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64))
    narrow = PolicyLossSpec(off_policy_correction="geometric", tis_clip=1.5, tis_clip_low=0.5)
    assert corrections.get("geometric")(inputs, narrow).values.tolist() == [0, 0, 1, 1]


def test_opsm_leaves_good_sequences_alone() -> None:
    inputs = make_inputs(mask_share=0)
    fallen = dataclasses.replace(inputs, old_log_probs=inputs.log_probs.detach() + 1.0)
    mask = corrections.get("opsm")(fallen, PolicyLossSpec(use_opsm=True)).values
    torch.testing.assert_close(mask, (inputs.advantages >= 0).double())
    risen = dataclasses.replace(inputs, old_log_probs=inputs.log_probs.detach() - 1.0)
    assert (corrections.get("opsm")(risen, PolicyLossSpec(use_opsm=True)).values == 1).all()


def test_a_policy_mask_takes_tokens_out_of_the_policy_term_alone() -> None:
    inputs = make_inputs(mask_share=0)
    chosen = torch.arange(len(inputs.row)) % 3 == 0
    masked = policy_loss(dataclasses.replace(inputs, policy_mask=chosen), REGULARISED)
    whole = policy_loss(inputs, REGULARISED)
    for name in ("kl_loss", "entropy", "total_weight"):
        assert masked.metrics[name][1].item() == whole.metrics[name][1].item()
    kept = dataclasses.replace(inputs, token_weight=inputs.token_weight * chosen)
    assert masked.metrics["pg_loss"][1].item() == pytest.approx(
        policy_loss(kept, REGULARISED).metrics["pg_loss"][1].item()
    )
    share = finish_metrics(masked.metrics)["policy_token_frac"]
    assert share == pytest.approx((inputs.token_weight * chosen).sum().item() / inputs.token_weight.sum().item())
    with pytest.raises(ValueError, match="policy_mask, got"):
        policy_loss(dataclasses.replace(inputs, policy_mask=chosen.float()), REGULARISED)


def poisoned(inputs: LossInputs, value: float) -> LossInputs:
    untrained = ~inputs.loss_mask | (inputs.token_weight == 0)
    return dataclasses.replace(
        inputs,
        **{
            name: getattr(inputs, name).detach().masked_fill(untrained, value).requires_grad_(name == "log_probs")
            for name in COLUMNS
        },
    )


@every_spec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_tokens_reach_neither_loss_nor_gradient_nor_metric(spec: PolicyLossSpec, value: float) -> None:
    inputs = make_inputs(mask_share=0.5)
    bad = poisoned(inputs, value)
    one, other = policy_loss(inputs, spec), policy_loss(bad, spec)
    assert one.loss.item() == other.loss.item()
    assert finish_metrics(one.metrics) == finish_metrics(other.metrics)
    one.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(inputs.log_probs.grad, bad.log_probs.grad, rtol=0, atol=0)


@every_spec
def test_far_apart_log_probs_stay_finite(spec: PolicyLossSpec) -> None:
    inputs = make_inputs(dtype=torch.float32, mask_share=0)
    for shift in (500.0, -500.0):
        moved = {
            name: getattr(inputs, name) + shift for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs")
        }
        out = policy_loss(dataclasses.replace(inputs, **moved), spec)
        assert out.loss.isfinite()
        assert all(math.isfinite(v) for v in finish_metrics(out.metrics).values())
        inputs.log_probs.grad = None
        out.loss.backward()
        assert inputs.log_probs.grad.isfinite().all()


@every_spec
@pytest.mark.parametrize("split", [[[3], [1, 0], [2]], [[2, 0], [], [1], [3]], [[3, 2, 1, 0]]])
def test_any_split_and_any_order_of_rows_is_the_same_step(spec: PolicyLossSpec, split: list[list[int]]) -> None:
    whole = make_inputs()
    expected = policy_loss(whole, spec)
    expected.loss.backward()
    gradient, whole.log_probs.grad = whole.log_probs.grad, None
    loss, metrics = 0.0, {}
    for rows in split:
        out = policy_loss(select(whole, rows), spec)
        out.loss.backward()
        loss += out.loss.item()
        metrics = merge_metrics(metrics, out.metrics)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(whole.log_probs.grad, gradient)
    assert finish_metrics(metrics) == pytest.approx(finish_metrics(expected.metrics), rel=1e-9)


@every_spec
def test_padding_changes_nothing(spec: PolicyLossSpec) -> None:
    """Untrained tokens at the end of every row, as padding or as another turn would put there."""
    inputs = make_inputs()
    order = torch.cat([inputs.row, torch.arange(inputs.num_rows)]).argsort(stable=True)

    def padded(column: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([column, torch.full((inputs.num_rows,), fill, dtype=column.dtype)])[order]

    columns = {name: padded(getattr(inputs, name), 7.0) for name in COLUMNS}
    columns |= {"token_weight": padded(inputs.token_weight, 0.0), "loss_mask": padded(inputs.loss_mask, False)}
    columns["row"] = torch.cat([inputs.row, torch.arange(inputs.num_rows)])[order]
    one, other = policy_loss(inputs, spec), policy_loss(dataclasses.replace(inputs, **columns), spec)
    torch.testing.assert_close(one.loss, other.loss)
    assert finish_metrics(one.metrics) == pytest.approx(finish_metrics(other.metrics))


@every_spec
@pytest.mark.parametrize("kind", ["no tokens", "all masked", "a row of zero tokens"])
def test_nothing_to_train_on_is_zero(spec: PolicyLossSpec, kind: str) -> None:
    inputs = make_inputs(lengths=() if kind == "no tokens" else (3, 2))
    if kind == "a row of zero tokens":
        inputs = dataclasses.replace(inputs, num_rows=5)
        assert policy_loss(inputs, spec).loss.isfinite()
    inputs = dataclasses.replace(inputs, loss_mask=torch.zeros_like(inputs.loss_mask))
    out = policy_loss(inputs, spec)
    assert out.loss.item() == 0
    out.loss.backward()
    assert (inputs.log_probs.grad == 0).all()
    assert all(math.isfinite(v) for v in finish_metrics(out.metrics).values())


@every_spec
def test_metric_names_do_not_depend_on_what_a_micro_batch_holds(spec: PolicyLossSpec) -> None:
    full, empty = policy_loss(make_inputs(), spec), policy_loss(make_inputs(lengths=()), spec)
    assert [(n, k) for n, (k, _) in full.metrics.items()] == [(n, k) for n, (k, _) in empty.metrics.items()]


@pytest.mark.parametrize("spec", [LOSSES["dppo tv"], CORRECTIONS["geometric"], CORRECTIONS["opsm and tis"]])
def test_what_needs_the_engines_log_probs_says_so(spec: PolicyLossSpec) -> None:
    assert spec.needs_rollout_log_probs
    with pytest.raises(ValueError, match="rollout_log_probs, got None"):
        policy_loss(dataclasses.replace(make_inputs(), rollout_log_probs=None), spec)


def test_every_part_has_a_case_here() -> None:
    assert {spec.policy_loss for spec in LOSSES.values()} == set(surrogates)
    assert {name for spec in CORRECTIONS.values() for name in spec.corrections} == set(corrections)
