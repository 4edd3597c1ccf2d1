#!/usr/bin/env bash
# Perplexity on the GPU against the CPU's: one JSON object a line and device. The two must agree within 0.5 %.
#   bench/gpu_accuracy.sh QUATTUOR TEXT MODEL_DIR PRECISION [PRECISION...]     (contexts: CTX="2048 8192")
set -euo pipefail
quattuor=$1 text=$2 model=$3
shift 3
for precision in "$@"; do
  for ctx in ${CTX:-2048 8192}; do
    for device in cpu cuda; do
      "$quattuor" eval ppl --model "$model" --precision "$precision" --text "$text" --ctx "$ctx" --device "$device" --json 2>/dev/null |
        sed "s|^{|{\"device\":\"$device\",\"asked\":\"$precision\",\"model_name\":\"$(basename "$model")\",\"text_name\":\"$(basename "$text")\",|"
    done
  done
done
