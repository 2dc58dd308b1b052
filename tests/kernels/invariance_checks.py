"""Of the backend `invariant_triton`, to the last bit: a row's result is the same whatever rows are beside it.

Not collected by itself: run under Triton's interpreter by `test_interpreter.py`, on a GPU by `test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from gantline_kernels import api, invariant_triton_backend
from gantline_kernels.triton_kernels import invariant_attention
from gantline_kernels.triton_kernels.invariant_linear import TILES, choose_tile, invariant_awq_linear, invariant_linear, tiles_of

from tests.kernels import kernel_checks
from tests.kernels.kernel_checks import DEVICE, ON_GPU  # and the interpreter, made to work

BACKEND = api.INVARIANT_TRITON
DTYPES = kernel_checks.DTYPES if ON_GPU else [torch.float16]
ROWS = [1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 100, 128, 130, 256, 300, 513, 2048, 8192] if ON_GPU else [1, 17, 40]
SHAPES = [(4096, 6144), (14336, 4096), (4096, 28672), (2048, 128_256), (200, 1000)] if ON_GPU else [(96, 200)]


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def _check_rows(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, counts: list[int]) -> None:
    """`run` of any number of rows gives each of them what it got alone."""
    rows = torch.arange(len(x), device=x.device)
    chosen = [0, 1, len(x) // 2, len(x) - 1] if ON_GPU else [1, len(x) - 1]
    alone = torch.cat([run(x[i : i + 1]) for i in chosen])
    for count in counts:
        for shift in (0, 5) if ON_GPU else (5,):
            others = (rows + shift)[:count] % len(x)
            places = [min(i, count - 1) for i in (0, 1, count // 2, count - 1)][-len(chosen) :]
            order = others.clone()
            order[places] = torch.tensor(chosen, device=x.device)
            got = run(x[order])
            for place, i in zip(places, chosen, strict=True):
                if order[place] == i:
                    assert torch.equal(got[place], alone[chosen.index(i)]), (count, place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_linear(inputs: int, outputs: int, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    counts = [count for count in ROWS if count * outputs < 1 << 28 and (count <= 300 or dtype != torch.float32)]
    x, weight = _random(max(counts), inputs, dtype=dtype), _random(outputs, inputs, dtype=dtype, seed=1) / 8
    bias = None if out_dtype else _random(outputs, dtype=dtype, seed=2)
    _check_rows(lambda rows: api.linear(rows, weight, bias, out_dtype=out_dtype, backend=BACKEND), x, counts)


@pytest.mark.parametrize("tma", [False, True] if ON_GPU else [False])
def test_every_tile_gives_the_same_bits(tma: bool) -> None:
    inputs, outputs = (4096, 640) if ON_GPU else (128, 136)
    for dtype in DTYPES:
        if dtype == torch.float32 and tma:
            continue
        x, weight = _random(300, inputs, dtype=dtype), _random(outputs, inputs, dtype=dtype, seed=1)
        results = [invariant_linear(x, weight, None, torch.float32, tile=tile, tma=tma) for tile in tiles_of(dtype)]
        assert all(torch.equal(results[0], other) for other in results)


def test_every_tile_is_the_choice_for_some_number_of_rows() -> None:
    chosen = {choose_tile(TILES, rows, outputs, 132) for rows in range(1, 2000) for outputs in (4096, 6144, 28672, 128_256)}
    assert chosen == set(TILES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(4096, 6144, 128)] if ON_GPU else [(128, 72, 64)])
def test_awq(inputs: int, outputs: int, group_size: int, dtype: torch.dtype) -> None:
    sizes = ((n, outputs // 8) for n in (inputs, inputs // group_size))
    qweight, qzeros = (torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=DEVICE) for size in sizes)
    scales = _random(inputs // group_size, outputs, dtype=dtype).abs() / 100
    x, counts = _random(ROWS[-2], inputs, dtype=dtype), ROWS[:-1]
    _check_rows(lambda rows: invariant_awq_linear(rows, qweight, qzeros, scales, group_size, None), x, counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_activation_and_rotation(dtype: torch.dtype) -> None:
    size, dim = (4096, 128) if ON_GPU else (96, 32)
    x, weight, counts = _random(ROWS[-1], size, dtype=dtype), _random(size, dtype=dtype, seed=1), ROWS if ON_GPU else [5]
    _check_rows(lambda rows: api.rms_norm(rows, weight, 1e-5, backend=BACKEND), x, counts)
    _check_rows(lambda rows: api.add_rms_norm(rows.clone(), rows * 2, weight, 1e-5, backend=BACKEND)[0], x, counts)
    _check_rows(lambda rows: api.silu_and_mul(rows, backend=BACKEND), x, counts)

    def rotate(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.view(len(rows), -1, dim)
        caches = [torch.zeros(1, 1, 16, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
        positions = torch.full((len(rows),), 7, dtype=torch.int32, device=DEVICE)
        slots, table = torch.full((len(rows),), -1, device=DEVICE), torch.linspace(-1, 1, 10 * dim, device=DEVICE).view(10, dim)
        norms = (weight[:dim], weight[:dim])
        return api.rope_and_cache_write(
            heads,
            heads[:, :1],
            heads[:, :1],
            table,
            positions,
            *caches,
            slots,
            q_norm_weight=norms[0],
            k_norm_weight=norms[1],
            backend=BACKEND,
        )

    _check_rows(rotate, x, counts)


@pytest.mark.parametrize("limits", [(None, None, None), (40, 0.9, 0.01)] if ON_GPU else [(40, None, 0.01)])
def test_sampling_and_log_probabilities(limits: tuple[int | None, float | None, float | None]) -> None:
    size = 128_256 if ON_GPU else 61
    logits, counts = _random(200 if ON_GPU else 6, size) * 3, [1, 2, 20, 200] if ON_GPU else [5]

    def both(rows: torch.Tensor) -> torch.Tensor:
        per_row = [None if x is None else torch.full((len(rows),), x, device=DEVICE) for x in limits]
        uniforms = rows[:, 3].abs() % 1
        tokens = api.sample(rows, uniforms, torch.full_like(uniforms, 0.9), *per_row, backend=BACKEND)
        chosen, ids, top = api.token_logprobs(rows, tokens, 5, backend=BACKEND)
        return torch.cat([tokens.unsqueeze(1).double(), chosen.unsqueeze(1).double(), ids.double(), top.double()], dim=1)

    _check_rows(both, logits, counts)
    alone = both(logits)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(alone[:, 7:], expected.topk(5).values.double(), atol=1e-5, rtol=0)


def test_of_equally_likely_tokens_the_first_comes_first_however_many_are_asked_for() -> None:
    logits = torch.zeros(3, 40, device=DEVICE)
    logits[:, 30] = 1.0
    for count in (1, 3, 7):
        ids = api.token_logprobs(logits, torch.zeros(3, dtype=torch.int64, device=DEVICE), count, backend=BACKEND)[1]
        assert ids.tolist() == [[30, 0, 1, 2, 3, 4, 5][:count]] * 3


class _Contexts:
    """Sequences in one paged cache, each with queries for all its places; any parts of them make a batch."""

    def __init__(self, lengths: list[int], *, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int = 0) -> None:
        self.lengths, self.window, self.size = lengths, window, 64
        blocks = [-(-length // self.size) for length in lengths]
        self.keys, self.values = (_random(sum(blocks), kv_heads, self.size, dim, dtype=dtype, seed=seed) for seed in (1, 2))
        self.q = [_random(length, heads, dim, dtype=dtype, seed=10 + i) for i, length in enumerate(lengths)]
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device=DEVICE)
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
        for i, count in enumerate(blocks):
            self.tables[i, :count] = order[sum(blocks[:i]) : sum(blocks[:i]) + count]
            end = lengths[i] % self.size
            for cache in (self.keys, self.values):
                cache[self.tables[i, count - 1], :, end or self.size :] = torch.nan

    def attend(self, parts: list[tuple[int, int, int]], *, num_decodes: int, bound: int = 0) -> list[torch.Tensor]:
        """Of each part (sequence, first place, end) the results of its queries; the first `num_decodes` have one query."""
        counts = [end - first for _, first, end in parts]
        q = torch.cat([self.q[i][first:end] for i, first, end in parts])
        contexts = [end for _, _, end in parts]
        options: dict[str, Any] = {"max_query_len": max(counts), "max_context_len": max(bound, *contexts), "sliding_window": self.window}
        out = api.paged_attention(
            q, self.keys, self.values, self.tables[[i for i, _, _ in parts]],
            torch.tensor([0, *counts], device=DEVICE).cumsum(0).int(), torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            q.shape[2] ** -0.5, num_decodes=num_decodes, backend=BACKEND, **options,
        )  # fmt: skip
        return list(out.split(counts))


CASES = [
    {"heads": 32, "kv_heads": 8, "dim": 128}, {"heads": 8, "kv_heads": 8, "dim": 64}, {"heads": 6, "kv_heads": 1, "dim": 256},
    {"heads": 7, "kv_heads": 1, "dim": 80}, {"heads": 32, "kv_heads": 8, "dim": 128, "window": 700},
]  # fmt: skip


@pytest.mark.parametrize(
    "case", CASES if ON_GPU else [{"heads": 2, "kv_heads": 1, "dim": 16}, {"heads": 3, "kv_heads": 1, "dim": 32, "window": 70}]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(case: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whole, cut anywhere, and token by token, alone and beside others, whether or not contexts go in pieces."""
    if not ON_GPU:
        monkeypatch.setattr(invariant_attention, "PIECE", 64)
    lengths = [3000, 1024, 1025, 65, 5000] if ON_GPU else [131, 64]
    contexts = _Contexts(lengths, dtype=dtype, **case)  # type: ignore[arg-type]
    whole = [contexts.attend([(i, 0, length)], num_decodes=0)[0] for i, length in enumerate(lengths)]
    assert all(bool(torch.isfinite(out).all()) for out in whole)
    places = [
        (i, place) for i, length in enumerate(lengths) for place in {0, 1, 63, 64, 130, 1023, 1024, 2047, length - 1} if place < length
    ]
    for chosen in (*([place] for place in places[:: 1 if ON_GPU else 5]), places):
        for bound in (0, max(lengths)):
            one_each = [(i, place, place + 1) for i, place in chosen]
            for (i, place), out in zip(chosen, contexts.attend(one_each, num_decodes=len(chosen), bound=bound), strict=True):
                assert torch.equal(out[0], whole[i][place]), (i, place, bound)
    cuts = [(i, *pair) for i, length in enumerate(lengths) for pair in _cuts(length)]
    decodes = [(0, 99, 100), (1, 63, 64)]
    for chosen in (cuts, cuts[::-1], decodes + cuts)[0 if ON_GPU else 2 :]:
        count = 2 if chosen[0] == decodes[0] else 0
        for (i, first, end), out in zip(chosen, contexts.attend(chosen, num_decodes=count), strict=True):
            assert torch.equal(out, whole[i][first:end]), (i, first, end)


def _cuts(length: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *(place for place in (1, 38, 101, 1000, 1100, 2500) if place < length), length]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 32] if ON_GPU else [32])
def test_what_a_model_needs_is_tried_and_found_to_hold(dtype: torch.dtype, group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(invariant_triton_backend, "PIECE", 64)
    products = api.Products(((64, 96), (160, 64))[: 2 if ON_GPU else 1], 4, 2, 32, dtype, torch.device(DEVICE), group_size)
    assert api.find_variance(products, backend=BACKEND) == ""
    plain = invariant_triton_backend.linear

    def of_its_place(x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return plain(x, *others, **options) * (1 + torch.arange(len(x), device=x.device).unsqueeze(1))

    monkeypatch.setattr(invariant_triton_backend, "linear", of_its_place)
    assert "64 inputs and 96 outputs" in api.find_variance(products, backend=BACKEND)
