# test_compare.sh - quattuor eval compare: a model against itself, against its own smaller cache, against its perplexity.
. "$(dirname "$0")/lib.sh"
need_model
for i in $(seq 16); do
  echo "It was on a cold morning in March that the two brothers, number $i, left the house by the river and walked to the station."
done >"$T/text"
c() { run 0 eval compare --text "$T/text" --window 128 --json "$@"; }
c --model "$MODEL" --model "$MODEL"
same "$(field mean <"$T/out")" "0.0" "KL of a model with itself"
same "$(field top1_agreement <"$T/out")" "1.0" "agreement of a model with itself"
same "$(field same_basis <"$T/out")" "true" "same_basis"
weights=$("$Q" info --model "$MODEL" --json | field precision | tr -d '"' | sed 's/kv.*//')
c --model "$MODEL" --model "$MODEL" --precision "${weights}kv16" --precision "${weights}kv4"
cp "$T/out" "$T/kv4"
awk -v k="$(field mean <"$T/kv4")" 'BEGIN { exit !(k > 0 && k < 1) }' || fail "KL of a 4-bit cache: $(field mean <"$T/kv4")"
same "$(grep -oE '"layer":' "$T/kv4" | wc -l)" "$(($("$Q" info --model "$MODEL" --json | field n_layers) + 1))" "layers"
run 0 eval ppl --model "$MODEL" --precision "${weights}kv4" --text "$T/text" --ctx 128 --json
same "$(field perplexity_b <"$T/kv4")" "$(field perplexity <"$T/out")" "perplexity of compare and of ppl"
run 0 eval compare --text "$T/text" --window 128 --tokens 256 --model "$MODEL" --model "$MODEL" --precision "${weights}kv16" --precision "${weights}kv4"
says "$T/out" "^254 tokens scored in 2 windows"
says "$T/out" "after layer"
if [ -f "$SHARED/models/demo-bf16/config.json" ]; then
  c --model "$SHARED/models/demo-bf16" --model "$MODEL" --no-layers
  same "$(field layers <"$T/out")" "[]" "--no-layers"
  # the same model with the channels of its residual stream reordered and negated: nothing to compare them by but angles
  if python3 -c 'import numpy' 2>"$T/err"; then
    python3 "$(dirname "$0")/make_permuted.py" "$SHARED/models/demo-bf16" "$T/permuted" || fail "make_permuted.py"
    run 0 eval compare --text "$T/text" --window 64 --tokens 128 --json --model "$SHARED/models/demo-bf16" --model "$T/permuted"
    same "$(field same_basis <"$T/out")" "false" "same_basis of a permuted model"
    says "$T/out" '"layer":7,"error":null,'
    awk -v k="$(field max <"$T/out")" 'BEGIN { exit !(k < 1e-4) }' || fail "KL $(field max <"$T/out") of a permuted model"
    grep -oE '"cosine_error":[^,]*' "$T/out" | cut -d: -f2 | awk '$1 > 1e-3 { exit 1 }' || fail "angles of a permuted model differ"
  fi
fi

run 2 eval compare --text "$T/text" --model "$MODEL"
says "$T/err" "--model A --model B"
run 2 eval compare --text "$T/text" --model "$MODEL" --model "$MODEL" --precision w4a8
says "$T/err" "both"
run 2 eval compare --model "$MODEL" --model "$MODEL"
says "$T/err" "--text"
run 1 eval compare --text "$T/text" --model "$MODEL" --model "$T/none"
says "$T/err" "model B: .*none"
run 1 eval compare --text "$T/text" --window 128000 --model "$MODEL" --model "$MODEL"
finish
