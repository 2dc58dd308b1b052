"""What a cache volume holds: artefacts that are whole, and what killed processes left half made, which nobody else may know of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gantline_runtime.artefact import read_manifest

__all__ = ["MAX_LISTED", "list_contents"]

MAX_LISTED = 24
"""In an answer that has a model's facts as well."""

_NAME = re.compile(r"([a-z0-9]{1,16}-[0-9a-f]{10})(\.partial)?")


def list_contents(root: Path, limit: int) -> dict[str, Mapping[str, int]]:
    """`found`: bytes of whole artefacts by the names of their folders; `halves`: of those that are not, by the names that they would have.
    At most `limit` together, the largest: each takes some 45 of the 4096 bytes of a Job's answer. What cannot be read is left out.
    """
    whole: dict[str, int] = {}
    halves: dict[str, int] = {}
    for folder, name in _folders(root):
        manifest = read_manifest(folder)
        if manifest is not None and folder.name == name:
            whole[name] = manifest.bytes
        else:
            halves[name] = halves.get(name, 0) + _bytes(folder)
    largest = sorted([*whole.items(), *halves.items()], key=lambda item: (-item[1], item[0]))[:limit]
    listed = {name for name, _ in largest}
    return {"found": _only(whole, listed), "halves": _only(halves, listed)}


def _folders(root: Path) -> Iterable[tuple[Path, str]]:
    """Folders of artefacts, each with the artefact's name."""
    try:
        paths = sorted(root.iterdir())
    except OSError:
        return
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_dir() and not path.is_symlink():
            yield path, match[1]


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _only(sizes: Mapping[str, int], names: set[str]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name in names}
