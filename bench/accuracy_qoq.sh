#!/usr/bin/env bash
# What QoQ gains: perplexity of round to nearest and of QoQ, on a model and on an exactly equivalent one with outliers
# (tests/golden/outlier_model.py), and the ablation: each step switched off in turn, and on alone. One JSON object a line.
#   bench/accuracy_qoq.sh QUATTUOR MODEL_DIR WORK_DIR CALIBRATION TEXT... > results.jsonl
# WINDOWS (default: all), CTX (2048), SAMPLES (128), LENGTH (1024), GROUPS_OF ("128 -1"), PARTS ("plain outliers ablation").
# The models in WORK_DIR are kept and used again.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
quattuor=$1 model=$2 work=$3 calibration=$4
shift 4
texts=("$@")
here=$(cd "$(dirname "$0")" && pwd)
parts=" ${PARTS:-plain outliers ablation} "
mkdir -p "$work"

# make NAME SOURCE GROUP [OPTION...]: the model in $work/NAME, made when it is not there.
make() {
  [ -f "$work/$1/model.safetensors" ] ||
    "$quattuor" quantize --model "$2" --output "$work/$1" --precision w4a8kv4 --group-size "$3" "${@:4}" >&2
}
qoq() { make "$1" "$2" "$3" --method qoq --calibration "$calibration" --samples "${SAMPLES:-128}" --length "${LENGTH:-1024}" "${@:4}"; }
# ppl SOURCE_NAME VARIANT GROUP DIR [OPTION...]: one line a text.
ppl() {
  local text
  for text in "${texts[@]}"; do
    "$quattuor" eval ppl --model "$4" --text "$text" --ctx "${CTX:-2048}" ${WINDOWS:+--windows "$WINDOWS"} --json "${@:5}" |
      sed "s|^{|{\"source\":\"$1\",\"variant\":\"$2\",\"group\":$3,\"text\":\"$(basename "$text")\",|"
  done
}
# both SOURCE_NAME DIR: the float model, round to nearest and QoQ.
both() {
  ppl "$1" float 0 "$2" --precision w16a16kv16
  for group in ${GROUPS_OF:-128 -1}; do
    make "$1-rtn$group" "$2" "$group"
    ppl "$1" rtn "$group" "$work/$1-rtn$group"
    qoq "$1-qoq$group" "$2" "$group"
    ppl "$1" qoq "$group" "$work/$1-qoq$group"
  done
}
# ablation SOURCE_NAME DIR: without each step, with each alone, and the steps one upon another in the order of the paper.
ablation() {
  local step chain=""
  for group in ${GROUPS_OF:-128 -1}; do
    for step in rotate rotate-heads smooth-keys smooth-down reorder clip gptq correct; do
      if [ $step = correct ] || { [ $step = clip ] && [ "$group" = 128 ]; } || { [ $step = reorder ] && [ "$group" = -1 ]; }; then
        qoq "$1-with-$step$group" "$2" "$group" --steps "+$step" # not among the defaults
        ppl "$1" "qoq+$step" "$group" "$work/$1-with-$step$group"
      else
        qoq "$1-without-$step$group" "$2" "$group" --steps="-$step"
        ppl "$1" "qoq-$step" "$group" "$work/$1-without-$step$group"
      fi
      qoq "$1-only-$step$group" "$2" "$group" --steps "$step"
      ppl "$1" "only $step" "$group" "$work/$1-only-$step$group"
    done
    chain=""
    for step in rotate rotate-heads clip smooth-keys smooth-down reorder gptq correct; do
      chain=${chain:+$chain,}$step
      qoq "$1-chain-$step$group" "$2" "$group" --steps "$chain"
      ppl "$1" "chain to $step" "$group" "$work/$1-chain-$step$group"
    done
  done
}

case $parts in *" plain "*) both plain "$model" ;; esac
case $parts in
  *" outliers "*)
    [ -f "$work/outliers/model.safetensors" ] || "${PYTHON:-python3}" "$here/../tests/golden/outlier_model.py" "$model" "$work/outliers"
    both outliers "$work/outliers"
    ;;
esac
case $parts in *" ablation "*) ablation plain "$model" ;; esac
