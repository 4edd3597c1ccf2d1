# test_bench_long.sh - quattuor bench --long: both sides over several lengths, from the demo model and from random weights; what does
# not fit is part of the result; which heads stream is said, and is the same each time; the plot; clear errors.
. "$(dirname "$0")/lib.sh"
cat >"$T/tiny.json" <<'J'
{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,"intermediate_size":512,"num_hidden_layers":2,
 "num_attention_heads":4,"num_key_value_heads":2,"head_dim":64,"vocab_size":512,"max_position_embeddings":512,"rms_norm_eps":1e-5,
 "rope_theta":10000.0,"tie_word_embeddings":false}
J
l() { run 0 bench --long --config "$T/tiny.json" --device cpu --gen-len 6 "$@"; }
count() { grep -oE -- "$2" "$1" | wc -l | tr -d ' '; }

# Three lengths, also beyond the shape's; the sides in turn, every round in the JSON.
l --lengths 1500,300,700 --rounds 3 --json --svg "$T/plot.svg" --dynamic-sparse-token-budget 256
same "$(lines "$T/out")" 1 "lines of JSON"
same "$(grep -oE '"length":[0-9]+' "$T/out" | paste -sd' ')" '"length":300 "length":700 "length":1500' "lengths in order"
same "$(count "$T/out" '"device_idle_share"')" 18 "rounds of all"
for name in prefill_s prefill_tok_s decode_ms_per_step decode_tok_s kv_pool_bytes prefill_gain decode_gain weight_bytes; do
  value=$(field $name <"$T/out")
  [ -n "$value" ] && [ "$value" != null ] && [ "$value" != 0 ] || fail "no $name in $(cat "$T/out")"
done
same "$(grep -oE ', (dense|sparse), round' "$T/err" | head -4 | tr -d '\n')" ", dense, round, sparse, round, sparse, round, dense, round" "turns"
# LServe's sparse side when nothing is said: half of the heads, both modes.
for pair in 'static_sparsity":0.5' 'context_mode":true' 'ctx_sink":128' 'ctx_local":8192' 'dec_sink":128' 'dec_local":256' 'decode_mode":1' \
  'token_budget":256' 'selector_interval":4' 'heads":"random"' 'n_streaming_heads":2'; do
  says "$T/out" "\"$pair"
done
streaming=$(field streaming <"$T/out")
same "$(echo "$streaming" | tr -cd 1 | wc -c | tr -d ' ')" 2 "streaming heads"
head -1 "$T/plot.svg" | grep -q '^<svg' && tail -1 "$T/plot.svg" | grep -q '</svg>' || fail "no drawing"
same "$(count "$T/plot.svg" '<polyline')" 4 "lines of the plot"
same "$(count "$T/plot.svg" '(dense|sparse), [0-9]+ tokens: [0-9.]+ (s|ms)')" 12 "points of the plot"
l --lengths 300 --rounds 1 --json --sparse
same "$(field streaming <"$T/out")" "$streaming" "the same heads"
grep -q '"dense":' "$T/out" && fail "--sparse runs the dense side"
l --lengths 300 --rounds 1 --json --dense
grep -q '"sparse":{' "$T/out" && fail "--dense runs the sparse side"
for seed in 1 2 3 4 5 6; do
  l --lengths 64 --rounds 1 --json --sparse --seed $seed
  field streaming <"$T/out"
done | sort -u >"$T/choices"
[ "$(lines "$T/choices")" -gt 1 ] || fail "the seed does not change the heads"

# One switch said: the others are off.
l --lengths 600 --rounds 1 --json --sparse-decode-mode 1 --dynamic-sparse-token-budget 128 --selector-heads each
says "$T/out" '"static_sparsity":0.0'
says "$T/out" '"selector_heads":"each"'
# The sparse pool holds less than the dense one when contexts are long against the window.
l --lengths 4000 --rounds 1 --json --static-sparsity 0.5 --sparse-context-mode --ctx-local-token 128 --max-num-batched-tokens 256
dense=$(grep -oE '"kv_pool_bytes":[0-9]+' "$T/out" | head -1 | cut -d: -f2)
sparse=$(grep -oE '"kv_pool_bytes":[0-9]+' "$T/out" | tail -1 | cut -d: -f2)
[ "$sparse" -lt $((dense * 2 / 3)) ] || fail "pools of $dense and $sparse bytes"

# A batch whose first sequences generate while the last prompts are read.
l --lengths 500 --rounds 1 --json --batch 4 --gen-len 3 --max-num-batched-tokens 128
grep -q '"decode_ms_per_step":null' "$T/out" && fail "no step of the whole batch"
same "$(grep -oE '"n_preemptions":[0-9]+' "$T/out" | sort -u)" '"n_preemptions":0' "preemptions"

# What cannot be measured does not end the rest: here a pool of 20 pages, 1,280 tokens.
l --lengths 200,6000 --rounds 2 --json --kv-pages 20
same "$(count "$T/out" '"error":"[^"]*20 pages')" 2 "lengths that do not fit"
same "$(count "$T/out" '"prefill_s":null')" 2 "their times"
same "$(count "$T/out" '"device_idle_share"')" 4 "rounds of the others"
run 1 bench --long --config "$T/tiny.json" --device cpu --lengths 6000 --kv-pages 20
says "$T/err" "nothing could be measured"

# The demo model, as a table.
need_model
run 0 bench --long --model "$MODEL" --device cpu --lengths 256,512 --gen-len 4 --rounds 1 --dynamic-sparse-token-budget 128 --ctx-local-token 64
same "$(count "$T/out" '^ +(256|512) \|( +[0-9.]+){2} +[0-9.]+x \|( +[0-9.]+){2} +[0-9.]+x \|')" 2 "lines of the table"
says "$T/out" "16 of 32 KV heads"
run 1 bench --long --model "$MODEL" --device cpu --lengths 256 --static-sparsity 0.5 --static-sparse-attn-load-dir "$T"
says "$T/err" "no .*full_attention_heads.tsv"
# Random weights have random heads without --long as well; a model does not.
run 0 bench --config "$T/tiny.json" --device cpu --json --rounds 1 --prompt-len 300 --gen-len 4 --static-sparsity 0.5
run 1 bench --model "$MODEL" --device cpu --rounds 1 --prompt-len 300 --gen-len 4 --static-sparsity 0.5
says "$T/err" "calibrate heads"

run 1 bench --long --config "$T/tiny.json" --lengths 12,x
says "$T/err" "lengths"
run 1 bench --long --config "$T/tiny.json" --device cpu --lengths 300 --dynamic-sparse-token-budget 100
says "$T/err" "multiple of 64"
run 2 bench --long --config "$T/tiny.json" --prompt-len 30
says "$T/err" "lengths"
run 2 bench --long --config "$T/tiny.json" --profile
run 2 bench --config "$T/tiny.json" --lengths 30
says "$T/err" "go with --long"
finish
