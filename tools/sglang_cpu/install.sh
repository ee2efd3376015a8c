#!/usr/bin/env bash
# A virtual environment in which the real SGLang server runs on a CPU: 2.6 GB, a few minutes.
#
#   bash tools/sglang_cpu/install.sh DIR
#
# It is for tests. SGLang's wheels are built for CUDA; what of it a CPU run imports is installed by hand, and what a CPU torch
# cannot load is stood in for by the files of site/. SGLang 0.5.20 is the release that pins torch 2.13.0.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$1
done_mark=$venv/.installed-$(cat "$here/install.sh" "$here"/site/*.py "$here"/site/*/*.py | cksum | tr ' ' '-')
if [ -f "$done_mark" ]; then exit; fi

"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
echo "torch==2.13.0" >"$venv/constraints.txt"
pip torch==2.13.0
pip --no-deps sglang==0.5.20 torchvision==0.28.0 triton==3.9.0 xgrammar==0.2.1 compressed-tensors==0.18.0
# What the server imports without a GPU; sglang's own list would bring gigabytes of CUDA.
pip --constraint "$venv/constraints.txt" \
  transformers==5.12.1 tokenizers==0.22.2 sentencepiece==0.2.1 gguf soundfile pillow \
  aiohttp fastapi 'uvicorn>=0.51' uvloop python-multipart openai==2.6.1 requests prometheus-client \
  orjson msgspec pydantic 'pyzmq>=25.1.2' partial_json_parser pybase64 xxhash zstandard jsonschema \
  numpy einops apache-tvm-ffi==0.1.11 psutil setproctitle packaging tqdm ipython dill loguru

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$here"/site/. "$site/"
echo "import miles_sglang_cpu" >"$site/miles_sglang_cpu.pth"
touch "$done_mark"
