"""The policy loss against a plain float64 loop written from the papers, and against what must not change it."""

import dataclasses
import math

import pytest
import torch

from miles.algo import PolicyLossSpec, Term, finish_metrics, merge_metrics, policy_loss, surrogates
from miles.algo.registry import Registry
from miles.errors import ConfigError
from miles.types import LossInputs

COLUMNS = ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "rollout_log_probs", "entropy")
FULL = PolicyLossSpec(
    eps_clip=0.2,
    eps_clip_high=0.28,
    use_kl_loss=True,
    kl_loss_coef=0.1,
    kl_loss_type="k3",
    entropy_coef=0.01,
    use_tis=True,
    tis_clip=1.2,
    tis_clip_low=0.9,
)


def make_inputs(lengths=(5, 1, 7, 3), seed=0, dtype=torch.float64, mask_share=0.3) -> LossInputs:
    """Stale policy: ratios of about 0.7 to 1.4."""
    g = torch.Generator().manual_seed(seed)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    size = len(row)

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64) * scale

    log_probs = -torch.rand(size, generator=g, dtype=torch.float64) * 3 - 0.1
    mask = torch.rand(size, generator=g) >= mask_share
    weight = torch.rand(len(lengths), generator=g, dtype=torch.float64)[row] * mask
    inputs = LossInputs(
        log_probs=log_probs.clone().to(dtype).requires_grad_(),
        old_log_probs=log_probs + normal(0.2),
        advantages=torch.randn(len(lengths), generator=g, dtype=torch.float64)[row],
        loss_mask=mask,
        token_weight=weight,
        row=row,
        num_rows=len(lengths),
        ref_log_probs=log_probs + normal(0.3),
        rollout_log_probs=log_probs + normal(0.3),
        entropy=(normal(1.0).abs()).to(dtype).requires_grad_(),
    )
    columns = {f: getattr(inputs, f).to(dtype) for f in ("old_log_probs", "advantages", "token_weight")}
    columns |= {f: getattr(inputs, f).to(dtype) for f in ("ref_log_probs", "rollout_log_probs")}
    return dataclasses.replace(inputs, **columns)


def reference_loss(inputs: LossInputs, spec: PolicyLossSpec) -> tuple[float, dict[str, float]]:
    """A loop over tokens in plain Python floats."""
    loss, terms, weight_sum = 0.0, dict.fromkeys(("pg_loss", "kl_loss", "entropy", "ratio", "pg_clipfrac"), 0.0), 0.0
    high_width = spec.eps_clip if spec.eps_clip_high is None else spec.eps_clip_high
    for t in range(len(inputs.log_probs)):
        w = inputs.token_weight[t].item()
        if not inputs.loss_mask[t] or w == 0:
            continue
        new, old, adv = (getattr(inputs, f)[t].item() for f in ("log_probs", "old_log_probs", "advantages"))
        r = math.exp(new - old)
        clipped = min(max(r, 1 - spec.eps_clip), 1 + high_width)
        surrogate = -min(r * adv, clipped * adv)
        terms["pg_clipfrac"] += w * (clipped * adv < r * adv)
        if spec.use_tis:
            tis = math.exp(old - inputs.rollout_log_probs[t].item())
            surrogate *= min(max(tis, spec.tis_clip_low), spec.tis_clip)
        token = surrogate
        if spec.use_kl_loss:
            d = inputs.ref_log_probs[t].item() - new
            divergence = {"k1": -d, "k2": d * d / 2}.get(spec.kl_loss_type, math.exp(d) - 1 - d)
            token += spec.kl_loss_coef * divergence
            terms["kl_loss"] += w * divergence
        h = inputs.entropy[t].item()
        token -= spec.entropy_coef * h
        loss += w * token
        terms["pg_loss"] += w * surrogate
        terms["entropy"] += w * h
        terms["ratio"] += w * r
        weight_sum += w
    for name in ("entropy", "ratio", "pg_clipfrac"):
        terms[name] /= weight_sum
    return loss, terms


