"""Settings of a process of the control plane: a frozen dataclass, filled from environment variables and flags of the same names.

Each field is declared by `setting(parser, default, help)`; its variable is its name in capitals after a prefix, its flag its name with
dashes; flags win. An unknown variable of the prefix is an error: a misspelt one would otherwise be ignored for as long as nobody looks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.termination import Reason

__all__ = [
    "Source", "document", "is_origin", "names", "namespaces", "number", "object_name", "one_of", "origins", "read", "seconds", "setting",
    "switch", "text",
]  # fmt: skip

T = TypeVar("T")

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def text(value: str) -> str:
    return value.strip()


def names(value: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in value.split(",")) if name)


def namespaces(value: str) -> tuple[str, ...]:
    found = names(value)
    for name in found:
        if not _NAMESPACE.fullmatch(name):
            raise ValueError(f"{name!r} is not a namespace's name")
    return found


def object_name(value: str) -> str:
    namespace, _, name = value.strip().partition("/")
    if value.strip() and not (_NAMESPACE.fullmatch(namespace) and re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name)):
        raise ValueError("expected namespace/name")
    return value.strip()


def is_origin(value: str) -> bool:
    """Whether it is a web origin, or `*` for all of them."""
    return value == "*" or re.fullmatch(r"https?://[^/\s,*]+", value) is not None


def origins(value: str) -> tuple[str, ...]:
    found = names(value)
    if not all(map(is_origin, found)):
        raise ValueError("expected origins such as https://example.org, or *")
    return found


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip() not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value.strip()

    return parse


def number(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        found = int(value)
        if not low <= found <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return found

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        found = float(value)
        if not low <= found <= high:  # also refuses NaN
            raise ValueError(f"expected {low:g} to {high:g} seconds")
        return found

    return parse


def switch(value: str) -> bool:
    return one_of("true", "false")(value) == "true"


def setting(parse: Callable[[str], Any], default: Any, help: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class Source:
    """Where settings come from. `not_ours`: variables of the prefix that mean something else."""

    program: str
    about: str
    prefix: str
    not_ours: Collection[str] = ()


def document(settings: type[Any], prefix: str) -> list[tuple[str, str, str, str]]:
    """(variable, flag, default, help) of every setting: a table for people, which a test compares."""
    return [(prefix + item.name.upper(), _flag(item.name), _show(item.default), item.metadata["help"]) for item in fields(settings)]


def read(settings: type[T], source: Source, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> T:
    """Settings from variables, then flags. Raises ConfigurationError naming the variable or flag and what it takes."""
    items = fields(settings)  # type: ignore[arg-type]
    known = {source.prefix + item.name.upper(): item for item in items}
    unknown = sorted(name for name in environment if name.startswith(source.prefix) and name not in known and name not in source.not_ours)
    if unknown:
        raise _refused(f"unknown setting {unknown[0]}", f"Known are {', '.join(known)}.")
    given = {item.name: (name, environment[name]) for name, item in known.items() if name in environment}
    given |= {name: (_flag(name), value) for name, value in _flags(settings, source, arguments).items()}
    parsers = {item.name: item.metadata["parse"] for item in items}
    return settings(**{name: _parsed(parsers[name], origin, value, source) for name, (origin, value) in given.items()})


def _flags(settings: type[Any], source: Source, arguments: Sequence[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog=source.program, description=f"{source.about} Every flag is also a {source.prefix}* variable.")
    for item in fields(settings):
        help = f"{item.metadata['help']} (default: {_show(item.default) or 'none'})"
        parser.add_argument(_flag(item.name), dest=item.name, metavar="VALUE", help=help.replace("%", "%%"))
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def _parsed(parse: Callable[[str], Any], origin: str, value: str, source: Source) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        cure = f"Correct it in the chart's values or the environment of {source.program}."
        raise _refused(f"{origin} is {value!r}: {error}", cure) from None


def _refused(message: str, cure: str) -> ConfigurationError:
    return ConfigurationError(message, reason=Reason.INVALID_CONFIGURATION, cure=cure)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _show(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, tuple) else str(value)
