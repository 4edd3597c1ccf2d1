# test_usage.sh - help, exit codes and messages of the command line; the manual names every option there is.
. "$(dirname "$0")/lib.sh"

run 2
says "$T/err" "Usage: quattuor COMMAND"
[ -s "$T/out" ] && fail "usage of an error went to stdout"
run 0 --help
says "$T/out" "^  generate"
run 0 --version
version=$(grep -oE 'QTR_VERSION_(MAJOR|MINOR|PATCH) [0-9]+' "$SRC/include/quattuor/quattuor.h" | grep -oE '[0-9]+$' | paste -sd.)
same "$(cat "$T/out")" "quattuor $version" "version"
run 2 genrate
says "$T/err" "did you mean generate"
run 2 xyzzy
grep -q "did you mean" "$T/err" && fail "a far-fetched suggestion: $(cat "$T/err")"

for command in generate chat serve bench "bench serve" "calibrate heads" "eval ppl" "eval compare" "eval niah" "eval ruler" "eval longbench" tokenize info quantize convert; do
  run 0 $command --help
  [ -s "$T/err" ] && fail "$command --help writes to stderr"
  says "$T/out" "^Usage: quattuor $command"
  says "$T/out" "^  --json|^  --system|^  --port"
  grep -oE '^  --[a-z0-9-]+' "$T/out" | while read -r option; do
    grep -qF -- "$option" "$SRC/docs/cli.md" || echo "docs/cli.md does not name $option of $command"
    grep -qF -- "${option//-/\\-}" "$SRC/man/quattuor.1" || echo "man/quattuor.1 does not name $option of $command"
  done >"$T/missing"
  [ -s "$T/missing" ] && fail "$(cat "$T/missing")"
  run 2 $command --no-such-thing
  says "$T/err" "unknown option --no-such-thing"
done
run 0 help bench
says "$T/out" "^Usage: quattuor bench"

run 2 generate
says "$T/err" "no prompt"
run 2 generate --promt hi
says "$T/err" "did you mean --prompt"
run 2 generate --max-tok 3 --prompt x # an abbreviation is not an option, even when only one option could be meant
says "$T/err" "unknown option --max-tok; did you mean --max-tokens"
run 2 generate --prompt
says "$T/err" "prompt needs a value"
run 2 generate --prompt hi --json=yes
says "$T/err" "json takes no value"
run 2 generate hi
says "$T/err" "unexpected argument \"hi\""
for bad in "--max-tokens x" "--max-tokens -1" "--max-tokens 99999999999999999999" "--max-tokens 1.5" "--temperature hot" \
  "--temperature nan" "--temperature -1" "--top-p 1.5" "--top-k -7" "--min-p inf" "--n 0" "--n 65" "--logprobs 21" "--seed -1" \
  "--seed 18446744073709551616" "--kv-bytes 12X" "--kv-bytes -1" "--kv-bytes 99999999999999G" "--threads 0" "--device gpu" \
  "--norm fast" "--repetition-penalty 3" "--presence-penalty -2.5"; do
  run 2 generate --prompt hi --json $bad
  says "$T/err" "${bad%% *}|${bad##* }"
done
run 2 generate --prompt hi --json --top-p 0
says "$T/err" "top_p"
run 2 generate --prompt hi --json --top-k 0
says "$T/err" "top_k"
run 2 generate --prompt hi --stop-token x
says "$T/err" "stop-token"
run 2 generate --prompt hi --system s
says "$T/err" "needs --chat"
run 2 eval
run 2 eval perplexity
says "$T/err" "unknown evaluation"
run 2 eval compar
says "$T/err" "did you mean compare"
run 0 eval --help
says "$T/out" "^  ppl "
run 2 eval ppl
says "$T/err" "text"
run 2 quantize --model x
says "$T/err" "output"
run 2 quantize --model x --output y --precision w3a3
says "$T/err" "w4a8kv4"
run 2 quantize --model x --output y --group-size 64
says "$T/err" "128"
run 2 tokenize --file x y
run 2 bench --config x --model y
GLOBAL_BATCH_SIZE=many run 2 bench
says "$T/err" "GLOBAL_BATCH_SIZE"

run 1 generate --prompt hi --model "$T/none"
says "$T/err" "$T/none"
[ -s "$T/out" ] && fail "an error went to stdout"
finish
