#!/usr/bin/env bash
# DPO on a Qwen3 model, the same on a laptop and on GPUs; no engine is started.
#
#   bash scripts/run_qwen3_dpo.sh                                                      a tiny model learns to carry from pairs
#   bash scripts/run_qwen3_dpo.sh --loss-type simpo --beta 2                           the same pairs, another loss: orpo, simpo, cpo
#   HF_CHECKPOINT=DIR PROMPT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_dpo.sh        the real recipe
#
# Arguments go on to train.py and win over those of the recipe.
#
# From the environment:
#   HF_CHECKPOINT  Hugging Face directory of the model; without it the tiny model and its task are made (.miles/) and used
#   PROMPT_DATA    JSONL or parquet with the columns `prompt`, `chosen` and `rejected`, messages or text; needed with HF_CHECKPOINT
#   EVAL_DATA      `NAME FILE`, repeated, of held-out rows in the same form
#   NUM_GPUS       GPUs to train on; all that nvidia-smi lists, one for the tiny model, 0 is a CPU run
#   MODEL          a file of scripts/models/, such as qwen3-4B; found from the checkpoint's shape
#   CKPT_DIR       where checkpoints are saved and resumed from; checkpoints/<name of HF_CHECKPOINT>-<loss>
#   TINY_SEED      seed of the tiny model; 0
#   RAY_ADDRESS    a running Ray cluster to submit the job to; every node must see this directory and the data
#   TORCH_INDEX_URL, MILES_PYTHON    the environment: scripts/lib/venv.sh
set -euo pipefail
# shellcheck source=scripts/lib/preference.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/preference.sh"
preference_recipe pairs dpo "$@"
