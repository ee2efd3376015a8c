"""The flags, one frozen dataclass per argument group of a launch script. The fields are the single source: the command
line, the sections of `--config FILE.yaml`, `--print-config`, docs/flags.md and the hooks' flat `args` come from them.

A field's name is its flag (`--hidden-size` is `hidden_size`); the string below it is its help. `None` means "derive it":
from the checkpoint's config.json, from another flag, or from the machine. `bool | None` is a switch whose absence means
something of its own; `--x / --no-x` set it. Nothing here imports torch: `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelArgs:
    """MODEL: The transformer's shape. All of it is derived from config.json; a flag that contradicts the checkpoint is an error."""

    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    group_query_attention: bool | None = None
    """Fewer K/V heads than query heads."""
    num_query_groups: int | None = None
    """K/V heads."""
    kv_channels: int | None = None
    """Dimension of one head."""
    qk_layernorm: bool | None = None
    """Normalise queries and keys."""
    swiglu: bool | None = None
    """Gated SiLU MLP."""
    quick_geglu: bool | None = None
    """Gated MLP with x * sigmoid(1.702 x) in the place of SiLU."""
    activation_func_clamp_value: float | None = None
    """Bound of what enters a gated MLP's activation, and of the other factor in both directions."""
    glu_linear_offset: float | None = None
    """Added to that other factor."""
    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """Kind of norm."""
    apply_layernorm_1p: bool | None = None
    """Weights of norms stored minus one."""
    norm_epsilon: float | None = None
    """Epsilon of the norms."""
    post_self_attn_layernorm: bool | None = None
    """A norm also after attention, before its output is added."""
    post_mlp_layernorm: bool | None = None
    """A norm also after the MLP."""
    use_rotary_position_embeddings: bool | None = None
    """RoPE."""
    rotary_base: int | None = None
    """RoPE theta."""
    rotary_percent: float | None = None
    """Share of the head dimension that rotates."""
    rotary_interleaved: bool | None = None
    """Neighbouring dimensions rotate together, instead of those of the two halves."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of RoPE for longer contexts (JSON), by its names in config.json: rope_type llama3, yarn or linear, factor and so on."""
    window_size: tuple[int, ...] | None = None
    """Sliding-window attention: tokens before a token that it sees, and after it (0)."""
    window_attn_skip_freq: str | None = None
    """Which layers have the window: all but every N-th, or a list such as [1]*2+[0]*1. Unset: all."""
    disable_bias_linear: bool | None = None
    """No bias in linear layers."""
    add_qkv_bias: bool | None = None
    """Bias in the Q/K/V projection only."""
    untie_embeddings_and_output_weights: bool | None = None
    """Separate output weights."""
    vocab_size: int | None = None
    """Vocabulary before padding."""
    make_vocab_size_divisible_by: int | None = None
    """Pads the vocabulary to a multiple of this times TP; 128 on GPU, 1 on CPU."""
    seq_length: int | None = None
    """Longest training sequence in tokens; an error where --rollout-max-context-len allows longer ones. What becomes of longer rows of a data set says --overlong-rows."""
    max_position_embeddings: int | None = None
    """Longest position the model knows."""
    softmax_type: Literal["vanilla", "learnable"] | None = None
    """Softmax of attention: learnable adds a trained logit without a value to each head (a sink)."""
    attention_output_gate: bool | None = None
    """A gate, computed like the query, of what each head of attention gives."""
    linear_attention_freq: str | None = None
    """Which layers have linear attention: all but every N-th, or a list such as [1]*3+[0]*1. Needs a --spec that builds them."""
    linear_conv_kernel_dim: int | None = None
    """Tokens that their convolution sees."""
    linear_key_head_dim: int | None = None
    """Dimension of their query and key heads."""
    linear_value_head_dim: int | None = None
    """Dimension of their value heads."""
    linear_num_key_heads: int | None = None
    """Query heads, and key heads."""
    linear_num_value_heads: int | None = None
    """Value heads."""
    multi_latent_attention: bool | None = None
    """Keys and values from one narrow vector (MLA)."""
    q_lora_rank: int | None = None
    """Width of the queries' narrow vector, of MLA; unset, they have none."""
    kv_lora_rank: int | None = None
    """Width of the keys' and values' narrow vector, of MLA."""
    qk_head_dim: int | None = None
    """Dimension of a head's query and key that does not rotate, of MLA."""
    qk_pos_emb_head_dim: int | None = None
    """Dimension that rotates, of MLA."""
    v_head_dim: int | None = None
    """Dimension of a head's value, of MLA."""
    num_experts: int | None = None
    """Experts of a mixture-of-experts layer."""
    moe_layer_freq: str | None = None
    """Which layers have experts: every N-th from the first, or a list such as [0]*3+[1]*58."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert."""
    moe_router_topk: int | None = None
    """Experts of each token."""
    moe_router_score_function: Literal["softmax", "sigmoid"] | None = None
    """What turns the router's logits into scores."""
    moe_router_pre_softmax: bool | None = None
    """Scores over all experts before the choice, instead of over the chosen ones."""
    moe_router_num_groups: int | None = None
    """Groups of experts, of which a token goes to --moe-router-group-topk."""
    moe_router_group_topk: int | None = None
    """Groups that a token's experts may be of."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor of the chosen scores."""
    moe_router_enable_expert_bias: bool | None = None
    """A bias of each expert that counts for the choice alone."""
    moe_router_bias_update_rate: float = 0.0
    """How far an optimizer step moves that bias towards balance; 0 leaves it."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router; unset, that of the model."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Balancing of the experts: aux_loss adds --moe-aux-loss-coeff times the load-balancing loss to the loss."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of that loss, which is a mean over all tokens of an optimizer step."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the expert that all tokens go to."""
    moe_shared_expert_gate: bool | None = None
    """A gate of that expert."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach the ranks of their experts."""
    moe_grouped_gemm: bool = False
    """Experts in one kernel, of Transformer Engine."""
    moe_permute_fusion: bool = False
    """Tokens sorted by expert in one kernel, of Transformer Engine."""
    spec: tuple[str, ...] | None = None
    """Layer spec by dotted path: MODULE FUNCTION."""


