# mypy: disable-error-code="no-untyped-def"
"""Linear layers whose rows do not depend on how many there are: plain weights, and AWQ's unpacked on the way.

No split over the inputs: one accumulator goes along them, 16 at a time and in order, as the matrix units do it. Weights are the left
operand, so that a tile may have as few as 16 rows of input without another instruction. What is left to the hardware is that the size of a
tile and a row's place in it do not matter; `invariant_triton_backend.find_variance` tries that on the GPU at hand, for every tile here.
So a tile may be chosen by what is fastest for the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from gantline_kernels import devices
from gantline_kernels.triton_kernels.awq import _unpack_tile
from gantline_kernels.triton_kernels.early import capability
from gantline_kernels.triton_kernels.integers import cdiv

__all__ = ["AWQ_TILES", "TILES", "WIDE_TILES", "Tile", "choose_tile", "invariant_awq_linear", "invariant_linear", "tiles_of"]

_DEPTH = 64
_GROUP = 8
"""Row tiles that follow each other for the same weights, so that these are read once from memory."""
_HOPPER = (9, 0)
_LARGE_SHARED, _MUCH_SHARED_BYTES, _SHARED_BYTES = (9, 10), 200 << 10, 96 << 10
"""Generations whose blocks have 227 KB of shared memory, and what of it the pipeline takes there and elsewhere."""
_READ, _MULTIPLY = 40.0, 2048.0
"""What a multiprocessor does in a cycle, about: bytes from the second-level cache, multiplications of 16-bit numbers."""


@dataclass(frozen=True)
class Tile:
    """Outputs and rows of a program, its warps and pipeline stages; `share`: of the matrix units' rate, about, that it reaches."""

    outputs: int
    rows: int
    warps: int
    stages: int
    share: float


TILES = (
    Tile(64, 16, 4, 8, 0.15),
    Tile(64, 64, 4, 6, 0.25),
    Tile(128, 128, 4, 4, 0.5),
    Tile(128, 256, 8, 4, 0.75),
)
"""Of fourteen that were tried on an H100, four with which a layer is within 4 % of the best (docs/perf-log.md); a start compiles each."""
AWQ_TILES = (Tile(64, 16, 4, 4, 0.1), Tile(64, 64, 4, 3, 0.25), Tile(128, 128, 8, 3, 0.4))
WIDE_TILES = (Tile(64, 16, 4, 2, 0.1),)
"""For float32, which the matrix units do not multiply exactly."""


def tiles_of(dtype: torch.dtype, *, awq: bool = False) -> tuple[Tile, ...]:
    if dtype == torch.float32:
        return WIDE_TILES
    return AWQ_TILES if awq else TILES


@cache
def choose_tile(tiles: tuple[Tile, ...], rows: int, outputs: int, num_sms: int) -> Tile:
    """The tile that takes the least time by a rough count: rounds of programs, times what bounds a program of that size."""

    def cycles(tile: Tile) -> float:
        rounds = cdiv(cdiv(rows, tile.rows) * cdiv(outputs, tile.outputs), num_sms)
        return rounds * max(2 * (tile.rows + tile.outputs) / _READ, tile.rows * tile.outputs / (_MULTIPLY * tile.share))

    return min(tiles, key=cycles)


