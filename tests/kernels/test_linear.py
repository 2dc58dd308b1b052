"""Linear layers for few rows: the one-row kernel under the interpreter, its compilation, and which shapes our kernels take."""

from __future__ import annotations

import pytest
import torch
from gantline_kernels import api, library, reference
from gantline_kernels.absent_gpu import CHIPS, absent_gpus
from gantline_kernels.few_rows_linear import fits_few_rows_linear
from gantline_kernels.hopper_batch_linear import has_batch_linear
from gantline_kernels.hopper_gated_linear import choose_tile, wins
from gantline_kernels.hopper_split_linear import choose_tiles
from gantline_kernels.triton_kernels.linear import has_one_row_linear

from tests.kernels.cases import largest_error
from tests.kernels.remembered import run_check

_COMPILE = """
import sys, torch
from gantline_kernels.triton_kernels.linear import one_row_linear
from tests.kernels import compile_checks
compile_checks.compile_only(int(sys.argv[1]))
x, weight = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(64, 4096, dtype=torch.bfloat16)
for early in {False, sys.argv[1] == "90"}:
    one_row_linear(x, weight, weight[0, :64], early=early)
    print(early, compile_checks.compiled[-1][1].asm["ptx"].count("griddepcontrol"))
"""


def test_the_one_row_kernel_equals_its_reference_under_the_interpreter() -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest"]
    run_check("-m", "pytest", *options, "tests/kernels/linear_checks.py", TRITON_INTERPRET="1", GANTLINE_KERNEL_BACKEND="triton")


def test_the_one_row_kernel_compiles_and_waits_for_earlier_kernels_only_if_it_starts_early() -> None:
    assert set(run_check("-c", _COMPILE, "80").splitlines()) == {"False 0"}
    assert set(run_check("-c", _COMPILE, "90").splitlines()) == {"False 0", "True 2"}


@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (1, 8), (1000, 200), (18944, 3584), (262144, 2304)])
@pytest.mark.parametrize("rows", [1, 2, 9, 16])
def test_the_kernel_for_few_rows_takes_any_shape_of_aligned_rows(rows: int, outputs: int, inputs: int) -> None:
    x, weight = (torch.empty(n, inputs, dtype=torch.bfloat16, device="meta") for n in (rows, outputs))
    fits = fits_few_rows_linear
    assert fits(x, weight)
    assert not fits(x.float(), weight.float())
    assert not fits(torch.empty(17, inputs, dtype=torch.bfloat16, device="meta"), weight)
    assert not fits(*(torch.empty(n, inputs + 4, dtype=torch.bfloat16, device="meta") for n in (rows, outputs)))


@pytest.mark.parametrize("chip", ["A100", "L4", "H100", "RTX PRO 6000"])
def test_few_rows_go_to_our_kernel_where_it_is_built_but_for_hoppers_single_one(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(library, "call", lambda name, *arguments: called.append(name))
    index = next(i for i, known in enumerate(CHIPS) if known.name == chip)
    with absent_gpus():
        weight = torch.empty(40, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        for built in (object(), None):
            monkeypatch.setattr(library, "load", lambda built=built: built)
            for operation in (api.linear, api.gated_linear):
                taken = []
                for rows in (1, 2, 8, 9, 16, 17):
                    operation(weight[:rows], weight, backend="cuda")
                    taken += [rows] * called.count("gantline_linear_few_rows")
                    called.clear()
                assert taken == ([2, 8, 9, 16] if chip == "H100" else [1, 2, 8, 9, 16]) * bool(built)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (1, 8), (1000, 200), (128256, 4096)])
def test_the_kernel_for_batches_takes_17_to_32_rows_and_up_to_64_of_a_large_head(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = torch.empty(outputs, inputs, dtype=dtype, device="meta")
    taken = [rows for rows in range(300) if has_batch_linear(torch.empty(rows, inputs, dtype=dtype, device="meta"), weight)]
    assert taken == list(range(17, 65 if outputs > 100_000 else 33))
    x = torch.empty(20, inputs + 4, dtype=dtype, device="meta")
    assert not has_batch_linear(x[:, :inputs], weight), "rows do not begin at 16 bytes"
    assert not has_batch_linear(x[:, 4:].contiguous().float(), weight.float())


def test_the_gated_kernel_is_used_where_its_tiles_fill_the_multiprocessors() -> None:
    llama = [rows for rows in range(1, 1100) if wins(rows, 14336, 4096, 132)]
    assert llama == [*range(25, 129), *range(160, 257), *range(285, 513), *range(626, 769), *range(829, 1100)]
    assert all(wins(rows, 14336, 4096, 132) for rows in range(2048, 8193)), "what is nobody's is little of so many rows"
    assert not wins(64, 1024, 4096, 132), "a narrow layer has too few tiles"
    assert wins(1024, 1024, 4096, 132)


@pytest.mark.parametrize(
    ("rows", "width", "tile"),
    [
        *[(64, 14336, (112, 2)), (64, 12288, (96, 2)), (64, 8192, (64, 2)), (64, 18944, (80, 2)), (64, 7168, (64, 2))],
        *[(256, 14336, (112, 2)), (257, 14336, (80, 3)), (384, 14336, (80, 3)), (512, 14336, (112, 2)), (8192, 14336, (128, 2))],
    ],
)
def test_the_gated_kernels_tiles_leave_few_multiprocessors_idle(rows: int, width: int, tile: tuple[int, int]) -> None:
    assert choose_tile(rows, width, 4096, 132) == tile


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiles"),
    [
        (24, 4096, 14336, None),
        (25, 4096, 14336, (128, 4, 2)),
        (64, 4096, 14336, (128, 4, 2)),
        (128, 4096, 14336, (128, 4, 2)),
        (192, 4096, 14336, None),
        (256, 4096, 14336, (128, 2, 2)),
        (64, 6144, 4096, (192, 4, 2)),
        (65, 6144, 4096, None),
        (64, 4096, 4096, (128, 4, 2)),
        (128, 4096, 4096, None),
        (256, 4096, 4096, None),
        (64, 8192, 28672, (128, 2, 2)),
        (256, 8192, 28672, None),
        (64, 2048, 8192, None),
        (320, 4096, 14336, None),
        (321, 4096, 14336, (128, 2, 3)),
        (384, 4096, 14336, (128, 2, 3)),
        (384, 4096, 4096, None),
        (385, 4096, 14336, None),
    ],
)
def test_blocks_that_share_a_tile_run_at_once_on_nearly_all_multiprocessors(
    rows: int, outputs: int, inputs: int, tiles: tuple[int, int, int] | None
) -> None:
    assert choose_tiles(rows, outputs, inputs, 132) == tiles


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17])
def test_rows_without_a_gpu_go_to_the_vendors_library(backend: str, rows: int) -> None:
    x, weight = torch.randn(rows, 64), torch.randn(40, 64) / 8
    assert not has_one_row_linear(x, weight)
    assert largest_error(api.linear(x, weight, backend=backend), reference.linear(x, weight)) < 2e-5