@dataclass(frozen=True)
class CkptArgs:
    """CKPT: Where weights and state come from and go to."""

    hf_checkpoint: str | None = None
    """HF directory for engines, tokenizer and config."""
    ref_load: str | None = None
    """Reference checkpoint (Megatron or HF directory), also the initial weights when --load has none."""
    ref_update_interval: int | None = None
    """Rollouts after which the actor's weights become the reference, again and again; unset keeps the first reference."""
    load: str | None = None
    """Checkpoint directory to resume from, or one checkpoint; where there never was one, the actor warm-starts from --ref-load, else --hf-checkpoint."""
    save: str | None = None
    """Checkpoint directory."""
    save_interval: int | None = None
    """Rollouts between saves; the last rollout is always saved when --save is given."""
    save_hf: str | None = None
    """Also export HF safetensors at each save; a path template with {rollout_id}."""
    save_retain_interval: int | None = None
    """Keep only every N-th older checkpoint, counted in rollouts; the newest one and the one before it always stay. Unset keeps all."""
    critic_load: str | None = None
    """Weights that the critic starts from: an HF directory, of a language model or with a score.weight, or Miles checkpoints, whose critic is taken where there is one. Defaults to the actor's; a continued run has its critic in --load."""
    critic_save: str | None = None
    """Also export the critic there at each save, as HF safetensors with a head of one score, which --critic-load reads. What resuming needs is in --save."""
    no_save_optim: bool = False
    """Weights-only checkpoints."""
    teacher_load: str | None = None
    """Teacher of --loss-type gkd and --use-opd: an HF directory with the student's vocabulary, of any size. A second model in each trainer."""
    model_name: str | None = None
    """Weight-name mapping to use; defaults to the HF model_type."""


#: Thoughts, then an answer, and nothing else.
DEFAULT_FORMAT = r"<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>(?:(?!</?(?:think|answer)>).)+</answer>"


