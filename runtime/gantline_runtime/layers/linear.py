"""Linear layers: where tensor parallelism and the stored formats of weights meet.

A layer knows which part of the matrix is its rank's; a format knows how such a part lies in a checkpoint and how to multiply with it.
So each format works in each layer: plain, and AWQ's `gemm` layout with 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from gantline_kernels import api

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.layers.weights import BuildContext, Target
from gantline_runtime.parallel import Parallel, Shard

__all__ = ["ColumnLinear", "GatedLinear", "Part", "RowLinear"]

_AWQ_PACK = 8  # 4-bit weights in one int32


class _Weights(Protocol):
    """A matrix [inputs, outputs] of this rank."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up, where the outputs are gate, then up."""

    def targets(self, name: str, inputs: Shard, outputs: Shard, at: int) -> Iterator[Target]:
        """The part of the stored matrix `name` that goes to output columns `at` and following."""


class _PlainWeights:
    """[outputs, inputs], as torch's linear layers store it."""

    def __init__(self, inputs: int, outputs: int, build: BuildContext) -> None:
        self.backend = build.backend
        self.weight = build.empty(outputs, inputs)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return api.linear(x, self.weight, bias, backend=self.backend)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return api.gated_linear(x, self.weight, bias, backend=self.backend)

    def targets(self, name: str, inputs: Shard, outputs: Shard, at: int) -> Iterator[Target]:
        yield Target(f"{name}.weight", (outputs.total, inputs.total), (outputs.slice, inputs.slice), self.weight[at : at + outputs.size])


class _AwqWeights:
    """AWQ's `gemm` layout: qweight int32 [inputs, outputs / 8], qzeros int32 [groups, outputs / 8], scales [groups, outputs]."""

    def __init__(self, inputs: int, outputs: int, group_size: int, build: BuildContext) -> None:
        if inputs % group_size or outputs % _AWQ_PACK:
            raise ConfigurationError(
                f"a quantized layer's part of {inputs} inputs and {outputs} outputs cannot hold whole groups of {group_size} inputs",
                cure="Use less tensor parallelism, or a checkpoint with a smaller group size.",
            )
        self.group_size = group_size
        self.backend = build.backend
        self.qweight = build.empty(inputs, outputs // _AWQ_PACK, dtype=torch.int32)
        self.qzeros = build.empty(inputs // group_size, outputs // _AWQ_PACK, dtype=torch.int32)
        self.scales = build.empty(inputs // group_size, outputs)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return api.awq_linear(x, self.qweight, self.qzeros, self.scales, self.group_size, bias, backend=self.backend)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return api.silu_and_mul(self.multiply(x, bias), backend=self.backend)

    def targets(self, name: str, inputs: Shard, outputs: Shard, at: int) -> Iterator[Target]:
        group = self.group_size
        groups = Shard(inputs.start // group, inputs.stop // group, inputs.total // group)
        words = Shard(outputs.start // _AWQ_PACK, outputs.stop // _AWQ_PACK, outputs.total // _AWQ_PACK)
        columns, packed = slice(at, at + outputs.size), slice(at // _AWQ_PACK, at // _AWQ_PACK + words.size)
        yield Target(f"{name}.qweight", (inputs.total, words.total), (inputs.slice, words.slice), self.qweight[:, packed])
        yield Target(f"{name}.qzeros", (groups.total, words.total), (groups.slice, words.slice), self.qzeros[:, packed])
        yield Target(f"{name}.scales", (groups.total, outputs.total), (groups.slice, outputs.slice), self.scales[:, columns])


def _make_weights(inputs: int, outputs: int, group_size: int | None, build: BuildContext) -> _Weights:
    if group_size is None:
        return _PlainWeights(inputs, outputs, build)
    return _AwqWeights(inputs, outputs, group_size, build)


@dataclass(frozen=True)
class Part:
    """One stored matrix among those packed into a layer: its full name, this rank's outputs, and its group size where quantized."""

    name: str
    outputs: Shard
    group_size: int | None = None


class ColumnLinear:
    """Several stored matrices side by side, split by outputs: [rows, inputs] -> [rows, all parts' outputs of this rank].

    Parts of one format share one multiplication; a checkpoint that quantizes only some of them still works.
    """

    def __init__(self, inputs: int, parts: Sequence[Part], *, bias: bool, build: BuildContext) -> None:
        self._inputs = Shard(0, inputs, inputs)
        self._groups: list[tuple[list[Part], _Weights, torch.Tensor | None]] = []
        for group_size, members in groupby(parts, key=lambda part: part.group_size):
            group = list(members)
            outputs = sum(part.outputs.size for part in group)
            self._groups.append((group, _make_weights(inputs, outputs, group_size, build), build.empty(outputs) if bias else None))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        results = [weights.multiply(x, bias) for _, weights, bias in self._groups]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

    def targets(self) -> Iterator[Target]:
        for parts, weights, bias in self._groups:
            at = 0
            for part in parts:
                yield from weights.targets(part.name, self._inputs, part.outputs, at)
                if bias is not None:
                    size = part.outputs.size
                    yield Target(f"{part.name}.bias", (part.outputs.total,), (part.outputs.slice,), bias[at : at + size])
                at += part.outputs.size


class GatedLinear(ColumnLinear):
    """Two stored matrices, gate and up: [rows, inputs] -> silu(gate) * up, [rows, one part's outputs of this rank]."""

    def __init__(self, inputs: int, gate: Part, up: Part, *, bias: bool, build: BuildContext) -> None:
        super().__init__(inputs, (gate, up), bias=bias, build=build)
        self._backend = build.backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._groups) > 1:  # only one of the two is quantized
            return api.silu_and_mul(super().__call__(x), backend=self._backend)
        ((_, weights, bias),) = self._groups
        return weights.multiply_gated(x, bias)


class RowLinear:
    """A matrix split by inputs: [rows, this rank's inputs] -> [rows, outputs], summed over the ranks."""

    def __init__(
        self, name: str, inputs: Shard, outputs: int, *, bias: bool, group_size: int | None, parallel: Parallel, build: BuildContext
    ) -> None:
        self._name = name
        self._inputs = inputs
        self._outputs = Shard(0, outputs, outputs)
        self._parallel = parallel
        self._weights = _make_weights(inputs.size, outputs, group_size, build)
        self._bias = build.empty(outputs) if bias and parallel.rank == 0 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._parallel.all_reduce(self._weights.multiply(x, self._bias))

    def targets(self) -> Iterator[Target]:
        yield from self._weights.targets(self._name, self._inputs, self._outputs, 0)
        if self._bias is not None:
            yield Target(f"{self._name}.bias", (self._outputs.total,), (self._outputs.slice,), self._bias)
