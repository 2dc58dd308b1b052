#!/usr/bin/env bash
# Resolve the extras of pyproject.toml anew into requirements/*.txt: plain `name==version` lines, one set that fits together.
# usage: scripts/pin.sh [--upgrade-package NAME]...
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
common=(--quiet --python-version 3.11 --no-annotate --no-header --no-emit-index-url)
"$uv" pip compile "${common[@]}" "$@" --all-extras pyproject.toml -o requirements/all.txt --constraint requirements/choices.txt
for extra in operator runtime; do
  "$uv" pip compile "${common[@]}" --extra "$extra" pyproject.toml --constraint requirements/all.txt -o "requirements/$extra.txt"
done
