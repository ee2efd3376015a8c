"""Names of the algorithms that we ship, as the command line needs them: without importing torch.

The parts themselves are in the registries of `miles.algo`; a test holds the two together. A name that is not here may be one
that a --plugin registers, which is known once the plugins are imported.
"""

from __future__ import annotations

#: Field -> names that are built in.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "advantage_estimator": (
        *("grpo", "gspo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"),
        *("gdpo", "maxrl", "remax", "opo", "pass_at_k"),
    ),
    "policy_loss": ("ppo_clip", "dual_clip", "two_sided", "gspo", "cispo", "sapo", "dppo"),
    "off_policy_correction": (
        *("token_truncate", "token_mask", "icepop"),
        *("sequence_truncate", "sequence_mask", "geometric"),
    ),
    "loss_aggregation": ("seq_mean", "token_mean", "constant"),
}

#: Estimators whose advantages are whitened over the batch unless told otherwise; a return may be discounted for them alone.
WHITENED_ESTIMATORS = ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")

#: Estimators that say something about a prompt with one sample.
WITHOUT_GROUP = ("ppo", "reinforce_plus_plus", "remax")

#: Correction -> default (lower, upper) bound of its ratio, where it is not (0, 2).
CORRECTION_BOUNDS = {"icepop": (0.5, 5.0), "geometric": (0.999, 1.001)}

#: Policy loss -> the flags that it alone reads, beside --eps-clip and --eps-clip-high.
LOSS_FLAGS = {
    "eps_clip_c": ("ppo_clip", "dual_clip"),
    "two_sided_delta": ("two_sided",),
    "sapo_tau_pos": ("sapo",),
    "sapo_tau_neg": ("sapo",),
    "dppo_divergence": ("dppo",),
    "dppo_threshold": ("dppo",),
}

#: Policy losses without a clip.
WITHOUT_CLIP = ("sapo", "dppo")

#: Names of --dpo-loss-type.
PAIR_LOSSES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "aot_pair", "apo_zero", "apo_down", "discopop", "sft"),
)

#: Those that --label-smoothing changes.
SMOOTHED_PAIR_LOSSES = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "aot_pair")

#: Those that look at log-probs alone, and not at the scores that --f-divergence makes of them.
WITHOUT_DIVERGENCE = ("aot", "sft")

#: Those that divide by the number of tokens themselves.
AVERAGED_PAIR_LOSSES = ("sigmoid_norm", "ipo", "sft")
