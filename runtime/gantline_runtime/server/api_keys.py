"""API keys: who may use the server, under which name, and with which share of it. `key_lines.py` has the format."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.callers import Caller
from gantline_runtime.server.key_lines import CALLER_OPTIONS, MAX_KEYS, KeyLine, Option, digest_of, read_keys

__all__ = ["ApiKeys", "make_key"]


_OPTIONS = {**CALLER_OPTIONS, "internal": Option(lambda _: True, mark=True)}
"""`internal` marks the key of a gateway, which may read what concerns all callers."""


@dataclass(frozen=True)
class _Entry:
    digest: bytes
    caller: Caller


class ApiKeys:
    """The keys of a file or folder, read again by `reload`."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError if it cannot be read, holds no key, or something else."""
        self.path = path
        self._entries: tuple[_Entry, ...] = ()
        self.reload()

    def reload(self) -> None:
        """Raises ConfigurationError; then the keys stay as they are."""
        entries = tuple(_entry(line) for line in read_keys(self.path, _OPTIONS))
        if not entries:
            cure = "Make a key with `gantline api-key NAME`; docs/server.md has the format."
            raise ConfigurationError(f"{self.path} holds no API key", cure=cure)
        if len(entries) > MAX_KEYS or len({entry.digest for entry in entries}) < len(entries):
            raise ConfigurationError(f"{self.path} holds a key twice, or more than {MAX_KEYS} keys", cure="Remove what is superfluous.")
        self._entries = entries

    def find(self, key: str) -> Caller | None:
        """Whose `key` is. How long it takes depends on nothing but how many keys there are."""
        digest = digest_of(key)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found


def make_key() -> str:
    return "gl-" + secrets.token_urlsafe(32)


def _entry(line: KeyLine) -> _Entry:
    weight, priority = line.options.get("weight", 1.0), line.options.get("priority", 0)
    return _Entry(line.digest, Caller(line.name, weight, priority, line.options.get("internal", False)))
