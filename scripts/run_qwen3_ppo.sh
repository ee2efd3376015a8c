#!/usr/bin/env bash
# PPO on a Qwen3 model, the same on a laptop and on GPUs: the GRPO recipe with a critic, and one answer a prompt.
#
#   bash scripts/run_qwen3_ppo.sh                                                     a tiny model learns to carry
#   HF_CHECKPOINT=DIR PROMPT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_ppo.sh       the real recipe
#
# Arguments go on to train.py and win over the ones below; the environment is that of scripts/run_qwen3_grpo.sh, with
# checkpoints in checkpoints/<name of HF_CHECKPOINT>-ppo.
set -euo pipefail

PPO_ARGS=(
  --advantage-estimator ppo
  --gamma 1.0
  --lambd 0.95
  --rollout-batch-size 256
  --n-samples-per-prompt 1
)
if [ -z "${HF_CHECKPOINT:-}" ]; then
  PPO_ARGS+=(
    --critic-lr 1e-3
    --value-clip 0.5
    --run-name tiny-addition-ppo
  )
else
  export CKPT_DIR=${CKPT_DIR:-checkpoints/$(basename -- "$HF_CHECKPOINT")-ppo}
  PPO_ARGS+=(
    --critic-lr 1e-5
    --value-clip 0.2
    --num-critic-only-steps 10
  )
fi
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/run_qwen3_grpo.sh" "${PPO_ARGS[@]}" "$@"
