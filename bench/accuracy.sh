#!/usr/bin/env bash
# Perplexity of one float model at every precision: quantises it, measures each variant and prints one JSON object a line.
#   bench/accuracy.sh QUATTUOR MODEL_DIR WORK_DIR TEXT... > results.jsonl      (contexts: CTX="2048 8192")
set -euo pipefail
quattuor=$1 model=$2 work=$3
shift 3
mkdir -p "$work"
variant() { # variant NAME PRECISION GROUP [OPTION...]
  [ -d "$work/$1" ] || "$quattuor" quantize --model "$model" --output "$work/$1" --precision "$2" --group-size "$3" "${@:4}" >&2
}
variant w8a8 w8a8kv8 -1
variant w4a8-g128 w4a8kv4 128
variant w4a8-channel w4a8kv4 -1
variant w4a8-g128-int8-head w4a8kv4 128 --embed int8 --head int8
ppl() { # ppl NAME DIR PRECISION
  for text in "${texts[@]}"; do
    for ctx in ${CTX:-2048 8192}; do
      "$quattuor" eval ppl --model "$2" --precision "$3" --text "$text" --ctx "$ctx" --json | sed "s|^{|{\"variant\":\"$1\",\"text\":\"$(basename "$text")\",|"
    done
  done
}
texts=("$@")
ppl "bf16, KV fp16" "$model" w16a16kv16
ppl "w8a8kv8" "$work/w8a8" w8a8kv8
ppl "w4a8kv8 g128" "$work/w4a8-g128" w4a8kv8
ppl "w4a8kv4 g128" "$work/w4a8-g128" w4a8kv4
ppl "w4a8kv4 per-channel" "$work/w4a8-channel" w4a8kv4
ppl "w4a8kv4 g128, int8 embedding and head" "$work/w4a8-g128-int8-head" w4a8kv4
ppl "w16a16kv8" "$model" w16a16kv8
