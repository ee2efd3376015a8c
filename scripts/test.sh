#!/usr/bin/env bash
# Installs what the tests need, checks the code, and runs all tests. Arguments go on to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/unit/algo -k clip
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
use_venv dev
cd "$ROOT"

bash scripts/check.sh
"$PYTHON" -m pytest "$@"
