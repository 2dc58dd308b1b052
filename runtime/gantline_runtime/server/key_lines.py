"""How API keys are written down, for the server and for the gateway: a name, the key's hash, and options that the reader knows.

A file with a key on each line, or a folder with a key in each file, such as a mounted Secret, where the file's name is the key's:

    alice sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 weight=2 priority=-5

Only the SHA-256 of a key is kept. That is enough for keys that nobody can guess: `gantline api-key NAME` makes one of 256 random bits. A
folder's file may hold the key itself instead, since a Secret is one already. Two keys may have one name while one replaces the other: two
lines of a file, also of a folder's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.callers import BEST_PRIORITY

__all__ = ["CALLER_OPTIONS", "MAX_KEYS", "KeyLine", "Option", "describe_key", "digest_of", "parse_entry", "read_keys"]

MAX_KEYS = 4096
_MAX_BYTES = 1 << 20
_MAX_KEY_CHARS = 512
_MIN_KEY_CHARS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_CURE = "Make a key with `gantline api-key NAME`; docs/server.md has the format."


@dataclass(frozen=True)
class Option:
    """One `name=value` after a key's hash. `parse` returns None for a value that is not allowed; `allowed` says what is.

    A `mark` stands there as its name alone.
    """

    parse: Callable[[str], Any]
    allowed: str = ""
    mark: bool = False

    def describe(self, name: str) -> str:
        return name if self.mark else f"{name}= ({self.allowed})"


def _weight(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,4}(\.\d{1,4})?", text) and float(text) > 0 else None


def _priority(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,2}", text) and abs(int(text)) <= -BEST_PRIORITY else None


CALLER_OPTIONS: Mapping[str, Option] = {
    "weight": Option(_weight, "above 0"),
    "priority": Option(_priority, f"{BEST_PRIORITY} to {-BEST_PRIORITY}"),
}
"""What an engine's queue does with a key's requests."""


@dataclass(frozen=True)
class KeyLine:
    name: str
    digest: bytes
    options: Mapping[str, Any]
    """Parsed, those that are given."""


def digest_of(key: str) -> bytes:
    """What is kept of `key`, whoever sent it."""
    return hashlib.sha256(key[:_MAX_KEY_CHARS].encode()).digest()


def describe_key(name: str, key: str) -> str:
    """The line for a file of keys. Raises ConfigurationError for a name that cannot be one."""
    _check_name(name, "the name")
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(path: Path, options: Mapping[str, Option] = CALLER_OPTIONS) -> Iterator[KeyLine]:
    """All keys of a file or folder. Raises ConfigurationError, which never shows what may be a key."""
    try:
        if path.is_dir():
            for file in sorted(path.iterdir()):
                if not file.name.startswith(".") and file.is_file():  # a Secret's data lies behind ..data
                    yield from parse_entry(file.name, _read_text(file), options)
            return
        for number, line in _lines(_read_text(path)):
            name, _, rest = line.partition(" ")
            yield _parse(name, rest, f"{path}, line {number}", options)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}", cure=_CURE) from None


def parse_entry(name: str, text: str, options: Mapping[str, Option] = CALLER_OPTIONS) -> Iterator[KeyLine]:
    """The keys of one file of a folder, or of one entry of a Secret: a key or a hash on each line. Raises ConfigurationError."""
    place = f"the key {name!r}"
    lines = list(_lines(text)) or [(1, "")]
    for _, line in lines:
        if not line.startswith("sha256:"):
            key, _, rest = line.partition(" ")
            if not _MIN_KEY_CHARS <= len(key) <= _MAX_KEY_CHARS:
                cause = f"{place} has {len(key)} characters; {_MIN_KEY_CHARS} to {_MAX_KEY_CHARS} are allowed"
                raise ConfigurationError(cause, cure=_CURE)
            line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {rest}"
        yield _parse(name, line, place, options)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} has more than {_MAX_BYTES} bytes", cure=_CURE)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not text", cure=_CURE) from None


def _parse(name: str, text: str, place: str, known: Mapping[str, Option]) -> KeyLine:
    """`text` is never repeated in an error: it may be a key that was put in by mistake."""
    _check_name(name, place)
    digest, *given = text.split() or [""]
    match = _HASH.fullmatch(digest)
    if match is None:
        raise ConfigurationError(f"{place}: after the name, sha256: and 64 hexadecimal digits are expected", cure=_CURE)
    options = {}
    for part in given:
        option, equals, value = part.partition("=")
        fits = option in known and option not in options and known[option].mark is not bool(equals)
        parsed = known[option].parse(value) if fits else None
        if parsed is None:
            allowed = ", ".join(rule.describe(title) for title, rule in known.items())
            raise ConfigurationError(f"{place}: after the hash, each once, these are allowed: {allowed}", cure=_CURE)
        options[option] = parsed
    return KeyLine(name, bytes.fromhex(match[1]), options)


def _check_name(name: str, place: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{place} is not 1 to 64 letters, digits, '.', '_' or '-'", cure=_CURE)
