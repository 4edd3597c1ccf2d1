# test_serve_tls.sh - quattuor serve --tls-cert --tls-key with a certificate made here, asked by openssl's own client: answers
# and streams as without TLS, large bodies both ways, what is no TLS, clients that vanish, and files that are wrong.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
need_model
command -v openssl >/dev/null || skip "no openssl command to make a certificate with"
export LC_ALL=C
trap '' PIPE # the server may close before all is said

certificate() { # certificate NAME: $T/NAME.pem and $T/NAME.key
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 \
    -keyout "$T/$1.key" -out "$T/$1.pem" 2>"$T/openssl" || { cat "$T/openssl" >&2; fail "openssl makes no certificate"; finish; }
}
certificate one
certificate other

run 2 serve --model "$MODEL" --port 0 --tls-cert "$T/one.pem"
says "$T/err" 'go together'
if ! start_server "$Q" "$T/log" --model "$MODEL" --tls-cert "$T/one.pem" --tls-key "$T/one.key" 2>"$T/err"; then
  grep -q "this build has no TLS" "$T/log" && skip "built without TLS"
  fail "no server: $(cat "$T/log")"
fi
stop
run 1 serve --model "$MODEL" --port 0 --tls-cert "$T/none" --tls-key "$T/one.key"
says "$T/err" 'tls-cert .*none'
run 1 serve --model "$MODEL" --port 0 --tls-cert "$T/one.key" --tls-key "$T/one.key"
says "$T/err" 'tls-cert'
run 1 serve --model "$MODEL" --port 0 --tls-cert "$T/one.pem" --tls-key "$T/other.key"
says "$T/err" 'tls-key'

serve --model "$MODEL" --served-model-name demo --tls-cert "$T/one.pem" --tls-key "$T/one.key"

client() { # client OPTIONS...: bytes of stdin to the server, its answer in $T/out, until it closes
  timeout 60 openssl s_client -quiet -connect "127.0.0.1:$port" -CAfile "$T/one.pem" -verify_ip 127.0.0.1 -verify_return_error "$@" \
    >"$T/out" 2>"$T/openssl"
}
C='Connection: close\r\nHost: x\r\n'
post() { printf "POST $1 HTTP/1.1\r\n${C}Content-Type: application/json\r\nContent-Length: ${#2}\r\n\r\n%s" "$2" | client; }

