#!/usr/bin/env bash
# Everything that is checked without running the project: lint, format, types, the import order of the rooms, the shell.
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
use_venv dev
cd "$ROOT"
BIN=$(dirname -- "$PYTHON")

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m mypy tools/make_tiny_task.py tools/tiny_task
"$BIN/lint-imports" --no-cache --no-logo
"$BIN/shellcheck" --external-sources scripts/*.sh scripts/lib/*.sh scripts/models/*.sh .ci/run