@dataclass(frozen=True)
class RolloutArgs:
    """ROLLOUT: Prompts, sampling, rewards, batch sizes."""

    prompt_data: str | None = None
    """JSONL or parquet prompts; `path@[a:b]` takes a slice."""
    input_key: str | None = None
    """Prompt column: text, or a list of messages. Defaults to input; in data sets with answers to the first of messages, prompt and input (of preferences: prompt and input) that a row has."""
    label_key: str | None = None
    """Answer column."""
    metadata_key: str = "metadata"
    """Metadata column (a dict per row); used where present."""
    tool_key: str = "tools"
    """Tool-spec column for the chat template; used where present."""
    apply_chat_template: bool = False
    """Render messages to text at load."""
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the chat template (JSON)."""
    rollout_shuffle: bool = False
    """Shuffle prompts each epoch."""
    rollout_seed: int = 42
    """Seed of data order and sampling."""
    num_rollout: int | None = None
    """Training rollouts (outer steps)."""
    num_epoch: int | None = None
    """Passes over the prompts; derives --num-rollout."""
    rollout_batch_size: int | None = None
    """Prompt groups per rollout."""
    n_samples_per_prompt: int | None = None
    """Samples per prompt (group size)."""
    global_batch_size: int | None = None
    """Trajectories per optimizer step."""
    num_steps_per_rollout: int | None = None
    """Optimizer steps per rollout. rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout: give three, the fourth is derived."""
    micro_batch_size: int = 1
    """Rows per micro-batch without --use-dynamic-batch-size."""
    rollout_temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    rollout_top_p: float = 1.0
    """Nucleus threshold."""
    rollout_top_k: int = -1
    """Top-k; -1 is off."""
    rollout_max_prompt_len: int | None = None
    """Drop prompts longer than this many tokens, at load; defaults to what leaves room for one token."""
    rollout_max_response_len: int | None = None
    """Most new tokens per response; defaults to what the context leaves."""
    rollout_max_context_len: int | None = None
    """Most tokens of prompt and response together; defaults to what the model and the engine know."""
    rollout_stop: tuple[str, ...] | None = None
    """Stop strings."""
    rollout_stop_token_ids: tuple[int, ...] | None = None
    """Stop token ids besides EOS."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the returned text."""
    rm_type: str | None = None
    """Built-in reward (docs/rewards.md), or several with commas, weighted by --reward-weights; boxed_ prefix scores the last box; metadata["rm_type"] overrides per row."""
    rm_url: str | None = None
    """Endpoint of remote_rm."""
    rm_model: str | None = None
    """HF sequence-classification directory of reward_model, with one label and the policy's tokenizer; every reward worker loads it once."""
    rm_timeout: float = 30.0
    """Seconds for one reward call; the worker that exceeds it is killed."""
    rm_num_workers: int = 2
    """Reward worker processes."""
    rm_max_retries: int = 2
    """Repetitions of a reward call that raised or timed out, before the sample is FAILED."""
    group_rm: bool = False
    """Score whole groups: the hook gets a list of samples and returns a list."""
    reward_key: str | None = None
    """Entry that trains, when rewards are dicts."""
    reward_weights: dict[str, Any] = field(default_factory=dict)
    """Entries that train, when rewards are dicts, with their weights (JSON): the reward is their weighted sum."""
    format_pattern: str = DEFAULT_FORMAT
    """Regex that the whole response must match for the reward `format`; the dot matches line ends too."""
    cosine_min_len_value_correct: float = 1.0
    """Reward `cosine` of a correct response without length."""
    cosine_max_len_value_correct: float = 0.5
    """Reward `cosine` of a correct response of --cosine-max-len."""
    cosine_min_len_value_wrong: float = -0.5
    """Reward `cosine` of a wrong response without length."""
    cosine_max_len_value_wrong: float = 0.0
    """Reward `cosine` of a wrong response of --cosine-max-len."""
    cosine_max_len: int | None = None
    """Tokens from which on the reward `cosine` is constant; defaults to --rollout-max-response-len."""
    repetition_n_grams: int = 3
    """Words in a row that the reward `repetition` compares."""
    repetition_max_penalty: float = -1.0
    """Reward `repetition` of a response that is nothing but repetition."""
    soft_max_length: int | None = None
    """Tokens at which the reward `soft_overlong` is -1; defaults to --rollout-max-response-len."""
    soft_cache_length: int | None = None
    """Tokens before --soft-max-length over which the reward `soft_overlong` falls from 0 to -1."""
    custom_rm_path: str | None = None
    """Reward hook: `async f(args, sample, **kw) -> float | dict`."""
    custom_generate_function_path: str | None = None
    """Generation hook: `async f(args, sample, sampling_params) -> Sample | list[Sample]`."""
    custom_generate_timeout: float = 1800.0
    """Seconds for one call of the generation hook, all its turns; the sample is FAILED beyond it."""
    rollouts_ahead: int | None = None
    """Rollouts that are generated before the one in training is trained: 0 with train.py, 1 with train_async.py, which set it."""
    over_sampling_batch_size: int | None = None
    """Groups requested at a time; defaults to --rollout-batch-size."""
    dynamic_sampling_filter_path: str | None = None
    """Group filter hook: `f(args, samples, **kw) -> bool | DynamicFilterOutput`."""
    custom_rollout_log_function_path: str | None = None
    """Log hook: `f(rollout_id, args, samples, rollout_extra_metrics, rollout_time) -> bool`; what it puts into rollout_extra_metrics is logged, True leaves our own rollout/* out."""
    custom_eval_rollout_log_function_path: str | None = None
    """Log hook of evaluations: `f(rollout_id, args, data, extra_metrics) -> bool`; True leaves our own eval/* out."""
    custom_log_timeout: float = 60.0
    """Seconds for one call of a log hook; one that takes longer or raises is switched off, with a warning."""
    balance_data: bool = False
    """Equalise tokens across data-parallel ranks."""
    balance_by_flops: bool = False
    """Equalise them by estimated floating-point operations, in which attention over long sequences weighs more."""
    max_failed_sample_fraction: float = 0.2
    """Stop the run when more than this share of a rollout's samples FAILED."""