printf "GET /health HTTP/1.1\r\n$C\r\n" | client
says "$T/out" '^HTTP/1.1 200 OK'
says "$T/out" '"status":"ok"'
"$Q" generate --model "$MODEL" --prompt "The old man" --max-tokens 12 --json >"$T/wanted" 2>"$T/err"
wanted=$(field text <"$T/wanted")
body='{"prompt":"The old man","max_tokens":12,"temperature":0,"top_p":1}'
post /v1/completions "$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion over TLS"
post /v1/completions "${body%\}},\"stream\":true}"
says "$T/out" '^data: \[DONE\]'
same "\"$(grep -o '"text":"[^"]*"' "$T/out" | cut -d'"' -f4 | tr -d '\n')\"" "$wanted" "a stream over TLS"
# two requests on one connection, and a body that takes many records in, and an answer that takes many out
{ printf "GET /version HTTP/1.1\r\nHost: x\r\n\r\n"; printf "GET /openapi.json HTTP/1.1\r\n$C\r\n"; } | client
same "$(grep -o 'HTTP/1.1 200' "$T/out" | wc -l | tr -d ' ')" 2 "answers on one connection"
says "$T/out" '"securitySchemes".*}}$'
text=$(head -c 1500000 /dev/zero | tr '\0' 'a')
printf '{"prompt":"%s"}' "$text" >"$T/body"
{ printf "POST /tokenize HTTP/1.1\r\n${C}Content-Length: $(wc -c <"$T/body")\r\n\r\n"; cat "$T/body"; } | client
says "$T/out" '^HTTP/1.1 200'
tail -c 2 "$T/out" | grep -q ']}' || fail "a long answer is not whole: $(tail -c 50 "$T/out")"

# not TLS, an old TLS, a certificate that is not the client's
exec 9<>"/dev/tcp/127.0.0.1/$port"
printf "GET /health HTTP/1.1\r\n$C\r\n" >&9 2>/dev/null
timeout 30 cat <&9 >"$T/plain" 2>/dev/null
[ $? = 124 ] && fail "plain HTTP on a TLS port is not closed"
exec 9<&- 9>&-
grep -aq '200 OK' "$T/plain" && fail "plain HTTP was answered on a TLS port"
printf "GET /health HTTP/1.1\r\n$C\r\n" | client -tls1_1 -cipher 'ALL:@SECLEVEL=0'
grep -q '200 OK' "$T/out" && fail "TLS 1.1 was spoken"
printf "GET /health HTTP/1.1\r\n$C\r\n" | timeout 60 openssl s_client -quiet -connect "127.0.0.1:$port" -CAfile "$T/other.pem" \
  -verify_return_error >"$T/out" 2>/dev/null
grep -q '200 OK' "$T/out" && fail "another certificate was taken for ours"

# clients that vanish in the midst of a stream, with and without a word; connections that never begin to speak TLS
endless='{"prompt":"The old man","max_tokens":8000,"ignore_eos":true,"stream":true}'
running() { # running N: /metrics says so
  for _ in $(seq 200); do
    printf "GET /metrics HTTP/1.1\r\n$C\r\n" | client
    grep -q "^vllm:num_requests_running{[^}]*} $1\$" "$T/out" && return
    sleep 0.1
  done
  fail "never $1 requests running: $(grep '^vllm:num_requests' "$T/out")"
}
streams=
for i in $(seq 4); do
  { printf "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ${#endless}\r\n\r\n%s" "$endless"; sleep 60; } 2>/dev/null |
    openssl s_client -quiet -connect "127.0.0.1:$port" >/dev/null 2>&1 &
  streams="$streams $!"
done
running 4
for pid in $streams; do kill -9 "$pid"; done
running 0
for i in $(seq 8); do eval "exec $((20 + i))<>/dev/tcp/127.0.0.1/$port"; done
post /v1/completions "$body"
same "$(tail -1 "$T/out" | field text)" "$wanted" "a completion beside silent connections"
for i in $(seq 8); do eval "exec $((20 + i))<&-"; done
for _ in $(seq 200); do
  running 0
  grep -q '^quattuor:connections{[^}]*} 1$' "$T/out" && break
  sleep 0.1
done
says "$T/out" '^quattuor:connections\{[^}]*\} 1$'
says "$T/out" '^quattuor:kv_pages_used\{[^}]*\} 0$'
# the load generator over TLS: trusts what it is told to, and nobody else
bench() { "$Q" bench serve --quiet --concurrency 2 --requests 6 --input-len 8 --output-len 4 "$@" >"$T/out" 2>"$T/err"; }
bench --url "https://127.0.0.1:$port" --tls-ca "$T/one.pem" || fail "bench serve over TLS: $(cat "$T/err")"
says "$T/out" 'requests 6: 6 complete'
bench --url "https://127.0.0.1:$port" && fail "a certificate that nobody signed was taken"
says "$T/err" 'self-signed certificate'
bench --url "https://127.0.0.1:$port" --tls-ca "$T/other.pem" && fail "another's certificate was taken"
bench --url "https://localhost:$port" --tls-ca "$T/one.pem" && fail "a certificate of another name was taken"
says "$T/err" 'mismatch'
bench --url "https://127.0.0.1:$port" --tls-ca "$T/none" && fail "no file of certificates"
says "$T/err" 'none'
bench --url "http://127.0.0.1:$port" && fail "plain HTTP to a TLS port"

stop
finish
