# Sourced by the recipes of preference jobs, which name their rows and their loss; it does not return.
#
#   preference_recipe ROWS LOSS_TYPE ARGUMENTS...    ROWS is pairs or judged; arguments go on to train.py and win
#
# The environment is that of the recipes: see scripts/run_qwen3_dpo.sh.

# shellcheck shell=bash
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
# shellcheck source=scripts/lib/qwen3.sh
source "$ROOT/scripts/lib/qwen3.sh"

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

preference_recipe() {
  local rows=$1 loss=$2
  shift 2
  if [ -n "${HF_CHECKPOINT:-}" ] && [ -z "${PROMPT_DATA:-}" ]; then
    die "PROMPT_DATA is not set: with HF_CHECKPOINT it names the preferences to train on; set it to a JSONL or parquet file"
  fi
  if [ -z "${HF_CHECKPOINT:-}" ] && [ -n "${PROMPT_DATA:-}" ]; then
    die "HF_CHECKPOINT is not set: PROMPT_DATA alone would train the tiny model on it; set both or neither"
  fi
  use_venv core

  local gpus_here
  gpus_here=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  local args=(--loss-type "$loss")
  if [ -z "${HF_CHECKPOINT:-}" ]; then
    local tiny=$ROOT/.miles/tiny_addition
    "$PYTHON" "$ROOT/tools/make_tiny_task.py" "$tiny" --seed "${TINY_SEED:-0}" --preferences
    MODEL=${MODEL:-qwen3-tiny}
    NUM_GPUS=${NUM_GPUS:-$((gpus_here > 0))}
    args+=(
      --hf-checkpoint "$tiny/model"
      --prompt-data "$tiny/$rows.jsonl"
      --eval-prompt-data "$rows" "$tiny/${rows}_test.jsonl"
      --eval-interval 10
      --rollout-shuffle
      --num-rollout 30
      --rollout-batch-size 64
      --use-dynamic-batch-size
      --max-tokens-per-gpu 4096
      --lr 1e-4
      --beta 0.5
      --min-lr 1e-5
      --lr-decay-style linear
      --weight-decay 0.0
      --adam-beta2 0.99
      --clip-grad 1.0
      --run-name "tiny-$loss"
    )
  else
    HF_CHECKPOINT=$(absolute "$HF_CHECKPOINT")
    local name directory
    name=$(basename -- "$HF_CHECKPOINT")
    directory=$(absolute "${CKPT_DIR:-checkpoints/$name-$loss}")
    MODEL=${MODEL:-$(qwen3_model "$HF_CHECKPOINT")}
    NUM_GPUS=${NUM_GPUS:-$gpus_here}
    args+=(
      --hf-checkpoint "$HF_CHECKPOINT"
      --load "$directory"
      --save "$directory"
      --save-interval 100
      --prompt-data "$(absolute "$PROMPT_DATA")"
      --apply-chat-template
      --seq-length 4096
      --overlong-rows drop
      --rollout-shuffle
      --num-epoch 1
      --rollout-batch-size 64
      --use-dynamic-batch-size
      --max-tokens-per-gpu 16384
      --balance-data
      --lr 5e-7
      --lr-decay-style cosine
      --lr-warmup-fraction 0.1
      --weight-decay 0.0
      --adam-beta2 0.98
      --clip-grad 1.0
      --run-name "$name-$loss"
    )
    if [ -n "${EVAL_DATA:-}" ]; then
      local pairs
      read -ra pairs <<<"$EVAL_DATA"
      args+=(--eval-interval 100 --eval-prompt-data "${pairs[@]}")
    fi
  fi
  if [ "$NUM_GPUS" -gt 0 ]; then
    args+=(--actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_GPUS")
  fi

  MODEL_ARGS=()
  if [ -n "$MODEL" ]; then
    [ -f "$ROOT/scripts/models/$MODEL.sh" ] ||
      die "MODEL, got '$MODEL': there is no scripts/models/$MODEL.sh; choose one of $(cd "$ROOT/scripts/models" && echo *.sh)"
    # shellcheck source=scripts/models/qwen3-tiny.sh
    source "$ROOT/scripts/models/$MODEL.sh"
  fi
  local launch=()
  if [ -n "${RAY_ADDRESS:-}" ]; then
    launch=("$(dirname -- "$PYTHON")/ray" job submit --address "$RAY_ADDRESS" --)
  fi
  exec "${launch[@]}" "$PYTHON" "$ROOT/train.py" "${MODEL_ARGS[@]}" "${args[@]}" "$@"
}
