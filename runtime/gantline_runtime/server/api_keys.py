"""API keys: who may use the server, under which name, and with which share of it.

A file with a key on each line, or a folder with a key in each file, such as a mounted Secret, where the file's name is the key's:

    alice sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 weight=2 priority=-5

Only the SHA-256 of a key is kept. That is enough for keys that nobody can guess: `gantline api-key NAME` makes one of 256 random bits. A
folder's file may hold the key itself instead, since a Secret is one already. Two keys may have one name while one replaces the other.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.callers import BEST_PRIORITY, Caller

__all__ = ["ApiKeys", "describe_key", "make_key"]

_MAX_BYTES = 1 << 20
_MAX_KEYS = 4096
_MAX_KEY_CHARS = 512
_MIN_KEY_CHARS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_CURE = "Make a key with `gantline api-key NAME`; docs/server.md has the format."


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
        entries = tuple(_read(self.path))
        if not entries:
            raise ConfigurationError(f"{self.path} holds no API key", cure=_CURE)
        if len(entries) > _MAX_KEYS or len({entry.digest for entry in entries}) < len(entries):
            raise ConfigurationError(f"{self.path} holds a key twice, or more than {_MAX_KEYS} keys", cure="Remove what is superfluous.")
        self._entries = entries

    def find(self, key: str) -> Caller | None:
        """Whose `key` is. How long it takes depends on nothing but how many keys there are."""
        digest = hashlib.sha256(key[:_MAX_KEY_CHARS].encode()).digest()
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found


def make_key() -> str:
    return "gl-" + secrets.token_urlsafe(32)


def describe_key(name: str, key: str) -> str:
    """The line for a file of keys. Raises ConfigurationError for a name that cannot be one."""
    _check_name(name, "the name")
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _read(path: Path) -> Iterator[_Entry]:
    try:
        if path.is_dir():
            for file in sorted(path.iterdir()):
                if not file.name.startswith(".") and file.is_file():  # a Secret's data lies behind ..data
                    yield _parse_secret(file.name, _read_text(file))
            return
        for number, line in enumerate(_read_text(path).splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                name, _, rest = line.strip().partition(" ")
                yield _parse(name, rest, f"{path}, line {number}")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}", cure=_CURE) from None


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} has more than {_MAX_BYTES} bytes", cure=_CURE)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not text", cure=_CURE) from None


def _parse_secret(name: str, text: str) -> _Entry:
    text = text.strip()
    if not text.startswith("sha256:"):
        key, _, options = text.partition(" ")
        if not _MIN_KEY_CHARS <= len(key) <= _MAX_KEY_CHARS:
            cause = f"the key {name!r} has {len(key)} characters; {_MIN_KEY_CHARS} to {_MAX_KEY_CHARS} are allowed"
            raise ConfigurationError(cause, cure=_CURE)
        text = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {options}"
    return _parse(name, text, f"the key {name!r}")


def _parse(name: str, text: str, place: str) -> _Entry:
    """`text` is never repeated in an error: it may be a key that was put in by mistake."""
    _check_name(name, place)
    digest, *options = text.split() or [""]
    match = _HASH.fullmatch(digest)
    if match is None:
        raise ConfigurationError(f"{place}: after the name, sha256: and 64 hexadecimal digits are expected", cure=_CURE)
    weight, priority, internal = 1.0, 0, False
    for option in options:
        key, _, value = option.partition("=")
        if key == "weight" and re.fullmatch(r"\d{1,4}(\.\d{1,4})?", value) and float(value) > 0:
            weight = float(value)
        elif key == "priority" and re.fullmatch(r"-?\d{1,2}", value) and abs(int(value)) <= -BEST_PRIORITY:
            priority = int(value)
        elif option == "internal":
            internal = True
        else:
            bounds = f"weight= (above 0), priority= ({BEST_PRIORITY} to {-BEST_PRIORITY}) and internal"
            cause = f"{place}: after the hash, {bounds} are allowed"
            raise ConfigurationError(cause, cure=_CURE)
    return _Entry(bytes.fromhex(match[1]), Caller(name, weight, priority, internal))


def _check_name(name: str, place: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{place} is not 1 to 64 letters, digits, '.', '_' or '-'", cure=_CURE)
