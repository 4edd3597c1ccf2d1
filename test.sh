#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests. Arguments go to ctest, e.g. ./test.sh -R tokenizer
#   ./test.sh --cuda-all   builds the GPU kernels for all architectures, not only for the GPU of this machine
set -euo pipefail
steps=3
if [ "${1:-}" = --cuda-all ]; then
  export QUATTUOR_CUDA_ARCHITECTURES='80;86;89;90a'
  shift
fi
. "$(dirname "${BASH_SOURCE[0]}")/scripts/common.sh"

step "packages"
# shellcheck disable=SC2086
install_packages $build_packages $test_packages
step_done
step "building"
# shellcheck disable=SC2046
build release -DQTR_TESTS=ON $(cuda_options)
step_done
step "tests"
set +e
(cd "$root/build/release" && ctest --output-on-failure -j "$(nproc)" "$@" 2>&1; echo "ctest exit $?") | while IFS= read -r line; do
  printf '%s\n' "$line" >>"$log"
  case $line in
    *Test\ *:\ *) ;;
    *\ Test\ *#*) name=${line#*: } && say "tests: ${line%% Test*} ${name%% *}" ;;
    'ctest exit '*) exit "${line##* }" ;;
  esac
done
status=${PIPESTATUS[1]}
set -e
[ "$status" = 0 ] || { tail -n 60 "$log" >&2; exit 1; }
step_done "$(grep 'tests passed' "$log" || true)"
grep -E '\*\*\*Skipped|\(Skipped\)' "$log" || true
grep -E 'tests passed' "$log"
