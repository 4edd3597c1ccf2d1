# test_tokenize.sh - quattuor tokenize: round trips, the three ways of giving text, and the published encodings.
. "$(dirname "$0")/lib.sh"
need_model
printf 'Plain text, with two trailing newlines\n\n' >"$T/1"
printf '  spaces \t tabs\r\nand 12345 numbers 3.14159' >"$T/2"
printf 'Gr\303\274\303\237e \360\237\230\200\360\237\221\215\360\237\217\275 \344\275\240\345\245\275 \331\205\330\261\330\255\330\250\330\247 \000 nul' >"$T/3"
: >"$T/4"
for i in 1 2 3 4; do
  run 0 tokenize --model "$MODEL" --file "$T/$i" --json
  ids=$(field token_ids <"$T/out")
  same "$(field n_tokens <"$T/out")" "$(echo "$ids" | grep -oE '[0-9]+' | wc -l)" "n_tokens of text $i"
  "$Q" tokenize --model "$MODEL" --decode "$ids" >"$T/back" || fail "decoding text $i"
  cmp "$T/$i" "$T/back" || fail "round trip of text $i"
  "$Q" tokenize --model "$MODEL" --json <"$T/$i" >"$T/stdin"
  cmp -s "$T/out" "$T/stdin" || fail "standard input differs from --file for text $i"
done
run 0 tokenize --model "$MODEL" "hello world"
plain=$(cat "$T/out")
run 0 tokenize --model "$MODEL" --bos "hello world"
bos=$("$Q" info --model "$MODEL" --json | field bos_token)
same "$(cat "$T/out")" "$bos $plain" "BOS"
run 0 tokenize --model "$MODEL" --pieces "hello world"
same "$(cut -f1 "$T/out" | paste -sd' ')" "$plain" "ids of pieces"
same "$(cut -f2 "$T/out" | tr -d '"\n')" "hello world" "pieces"
run 0 tokenize --model "$MODEL" --no-parse-special "<|im_end|>"
[ "$(wc -w <"$T/out")" -gt 1 ] || fail "a special token was parsed in plain text"
run 0 tokenize --model "$MODEL" "<|im_end|>"
same "$(cat "$T/out")" 3 "a special token"
printf 'bad \377' >"$T/bad"
run 1 tokenize --model "$MODEL" --file "$T/bad"
says "$T/err" "UTF-8"
run 1 tokenize --model "$MODEL" --decode "1 2 x"
says "$T/err" "\"x\" is not a token id"
run 1 tokenize --tokenizer "$T/none.json" x

# The published encodings of llama.cpp: inputs separated by a line, one line of ids each.
for pair in "llama-bpe llama-3.tokenizer.json" "llama-spm llama-2.tokenizer.json" "llama-spm llama-2.tokenizer.model"; do
  set -- $pair
  inp=$SHARED/data/tokenizers/$1.inp tokenizer=$SHARED/data/tokenizers/$2
  [ -f "$inp" ] && [ -f "$tokenizer" ] || { echo "note: no $2 here" >&2; continue; }
  rm -rf "$T/in" && mkdir "$T/in"
  awk -v d="$T/in" 'BEGIN { n = 1; f = d "/1"; printf "" > f; first = 1 }
    $0 == "__ggml_vocab_test__" { n++; f = d "/" n; printf "" > f; first = 1; next }
    { printf "%s%s", first ? "" : "\n", $0 >> f; first = 0 }' "$inp"
  i=0
  while IFS= read -r expected; do
    i=$((i + 1))
    "$Q" tokenize --tokenizer "$tokenizer" --file "$T/in/$i" >"$T/got" 2>"$T/err" || fail "$2, input $i: $(cat "$T/err")"
    same "$(cat "$T/got")" "$(echo "$expected" | tr -s ' ' | sed 's/^ //;s/ $//')" "$2, input $i"
  done <"${inp%.inp}.out"
  [ "$i" -ge 40 ] || fail "only $i encodings"
done
finish
