#!/usr/bin/env bash
# A reward model on a Qwen3 model, from pairs of answers; no engine is started. It is exported for --rm-type reward_model.
#
#   bash scripts/run_qwen3_rm.sh                                                      a tiny model learns to judge additions
#   HF_CHECKPOINT=DIR PROMPT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_rm.sh        the real recipe
#   bash scripts/run_qwen3_grpo.sh --rm-type reward_model --rm-model .miles/tiny_reward_model/hf-59      train by its scores
#
# Arguments go on to train.py and win over those of the recipe; the environment is that of scripts/run_qwen3_dpo.sh, with the
# columns `chosen`, `rejected` and, where there is one, `margin`. The export is in CKPT_DIR, as hf-<rollout>.
set -euo pipefail
# shellcheck source=scripts/lib/preference.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/preference.sh"
RM_ARGS=(--center-rewards-coefficient 0.01 --beta unset)
if [ -z "${HF_CHECKPOINT:-}" ]; then
  CKPT_DIR=${CKPT_DIR:-$ROOT/.miles/tiny_reward_model}
  RM_ARGS+=(--save "$CKPT_DIR")
else
  export CKPT_DIR=${CKPT_DIR:-checkpoints/$(basename -- "$HF_CHECKPOINT")-rm}
  RM_ARGS+=(--lr 5e-6)
fi
preference_recipe pairs rm "${RM_ARGS[@]}" --save-hf "$CKPT_DIR/hf-{rollout_id}" "$@"
