"""API keys of the gateway: who may use it, for which models, and how much of it.

Keys are written as for the server (`gantline_runtime/server/key_lines.py`), with options of the gateway's own:

    alice sha256:9f86d08... models=chat,team-a/code,team-b/* tokens-per-minute=100000 concurrency=8 weight=2 priority=-5

`models` are names of models, in whatever namespace, or services as `namespace/name`, or all of a namespace; without it, all. A key of a
Secret is called SECRET/NAME, so that two Secrets may have keys of one name. Keys of one name (an old and a new one) share its limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.key_lines import CALLER_OPTIONS, MAX_KEYS, KeyLine, Option, digest_of, parse_entry, read_keys

__all__ = ["ANYONE", "ApiKey", "KeyRing", "keys_of_entry", "keys_of_file"]

_MAX_PATTERNS = 64
_DNS_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_MODEL = re.compile(rf"(?:{_DNS_LABEL}/)?(?:[A-Za-z0-9][A-Za-z0-9._:/-]{{0,127}})|{_DNS_LABEL}/\*")


def _models(text: str) -> tuple[str, ...] | None:
    names = tuple(text.split(","))
    return names if len(names) <= _MAX_PATTERNS and all(map(_MODEL.fullmatch, names)) else None


def _count(limit: int) -> Option:
    parse = lambda text: int(text) if re.fullmatch(r"[1-9]\d{0,11}", text) and int(text) <= limit else None
    return Option(parse, f"1 to {limit}")


_OPTIONS: Mapping[str, Option] = {
    **CALLER_OPTIONS,
    "models": Option(_models, f"up to {_MAX_PATTERNS} of NAME, NAMESPACE/NAME or NAMESPACE/*, with commas between"),
    "tokens-per-minute": _count(10**11),
    "concurrency": _count(10**6),
}


@dataclass(frozen=True)
class ApiKey:
    """What one key may. `name` is what logs and metrics show."""

    name: str = ""
    models: tuple[str, ...] | None = None
    """None: all."""
    tokens_per_minute: int | None = None
    """Prompt and completion, over all replicas of the gateway. None: no limit."""
    concurrency: int | None = None
    """Requests at once, over all replicas. None: no limit."""
    weight: float = 1.0
    """Share of an engine beside others that wait."""
    priority: int | None = None
    """The lowest `priority` that its requests may have. None: any, where nobody needs a key."""

    def may_use(self, namespace: str, name: str, model: str) -> bool:
        """Whether it may use the service `namespace/name`, which serves `model`."""
        return self.models is None or not {model, f"{namespace}/{name}", f"{namespace}/*"}.isdisjoint(self.models)


ANYONE = ApiKey()
"""Who asks where no key is needed."""


@dataclass(frozen=True)
class KeyRing:
    """All keys that are known, by the hash of the key."""

    entries: Mapping[bytes, ApiKey] = field(default_factory=dict)

    @staticmethod
    def of(entries: Iterable[tuple[bytes, ApiKey]]) -> KeyRing:
        """Of two entries for one key the first counts. Raises ConfigurationError for more keys than are allowed."""
        known = dict(reversed(list(entries)))
        if len(known) > MAX_KEYS:
            raise ConfigurationError(f"there are {len(known)} API keys; {MAX_KEYS} are allowed", cure="Remove what is superfluous.")
        return KeyRing(known)

    def find(self, key: str) -> ApiKey | None:
        """Whose `key` is. What a lookup's time may tell is of its hash, which helps nobody to guess a key."""
        return self.entries.get(digest_of(key))


def keys_of_file(path: Path) -> KeyRing:
    """The keys of a file, or of a folder with one in each file. Raises ConfigurationError."""
    return KeyRing.of((line.digest, _key(line, line.name)) for line in read_keys(path, _OPTIONS))


def keys_of_entry(secret: str, name: str, text: str) -> list[tuple[bytes, ApiKey]]:
    """The keys of one entry of a Secret. Raises ConfigurationError."""
    return [(line.digest, _key(line, f"{secret}/{line.name}")) for line in parse_entry(name, text, _OPTIONS)]


def _key(line: KeyLine, name: str) -> ApiKey:
    options = {option.replace("-", "_"): value for option, value in line.options.items()}
    return ApiKey(name, **{"priority": 0, **options})