@dataclass(frozen=True)
class EvalArgs:
    """EVAL: Held-out scores; what is not given is inherited from ROLLOUT."""

    eval_interval: int | None = None
    """Rollouts between evaluations; also before the first and after the last."""
    eval_prompt_data: tuple[str, ...] | None = None
    """NAME PATH pairs."""
    n_samples_per_eval_prompt: int = 1
    """Samples per evaluation prompt."""
    eval_temperature: float | None = None
    """Sampling temperature; 0 is greedy."""
    eval_top_p: float | None = None
    """Nucleus threshold."""
    eval_top_k: int | None = None
    """Top-k."""
    eval_max_response_len: int | None = None
    """Most new tokens."""
    eval_config: str | None = None
    """YAML: a list `datasets` of {name, path, and any of the sampling, length, key and reward overrides}; `defaults` for all of them."""
    skip_eval_before_train: bool = False
    """No evaluation before the first rollout."""


@dataclass(frozen=True)
class PerfArgs:
    """PERF: How the work is cut."""

    use_dynamic_batch_size: bool = False
    """Fill micro-batches up to --max-tokens-per-gpu instead of --micro-batch-size rows."""
    max_tokens_per_gpu: int | None = None
    """Token budget of a micro-batch, for each of the ranks that share its sequences (--context-parallel-size)."""
    log_probs_chunk_size: int = 1024
    """Tokens whose logits are live at once in log-prob computation; -1 takes all at once."""
    attention_backend: Literal["auto", "local", "flash", "fused", "unfused"] = "auto"
    """Attention kernels of the trainer; auto takes torch SDPA on CPU, flash-attn varlen or TE on GPU."""
    tensor_model_parallel_size: int = 1
    """Trainer ranks that share each layer."""
    sequence_parallel: bool = False
    """Those ranks also share the activations between layers, each a piece of the sequence."""
    pipeline_model_parallel_size: int = 1
    """Trainer ranks that share the layers, one stage each."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved schedule: layers of one piece of the model, of which each pipeline rank has several."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """The same as a number of pieces."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline rank; the others share the rest evenly."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline rank."""
    context_parallel_size: int = 1
    """Trainer ranks that share each sequence; --max-tokens-per-gpu is then that of each."""
    expert_model_parallel_size: int = 1
    """Trainer ranks that share the experts of each layer; taken from those that hold the same layer."""
    expert_tensor_parallel_size: int = 1
    """Trainer ranks that share each expert."""
    recompute_granularity: Literal["full"] | None = None
    """Activations of whole layers are not kept but computed again in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """uniform: all layers, kept at every --recompute-num-layers; block: the first so many of each pipeline stage. Default: uniform."""
    recompute_num_layers: int | None = None
    """See --recompute-method; defaults to 1."""
    use_distributed_optimizer: bool = False
    """Optimizer state shared by the data-parallel ranks, a part each."""
    overlap_grad_reduce: bool = False
    """Gradients are reduced over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """With --use-distributed-optimizer: updated weights are gathered while the next forward pass goes on."""


@dataclass(frozen=True)
class GrpoArgs:
    """GRPO: Advantages, losses and corrections."""

    loss_type: Literal["policy_loss", "sft_loss", "gkd", "custom_loss", "dpo", "kto", "orpo", "simpo", "cpo", "rm"] = (
        "policy_loss"
    )
    """What is trained: policy_loss (answers of the engines, by their rewards), sft_loss (conversations of --prompt-data, as they are), gkd (the same rows by a teacher's distributions), custom_loss (as policy_loss, by a function of one's own), dpo, orpo, simpo, cpo (pairs of answers), kto (answers judged good or bad)."""
    custom_loss_function_path: str | None = None
    """Loss hook of --loss-type custom_loss: `f(args, tokens) -> (token_losses, metrics)`, a loss for each token; see docs/algorithms.md."""
    use_opd: bool = False
    """On-policy distillation: advantages lose --opd-kl-coef times log(policy / teacher) at every token."""
    opd_type: Literal["megatron", "sglang"] | None = None
    """Where its teacher runs: megatron, in the trainers (--teacher-load), or sglang, on engines (--teacher-urls). Defaults to the one that is given."""
    opd_kl_coef: float = 1.0
    """Weight of that term."""
    advantage_estimator: str = "grpo"
    """Advantage estimator: grpo, gspo (with --policy-loss gspo), rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, ppo (GAE with a critic), gdpo, maxrl, remax, opo, pass_at_k, or one that a --plugin registers; see docs/algorithms.md."""
    policy_loss: str | None = None
    """Policy loss: ppo_clip, dual_clip, two_sided, gspo, cispo, sapo, dppo, or one that a --plugin registers; defaults to ppo_clip."""
    use_kl_loss: bool = False
    """Add KL(policy, reference) to the loss; with coefficient 0 the reference is still loaded and KL is logged."""
    kl_loss_coef: float = 0.0
    """Weight of that term."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """KL estimator, of the loss and of --kl-coef."""
    use_unbiased_kl: bool = False
    """Weight that term by the ratio of new to old policy, since the old one sampled the tokens."""
    kl_coef: float = 0.0
    """KL penalty inside the reward: each token's return loses this much of the KL to the reference from there on."""
    gamma: float = 1.0
    """Discount of the return, for each trained token; ppo, and reinforce_plus_plus alone and with a baseline."""
    lambd: float = 1.0
    """Lambda of GAE, of --advantage-estimator ppo: 1 trusts returns alone, less the critic more."""
    value_clip: float = 0.2
    """How far a token's value may move in one rollout before its loss stops pulling it further."""
    num_critic_only_steps: int = 0
    """Rollouts, from the first of the run, that train the critic alone."""
    normalize_advantages: bool | None = None
    """Whiten advantages over the trained tokens of the rollout, all ranks together; defaults to on for ppo and reinforce_plus_plus."""
    pass_at_k: int | None = None
    """Answers that may be tried, of --advantage-estimator pass_at_k."""
    eps_clip: float = 0.2
    """Lower clip width of the ratio."""
    eps_clip_high: float | None = None
    """Upper clip width; defaults to --eps-clip."""
    eps_clip_c: float | None = None
    """Dual clip: largest ratio of a negative advantage, above 1; defaults to 3 with --policy-loss dual_clip, to no bound with ppo_clip."""
    two_sided_delta: float = 4.0
    """Largest ratio of a negative advantage, of --policy-loss two_sided."""
    sapo_tau_pos: float = 1.0
    """Temperature of the gate for positive advantages, of --policy-loss sapo."""
    sapo_tau_neg: float = 1.05
    """Temperature of the gate for negative advantages."""
    dppo_divergence: Literal["tv", "kl"] = "tv"
    """Divergence from the engine's policy at one token, of --policy-loss dppo."""
    dppo_threshold: float | None = None
    """Divergence beyond which a token moves no further away; defaults to 0.15 for tv, 0.05 for kl."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    entropy_quantile: float = 1.0
    """Share of the tokens of an optimizer step, those of highest entropy, that the policy loss counts; 1 is all."""
    disable_grpo_std_normalization: bool = False
    """Advantages without the division by the group's standard deviation (Dr.GRPO)."""
    disable_rewards_normalization: bool = False
    """Raw rewards as advantages: no group baseline."""
    calculate_per_token_loss: bool = False
    """Token mean: short for --loss-aggregation token_mean."""
    loss_aggregation: str | None = None
    """seq_mean: mean per trajectory, then over trajectories; token_mean: mean over tokens; constant: a constant divisor per trajectory; or one that a --plugin registers. Defaults to seq_mean, of sft_loss and gkd to token_mean."""
    loss_constant_length: int | None = None
    """Divisor of --loss-aggregation constant, in tokens; defaults to --rollout-max-response-len."""
    overlong_filtering: bool = False
    """Leave truncated responses out of the loss; they stay in their group's statistics."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old policy's."""
    keep_old_actor: bool = False
    """Old log-probs from the weights that made the rollout, kept in host memory, where these are older than the trainer's (train_async.py); in train.py they are the same."""
    use_tis: bool = False
    """Truncated importance sampling: short for --off-policy-correction token_truncate."""
    off_policy_correction: str | None = None
    """Weight from the engine's policy to the trainer's: token_truncate, token_mask, sequence_truncate, sequence_mask, geometric, icepop, or one that a --plugin registers."""
    tis_clip: float | None = None
    """Upper bound of that weight; defaults to 2, icepop 5, geometric 1.001."""
    tis_clip_low: float | None = None
    """Lower bound of that weight; defaults to 0, icepop 0.5, geometric 0.999."""
    custom_tis_function_path: str | None = None
    """Correction hook in place of the built-in ones: `f(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kw) -> (pg_loss, loss_masks, metrics)`, rows as lists."""
    use_opsm: bool = False
    """Leave out sequences of negative advantage whose log-probs fell by more than --opsm-delta a token since they were sampled."""
    opsm_delta: float = 1e-4
    """That threshold, the mean over a row's trained tokens of old minus new log-probs."""


