# test_generate.sh - quattuor generate: the shape of its JSON, several prompts at once, files of prompts, ends, interruption.
. "$(dirname "$0")/lib.sh"
need_model
g() { run 0 generate --model "$MODEL" "$@"; }

# One prompt: text on stdout, a summary on stderr, the same text as in JSON.
g --prompt "The old man" --max-tokens 12
says "$T/err" "12 tokens generated"
text=$(cat "$T/out")
g --prompt "The old man" --max-tokens 12 --json
same "$(lines "$T/out")" 1 "lines of JSON"
for name in id index prompt_tokens token_ids text finish_reason; do says "$T/out" "\"$name\":"; done
same "$(field finish_reason <"$T/out")" '"length"' "finish_reason"
same "$(field id <"$T/out")" 0 "id"
ids=$(field token_ids <"$T/out")
same "$(echo "$ids" | tr ',' '\n' | wc -l)" 12 "number of token_ids"
"$Q" tokenize --model "$MODEL" --decode "$ids" >"$T/decoded"
same "$(cat "$T/decoded")" "$text" "decoded token_ids"
n_prompt=$("$Q" tokenize --model "$MODEL" --bos --json "The old man" | field n_tokens)
same "$(field prompt_tokens <"$T/out")" "$n_prompt" "prompt_tokens"
grep -q logprobs "$T/out" && fail "logprobs without being asked"

# Many at once: in the order given, and the same tokens as alone.
prompts=()
for word in The When A "In the" She "Once upon" It Nobody; do prompts+=(--prompt "$word morning"); done
g "${prompts[@]}" --max-tokens 10 --json
same "$(lines "$T/out")" 8 "lines for 8 prompts"
same "$(grep -oE '^\{"id":[0-9]+' "$T/out" | paste -sd,)" '{"id":0,{"id":1,{"id":2,{"id":3,{"id":4,{"id":5,{"id":6,{"id":7' "order"
cp "$T/out" "$T/together"
g --prompt "Nobody morning" --max-tokens 10 --json
same "$(field token_ids <"$T/out")" "$(tail -1 "$T/together" | field token_ids)" "tokens alone and among others"
g "${prompts[@]}" --max-tokens 4
same "$(grep -c '^=== ' "$T/out")" 8 "headings of 8 prompts"

# n, seeds, log-probabilities.
g --prompt Hello --n 3 --temperature 1 --seed 7 --max-tokens 8 --json --logprobs 2
same "$(lines "$T/out")" 3 "lines for n 3"
same "$(grep -oE '"index":[0-9]' "$T/out" | paste -sd,)" '"index":0,"index":1,"index":2' "index"
same "$(grep -oE '"top":\[\{[^]]*\}\]' "$T/out" | head -1 | grep -o logprob | wc -l)" 2 "number of best tokens"
same "$(head -1 "$T/out" | grep -oE '"token_id":[0-9]+,"logprob":[^,]*,"top"' | wc -l)" "$(head -1 "$T/out" | field token_ids | tr ',' '\n' | wc -l)" \
  "a log-probability for each token"
cp "$T/out" "$T/first"
g --prompt Hello --n 3 --temperature 1 --seed 7 --max-tokens 8 --json --logprobs 2
cmp -s "$T/out" "$T/first" || fail "the same seed gave another text"
[ "$(sed -n 1p "$T/first" | field token_ids)" != "$(sed -n 2p "$T/first" | field token_ids)" ] || fail "two completions are equal"

# Stops: a string that occurs in the greedy text ends it, and is not part of it.
word=$(echo "$text" | tr -s ' ' '\n' | sed -n 4p)
g --prompt "The old man" --max-tokens 12 --stop "$word" --json
same "$(field finish_reason <"$T/out")" '"stop"' "finish_reason of a stop string"
field text <"$T/out" | grep -qF -- "$word" && fail "the stop string is in the text"
first=$(echo "$ids" | tr -d '[]' | cut -d, -f3)
g --prompt "The old man" --max-tokens 12 --stop-token "$first" --json
same "$(field finish_reason <"$T/out")" '"stop"' "finish_reason of a stop token"

# Files of prompts.
cat >"$T/p.jsonl" <<'J'
{"id":"a","prompt":"The old man","more":[1]}

