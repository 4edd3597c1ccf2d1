# test_quantize_qoq.sh - quantize --method qoq: the same bytes however often it is killed, clear errors, files that load, a
# report. On a small random model with the demo tokenizer, made here.
. "$(dirname "$0")/lib.sh"
MAKE=$(dirname "$Q")/tests/quant_model
[ -x "$MAKE" ] || skip "no quant_model beside the binary: build the tests"
[ -f "$SRC/models/demo/tokenizer.json" ] || skip "no tokenizer in models/demo"
mkdir "$T/model" "$T/other"
"$MAKE" "$T/model" && "$MAKE" "$T/other" untied || fail "no model"
TEXT=$SRC/docs/architecture.md
qoq() { run "$1" quantize --model "$T/model" --method qoq --calibration "$TEXT" --samples 4 --length 64 --threads 2 "${@:2}"; }
# The same in the background: its process is $pid.
start() {
  "$Q" quantize --model "$T/model" --method qoq --calibration "$TEXT" --samples 4 --length 64 --threads 2 "$@" >"$T/out" 2>"$T/err" &
  pid=$!
}
kill_it() {
  kill -9 "$pid" 2>/dev/null
  wait "$pid" 2>/dev/null
}
# limited KIB CODE ARGUMENTS: no file may become larger, as on a full disk.
limited() (
  trap "" XFSZ
  n_failed=0
  ulimit -f "$1" || exit 0
  qoq "${@:2}"
  [ "$n_failed" = 0 ]
)

# Killed at any moment and resumed: the same file.
for steps in rotate,rotate-heads,smooth-keys,smooth-down,reorder,clip,gptq +smooth-out,correct; do
  qoq 0 --output "$T/whole" --steps "$steps" --overwrite
  [ -e "$T/whole/.calibration" ] && fail "the work directory is left"
  for moment in 0.02 0.1 0.2 0.3 0.45 0.6 0.9 1.3; do
    start --output "$T/killed" --steps "$steps"
    sleep $moment
    kill_it
    [ -e "$T/killed/model.safetensors" ] && break
  done
  [ -e "$T/killed/model.safetensors" ] || qoq 0 --output "$T/killed" --steps "$steps"
  cmp "$T/whole/model.safetensors" "$T/killed/model.safetensors" || fail "killed and resumed with $steps: another file"
  cmp "$T/whole/config.json" "$T/killed/config.json" || fail "another config"
  rm -r "$T/killed"
done

# It does go on behind the finished layers (of a run whose disk was full when the model was written), but only with the same
# settings, the same model, and all its files.
limited 1500 1 --output "$T/part" --steps "$steps" || fail "a full disk"
says "$T/err" "model.safetensors.*(File too large|No space)|cannot write"
layer=$T/part/.calibration/layer-0000.safetensors
[ -f "$layer" ] || fail "no finished layer is kept: $(ls -A "$T/part/.calibration")"
inode() { stat -c %i "$layer"; }
rm "$T/part/.calibration/layer-0002.safetensors"
touch "$T/part/.calibration/mark"
first=$(inode)
[ -f "$T/part/.calibration/states-0002.f32" ] && fail "states of a finished layer are left"
limited 1500 1 --output "$T/part" --steps "$steps" || fail "a full disk again" # states are gone: anew
[ -e "$T/part/.calibration/mark" ] && fail "layers without the states behind them were used"
touch "$T/part/.calibration/mark"
first=$(inode)
limited 1500 1 --output "$T/part" --steps "$steps" || fail "a full disk, again"
[ -e "$T/part/.calibration/mark" ] && same "$(inode)" "$first" "finished layers are used again" || fail "started anew"
cp -r "$T/part" "$T/part2"
limited 1500 1 --output "$T/part2" --steps "$steps" --seed 43 || fail "another seed"
[ -e "$T/part2/.calibration/mark" ] && fail "layers of another seed were used"
touch "$T/part2/.calibration/mark"
limited 1500 1 --output "$T/part2" --steps "$steps" --seed 43 --fresh || fail "fresh"
[ -e "$T/part2/.calibration/mark" ] && fail "--fresh did not start anew"
touch "$T/part2/.calibration/mark"
sed -i 's/"rms_norm_eps": 1e-05/"rms_norm_eps": 1e-04/' "$T/model/config.json"
limited 1500 1 --output "$T/part2" --steps "$steps" --seed 43 || fail "another config"
[ -e "$T/part2/.calibration/mark" ] && fail "layers of another config were used"
sed -i 's/"rms_norm_eps": 1e-04/"rms_norm_eps": 1e-05/' "$T/model/config.json"
rm -r "$T/part2"
qoq 0 --output "$T/part" --steps "$steps"
cmp "$T/whole/model.safetensors" "$T/part/model.safetensors" || fail "after a full disk: another file"

# Weights of another model with the same shapes.
cp -r "$T/model" "$T/swap"
run_swap() { run "$1" quantize --model "$T/swap" --method qoq --calibration "$TEXT" --samples 4 --length 64 --threads 2 --output "$T/s"; }
(trap '' XFSZ; ulimit -f 1500; run_swap 1)
touch "$T/s/.calibration/mark"
size=$(stat -c %s "$T/swap/model.safetensors")
head -c $((size / 2)) "$T/swap/model.safetensors" >"$T/changed"
tail -c +$((size / 2 + 1)) "$T/swap/model.safetensors" | tr '\200-\277' '\201-\277\200' >>"$T/changed"
mv "$T/changed" "$T/swap/model.safetensors"
(trap '' XFSZ; ulimit -f 1500; run_swap 1)
[ -e "$T/s/.calibration/mark" ] && fail "layers of another model were used"

