#!/usr/bin/env bash
# Many connections for minutes: `quattuor serve` under a closed loop of streams with mixed lengths. Looks for errors, streams that
# are not whole, memory that grows after warm-up, and requests that wait much longer than others.
#   bench/server_soak.sh QUATTUOR MODEL [OPTION...]     options go to the server
# SECONDS_IN_ALL (300), CONNECTIONS (256), RUNNING (64: --max-num-seqs; the others wait), PAGES (16 a running request: enough for
# the longest; the pool's memory is taken as pages are first used, so a small pool warms up soon). JSON on stdout; exit code 1 when a
# limit is passed: any error; rss_growth_percent above 3 from the end of the warm-up (a quarter of the time) to the end, as
# medians of samples; ttft_p99_over_median above 3 (the time to the first token is queueing and reading the prompt). Needs python3.
set -euo pipefail
# shellcheck source=scripts/serve.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/serve.sh"
quattuor=$(realpath "$1") model=$2
shift 2
duration=${SECONDS_IN_ALL:-300} connections=${CONNECTIONS:-256} running=${RUNNING:-64}
folder=$(mktemp -d)
server=
finish() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

# Lengths: an Azure trace, whose times do not matter here. Prompts of 8 to 700 tokens, answers of 4 to 200, mostly short.
python3 - "$folder/trace.csv" <<'P'
import random, sys
draw = random.Random(7)
with open(sys.argv[1], "w") as file:
    file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    for i in range(200000):
        file.write(f"2023-11-16 {i // 3600 % 24:02}:{i // 60 % 60:02}:{i % 60:02}.0000000,{int(8 * 88 ** draw.random())},{int(4 * 50 ** draw.random())}\n")
P
start_server "$quattuor" "$folder/log" --model "$model" --log-format none --max-num-seqs "$running" \
  --kv-pages "${PAGES:-$((running * 16))}" --max-connections "$((connections + 16))" "$@"
"$quattuor" bench serve --url "$url" --trace "$folder/trace.csv" --concurrency "$connections" --duration "$duration" --quiet --json - \
  >"$folder/load.json" &
load=$!
: >"$folder/rss"
start=$SECONDS
while kill -0 "$load" 2>/dev/null; do
  printf '%s %s\n' "$((SECONDS - start))" "$(sed -nE 's/^VmRSS:\s+([0-9]+) kB/\1/p' "/proc/$server/status")" >>"$folder/rss"
  sleep 1
done
wait "$load"
kill -TERM "$server"
code=0
wait "$server" || code=$?
server=
python3 - "$folder" "$duration" "$connections" "$running" "$model" "$code" <<'P'
import json, statistics, sys
folder, (duration, connections, running), model, code = sys.argv[1], map(int, sys.argv[2:5]), sys.argv[5], int(sys.argv[6])
load = json.load(open(folder + "/load.json"))
rss = [tuple(map(int, line.split())) for line in open(folder + "/rss") if len(line.split()) == 2]
rss = [(t, kib) for t, kib in rss if t <= duration]
middle = lambda low, high: statistics.median([kib for t, kib in rss if low <= t <= high] or [kib for _, kib in rss])
warm, last = middle(duration * 0.25, duration * 0.4), middle(duration * 0.85, duration)
growth = 100 * (last / warm - 1)
spread = load["ttft_ms"]["p99"] / load["ttft_ms"]["p50"]
limits = {"errors": load["failed"] == 0 and not load["errors"] and load["completed"] == load["requests"] and code == 0,
          "rss": growth <= 3, "fairness": spread <= 3}
print(json.dumps({"what": "server soak", "model": model, "seconds": duration, "connections": connections, "running": running,
                  "requests": load["requests"], "completed": load["completed"], "failed": load["failed"], "errors": load["errors"],
                  "exit_code": code, "output_tokens_s": load["output_tokens_s"], "ttft_ms": load["ttft_ms"], "tpot_ms": load["tpot_ms"],
                  "ttft_p99_over_median": round(spread, 3), "rss_warm_kib": warm, "rss_end_kib": last,
                  "rss_growth_percent": round(growth, 2), "rss_kib": rss[::max(1, len(rss) // 60)], "passed": limits}))
sys.exit(0 if all(limits.values()) else 1)
P
