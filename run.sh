#!/usr/bin/env bash
# Installs what is missing, builds Quattuor, and lets the built-in demo model answer. Arguments go to `quattuor generate`:
#   ./run.sh                       several prompts at once through in-flight batching
#   ./run.sh --prompt "Hello"      one prompt
#   ./run.sh --help                all options
set -euo pipefail
steps=3
. "$(dirname "${BASH_SOURCE[0]}")/scripts/common.sh"

step "packages"
# shellcheck disable=SC2086
install_packages $build_packages
step_done
step "building"
# shellcheck disable=SC2046
build release -DQTR_TESTS=OFF $(cuda_options)
step_done
binary=$root/build/release/quattuor
step "demo model, W4A8KV4 on this CPU"
[ "$tty" = 1 ] && printf '\n' >&2
rm -f "$log"
if [ $# -eq 0 ]; then
  exec "$binary" generate --model "$root/models/demo" --prompts-file "$root/models/demo/prompts.jsonl" --max-tokens 96 --temperature 0.7 --top-p 0.95 --seed 1
fi
exec "$binary" generate --model "$root/models/demo" "$@"