@dataclass(frozen=True)
class SftArgs:
    """SFT: Conversations that are there already; --prompt-data has them in the column messages, or as prompt and completion."""

    sft_token_loss: Literal["cross_entropy", "dft"] = "cross_entropy"
    """Loss of a token: cross_entropy, or dft, the same times the token's own probability."""
    loss_scale: Literal["assistant", "last_round", "all"] = "assistant"
    """Messages that are trained on: the assistant's, those after the last question, or all. The keys loss_scale (a number) and loss (true or false) of a message win."""
    channel_key: str = "channel"
    """Column that names a row's channel, by which the loss is reported; used where present."""
    overlong_rows: Literal["refuse", "drop", "truncate"] = "refuse"
    """Rows longer than --seq-length: an error, left out, or cut at the end."""


@dataclass(frozen=True)
class PreferenceArgs:
    """PREFERENCE: Pairs of answers (columns chosen and rejected), or judged ones (completion and label), or answers of the engines."""

    dpo_loss_type: tuple[str, ...] = ("sigmoid",)
    """Losses of pairs, of --loss-type dpo, summed: sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, or one that a --plugin registers; see docs/algorithms.md."""
    dpo_loss_weights: tuple[float, ...] | None = None
    """Weight of each of them; defaults to 1."""
    beta: float = 0.1
    """Scale of the log-ratios (orpo: weight of the odds ratio): the larger, the closer to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs taken for mislabelled: sigmoid, sigmoid_norm, aot, robust, exo_pair, simpo, cpo."""
    reference_free: bool = False
    """No reference: its log-probs count as 0."""
    average_log_prob: bool = False
    """Means over the tokens of an answer in the place of sums."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that dpo is regularised by."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence; 0 is reverse_kl, 1 forward_kl."""
    rpo_alpha: float = 0.0
    """Weight of the chosen answer's negative log-likelihood beside dpo (RPO)."""
    ld_alpha: float = 1.0
    """Weight of the tokens by which an answer is longer than its partner (LD-DPO); 1 is plain dpo."""
    discopop_tau: float = 0.05
    """Temperature of discopop's blend."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for."""
    cpo_alpha: float = 1.0
    """Weight of the chosen answer's negative log-likelihood in cpo."""
    desirable_weight: float = 1.0
    """kto: weight of answers judged good."""
    undesirable_weight: float = 1.0
    """kto: weight of answers judged bad."""
    center_rewards_coefficient: float = 0.0
    """rm: weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual."""
    precompute_ref_log_probs: bool = False
    """Log-probs of the reference for all rows before the first step, instead of at each; the reference is then not kept in memory."""
    ref_log_probs_dir: str | None = None
    """Directory that keeps them, also for other runs with the same reference; defaults to ref_log_probs in the run directory."""
    online_preferences: bool = False
    """Answers of the engines instead of those of a data set: the best and the worst of a prompt's samples by reward are a pair; kto: an answer is good where its reward is above 0."""


