"""What one checkpoint is, in numbers: all that the planner, the stages and the engine need to know before they touch a weight.

Read from `config.json` and the safetensors headers by `gantline_runtime.checkpoint`, carried in a termination message and in
`status.model` (camelCase keys, well under 3 KiB), read again by the operator. `from_json` therefore trusts nothing.
Imports no torch: the operator imports this module.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gantline_runtime.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "FAMILIES", "METHODS", "ModelFacts", "Quantization"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "transformers")
METHODS = ("awq",)
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_CHOICES: Mapping[str, tuple[str, ...]] = {"family": FAMILIES, "dtype": tuple(DTYPE_BYTES), "quantization.method": METHODS}
_MAX_TEXT = 256
_MAX_COUNT = 1 << 40
_MAX_BYTES = 1 << 60


@dataclass(frozen=True)
class Quantization:
    """How the linear layers' weights are stored. `version` is the layout's name, such as `gemm` for AWQ."""

    method: str
    bits: int
    group_size: int
    version: str


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one checkpoint. Sizes are counts of elements unless they say bytes."""

    architecture: str
    """The class that `config.json` names, such as `LlamaForCausalLM`."""
    family: str
    """One of `FAMILIES`; `transformers` is the fallback without a hand-written implementation."""
    supported: bool
    """Whether this release's engine runs it."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    """Longest prompt plus output that the model was made for, in tokens, rope scaling included."""
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str
    """Key of `DTYPE_BYTES`: type of the weights that are not quantized."""
    weight_bytes: int
    """Bytes of all tensors' data in the safetensors files, after quantization if any."""
    quantization: Quantization | None
    name: str
    revision: str
    fingerprint: str
    """`sha256:` over config.json, the index, every safetensors header and samples of the weights: equal for equal checkpoints."""
    image_folder: str | None = None
    """Folder of the image in which it lies, empty for the image's root, where the source is an image that a container runtime can mount;
    None: it is none."""
    fallback_reason: str | None = None
    """Why transformers' own implementation runs it, where it does; None also in facts of an earlier release."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight that is not quantized, as stored."""
        return DTYPE_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with camelCase keys; None and absent are the same."""
        values = {_camel(item.name): getattr(self, item.name) for item in dataclasses.fields(self)}
        if self.quantization is not None:
            values["quantization"] = {_camel(k): v for k, v in dataclasses.asdict(self.quantization).items()}
        return {key: value for key, value in values.items() if value is not None}

    @staticmethod
    def from_json(values: object) -> ModelFacts:
        """The facts in `values`, as `to_json` wrote them. Raises CheckpointError that names the field at fault."""
        facts: ModelFacts = _parse(ModelFacts, values, "")
        if facts.num_heads % facts.num_kv_heads:
            raise _bad("numKvHeads", facts.num_kv_heads, f"a divisor of numHeads ({facts.num_heads})")
        return facts


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _parse(cls: type, values: object, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise _bad(path or "the whole", values, "an object")
    hints = typing.get_type_hints(cls)
    names = {_camel(item.name): item.name for item in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in values if key not in names)
    if unknown:
        raise _bad(path + unknown[0][:80], "there", "no such field")
    return cls(**{name: _value(hints[name], values.get(key), path + key) for key, name in names.items()})


def _value(hint: Any, value: object, path: str) -> Any:
    """`value` checked against a field's type; the largest legal numbers keep every later product finite."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        return None if value is None else _value(inner, value, path)
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type, hint), value, path + ".")
    if hint is bool:
        if not isinstance(value, bool):
            raise _bad(path, value, "true or false")
        return value
    if hint is int:
        limit = _MAX_BYTES if path == "weightBytes" else _MAX_COUNT
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise _bad(path, value, f"a whole number from 1 to {limit}")
        return value
    if not isinstance(value, str) or len(value) > _MAX_TEXT or re.search(r"[\x00-\x1f\x7f]", value):
        raise _bad(path, value, f"a text of at most {_MAX_TEXT} characters")
    if path in _CHOICES and value not in _CHOICES[path]:
        raise _bad(path, value, " or ".join(_CHOICES[path]))
    return value


def _bad(path: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"model facts: {path} is {ascii(value)[:80]}, expected {expected}", cure="Inspect the model again.")
