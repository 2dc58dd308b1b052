#!/usr/bin/env bash
# compute-sanitizer over the kernels, on a GPU: memory errors in all of them, races in shared memory in the CUDA C++ ones (the shared
# memory of Triton's kernels is its compiler's). usage: scripts/sanitize_kernels.sh [python]
# Every tensor gets memory of its own, so that reading past one shows. Exit status 0: nothing found, and results right.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=kernels:.
check() { # tool, backend, further options
  local tool=$1 backend=$2
  shift 2
  echo "== $tool, $backend"
  compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$@" "$python" -m tests.kernels.sanitized_cases "$backend"
}
check memcheck cuda
check racecheck cuda --kernel-name kernel_substring=gantline
check memcheck triton
check memcheck invariant_triton
echo "clean"
