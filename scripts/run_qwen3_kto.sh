#!/usr/bin/env bash
# KTO on a Qwen3 model: answers that are good or bad by themselves, without pairs; no engine is started.
#
#   bash scripts/run_qwen3_kto.sh                                                      a tiny model learns to carry
#   HF_CHECKPOINT=DIR PROMPT_DATA=FILE NUM_GPUS=8 bash scripts/run_qwen3_kto.sh        the real recipe
#
# PROMPT_DATA has the columns `prompt`, `completion` and `label` (true, false). All else is as in scripts/run_qwen3_dpo.sh.
set -euo pipefail
# shellcheck source=scripts/lib/preference.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/preference.sh"
preference_recipe judged kto "$@"