@dataclass(frozen=True)
class GkdArgs:
    """GKD: Distillation from a teacher: --teacher-load, in the trainers, or --teacher-urls, on engines."""

    gkd_beta: float = 0.5
    """Divergence: 0 is KL(teacher, student), 1 KL(student, teacher), between them the generalised Jensen-Shannon divergence."""
    gkd_temperature: float = 1.0
    """Divides the logits of both."""
    gkd_lmbda: float = 0.0
    """Share of the rows that the student's engines answer, 0 to 1; the others are trained on as they are. Which ones follows from --rollout-seed and the row's number alone."""
    gkd_seq_kd: bool = False
    """The rows that are not the student's are answered by the teacher, which is on engines (--teacher-urls)."""
    teacher_urls: tuple[str, ...] | None = None
    """Teacher of --loss-type gkd and --use-opd on engines that speak SGLang's protocol and were started elsewhere, all with the same model: http://HOST:PORT ... If they ask for a key, it is read from the environment: MILES_TEACHER_API_KEY."""
    teacher_top_k: int = 64
    """Likeliest tokens of --teacher-urls that gkd compares one by one; all others are compared as one."""
    teacher_timeout: float = 600.0
    """Seconds for one request to --teacher-urls, its tries included, and for one of them to answer again where none does."""
    sft_alpha: float = 0.0
    """Weight of the answers' likelihood beside it, of rows that the student did not answer itself."""


