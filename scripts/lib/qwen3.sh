# Sourced by the recipes: which file of scripts/models/ fits a Qwen3 checkpoint.
#
#   qwen3_model CHECKPOINT    prints a name such as qwen3-4B; nothing when no file fits. Needs PYTHON.

# shellcheck shell=bash

qwen3_model() {
  # Layers, width and rotary base tell the released models apart. transformers 5 writes the base under rope_parameters.
  local shape
  shape=$("$PYTHON" - "$1/config.json" <<'PY'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    config = json.load(file)
base = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 0
print(config.get("model_type"), config.get("num_hidden_layers"), config.get("hidden_size"), int(base))
PY
  ) || die "$1/config.json could not be read: its message is above; HF_CHECKPOINT names a Hugging Face checkpoint directory"
  case $shape in
    "qwen3 2 128 10000") echo qwen3-tiny ;;
    "qwen3 28 1024 1000000") echo qwen3-0.6B ;;
    "qwen3 28 2048 1000000") echo qwen3-1.7B ;;
    "qwen3 36 2560 1000000") echo qwen3-4B ;;
    "qwen3 36 2560 5000000") echo qwen3-4B-2507 ;;
    "qwen3 36 4096 1000000") echo qwen3-8B ;;
    "qwen3 40 5120 1000000") echo qwen3-14B ;;
    "qwen3 64 5120 1000000") echo qwen3-32B ;;
  esac
}
