# test_ruler.sh - quattuor eval ruler: the demo model finds single numbers, every task runs, seeds, files and errors.
. "$(dirname "$0")/lib.sh"
need_model
r() { run 0 eval ruler --model "$MODEL" --json "$@"; }
r --lengths 512,640 --samples 2 --seed 3 --answers "$T/answers" --svg "$T/map.svg" --png "$T/map.png"
same "$(lines "$T/answers")" 28 "answers"
for task in single multikey multivalue multiquery variables common-words frequent-words; do
  same "$(grep -c "\"task\":\"$task\"" "$T/answers")" 4 "answers of $task"
  says "$T/map.svg" "tokens 640, task $task"
done
same "$(head -c 4 "$T/map.png" | tail -c 3)" PNG "the picture's signature"
says "$T/out" '"task":"single","score":(1.0|0.75|0.5),"accuracy":(1.0|0.75|0.5),"n":4'
[ "$(sed 's/.*"prompt_tokens":\([0-9]*\).*/\1/' "$T/answers" | sort -n | tail -1)" -le 640 ] || fail "a prompt of more than 640 tokens"
# the same question in other company
r --tasks multikey --lengths 640 --samples 1 --seed 3 --answers "$T/one"
same "$(cat "$T/one")" "$(grep '"task":"multikey","length":640,"number":0' "$T/answers")" "a question alone"
run 0 eval ruler --model "$MODEL" --tasks single,variables,single --lengths 384 --samples 1 --prompt plain
says "$T/out" "^single +"
same "$(grep -c '^single' "$T/out")" 1 "a task named twice"

run 2 eval ruler --model "$MODEL" --tasks singel
says "$T/err" "did you mean single"
run 2 eval ruler --model "$MODEL" --tasks ,
run 2 eval ruler --model "$MODEL" --lengths 1
run 1 eval ruler --model "$MODEL" --lengths 8190
says "$T/err" "the longest prompt is"
run 1 eval ruler --model "$MODEL" --tasks common-words --lengths 128
says "$T/err" "too short for this question"
finish