{"id":17,"messages":[{"role":"user","content":"hello"}]}
{"prompt":"Zero \u0000 byte"}
J
g --prompts-file "$T/p.jsonl" --max-tokens 3 --json
same "$(grep -oE '^\{"id":[^,]*' "$T/out" | paste -sd' ')" '{"id":"a" {"id":17 {"id":2' "ids of a file"
g --prompts-file - --max-tokens 3 --json <"$T/p.jsonl"
same "$(lines "$T/out")" 3 "prompts from standard input"
g --prompt hello --chat --system "Be brief." --max-tokens 3 --json
chat=$(field prompt_tokens <"$T/out")
g --prompt hello --max-tokens 3 --json
[ "$chat" -gt "$(field prompt_tokens <"$T/out")" ] || fail "--chat added nothing to the prompt"
n=0
for bad in '{"id":' '[]' '{"id":1}' '{"prompt":3}' '{"prompt":"x","messages":[]}' '{"messages":[]}' '{"messages":["x"]}' \
  '{"messages":[{"content":"x"}]}' '{"prompt":"x","id":{}}' '{"prompt":"x","prompt":"y"}' '{"prompt":"x"} x' '{"prompt":"x","tools":3}' \
  "{\"prompt\":\"$(printf '\377')\"}" "$(printf '[%.0s' $(seq 5000))"; do
  { echo '{"prompt":"fine"}'; echo "$bad"; } >"$T/bad.jsonl"
  run 1 generate --model "$MODEL" --prompts-file "$T/bad.jsonl" --json
  says "$T/err" "bad.jsonl, line 2: "
  [ -s "$T/out" ] && fail "output in spite of a bad line: $bad"
  n=$((n + 1))
done
run 1 generate --model "$MODEL" --prompts-file "$T/none.jsonl"
: >"$T/empty.jsonl"
run 1 generate --model "$MODEL" --prompts-file "$T/empty.jsonl"
says "$T/err" "empty"

# What cannot run is refused with the reason; the others run.
printf 'x\377y' >"$T/bytes"
run 1 generate --model "$MODEL" --prompt "$(cat "$T/bytes")" --max-tokens 2
says "$T/err" "UTF-8"
{ echo '{"id":"long","prompt":"'"$(printf 'word %.0s' $(seq 300))"'"}'; echo '{"id":"short","prompt":"word"}'; } >"$T/long.jsonl"
run 1 generate --model "$MODEL" --max-model-len 100 --prompts-file "$T/long.jsonl" --max-tokens 3 --json
same "$(lines "$T/out")" 2 "lines when one is refused"
same "$(head -1 "$T/out" | field finish_reason)" '"error"' "finish_reason of the refused"
says "$T/out" '"id":"short".*"length"'

# A pool that is far too small gives the same tokens.
g "${prompts[@]}" --max-tokens 10 --json --kv-pages 3 --max-model-len 128
same "$(grep -oE '"token_ids":[^]]*' "$T/out")" "$(grep -oE '"token_ids":[^]]*' "$T/together")" "tokens from a small pool"

# Output that cannot be written; Ctrl-C.
if [ -e /dev/full ]; then
  "$Q" generate --model "$MODEL" --prompt x --max-tokens 3 >/dev/full 2>"$T/err"
  same $? 1 "exit code with a full disk"
  says "$T/err" "cannot write"
fi
(set -o pipefail; "$Q" generate --model "$MODEL" --prompt x --prompt y --ignore-eos --max-tokens 20 --json 2>"$T/err" | true)
code=$?
[ "$code" = 1 ] || [ "$code" = 0 ] || fail "exit code $code with a closed pipe"
timeout --preserve-status -s INT 2 "$Q" generate --model "$MODEL" --prompt x --prompt y --ignore-eos --max-tokens 7000 --json >"$T/out" 2>"$T/err"
code=$?
if grep -q '"finish_reason":"cancelled"' "$T/out"; then
  same "$code" 130 "exit code after Ctrl-C"
  same "$(lines "$T/out")" 2 "lines after Ctrl-C"
else
  echo "note: Ctrl-C came before or after the run (exit code $code)" >&2
fi
finish
