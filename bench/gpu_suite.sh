#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes and without a network:
#
#   bench/gpu_suite.sh OUT_DIR [WHEELS]
#
# builds in place for the GPU that is here, runs the GPU tests, the benchmarks of a step, of the
# formats and of DTensors, and compute-sanitizer, and leaves logs, bench.json, precision.json,
# sharded.json, pictures and summary.txt in OUT_DIR. Needed: a CUDA toolkit, and a `python3` with
# torch, triton, pybind11, ninja, setuptools, numpy, pytest, hypothesis, rich and matplotlib. WHEELS is a folder of wheels of other optimizers to measure beside ours; they
# are installed without their dependencies below OUT_DIR, for this run alone. The most important
# parts come first, each has its own time limit, and none depends on another's success. The exit code
# is 0 if every part that could be run passed, 1 if one did not, 2 for a wrong call, 3 where there is
# no GPU.
#
# GPU_SUITE_SECONDS          the time for everything (default: 525)
# FUSED_ADAMW_CUDA_ARCHS     what to compile for (default: the GPU that is here)
# shellcheck disable=SC2329  # `part` calls the functions by their names
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 || $1 == -* ]]; then
  echo "usage: bench/gpu_suite.sh OUT_DIR [WHEELS]" >&2
  exit 2
fi
mkdir -p -- "$1" || exit 2
out=$(cd -- "$1" && pwd)
wheels=()
if [[ $# -eq 2 ]]; then
  [[ -d $2 ]] && wheels=("$(cd -- "$2" && pwd)"/*.whl)
  if [[ ! -f ${wheels[0]-} ]]; then
    echo "gpu_suite: WHEELS: $2 is not a folder with wheels (*.whl)" >&2
    exit 2
  fi
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2
budget=${GPU_SUITE_SECONDS:-525}

if ! command -v python3 > /dev/null; then
  echo "gpu_suite: no python3 on the PATH" >&2
  exit 3
fi
if ! capability=$(python3 - << 'PYTHON'
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_suite: {sys.executable} has no torch ({error})")
if not torch.cuda.is_available():
    sys.exit(f"gpu_suite: no GPU: {sys.executable} has torch {torch.__version__}, which finds none")
print("{}.{}".format(*torch.cuda.get_device_capability()))
PYTHON
); then
  exit 3
fi
export FUSED_ADAMW_CUDA=on
export FUSED_ADAMW_CUDA_ARCHS=${FUSED_ADAMW_CUDA_ARCHS:-$capability}
export PYTHONUNBUFFERED=1
# What Triton compiles for the tests serves the benchmark and the sanitizer too.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton-cache}
# The source tree is what is tested, wherever else the package may be installed.
site=$out/peers
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
PATH=$PATH:/usr/local/cuda/bin

# --- The parts: each is run by a shell of its own, so that a time limit can end it ----------------

build() {
  python3 setup.py build_ext --inplace || return
  # An installation puts the folder triton_kernels below the package; a source tree needs a link.
  python3 -c 'import fused_adamw.triton_kernels' 2> /dev/null ||
    ln -s ../triton_kernels fused_adamw/triton_kernels
}

engines() {
  nvidia-smi
  python3 -m fused_adamw info
  python3 - << 'PYTHON'
import sys

from fused_adamw import engine_status

absent = {name: why for name, why in engine_status().items() if why is not None}
sys.exit("\n".join(f"engine {name} is absent: {why}" for name, why in absent.items()) or 0)
PYTHON
}

gpu_tests() {
  python3 -m pytest -m gpu -q --durations=10 --continue-on-collection-errors "$@"
}

verify() {
  python3 -m fused_adamw verify
}

# One after the other, so that a wheel that does not fit leaves the rest to be installed.
install_peers() { # target folder, wheels
  local target=$1 status=0 wheel
  shift
  for wheel in "$@"; do
    python3 -m pip install --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --disable-pip-version-check --target "$target" "$wheel" || status=1
  done
  return $status
}

benchmark() {
  # The most important cases come first; where the time ends, what was measured is written.
  python3 -m bench --device cuda --rounds 9 --block-ms 20 --json "$@"
}

sharded() {
  python3 -m bench.sharded --device cuda --json "$1/sharded.json"
}

sanitize() {
  local options=(--tool "$1" --error-exitcode 9 --target-processes all)
  # torch and Triton probe for what a driver has; that an answer is no is not an error of ours.
  [[ $1 == memcheck ]] && options+=(--report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer "${options[@]}" python3 -m bench.sanitize_case
}

export -f build engines gpu_tests verify install_peers benchmark sharded sanitize

# --- Running them ---------------------------------------------------------------------------------

lines=()
failed=0

note() { # name, seconds, result, log
  lines+=("$(printf '%-12s %5s s  %-34s %s' "$1" "$2" "$3" "$4")")
  printf '== %s: %s (%s s)\n' "$1" "$3" "$2"
}

# Runs a part: name, limit in seconds, log, function, its arguments.
part() {
  local name=$1 limit=$2 log=$3 left begin status result
  shift 3
  left=$((budget - SECONDS))
  if ((left < 15)); then
    note "$name" 0 "not run: no time left" ""
    return
  fi
  ((limit > left)) && limit=$left
  begin=$SECONDS
  printf '\n== %s\n' "$name" >> "$out/$log"
  # An interrupt lets the benchmark write down what it has measured.
  # shellcheck disable=SC2016  # expanded by the inner shell
  timeout --signal=INT --kill-after=10 "$limit" bash -c '"$@"' part "$@" >> "$out/$log" 2>&1
  status=$?
  case $status in
    0) result="passed" ;;
    124 | 137) result="FAILED: over its $limit s" ;;
    *) result="FAILED: exit code $status" ;;
  esac
  if [[ $status -ne 0 && $1 == sanitize ]] && grep -q 'Device not supported' "$out/$log"; then
    result="not possible on this machine"
  elif ((status != 0)); then
    failed=1
  fi
  note "$name" $((SECONDS - begin)) "$result" "$log"
}

shards=tests/gpu/test_gpu_distributed.py
rm -f -- "$out"/{setup,tests,bench,sanitizer}.log "$out"/{bench.json,precision.json,sharded.json,summary.txt} "$out"/*.png
rm -rf -- "$site"
part build 180 setup.log build
part engines 60 setup.log engines
part tests 210 tests.log gpu_tests tests --ignore="$shards"
((${#wheels[@]})) && part peers 30 setup.log install_peers "$site" "${wheels[@]}"
part benchmark 150 bench.log benchmark "$out/bench.json"
part distributed 120 tests.log gpu_tests "$shards"
part formats 60 bench.log benchmark "$out/precision.json" --task precision
part sharded 40 bench.log sharded "$out"
if command -v compute-sanitizer > /dev/null; then
  part memcheck 120 sanitizer.log sanitize memcheck
  part verify 60 tests.log verify
  for tool in racecheck initcheck synccheck; do
    part "$tool" 90 sanitizer.log sanitize "$tool"
  done
else
  note memcheck 0 "not possible: no compute-sanitizer" ""
  part verify 60 tests.log verify
fi
rm -rf -- "$site"

{
  echo
  [[ -f $out/bench.log ]] && grep -v '^== ' "$out/bench.log"
  grep -sE ' in [0-9.]+s' "$out/tests.log"
  echo
  printf '%-12s %7s  %-34s %s\n' part time result log
  printf '%s\n' "${lines[@]}"
  echo "$SECONDS s in all; logs in $out"
} | tee "$out/summary.txt"
exit "$failed"
