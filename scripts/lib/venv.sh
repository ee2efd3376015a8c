# Sourced by the scripts: the project's own environment, made once and kept up to date.
#
#   use_venv core|dev    makes ROOT/.venv where it is missing, installs what pyproject.toml asks for (dev: also what the
#                        tests need), and sets PYTHON to its interpreter
#
# Installing happens again only when pyproject.toml has changed. From the environment:
#   TORCH_INDEX_URL   wheel index for torch alone, such as one with CPU builds
#   MILES_PYTHON      an interpreter that has everything already, as in a container: used as it is, nothing is installed

# shellcheck shell=bash
# shellcheck disable=SC2034  # ROOT and PYTHON are for the sourcing script
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

use_venv() {
  local extras=$1 venv=$ROOT/.venv
  if [ -n "${MILES_PYTHON:-}" ]; then
    _fits "$MILES_PYTHON" || die "MILES_PYTHON, got '$MILES_PYTHON': it is no Python 3.11 to 3.13; name one that is"
    PYTHON=$MILES_PYTHON
    return
  fi
  PYTHON=$venv/bin/python
  if [ -f "$(_stamp "$extras")" ]; then return; fi

  mkdir -p "$ROOT/.miles"
  (
    # Two scripts started together must not install into one environment; where there is no flock, the user takes care.
    if command -v flock >/dev/null; then flock 9; fi
    if [ ! -f "$(_stamp "$extras")" ]; then _install "$extras" "$venv"; fi
  ) 9>"$ROOT/.miles/venv.lock"
}

# The file that says an installation of these extras is complete. Its name holds all that the installation depends on.
_stamp() {
  local key
  key=$(cksum <"$ROOT/pyproject.toml" | tr ' ' '-')-$(printf '%s' "$ROOT" | cksum | cut -d ' ' -f 1)
  echo "$ROOT/.venv/.installed-$1-$key"
}

_install() {
  local extras=$1 venv=$2 torch quiet=() index=() target=$ROOT
  [ -t 1 ] || quiet=(--quiet)
  [ -z "${TORCH_INDEX_URL:-}" ] || index=(--index-url "$TORCH_INDEX_URL")
  [ "$extras" = core ] || target="${ROOT}[$extras]"
  torch=$(grep -oE 'torch==[0-9][0-9.]*' "$ROOT/pyproject.toml" | head -n 1)

  _make_venv "$venv"
  echo "installing $torch and Miles ($extras) into $venv; this happens once"
  # torch by itself and first: its index may be another one, and what follows finds it satisfied.
  _pip "$venv" "${quiet[@]}" "${index[@]}" "$torch"
  _pip "$venv" "${quiet[@]}" -e "$target"
  rm -f "$venv"/.installed-*
  touch "$(_stamp "$extras")" "$(_stamp core)" # whatever the extras, the core is there too
}

_pip() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@" ||
    die "pip could not install ${*: -1}: its message is above; mend that and run this again"
}

# Also mends an environment that a killed run left half made, or whose interpreter is gone.
_make_venv() {
  local venv=$1 python
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    python=$(_find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || die "$python could not make $venv: its message is above"
  fi
  _fits "$venv/bin/python" || die "$venv has $("$venv/bin/python" --version), Miles needs 3.11 to 3.13; remove it and run this again"
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
}

_find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.13 python3 python; do
    # A version manager's shim may exist for a version that is not installed, and Debian splits venv off: try it out.
    if _fits "$candidate" && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11, 3.12 or 3.13 with the venv module was found on PATH; install one (Debian: apt install python3 python3-venv)"
}

_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}
