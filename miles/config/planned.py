"""Flags that users of Miles, slime and Megatron know and whose part is not built yet: each an error that says so.

A flag is never accepted and ignored. One value of some of them asks for what is so anyway (`--qkv-format thd`,
`--attention-dropout 0`): that value is true and is accepted, so that a launch script still parses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .problem import Problem

LEAVE_OUT = "leave it out"


@dataclass(frozen=True)
class Part:
    """A part of the system to come, with its flags (flag without dashes -> what it would do)."""

    name: str
    flags: Mapping[str, str]
    instead: str = LEAVE_OUT
    """What to do meanwhile, for all its flags that have no entry of their own in `INSTEAD`."""
    prefixes: tuple[str, ...] = field(default=())
    """Every flag that begins so belongs to this part."""


PARTS: tuple[Part, ...] = (
    Part(
        "more losses and corrections",
        {
            "custom-pg-loss-reducer-function-path": "a reduction of the policy loss of one's own",
            "disable-compute-advantages-and-returns": "training without advantages, for supervised losses",
            "skip-actor-forward-only": "leaving out the pass for old log-probs",
            "reset-optimizer-states": "Adam moments set to zero at each rollout",
            "use-rollout-entropy": "entropy from the log-prob pass",
            "observe-training-entropy": "logging of entropy without a bonus",
            "get-mismatch-metrics": "logging of the gap between trainer and engine",
        },
    ),
    Part(
        "on-policy distillation",
        {
            "opd-log-prob-top-k": "teacher log-probs of the top k tokens",
            "opd-top-k-strategy": "whose top k tokens count",
            "opd-reward-weight-mode": "weights of those tokens",
            "opd-topk-per-position": "token ids per position in the teacher's request",
            "opd-teacher-urls": "several teachers by name",
            "opd-teacher-key": "metadata key that names a row's teacher",
            "opd-teacher-load": "the teacher's checkpoint",
            "opd-teacher-ckpt-step": "iteration of that checkpoint",
        },
        "score with --rm-type or --custom-rm-path",
    ),
    Part(
        "more parallelism",
        {
            "allgather-cp": "contiguous context parallelism by all-gather",
            "qkv-format": "padded (bshd) attention layout",
            "indep-dp": "data-parallel replicas as independent Megatron worlds",
            "delay-split-train-data-by-dp": "the trainers splitting a whole batch",
        },
        "use --tensor-model-parallel-size, --pipeline-model-parallel-size, --context-parallel-size and more ranks",
    ),
    Part(
        "training memory and speed",
        {
            "recompute-loss-function": "recomputation of the loss",
            "optimizer-cpu-offload": "optimizer state in host memory",
            "overlap-cpu-optimizer-d2h-h2d": "overlapped copies of that state",
            "use-precision-aware-optimizer": "optimizer state in lower precision",
            "no-gradient-accumulation-fusion": "gradient accumulation outside the weight-gradient kernel",
            "no-check-for-nan-in-loss-and-grad": "training on after a NaN",
            "bf16": "bf16 compute chosen by hand",
            "fp16": "fp16 compute",
            "attention-dropout": "dropout of attention weights",
            "hidden-dropout": "dropout of activations",
            "attention-softmax-in-fp32": "softmax precision chosen by hand",
            "log-probs-max-tokens-per-gpu": "a token budget of its own for passes without gradient",
            "data-pad-size-multiplier": "padding of packed batches to a multiple",
            "stream-optimizer-state-to-disk": "optimizer state in files through the step",
            "stream-optimizer-state-moment-dtype": "dtype of the Adam moments in those files",
            "rematerialize-param-from-master-weight": "parameters rebuilt from their fp32 masters",
            "check-rematerialize-param-from-master-weight": "a check of those rebuilds",
            "low-memory-resume": "optimizer state made in host memory while loading",
            "train-memory-margin-bytes": "head room of the memory saver",
            "mfu-peak-tflops": "peak TFLOPs of the utilisation figure",
        },
        "lower --max-tokens-per-gpu or --micro-batch-size where memory is short",
    ),
    Part(
        "off-loading in colocation",
        {
            "offload": "trainer and engines both off the GPU while the other works",
            "offload-train": "the trainer off the GPU during generation",
            "offload-rollout": "the engines' memory released during training",
            "offload-rollout-level": "which engine memory is released",
            "offload-train-target": "where the sleeping trainer is kept",
            "offload-train-disk-dir": "directory of off-loaded state",
            "offload-train-disk-chunk-mb": "staging buffer of off-loading to disk",
        },
        "give engines and trainer GPUs of their own: leave --colocate out",
    ),
    Part(
        "more model families",
        {
            "use-rope-scaling": "Llama 3's scaling of RoPE by Megatron's name",
            "rope-scaling-factor": "its factor by Megatron's name",
            "rope-type": "the kind of RoPE of latent attention",
            "rotary-scaling-factor": "factor of YaRN by Megatron's name",
            "original-max-position-embeddings": "the first training's context by Megatron's name",
            "beta-fast": "a bound of YaRN by Megatron's name",
            "beta-slow": "a bound of YaRN by Megatron's name",
            "mscale": "sharpness of YaRN by Megatron's name",
            "mscale-all-dim": "sharpness of YaRN by Megatron's name",
            "moe-z-loss-coeff": "weight of a loss that keeps the router's logits small",
            "moe-shared-expert-overlap": "the shared expert computed while tokens are on their way",
            "moe-enable-deepep": "DeepEP dispatch",
            "moe-token-drop-policy": "which tokens are dropped at capacity",
            "use-routing-replay": "expert routing of the log-prob pass replayed in training",
            "use-rollout-routing-replay": "the engine's expert routing replayed in training",
            "use-indexer-replay": "sparse-attention choices replayed in training",
            "use-rollout-indexer-replay": "the engine's sparse-attention choices replayed in training",
            "position-embedding-type": "position encodings other than RoPE",
            "use-gated-attention": "gated attention output",
            "linear-attention-backend": "kernels of gated-delta-net layers",
            "miles-dsa-topk-backend": "top-k kernel of sparse attention",
            "dsa-attention-backend": "kernels of sparse attention",
            "freeze-indexer": "an untrained sparse-attention indexer",
            "mtp-num-layers": "multi-token-prediction layers",
            "mtp-loss-scaling-factor": "weight of their loss",
            "enable-mtp-training": "training of those layers",
            "megatron-to-hf-mode": "weight conversion by Megatron-Bridge",
            "extra-high-precision-layers-hf": "layers that are never quantised, by HF name",
            "extra-high-precision-layers-megatron": "layers that are never quantised, by Megatron name",
            "custom-model-provider-path": "a model factory of one's own",
            "padded-vocab-size": "the padded vocabulary chosen by hand",
            "multimodal-keys": "image, video and audio columns",
        },
        "train a family of docs/models.md; its shape is read from config.json",
    ),
    Part(
        "LoRA",
        {
            "target-modules": "which modules get an adapter",
            "exclude-modules": "which modules get none",
            "experts-shared-outer-loras": "an adapter factor shared over experts",
            "no-sglang-lora-use-virtual-experts": "another way to serve adapters of experts",
            "check-lora-weight-equal": "a hash check of adapters",
        },
        "train all weights",
        prefixes=("lora-", "multi-lora-"),
    ),
    Part(
        "asynchronous training",
        {
            "fully-async": "generation that never waits for training",
            "partial-rollout": "unfinished samples continued in the next rollout",
            "mask-offpolicy-in-partial-rollout": "training only on tokens of the newest weights",
            "max-weight-staleness": "the oldest weights whose samples are trained on",
            "async-max-concurrent-samples": "samples in flight",
            "async-data-buffer-capacity-factor": "size of the buffer of finished groups",
            "async-unused-samples-handler": "what becomes of stale groups",
            "custom-async-data-buffer-path": "a buffer of one's own",
            "rollout-submission-granularity": "slots freed per group or per sample",
            "update-weights-interval": "several rollouts per weight update",
            "pause-generation-mode": "requests that live through a weight update",
            "buffer-filter-path": "a choice among buffered groups",
        },
        "each rollout is generated by the newest weights, and requests in flight at an update are aborted",
    ),
    Part(
        "hooks of rollout and training",
        {
            "rollout-function-path": "a rollout implementation of one's own",
            "eval-function-path": "an evaluation of one's own",
            "data-source-path": "a data source of one's own",
            "custom-reward-post-process-path": "a normalisation of rewards",
            "custom-convert-samples-to-train-data-path": "a conversion of samples to batches",
            "rollout-data-postprocess-path": "a step between rollout and training",
            "rollout-sample-filter-path": "a filter that removes samples from the loss",
            "rollout-all-samples-process-path": "a look at all samples, filtered ones too",
            "custom-megatron-post-save-hook-path": "a hook after each checkpoint",
            "custom-megatron-init-path": "a hook at the trainers' start",
            "custom-megatron-before-log-prob-hook-path": "a hook before each log-prob pass",
            "custom-megatron-before-train-step-hook-path": "a hook before each train step",
            "session-sample-picker-path": "a choice among a session's leaves",
            "session-sample-postprocessor-path": "the last step of a session's samples",
        },
        "see whether --custom-rm-path, --custom-generate-function-path, --dynamic-sampling-filter-path or --plugin serves",
    ),
    Part(
        "data and schedule",
        {
            "disable-rollout-global-dataset": "runs without prompt data",
            "chat-template-path": "a chat template in a file",
            "start-rollout-id": "the first rollout chosen by hand",
            "allow-partial-train-step": "a smaller last optimizer step",
            "use-dynamic-global-batch-size": "a batch size that follows the sample count",
            "disable-rollout-trim-samples": "training on the remainder of a batch",
            "loss-mask-type": "loss masks of supervised chat data",
            "rollout-buffer-url": "an external rollout buffer",
            "fetch-trajectory-retry-times": "retries of that buffer",
            "min-batch-collection-ratio": "share of a batch to wait for",
            "rollout-task-type": "task name sent to that buffer",
            "custom-config-path": "a YAML file over the flags",
            "true-on-policy-mode": "trainer and engine log-probs bitwise equal",
            "recompute-logprobs-via-prefill": "rollout log-probs scored again by the engine",
            "train-env-vars": "environment variables of the trainers",
        },
    ),
    Part(
        "evaluation on engines of its own",
        {
            "eval-input-key": "the prompt column of evaluation data",
            "eval-label-key": "the answer column of evaluation data",
            "eval-tool-key": "the tools column of evaluation data",
            "eval-reward-key": "the reward entry of evaluation",
            "eval-max-prompt-len": "a prompt limit of evaluation",
            "eval-max-context-len": "a context limit of evaluation",
            "eval-min-new-tokens": "the least new tokens of evaluation",
            "eval-num-gpus": "GPUs for evaluation alone",
            "eval-num-gpus-per-engine": "GPUs of one such engine",
            "eval-hf-dir": "directory of the weights to evaluate",
            "eval-max-in-flight": "evaluations that run at a time",
            "eval-overflow-policy": "what happens when there are too many",
            "eval-keep-snapshots": "snapshots that are kept",
        },
        "evaluation runs on the rollout engines, between rollouts",
    ),
    Part(
        "checkpoint extras",
        {
            "ref-ckpt-step": "the reference checkpoint's iteration",
            "async-save": "checkpoints written while training goes on",
            "save-trigger-sentinel": "a file whose presence forces a save",
        },
    ),
    Part(
        "weight transports",
        {
            "update-weight-transfer-mode": "the transport to engines on other hosts",
            "update-weight-disk-dir": "directory of published weights",
            "update-weight-local-checkpoint-dir": "checkpoint patched on the engine's host",
            "update-weight-delta-encoding": "encoding of weight differences",
            "update-weight-delta-checksum": "digest of weight differences",
            "custom-update-weight-post-write-path": "a hook after weights are written",
            "p2p-transfer-num-workers": "RDMA threads",
            "p2p-transfer-timeout": "limit of an RDMA transfer",
            "debug-skip-weight-update": "training without weight updates",
            "object-store-backend": "transport of rollout data other than Ray's",
            "mooncake-store-init-kwargs": "settings of Mooncake",
            "mooncake-replica-num": "replicas in Mooncake",
        },
        "weights go through shared memory in buckets of --update-weight-buffer-size",
    ),
    Part(
        "external engines, routers and sessions",
        {
            "rollout-external": "engines that were started elsewhere",
            "rollout-external-engine-addrs": "their addresses",
            "prefill-num-servers": "engines for prefill alone",
            "pin-rollout-manager-to-head": "the rollout manager on Ray's head node",
            "http-proxy": "a proxy for engine traffic",
            "use-distributed-post": "HTTP clients spread over actors",
            "use-miles-router": "a router of our own",
            "use-session-server": "a server that keeps conversations token by token",
            "session-server-ip": "its address",
            "session-server-port": "its port",
            "session-message-matcher": "how histories are compared",
            "tito-model": "tokenizer family of sessions",
        },
        "the run starts its own engines and balances between them; see --rollout-num-gpus",
        prefixes=("router-", "miles-router-"),
    ),
    Part(
        "fault tolerance",
        {
            "use-fault-tolerance": "restart of what died",
            "ft-components": "which sides are restarted",
            "rollout-health-check-interval": "seconds between engine probes",
            "rollout-health-check-timeout": "limit of a probe",
            "rollout-health-check-first-wait": "wait before the first probe",
            "control-server-port": "a control server",
        },
        "an engine that dies is replaced (--max-engine-restarts, --heartbeat-timeout); another part that dies ends the run with "
        "its name, and the same command continues",
        prefixes=("mini-ft-controller-",),
    ),
    Part(
        "more metrics and exporters",
        {
            "use-prometheus": "an exporter for Prometheus",
            "log-multi-turn": "multi-turn statistics",
            "log-passrate": "pass@k of training rollouts",
            "log-reward-category": "a histogram of a reward entry",
            "log-correct-samples": "metrics of correct samples alone",
        },
        "read metrics.jsonl in the run directory",
        prefixes=("prometheus-",),
    ),
    Part(
        "debug and CI tools",
        {
            "save-debug-trajectory-data": "trajectories as text",
            "load-debug-rollout-data-subsample": "a share of replayed data",
            "save-debug-train-data": "each rank's train data",
            "save-debug-event-data": "an event log",
            "dump-details": "all dumps below one directory",
            "debug-disable-optimizer": "training without an optimizer",
            "debug-deterministic-collective": "reductions in a fixed order",
            "memory-snapshot-dir": "directory of memory snapshots",
            "memory-snapshot-num-steps": "when memory snapshots are written",
            "memory-recorder": "kind of memory recorder",
            "profile-target": "which phase is profiled",
            "check-weight-update-selector": "which models the equality check covers",
            "check-weight-update-skip-list": "tensors that the equality check skips",
            "check-weight-update-allow-quant-error": "tolerance of the equality check",
            "save-local-weight-checksum": "checksums of each rank's weights",
            "enable-event-analyzer": "sanity rules before each step",
            "enable-witness": "tracking of which samples reached gradients",
            "witness-buffer-size": "size of that tracking",
            "env-report": "report of the launcher's environment",
        },
        "see --save-debug-rollout-data and --check-weight-update-equal",
        prefixes=("dumper-", "ci-"),
    ),
)

#: Flag -> what to do meanwhile, where that is not its part's advice.
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *(
                "use-rope-scaling",
                "rope-scaling-factor",
                "rope-type",
                "rotary-scaling-factor",
                "mscale",
                "mscale-all-dim",
            ),
            *("original-max-position-embeddings", "beta-fast", "beta-slow"),
        ),
        "leave it out: RoPE's scaling is read from config.json, and --rope-scaling is the whole of it",
    ),
    "bf16": "the device decides: bf16 on GPU, fp32 on CPU",
    "fp16": "the device decides: bf16 on GPU, fp32 on CPU",
    "attention-dropout": "dropout is 0",
    "hidden-dropout": "dropout is 0",
    "chat-template-path": "put the template into the tokenizer of --hf-checkpoint",
    "custom-config-path": "use --config FILE.yaml, with the groups as sections",
    "get-mismatch-metrics": "leave it out: that gap is always logged",
    "observe-training-entropy": "leave it out: entropy is always logged",
    "skip-actor-forward-only": "leave it out: with one optimizer step per rollout there is no such pass",
    "no-check-for-nan-in-loss-and-grad": "leave it out: a NaN always stops the run before weights are touched",
    "opd-teacher-load": "name the teacher in --teacher-load",
    "eval-input-key": "set input_key of a dataset in --eval-config",
    "eval-label-key": "set label_key of a dataset in --eval-config",
    "eval-tool-key": "set tool_key of a dataset in --eval-config",
    "eval-reward-key": "set reward_key of a dataset in --eval-config",
    "eval-max-prompt-len": "set max_prompt_len of a dataset in --eval-config",
    "eval-max-context-len": "set max_context_len of a dataset in --eval-config",
    "use-gated-attention": "use --attention-output-gate",
    "padded-vocab-size": "use --make-vocab-size-divisible-by",
    "log-passrate": "evaluation reports pass@k",
    "start-rollout-id": "leave it out: --load continues where the checkpoint stopped",
    "ref-ckpt-step": "name the iteration's directory in --ref-load",
    "rollout-sample-filter-path": "set sample.remove_sample in --custom-rm-path",
    "debug-disable-optimizer": "use --lr 0",
}

#: Flag -> the words that ask for what is so anyway; () is the bare switch. Numbers compare as numbers.
ALREADY_SO: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "qkv-format": (("thd",),),
    "attention-dropout": (("0",),),
    "hidden-dropout": (("0",),),
    "attention-softmax-in-fp32": ((),),
    "no-gradient-accumulation-fusion": ((),),
    "position-embedding-type": (("rope",),),
    "megatron-to-hf-mode": (("raw",),),
    "update-weights-interval": (("1",),),
    "pause-generation-mode": (("abort",),),
    "object-store-backend": (("ray",),),
    "lora-rank": (("0",),),
    "eval-num-gpus": (("0",),),
    "control-server-port": (("0",),),
    "observe-training-entropy": ((),),
    "get-mismatch-metrics": ((),),
}

#: Field -> choices that its flag will have -> what they would do.
PLANNED_CHOICES: Mapping[str, Mapping[str, str]] = {
    "train_backend": {"fsdp": "the FSDP trainer"},
    "recompute_granularity": {"selective": "attention alone computed again"},
    "optimizer": {"muon": "the Muon optimizer"},
    "moe_token_dispatcher_type": {"flex": "DeepEP dispatch"},
    "moe_router_load_balancing_type": {"global_aux_loss": "balance over several steps", "sinkhorn": "another balance"},
}


def is_so_anyway(typed: str, words: Sequence[str]) -> bool:
    """Whether the flag asks for nothing but what is the case without it."""
    return any(_same(words, so) for so in ALREADY_SO.get(typed.replace("_", "-"), ()))


def planned_flag(typed: str) -> Problem | None:
    """The error for a flag whose part is not built; None when nobody knows the flag."""
    flag = typed.replace("_", "-")
    for part in PARTS:
        meaning = part.flags.get(flag)
        if meaning is not None or flag.startswith(part.prefixes):
            why = f"{meaning} ({part.name})" if meaning else part.name
            return Problem(f"--{flag} is not built yet", None, why, INSTEAD.get(flag, part.instead))
    return None


def planned_choice(field_name: str, flag: str, choice: str, choices: Sequence[str]) -> Problem | None:
    """The error for a choice that a flag does not have yet; None when nobody knows it."""
    meaning = PLANNED_CHOICES.get(field_name, {}).get(choice)
    if meaning is None:
        return None
    return Problem(f"{flag} {choice} is not built yet", None, meaning, f"use {flag} {' or '.join(choices)}")


def _same(words: Sequence[str], so: Sequence[str]) -> bool:
    return len(words) == len(so) and all(map(_equal, words, so))


def _equal(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b
