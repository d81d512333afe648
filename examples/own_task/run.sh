#!/usr/bin/env bash
# An own task in four commands: train on one data set under own rewards, evaluate held out, go on on a second one, report.
#
#     bash examples/own_task/run.sh [OUT]                         docs/own-task.md walks through it
#     MODEL=DIR STEPS=40 bash examples/own_task/run.sh [OUT]      another model, more steps
#
# The model is SmolLM2-135M-Instruct where its file is (or MODEL names it), else the base that comes with the package.
set -euo pipefail
out=$(realpath -m "${1:-own-task}")
cd "$(dirname "$0")"

file=~/.cache/tinylora-models/SmolLM2-135M-Instruct.Q4_1.gguf
model=${MODEL:-$([ -e "$file" ] && echo "$file" || echo builtin)}
length=$([ "$model" = builtin ] && echo 40 || echo 64) # tokens
task=(--dataset sums --max-completion-length "$length" --temperature 0.5)
rewards=(--reward rewards.py:right rewards.py:shows_work --reward-weights 1 0.2)
steps=(--max-steps "${STEPS:-20}" --prompts-per-step 8)

set -x
python -m tinylora.train --model "$model" "${task[@]}" --data gains.jsonl "${rewards[@]}" "${steps[@]}" --output-dir "$out/gains"
python -m tinylora.evaluate --adapter "$out/gains" "${task[@]}" --data losses.jsonl "${rewards[@]}" --output-dir "$out/gains/scores"
python -m tinylora.train --init-adapter "$out/gains" "${task[@]}" --data losses.jsonl "${rewards[@]}" "${steps[@]}" --output-dir "$out/losses"
python -m tinylora.report "$out/gains" "$out/losses" --no-samples --output "$out/report.html"
