#!/usr/bin/env bash
# What the server costs: the engine alone (`quattuor bench`) against `quattuor serve` under as many streams with the same
# lengths (`quattuor bench serve`, closed loop, one wave a round), in interleaved rounds on an otherwise quiet machine.
#   bench/server_overhead.sh QUATTUOR MODEL [OPTION...]     options go to both, such as --device cuda --threads 8
# STREAMS (32), INPUT (128), OUTPUT (256), ROUNDS (5; one more warms up). JSON on stdout: each round, medians, and
# overhead_percent = 100 * (1 - server / engine) of generated tokens a second, prompts included. The client runs on the same
# machine, and what it takes from the engine counts against the server. Needs python3.
set -euo pipefail
# shellcheck source=scripts/serve.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/serve.sh"
quattuor=$(realpath "$1") model=$2
shift 2
streams=${STREAMS:-32} input=${INPUT:-128} output=${OUTPUT:-256} rounds=${ROUNDS:-5}
folder=$(mktemp -d)
server=
finish() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

start_server "$quattuor" "$folder/log" --model "$model" --log-format none --max-num-seqs "$streams" --no-prefix-cache "$@"
# The engine alone runs in a process of its own: the idle server waits for requests and computes nothing meanwhile.
for round in $(seq 0 "$rounds"); do
  "$quattuor" bench --model "$model" --batch "$streams" --prompt-len "$input" --gen-len "$output" --rounds 2 --seed "$round" --json "$@" \
    >"$folder/engine-$round.json" 2>"$folder/err" || { cat "$folder/err" >&2; exit 1; }
  "$quattuor" bench serve --temperature 0 --url "$url" --concurrency "$streams" --requests "$streams" --input-len "$input" --output-len "$output" \
    --seed "$round" --quiet --json - >"$folder/server-$round.json"
done
python3 - "$folder" "$streams" "$input" "$output" "$rounds" "$model" <<'P'
import json, statistics, sys
folder, (streams, n_in, n_out, rounds), model = sys.argv[1], map(int, sys.argv[2:6]), sys.argv[6]
found, name = [], None
for i in range(1, rounds + 1):  # round 0 has warmed both up
    engine, server = (json.load(open(f"{folder}/{kind}-{i}.json")) for kind in ("engine", "server"))
    if server["failed"] or server["completed"] != streams or server["output_tokens"] != streams * n_out:
        sys.exit(f"round {i}: {server['failed']} requests failed, {server['output_tokens']} tokens came: {server['errors']}")
    name = engine.get("device_name") or engine["device"]
    found.append({"engine_tok_s": engine["throughput_tok_s"], "server_tok_s": server["output_tokens_s"],
                  "engine_decode_ms": engine["decode_ms_per_step"], "server_tpot_ms": server["tpot_ms"]["p50"]})
median = {key: statistics.median(r[key] for r in found) for key in found[0]}
print(json.dumps({"what": "server overhead", "model": model, "device": name, "streams": streams, "input_tokens": n_in, "output_tokens": n_out,
                  "overhead_percent": round(100 * (1 - median["server_tok_s"] / median["engine_tok_s"]), 2),
                  **{key: round(value, 4) for key, value in median.items()}, "rounds": found}))
P
