# test_ppl.sh - quattuor eval ppl: counts, line ends, windows; the cpu and the reference backend agree.
. "$(dirname "$0")/lib.sh"
need_model
p() { run 0 eval ppl --model "$MODEL" --json "$@"; }
for i in $(seq 40); do
  echo "It was on a cold morning in March that the two brothers, number $i, left the house by the river and walked to the station."
done >"$T/text"
p --text "$T/text" --ctx 128
n=$("$Q" tokenize --model "$MODEL" --bos --json --file "$T/text" | field n_tokens)
same "$(field n_tokens <"$T/out")" "$n" "n_tokens"
same "$(field n_windows <"$T/out")" $((n / 128)) "n_windows"
same "$(field n_scored <"$T/out")" $((n / 128 * 127)) "n_scored"
ppl=$(field perplexity <"$T/out")
awk -v p="$ppl" 'BEGIN { exit !(p > 1.5 && p < 200) }' || fail "perplexity $ppl of English"
sed 's/$/\r/' "$T/text" >"$T/crlf"
p --text "$T/crlf" --ctx 128
same "$(field perplexity <"$T/out")" "$ppl" "perplexity with CR LF"
p --text "$T/text" --ctx 128 --windows 2
same "$(field n_windows <"$T/out")" 2 "--windows"
# not kv4: rounding that goes the other way moves so few tokens by a few percent
kv8=$("$Q" info --model "$MODEL" --json | field precision | tr -d '"' | sed 's/kv.*/kv8/')
p --text "$T/text" --ctx 128 --windows 2 --precision "$kv8"
two=$(field perplexity <"$T/out")
p --text "$T/text" --ctx 128 --windows 2 --precision "$kv8" --device reference
awk -v a="$two" -v b="$(field perplexity <"$T/out")" 'BEGIN { exit !(a / b < 1.02 && b / a < 1.02) }' ||
  fail "cpu $two and reference $(field perplexity <"$T/out") differ"
# words in random order are harder
tr -s ' \n' '\n' <"$T/text" | sort -R --random-source="$T/text" | paste -sd' ' >"$T/shuffled"
p --text "$T/shuffled" --ctx 128
awk -v a="$ppl" -v b="$(field perplexity <"$T/out")" 'BEGIN { exit !(b > 2 * a) }' || fail "shuffled words are no harder"

# A result that does not arrive is a failure, with --json and without: no output at all, or the disk is full.
for how in --json ""; do
  "$Q" eval ppl --model "$MODEL" --text "$T/text" --ctx 128 --windows 1 $how 2>"$T/err" >&-
  same $? 1 "exit code without an output"
  says "$T/err" "cannot write to standard output"
  [ -e /dev/full ] || continue
  "$Q" eval ppl --model "$MODEL" --text "$T/text" --ctx 128 --windows 1 $how 2>"$T/err" >/dev/full
  same $? 1 "exit code on a full disk"
  says "$T/err" "cannot write to standard output"
done

run 1 eval ppl --model "$MODEL" --text "$T/none"
echo "too short" >"$T/short"
run 1 eval ppl --model "$MODEL" --text "$T/short" --ctx 128
says "$T/err" "less than one window"
run 1 eval ppl --model "$MODEL" --text "$T/text" --ctx 1000000
says "$T/err" "8192"
printf 'bad \377 text' >"$T/bad"
run 1 eval ppl --model "$MODEL" --text "$T/bad" --ctx 128
says "$T/err" "UTF-8"
finish
