#!/usr/bin/env bash
# What `quattuor quantize` writes, read and recomputed by an independent program in numpy, for every precision and source type.
set -euo pipefail
quattuor=$1
source_dir=$2
oracle=$source_dir/tests/e2e/oracle_checkpoint.py
python=python3 # the distribution's own where another one comes first and has no numpy
"$python" -c 'import numpy' 2>/dev/null || python=/usr/bin/python3
"$python" -c 'import numpy' 2>/dev/null || { echo "skipped: python3-numpy is not installed"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

check() { # source precision group [flags]
  local source=$1 precision=$2 group=$3
  shift 3
  rm -rf "$dir/out"
  "$quattuor" quantize --model "$source" --output "$dir/out" --precision "$precision" --group-size "$group" --method rtn "$@" \
    >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
  "$python" "$oracle" check "$source" "$dir/out"
}

for type in bfloat16 float16 float32; do
  "$python" "$oracle" make "$dir/$type" $type
  check "$dir/$type" w4a8kv4 128
  check "$dir/$type" w4a8kv8 -1
  check "$dir/$type" w8a8 -1
  check "$dir/$type" w16a16 -1
  check "$dir/$type" w4a8kv4 128 --head int8 --embed int8
done
# the full-size demo model where it is
demo=${QUATTUOR_SHARED:-$source_dir/../shared}/models/demo-bf16
if [ -r "$demo/model.safetensors" ]; then
  check "$demo" w4a8kv4 128 --head int8 --embed int8
  check "$demo" w4a8kv4 -1
fi
# a second run must not overwrite, and says so
if "$quattuor" quantize --model "$dir/float32" --output "$dir/out" --precision w8a8 >"$dir/log" 2>&1; then
  echo "overwrote a checkpoint without being asked"
  exit 1
fi
grep -q "exists already" "$dir/log"
