#!/usr/bin/env bash
# What a GPU has to say of this checkout: bash bench/gpu.sh [first|second], under seven minutes each, nothing installed.
# Leaves results.jsonl and log.txt under $OUT (default bench/results/gpu). What `python -m bench.bring` put into .bring/, wheels
# and Triton's compiled kernels, is used. bench/README.md says what each stage tells.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export OUT=${OUT:-bench/results/gpu} PYTHONUNBUFFERED=1 TINYLORA_SELF_CHECK_SECONDS=${TINYLORA_SELF_CHECK_SECONDS:-120}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
if [ -d .bring ]; then
    export TRITON_CACHE_DIR=/var/tmp/tinylora-triton # where they were compiled: Triton's files hold absolute paths
    mkdir -p $TRITON_CACHE_DIR && tar xzf .bring/triton.tgz -C $TRITON_CACHE_DIR
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /var/tmp/tinylora-site .bring/*.whl &&
        PYTHONPATH=$PYTHONPATH:/var/tmp/tinylora-site
fi
timeout -k 10 420 python3 -m bench.gpu "$@" 2>&1 | tee -a "$OUT/log.txt"
