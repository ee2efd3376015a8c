# Sourced by the recipes of jobs on data sets: what they share with each other.
#
#   job_start DATA     checks HF_CHECKPOINT and the variable named DATA, makes the environment, and sets TINY (directory of the
#                      tiny model and its task; empty for a model of one's own), HF_CHECKPOINT, DATA_FILE, NAME and CKPT_DIR
#   job_train ARGS     train.py with the model's shape, GPUs and these arguments

# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables go from and to the sourcing script; ROOT is set by venv.sh
job_start() {
  local data=$1
  if [ -n "${HF_CHECKPOINT:-}" ] && [ -z "${!data:-}" ]; then
    die "$data is not set: with HF_CHECKPOINT it names the rows to train on; set it to a JSONL or parquet file"
  fi
  if [ -z "${HF_CHECKPOINT:-}" ] && [ -n "${!data:-}" ]; then
    die "HF_CHECKPOINT is not set: $data alone would train the tiny model on it; set both or neither"
  fi
  use_venv core
  gpus_here=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  if [ -z "${HF_CHECKPOINT:-}" ]; then
    TINY=$ROOT/.miles/tiny_addition
    "$PYTHON" "$ROOT/tools/make_tiny_task.py" "$TINY" --seed "${TINY_SEED:-0}"
    HF_CHECKPOINT=$TINY/model
    MODEL=${MODEL:-qwen3-tiny}
    NUM_GPUS=${NUM_GPUS:-$((gpus_here > 0))}
    return
  fi
  TINY=
  HF_CHECKPOINT=$(_absolute "$HF_CHECKPOINT")
  DATA_FILE=$(_absolute "${!data}")
  NAME=$(basename -- "$HF_CHECKPOINT")
  CKPT_DIR=$(_absolute "${CKPT_DIR:-checkpoints/$NAME}")
  MODEL=${MODEL:-$(qwen3_model "$HF_CHECKPOINT")}
  NUM_GPUS=${NUM_GPUS:-$gpus_here}
}

_absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

job_train() {
  local launch=() gpus=()
  MODEL_ARGS=()
  if [ -n "$MODEL" ]; then
    [ -f "$ROOT/scripts/models/$MODEL.sh" ] ||
      die "MODEL, got '$MODEL': there is no scripts/models/$MODEL.sh; choose one of $(cd "$ROOT/scripts/models" && echo *.sh)"
    # shellcheck source=scripts/models/qwen3-tiny.sh
    source "$ROOT/scripts/models/$MODEL.sh"
  else
    echo "no file of scripts/models/ has the shape of $HF_CHECKPOINT: train.py derives all of it from config.json"
  fi
  [ "$NUM_GPUS" -eq 0 ] || gpus=(--actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_GPUS")
  if [ -n "${RAY_ADDRESS:-}" ]; then
    launch=("$(dirname -- "$PYTHON")/ray" job submit --address "$RAY_ADDRESS" --)
  fi
  exec "${launch[@]}" "$PYTHON" "$ROOT/train.py" --hf-checkpoint "$HF_CHECKPOINT" "${MODEL_ARGS[@]}" "${gpus[@]}" "$@"
}
