# test_quantize.sh - quattuor quantize and info: every precision is made, read back, and answers.
. "$(dirname "$0")/lib.sh"
SOURCE=$SHARED/models/demo-bf16
[ -f "$SOURCE/model.safetensors" ] || skip "no float model here to quantise"
run 0 info --model "$SOURCE" --json
same "$(field precision <"$T/out")" '"w16a16kv16"' "precision of the source"
same "$(field weight_format <"$T/out")" '"bf16"' "format of the source"
for setting in "w4a8kv4 128" "w4a8kv4 -1" "w8a8kv8 -1" "w16a16kv8 -1"; do
  set -- $setting
  run 0 quantize --model "$SOURCE" --output "$T/q" --precision "$1" --group-size "$2" --overwrite --json
  grep -q '"layer":7,' "$T/out" || fail "no report of layer 7"
  error=$(tail -1 "$T/out" | field relative_error)
  most=0.25
  case $1 in w8*) most=0.02 ;; w16*) most=0.002 ;; esac
  awk -v e="$error" -v m=$most 'BEGIN { exit !(e >= 0 && e < m) }' || fail "relative error $error of $setting"
  run 0 info --model "$T/q" --json
  same "$(field precision <"$T/out")" "\"$1\"" "precision found"
  [ "$1" = w16a16kv8 ] || same "$(field group_size <"$T/out")" "$2" "group size found"
  run 0 generate --model "$T/q" --prompt "The old man" --max-tokens 6 --json
  same "$(field finish_reason <"$T/out")" '"length"' "finish_reason"
done
run 0 generate --model "$T/q" --prompt "The old man" --max-tokens 2 --precision w16a16kv4
run 1 generate --model "$T/q" --prompt "The old man" --max-tokens 2 --precision w4a8kv4
says "$T/err" "16-bit|w16a16|f16"
run 1 quantize --model "$SOURCE" --output "$T/q"
says "$T/err" "overwrite"
run 1 quantize --model "$T/none" --output "$T/r"
[ -e "$T/r/model.safetensors" ] && fail "a failed run left a model"
run 0 info --model "$SOURCE" --json
same "$(field kv4 <"$T/out")" $((136 * 4 * 8)) "KV4 bytes a token: 136 x KV heads x layers"
finish
