#!/usr/bin/env python3
"""Speed against llama.cpp on the same machine, in one run: the same shape (Llama-3.2-1B), threads and lengths.

usage: peer_llama_cpp.py --quattuor BIN --llama-bin DIR --gguf FILE [--rounds 3] [--output FILE.json]

--llama-bin holds llama-bench and llama-batched-bench of a llama.cpp built elsewhere with its default native flags; --gguf is a Q4_0
model of that shape with random weights (make_peer_gguf.py beside this file writes the F16 file that llama-quantize turns into it).
Each round runs both programs in turn; the file holds every round, and medians and ratios at the end.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys

here = os.path.dirname(os.path.abspath(__file__))


def run(command):
    print("+", " ".join(command), file=sys.stderr)
    r = subprocess.run(command, capture_output=True, text=True)
    if r.returncode:
        raise SystemExit(r.stderr[-2000:] or r.stdout[-2000:])
    return r.stdout


def peer_bench(a, *options):
    """llama-bench: mean tokens a second of one test."""
    out = run([f"{a.llama_bin}/llama-bench", "-m", a.gguf, "-t", str(a.threads), "-r", "1", "-o", "json", *options])
    return json.loads(out)[0]["avg_ts"]


def peer_batched(a, batch, prompt, gen):
    """llama-batched-bench: decode tokens a second (S_TG) with q4_0 KV and flash attention."""
    flash = ["-fa", "on"] if a.new_flags else ["-fa"]
    out = run([f"{a.llama_bin}/llama-batched-bench", "-m", a.gguf, "-t", str(a.threads), "-c", str(batch * (prompt + gen) + 256), "-b", "2048",
               "-ub", "512", "-npp", str(prompt), "-ntg", str(gen), "-npl", str(batch), "-ctk", "q4_0", "-ctv", "q4_0", *flash])
    row = [line for line in out.splitlines() if re.match(r"^\|\s*\d+", line)][-1]
    return float([c.strip() for c in row.strip("|\n ").split("|")][7])


def ours(a, group, batch, prompt, gen, kv="kv4"):
    out = run([a.quattuor, "bench", "--config", os.path.join(here, "..", "shapes", "llama-3.2-1b.json"), "--precision", "w4a8" + kv, "--group-size",
               str(group), "--lm-head", "int8", "--device", "cpu", "--threads", str(a.threads), "--batch", str(batch), "--prompt-len", str(prompt),
               "--gen-len", str(gen), "--rounds", "1", "--json"])
    return json.loads(out.splitlines()[-1])


def cpu_name():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--quattuor", required=True)
    p.add_argument("--llama-bin", required=True)
    p.add_argument("--gguf", required=True)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--new-flags", action="store_true", help="llama.cpp of 2025-08 or later spells -fa on")
    p.add_argument("--llama-version", default="unknown")
    p.add_argument("--output")
    a = p.parse_args()
    rounds = []
    for _ in range(a.rounds):
        r = {
            "llama.cpp prompt 512": peer_bench(a, "-p", "512", "-n", "0"),
            "llama.cpp decode batch 1": peer_bench(a, "-p", "0", "-n", "64"),
            "llama.cpp decode batch 32": peer_batched(a, 32, 128, 64),
        }
        for name, group in (("g128", 128), ("per-channel", -1)):
            x = ours(a, group, 1, 512, 64)
            r[f"quattuor {name} prompt 512"] = 512 / x["prefill_s"]
            r[f"quattuor {name} decode batch 1"] = ours(a, group, 1, 8, 64)["decode_tok_s"]
            r[f"quattuor {name} decode batch 32"] = ours(a, group, 32, 128, 64)["decode_tok_s"]
        for kv in ("kv4", "kv8"):
            r[f"quattuor g128 {kv} decode batch 1 at 4k ms/step"] = ours(a, 128, 1, 4096, 32, kv)["decode_ms_per_step"]
        rounds.append(r)
        print(json.dumps(r, indent=1), file=sys.stderr)
    median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    ratios = {}
    for name in ("g128", "per-channel"):
        for what in ("prompt 512", "decode batch 1", "decode batch 32"):
            ratios[f"{name} {what}"] = round(median[f"quattuor {name} {what}"] / median[f"llama.cpp {what}"], 2)
    commit = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "machine": cpu_name(), "threads": a.threads, "llama_cpp": a.llama_version, "quattuor_commit": commit,
        "unit": "tokens per second unless the name says otherwise", "rounds": rounds, "median": median, "ratio": ratios,
    }
    text = json.dumps(result, indent=1)
    if a.output:
        open(a.output, "w").write(text + "\n")
    print(text)


main()