SPECS = {
    "plain": PolicyLossSpec(),
    "clip higher": PolicyLossSpec(eps_clip=0.1, eps_clip_high=0.3),
    "k1": PolicyLossSpec(use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="k1"),
    "k2": PolicyLossSpec(use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="k2"),
    "tis": PolicyLossSpec(use_tis=True, tis_clip=1.1),
    "all": FULL,
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_loop(spec, seed):
    inputs = make_inputs(seed=seed)
    out = policy_loss(inputs, spec)
    expected, terms = reference_loss(inputs, spec)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    finished = finish_metrics(out.metrics)
    for name, value in terms.items():
        if name in finished:
            assert finished[name] == pytest.approx(value, rel=1e-12), name
    assert ("kl_loss" in finished) == spec.use_kl_loss


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_float32_agrees_with_float64(spec):
    double, single = make_inputs(), make_inputs(dtype=torch.float32)
    one, other = policy_loss(double, spec).loss, policy_loss(single, spec).loss
    assert other.dtype == torch.float32
    torch.testing.assert_close(other.double(), one, rtol=1e-5, atol=1e-6)


def test_hand_worked_clipping():
    """Ratios 2 and 1/2 with either sign of advantage: clipped only where the update would go further out."""
    log2 = math.log(2)
    inputs = LossInputs(
        log_probs=torch.tensor([log2, -log2, log2, -log2]).requires_grad_(),
        old_log_probs=torch.zeros(4),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        loss_mask=torch.ones(4, dtype=torch.bool),
        token_weight=torch.full((4,), 0.25),
        row=torch.arange(4),
        num_rows=4,
    )
    out = policy_loss(inputs, PolicyLossSpec(eps_clip=0.2, eps_clip_high=0.3))
    assert out.loss.item() == pytest.approx((-1.3 - 0.5 + 2.0 + 0.8) / 4)
    finished = finish_metrics(out.metrics)
    assert finished["pg_clipfrac"] == pytest.approx(0.5)
    assert finished["pg_clipfrac_low"] == pytest.approx(0.25)
    assert finished["pg_clipfrac_high"] == pytest.approx(0.25)
    assert finished["ratio"] == pytest.approx(1.25)
    assert finished["ppo_kl"] == pytest.approx(0.0, abs=1e-7)
    out.loss.backward()
    # d(-r A)/d log_prob = -r A where the band does not bind, 0 where it does
    torch.testing.assert_close(inputs.log_probs.grad, torch.tensor([0.0, -0.5, 2.0, 0.0]) / 4)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradient_matches_finite_differences(spec):
    inputs = make_inputs()

    def loss(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return policy_loss(dataclasses.replace(inputs, log_probs=log_probs, entropy=entropy), spec).loss

    assert torch.autograd.gradcheck(loss, (inputs.log_probs, inputs.entropy))


@pytest.mark.parametrize("detached", [True, False], ids=["detached", "attached"])
def test_on_policy_ratio_is_one_and_gradient_is_the_policy_gradient(detached):
    inputs = make_inputs()
    old = inputs.log_probs.detach() if detached else inputs.log_probs
    inputs = dataclasses.replace(inputs, old_log_probs=old)
    out = policy_loss(inputs, PolicyLossSpec())
    assert finish_metrics(out.metrics)["ratio"] == pytest.approx(1.0, abs=1e-12)
    out.loss.backward()
    torch.testing.assert_close(inputs.log_probs.grad, -inputs.token_weight * inputs.advantages)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("by", ["mask", "weight"])
def test_masked_tokens_reach_neither_loss_nor_gradient_nor_metric(poison, by):
    inputs = make_inputs(mask_share=0.5)
    untrained = ~inputs.loss_mask
    assert 0 < untrained.sum() < len(untrained)
    if by == "weight":  # masked in, but its row weighs nothing
        inputs = dataclasses.replace(inputs, loss_mask=torch.ones_like(untrained))
    poisoned = dataclasses.replace(
        inputs,
        **{
            f: getattr(inputs, f).detach().masked_fill(untrained, poison).requires_grad_(f in ("log_probs", "entropy"))
            for f in COLUMNS
        },
    )
    clean_out, out = policy_loss(inputs, FULL), policy_loss(poisoned, FULL)
    assert out.loss.item() == clean_out.loss.item()
    assert finish_metrics(out.metrics) == finish_metrics(clean_out.metrics)
    out.loss.backward()
    clean_out.loss.backward()
    for name in ("log_probs", "entropy"):
        grad = getattr(poisoned, name).grad
        assert torch.equal(grad, getattr(inputs, name).grad)
        assert (grad[untrained] == 0).all()


def test_a_nan_in_a_trained_token_is_seen():
    inputs = make_inputs(mask_share=0)
    values = inputs.log_probs.detach().clone()
    values[3] = math.nan
    assert policy_loss(dataclasses.replace(inputs, log_probs=values), FULL).loss.isnan()


def test_far_apart_log_probs_stay_finite():
    inputs = make_inputs(dtype=torch.float32, mask_share=0)
    far = dataclasses.replace(
        inputs, old_log_probs=inputs.old_log_probs - 500, ref_log_probs=inputs.ref_log_probs + 500
    )
    out = policy_loss(far, dataclasses.replace(FULL, use_tis=True))
    assert out.loss.isfinite()
    assert all(math.isfinite(v) for v in finish_metrics(out.metrics).values())
    out.loss.backward()
    assert inputs.log_probs.grad.isfinite().all()


def select(inputs: LossInputs, rows: list[int]) -> LossInputs:
    keep = torch.cat([torch.nonzero(inputs.row == r).flatten() for r in rows]) if rows else torch.empty(0).long()
    number = {r: i for i, r in enumerate(rows)}
    columns = {f: getattr(inputs, f)[keep] for f in (*COLUMNS, "loss_mask", "token_weight")}
    row = torch.tensor([number[int(r)] for r in inputs.row[keep]], dtype=torch.long)
    return dataclasses.replace(inputs, **columns, row=row, num_rows=len(rows))


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[3], [1, 0], [2]], [[2, 0], [], [1], [3]]])
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_metrics(split):
    whole = make_inputs()
    expected = policy_loss(whole, FULL)
    expected.loss.backward()
    gradient = whole.log_probs.grad.clone()
    whole.log_probs.grad = None

    loss, metrics = 0.0, {}
    for rows in split:
        out = policy_loss(select(whole, rows), FULL)
        out.loss.backward()
        loss += out.loss.item()
        metrics = merge_metrics(metrics, out.metrics)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(whole.log_probs.grad, gradient)
    assert finish_metrics(metrics) == pytest.approx(finish_metrics(expected.metrics), rel=1e-12)


