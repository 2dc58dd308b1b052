#!/usr/bin/env bash
# Put the Dockerfile's base image together from Debian packages, under the name that its FROM uses, where no image registry can be reached.
# usage: scripts/base_image.sh    (root, Debian with apt-get; `buildah images` has it afterwards, and nothing is done where it already does)
#
# A stand-in, good for a rehearsal and no more: Python is Debian's own, of the same minor version (3.11.2 stands for 3.11.13), below /usr
# and not /usr/local; pip is Debian's too. Images for use are built where the published base can be pulled.
set -euo pipefail
cd "$(dirname "$0")/.."
image=$(sed -n 's/^ARG PYTHON=/python:/p' Dockerfile)        # python:3.11.13-slim-bookworm
suite=${image##*-}
python=python$(cut -d. -f1,2 <<<"${image#*:}")                # python3.11
if buildah inspect --type image "$image" >/dev/null 2>&1; then exit 0; fi
command -v mmdebstrap >/dev/null || { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends mmdebstrap; } >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The headers are in the published base as well; what is left out below, it leaves out too.
# shellcheck disable=SC2016  # $1 is mmdebstrap's
mmdebstrap --quiet --mode=root --variant=minbase \
  --include="ca-certificates,netbase,tzdata,$python,$python-venv,lib$python-dev,python3-pip,python3-distutils" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook="ln -s /usr/bin/$python \"\$1/usr/local/bin/python\"; ln -s /usr/bin/$python \"\$1/usr/local/bin/python3\"" \
  --customize-hook="rm -rf \"\$1/usr/lib/$python/EXTERNALLY-MANAGED\" \"\$1/usr/lib/$python/\"config-*; rm -f \"\$1\"/usr/lib/*/libpython*.a" \
  "$suite" "$work/root.tar"

container=$(buildah from scratch)
buildah add --quiet "$container" "$work/root.tar" / >/dev/null
buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 --cmd python3 "$container"
buildah commit --quiet --rm --format docker "$container" "$image" >/dev/null
echo "$image, put together from Debian $suite"