@dataclass(frozen=True)
class OptimizerArgs:
    """OPTIMIZER: Megatron's optimizer and schedule. adam is decoupled (AdamW)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer."""
    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate that decay ends at."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """Schedule."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of --lr-decay-iters; exclusive with --lr-warmup-iters."""
    lr_decay_iters: int | None = None
    """Optimizer steps of decay; defaults to all of the run's."""
    critic_lr: float | None = None
    """Peak learning rate of the critic, of --advantage-estimator ppo; defaults to --lr. The other flags of this group hold for both."""
    critic_lr_warmup_iters: int = 0
    """Optimizer steps of the critic's linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.98
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 is off."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""


@dataclass(frozen=True)
class SglangArgs:
    """SGLANG: The rollout engines. Other --sglang-* flags pass through to the engine and are checked against it."""

    rollout_num_gpus: int | None = None
    """GPUs (ranks, without a GPU) for all engines; unset it is one engine, with --colocate the trainer's GPUs."""
    rollout_num_gpus_per_engine: int = 1
    """GPUs of one engine (its tensor-parallel size)."""
    sglang_server_concurrency: int = 512
    """Most samples in flight per engine."""
    sglang_request_timeout: float = 600.0
    """Seconds for one generation request."""
    sglang_args: dict[str, Any] = field(default_factory=dict)
    """Engine arguments by SGLang's names (JSON); every other --sglang-x VALUE adds one."""


@dataclass(frozen=True)
class ClusterArgs:
    """CLUSTER: Processes and where they run."""

    actor_num_nodes: int = 1
    """Trainer nodes."""
    actor_num_gpus_per_node: int | None = None
    """Trainer GPUs (ranks, without a GPU) per node; 8 on GPU, 1 on CPU."""
    critic_num_nodes: int | None = None
    """The same for the critic, which shares the actor's ranks: only --actor-num-nodes is accepted."""
    critic_num_gpus_per_node: int | None = None
    """Likewise: only --actor-num-gpus-per-node is accepted."""
    num_gpus_per_node: int | None = None
    """Most GPUs (ranks, without a GPU) that a node holds of this run; unset, what the cluster's nodes have."""
    colocate: bool = False
    """Engines and trainer share the same GPUs."""
    train_backend: Literal["megatron"] = "megatron"
    """Trainer implementation."""
    rollout_engine: Literal["auto", "embedded", "sglang"] = "auto"
    """Engine server. auto takes the embedded one, which serves Qwen2, Qwen3, Qwen3-MoE, Llama and Mistral models on CPU and GPU; sglang starts
    sglang.launch_server, which needs sglang installed."""
    rollout_engine_python: str | None = None
    """Interpreter that has sglang, for --rollout-engine sglang; unset it is the one that runs Miles."""
    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """torch.distributed backend of the trainers: gloo on CPU, nccl on GPU."""
    distributed_timeout_minutes: float = 10.0
    """Limit of one collective."""
    seed: int = 1234
    """Global seed of the trainers."""
    run_dir: str | None = None
    """Directory of this run; defaults to runs/<name>-<time>."""
    update_weight_buffer_size: int = 512 * 1024**2
    """Bytes of one weight bucket."""
    start_timeout: float = 120.0
    """Seconds for each process of the run to be up; trainers that load a checkpoint then have --wait-timeout."""
    wait_timeout: float = 1800.0
    """Seconds without progress after which a wait of the driver on another process is an error that names it."""
    heartbeat_timeout: float = 30.0
    """Seconds within which a process that was stopped or is frozen is found: an engine is replaced, another ends the run."""
    max_engine_restarts: int = 3
    """Replacements of one engine that died, within an hour; the next end of it ends the run."""
    deterministic_mode: bool = False
    """Two runs of one seed agree bitwise: seeded batch-invariant generation, ordered acceptance, deterministic kernels."""
    plugin: tuple[str, ...] = ()
    """Module or file imported in every process before the configuration is checked; repeatable."""


