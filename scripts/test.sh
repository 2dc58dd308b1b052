#!/usr/bin/env bash
# The suite, in the order in which failures are cheapest: two workers for what is independent, one for what owns the node.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-}
[ -n "$HF_HUB_OFFLINE" ] || unset HF_HUB_OFFLINE
pytest=.venv/bin/pytest
"$pytest" -q -n 2 --dist worksteal -m "not node and not gpu" tests "$@"
"$pytest" -q -m "node and not gpu" tests "$@"
