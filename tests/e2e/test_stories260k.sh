#!/usr/bin/env bash
# stories260K, a trained model of llama2.c, gives its published greedy text in fp32 on both CPU backends.
set -euo pipefail
quattuor=$1
source_dir=$2
data=${QUATTUOR_SHARED:-$source_dir/../shared}/data/stories260K
[ -r "$data/stories260K.bin" ] || { echo "skipped: no stories260K here (data that is not part of the repository)"; exit 77; }
python=python3 # the distribution's own where another one comes first and has no numpy
"$python" -c 'import numpy' 2>/dev/null || python=/usr/bin/python3
"$python" -c 'import numpy' 2>/dev/null || { echo "skipped: python3-numpy is not installed"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$python" "$source_dir/tests/e2e/make_stories260k.py" "$data/stories260K.bin" "$data/tok512.bin" "$dir/model"
# the published text stands between the first two ``` lines, after the command
sed -n '/-t 0.0$/,/^```/p' "$data/stories260K.md" | sed '1d;/^```/d' >"$dir/expected"
for device in reference cpu; do
  "$quattuor" generate --model "$dir/model" --device $device --precision w16a16kv16 --prompt "" --max-tokens 255 --temperature 0 --json \
    2>"$dir/log" >"$dir/out" || { cat "$dir/log"; exit 1; }
  "$python" - "$dir/out" "$dir/expected" $device <<'P'
import json, sys
got = json.loads(open(sys.argv[1]).readline())["text"].strip()
want = open(sys.argv[2]).read().strip()
n = min(len(got), len(want))
assert n > 0.98 * len(want) and got[:n] == want[:n], f"{sys.argv[3]}:\n{got}\n--- expected\n{want}"
print(sys.argv[3], "equal:", n, "characters")
P
done
