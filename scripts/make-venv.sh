#!/usr/bin/env bash
# Make the development environment: every pin of requirements/all.txt and this tree, editable. usage: scripts/make-venv.sh DIR
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-.venv}
python=$(command -v python3) || { echo "gantline: Python 3.11 or newer is needed; install python3 and python3-venv" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gantline: $python is older than Python 3.11; install a newer one" >&2; exit 2; }
[ -x "$dir/bin/python" ] || "$python" -m venv "$dir" || { echo "gantline: could not make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
[ -x "$dir/bin/uv" ] || "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep -E '^uv==' requirements/tools.txt)"
"$dir/bin/uv" pip install --quiet --python "$dir/bin/python" -r requirements/all.txt -r requirements/tools.txt
"$dir/bin/uv" pip install --quiet --python "$dir/bin/python" --no-deps --no-build-isolation --editable .
# Pods mount this environment read-only, so they could never keep compiled modules: without these, `import torch` takes 6 s instead of 2 s.
packages=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
(cd "$packages" && "$OLDPWD/$dir/bin/python" -m compileall -q -j 0 $(ls -d */ | grep -vE '^(nvidia|mypy|ruff|hadolint|cuda|.*-info)') >/dev/null) || true
touch "$dir/.installed"
