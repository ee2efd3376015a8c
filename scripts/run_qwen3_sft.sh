#!/usr/bin/env bash
# Supervised fine-tuning of a Qwen3 model, the same on a laptop and on GPUs.
#
#   bash scripts/run_qwen3_sft.sh                                                      a tiny model is shown right additions
#   HF_CHECKPOINT=DIR SFT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_sft.sh           the real recipe
#
# Arguments go on to train.py and win over the ones below: bash scripts/run_qwen3_sft.sh --num-rollout 10 --seed 7
#
# From the environment:
#   HF_CHECKPOINT  Hugging Face directory of the model; without it the tiny model and its task are made (.miles/) and used
#   SFT_DATA       JSONL or parquet with the column `messages`, or `prompt` and `completion`; needed with HF_CHECKPOINT
#   EVAL_DATA      `NAME FILE`, repeated, of held-out rows in the same form
#   NUM_GPUS, MODEL, CKPT_DIR, TINY_SEED, RAY_ADDRESS, TORCH_INDEX_URL, MILES_PYTHON    as in run_qwen3_grpo.sh
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
# shellcheck source=scripts/lib/qwen3.sh
source "$ROOT/scripts/lib/qwen3.sh"
# shellcheck source=scripts/lib/job.sh
source "$ROOT/scripts/lib/job.sh"

job_start SFT_DATA

if [ -n "$TINY" ]; then
  DATA_ARGS=(
    --prompt-data "$TINY/train.jsonl"
    --input-key prompt
    --label-key label
    --rollout-shuffle
    --num-rollout 60
    --rollout-batch-size 64
    --eval-interval 20
    --eval-prompt-data addition "$TINY/test.jsonl"
  )
  PERF_ARGS=(
    --use-dynamic-batch-size
    --max-tokens-per-gpu 4096
  )
  OPTIMIZER_ARGS=(
    --lr 5e-4
    --min-lr 5e-5
    --lr-decay-style linear
    --weight-decay 0.0
    --adam-beta2 0.99
  )
  MISC_ARGS=(--run-name tiny-sft)
else
  DATA_ARGS=(
    --prompt-data "$DATA_FILE"
    --rollout-shuffle
    --num-epoch 3
    --rollout-batch-size 128
    --balance-data
    --overlong-rows drop
    --load "$CKPT_DIR"
    --save "$CKPT_DIR"
    --save-interval 100
  )
  if [ -n "${EVAL_DATA:-}" ]; then
    read -ra eval_pairs <<<"$EVAL_DATA"
    DATA_ARGS+=(--eval-interval 100 --eval-prompt-data "${eval_pairs[@]}")
  fi
  PERF_ARGS=(
    --use-dynamic-batch-size
    --max-tokens-per-gpu 9216
  )
  OPTIMIZER_ARGS=(
    --lr 1e-5
    --min-lr 1e-6
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --weight-decay 0.1
    --adam-beta2 0.95
  )
  MISC_ARGS=(--run-name "$NAME-sft")
fi

job_train --loss-type sft_loss "${DATA_ARGS[@]}" "${PERF_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
