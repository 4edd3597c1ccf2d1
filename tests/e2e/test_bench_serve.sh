# test_bench_serve.sh - quattuor bench serve against quattuor serve: loops, traces, data sets, limits, refusals, what it writes.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
need_model

echo "a-key" >"$T/key"
unset OPENAI_API_KEY
serve --model "$MODEL" --api-key "$T/key" --max-num-seqs 4 --max-queue 4 --log-format none
# b CODE ARGUMENTS...
b() {
  local wanted=$1
  shift
  run "$wanted" bench serve --url "http://127.0.0.1:$port" --quiet "$@"
}
k() { b 0 --api-key "$T/key" --json - "$@"; }
is() { same "$(field "$1" <"$T/out")" "$2" "$1"; }
metric() { # metric NAME: the server's
  exec 9<>"/dev/tcp/127.0.0.1/$port"
  printf 'GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key\r\nConnection: close\r\n\r\n' >&9
  timeout 30 cat <&9 | grep "^$1{" | sed 's/.* //' | tr -d '\r'
  exec 9<&- 9>&-
}

# closed loop: counts are exact
k --concurrency 3 --requests 7 --input-len 20 --output-len 5
is requests 7
is completed 7
is failed 0
is input_tokens 140
is output_tokens 35
says "$T/out" '"errors":\{\}'
says "$T/out" '"model":"demo'
k --concurrency 2 --requests 3 --prompts words --input-len 20 --output-len 5
is output_tokens 15
# open loop, an objective that all or none can meet, a drawing; as many as the server takes, however slow it is
k --rate 50 --requests 8 --input-len 8 --output-len 3 --slo ttft=600000,tpot=600000,e2e=600000 --plot "$T/plot.svg"
is completed 8
is good_share 1.0
grep -q '^<svg' "$T/plot.svg" && tail -1 "$T/plot.svg" | grep -q '</svg>' || fail "no drawing"
k --concurrency 1 --requests 2 --input-len 8 --output-len 3 --slo ttft=0.000001
is good_share 0.0
# a trace of Azure's form, faster; the table and the JSON file
printf 'TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,30,4\n2023-11-16 18:15:47.68,10,6\n' >"$T/azure.csv"
b 0 --api-key "$T/key" --trace "$T/azure.csv" --speed 4 --json "$T/result.json"
says "$T/out" 'requests 2: 2 complete'
says "$T/out" '^time to first token '
grep -q '"input_tokens": 40' "$T/result.json" || fail "the JSON: $(cat "$T/result.json")"
# block hashes become equal beginnings: the server's cache finds the second request's first 512 tokens
printf '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n{"timestamp": 1, "input_length": 700, "output_length": 2, "hash_ids": [1, 3]}\n' >"$T/blocks.jsonl"
before=$(metric vllm:prefix_cache_hits_total)
k --trace "$T/blocks.jsonl" --concurrency 1
is completed 2
same "$(($(metric vllm:prefix_cache_hits_total) - before))" 512 "tokens found in the prefix cache"
# requests beyond the context
printf '0,100,20000\n' >"$T/long.csv"
b 1 --api-key "$T/key" --trace "$T/long.csv"
says "$T/err" '1 of 1 requests are longer than the context of 8192'
b 1 --api-key "$T/key" --trace "$T/blocks.jsonl" --max-model-len 650
says "$T/err" '1 of 2'
k --trace "$T/blocks.jsonl" --concurrency 1 --max-model-len 650 --too-long clip
is shortened 1
is input_tokens 1248
k --trace "$T/blocks.jsonl" --concurrency 1 --max-model-len 351 --too-long scale
is input_tokens 650
# prompts of one's own
printf '{"prompt": "The old man"}\n{"messages": [{"role": "user", "content": "Hello"}]}\n' >"$T/prompts.jsonl"
k --concurrency 1 --requests 4 --dataset "$T/prompts.jsonl" --output-len 3
is output_tokens 12
k --concurrency 1 --requests 2 --dataset "$T/prompts.jsonl" --output-len 3 --no-ignore-eos
is completed 2
# more than the server takes: 429s are counted, the rest is answered
k --concurrency 40 --requests 40 --input-len 64 --output-len 64
says "$T/out" '"http_429":[0-9]'
same "$(($(field completed <"$T/out") + $(field failed <"$T/out")))" 40 "completed and failed"
# no key, no server, no sense
b 1 --concurrency 1
says "$T/err" 'API key'
OPENAI_API_KEY=a-key run 0 bench serve --url "http://127.0.0.1:$port/v1/" --quiet --concurrency 1 --requests 1 --input-len 4 --output-len 2
b 1 --api-key "$T/key" --concurrency 1 --requests 1 --vocab 1000000 --input-len 64
says "$T/err" 'try --prompts words'
run 1 bench serve --url http://127.0.0.1:9 --concurrency 1
says "$T/err" 'no server at 127.0.0.1 port 9'
run 2 bench serve
says "$T/err" 'when shall requests come'
run 2 bench serve --trace "$T/azure.csv" --rate 3
run 1 bench serve --concurrency 1 --slo speed=3
says "$T/err" 'latency objective'
b 1 --api-key "$T/key" --trace "$T/key"
says "$T/err" 'no trace'
# Ctrl-C: what was measured so far
"$Q" bench serve --url "http://127.0.0.1:$port" --api-key "$T/key" --concurrency 2 --duration 600 --input-len 8 --output-len 8 --quiet >"$T/out" 2>"$T/err" &
bench=$!
before=$(metric vllm:generation_tokens_total)
until [ "$(metric vllm:generation_tokens_total)" -gt $((before + 20)) ]; do
  kill -0 $bench 2>/dev/null || break
  sleep 0.1
done
kill -INT $bench
wait $bench
same $? 130 "the exit code after Ctrl-C"
says "$T/out" 'then interrupted'

stop
finish
