# test_niah.sh - quattuor eval niah: the demo model finds its needles, trials do not depend on their company, files and errors.
. "$(dirname "$0")/lib.sh"
need_model
n() { run 0 eval niah --model "$MODEL" --json "$@"; }
n --lengths 384,512 --depths 3 --needles 2 --seed 7 --svg "$T/map.svg" --png "$T/map.png" --answers "$T/answers"
cp "$T/out" "$T/both"
awk -v a="$(field accuracy <"$T/out")" 'BEGIN { exit !(a >= 0.75) }' || fail "accuracy $(field accuracy <"$T/out")"
same "$(lines "$T/answers")" 12 "answers"
same "$(grep -o '"depth":' "$T/out" | wc -l)" 6 "cells"
says "$T/map.svg" "^<svg .*xmlns"
says "$T/map.svg" "tokens 512, depth 50 %"
same "$(head -c 4 "$T/map.png" | tail -c 3)" PNG "the picture's signature"
sed 's/.*"prompt_tokens":\([0-9]*\).*/\1/' "$T/answers" | sort -n | sed -n '1p;$p' | paste -sd' ' >"$T/range"
read -r shortest longest <"$T/range"
[ "$shortest" -gt 330 ] && [ "$longest" -le 512 ] || fail "prompts of $shortest to $longest tokens"
# the same trial alone: the same needle, the same answer
n --lengths 512 --depths 50% --needles 1 --seed 7 --answers "$T/one"
same "$(cat "$T/one")" "$(grep '"length":512,"depth":50.0,"number":0' "$T/answers")" "a trial alone"
n --lengths 384 --depths 1 --needles 1 --seed 8 --answers "$T/other"
same "$(grep -c "$(sed 's/.*"needle":"\([^"]*\)".*/\1/' "$T/other")" "$T/answers")" 0 "another seed"
# a haystack of one's own, repeated when it is short; a directory; the usual needle in the reference's words
for i in $(seq 30); do echo "It was on a cold morning in March that number $i of the brothers walked to the station."; done >"$T/text.txt"
n --haystack "$T/text.txt" --lengths 700 --depths 1 --needles 1 --needle magic --answers "$T/one"
says "$T/one" '"needle":"The magic number for the '
mkdir "$T/dir" && cp "$T/text.txt" "$T/dir/b.txt" && echo "Nothing." >"$T/dir/a.txt" && echo x >"$T/dir/c.md"
n --haystack "$T/dir" --lengths 400 --depths 1 --needles 1 --needle san-francisco --prompt plain --max-tokens 5 --answers "$T/one"
says "$T/one" 'Dolores Park'
run 0 eval niah --model "$MODEL" --lengths 384 --depths 2 --needles 1
says "$T/out" "^ +5 %"
says "$T/out" "needles found"

run 1 eval niah --model "$MODEL" --haystack "$T/none"
run 1 eval niah --model "$MODEL" --lengths 100000
says "$T/err" "the longest prompt is"
for bad in "--lengths 5" "--lengths x" "--lengths 512," "--lengths 512.5" "--lengths 512%" "--depths 0" "--depths 5%,101%" "--depths 1.5" "--needle gold" "--prompt x" "--needles 0"; do
  # shellcheck disable=SC2086
  run 2 eval niah --model "$MODEL" $bad
done
run 1 eval niah --model "$MODEL" --lengths 384 --depths 1 --needles 1 --svg "$T/none/map.svg" # the result is not lost
says "$T/out" "needles found"
run 1 eval niah --model "$MODEL" --answers "$T/none/answers"
[ -s "$T/out" ] && fail "a file that cannot be written is told late"
finish
