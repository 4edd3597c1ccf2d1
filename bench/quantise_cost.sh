#!/usr/bin/env bash
# What calibrated quantisation costs: time, memory and disk of `quantize --method qoq` over the number of layers, on random
# models of the shape in a config.json, made by the tests' quant_model. One JSON object for each number of layers.
#   bench/quantise_cost.sh BUILD_DIR CONFIG WORK_DIR CALIBRATION [QUANTIZE OPTION...]     such as build/release shapes/llama-3.2-1b.json
# LAYERS ("2 4 8"), SAMPLES (16), LENGTH (512). Judge by user_s where others use the machine. disk_bytes: the most that WORK_DIR/out
# held, the unfinished checkpoint included, looked at five times a second.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
build=$1 config=$2 work=$3 calibration=$4
shift 4
for layers in ${LAYERS:-2 4 8}; do
  model=$work/random-$layers
  [ -f "$model/model.safetensors" ] || { mkdir -p "$model" && "$build/tests/quant_model" "$model" "$config" "$layers"; }
  rm -rf "$work/out"
  mkdir "$work/out"
  ("$build/quattuor" quantize --model "$model" --output "$work/out" --method qoq --calibration "$calibration" --samples "${SAMPLES:-16}" \
    --length "${LENGTH:-512}" --json "$@" >"$work/log" && times >"$work/times") &
  pid=$! most=0
  while kill -0 "$pid" 2>/dev/null; do
    now=$(du -sb "$work/out" 2>/dev/null | cut -f1) # files may go while it looks
    [ "${now:-0}" -le "$most" ] || most=$now
    sleep 0.2
  done
  wait "$pid"
  # the last line of `times`: user and system time of the children, as 2m16.500s
  tail -n 1 "$work/log" | LAYERS=$layers DISK=$most TIMES=$(tail -n 1 "$work/times") SAMPLES=${SAMPLES:-16} LENGTH=${LENGTH:-512} python3 -c '
import json, os, re, sys
summary = json.load(sys.stdin)
user, system = (60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", os.environ["TIMES"]))
print(json.dumps({"layers": int(os.environ["LAYERS"]), "samples": int(os.environ["SAMPLES"]), "length": int(os.environ["LENGTH"]), "user_s": user,
                  "system_s": system, "disk_bytes": int(os.environ["DISK"]),
                  **{k: summary[k] for k in ("seconds", "peak_rss_bytes", "input_bytes", "output_bytes", "precision", "group_size")}}), flush=True)'
done
