# test_page.sh - the page's files as a server with keys gives them out: without a key, with a policy and a tag, and not twice. What
# the page does in a browser is page_playwright.py's question.
# shellcheck source=tests/e2e/lib.sh
. "$(dirname "$0")/lib.sh"
need_model

echo "a-key" >"$T/keys"
serve --model "$MODEL" --api-key "$T/keys"
says "$T/log" "its page at $url/"

# get PATH [HEADER LINES]: the answer is in $T/out.
get() {
  exec 9<>"/dev/tcp/127.0.0.1/$port" || { fail "cannot connect"; return; }
  printf 'GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n' "$1" "${2-}" >&9
  timeout 30 cat <&9 >"$T/out"
  exec 9<&- 9>&-
}

get /
says "$T/out" '^HTTP/1.1 200'
says "$T/out" '^Content-Type: text/html; charset=utf-8'
says "$T/out" "^Content-Security-Policy: default-src 'none'; script-src 'self'"
says "$T/out" '^X-Content-Type-Options: nosniff'
files=$(grep -oE '(src|href)="page/[a-z.]+"' "$T/out" | cut -d'"' -f2 | sort -u)
grep -qE '(src|href)="(https?:)?//' "$T/out" && fail "the page names another server"
for file in $files; do # each is its source, byte for byte
  get "/$file"
  says "$T/out" '^HTTP/1.1 200'
  sed '1,/^\r$/d' "$T/out" | cmp -s - "$SRC/src/server/$file" || fail "/$file differs from src/server/$file"
done
same "$(echo "$files" | wc -l | tr -d ' ')" 4 "files that the page asks for by itself"

get /page/app.js
tag=$(sed -nE 's/^ETag: ("[0-9a-f]+")\r$/\1/p' "$T/out")
get /page/app.js "If-None-Match: $tag\r\n"
says "$T/out" '^HTTP/1.1 304 Not Modified'
says "$T/out" "^ETag: $tag"
grep -q '^Content-Length' "$T/out" && fail "304 with a length"
get /page/app.js 'If-None-Match: "other"\r\n'
says "$T/out" '^HTTP/1.1 200'
get /page/none.js
says "$T/out" '^HTTP/1.1 404'
get /page/../routes.c
says "$T/out" '^HTTP/1.1 404'
for path in /metrics /v1/models /page /index.html; do # the page is open, the rest is not
  get $path
  says "$T/out" '^HTTP/1.1 401'
done
stop
finish