@triton.jit
def _place(program, rows, outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, output tile) of a program: a few row tiles side by side, then the next outputs."""
    row_tiles = tl.cdiv(rows, ROWS)
    in_group = GROUP * tl.cdiv(outputs, OUTPUTS)
    first = program // in_group * GROUP
    width = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % width, program % in_group // width


@triton.jit
def _store(out, bias, acc, row, column, rows, outputs, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[:, None]
    target = out + row[None, :].to(tl.int64) * outputs + column[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (column < outputs)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _invariant_linear(
    x, weight, bias, out, rows, inputs, outputs, x_stride,
    BIAS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = _place(tl.program_id(0), rows, outputs, ROWS, OUTPUTS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    if not TMA:
        x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
        weight_row = weight + tl.minimum(column, outputs - 1)[:, None].to(tl.int64) * inputs
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, inputs, DEPTH):
        if TMA:
            left = weight.load([output_tile * OUTPUTS, start])
            right = x.load([row_tile * ROWS, start])
        else:
            depth = start + tl.arange(0, DEPTH)
            if EVEN:
                left = tl.load(weight_row + depth[None, :])
                right = tl.load(x_row + depth[None, :])
            else:
                left = tl.load(weight_row + depth[None, :], mask=(depth < inputs)[None, :], other=0.0)
                right = tl.load(x_row + depth[None, :], mask=(depth < inputs)[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    _store(out, bias, acc, row, column, rows, outputs, BIAS)


@triton.jit(do_not_specialize=["rows"])
def _invariant_awq_linear(
    x, qweight, qzeros, scales, bias, out, rows, inputs, outputs, group_size, x_stride,
    BIAS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = _place(tl.program_id(0), rows, outputs, ROWS, OUTPUTS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        right = tl.load(x_row + depth[None, :], mask=(depth < inputs)[None, :], other=0.0)
        inside = (depth < inputs)[:, None] & (column < outputs)[None, :]
        left = _unpack_tile(qweight, qzeros, scales, depth.to(tl.int64), column, inside, outputs, group_size)
        left = left.to(scales.dtype.element_ty).to(right.dtype)
        acc = tl.dot(tl.trans(left), tl.trans(right), acc, input_precision=PRECISION)
    _store(out, bias, acc, row, column, rows, outputs, BIAS)


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N]. `tile` and `tma` are for tests and tuning; None: chosen here."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    rows, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty((rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    if not rows:
        return out
    tile = tile or choose_tile(tiles_of(x.dtype), rows, outputs, devices.num_sms(x.device.index))
    by_tma = _can_use_tma(x, weight) if tma is None else tma
    left, right = (_descriptor(weight, tile.outputs), _descriptor(x, tile.rows)) if by_tma else (weight, x)
    _invariant_linear[(cdiv(rows, tile.rows) * cdiv(outputs, tile.outputs),)](
        right, left, bias, out, rows, inputs, outputs, x.stride(0),
        BIAS=bias is not None, EVEN=inputs % _DEPTH == 0, TMA=by_tma, **_options(tile, x),
    )  # fmt: skip
    return out


def invariant_awq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`api.awq_linear`. `tile` is for tests and tuning; None: chosen here."""
    x = x if x.stride(1) == 1 else x.contiguous()
    qweight, qzeros, scales = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    (rows, inputs), outputs = x.shape, scales.shape[1]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    tile = tile or choose_tile(tiles_of(x.dtype, awq=True), rows, outputs, devices.num_sms(x.device.index))
    _invariant_awq_linear[(cdiv(rows, tile.rows) * cdiv(outputs, tile.outputs),)](
        x, qweight, qzeros, scales, bias, out, rows, inputs, outputs, group_size, x.stride(0),
        BIAS=bias is not None, **_options(tile, x, awq=True),
    )  # fmt: skip
    return out


def _options(tile: Tile, x: torch.Tensor, *, awq: bool = False) -> dict[str, object]:
    weight_bytes = 10 if awq else x.element_size()  # words of weights and zeros, and a scale, are brought for every weight
    shared_bytes = _MUCH_SHARED_BYTES if capability(x.device)[0] in _LARGE_SHARED else _SHARED_BYTES
    most = shared_bytes // (_DEPTH * (tile.outputs * weight_bytes + tile.rows * x.element_size())) + awq
    return {
        "OUTPUTS": tile.outputs, "ROWS": tile.rows, "DEPTH": _DEPTH, "GROUP": _GROUP,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": min(tile.stages, most),
    }  # fmt: skip


def _can_use_tma(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether tiles can come by the copy engine of Hopper and newer: 16-bit numbers, rows at multiples of 16 bytes."""
    if capability(x.device) < _HOPPER or x.dtype == torch.float32:
        return False
    return all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 and t.shape[1] >= _DEPTH for t in (x, weight))


def _descriptor(matrix: torch.Tensor, rows: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, _DEPTH])
