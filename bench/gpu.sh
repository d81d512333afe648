#!/usr/bin/env bash
# All that a GPU has to say about this checkout, nothing installed, in under nine minutes: bench/gpu.sh
# Every stage has its own time limit and outlives the others' failure; what an early one leaves goes to the later ones.
# Results: $OUT (default bench/results/gpu): a JSON and a log for each stage, and summary.txt, one page.
set -u
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=. PYTHONUNBUFFERED=1 TINYLORA_SELF_CHECK_SECONDS=${TINYLORA_SELF_CHECK_SECONDS:-40}
OUT=${OUT:-bench/results/gpu}
BUDGET=${BUDGET:-520} # seconds in all; a stage may take ten more to die
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT"/*.json "$OUT"/summary.txt
# A cache of its own, so that an earlier run's verdicts and compiled kernels do not speak for this one.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TINYLORA_CACHE=$scratch/cache TRITON_CACHE_DIR=$scratch/triton

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

stage() { # name, its most seconds, how many lines of its log the summary shows, command...
    local name=$1 most=$2 lines=$3 left=$((BUDGET - SECONDS)) began=$SECONDS status
    shift 3
    if ((left < 5)); then say "== $name: skipped, no time left" && return; fi
    timeout -k 10 $((most < left ? most : left)) "$@" >"$OUT/$name.log" 2>&1
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="OUT OF TIME" ;;
        *) status="FAILED, exit status $status" ;;
    esac
    say "== $name: $status, $((SECONDS - began)) s"
    grep -v '^{' "$OUT/$name.log" | tail -n "$lines" | cut -c1-200 | tee -a "$OUT/summary.txt"
}

card() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader
    python -c "from bench.measure import card, print_json; print_json(card(), '$OUT/card.json')" && head -c 2000 "$OUT/card.json"
}

same_bits() { # two short training runs, all of it on the GPU, end in the same bytes
    for run in a b; do
        python -m tinylora.train --max-steps 3 --eval-size 64 --output-dir "$scratch/$run" || return
    done
    cmp "$scratch"/{a,b}/adapter/adapter_model.safetensors && result=true || result=false
    echo "{\"bench\": \"same_bits\", \"adapters_equal\": $result}" | tee "$OUT/same_bits.json"
    echo "the two adapters are equal: $result" && [ $result = true ]
}
decode() { # the CUDA C++ kernel: compiled, its errors, its times
    local checks=tinylora.kernels.self_check:CUDA_CHECKS
    python -m tinylora.kernels.build || return
    python -m bench.verdicts --checks $checks --json "$OUT/cuda_verdicts.json" || return
    python -m pytest -m gpu -q -p no:cacheprovider -k "cuda_kernel and not clean" tests/test_gpu.py || return
    python -m bench.decode --models Qwen2.5-7B --rounds 7 --json "$OUT/decode.json"
}
export -f card same_bits decode
export OUT scratch

stage card 30 25 bash -c card
stage verdicts 150 25 python -m bench.verdicts --json "$OUT/verdicts.json"
stage tests 100 12 python -m pytest -m gpu -q -p no:cacheprovider -k "not cuda_kernel" tests
stage same_bits 60 3 bash -c same_bits
stage rollout 100 14 python -m bench.rollout --prompts 64 --lengths gsm8k --longest 512 --rounds 3 --json "$OUT/rollout.json"
stage grpo 90 12 python -m bench.grpo --json "$OUT/grpo.json"
stage decode 120 60 bash -c decode
stage ops 150 90 python -m bench.ops --quick --rounds 7 --json "$OUT/ops.json"
stage sanitizer 90 12 python -m pytest -m gpu -q -p no:cacheprovider -k "cuda_kernel and clean" tests/test_gpu.py
stage step 60 12 python -m bench.step --rounds 10 --json "$OUT/step.json"
say "== total: $SECONDS s"
