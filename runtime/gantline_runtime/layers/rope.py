"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) and their extensions to longer contexts, as one table.

`cos_sin[p]` holds cos and then sin of position p for the first half of a head's dimensions, float32, any attention factor multiplied in.
The frequencies are those of transformers' `rope_type`s, so that checkpoints mean the same here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gantline_runtime.errors import CheckpointError
from gantline_runtime.termination import Reason

__all__ = ["RopeConfig", "cos_sin_table", "parse_rope"]

_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    kind: str
    theta: float
    head_dim: int
    max_position_embeddings: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Context of the pre-training, for kinds that stretch it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the checkpoint says: YaRN's and Llama 3's own numbers."""


def parse_rope(config: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """From config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. Raises CheckpointError for kinds we lack."""
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        raise _bad("rope_parameters is no object")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in _TYPES:
        raise CheckpointError(
            f"config.json: the rotary embedding {str(kind)[:64]!r} is not implemented",
            reason=Reason.UNSUPPORTED_ARCHITECTURE,
            cure=f"Supported: {', '.join(_TYPES)}.",
        )
    if section.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise _bad("partial_rotary_factor is not implemented for this family")
    theta = _number(section, "rope_theta", _number(config, "rope_theta", 10000.0))
    original = config.get("original_max_position_embeddings") or section.get("original_max_position_embeddings") or max_position_embeddings
    factor = section.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position_embeddings / original
    if factor is None and kind != "default":
        raise _bad(f"the rotary embedding {kind!r} needs a factor")
    return RopeConfig(
        kind=kind,
        theta=theta,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        factor=_number({"factor": factor}, "factor", 1.0),
        original_max_position_embeddings=int(_number({"original": original}, "original", 1.0)),
        options=dict(section),
    )


def cos_sin_table(rope: RopeConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [num_positions, head_dim]: cosines, then sines."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    if rope.kind == "dynamic":
        angles = _dynamic_angles(rope, positions)
        scale = 1.0
    else:
        frequencies, scale = _frequencies(rope)
        angles = torch.outer(positions, frequencies)
    # In place: long contexts make this large, and a start waits for every copy of it.
    table, half = torch.empty(num_positions, rope.head_dim), rope.head_dim // 2
    torch.cos(angles, out=table[:, :half])
    torch.sin(angles, out=table[:, half:])
    return (table if scale == 1.0 else table.mul_(scale)).to(device)


def _base_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def _frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """(angle of one position for each pair of dimensions, factor on cos and sin)."""
    plain = _base_frequencies(rope.theta, rope.head_dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = _number(rope.options, "low_freq_factor", 1.0), _number(rope.options, "high_freq_factor", 4.0)
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / plain
    blend = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): dimensions that turn often keep their frequency, those that turn rarely are stretched."""
    options, dim = rope.options, rope.head_dim

    def dimension_of(rotations: float) -> float:
        return dim * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(_number(options, "beta_fast", 32.0))
    high = dimension_of(_number(options, "beta_slow", 1.0))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    given = rope.options.get("attention_factor")
    if given is not None:
        return _number(rope.options, "attention_factor", 1.0)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    mscale, mscale_all = rope.options.get("mscale"), rope.options.get("mscale_all_dim")
    return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)


def _dynamic_angles(rope: RopeConfig, positions: torch.Tensor) -> torch.Tensor:
    """NTK scaling whose base grows with the length: a token past the trained context is rotated with the base of its own length, as
    transformers rotates it while decoding; earlier tokens keep theirs."""
    length = (positions + 1).clamp(min=rope.max_position_embeddings)
    stretch = rope.factor * length / rope.max_position_embeddings - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.head_dim / (rope.head_dim - 2))
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.int64).float() / rope.head_dim
    return positions[:, None] / theta[:, None] ** exponents


def _number(section: Mapping[str, Any], key: str, default: float) -> float:
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise _bad(f"{key} is {str(value)[:64]!r}, expected a positive number")
    return float(value)


def _bad(message: str) -> CheckpointError:
    return CheckpointError(f"config.json: {message}", cure="Correct config.json, or download the checkpoint again.")
