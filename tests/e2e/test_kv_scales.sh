# test_kv_scales.sh - static KV8 scales: put into a checkpoint, exported, read from a file, and all the same to the model.
. "$(dirname "$0")/lib.sh"
need_model
layers=$(grep -oE '"num_hidden_layers": *[0-9]+' "$MODEL/config.json" | grep -oE '[0-9]+$')
heads=$(grep -oE '"num_key_value_heads": *[0-9]+' "$MODEL/config.json" | grep -oE '[0-9]+$')
json() { # json K V: a file of scales, layer i's being K and V times (1 + i / 100)
  awk -v n="$layers" -v k="$1" -v v="$2" 'BEGIN {
    for (i = 0; i < n; i++) { a = a (i ? ", " : "") "\"" i "\": " k * (1 + i / 100); b = b (i ? ", " : "") "\"" i "\": " v * (1 + i / 100) }
    printf "{\"model_type\": \"llama\", \"kv_cache\": {\"dtype\": \"int8\", \"scaling_factor\": {\"k_scale\": {%s}, \"v_scale\": {%s}}}}\n", a, b }'
}
json 0.15 0.05 >"$T/scales.json"
text() { field text <"$T/out"; }
ask=(--prompt "The old man" --max-tokens 12 --json --precision w4a8kv8)
run 0 generate --model "$MODEL" "${ask[@]}" --kv-quant-params-path "$T/scales.json"
given=$(text)
run 0 convert --model "$MODEL" --output "$T/with" --kv-scales "$T/scales.json"
run 0 generate --model "$T/with" "${ask[@]}" --kv-scales static
same "$(text)" "$given" "scales in the file against scales beside it"
# absurdly coarse ones change the answer, so the scales are really used
json 40 40 >"$T/coarse.json"
run 0 generate --model "$T/with" "${ask[@]}" --kv-quant-params-path "$T/coarse.json"
[ "$(text)" = "$given" ] && fail "the scales of the file change nothing"
# out and in again
run 0 info --model "$T/with" --export-kv-scales "$T/exported.json" --json
run 0 generate --model "$MODEL" "${ask[@]}" --kv-quant-params-path "$T/exported.json"
same "$(text)" "$given" "exported scales"
run 0 convert --model "$T/with" --output "$T/again" --kv-scales "$T/exported.json"
cmp "$T/with/model.safetensors" "$T/again/model.safetensors" || fail "exporting and importing changes the scales"
# per head: the largest head of each layer counts
awk -v n="$layers" -v h="$heads" 'BEGIN {
  for (i = 0; i < n; i++) {
    k = v = ""
    for (j = 0; j < h; j++) { f = (1 + i / 100) * (j == 1 ? 1 : 0.5); k = k (j ? ", " : "") 0.15 * f; v = v (j ? ", " : "") 0.05 * f }
    a = a (i ? ", " : "") "\"" i "\": [" k "]"; b = b (i ? ", " : "") "\"" i "\": [" v "]" }
  printf "{\"kv_cache\": {\"dtype\": \"int8\", \"scaling_factor\": {\"k_scale\": {%s}, \"v_scale\": {%s}}}}\n", a, b }' >"$T/heads.json"
run 0 generate --model "$MODEL" "${ask[@]}" --kv-quant-params-path "$T/heads.json"
same "$(text)" "$given" "per-head scales"
run 0 convert --model "$MODEL" --output "$T/heads" --kv-scales "$T/heads.json"
says "$T/out" "of the $heads heads of each layer the largest"
cmp "$T/with/model.safetensors" "$T/heads/model.safetensors" || fail "per-head scales in a checkpoint"
# quantize's own path keeps them, too
if [ -f "$SHARED/models/demo-bf16/model.safetensors" ]; then
  run 0 convert --model "$SHARED/models/demo-bf16" --output "$T/float" --precision w8a8kv8 --kv-scales "$T/scales.json"
  run 0 quantize --model "$SHARED/models/demo-bf16" --output "$T/float2" --precision w8a8kv8 --kv-scales "$T/heads.json"
  says "$T/out" "of the $heads heads of each layer the largest"
  cmp "$T/float/model.safetensors" "$T/float2/model.safetensors" || fail "quantize --kv-scales differs from convert's"
  run 1 quantize --model "$SHARED/models/demo-bf16" --output "$T/no" --method qoq --calibration "$SRC/README.md" --kv-scales "$T/scales.json"
  says "$T/err" "static-kv measures"
  run 0 info --model "$T/float" --export-kv-scales "$T/float.json" --json
  cmp "$T/float.json" "$T/exported.json" || fail "other scales come out of a rounded model"
fi
run 1 info --model "$MODEL" --export-kv-scales "$T/no.json"
says "$T/err" "no static KV scales"
[ -e "$T/no.json" ] && fail "an empty file of scales was written"
run 1 generate --model "$MODEL" --prompt x --precision w4a8kv4 --kv-quant-params-path "$T/scales.json"
says "$T/err" "needs an 8-bit KV cache"
echo '{"kv_cache": {}}' >"$T/bad.json"
run 1 generate --model "$MODEL" --prompt x --precision w4a8kv8 --kv-quant-params-path "$T/bad.json"
says "$T/err" "bad.json: .*scaling_factor"
run 1 generate --model "$MODEL" --prompt x --precision w4a8kv8 --kv-quant-params-path "$T/none.json"
run 1 convert --model "$MODEL" --output "$T/no" --kv-scales "$T/bad.json"
[ -e "$T/no" ] && fail "a failed run left something"
# fp8 for comparison: a rounding of its own, by the scales too, and only of 16 bits
ask=(--prompt "The old man" --max-tokens 24 --json --precision w4a8kv16 --device cpu)
run 0 generate --model "$MODEL" "${ask[@]}"
plain=$(text)
json 60000 60000 >"$T/coarser.json" # down to the least numbers that e5m2 has
run 0 generate --model "$MODEL" "${ask[@]}" --kv-fp8 e5m2 --kv-quant-params-path "$T/coarser.json"
[ "$(text)" = "$plain" ] && fail "e5m2 by coarse scales changes nothing"
run 1 generate --model "$MODEL" --prompt x --precision w4a8kv8 --kv-fp8 e4m3
says "$T/err" "ask for …kv16"
run 1 generate --model "$MODEL" --prompt x --precision w4a8kv16 --kv-fp8 e4m3 --kv-scales static
says "$T/err" "no static KV scales"
run 2 generate --model "$MODEL" --prompt x --kv-fp8 e3m4
finish
