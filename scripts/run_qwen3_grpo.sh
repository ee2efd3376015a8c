#!/usr/bin/env bash
# GRPO on a Qwen3 model, the same on a laptop and on GPUs.
#
#   bash scripts/run_qwen3_grpo.sh                                                     a tiny model learns to carry
#   HF_CHECKPOINT=DIR PROMPT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_grpo.sh       the real recipe
#
# Arguments go on to train.py and win over the ones below: bash scripts/run_qwen3_grpo.sh --num-rollout 10 --seed 7
#
# From the environment:
#   HF_CHECKPOINT  Hugging Face directory of the model; without it the tiny model and its task are made (.miles/) and used
#   PROMPT_DATA    JSONL or parquet with the columns `prompt` (messages) and `label`; needed with HF_CHECKPOINT
#   EVAL_DATA      `NAME FILE`, repeated, of held-out prompts in the same form
#   NUM_GPUS       GPUs to train and generate on; all that nvidia-smi lists, one for the tiny model, 0 is a CPU run
#   MODEL          a file of scripts/models/, such as qwen3-4B; found from the checkpoint's shape
#   CKPT_DIR       where checkpoints are saved and resumed from; checkpoints/<name of HF_CHECKPOINT>
#   TINY_SEED      seed of the tiny model; 0
#   DRIVER         train.py, or train_async.py: generate the next rollout while this one trains, on devices of its own
#   RAY_ADDRESS    a running Ray cluster to submit the job to; every node must see this directory and the data
#   TORCH_INDEX_URL, MILES_PYTHON    the environment: scripts/lib/venv.sh
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
# shellcheck source=scripts/lib/qwen3.sh
source "$ROOT/scripts/lib/qwen3.sh"

if [ -n "${HF_CHECKPOINT:-}" ] && [ -z "${PROMPT_DATA:-}" ]; then
  die "PROMPT_DATA is not set: with HF_CHECKPOINT it names the prompts to train on; set it to a JSONL or parquet file"
fi
if [ -z "${HF_CHECKPOINT:-}" ] && [ -n "${PROMPT_DATA:-}" ]; then
  die "HF_CHECKPOINT is not set: PROMPT_DATA alone would train the tiny model on it; set both or neither"
fi

use_venv core

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
gpus_here=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)

if [ -z "${HF_CHECKPOINT:-}" ]; then
  TINY=$ROOT/.miles/tiny_addition
  "$PYTHON" "$ROOT/tools/make_tiny_task.py" "$TINY" --seed "${TINY_SEED:-0}"
  MODEL=${MODEL:-qwen3-tiny}
  NUM_GPUS=${NUM_GPUS:-$((gpus_here > 0))}

  CKPT_ARGS=(
    --hf-checkpoint "$TINY/model"
  )
  ROLLOUT_ARGS=(
    --prompt-data "$TINY/train.jsonl"
    --input-key prompt
    --label-key label
    --apply-chat-template
    --rollout-shuffle
    --rm-type exact
    --num-rollout 60
    --rollout-batch-size 32
    --n-samples-per-prompt 8
    --num-steps-per-rollout 1
    --rollout-max-response-len 4
    --rollout-temperature 1.0
  )
  EVAL_ARGS=(
    --eval-interval 20
    --eval-config "$TINY/eval.yaml"
  )
  PERF_ARGS=(
    --use-dynamic-batch-size
    --max-tokens-per-gpu 4096
  )
  GRPO_ARGS=(
    --advantage-estimator grpo
    --eps-clip 0.2
    --eps-clip-high 0.28
  )
  OPTIMIZER_ARGS=(
    --optimizer adam
    --lr 5e-4
    --min-lr 5e-5
    --lr-decay-style linear
    --weight-decay 0.0
    --adam-beta1 0.9
    --adam-beta2 0.99
    --clip-grad 1.0
  )
  SGLANG_ARGS=(
    --rollout-num-gpus-per-engine 1
  )
  MISC_ARGS=(
    --run-name tiny-addition
  )
else
  HF_CHECKPOINT=$(absolute "$HF_CHECKPOINT")
  NAME=$(basename -- "$HF_CHECKPOINT")
  CKPT_DIR=$(absolute "${CKPT_DIR:-checkpoints/$NAME}")
  MODEL=${MODEL:-$(qwen3_model "$HF_CHECKPOINT")}
  NUM_GPUS=${NUM_GPUS:-$gpus_here}

  CKPT_ARGS=(
    --hf-checkpoint "$HF_CHECKPOINT"
    --load "$CKPT_DIR"
    --save "$CKPT_DIR"
    --save-interval 20
  )
  ROLLOUT_ARGS=(
    --prompt-data "$(absolute "$PROMPT_DATA")"
    --input-key prompt
    --label-key label
    --apply-chat-template
    --rollout-shuffle
    --rm-type math
    --num-rollout 3000
    --rollout-batch-size 32
    --n-samples-per-prompt 8
    --num-steps-per-rollout 1
    --rollout-max-response-len 8192
    --rollout-temperature 1.0
    --balance-data
  )
  EVAL_ARGS=()
  if [ -n "${EVAL_DATA:-}" ]; then
    read -ra eval_pairs <<<"$EVAL_DATA"
    EVAL_ARGS=(
      --eval-interval 20
      --eval-prompt-data "${eval_pairs[@]}"
      --n-samples-per-eval-prompt 16
      --eval-max-response-len 16384
      --eval-top-p 0.7
    )
  fi
  PERF_ARGS=(
    --use-dynamic-batch-size
    --max-tokens-per-gpu 9216
  )
  GRPO_ARGS=(
    --advantage-estimator grpo
    --use-kl-loss
    --kl-loss-coef 0.00
    --kl-loss-type low_var_kl
    --entropy-coef 0.00
    --eps-clip 0.2
    --eps-clip-high 0.28
  )
  OPTIMIZER_ARGS=(
    --optimizer adam
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.98
  )
  SGLANG_ARGS=(
    --rollout-num-gpus-per-engine 1
    --sglang-mem-fraction-static 0.7
  )
  MISC_ARGS=(
    --run-name "$NAME"
  )
fi
if [ "$NUM_GPUS" -gt 0 ]; then
  MISC_ARGS+=(--actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_GPUS")
fi

MODEL_ARGS=()
if [ -n "$MODEL" ]; then
  [ -f "$ROOT/scripts/models/$MODEL.sh" ] ||
    die "MODEL, got '$MODEL': there is no scripts/models/$MODEL.sh; choose one of $(cd "$ROOT/scripts/models" && echo *.sh)"
  # shellcheck source=scripts/models/qwen3-tiny.sh
  source "$ROOT/scripts/models/$MODEL.sh"
else
  echo "no file of scripts/models/ has the shape of $HF_CHECKPOINT: train.py derives all of it from config.json"
fi

[ "${DRIVER:=train.py}" = train_async.py ] || MISC_ARGS+=(--colocate)

launch=()
if [ -n "${RAY_ADDRESS:-}" ]; then
  launch=("$(dirname -- "$PYTHON")/ray" job submit --address "$RAY_ADDRESS" --)
fi
exec "${launch[@]}" "$PYTHON" "$ROOT/$DRIVER" \
  "${MODEL_ARGS[@]}" \
  "${CKPT_ARGS[@]}" \
  "${ROLLOUT_ARGS[@]}" \
  "${EVAL_ARGS[@]}" \
  "${PERF_ARGS[@]}" \
  "${GRPO_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" \
  "${SGLANG_ARGS[@]}" \
  "${MISC_ARGS[@]}" \
  "$@"
