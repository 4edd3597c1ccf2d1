# common.sh - what run.sh, test.sh and .ci/run share: a status line, Debian packages, a build. Source it; needs only bash.
# Everything is said on stderr, on one line that changes while something lasts; the full output is in $log.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
log=${TMPDIR:-/tmp}/quattuor-$$.log
: >"$log"
steps=${steps:-3} step_no=0 step_text='' step_start=0
if [ -t 2 ]; then tty=1; else tty=0; fi

say() { # say TEXT: rewrites the status line on a terminal; elsewhere only new steps are printed
  [ "$tty" = 1 ] && printf '\r\033[K[%d/%d] %s' "$step_no" "$steps" "$1" >&2
  return 0
}
step() { # step TEXT: begins the next step
  step_no=$((step_no + 1)) step_text=$1 step_start=$SECONDS
  if [ "$tty" = 1 ]; then say "$1"; else printf '[%d/%d] %s\n' "$step_no" "$steps" "$1" >&2; fi
}
step_done() { # step_done [TEXT]
  local text="$step_text: ${1:-done}, $((SECONDS - step_start)) s"
  if [ "$tty" = 1 ]; then printf '\r\033[K[%d/%d] %s\n' "$step_no" "$steps" "$text" >&2; else printf '[%d/%d] %s\n' "$step_no" "$steps" "$text" >&2; fi
}
fail() { # fail TEXT: the end of the log, then the reason
  printf '\n' >&2
  tail -n 40 "$log" >&2
  printf 'error: %s (step "%s"; the whole output is in %s)\n' "$1" "$step_text" "$log" >&2
  exit 1
}

build_packages="gcc g++ cmake ninja-build pkg-config ccache libc6-dev libjansson-dev libpcre2-dev libutf8proc-dev libxxhash-dev libedit-dev libevent-dev libssl-dev libspng-dev libopenblas-pthread-dev"
test_packages="libcmocka-dev python3 python3-jinja2 python3-numpy openssl"

install_packages() { # install_packages NAME...: what is missing, by apt; asks for nothing when all is there
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  command -v apt-get >/dev/null || fail "these packages are missing and there is no apt-get: ${missing[*]}"
  local sudo=
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "not root and no sudo: please install ${missing[*]}"
    sudo=sudo
  fi
  say "$step_text: ${#missing[@]} packages (${missing[0]} …)"
  if ! $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
    say "$step_text: updating the package lists"
    $sudo apt-get update >>"$log" 2>&1 || fail "apt-get update failed; is the network there?"
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 ||
      fail "could not install ${missing[*]}"
  fi
}

# cuda_options: CMake arguments for a build with CUDA, where a toolkit is found (QUATTUOR_CUDA=0: without). The architecture is that
# of the GPU in this machine, Hopper where there is none.
cuda_options() {
  local nvcc capability
  [ "${QUATTUOR_CUDA:-1}" != 0 ] || return 0
  nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null) || return 0
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  case ${QUATTUOR_CUDA_ARCHITECTURES:-$capability} in
    90 | '') capability=90a ;;
    8[069]) ;;
    *) capability=${QUATTUOR_CUDA_ARCHITECTURES:-80} ;; # others run the sm_80 kernels
  esac
  printf '%s\n' "-DQTR_CUDA=ON -DCMAKE_CUDA_COMPILER=$nvcc -DQTR_CUDA_ARCHITECTURES=$capability"
}

build() { # build PRESET [CMAKE ARGUMENT...]: configures and builds into build/PRESET
  local preset=$1 line status
  shift
  (cd "$root" && cmake --preset "$preset" "$@") >>"$log" 2>&1 || fail "cmake could not configure"
  set +e
  (cd "$root" && NINJA_STATUS='[%f/%t] ' ninja -C "build/$preset" 2>&1; echo "ninja exit $?") | while IFS= read -r line; do
    printf '%s\n' "$line" >>"$log"
    case $line in
      \[*/*\]*) say "$step_text: ${line%%]*}]" ;;
      'ninja exit '*) exit "${line##* }" ;;
    esac
  done
  status=${PIPESTATUS[1]}
  set -e
  [ "$status" = 0 ] || fail "the build failed"
}
