# test_convert.sh - quattuor convert on what other quantisers write: every variant gives the integers it was made from, and
# every fault is named and leaves no model. The inputs are made by tests/golden/make_import.py (numpy).
. "$(dirname "$0")/lib.sh"
python=python3 # the distribution's own where another one comes first and has no numpy
"$python" -c 'import numpy' 2>/dev/null || python=/usr/bin/python3
"$python" -c 'import numpy' 2>/dev/null || skip "python3-numpy is not installed"
IMPORT=$SRC/tests/golden/make_import.py
pairs=() # of what was imported and what came out, for the oracle

variants=$("$python" "$IMPORT" list)
# shellcheck disable=SC2086 # words
"$python" "$IMPORT" make "$T" $variants
for variant in $variants; do
  run 0 convert --model "$T/$variant" --output "$T/o-$variant" --json --threads 2
  kind=deepcompressor # the fake-quantised ones
  case $variant in gptq* | awq* | qserve*) kind=${variant%%-*} ;; esac
  same "$(head -1 "$T/out" | field kind)" "\"$kind\"" "kind of $variant"
  case $variant in
    gptq | awq) [ "$(tail -1 "$T/out" | field moved)" = 14 ] || fail "$variant: nothing moved" ;;
    gptq-act-all) same "$(tail -1 "$T/out" | field rounded)" 12 "matrices rounded anew" ;;
    *) same "$(tail -1 "$T/out" | field exact)" 16 "exact matrices of $variant" ;;
  esac
  pairs+=("$T/$variant" "$T/o-$variant")
done

# The order of the second-level scales by flag: a copy without the name that tells.
mkdir "$T/renamed" && cp "$T/qserve-deepcompressor/config.json" "$T/qserve-deepcompressor/tokenizer.json" "$T/renamed/"
cp "$T/qserve-deepcompressor/quant_model.pt" "$T/renamed/pytorch_model.bin"
run 0 convert --model "$T/renamed" --output "$T/o-flag" --s2-order deepcompressor
pairs+=("$T/qserve-deepcompressor" "$T/o-flag")
run 0 convert --model "$T/qserve-deepcompressor" --output "$T/o-wrong" --s2-order omniserve
cmp -s "$T/o-flag/model.safetensors" "$T/o-wrong/model.safetensors" && fail "--s2-order changes nothing"
# One file, with the configuration elsewhere; the result again is the same; the KV width is recorded.
run 0 convert --model "$T/renamed/pytorch_model.bin" --config "$T/renamed" --output "$T/o-file" --s2-order deepcompressor \
  --precision w4a8kv8
pairs+=("$T/qserve-deepcompressor" "$T/o-file")
grep -q '"precision": "w4a8kv8"' "$T/o-file/config.json" || fail "the KV width is not recorded"
run 0 convert --model "$T/o-file" --output "$T/o-again"
cmp "$T/o-file/model.safetensors" "$T/o-again/model.safetensors" || fail "converting what was converted changes it"
# DeepCompressor's directory has no config.json of its own.
mkdir "$T/bare" && cp "$T/postscale-g128/"*.pt "$T/bare/"
run 1 convert --model "$T/bare" --output "$T/no"
says "$T/err" "config.json.*--config"
run 0 convert --model "$T/bare" --config "$T/postscale-g128" --output "$T/o-bare"
pairs+=("$T/postscale-g128" "$T/o-bare")
# --strict
run 0 convert --model "$T/awq-exact" --output "$T/o-strict" --strict
run 1 convert --model "$T/awq" --output "$T/no" --strict
says "$T/err" "layers.0.self_attn.q_proj: not exact \(scales moved; the weights would move by [0-9.]+ %\)"
run 1 convert --model "$T/gptq-act-all" --output "$T/no" --strict
says "$T/err" "desc_act"
# Our own int8 tables stay what they are.
"$python" "$SRC/tests/e2e/oracle_checkpoint.py" make "$T/float" float32
run 0 quantize --model "$T/float" --output "$T/o-int8" --precision w4a8kv4 --head int8 --embed int8
run 0 convert --model "$T/o-int8" --output "$T/o-int8-again"
cmp "$T/o-int8/model.safetensors" "$T/o-int8-again/model.safetensors" || fail "int8 tables change"
grep -q '"head_bits": 8' "$T/o-int8-again/config.json" || fail "config.json does not know the int8 head"
# Floats: fp16 and bf16, and by rounding as quantize does it.
for dtype in fp16 bf16; do
  run 0 convert --model "$T/float" --output "$T/o-$dtype" --dtype $dtype --json
  same "$(head -1 "$T/out" | field kind)" '"float"' "kind of a float model"
  run 0 info --model "$T/o-$dtype" --json
  same "$(field weight_format <"$T/out")" "\"${dtype/fp16/f16}\"" "format of --dtype $dtype"