# A work directory that cannot be filled or made.
limited 100 1 --output "$T/full" || fail "a full disk, first"
says "$T/err" "cannot write .*states-0000.f32: File too large"
[ -e "$T/full/model.safetensors" ] && fail "a failed run left a model"
mkdir "$T/blocked"
: >"$T/blocked/.calibration"
qoq 1 --output "$T/blocked"
says "$T/err" "blocked/.calibration"

# What is written loads, and answers.
for setting in "w4a8kv4 128" "w4a8kv4 -1" "w8a8kv8 -1" "w16a16kv8 -1"; do
  set -- $setting
  qoq 0 --output "$T/q" --precision "$1" --group-size "$2" --overwrite
  run 0 info --model "$T/q" --json
  same "$(field precision <"$T/out")" "\"$1\"" "precision"
  run 0 generate --model "$T/q" --prompt "The old man" --max-tokens 5 --ignore-eos --json
  same "$(field finish_reason <"$T/out")" '"length"' "finish_reason of $setting"
done
qoq 0 --output "$T/q" --precision w4a8kv8 --static-kv --overwrite
run 0 generate --model "$T/q" --prompt "The old man" --max-tokens 5 --ignore-eos --kv-scales static --json
same "$(field finish_reason <"$T/out")" '"length"' "static scales"
qoq 0 --output "$T/q" --head int8 --embed int8 --overwrite
run 0 generate --model "$T/q" --prompt "The old man" --max-tokens 5 --ignore-eos --json
run 0 quantize --model "$T/other" --method qoq --calibration "$TEXT" --samples 4 --length 64 --output "$T/u" --steps=-rotate,+smooth-input --json
same "$(tail -1 "$T/out" | field n_layers)" 3 "layers"
run 0 generate --model "$T/u" --prompt "The old man" --max-tokens 5 --ignore-eos --json

# Memory does not grow with the layers: eight more, of 8.6 MB each in floats, cost less than one.
if ! grep -q __asan_init "$Q"; then # which keeps what is freed
  cat >"$T/shape.json" <<'J'
{"architectures": ["LlamaForCausalLM"], "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
 "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}
J
  for layers in 4 12; do
    mkdir "$T/l$layers" && "$MAKE" "$T/l$layers" "$T/shape.json" $layers || fail "no model of $layers layers"
    run 0 quantize --model "$T/l$layers" --method qoq --calibration "$TEXT" --samples 2 --length 64 --threads 2 --steps=-clip \
      --output "$T/o$layers" --json
    same "$(tail -1 "$T/out" | field n_layers)" $layers "layers"
    tail -1 "$T/out" | field peak_rss_bytes >"$T/peak$layers"
    [ "$(cat "$T/peak$layers")" -gt 10000000 ] || fail "no peak_rss_bytes"
  done
  growth=$(($(cat "$T/peak12") - $(cat "$T/peak4")))
  [ $growth -lt 8000000 ] || fail "4 layers took $(cat "$T/peak4") bytes, 12 layers $(cat "$T/peak12")"
fi

# The report.
qoq 0 --output "$T/q" --overwrite --report "$T/<r>.html" --steps +smooth-out
[ "$(grep -c '<svg' "$T/<r>.html")" = "$(grep -c '</svg>' "$T/<r>.html")" ] || fail "unclosed drawings"
same "$(grep -o '<svg' "$T/<r>.html" | wc -l | tr -d ' ')" 5 "drawings: errors, outliers, three layers"
says "$T/<r>.html" '<th scope="row">samples</th><td>4 of 64 tokens, seed 42</td>'
says "$T/<r>.html" "<h2>Smoothing</h2>"
says "$T/<r>.html" "</html>"
grep -qE '(src|href)=|<script|@import|url\(' "$T/<r>.html" && fail "the report needs something from outside"
run 0 quantize --model "$T/model" --output "$T/q" --overwrite --report "$T/rtn.html"
says "$T/rtn.html" "round to nearest"
grep -q "Outliers" "$T/rtn.html" && fail "outliers without calibration"
qoq 1 --output "$T/new" --report "$T/none/r.html"
says "$T/err" "none/r.html: No such file"
[ -e "$T/new/.calibration" ] && fail "the report's file is tried after the work"
run 1 quantize --model "$T/none" --output "$T/new" --report "$T/left.html"
[ -e "$T/left.html" ] && fail "a failed run left an empty report"

# Bad flags.
run 2 quantize --model "$T/model" --output "$T/bad" --calibration "$TEXT"
says "$T/err" "calibration belongs to --method qoq"
run 1 quantize --model "$T/model" --output "$T/bad" --method qoq
says "$T/err" "calibration"
qoq 1 --output "$T/bad" --steps rotate,wiggle
says "$T/err" 'unknown step "wiggle".*smooth-keys'
qoq 1 --output "$T/bad" --steps +smooth-input
says "$T/err" "smooth-input.*rotate"
qoq 1 --output "$T/bad" --smooth-keys 2,0
says "$T/err" '"2,0".*grid'
qoq 1 --output "$T/bad" --samples 60000
says "$T/err" "architecture.md: .*enough for [0-9]+ samples of 64, not for 60000"
run 1 quantize --model "$T/model" --output "$T/bad" --method qoq --calibration "$T/no.txt"
says "$T/err" "no.txt: No such file"
printf '{"text": "one"}\n{"txt": 2}\n' >"$T/lines.jsonl"
run 1 quantize --model "$T/model" --output "$T/bad" --method qoq --calibration "$T/lines.jsonl"
says "$T/err" "lines.jsonl: line 2 is not"
[ -e "$T/bad/model.safetensors" ] && fail "a failed run left a model"
finish