def test_padding_changes_nothing():
    inputs = make_inputs()
    pad = {f: torch.cat([getattr(inputs, f), torch.full((4,), 7.0, dtype=torch.float64)]) for f in COLUMNS}
    pad["token_weight"] = torch.cat([inputs.token_weight, torch.zeros(4, dtype=torch.float64)])
    pad["loss_mask"] = torch.cat([inputs.loss_mask, torch.zeros(4, dtype=torch.bool)])
    pad["row"] = torch.cat([inputs.row, torch.full((4,), inputs.num_rows)])
    padded = dataclasses.replace(inputs, **pad, num_rows=inputs.num_rows + 1)
    one, other = policy_loss(inputs, FULL), policy_loss(padded, FULL)
    torch.testing.assert_close(one.loss, other.loss)
    assert finish_metrics(one.metrics) == pytest.approx(finish_metrics(other.metrics))


@pytest.mark.parametrize("kind", ["no tokens", "all masked"])
def test_nothing_to_train_on_is_zero_with_a_zero_gradient(kind):
    inputs = make_inputs(lengths=() if kind == "no tokens" else (3, 2))
    inputs = dataclasses.replace(inputs, loss_mask=torch.zeros_like(inputs.loss_mask))
    out = policy_loss(inputs, FULL)
    assert out.loss.item() == 0
    out.loss.backward()
    assert (inputs.log_probs.grad == 0).all()
    finished = finish_metrics(out.metrics)
    assert all(math.isfinite(v) for v in finished.values())
    assert finished["scored_tokens"] == 0
    assert finished["ess"] == 1.0


def test_metric_names_do_not_depend_on_what_a_micro_batch_holds():
    """Ranks reduce metrics together: an empty rank must come with the same names and kinds."""
    full, empty = policy_loss(make_inputs(), FULL), policy_loss(make_inputs(lengths=()), FULL)
    assert [(n, k) for n, (k, _) in full.metrics.items()] == [(n, k) for n, (k, _) in empty.metrics.items()]


