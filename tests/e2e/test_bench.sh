# test_bench.sh - quattuor bench: the fields of its JSON, random weights in every precision, QServe's spellings and variables.
. "$(dirname "$0")/lib.sh"
cat >"$T/tiny.json" <<'J'
{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,"intermediate_size":512,"num_hidden_layers":2,
 "num_attention_heads":4,"num_key_value_heads":2,"head_dim":64,"vocab_size":512,"max_position_embeddings":512,"rms_norm_eps":1e-5,
 "rope_theta":10000.0,"tie_word_embeddings":false}
J
b() { run 0 bench --config "$T/tiny.json" --json "$@"; }

b --batch 3 --prompt-len 40 --gen-len 8 --rounds 2
same "$(lines "$T/out")" 1 "lines of JSON"
for name in model precision group_size batch prompt_len gen_len throughput_tok_s prefill_s decode_ms_per_step decode_tok_s kv_bytes_per_token \
  weight_bytes peak_rss_bytes device; do
  value=$(field $name <"$T/out")
  [ -n "$value" ] && [ "$value" != null ] && [ "$value" != 0 ] || fail "no $name in $(cat "$T/out")"
done
same "$(field precision <"$T/out")" '"w4a8kv4"' "default precision"
same "$(field group_size <"$T/out")" 128 "default group size"
same "$(field batch <"$T/out")" 3 "batch"
says "$T/out" '"rounds":\[\{.*\},\{.*\}\]'
says "$T/err" "Round 1 Throughput: [0-9.]+ tokens / second\."
for p in w4a8kv4 w4a8kv8 w4a8 w8a8kv4 w8a8kv8 w8a8 w16a16kv4 w16a16kv8 w16a16; do
  b --precision $p --batch 2 --prompt-len 8 --gen-len 3 --rounds 1
  case $p in *kv*) same "$(field precision <"$T/out")" "\"$p\"" "precision" ;; esac
done
# KV4: codes, scale and zero of K and V for 2 heads of 64 in 2 layers
b --precision w4a8kv4 --group-size -1 --batch 1 --prompt-len 8 --gen-len 3 --rounds 1 --lm-head int8
same "$(field kv_bytes_per_token <"$T/out")" $((2 * 2 * 2 * (64 / 2 + 4))) "KV bytes a token"
same "$(field group_size <"$T/out")" -1 "group size"

GLOBAL_BATCH_SIZE=2 GLOBAL_PROMPT_LEN=9 GLOBAL_GENERATE_LEN=4 NUM_GPU_PAGE_BLOCKS=20 \
  run 0 bench --config "$T/tiny.json" --json --rounds 1 --benchmarking --precision w4a8kv4 --group-size -1 --ifb-mode --max-num-seqs 2 \
  --max-num-batched-tokens 64 --chunk-prefill-size 1024000 --kv-quant-granularity fine_grained --omit-prompt
same "$(field batch <"$T/out")$(field prompt_len <"$T/out")$(field gen_len <"$T/out")" 294 "QServe's variables"
mkdir "$T/config-only" && cp "$T/tiny.json" "$T/config-only/config.json"
run 0 bench --model "$T/config-only" --json --rounds 1 --batch 1 --prompt-len 8 --gen-len 2
says "$T/err" "no weights"
run 0 bench --config "$T/tiny.json" --rounds 1 --batch 2 --prompt-len 8 --gen-len 4 --device reference
says "$T/out" "throughput"
b --rounds 1 --batch 2 --prompt-len 8 --gen-len 4 --profile
says "$T/out" '"operation":"attention"'
b --rounds 1 --batch 1 --prompt-len 8 --gen-len 1
same "$(field decode_ms_per_step <"$T/out")" null "no decoding, no figure"

run 1 bench --config "$T/none.json"
echo '{"hidden_size":' >"$T/bad.json"
run 1 bench --config "$T/bad.json"
says "$T/err" "bad.json"
b --rounds 1 --batch 1 --prompt-len 600 --gen-len 2 # random weights may go beyond the positions of the shape
run 1 bench --config "$T/tiny.json" --precision w5a5
run 1 bench --config "$T/tiny.json" --precision w8a8 --group-size 128
for shape in "$SRC"/shapes/*.json; do grep -q hidden_size "$shape" || fail "$shape"; done
finish
