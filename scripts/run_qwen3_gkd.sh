#!/usr/bin/env bash
# Distillation from a teacher's next-token distributions (GKD), the same on a laptop and on GPUs.
#
#   bash scripts/run_qwen3_gkd.sh                                                           a tiny model learns from a better one
#   HF_CHECKPOINT=DIR TEACHER=DIR GKD_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_gkd.sh    the real recipe
#
# Arguments go on to train.py and win over the ones below: bash scripts/run_qwen3_gkd.sh --gkd-beta 0
#
# From the environment:
#   HF_CHECKPOINT  Hugging Face directory of the student; without it the tiny model and its task are made (.miles/) and used
#   TEACHER        Hugging Face directory of the teacher, with the same tokens; for the tiny model one is made by run_qwen3_sft.sh
#   TEACHER_URLS   in its place: engines that serve the teacher, http://HOST:PORT ...; their key is MILES_TEACHER_API_KEY
#   GKD_LMBDA      share of the rows that the student answers itself; 0 where it is not set
#   GKD_DATA       JSONL or parquet with the column `messages`, or `prompt` and `completion`; needed with HF_CHECKPOINT
#   EVAL_DATA      `NAME FILE`, repeated, of held-out rows in the same form
#   NUM_GPUS, MODEL, CKPT_DIR, TINY_SEED, RAY_ADDRESS, TORCH_INDEX_URL, MILES_PYTHON    as in run_qwen3_grpo.sh
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
# shellcheck source=scripts/lib/qwen3.sh
source "$ROOT/scripts/lib/qwen3.sh"
# shellcheck source=scripts/lib/job.sh
source "$ROOT/scripts/lib/job.sh"

if [ -n "${HF_CHECKPOINT:-}" ] && [ -z "${TEACHER:-}${TEACHER_URLS:-}" ]; then
  die "TEACHER is not set: with HF_CHECKPOINT it names the model to learn from; set it to a Hugging Face directory, or TEACHER_URLS"
fi
job_start GKD_DATA

if [ -n "$TINY" ]; then
  if [ -z "${TEACHER:-}${TEACHER_URLS:-}" ]; then
    made=$ROOT/.miles/tiny_teacher-${TINY_SEED:-0}
    TEACHER=$made/hf-59
    if [ ! -f "$TEACHER/config.json" ]; then
      echo "making the teacher, once: $made"
      env -u HF_CHECKPOINT bash "$ROOT/scripts/run_qwen3_sft.sh" --num-rollout 60 --run-dir "$made/run" --no-report \
        --save "$made/checkpoints" --save-hf "$made/hf-{rollout_id}"
    fi
  fi
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
  MISC_ARGS=(--run-name tiny-gkd)
else
  DATA_ARGS=(
    --prompt-data "$DATA_FILE"
    --rollout-shuffle
    --num-epoch 1
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
  MISC_ARGS=(--run-name "$NAME-gkd")
fi

TEACHER_ARGS=(--teacher-load "${TEACHER:-}")
if [ -n "${TEACHER_URLS:-}" ]; then
  read -ra urls <<<"$TEACHER_URLS"
  TEACHER_ARGS=(--teacher-urls "${urls[@]}")
fi
if [ -n "${GKD_LMBDA:-}" ]; then
  longest=4096
  if [ -n "$TINY" ]; then longest=8; fi
  TEACHER_ARGS+=(--gkd-lmbda "$GKD_LMBDA" --rollout-max-response-len "$longest")
fi

job_train --loss-type gkd "${TEACHER_ARGS[@]}" "${DATA_ARGS[@]}" "${PERF_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
