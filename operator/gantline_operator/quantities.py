"""Kinds of field that hold an amount as text: quantities, decimals, durations. `fields.py` says what a kind is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from gantline_operator.fields import Schema, shown, wrong

__all__ = ["Amount", "DecimalText", "Duration", "Quantity", "parse_quantity"]

_DECIMAL = {suffix: 1000**power for power, suffix in enumerate(("", "k", "M", "G", "T", "P"))}
_BINARY = {suffix: 1024**power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1)}
_SUFFIXES = {**_DECIMAL, **_BINARY}
_QUANTITY = r"[0-9]{1,12}(\.[0-9]{1,6})?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"


def parse_quantity(text: str) -> Decimal:
    """The number that a Kubernetes quantity such as `24Gi`, `1.5` or `250m` stands for. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{0,12})?)([a-zA-Z]{0,2})\s*", text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a quantity")
    number, suffix = match.groups()
    if suffix == "m":
        return Decimal(number) / 1000
    if suffix not in _SUFFIXES:
        raise ValueError(f"{shown(text)} has an unknown suffix")
    return Decimal(number) * _SUFFIXES[suffix]


@dataclass(frozen=True)
class Quantity:
    """An amount such as `24Gi`; bytes (a whole number) in Python. With `auto`, that word is None."""

    auto: bool = False

    def schema(self) -> Schema:
        pattern = f"^({'auto|' if self.auto else ''}{_QUANTITY})$"
        return {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 24,
            "pattern": pattern,
        }

    def parse(self, value: object, path: str) -> int | None:
        if self.auto and value == "auto":
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not re.fullmatch(_QUANTITY, value):
            raise wrong(path, value, self.describe())
        return int(parse_quantity(value))

    def describe(self) -> str:
        return ("auto, or " if self.auto else "") + "a quantity such as 24Gi"


@dataclass(frozen=True)
class Amount(Quantity):
    """A quantity that is handed on as it was written, for a pod's resources."""

    def parse(self, value: object, path: str) -> Any:
        super().parse(value, path)
        return str(value)

    def describe(self) -> str:
        return "a quantity such as 2Gi or 500m"


@dataclass(frozen=True)
class DecimalText:
    """A number as text, since Kubernetes' API avoids floats: JSON readers round them differently."""

    minimum: str
    maximum: str
    open_ends: bool = False

    _PATTERN: ClassVar[str] = r"[0-9]{1,4}(\.[0-9]{1,6})?"

    def schema(self) -> Schema:
        less = "<" if self.open_ends else "<="
        rule = f"double({self.minimum}) {less} double(self) && double(self) {less} double({self.maximum})"
        return {
            "type": "string",
            "maxLength": 11,
            "pattern": f"^({self._PATTERN})$",
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be {self.describe()}", "reason": "FieldValueInvalid"}],
        }

    def parse(self, value: object, path: str) -> float:
        if not isinstance(value, str) or not re.fullmatch(self._PATTERN, value):
            raise wrong(path, value, self.describe())
        number = Decimal(value)
        low, high = Decimal(self.minimum), Decimal(self.maximum)
        if not (low < number < high if self.open_ends else low <= number <= high):
            raise wrong(path, value, self.describe())
        return float(number)

    def describe(self) -> str:
        return f"a number in quotes, {self.minimum} to {self.maximum}{', both excluded' if self.open_ends else ''}"


@dataclass(frozen=True)
class Duration:
    """`90s`, `2m`, `1h`; seconds in Python."""

    maximum_s: int

    _PATTERN: ClassVar[str] = r"[0-9]{1,6}(s|m|h)"

    def schema(self) -> Schema:
        rule = f"duration(self) <= duration('{self.maximum_s}s')"
        return {
            "type": "string",
            "maxLength": 7,
            "pattern": f"^({self._PATTERN})$",
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be {self.describe()}", "reason": "FieldValueInvalid"}],
        }

    def parse(self, value: object, path: str) -> float:
        if not isinstance(value, str) or not re.fullmatch(self._PATTERN, value):
            raise wrong(path, value, self.describe())
        seconds = int(value[:-1]) * {"s": 1, "m": 60, "h": 3600}[value[-1]]
        if seconds > self.maximum_s:
            raise wrong(path, value, self.describe())
        return float(seconds)

    def describe(self) -> str:
        return f"a duration such as 90s or 2m, at most {self.maximum_s}s"
