# test_serve.sh - quattuor serve with nothing but a shell: requests by hand, hostile bytes, the end by signal. What OpenAI's own
# client thinks is oracle_openai.py's question; it runs at the end where that client is installed.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
need_model
export LC_ALL=C # lengths are in bytes

serve --model "$MODEL" --served-model-name demo --max-body 64K --ping 1
says "$T/log" "try: curl http://127.0.0.1:$port/v1/chat/completions"
run 1 serve --model "$MODEL" --port "$port"
says "$T/err" "port $port of 127.0.0.1 is taken: .* --port N"

# ask TEXT: sends bytes (printf escapes), reads until the server closes or 30 s have gone; the answer is in $T/out.
ask() {
  exec 9<>"/dev/tcp/127.0.0.1/$port" || { fail "cannot connect"; return; }
  printf "$1" >&9
  timeout 30 cat <&9 >"$T/out"
  exec 9<&- 9>&-
}
C='Connection: close\r\nHost: x\r\n'
# post PATH JSON: a POST with this body.
post() {
  local text=${2//\\/\\\\}
  ask "POST $1 HTTP/1.1\r\n${C}Content-Type: application/json\r\nContent-Length: ${#2}\r\n\r\n${text//%/%%}"
}

ask "GET /health HTTP/1.1\r\n$C\r\n"
says "$T/out" '^HTTP/1.1 200 OK'
says "$T/out" '"status":"ok"'
ask "HEAD /v1/models HTTP/1.1\r\n$C\r\n"
says "$T/out" '^Content-Length: [1-9]'
grep -q '"data"' "$T/out" && fail "HEAD has a body"

"$Q" generate --model "$MODEL" --prompt "The old man" --max-tokens 12 --json >"$T/wanted" 2>"$T/err"
wanted=$(field text <"$T/wanted")
body='{"prompt":"The old man","max_tokens":12,"temperature":0,"top_p":1}'
post /v1/completions "$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion"
# the body in chunks, after an Expect, in HTTP/1.0, and two requests at once on one connection
ask "POST /v1/completions HTTP/1.1\r\n${C}Transfer-Encoding: chunked\r\n\r\n5\r\n${body:0:5}\r\n$(printf %x $((${#body} - 5)))\r\n${body:5}\r\n0\r\n\r\n"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a chunked body"
ask "POST /v1/completions HTTP/1.0\r\nContent-Length: ${#body}\r\n\r\n$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "HTTP/1.0"
ask "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ${#body}\r\n\r\n${body}GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n$C\r\n"
same "$(grep -o 'HTTP/1.1 200' "$T/out" | wc -l | tr -d ' ')" 3 "answers to three pipelined requests"
says "$T/out" '"version"'
stream='{"prompt":"The old man","max_tokens":12,"temperature":0,"top_p":1,"stream":true}'
post /v1/completions "$stream"
says "$T/out" '^data: \[DONE\]'
same "\"$(grep -o '"text":"[^"]*"' "$T/out" | cut -d'"' -f4 | tr -d '\n')\"" "$wanted" "a stream"
ask "POST /v1/completions HTTP/1.0\r\nContent-Length: ${#stream}\r\n\r\n$stream"
says "$T/out" '^data: \[DONE\]'
grep -q chunked "$T/out" && fail "HTTP/1.0 got chunks"

# every metric that the dashboard draws is there
ask "GET /metrics HTTP/1.1\r\n$C\r\n"
for name in $(grep -oE '(vllm|quattuor):[a-z0-9_]+' "$SRC/deploy/grafana.json" | sort -u); do
  grep -q "^${name}[{ ]" "$T/out" || fail "deploy/grafana.json draws $name, which /metrics does not have"
done

# an answer that must fit a schema
post /v1/chat/completions '{"messages":[{"role":"user","content":"Hello"}],"max_tokens":100,"seed":1,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","properties":{"meal":{"enum":["lunch","dinner"]},"people":{"type":"integer","minimum":1,"maximum":9}},"required":["meal","people"]}}}}'
tail -1 "$T/out" | grep -qE '"content":"\{[ nt\\]*\\"meal\\"[ nt\\]*:[ nt\\]*\\"(lunch|dinner)\\"[ nt\\]*,[ nt\\]*\\"people\\"[ nt\\]*:[ nt\\]*[1-9][ nt\\]*\}"' ||
  fail "an answer by schema: $(tail -1 "$T/out")"

# errors in OpenAI's shape
post /v1/completions '{"prompt":"x","temperature":-3}'
says "$T/out" '^HTTP/1.1 400'
says "$T/out" '"type":"invalid_request_error","param":"temperature"'
post /v1/chat/completions 'not json'
says "$T/out" '^HTTP/1.1 400'
post /v1/embeddings '{}'
says "$T/out" '^HTTP/1.1 501'
ask "GET /v1/nothing HTTP/1.1\r\n$C\r\n"
says "$T/out" '^HTTP/1.1 404'
ask "DELETE /v1/models HTTP/1.1\r\n$C\r\n"
says "$T/out" '^Allow: GET'

ask "POST /v1/completions HTTP/1.1\r\n${C}Content-Type: text/plain\r\nContent-Length: ${#body}\r\n\r\n$body"
says "$T/out" '^HTTP/1.1 415'
post /v1/completions '{"prompt":"The old man","max_tokens":0,"echo":true}'
says "$T/out" '"text":"The old man".*"finish_reason":"length".*"completion_tokens":0'

# hostile bytes
ask 'nonsense\r\n'
says "$T/out" '^HTTP/1.1 400'
ask '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n'
says "$T/out" '^HTTP/1.1 400'
ask 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
says "$T/out" '^HTTP/1.1 505'
ask "GET /$(head -c 5000 /dev/zero | tr '\0' a) HTTP/1.1\r\n\r\n"
says "$T/out" '^HTTP/1.1 414'
ask "GET / HTTP/1.1\r\nX: $(head -c 1000000 /dev/zero | tr '\0' a)\r\n\r\n"
says "$T/out" '^HTTP/1.1 431'
printf -v lines 'X-%d: y\\r\\n' $(seq 100000)
ask "GET / HTTP/1.1\r\nHost: x\r\n$lines\r\n"
says "$T/out" '^HTTP/1.1 431'
ask "POST /v1/completions HTTP/1.1\r\n${C}Content-Length: 104857600\r\n\r\n"
says "$T/out" '^HTTP/1.1 413'
ask "POST /v1/completions HTTP/1.1\r\n${C}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
says "$T/out" '^HTTP/1.1 400'
{ # a hundred megabytes, announced by nothing
  exec 9<>"/dev/tcp/127.0.0.1/$port"
  printf "POST /v1/completions HTTP/1.1\r\n${C}Transfer-Encoding: chunked\r\n\r\n6400000\r\n" >&9
  head -c 104857600 /dev/zero >&9
  timeout 30 cat <&9 >"$T/out"
  exec 9<&- 9>&-
} 2>/dev/null
says "$T/out" '^HTTP/1.1 413'
deep=$(head -c 60000 /dev/zero | tr '\0' '[')
post /v1/completions "$deep"
says "$T/out" 'nested deeper'
for bytes in '\xff' '\xc0\x80' '\xed\xa0\x80' '\xf4\x90\x80\x80' '\xe2\x82'; do # no UTF-8
  text=$(printf "$bytes")
  post /v1/completions "{\"prompt\":\"a${text}b\"}"
  says "$T/out" '^HTTP/1.1 400'
  says "$T/out" 'not valid JSON'
  ask "GET /v1/models/${text} HTTP/1.1\r\n$C\r\n"
  says "$T/out" '^HTTP/1.1 40[04]'
done
post /v1/completions '{"prompt":"\ud800"}' # half a character
says "$T/out" '^HTTP/1.1 400'
# each level names the one below it twice: written out it would be 2^40 schemas
defs='"d0":{"type":"string"}'
for i in $(seq 40); do defs="$defs,\"d$i\":{\"allOf\":[{\"\$ref\":\"#/\$defs/d$((i - 1))\"},{\"\$ref\":\"#/\$defs/d$((i - 1))\"}]}"; done
post /v1/chat/completions "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"\$defs\":{$defs},\"\$ref\":\"#/\$defs/d40\"}}}}"
says "$T/out" '^HTTP/1.1 400'
says "$T/out" '"param":"response_format.json_schema.schema"'
printf -v stops '"s",%.0s' $(seq 3000)
post /v1/completions "{\"prompt\":\"x\",\"stop\":[${stops%,}]}"
says "$T/out" '"param":"stop"'
for n in 1e400 -1e400 99999999999999999999 -9223372036854775809 -1 0.1 0.1e; do
  post /v1/completions "{\"prompt\":\"x\",\"max_tokens\":$n}"
  says "$T/out" '^HTTP/1.1 400'
done
kill -0 $server 2>/dev/null || fail "the server has died: $(tail -3 "$T/log")"

# bytes that drip in, slower than anyone types, hold up nobody and are answered at last
exec 8<>"/dev/tcp/127.0.0.1/$port"
printf -v text "POST /v1/completions HTTP/1.1\r\n${C}Content-Length: ${#body}\r\n\r\n$body"
for ((i = 0; i < ${#text}; i += 3)); do
  printf '%s' "${text:i:3}" >&8
  [ $((i % 30)) = 0 ] && { ask "GET /health HTTP/1.1\r\n$C\r\n"; says "$T/out" '^HTTP/1.1 200'; }
done
timeout 30 cat <&8 >"$T/out"
exec 8<&- 8>&-
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion that dripped in"

# connections that only hang around do not stop others
for i in $(seq 20); do eval "exec $((20 + i))<>/dev/tcp/127.0.0.1/$port"; printf 'POST /v1/comp' >&$((20 + i)); done
post /v1/completions "$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion beside twenty half-open connections"
for i in $(seq 20); do eval "exec $((20 + i))<&-"; done

says "$T/log" '"POST /v1/completions" 200 [0-9.]+s req-[0-9a-f]+ prompt=4 cached=[0-9]+ output=12 finish=length first='
start=$SECONDS
stop
[ $((SECONDS - start)) -lt 10 ] || fail "the idle server took $((SECONDS - start)) s to end"
says "$T/log" 'stopped'

# a log that cannot be written stops nothing
if [ -c /dev/full ]; then
  "$Q" serve --model "$MODEL" --port "$port" 2>/dev/full &
  server=$!
  for _ in $(seq 300); do
    (exec 9<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
    sleep 0.1
  done
  post /v1/completions "$body"
  same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion with a full disk under the log"
  ask "GET /health HTTP/1.1\r\n$C\r\n"
  says "$T/out" '^HTTP/1.1 200 OK'
  kill -INT $server
  wait $server
  same $? 0 "exit code after SIGINT"
fi

# keys: every route but /health and the page wants one, and a wrong one opens nothing
printf '# team\nsk-one\n' >"$T/keys"
serve --model "$MODEL" --served-model-name demo --api-key "$T/keys"
for path in /v1/models /v1/models/demo /metrics /version /openapi.json /nothing; do
  ask "GET $path HTTP/1.1\r\n$C\r\n"
  says "$T/out" '^HTTP/1.1 401'
done
for key in 'Bearer sk-on' 'Bearer sk-one1' 'Bearer sk-One' 'Bearer ' 'Bearer' 'sk-one' 'Basic sk-one' 'Bearer # team'; do
  ask "GET /v1/models HTTP/1.1\r\n${C}Authorization: $key\r\n\r\n"
  says "$T/out" '^HTTP/1.1 401'
done
post /v1/completions "$body"
says "$T/out" '^HTTP/1.1 401'
ask "GET /health HTTP/1.1\r\n$C\r\n"
says "$T/out" '^HTTP/1.1 200'
ask "GET /v1/models HTTP/1.1\r\n${C}Authorization: Bearer sk-one\r\n\r\n"
says "$T/out" '^HTTP/1.1 200'
stop

# a chat template that loops: its work is bounded, and others are answered meanwhile
mkdir "$T/loops"
for file in "$MODEL"/*; do ln -s "$(realpath "$file")" "$T/loops/"; done
rm -f "$T/loops/chat_template.jinja"
echo '{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% set x = a * b * c %}{% endfor %}{% endfor %}{% endfor %}' \
  >"$T/loops/chat_template.jinja"
serve --model "$T/loops" --served-model-name demo
chat='{"messages":[{"role":"user","content":"Hello"}],"max_tokens":4}'
for i in $(seq 4); do eval "exec $((20 + i))<>/dev/tcp/127.0.0.1/$port"; printf "POST /v1/chat/completions HTTP/1.1\r\n${C}Content-Length: ${#chat}\r\n\r\n$chat" >&$((20 + i)); done
ask "GET /health HTTP/1.1\r\n$C\r\n"
says "$T/out" '^HTTP/1.1 200'
for i in $(seq 4); do
  timeout 60 cat <&$((20 + i)) >"$T/out"
  eval "exec $((20 + i))<&-"
  says "$T/out" '^HTTP/1.1 400'
  says "$T/out" '"param":"messages"'
done
post /v1/completions "$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion beside templates that loop"
stop

# the command line
run 1 serve --model "$MODEL" --port 0 --api-key "$T/none"
says "$T/err" 'none'
: >"$T/empty"
run 1 serve --model "$MODEL" --port 0 --api-key "$T/empty"
says "$T/err" 'no key'
run 1 serve --model "$MODEL" --host 999.1.1.1
says "$T/err" '999.1.1.1'
run 2 serve --port 99999
run 2 serve --max-body 1

python=${QUATTUOR_PYTHON:-python3}
if "$python" -c 'import openai' 2>/dev/null; then
  "$python" "$SRC/tests/e2e/oracle_openai.py" "$Q" "$MODEL" || fail "the openai client disagrees"
else
  echo "the openai client is not installed: oracle_openai.py is left out" >&2
fi
finish
