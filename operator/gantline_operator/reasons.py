"""What each reason means and what to do about it, as docs/operations.md says: `reasons.json` is made from its table (`make crds`)."""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass

__all__ = ["Meaning", "look_up"]


@dataclass(frozen=True)
class Meaning:
    """Markdown, without a full stop."""

    means: str
    cure: str


def look_up(reason: str) -> Meaning | None:
    """None for a reason that this release does not know."""
    return _table().get(reason)


@functools.cache
def _table() -> dict[str, Meaning]:
    text = importlib.resources.files(__package__).joinpath("reasons.json").read_text()
    return {reason: Meaning(*texts) for reason, texts in json.loads(text).items()}
