"""Kernels that may start before the one ahead of them ends."""

from __future__ import annotations

import pytest
import torch
from gantline_kernels.triton_kernels import early

from tests.kernels.remembered import run_check

_COMPILE = """
import torch
from gantline_kernels import api
from gantline_kernels.triton_kernels import early
from tests.kernels import compile_checks
compile_checks.compile_only(90)
early.capability = lambda device: (9, 0)
weight = torch.zeros(256, dtype=torch.bfloat16)
caches = [torch.zeros(4, 2, 16, 64, dtype=torch.bfloat16) for _ in range(2)]
for rows in (1, 24, 25, 129):
    x, at = torch.zeros(rows, 256, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    q, k, v = (x.view(rows, 4, 64)[:, :heads] for heads in (4, 2, 2))
    before = len(compile_checks.compiled)
    api.add_rms_norm(x, x.clone(), weight, 1e-5, backend="triton")
    api.silu_and_mul(x, backend="triton")
    api.rope_and_cache_write(q, k, v, torch.zeros(9, 64), at.int(), *caches, at, backend="triton")
    api.argmax(x.float(), backend="triton")
    print(rows, *(kernel.asm["ptx"].count("griddepcontrol.wait") for _, kernel in compile_checks.compiled[before:]))
"""


def test_kernels_of_up_to_128_rows_start_early_but_the_activation_of_24_and_all_of_those_wait() -> None:
    assert run_check("-c", _COMPILE).splitlines() == ["1 1 1 1 1 1", "24 1 1 1 1 1", "25 1 0 1 1 1", "129 0 0 0 0 0"]


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_nothing_starts_early_where_there_is_no_hopper(rows: int) -> None:
    assert early.early_mode(torch.device("cpu"), rows, rows) == 0


@pytest.mark.parametrize(
    ("programs", "rows", "mode"),
    [(1, 1, 1), (2048, 1, 1), (2049, 1, 0), (2, 2, 2), (16, 16, 2), (4096, 16, 0), (128, 128, 2), (129, 129, 0)],
)
def test_beside_linear_layers_of_few_rows_kernels_are_compiled_apart(
    programs: int, rows: int, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "capability", lambda device: (9, 0))
    assert early.early_mode(torch.device("cpu"), programs, rows) == mode
