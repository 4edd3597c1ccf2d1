#!/usr/bin/env bash
# What the server costs: the engine alone (`quattuor bench`) against `quattuor serve` under as many streams with the same
# lengths (`quattuor bench serve`, closed loop), in interleaved rounds on an otherwise quiet machine.
#   bench/server_overhead.sh QUATTUOR MODEL [OPTION...]     options go to both engines, such as --device cuda --threads 8
# MODEL holds weights; bench/random_model.py makes one of a real model's shape, for a server that adds microseconds to a step
# of microseconds says nothing. STREAMS (32), INPUT (128), OUTPUT (512), ROUNDS (5; one more warms up).
# Both sides get the same sequences at once, the same KV pool, batch and greedy sampling, and in every round each warms up with
# one wave before the wave that counts. Two processes hold the weights, one at a time computes.
# The client runs on the same machine. With more than 4 cores it gets two of its own (PIN=0: it does not), and both engines run
# on the others: what is measured then is the server, on fewer cores; else the client's work counts against the server, too.
# JSON on stdout: each round, medians, and
#   overhead_percent         100 * (1 - server / engine) of generated tokens a second, prompts, arrivals and ends included
#   decode_overhead_percent  100 * (server / engine - 1) of the time of a step: the mean of full batches, the median gap between tokens
# Needs python3.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# shellcheck source=scripts/serve.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/serve.sh"
quattuor=$(realpath "$1") model=$2
shift 2
streams=${STREAMS:-32} input=${INPUT:-128} output=${OUTPUT:-512} rounds=${ROUNDS:-5}
export OPENBLAS_NUM_THREADS=1 # it only quantises, but its threads would spin for a moment at every start
folder=$(mktemp -d)
server=
finish() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

# The cores this process may use: "0-13 14-15" for engines and client, or nothing.
cores=$(python3 - "${PIN:-1}" <<'P'
import os, sys
mine = sorted(os.sched_getaffinity(0))
if sys.argv[1] != "0" and len(mine) > 4:
    print(",".join(map(str, mine[:-2])), ",".join(map(str, mine[-2:])))
P
)
client=()
if [ -n "$cores" ] && command -v taskset >/dev/null; then
  taskset -pc "${cores% *}" $$ >/dev/null # what is started from here on has these
  client=(taskset -c "${cores#* }")
else
  cores=
fi
# A page more each for the token after the last, as `quattuor bench` has it: a pool of all free memory would leave none for the other.
common=(--model "$model" --max-num-seqs "$streams" --kv-pages $((streams * ((input + output) / 64 + 1))) --max-model-len $((input + output)) --no-prefix-cache "$@")

start_server "$quattuor" "$folder/log" "${common[@]}" --log-format none
wave() { # wave SEED: all streams through the server once
  "${client[@]}" "$quattuor" bench serve --temperature 0 --url "$url" --concurrency "$streams" --requests "$streams" --input-len "$input" \
    --output-len "$output" --seed "$1" --quiet --json -
}
for round in $(seq 0 "$rounds"); do
  "$quattuor" bench "${common[@]}" --batch "$streams" --prompt-len "$input" --gen-len "$output" --rounds 2 --seed "$round" --json \
    >"$folder/engine-$round.json" 2>"$folder/err" || { cat "$folder/err" >&2; exit 1; }
  wave "$((1000 + round))" >"$folder/warm"
  wave "$round" >"$folder/server-$round.json"
done
python3 - "$folder" "$streams" "$input" "$output" "$rounds" "$model" "$cores" <<'P'
import json, os, statistics, sys
folder, (streams, n_in, n_out, rounds), model, cores = sys.argv[1], map(int, sys.argv[2:6]), sys.argv[6], sys.argv[7].split()
found, name = [], None
for i in range(1, rounds + 1):  # round 0 has warmed both up
    engine, server = (json.load(open(f"{folder}/{kind}-{i}.json")) for kind in ("engine", "server"))
    if server["failed"] or server["completed"] != streams or server["output_tokens"] != streams * n_out:
        sys.exit(f"round {i}: {server['failed']} requests failed, {server['output_tokens']} tokens came: {server['errors']}")
    name = engine.get("device_name") or engine["device"]
    found.append({"engine_tok_s": engine["throughput_tok_s"], "server_tok_s": server["output_tokens_s"],
                  "engine_decode_ms": engine["decode_ms_per_step"], "server_step_ms": server["itl_ms"]["p50"],
                  "server_ttft_ms": server["ttft_ms"]["p50"]})
median = {key: statistics.median(r[key] for r in found) for key in found[0]}
print(json.dumps({"what": "server overhead", "model": model, "device": name, "streams": streams, "input_tokens": n_in, "output_tokens": n_out,
                  "cores": {"engine": cores[0], "client": cores[1]} if cores else f"{len(os.sched_getaffinity(0))}, shared",
                  "overhead_percent": round(100 * (1 - median["server_tok_s"] / median["engine_tok_s"]), 2),
                  "decode_overhead_percent": round(100 * (median["server_step_ms"] / median["engine_decode_ms"] - 1), 2),
                  **{key: round(value, 4) for key, value in median.items()}, "rounds": found}))
P
