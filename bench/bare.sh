#!/usr/bin/env bash
# The environment of a bare GPU machine in DIR, and what has to work there: bash bench/bare.sh DIR  (3 GB the first time)
# $PYTHON is a Python 3.12 (default python3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?a directory for the environment}
if [ ! -x "$directory/bin/python" ]; then
    "${PYTHON:-python3.12}" -m venv "$directory"
    "$directory/bin/pip" install -q torch==2.11.0 triton==3.6.0 transformers==5.17.0 peft==0.21.2 numpy pytest pytest-benchmark \
        hypothesis matplotlib tqdm rich xxhash safetensors tokenizers pyarrow jinja2 huggingface_hub
fi
export PATH="$PWD/$directory/bin:$PATH" PYTHONPATH=. CUDA_VISIBLE_DEVICES="" OUT=${OUT:-/tmp/tinylora-bare}
case $directory in /*) export PATH="$directory/bin:$PATH" ;; esac
rm -rf "$OUT"
python -m pytest -q -p no:cacheprovider tests/test_bare.py tests/bench/test_gpu_driver.py tests/kernels/test_aot.py
TINYLORA_GPU_TESTS=cpu python -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py | tail -n 3
bash bench/gpu.sh first --device cpu | tail -n 2
bash bench/gpu.sh second --device cpu | tail -n 2
