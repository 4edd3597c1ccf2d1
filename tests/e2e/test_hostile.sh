# test_hostile.sh - damaged and malicious model directories: each ends in one clear message and exit code 1, never in a signal.
. "$(dirname "$0")/lib.sh"
need_model
# fresh: $T/m is the model again, made of links; a test replaces one file.
fresh() { rm -rf "$T/m" && mkdir "$T/m" && for file in "$MODEL"/*; do ln -s "$(readlink -f "$file")" "$T/m/"; done; }
# refused NAME: info or generate must refuse the directory.
refused() {
  timeout 60 "$Q" generate --model "$T/m" --prompt hello --max-tokens 2 --json >"$T/out" 2>"$T/err"
  local code=$?
  [ "$code" = 1 ] || fail "$1: exit code $code: $(head -c 200 "$T/err")"
  [ -s "$T/out" ] && fail "$1: output"
  says "$T/err" "^quattuor generate: .{10}"
  timeout 60 "$Q" info --model "$T/m" --json >"$T/out" 2>"$T/err"
  code=$?
  [ "$code" = 0 ] || [ "$code" = 1 ] || fail "$1: info ends with $code"
}
replace() { rm -f "$T/m/$1"; cat >"$T/m/$1"; }

for bytes in 0 7 8 9 100 5000 1000000; do
  fresh
  head -c $bytes "$MODEL/model.safetensors" | replace model.safetensors
  refused "weights cut after $bytes bytes"
done
fresh
{ printf '\377\377\377\377\377\377\377\177'; head -c 1000 /dev/zero; } | replace model.safetensors
refused "a header of 2^63 bytes"
fresh
{ printf '\020\047\000\000\000\000\000\000'; printf '[%.0s' $(seq 10000); } | replace model.safetensors
refused "a header of ten thousand brackets"
for config in '' '{' '[]' '{}' '{"architectures":["Nothing"]}' "$(printf '[%.0s' $(seq 100000))"; do
  fresh
  printf '%s' "$config" | replace config.json
  refused "config.json: ${config:0:40}"
done
for change in 's/"hidden_size": *[0-9]*/"hidden_size": 1073741824/' 's/"num_hidden_layers": *[0-9]*/"num_hidden_layers": -3/' \
  's/"num_attention_heads": *[0-9]*/"num_attention_heads": 7/' 's/"vocab_size": *[0-9]*/"vocab_size": 99999999999/' \
  's/"head_dim": *[0-9]*/"head_dim": 0/' 's/"intermediate_size": *[0-9]*/"intermediate_size": 1440/' \
  's/"num_hidden_layers": *[0-9]*/"num_hidden_layers": 9/'; do
  fresh
  sed "$change" "$MODEL/config.json" | replace config.json
  cmp -s "$MODEL/config.json" "$T/m/config.json" && fail "nothing changed: $change"
  refused "$change"
done
for tokenizer in '' '{' '{"model":{}}' '{"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}' \
  '{"model":{"type":"BPE","vocab":{"a":2147483647},"merges":["a a"]}}'; do
  fresh
  printf '%s' "$tokenizer" | replace tokenizer.json
  refused "tokenizer.json: $tokenizer"
done
fresh
rm "$T/m/model.safetensors" && mkdir "$T/m/model.safetensors"
refused "weights that are a folder"
# Templates: endless work, endless output, deep nesting.
for template in '{% for a in range(1000000) %}{% for b in range(1000000) %}x{% endfor %}{% endfor %}' '{{ raise_exception(\"no\") }}' \
  '{% for' '{{ messages[99].content }}{{ 1/0 }}' "$(printf '(%.0s' $(seq 5000))"; do
  fresh
  printf '{"bos_token":"<|begin_of_text|>","chat_template":"{{ %s"}' "$template" | replace tokenizer_config.json
  timeout 60 "$Q" generate --model "$T/m" --prompt hello --chat --max-tokens 2 --json >"$T/out" 2>"$T/err"
  code=$?
  [ "$code" = 0 ] || [ "$code" = 1 ] || fail "template ${template:0:40}: exit code $code"
done
# Long and strange prompts.
head -c 3000000 /dev/zero | tr '\0' 'a' >"$T/long"
timeout 60 "$Q" tokenize --model "$MODEL" --file "$T/long" >"$T/out" 2>"$T/err" || fail "3 MB of one letter: $(cat "$T/err")"
{ printf '{"prompt":"'; cat "$T/long"; echo '"}'; } >"$T/long.jsonl"
run 1 generate --model "$MODEL" --prompts-file "$T/long.jsonl" --max-tokens 2
says "$T/err" "8192|context|too long|tokens"
run 1 generate --model "$MODEL" --prompt x --kv-bytes 1000
run 0 generate --model "$MODEL" --prompt x --prompt "" --prompt " " --max-tokens 2 --json --max-num-seqs 1 --kv-pages 200
finish
