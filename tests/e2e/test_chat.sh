# test_chat.sh - quattuor chat: a session from a pipe, its commands, and a terminal where Ctrl-C stops the answer only.
. "$(dirname "$0")/lib.sh"
need_model
c() { run "$1" chat --model "$MODEL" --temperature 0 --max-tokens 12; }

printf 'Hello\nI need a restaurant in San Jose\n' | c 0
same "$(lines "$T/out")" 2 "answers to two turns"
head -1 "$T/out" >"$T/first"
grep -v '^loading the model' "$T/err" && fail "a piped session writes to stderr"

# /reset forgets: the same question gets the same answer again; without it the history is there.
printf 'Hello\n/reset\nHello\n/exit\nnot read\n' | c 0
same "$(lines "$T/out")" 2 "answers before /exit"
same "$(sed -n 1p "$T/out")" "$(sed -n 2p "$T/out")" "the answer after /reset"
same "$(sed -n 1p "$T/out")" "$(cat "$T/first")" "the first answer"
printf '\n/help\n/nonsense\r\n' | c 0
says "$T/err" "/reset"
says "$T/err" "unknown command /nonsense"
[ -s "$T/out" ] && fail "commands write to stdout"
printf 'bad \377 line\nHello\n' | c 1
says "$T/err" "UTF-8"
same "$(cat "$T/out")" "$(cat "$T/first")" "the turn after a bad one"
: | c 0
printf 'Hello' | c 0
same "$(cat "$T/out")" "$(cat "$T/first")" "a last line without a newline"

# When the context is full the oldest turns are forgotten and the session goes on.
for i in $(seq 12); do echo "I want to book a table for number $i please"; done >"$T/many"
"$Q" chat --model "$MODEL" --temperature 0 --max-tokens 16 --max-model-len 128 <"$T/many" >"$T/out" 2>"$T/err"
same $? 0 "exit code of a long session"
says "$T/err" "forgotten"

# A model without a template says so.
mkdir "$T/plain"
for file in "$MODEL"/*; do ln -s "$file" "$T/plain/"; done
rm -f "$T/plain/tokenizer_config.json" "$T/plain/chat_template.jinja"
sed 's/"chat_template"/"no_template"/' "$MODEL/tokenizer_config.json" >"$T/plain/tokenizer_config.json"
echo Hello | "$Q" chat --model "$T/plain" >"$T/out" 2>"$T/err"
same $? 1 "exit code without a template"
says "$T/err" "no chat template"

# A terminal: Ctrl-C in an endless answer, then Ctrl-C on a half-written line, then the end of input.
await() { # until the terminal has shown what matches
  for _ in $(seq 600); do
    grep -qE -- "$1" "$T/tty" 2>/dev/null && return
    sleep 0.1
  done
}
# exec: a shell between the terminal and the program would have its own idea of Ctrl-C (dash then ends with 130).
if command -v script >/dev/null; then
  {
    await "lists the commands"
    printf 'Hello\r'
    await "Hello[^a-z]*[A-Za-z' ,.]{10}" # the answer has begun
    printf '\003'
    await "\(stopped\)"
    printf 'half a line'
    await "half a line"
    printf '\003'
    sleep 1
    printf '/reset\r'
    await "new conversation"
    printf '\004'
    sleep 1
  } | timeout 120 script -qfec "exec '$Q' chat --model '$MODEL' --temperature 0 --ignore-eos --max-tokens 8000" "$T/tty" >/dev/null 2>&1
  same $? 0 "exit code of a terminal session"
  says "$T/tty" "\(stopped\)"
  says "$T/tty" "new conversation"
  [ "$(grep -c '\^C' "$T/tty")" -ge 2 ] || fail "Ctrl-C on a half-written line"
fi
finish