done
run 0 convert --model "$T/float" --output "$T/o-rtn" --precision w4a8kv4
run 0 quantize --model "$T/float" --output "$T/o-quantize" --precision w4a8kv4 --method rtn
cmp "$T/o-rtn/model.safetensors" "$T/o-quantize/model.safetensors" || fail "convert rounds otherwise than quantize"

# Static KV scales of acts.pt, in all forms, by file and by folder; the same as those of a JSON file.
forms=$("$python" "$IMPORT" acts "$T/acts")
run 0 convert --model "$T/postscale-g128" --output "$T/o-kv" --kv-scales "$T/acts/scales.json"
says "$T/out" "^static KV scales put in$"
for form in $forms; do
  run 0 convert --model "$T/postscale-g128" --output "$T/o-$form" --kv-scales "$T/acts/$form/acts.pt" --json
  same "$(tail -1 "$T/out" | field kv_scales_per_layer)" 1 "scales a layer"
  cmp "$T/o-kv/model.safetensors" "$T/o-$form/model.safetensors" || fail "acts.pt of $form gives other scales"
done
cp "$T/acts/lmquant/acts.pt" "$T/postscale-g128/"
run 0 convert --model "$T/postscale-g128" --output "$T/o-dir" --kv-scales "$T/postscale-g128"
cmp "$T/o-kv/model.safetensors" "$T/o-dir/model.safetensors" || fail "acts.pt beside model.pt gives other scales"
run 0 info --model "$T/o-dir" --export-kv-scales "$T/exported.json"
rm "$T/postscale-g128/acts.pt"
"$python" - "$T/acts" <<'P'
import os, sys, zipfile
folder = sys.argv[1]
source = os.path.join(folder, "lmquant", "acts.pt")
def rewrite(name, change=lambda n, b: (n, b), method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(os.path.join(folder, name), "w", method) as new:
        for entry in old.namelist():
            new.writestr(*change(entry, old.read(entry)))
rewrite("missing.pt", lambda n, b: (n, b.replace(b"layers.1.self_attn.v_proj", b"layers.1.self_attn.w_proj")))
rewrite("zero.pt", lambda n, b: (n, bytes(4) if n == "archive/data/0" else b))
rewrite("infinite.pt", lambda n, b: (n, b"\0\0\x80\x7f" if n == "archive/data/0" else b))
rewrite("call.pt", lambda n, b: (n, b.replace(b"collections\nOrderedDict", b"subprocess\ngetoutput")))
rewrite("absolute.pt", lambda n, b: (n.replace("archive/version", "/etc/version"), b))
rewrite("bomb.pt", lambda n, b: (n, bytes(1 << 28) if n == "archive/data/0" else b), zipfile.ZIP_DEFLATED)
P
faults=(missing "layers.1.self_attn.v_proj.output has no dynamic_range" zero "layers.0.self_attn.k_rotary_emb.output has no dynamic_range"
  infinite "k_rotary_emb.output has a dynamic_range that makes no scale" call "subprocess.getoutput" absolute "absolute name" bomb "compressed")
for ((i = 0; i < ${#faults[@]}; i += 2)); do
  run 1 convert --model "$T/postscale-g128" --output "$T/no" --kv-scales "$T/acts/${faults[i]}.pt"
  says "$T/err" "acts/${faults[i]}.pt: .*${faults[i + 1]}"
  [ -e "$T/no" ] && fail "${faults[i]}: something was left behind"
done
# The same archives as checkpoints.
for archive in call absolute bomb; do
  mkdir "$T/hostile-$archive" && cp "$T/postscale-g128/config.json" "$T/hostile-$archive/"
  cp "$T/acts/$archive.pt" "$T/hostile-$archive/pytorch_model.bin"
  run 1 convert --model "$T/hostile-$archive" --output "$T/no"
  says "$T/err" "pytorch_model.bin: .*(subprocess.getoutput|absolute name|compressed)"
done

"$python" "$IMPORT" check "${pairs[@]}" >"$T/checked" 2>&1 || fail "$(tail -1 "$T/checked")"
same "$(lines "$T/checked")" $((${#pairs[@]} / 2)) "outputs that the oracle saw"

# Faults: the input, and what is said of it.
faults=(
  "lmquant-g128:off-grid" "layers.1.self_attn.k_proj: row 7, column 9: .*not .*scale.0"
  "postscale-channel:off-grid" "layers.1.self_attn.k_proj: row 7, column 9: .*grid"
  "lmquant-channel:no-scale" "scale.pt has no tensor model.layers.1.self_attn.k_proj.weight.scale.0"
  "lmquant-channel:scale-shape" "k_proj.weight.scale.0 has 4 dimensions.*expected"
  "lmquant-channel:scale-zero" "k_proj: row 5: weight.scale.0 is 0"
  "lmquant-channel:extra-scale" "scale.pt.*model.layers.2.mlp.up_proj.weight.scale.0 has no place"
  "lmquant-g128:mixed-levels" "k_proj has no weight.scale.1"
  "lmquant-g128:no-weight" "model.pt.*no tensor model.layers.1.self_attn.k_proj.weight"
  "lmquant-g128:extra-tensor" "q_norm.weight has no place"
  "gptq:no-tensor" "no tensor model.layers.1.self_attn.k_proj.qzeros"
  "gptq:shape" "k_proj.scales has shape \[2, 120\].*\[2, 128\]"
  "gptq:type" "k_proj: qweight, qzeros and scales are F32"
  "gptq:negative" "k_proj: row 3: a scale is negative or not finite"
  "gptq:infinite" "k_proj: row 3: a scale is negative or not finite"
  "gptq:group-index" "k_proj.g_idx: input 5 is in group 77 of 2"
  "gptq:extra-tensor" "q_norm.weight has no place"
  "gptq-exact:bits" "8 bits"
  "gptq-exact:group" "group_size 64, but"
  "gptq-exact:method" "bitsandbytes"
  "gptq-exact:format" "marlin"
  "gptq-exact:other" "\"awq\", but the tensors are laid out as GPTQ"
  "gptq-exact:nonsense" "whole numbers"
  "awq-exact:no-tensor" "no tensor model.layers.1.self_attn.k_proj.qzeros"
)
names=()
for ((i = 0; i < ${#faults[@]}; i += 2)); do names+=("${faults[i]}"); done
"$python" "$IMPORT" make "$T" "${names[@]}"
for ((i = 0; i < ${#faults[@]}; i += 2)); do
  run 1 convert --model "$T/${faults[i]}" --output "$T/no"
  says "$T/err" "${faults[i + 1]}"
  [ -e "$T/no" ] && fail "${faults[i]}: something was left behind"
done
mv "$T/bare/model.pt" "$T/bare/other.pt"
run 1 convert --model "$T/bare" --config "$T/postscale-g128" --output "$T/no"
says "$T/err" "scale.pt but no model.pt"
run 1 convert --model "$T/awq" --output "$T/no" --precision w8a8
says "$T/err" "asks for 8-bit weights"
run 1 convert --model "$T/awq" --output "$T/no" --group-size -1
says "$T/err" "groups of 128"
run 1 convert --model "$T/awq" --output "$T/o-awq"
says "$T/err" "overwrite"
run 1 convert --model "$T/awq" --output "$T/awq" --overwrite
says "$T/err" "source itself"
[ -e "$T/no" ] && fail "something was left behind"
run 2 convert --model "$T/awq"
finish