@dataclass(frozen=True)
class TrackingArgs:
    """TRACKING: What is shown and kept."""

    run_name: str | None = None
    """Name in the run directory's default path."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Terminal display: live on a terminal, one line per step otherwise."""
    no_report: bool = False
    """Write no report.html while the run goes on; `python -m miles.observe.report RUN_DIR` builds it later."""
    report_samples: int = 16
    """Samples of each rollout whose advantages and per-token log-probs are kept for the report; 0 keeps none."""
    use_wandb: bool = False
    """Send metrics.jsonl to Weights & Biases."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline keeps files for `wandb sync`; defaults to WANDB_MODE, else online."""
    wandb_dir: str | None = None
    """Where its files go; defaults to the run directory."""
    wandb_key: str | None = None
    """API key. WANDB_API_KEY in the environment is better: other users of the machine can read a command line."""
    wandb_host: str | None = None
    """Address of a server of one's own; defaults to WANDB_BASE_URL."""
    wandb_team: str | None = None
    """Entity."""
    wandb_project: str | None = None
    """Project; defaults to WANDB_PROJECT."""
    wandb_group: str | None = None
    """Group, and the run's name."""
    disable_wandb_random_suffix: bool = False
    """Name the run as its group, without a random suffix."""
    wandb_run_id: str | None = None
    """Run to create or continue; a continued run directory continues its own."""
    wandb_always_use_train_step: bool = False
    """Optimizer steps as the x axis, instead of rollouts."""
    use_tensorboard: bool = False
    """Write TensorBoard event files."""
    tb_project_name: str | None = None
    """Directory of the project's event files; defaults to TENSORBOARD_DIR, else tensorboard/ in the run directory."""
    tb_experiment_name: str | None = None
    """Directory of this run in it; defaults to the run directory's name."""
    use_mlflow: bool = False
    """Send metrics.jsonl to MLflow."""
    mlflow_tracking_uri: str | None = None
    """Server, or sqlite:///FILE; defaults to MLFLOW_TRACKING_URI, else mlflow.db in the run directory."""
    mlflow_experiment_name: str = "miles"
    """Experiment."""
    mlflow_run_name: str | None = None
    """Run name; defaults to the run directory's."""
    mlflow_run_id: str | None = None
    """Run to continue; a continued run directory continues its own."""
    tracker_close_timeout: float = 60.0
    """Seconds that the end of a run waits for trackers to deliver what is left. Steps never wait for them."""


@dataclass(frozen=True)
class DebugArgs:
    """DEBUG: Run one half, keep and replay data, check equality."""

    debug_rollout_only: bool = False
    """Generate and score, no trainer."""
    debug_train_only: bool = False
    """Train on --load-debug-rollout-data, no engines."""
    save_debug_rollout_data: str | None = None
    """Path template with {rollout_id} for each rollout's samples (JSON lines)."""
    load_debug_rollout_data: str | None = None
    """Replay such a file instead of generating; implies --debug-train-only."""
    check_weight_update_equal: bool = False
    """After each weight update compare every tensor's checksum between trainer and engines."""
    debug_exit_after_rollout: int | None = None
    """Stop after this many rollouts without changing schedules; what is due is saved."""


@dataclass(frozen=True)
class Config:
    """The whole configuration, one field per group. Frozen once resolved; see `miles.config.resolve`."""

    model: ModelArgs = field(default_factory=ModelArgs)
    ckpt: CkptArgs = field(default_factory=CkptArgs)
    rollout: RolloutArgs = field(default_factory=RolloutArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    perf: PerfArgs = field(default_factory=PerfArgs)
    grpo: GrpoArgs = field(default_factory=GrpoArgs)
    sft: SftArgs = field(default_factory=SftArgs)
    preference: PreferenceArgs = field(default_factory=PreferenceArgs)
    gkd: GkdArgs = field(default_factory=GkdArgs)
    optimizer: OptimizerArgs = field(default_factory=OptimizerArgs)
    sglang: SglangArgs = field(default_factory=SglangArgs)
    cluster: ClusterArgs = field(default_factory=ClusterArgs)
    tracking: TrackingArgs = field(default_factory=TrackingArgs)
    debug: DebugArgs = field(default_factory=DebugArgs)
