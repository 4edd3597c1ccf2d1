# test_longbench.sh - quattuor eval longbench: questions are answered and scored, long ones cut; scoring what was written gives
# the same; a word list; errors.
. "$(dirname "$0")/lib.sh"
need_model
mkdir "$T/data" "$T/pred"
sentence="It was on a cold morning in March that the two brothers left the house by the river and walked to the station. "
long=$(for _ in $(seq 60); do printf '%s' "$sentence"; done)
for i in 1 2 3; do
  echo "{\"input\":\"Who left the house?\",\"context\":\"$sentence\",\"answers\":[\"the two brothers\",\"brothers\"],\"length\":$((i * 3000)),\"all_classes\":null}"
done >"$T/data/qasper.jsonl"
echo "{\"input\":\"\",\"context\":\"$long\",\"answers\":[\"Two brothers walked to the station.\"],\"length\":1300,\"all_classes\":null}" >"$T/data/gov_report.jsonl"
echo '{"input":"谁？","context":"两兄弟离开了家。","answers":["两兄弟"],"length":8,"all_classes":null}' >"$T/data/multifieldqa_zh.jsonl"
b() { run 0 eval longbench --model "$MODEL" --data "$T/data" "$@"; }
b --json --max-length 700 --answers "$T/answers"
same "$(grep -o '"task":' "$T/out" | wc -l)" 3 "tasks"
same "$(lines "$T/answers")" 5 "answers"
says "$T/out" '"task":"gov_report","metric":"rouge_l","score":[0-9.]*,"n":1,"n_truncated":1'
says "$T/out" '"task":"qasper","metric":"f1","score":[0-9.]*,"n":3,"n_truncated":0'
says "$T/out" '"chinese_words":"characters"'
score=$(field score <"$T/out")
# its own answers, scored again
for task in qasper gov_report multifieldqa_zh; do grep "\"task\":\"$task\"" "$T/answers" >"$T/pred/$task.jsonl"; done
run 0 eval longbench --score "$T/pred" --json
same "$(field score <"$T/out")" "$score" "the score of the same answers"
b --tasks qasper --limit 2 --prompt chat
says "$T/out" "^qasper .* 2 questions"
printf '两兄弟 10\n两 5\n兄弟 7\n' >"$T/words"
printf '{"pred":"两兄弟走","answers":["两兄弟"],"length":1}\n' >"$T/pred/multifieldqa_zh.jsonl"
run 0 eval longbench --score "$T/pred" --tasks multifieldqa_zh --words "$T/words"
says "$T/out" "^multifieldqa_zh +66.67"
run 0 eval longbench --score "$T/pred" --tasks multifieldqa_zh
says "$T/out" "^multifieldqa_zh +85.71"
says "$T/out" "count characters"
cp "$T/pred/qasper.jsonl" "$T/pred/qasper_e.jsonl"
run 0 eval longbench --score "$T/pred" --extended --json
says "$T/out" '"0-4k":[0-9.]*,"4-8k":[0-9.]*,"8k\+":'

run 2 eval longbench
says "$T/err" "--data DIR or --score DIR"
run 2 eval longbench --data x --score y
run 1 eval longbench --data "$T" --model "$MODEL"
says "$T/err" "no file of a task"
run 1 eval longbench --data "$T/data" --tasks qaspe --model "$MODEL"
says "$T/err" "did you mean qasper"
run 1 eval longbench --data "$T/data" --tasks trec --model "$MODEL"
says "$T/err" "trec.jsonl"
echo '{"input":"x"}' >>"$T/data/qasper.jsonl"
run 1 eval longbench --data "$T/data" --model "$MODEL"
says "$T/err" "qasper.jsonl, line 4: "
printf '\377' >"$T/words"
run 1 eval longbench --score "$T/pred" --words "$T/words"
finish
