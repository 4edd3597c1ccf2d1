# lib.sh - what the end-to-end tests share. Sourced with the test's own arguments: the binary and the source folder.
# bash and grep only: the tests run where the product runs.
set -u
Q=$1
SRC=$2
T=$(mktemp -d)
server='' # the process of serve
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null; rm -rf "$T"' EXIT
n_failed=0
[ -x "$Q" ] || { echo "no binary $Q" >&2; exit 1; }

fail() { echo "FAIL: $*" >&2; n_failed=$((n_failed + 1)); }
skip() { echo "skipped: $*" >&2; exit 77; }
finish() {
  [ "$n_failed" = 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
  echo ok
  exit 0
}

# run CODE ARGUMENTS...: runs the binary, checks its exit code; what it wrote is in $T/out and $T/err.
run() {
  local wanted=$1 code
  shift
  "$Q" "$@" >"$T/out" 2>"$T/err"
  code=$?
  [ "$code" = "$wanted" ] || fail "quattuor $*: exit code $code, not $wanted: $(head -c 300 "$T/err")"
}
# says FILE PATTERN: the file has a line that matches the extended regular expression.
says() { grep -qE -- "$2" "$1" || fail "no \"$2\" in: $(head -c 400 "$1")"; }
same() { [ "$1" = "$2" ] || fail "$3: \"$1\" is not \"$2\""; }
# field NAME: the value of a number, string or flat array in the JSON line on stdin.
field() { grep -oE "\"$1\":(\"([^\"\\\\]|\\\\.)*\"|\[[^][]*\]|[^,}]*)" | head -1 | cut -d: -f2-; }

# shellcheck source=scripts/serve.sh
. "$SRC/scripts/serve.sh"
# serve OPTIONS...: a server on $port whose log is $T/log; the test ends when there is none.
serve() { start_server "$Q" "$T/log" "$@" || { fail "no address"; finish; }; }
# stop: ends it by SIGTERM; it must end well.
stop() {
  kill -TERM "$server"
  wait "$server"
  same $? 0 "exit code after SIGTERM"
  server=''
}

lines() { wc -l <"$1" | tr -d ' '; }

SHARED=${QUATTUOR_SHARED:-$SRC/../shared}

# The demo model that ships with the source, or the float one it is made of.
need_model() {
  for MODEL in "$SRC/models/demo" "$SHARED/models/demo-bf16"; do
    [ -f "$MODEL/config.json" ] && [ -f "$MODEL/model.safetensors" ] && return
  done
  skip "no model in models/demo"
}
