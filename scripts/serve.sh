# serve.sh - starts `quattuor serve` for tests and measurements. Source it; needs only bash and sed.

# start_server BINARY LOG OPTIONS...: a server on a free port of 127.0.0.1, once it answers: its process is $server, its address $url
# (http://127.0.0.1:PORT) and $port; what it says goes to LOG. When it ends before that, its words are shown and 1 comes back.
start_server() {
  local binary=$1 log=$2
  shift 2
  : >"$log"
  "$binary" serve --port 0 "$@" 2>"$log" &
  server=$! url='' port=''
  while :; do
    url=$(sed -nE 's|.* at (https?://[^/]+)/v1.*|\1|p' "$log")
    port=${url##*:}
    [ -z "$url" ] || return 0
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  cat "$log" >&2
  return 1
}
