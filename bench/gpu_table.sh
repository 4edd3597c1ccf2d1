#!/usr/bin/env bash
# The table of docs/benchmarks.md for one GPU: `quattuor bench` on random weights of each shape, JSON with every round.
#   bench/gpu_table.sh QUATTUOR OUTPUT_DIR [ROW...]     all rows without names; rounds: $ROUNDS (3)
# Each file gets the commit that `git` tells, or $COMMIT.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
quattuor=$1 out=$2
shift 2
rows=("$@")
commit=${COMMIT:-$(git -C "$here" rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$out"
row() { # row NAME SHAPE GROUP BATCH PROMPT GENERATE [OPTION...]
  local name=$1 shape=$2 group=$3 batch=$4 prompt=$5 generate=$6 file
  shift 6
  if [ ${#rows[@]} -gt 0 ] && [[ " ${rows[*]} " != *" $name "* ]]; then return 0; fi
  file=$out/gpu-$name.json
  "$quattuor" bench --config "$here/shapes/$shape.json" --precision w4a8kv4 --group-size "$group" --device cuda --batch "$batch" \
    --prompt-len "$prompt" --gen-len "$generate" --rounds "${ROUNDS:-3}" --json "$@" >"$file.tmp" || { echo "$name failed"; rm -f "$file.tmp"; return 0; }
  sed -e "s|$here/||g" -e "s|^{|{\"commit\": \"$commit\", \"command\": \"quattuor bench --config shapes/$shape.json --precision w4a8kv4 --group-size $group --batch $batch --prompt-len $prompt --gen-len $generate --rounds ${ROUNDS:-3} $*\", |" "$file.tmp" >"$file"
  rm -f "$file.tmp"
  python3 - "$file" "$name" <<'P'
import json, sys
d = json.load(open(sys.argv[1]))
print(f"{sys.argv[2]:24} batch {d['batch']:4}: {d['throughput_tok_s']:9.1f} tok/s, prefill {d['prefill_s']:7.3f} s, decode "
      f"{d['decode_ms_per_step']:7.3f} ms = {d['decode_tok_s']:9.1f} tok/s, idle {100 * (d['device_idle_share'] or 0):.2f} %, "
      f"rounds {[round(r['throughput_tok_s'], 1) for r in d['rounds']]}")
P
}
row llama-3-8b llama-3-8b -1 256 1024 512
row llama-3-8b-g128 llama-3-8b 128 256 1024 512
row llama-3-8b-long llama-3-8b -1 "${LONG_BATCH:-864}" 128 2048
row llama-2-7b llama-2-7b -1 "${SEVEN_BATCH:-288}" 1024 512
row llama-2-70b llama-2-70b -1 "${SEVENTY_BATCH:-256}" 1024 512
row llama-3-8b-batch-1 llama-3-8b -1 1 128 256
