#!/usr/bin/env bash
# An own task in four commands: train on one data set under own rewards, evaluate on another, go on there, report.
#
#     bash examples/own_task/run.sh [OUT]                         docs/own-task.md walks through it
#     MODEL=DIR STEPS=40 bash examples/own_task/run.sh [OUT]      another model, more steps
#
# The model is SmolLM2-135M-Instruct where its file is, on problems in sentences (words/), else the base that comes with the
# package, on problems in its own few words (sums/).
set -euo pipefail
out=$(realpath -m "${1:-own-task}")
cd "$(dirname "$0")"

file=~/.cache/tinylora-models/SmolLM2-135M-Instruct.Q4_1.gguf
model=${MODEL:-$([ -e "$file" ] && echo "$file" || echo builtin)}
data=$([ "$model" = builtin ] && echo sums || echo words)
length=$([ "$model" = builtin ] && echo 40 || echo 64) # tokens
task=(--dataset "$data" --max-completion-length "$length" --temperature 0.5)
rewards=(--reward rewards.py:right rewards.py:shows_work --reward-weights 1 0.2)
steps=(--max-steps "${STEPS:-20}")
first=(--data "$data/first.jsonl") second=(--data "$data/second.jsonl")

set -x
python -m tinylora.train --model "$model" "${task[@]}" "${first[@]}" "${rewards[@]}" "${steps[@]}" --output-dir "$out/first"
python -m tinylora.evaluate --adapter "$out/first" "${task[@]}" "${second[@]}" "${rewards[@]}" --output-dir "$out/first/scores"
python -m tinylora.train --init-adapter "$out/first" "${task[@]}" "${second[@]}" "${rewards[@]}" "${steps[@]}" --output-dir "$out/second"
python -m tinylora.report "$out/first" "$out/second" --no-samples --output "$out/report.html"