def test_coefficient_zero_logs_kl_and_leaves_the_loss_alone():
    inputs = make_inputs()
    out = policy_loss(inputs, PolicyLossSpec(use_kl_loss=True, kl_loss_coef=0.0, kl_loss_type="k2"))
    assert out.loss.item() == policy_loss(inputs, PolicyLossSpec()).loss.item()
    assert out.metrics["kl_loss"][1].item() > 0
    infinite = dataclasses.replace(inputs, ref_log_probs=torch.full_like(inputs.old_log_probs, -math.inf))
    assert policy_loss(infinite, PolicyLossSpec(use_kl_loss=True)).loss.isfinite()


def test_terms_of_the_loss_add_up():
    out = policy_loss(make_inputs(), dataclasses.replace(FULL, entropy_coef=0.0))
    m = {name: value.item() for name, (_, value) in out.metrics.items()}
    assert out.loss.item() == pytest.approx(m["pg_loss"] + FULL.kl_loss_coef * m["kl_loss"])


def test_mismatch_speaks_of_the_trainers_own_log_probs():
    """With the engine's log-probs as the old policy's, the gap is still trainer against engine."""
    inputs = make_inputs()
    train = inputs.old_log_probs
    engine_as_old = dataclasses.replace(inputs, old_log_probs=inputs.rollout_log_probs, train_log_probs=train)
    one, other = (finish_metrics(policy_loss(i, PolicyLossSpec()).metrics) for i in (inputs, engine_as_old))
    for name in ("train_rollout_logprob_abs_diff", "train_rollout_logprob_abs_diff_max", "train_rollout_kl", "ess"):
        assert one[name] == other[name]
    active = inputs.loss_mask & (inputs.token_weight != 0)
    gap = (train - inputs.rollout_log_probs).abs()[active]
    assert one["train_rollout_logprob_abs_diff_max"] == pytest.approx(gap.max().item())
    w = (train - inputs.rollout_log_probs)[active].exp()
    assert one["ess"] == pytest.approx((w.sum() ** 2 / (len(w) * w.square().sum())).item())
    assert 0 < one["ess"] < 1


def test_means_are_means_whatever_the_weights_sum_to():
    inputs = make_inputs()
    scaled = dataclasses.replace(inputs, token_weight=inputs.token_weight * 0.01)
    one, other = (finish_metrics(policy_loss(i, FULL).metrics) for i in (inputs, scaled))
    for name in ("ratio", "entropy", "pg_clipfrac", "train_rollout_kl", "tis"):
        assert one[name] == pytest.approx(other[name])


@pytest.mark.parametrize(
    ("spec", "column"),
    [
        (PolicyLossSpec(use_kl_loss=True), "ref_log_probs"),
        (PolicyLossSpec(use_tis=True), "rollout_log_probs"),
        (PolicyLossSpec(entropy_coef=0.1), "entropy"),
    ],
)
def test_missing_column_is_named(spec, column):
    with pytest.raises(ValueError, match=f"{column}, got None"):
        policy_loss(dataclasses.replace(make_inputs(), **{column: None}), spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(2, 8)}, "packed"),
        ({"advantages": torch.zeros(3)}, "advantages, got shape"),
        ({"loss_mask": torch.ones(16)}, "must be bool"),
        ({"old_log_probs": torch.zeros(16, dtype=torch.bfloat16)}, "convert to float32"),
    ],
)
def test_inputs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(dataclasses.replace(make_inputs(), **change), PolicyLossSpec())


def test_a_registered_surrogate_is_chosen_by_name_and_keeps_every_other_part():
    name = "reinforce_for_this_test"

    @surrogates.register(name)
    def reinforce(tokens: LossInputs, spec: PolicyLossSpec) -> Term:
        return Term(-tokens.log_probs * tokens.advantages)

    try:
        inputs = make_inputs()
        out = policy_loss(inputs, dataclasses.replace(FULL, policy_loss=name))
        assert {"kl_loss", "entropy", "tis", "pg_loss"} <= out.metrics.keys()
        out.loss.backward()
        assert (inputs.log_probs.grad[inputs.loss_mask] != 0).all()
    finally:
        del surrogates._parts[name]
    with pytest.raises(ConfigError, match="policy loss, got 'reinforce_for_this_test'"):
        policy_loss(make_inputs(), PolicyLossSpec(policy_loss=name))


def test_registry_refuses_a_second_part_of_one_name():
    table: Registry[int] = Registry("part")
    table.register("a", "b")(1)
    assert list(table) == ["a", "b"]
    assert "a" in table
    with pytest.raises(ValueError, match="choose another name"):
        table.register("a")(2)
