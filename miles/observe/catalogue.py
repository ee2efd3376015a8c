"""Every metric that a run can log: what it is, over what, in which unit, and where it should lie.

docs/metrics.md is written from it: `python -m miles.observe.catalogue`. A test compares it with the sources, and every whole
run of the tests with what it logged.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """One key, or a family of keys with `<...>` for what differs."""

    key: str
    meaning: str
    over: str
    """The population or the denominator."""
    unit: str
    healthy: str

    def matches(self, key: str) -> bool:
        return _pattern(self.key).fullmatch(key) is not None


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    # A data set's name has no slash; a filter's reason is whatever its author wrote.
    parts = re.split(r"(<[^>]+>)", key)
    wild = {"<reason>": ".+", "<part>": ".+", "<k>": r"\d+"}
    return re.compile("".join(wild.get(p, "[^/]+") if p.startswith("<") else re.escape(p) for p in parts))


@dataclass(frozen=True)
class Group:
    title: str
    text: str
    metrics: tuple[Metric, ...]


def _rows(*rows: tuple[str, str, str, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(*row) for row in rows)


GROUPS: tuple[Group, ...] = (
    Group(
        "Rollout: what was generated and scored",
        "A trajectory is one answer to one prompt; it may be several rows (turns, branches). A failed one has no reward.",
        _rows(
            (
                "rollout/raw_reward",
                "mean reward, before any normalisation",
                "trajectories that did not fail",
                "reward",
                "rises; it is of training prompts, so judge progress by eval/",
            ),
            (
                "rollout/weight_lag/mean",
                "versions between the oldest weights that made a sample and those that train on it",
                "samples",
                "versions",
                "0 with train.py, 1 with train_async.py after the first rollout",
            ),
            ("rollout/weight_lag/max", "the largest of them", "-", "versions", "as above"),
            (
                "rollout/raw_reward/ci_low",
                "lower end of the 95 % interval of that mean",
                "groups as clusters; from 2 groups on",
                "reward",
                "the curve moves by more than the interval's width before it means anything",
            ),
            ("rollout/raw_reward/ci_high", "upper end of that interval", "as above", "reward", "as above"),
            (
                "rollout/reward/<part>",
                "mean of one entry of dict rewards",
                "trajectories that did not fail",
                "reward",
                "shows which part is learned",
            ),
            (
                "rollout/greedy_reward",
                "mean reward of the greedy answers that serve as baseline",
                "one answer for each prompt",
                "reward",
                "near or above raw_reward",
            ),
            (
                "rollout/reward_std",
                "standard deviation of rewards",
                "trajectories that did not fail",
                "reward",
                "0 means that nothing can be learned",
            ),
            (
                "rollout/zero_std_ratio",
                "share of groups whose rewards are all equal: no group baseline tells them apart",
                "groups with a scored trajectory",
                "share",
                "below 0.8; near 1 the prompts are too easy or too hard",
            ),
            (
                "rollout/failed_ratio",
                "share of trajectories that failed, of those that made the batch",
                "all trajectories of the batch",
                "share",
                "0; see rollout/failed_samples for those that were begun again",
            ),
            (
                "rollout/failed_samples",
                "samples that failed, also in groups that were begun again",
                "the whole rollout",
                "count",
                "0; the run stops above --max-failed-sample-fraction",
            ),
            (
                "rollout/retried_groups",
                "groups begun again since all of their samples failed",
                "the whole rollout",
                "count",
                "0",
            ),
            (
                "rollout/aborted_groups",
                "groups begun again since an engine ended them",
                "the whole rollout",
                "count",
                "0 where nothing pauses engines or dies",
            ),
            (
                "rollout/dropped_groups",
                "groups that the dynamic filter dropped",
                "scored groups of the rollout",
                "count",
                "below a few batches; the run stops at 20",
            ),
            (
                "rollout/dropped/<reason>",
                "the same, by the filter's reason",
                "scored groups of the rollout",
                "count",
                "-",
            ),
            (
                "rollout/surplus_groups",
                "groups in flight when the batch was full; they go back and are generated later",
                "groups of the rollout",
                "count",
                "0 without over-sampling or a filter",
            ),
            (
                "rollout/generated_tokens",
                "response tokens of all scored groups, dropped ones too",
                "the whole rollout",
                "tokens",
                "near rollout/trained_tokens; more is waste",
            ),
            (
                "rollout/total_tokens",
                "prompt and response tokens",
                "rows of trajectories that did not fail",
                "tokens",
                "-",
            ),
            (
                "rollout/trained_tokens",
                "response tokens that the loss may use (masked in)",
                "rows in the loss, skipped ones too",
                "tokens",
                "-",
            ),
            (
                "rollout/rows",
                "rows of the batch",
                "the batch",
                "count",
                "--rollout-batch-size x --n-samples-per-prompt, without multi-turn",
            ),
            (
                "rollout/rows_skipped",
                "rows left out of the pass since their gradient is exactly 0 (advantage 0, no KL, no entropy)",
                "rows in the loss",
                "count",
                "follows zero_std_ratio; 0 in every 10th rollout, where all rows are scored",
            ),
            (
                "rollout/rows_out_of_loss",
                "rows that failed, were removed, or have no trained token",
                "the batch",
                "count",
                "0",
            ),
            (
                "rollout/response_len/mean",
                "mean response length, all turns",
                "trajectories that did not fail",
                "tokens",
                "steady; a run-away in either direction is reward hacking or collapse",
            ),
            ("rollout/response_len/max", "longest response", "as above", "tokens", "below --rollout-max-response-len"),
            ("rollout/response_len/min", "shortest response", "as above", "tokens", "above 0"),
            (
                "rollout/truncated_ratio",
                "share that reached the length limit",
                "trajectories that did not fail",
                "share",
                "below 0.1; truncated answers are scored as they are",
            ),
            (
                "rollout/student_ratio",
                "share of rows that the student answered (--gkd-lmbda)",
                "rows of the rollout",
                "share",
                "around --gkd-lmbda",
            ),
            (
                "rollout/teacher_ratio",
                "share of rows that the teacher answered (--gkd-seq-kd)",
                "rows of the rollout",
                "share",
                "around 1 - --gkd-lmbda",
            ),
        ),
    ),
    Group(
        "Training: loss and policy",
        "Means are weighted by each token's weight in the loss and divided by the weight of the tokens that were scored, so skipped rows "
        "change them: the population is `train/scored_tokens`. With several optimizer steps in a rollout a value is the mean over those "
        "steps that have one; `*_max` is the largest, `scored_tokens` the sum. All ranks together.",
        _rows(
            (
                "train/loss",
                "the loss that was minimised",
                "loss weights of the whole batch, which sum to 1 per optimizer step",
                "-",
                "near 0 on policy, where advantages cancel: its level says nothing",
            ),
            (
                "train/nll",
                "mean of minus log-prob (supervised losses)",
                "scored tokens",
                "nats",
                "falls; judge it by eval/<dataset>/loss",
            ),
            (
                "train/divergence",
                "mean divergence of the teacher's next-token distributions and the policy's (--loss-type gkd)",
                "scored tokens",
                "nats",
                "falls; 0 is the teacher itself",
            ),
            (
                "train/teacher_kl",
                "mean of log policy - log teacher at the sampled tokens (--use-opd), before the update",
                "response tokens of the batch",
                "nats",
                "falls towards 0",
            ),
            ("train/custom/<part>", "metrics of --custom-loss-function-path", "scored tokens", "-", "-"),
            ("train/nll_<channel>", "the same of one channel", "scored tokens of that channel", "nats", "as train/nll"),
            (
                "train/divergence_<channel>",
                "train/divergence of one channel",
                "scored tokens of that channel",
                "nats",
                "as train/divergence",
            ),
            ("train/pg_loss", "its policy term", "as train/loss", "-", "as train/loss"),
            (
                "train/kl_loss",
                "its KL term before --kl-loss-coef (with --use-kl-loss)",
                "as train/loss",
                "nats",
                "0 at the start, then slowly up; a jump means that the policy left the reference",
            ),
            (
                "train/entropy",
                "entropy of the policy, at temperature",
                "scored tokens",
                "nats",
                "falls slowly; near 0 exploration has ended",
            ),
            (
                "train/grad_norm",
                "gradient norm before clipping",
                "all weights, mean over optimizer steps",
                "-",
                "steady; spikes above 10 x its median deserve a look",
            ),
            ("train/lr", "learning rate of the update", "mean over optimizer steps", "-", "as the schedule says"),
            ("train/ratio", "mean probability ratio, new to old policy", "scored tokens", "ratio", "1 within 0.01"),
            (
                "train/ratio_first",
                "the same in the first optimizer step, before any update",
                "scored tokens of that step",
                "ratio",
                "exactly 1; anything else means that old log-probs are not the policy's",
            ),
            (
                "train/ppo_kl",
                "mean of old minus new log-prob",
                "scored tokens",
                "nats",
                "0 in the first optimizer step, below 0.05 in later ones",
            ),
            (
                "train/pg_clipfrac",
                "share of tokens whose ratio was clipped",
                "scored tokens",
                "share",
                "0 with one optimizer step; below 0.2",
            ),
            (
                "train/pg_clipfrac_low",
                "those with a negative advantage whose ratio fell below the band",
                "scored tokens",
                "share",
                "as above",
            ),
            (
                "train/pg_clipfrac_high",
                "those with a positive advantage whose ratio rose above the band",
                "scored tokens",
                "share",
                "as above",
            ),
            (
                "train/pg_clipfrac_cap",
                "those with a negative advantage held by the dual clip",
                "scored tokens",
                "share",
                "rare",
            ),
            (
                "train/dppo_divergence",
                "mean divergence that the trust region of DPPO bounds",
                "scored tokens",
                "-",
                "below --dppo-threshold",
            ),
            (
                "train/policy_token_frac",
                "share of tokens that the policy term uses",
                "scored tokens",
                "share",
                "1 without a mask on the policy term",
            ),
            (
                "train/advantage_abs",
                "mean size of the tokens' advantages after returns and whitening, where there are any",
                "response tokens of the batch",
                "-",
                "0.7 to 0.8 where they are whitened",
            ),
            (
                "train/reward_kl",
                "mean KL to the reference that was taken from rewards (--kl-coef)",
                "response tokens of the batch",
                "nats",
                "slowly up from 0",
            ),
            (
                "train/value_loss",
                "the critic's loss (--advantage-estimator ppo)",
                "as train/loss",
                "reward squared",
                "falls; its floor is half the variance that the prompt and answer so far do not tell",
            ),
            (
                "train/value_clipfrac",
                "share of tokens whose value moved further than --value-clip, and whose loss is that of the clipped value",
                "scored tokens",
                "share",
                "0 in the first optimizer step of a rollout; below 0.2",
            ),
            (
                "train/explained_variance",
                "1 - Var(return - value) / Var(return), values before the update; with --lambd below 1 returns lean on values",
                "response tokens of the rollout",
                "-",
                "0 at the start, rises; below 0 the critic is worse than a constant",
            ),
            ("train/value", "mean value, before the update", "as above", "reward", "follows train/return"),
            ("train/return", "mean return that the critic learns", "as above", "reward", "rises with the reward"),
            (
                "train/critic_grad_norm",
                "the critic's gradient norm before clipping",
                "as train/grad_norm",
                "-",
                "steady",
            ),
            ("train/critic_lr", "the critic's learning rate", "as train/lr", "-", "as the schedule says"),
            (
                "train/tis",
                "mean importance ratio, trainer to engine, before bounds",
                "scored tokens",
                "ratio",
                "1 within 0.01",
            ),
            (
                "train/tis_weight",
                "mean of the weight that multiplies the loss, after bounds",
                "scored tokens",
                "ratio",
                "1 within 0.01",
            ),
            ("train/tis_clipfrac_low", "share of ratios below --tis-clip-low", "scored tokens", "share", "0"),
            ("train/tis_clipfrac_high", "share of ratios above --tis-clip", "scored tokens", "share", "below 0.01"),
            (
                "train/opsm_clipfrac",
                "share of tokens masked as off-policy sequences (--use-opsm)",
                "scored tokens",
                "share",
                "below 0.2",
            ),
            (
                "train/train_rollout_logprob_abs_diff",
                "mean difference of trainer's and engine's log-prob of the same token",
                "scored tokens",
                "nats",
                "1e-6 in fp32, below 0.02 in bf16; growth means that the two are different models",
            ),
            (
                "train/train_rollout_logprob_abs_diff_max",
                "the largest of them",
                "scored tokens",
                "nats",
                "1e-4 in fp32, below 1 in bf16",
            ),
            ("train/train_rollout_kl", "KL(engine, trainer), k3 estimate", "scored tokens", "nats", "below 1e-3"),
            (
                "train/ess",
                "effective sample size of importance weights trainer / engine, as a share",
                "scored tokens",
                "share",
                "above 0.95",
            ),
            (
                "train/scored_tokens",
                "response tokens that went through the loss: what all means speak of",
                "sum over optimizer steps",
                "tokens",
                "rollout/trained_tokens less those of skipped rows",
            ),
            (
                "train/rows_skipped",
                "rows whose pass was left out, as the trainer counted them",
                "rows in the loss",
                "count",
                "equals rollout/rows_skipped",
            ),
            (
                "train/global_step",
                "optimizer steps so far",
                "the run",
                "count",
                "--num-steps-per-rollout more each step",
            ),
        ),
    ),
    Group(
        "Preferences",
        "Of --loss-type dpo, orpo, simpo, cpo and kto, in place of those of the policy. A reward is --beta times what the loss compares: "
        "the log-ratio to the reference, or the log-prob where there is none, as sum or mean over an answer's tokens. Of kto, chosen "
        "means good and rejected bad, each over its own answers.",
        _rows(
            (
                "train/reward_accuracy",
                "share of pairs whose chosen answer has the higher reward; a tie is half",
                "pairs of the step",
                "share",
                "rises from 0.5; 1 early on means that the pairs are easy to tell apart, not that the model is better",
            ),
            (
                "train/reward_margin",
                "reward of the chosen less that of the rejected answer",
                "pairs",
                "reward",
                "rises",
            ),
            (
                "train/reward_chosen",
                "reward of the chosen answers",
                "pairs; kto: good answers",
                "reward",
                "above 0, or at least falling more slowly than the other",
            ),
            ("train/reward_rejected", "reward of the rejected answers", "pairs; kto: bad answers", "reward", "falls"),
            (
                "train/logp_chosen",
                "log-prob of a chosen answer, the sum over its tokens",
                "pairs; kto: good answers",
                "nats",
                "falling fast while accuracy is high: raise --beta, or add --rpo-alpha",
            ),
            ("train/logp_rejected", "of a rejected answer", "pairs; kto: bad answers", "nats", "falls"),
            ("train/nll_chosen", "minus log-prob of a token of a chosen answer", "pairs", "nats", "steady, or falls"),
            (
                "train/log_odds_ratio",
                "orpo: log odds of the chosen answer less those of the rejected one",
                "pairs",
                "nats",
                "rises above 0",
            ),
            (
                "train/kto_baseline",
                "kto: estimate of KL(policy, reference), from prompts with the answers of other prompts",
                "answers of the step",
                "nats",
                "0 to a few nats; growing without end means drift: raise --beta",
            ),
            (
                "rollout/pairs",
                "pairs that are trained on",
                "the rollout",
                "count",
                "groups of a rollout, or a few less",
            ),
            (
                "rollout/desirable_ratio",
                "kto: share of good answers",
                "answers that are trained on",
                "share",
                "far from 0.5: weigh with --desirable-weight and --undesirable-weight",
            ),
        ),
    ),
    Group(
        "Evaluation",
        "Held-out prompts by one weight version; over samples that did not fail.",
        _rows(
            (
                "eval/<dataset>",
                "mean over prompts of the prompt's mean score",
                "prompts with a scored sample",
                "score",
                "rises; the number to judge a run by",
            ),
            (
                "eval/<dataset>/ci_low",
                "lower end of its 95 % interval",
                "prompts as clusters, normal; from 2 prompts on",
                "score",
                "two evaluations differ when their intervals do not overlap",
            ),
            ("eval/<dataset>/ci_high", "upper end", "as above", "score", "as above"),
            (
                "eval/<dataset>/pass@<k>",
                "chance that one of k samples passes (score of at least 1), unbiased",
                "prompts with k scored samples",
                "share",
                "pass@1 rises; where large k falls, diversity is lost",
            ),
            (
                "eval/<dataset>/response_len/mean",
                "mean response length",
                "samples that did not fail",
                "tokens",
                "steady",
            ),
            (
                "eval/<dataset>/truncated_ratio",
                "share that reached the length limit",
                "samples that did not fail",
                "share",
                "below 0.1",
            ),
            ("eval/<dataset>/failed_ratio", "share of samples that failed", "all samples", "share", "0"),
            (
                "eval/<dataset>/weight_version",
                "the weights that made all of it: rollouts trained",
                "-",
                "version",
                "equals step",
            ),
            (
                "eval/<dataset>/<metric>",
                "of an evaluation by the trainers, without engines: `loss` and what goes with it, named as in training; "
                "`token_accuracy`, the share of trained tokens that are the model's first choice",
                "all rows of the data set, weighted as one optimizer step",
                "as in training",
                "loss falls, accuracies rise; where the loss rises while training goes on, the rows are learned by heart",
            ),
        ),
    ),
    Group(
        "Time and throughput",
        "Seconds of wall clock. Phases of the driver (`rollout`, `train`, `update_weights`, `evaluate`) add up to `perf/step_time`, but for what "
        "the driver does between them; the others are parts of phases. A save is of the step whose weights it holds, and not part of its "
        "`step_time`.",
        _rows(
            (
                "perf/step_time",
                "one step, from fetching prompts to its line of metrics; of step 0: first publication and evaluation",
                "-",
                "s",
                "steady",
            ),
            (
                "perf/start_time",
                "from the command's start of Ray to the first publication; in a process's first line",
                "-",
                "s",
                "10 to 30",
            ),
            (
                "perf/rollout_time",
                "phase: the driver waits for a training rollout",
                "-",
                "s",
                "most of a step with long responses",
            ),
            ("perf/generate_time", "part of it: generation, rewards and filter", "-", "s", "near rollout_time"),
            (
                "perf/batch_time",
                "part of it: samples into a batch, the plan, the samples file",
                "-",
                "s",
                "below 5 % of step_time",
            ),
            (
                "perf/reward_latency",
                "mean time from a group's last token to its rewards, waiting for a worker included",
                "groups kept",
                "s",
                "far below generate_time; else raise --rm-num-workers",
            ),
            (
                "perf/teacher_latency",
                "mean time that a group waits for the teacher's log-probs (--teacher-urls)",
                "groups kept",
                "s",
                "below generate_time; else give the teacher more engines",
            ),
            (
                "perf/rollout_tokens_per_s",
                "response tokens of the batch per second of generate_time",
                "all engines together",
                "tokens/s",
                "steady; falls with response length",
            ),
            (
                "perf/rollout_ahead_time",
                "phase: the driver waits, after training, for the rollout that was made meanwhile (train_async.py)",
                "-",
                "s",
                "0 where training is the longer one",
            ),
            ("perf/train_time", "phase: the driver waits for the trainers", "-", "s", "-"),
            ("perf/actor_train_time", "part of it: forward, backward, optimizer", "main rank", "s", "near train_time"),
            (
                "perf/ref_log_probs_time",
                "part of it: log-probs of the reference",
                "main rank",
                "s",
                "about a third of actor_train_time",
            ),
            (
                "perf/old_log_probs_time",
                "part of it: log-probs of the policy before several optimizer steps",
                "main rank",
                "s",
                "about a third of actor_train_time",
            ),
            (
                "perf/teacher_log_probs_time",
                "part of it: the teacher's log-probs (--use-opd)",
                "main rank",
                "s",
                "as ref_log_probs_time, times the teacher's size",
            ),
            ("perf/values_time", "part of it: the critic's values", "main rank", "s", "as ref_log_probs_time"),
            (
                "perf/critic_train_time",
                "part of it: the critic's forward, backward, optimizer",
                "main rank",
                "s",
                "near actor_train_time",
            ),
            (
                "perf/train_tokens",
                "prompt and response tokens through the model",
                "all ranks, without skipped rows",
                "tokens",
                "-",
            ),
            (
                "perf/update_weights_time",
                "phase: publication of the weights to all engines",
                "-",
                "s",
                "below 10 % of step_time",
            ),
            (
                "perf/update_weights_pause_time",
                "part of it: until every engine stood still",
                "slowest engine",
                "s",
                "below 1",
            ),
            (
                "perf/update_weights_gather_time",
                "part of it: collectives and conversion to HF names",
                "overlaps with wire and load",
                "s",
                "-",
            ),
            (
                "perf/update_weights_wire_time",
                "part of it: bytes to where engines read them",
                "sum over buckets",
                "s",
                "bytes at memcpy speed",
            ),
            (
                "perf/update_weights_load_time",
                "part of it: until the slowest engine had loaded",
                "sum over buckets",
                "s",
                "as wire",
            ),
            (
                "perf/update_weights_check_time",
                "part of it: comparison of all tensors (--check-weight-update-equal)",
                "-",
                "s",
                "0 without the flag",
            ),
            ("perf/update_weights_bytes", "size of what was published", "HF tensors", "bytes", "constant"),
            (
                "perf/update_weights_buckets",
                "buckets that carried it",
                "-",
                "count",
                "bytes / --update-weight-buffer-size",
            ),
            ("perf/evaluate_time", "phase: the driver waits for an evaluation", "-", "s", "-"),
            ("perf/eval_time", "part of it: generation and scores", "-", "s", "near evaluate_time"),
            ("perf/save_time", "the checkpoint of this step, until it is the current one", "-", "s", "-"),
            ("perf/save_hf_time", "the HF export of this step", "-", "s", "-"),
            (
                "perf/engine_restarts",
                "engines that died or stood still and were replaced",
                "since the last line",
                "count",
                "0",
            ),
            ("perf/engine_down_time", "time from such an end to the engine's return", "sum over engines", "s", "0"),
            (
                "perf/bubble_fraction",
                "idle share of all devices; shared ones are idle when neither side works",
                "devices, weighted by number",
                "share",
                "low; 0.5 is usual where engines and trainers take turns on devices of their own",
            ),
            (
                "perf/<side>_idle_fraction",
                "1 - working seconds / step_time, of `engine` (generate, eval) or `trainer` (passes of the model)",
                "one side's devices",
                "share",
                "low",
            ),
        ),
    ),
    Group(
        "Memory",
        "As of a process's last sign of life; the largest process of its kind.",
        _rows(
            (
                "memory/<process>_rss_bytes",
                "resident memory, shared pages included: `driver`, `trainer`, `rollout_manager`, `engine`",
                "largest of its kind",
                "bytes",
                "flat over the run; steady growth is a leak",
            ),
            (
                "memory/trainer_cuda_peak_bytes",
                "largest GPU memory that tensors held so far",
                "main rank",
                "bytes",
                "below the device's memory by 10 %",
            ),
        ),
    ),
)

METRICS: tuple[Metric, ...] = tuple(metric for group in GROUPS for metric in group.metrics)


def describe(key: str) -> Metric | None:
    """The metric that `key` is; None for one that nobody documented."""
    return next((metric for metric in METRICS if metric.matches(key)), None)


HEADER = """\
# Metrics

Written by `python -m miles.observe.catalogue` from `miles/observe/catalogue.py`; do not edit. A key that a run logs and this page lacks
fails the tests.

`metrics.jsonl` in the run directory has a line per step, with these keys; W&B, TensorBoard and MLflow get the same
([which flags](flags.md)). `step` counts rollouts trained: step 0 is what the run started from, step i + 1 is after training rollout i, with
the metrics of rollout i. What did not happen in a step (an evaluation, a save) has no key there; null is a value that was no number. A step
may have a second line with the seconds of its save. A log hook may add keys of its own.
"""


def markdown() -> str:
    """The whole page: one table per group."""
    parts = [HEADER]
    for group in GROUPS:
        rows = [f"| `{m.key}` | {m.meaning} | {m.over} | {m.unit} | {m.healthy} |" for m in group.metrics]
        head = ["| key | what | over | unit | healthy |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {group.title}", "", group.text, "", *head, *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    Path(*sys.argv[1:] or ["docs/metrics.md"]).write_text(markdown(), encoding="utf-8")
