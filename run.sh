#!/usr/bin/env bash
# Installs what is missing, builds Quattuor, and puts the built-in demo model on http://127.0.0.1:8080 until Ctrl-C.
#   ./run.sh                       `quattuor serve`; it prints the address and what to try
#   ./run.sh --port 9000           arguments go to it (--help lists them; --model DIR serves a model of yours)
#   ./run.sh --prompt "Hello"      with a prompt: `quattuor generate` answers once and ends; arguments go there
set -euo pipefail
steps=3
. "$(dirname "${BASH_SOURCE[0]}")/scripts/common.sh"

command=serve
for argument in "$@"; do
  case $argument in --prompt | --prompt=* | --prompts-file | --prompts-file=*) command=generate ;; esac
done

step "packages"
# shellcheck disable=SC2086
install_packages $build_packages
step_done
step "building"
# shellcheck disable=SC2046
build release -DQTR_TESTS=OFF $(cuda_options)
step_done
step "quattuor $command, demo model"
[ "$tty" = 1 ] && printf '\n' >&2
rm -f "$log"
QUATTUOR_MODEL=$root/models/demo exec "$root/build/release/quattuor" "$command" "$@"
