#!/usr/bin/env bash
# Installs what the tests need, checks the code, and runs all tests. Arguments go on to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/unit/algo -k clip
#   bash scripts/test.sh --sglang [...]     also what needs a real SGLang server, which it installs for a CPU (2.6 GB, once)
set -euo pipefail
# shellcheck source=scripts/lib/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/venv.sh"
use_venv dev
cd "$ROOT"

# The report's tests draw it in a real browser; where there is none, and none can be installed, they are skipped.
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing chromium for the report's tests; this happens once"
  { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core; } \
    >"$ROOT/.miles/chromium.log" 2>&1 || echo "chromium was not installed (.miles/chromium.log): its tests are skipped"
fi

if [ "${1:-}" = --sglang ]; then
  shift
  export SGLANG_CPU_VENV=${SGLANG_CPU_VENV:-$ROOT/.miles/sglang-venv}
  PYTHON=$PYTHON bash tools/sglang_cpu/install.sh "$SGLANG_CPU_VENV"
fi

bash scripts/check.sh
"$PYTHON" -m pytest "$@"
