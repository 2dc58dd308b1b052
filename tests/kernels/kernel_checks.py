"""Every kernel against its float32 reference, at edge shapes.

Not collected by itself: `test_interpreter.py` runs this file on a CPU through Triton's interpreter, in a process of its own (it is chosen
when Triton is imported); `test_gpu.py` runs it on a GPU, for every backend with kernels. GANTLINE_KERNEL_BACKEND names the backend.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gantline_kernels import api, hopper_gated_linear, hopper_split_linear, library, reference
from gantline_kernels.few_rows_linear import few_rows_gated_linear, few_rows_linear
from gantline_kernels.hopper_batch_linear import batch_linear

from tests.kernels import interpreter
from tests.kernels.cases import largest_error, paged

BACKEND = os.environ["GANTLINE_KERNEL_BACKEND"]
ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
HAS_LIBRARY = BACKEND == "cuda" and ON_GPU and torch.cuda.get_device_capability() >= (8, 0) and library.load() is not None
HAS_HOPPER = HAS_LIBRARY and torch.cuda.get_device_capability() == (9, 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of results of size 1 or so: a few units in the last place of the result's type."""

torch.set_num_threads(1)


Groups = Sequence[tuple[list[int], int]]
"""Members and blocks of each."""


if not ON_GPU:
    interpreter.prepare()


def _check_attention(case_arguments: dict[str, object], lengths: list[tuple[int, int]], groups: Groups = (), spare_groups: int = 0) -> None:
    case = paged(lengths, device=DEVICE, **case_arguments)  # type: ignore[arg-type]
    if groups:
        case.share(list(groups), spare_groups=spare_groups)
    got = api.paged_attention(*case.arguments, **case.options, backend=BACKEND)
    dtype, rows = case.q.dtype, int(case.query_starts[-1])
    assert got.dtype == dtype
    assert largest_error(got[:rows], case.expected()[:rows]) < TOLERANCE[dtype]


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
def test_chunks_of_prompts_in_graphs_that_share_memory_with_earlier_graphs() -> None:
    """What a graph that was captured before the first chunk writes into the shared pool reaches nothing that launches hand on."""
    case = paged([(130, 200), (70, 70)], heads=8, dim=128, block_size=64, dtype=torch.bfloat16, device=DEVICE)
    outputs = []

    def attend() -> None:
        outputs.append(api.paged_attention(*case.arguments, **case.options, backend=BACKEND))

    pool, graphs = torch.cuda.graph_pool_handle(), []
    attend()  # compiles, and makes what is made once
    for run in (lambda: torch.full((250_000,), 7, dtype=torch.int32, device=DEVICE), attend, attend):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            run()
    for graph in (graphs[1], graphs[0], graphs[2], graphs[0], graphs[1]):
        graph.replay()
        if graph is not graphs[0]:
            torch.cuda.synchronize()
            assert largest_error(outputs[graphs.index(graph)], case.expected()) < TOLERANCE[torch.bfloat16]


_DECODES = [[(1, 1)], [(1, 16), (1, 17), (1, 31), (1, 5)], [(1, 700), (1, 64), (1, 1)]]
_CHUNKS = [[(1, 9), (33, 33)], [(3, 20), (16, 16), (17, 40), (2, 2)], [(1, 1), (1, 50), (70, 90)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", _DECODES + _CHUNKS)
def test_attention_at_ragged_lengths(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    _check_attention({"dtype": dtype}, lengths)


@pytest.mark.parametrize("lengths", [[(1, 1 + i % 17) for i in range(512)], [(512, 530)]])
def test_attention_of_512_rows(lengths: list[tuple[int, int]]) -> None:
    _check_attention({"heads": 2, "kv_heads": 1, "dtype": torch.float16}, lengths)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (16, 1), (8, 2)])
def test_attention_of_every_grouping_of_heads(heads: int, kv_heads: int) -> None:
    _check_attention({"heads": heads, "kv_heads": kv_heads, "dtype": torch.float16}, [(1, 33), (20, 23)])


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_every_head_dimension(dim: int, dtype: torch.dtype) -> None:
    _check_attention({"dim": dim, "dtype": dtype}, [(1, 40), (18, 35)])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_every_block_size(block_size: int, dtype: torch.dtype) -> None:
    _check_attention({"block_size": block_size, "dtype": dtype}, [(1, 130), (1, 128), (140, 150)])


@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (7, 0.0), (64, 0.0), (1000, 0.0), (0, 2.0), (20, 5.0)])
def test_attention_within_a_window_and_with_capped_scores(window: int, softcap: float) -> None:
    for dtype in DTYPES[:2]:
        _check_attention({"window": window, "softcap": softcap, "dtype": dtype}, [(1, 90), (1, 3), (70, 130), (5, 5)])


def test_a_cache_of_more_elements_than_31_bits_count_is_written_and_read() -> None:
    """By blocks at its end; the rest of its memory is never touched, and so takes none on a CPU."""
    lengths, kv_heads, block_size, dim = [100, 70, 90], 2, 64, 64
    blocks = (1 << 31) // (kv_heads * block_size * dim) + 40
    caches = [torch.empty(blocks, kv_heads, block_size, dim, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    small = paged([(1, 100), (1, 70), (5, 90)], block_size=block_size, dtype=torch.float16, device=DEVICE)
    count, first = len(small.key_cache), blocks - len(small.key_cache)
    for cache, content in zip(caches, (small.key_cache, small.value_cache), strict=True):
        cache[first:] = content
    moved = replace(small, key_cache=caches[0], value_cache=caches[1], block_tables=(small.block_tables + first).clamp(max=1 << 30))
    expected = small.expected()
    assert largest_error(api.paged_attention(*moved.arguments, **moved.options, backend=BACKEND), expected) < TOLERANCE[torch.float16]
    for case in (small, moved):
        case.share([([0, 1], 1)])
    got = api.paged_attention(*moved.arguments, **moved.options, backend=BACKEND)
    assert largest_error(got, small.expected()) < TOLERANCE[torch.float16]
    q, k, v = (torch.randn(len(lengths), heads, dim, device=DEVICE).half() for heads in (4, kv_heads, kv_heads))
    table = torch.cat([torch.ones(8, dim // 2, device=DEVICE), torch.zeros(8, dim // 2, device=DEVICE)], dim=1)
    at, slots = torch.arange(3, device=DEVICE, dtype=torch.int32), torch.arange(3, device=DEVICE) * 7 + (blocks - count) * block_size
    api.rope_and_cache_write(q, k, v, table, at, *caches, slots, backend=BACKEND)
    for cache, new in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[first, :, [0, 7, 14]].transpose(0, 1), new)


@pytest.mark.parametrize("decodes", [[], [(1, 40)], [(1, 700), (1, 17), (1, 1)]])
@pytest.mark.parametrize("chunks", [[(3, 9)], [(1, 1), (20, 23), (5, 70)]])
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_of_a_padded_batch(decodes: list[tuple[int, int]], chunks: list[tuple[int, int]], dim: int) -> None:
    """More sequences than have a query among those that decode and among the chunks, and tokens of no sequence."""
    empty = [(0, 0)] * (5 - len(decodes))
    arguments = {"num_decodes": 5, "padding": 7, "dim": dim, "dtype": torch.float16}
    _check_attention(arguments, [*decodes, *empty, *chunks, *[(0, 0)] * 4])


FEW = None if ON_GPU else 1
"""Of cases on long contexts: the interpreter takes seconds for each."""


@pytest.mark.parametrize("dtype", DTYPES[-1:] if FEW else DTYPES)
@pytest.mark.parametrize("lengths", [[(9, 1300), (5, 1100), (0, 0), (1, 1), (40, 40)], [(1, 2000), (130, 1100), (0, 7)]][:FEW])
def test_chunks_of_few_tokens_on_long_contexts(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    _check_attention({"dtype": dtype, "block_size": 64, "num_decodes": 0}, lengths)


@pytest.mark.parametrize(("window", "softcap", "dim"), [(1100, 3.0, 80), (1500, 0.0, 64), (0, 2.0, 96), (0, 0.0, 256)][:FEW])
def test_chunks_on_long_contexts_within_a_window_and_with_capped_scores(window: int, softcap: float, dim: int) -> None:
    options = {"window": window, "softcap": softcap, "dim": dim, "block_size": 64, "dtype": torch.float16, "num_decodes": 0}
    _check_attention(options, [(1, 300), (10, 1900), (90, 90)])


@pytest.mark.skipif(not ON_GPU, reason="slow: for a GPU")
@pytest.mark.parametrize("heads", [1, 7])
def test_chunks_on_long_contexts_of_every_grouping_of_heads(heads: int) -> None:
    _check_attention({"heads": heads, "kv_heads": 1, "block_size": 64, "dtype": torch.float16}, [(1, 300), (50, 1300), (0, 0), (4, 1200)])


@pytest.mark.skipif(BACKEND == api.INVARIANT_TRITON, reason="its pieces do not depend on the batch")
def test_what_is_too_little_for_the_gpu_is_cut_over_the_keys_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own plan says how many tiles of keys a part has."""
    from gantline_kernels import prefill_split

    new_parts, made = prefill_split.new_parts, []

    def remember(*arguments: Any) -> torch.Tensor:
        made.append(new_parts(*arguments))
        made[-1].fill_(torch.nan)
        return made[-1]

    monkeypatch.setattr(prefill_split, "new_parts", remember)
    sizes: dict[str, Any] = {"heads": 2, "kv_heads": 1, "dim": 128, "block_size": 64, "dtype": torch.float16, "device": DEVICE}
    case = paged([(5, 2000), (0, 0), (2, 40)], num_decodes=0, padding=9, **sizes)
    first, again = (api.paged_attention(*case.arguments, **case.options, backend=BACKEND)[:7] for _ in range(2))
    assert largest_error(first, case.expected()[:7]) < TOLERANCE[torch.float16]
    assert torch.equal(first, again) and len(made) == 2
    plans = [int(parts[-prefill_split.PLAN_WORDS :].view(torch.int32)[2]) for parts in made]
    assert plans[0] == plans[1] and 1 <= plans[0] <= 2000 // 64 // 2


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 4096])
def test_chunks_on_long_contexts_in_large_batches(dtype: torch.dtype, dim: int, window: int) -> None:
    shape = {"heads": 32, "kv_heads": 8, "dim": dim, "dtype": dtype, "block_size": 64, "window": window}
    for new in (1, 32, 100, 300, 640):
        _check_attention({**shape, "num_decodes": 0}, [(new, 10_000)])
    decodes, chunks = [(1, 1000)] * 3 + [(0, 0)] * 2, [(64, 9000), (3, 30), (200, 7000), (0, 0)]
    _check_attention({**shape, "num_decodes": 5, "padding": 40}, decodes + chunks)
    _check_attention({**shape, "heads": 4, "kv_heads": 1, "num_decodes": 0}, [(16, 20_000), (100, 100)])


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
@pytest.mark.parametrize("dim", [64, 128])
def test_a_graph_of_chunks_on_long_contexts_follows_the_true_lengths(dim: int) -> None:
    """Captured for a class of batches, replayed with others: the plan is made anew in each."""
    shape = {"heads": 32, "kv_heads": 8, "dim": dim, "dtype": torch.bfloat16, "block_size": 64, "device": DEVICE, "num_decodes": 8}
    decodes = [(1, 500)] * 6 + [(0, 0)] * 2
    lengths = [[(90, 9000), (0, 0)], [(1, 16_000), (60, 60)], [(17, 17), (64, 12_000)], [(100, 8000), (0, 0)]]
    cases = [paged([*decodes, *chunks], padding=122 - sum(new for new, _ in chunks), **shape) for chunks in lengths]  # type: ignore[arg-type]
    blocks, width = (max(size) for size in zip(*((len(case.key_cache), case.block_tables.shape[1]) for case in cases), strict=True))
    first, caches = cases[0], torch.zeros(2, blocks, 8, 64, dim, dtype=torch.bfloat16, device=DEVICE)
    tables = first.block_tables.new_zeros(len(first.context_lens), width)
    arguments = [first.q.clone(), *caches, tables, first.query_starts.clone(), first.context_lens.clone()]
    options = {**first.options, "max_query_len": 128, "max_context_len": 16_000}

    def attend() -> torch.Tensor:
        return api.paged_attention(*arguments, first.scale, **options, backend=BACKEND)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for case, chunks in zip(cases * 2, lengths * 2, strict=True):
        for place, tensor in zip(arguments, case.arguments[:6], strict=True):
            assert isinstance(tensor, torch.Tensor)
            place[tuple(slice(0, size) for size in tensor.shape)] = tensor
        graph.replay()
        rows = 6 + sum(new for new, _ in chunks)
        assert largest_error(out[:rows], case.expected()[:rows]) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1000])
def test_attention_of_large_batches(dtype: torch.dtype, dim: int, window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(1, 3000, (200,), generator=generator).tolist()
    decodes = [(1, context) for context in [*contexts, 64, 128, 8192]]
    chunks = [(512, 512), (513, 3000), (1, 1), (2000, 2001), (128, 4096), (0, 5)]
    _check_attention({"heads": 8, "kv_heads": 2, "dim": dim, "dtype": dtype, "block_size": 64, "window": window}, decodes + chunks)


_FEW_DECODES: list[tuple[list[tuple[int, int]], dict[str, object]]] = [
    ([(1, 17_000)], {"window": 3000, "block_size": 64}),
    ([(1, 1)], {"block_size": 32}),
    ([(1, 2049), (1, 17), (1, 128), (0, 0)], {"softcap": 20.0, "block_size": 32}),
    ([(1, n) for n in (300, 9000, 5, 16, 640, 129, 4097)], {"window": 100, "softcap": 3.0, "block_size": 16}),
]


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (3, 3), (7, 1), (16, 1), (20, 4)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_decodes_of_few_sequences(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    for lengths, options in _FEW_DECODES:
        for chosen in ({"block_size": 64}, options):
            _check_attention({**shape, **chosen, "num_decodes": len(lengths), "padding": 3}, lengths)


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
@pytest.mark.parametrize("dim", [64, 128])
def test_a_graph_of_few_decodes_follows_the_true_lengths_and_leaves_counters_at_zero(dim: int) -> None:
    from gantline_kernels import hopper_decode, scratch

    shape: dict[str, Any] = {"heads": 32, "kv_heads": 8, "dim": dim, "dtype": torch.bfloat16, "block_size": 64, "device": DEVICE}
    lengths = [[16_000, 0, 40, 900], [1, 1, 1, 1], [0, 0, 0, 0], [70, 9000, 12_000, 0], [5000] * 4]
    cases = [paged([(1, n) if n else (0, 0) for n in chosen], num_decodes=4, **shape) for chosen in lengths if any(chosen)]
    blocks, width = (max(size) for size in zip(*((len(case.key_cache), case.block_tables.shape[1]) for case in cases), strict=True))
    caches = torch.zeros(2, blocks, 8, 64, dim, dtype=torch.bfloat16, device=DEVICE)
    starts, lens = torch.arange(5, device=DEVICE, dtype=torch.int32), torch.zeros(4, device=DEVICE, dtype=torch.int32)
    tables, q = torch.zeros(4, width, device=DEVICE, dtype=torch.int32), torch.zeros(4, 32, dim, device=DEVICE, dtype=torch.bfloat16)
    options = {**cases[0].options, "max_query_len": 1, "max_context_len": 16_000}

    def attend() -> torch.Tensor:
        return api.paged_attention(q, *caches, tables, starts, lens, dim**-0.5, **options, backend=BACKEND)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for case in cases * 3:
        lens.zero_()
        graph.replay()  # a batch of padding alone
        lens.copy_(case.context_lens)
        for place, tensor in ((caches[0], case.key_cache), (caches[1], case.value_cache), (tables, case.block_tables)):
            place[tuple(slice(0, size) for size in tensor.shape)] = tensor
        rows = torch.nonzero(lens).flatten()
        q[rows] = case.q
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(first[rows], out[rows])
        assert largest_error(out[rows], case.expected()) < TOLERANCE[torch.bfloat16]
    memory = [x for owned in scratch._memory.values() for x in (owned if isinstance(owned, tuple) else (owned,))]
    assert not any(bool(x.any()) for x in memory if x.dtype == torch.int32)
    if HAS_HOPPER:
        assert any(make is hopper_decode._new_counters for make, *_ in scratch._memory)


_SHARING: list[tuple[list[int], Groups]] = [
    ([17, 18], [([0, 1], 1)]),
    ([33, 5, 48, 64, 1], [([0, 2, 3], 2)]),
    ([40, 100, 33, 90, 200, 49], [([1, 3], 5), ([5, 0, 4], 2)]),
    ([49, 50, 51, 80, 64, 49, 33, 100, 70, 17], [([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 1)]),
    ([600, 700], [([0, 1], 37)]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("contexts", "groups"), _SHARING)
def test_attention_over_shared_prefixes(dtype: torch.dtype, contexts: list[int], groups: Groups) -> None:
    for kv_heads in (1, 4):
        _check_attention({"dtype": dtype, "kv_heads": kv_heads}, [(1, context) for context in contexts], groups, spare_groups=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 1), (7, 1), (8, 1), (16, 1), (8, 2)])
def test_attention_over_shared_prefixes_of_every_grouping_of_heads(heads: int, kv_heads: int) -> None:
    contexts = [(1, context) for context in (33, 34, 60, 35, 36, 90, 33)]
    _check_attention({"heads": heads, "kv_heads": kv_heads, "dtype": torch.float16}, contexts, [([2, 5, 1], 2), ([0, 3, 4, 6], 2)])


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_shared_prefixes_of_every_head_dimension(dim: int, dtype: torch.dtype) -> None:
    _check_attention({"dim": dim, "dtype": dtype}, [(1, 40), (1, 64), (1, 35), (1, 20), (9, 30)], [([0, 1, 2], 2)])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attention_over_shared_prefixes_of_every_block_size(block_size: int, softcap: float) -> None:
    options = {"block_size": block_size, "softcap": softcap, "dtype": torch.float16}
    _check_attention(options, [(1, 400), (1, 257), (1, 3), (1, 300)], [([0, 1, 3], 256 // block_size)])


def test_within_a_window_a_shared_prefix_is_attended_as_any_context() -> None:
    _check_attention({"window": 40, "dtype": torch.float16}, [(1, 90), (1, 70), (20, 30)], [([0, 1], 4)])


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("own", [200, 3000])
def test_attention_of_large_batches_over_shared_prefixes(dtype: torch.dtype, dim: int, own: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lens = [2048] * 100 + [64] * 2 + [4032] * 17 + [0] * 30
    contexts = [(1, length + int(torch.randint(1, own, (), generator=generator))) for length in lens]
    groups = [(list(range(99, -1, -1)), 32), ([100, 101], 1), (list(range(102, 119)), 63)]
    for count in (149, 20):  # 20: only the first group, most of it elsewhere
        used = groups if count == 149 else [(list(range(20)), 32)]
        options = {"heads": 8, "kv_heads": 2, "dim": dim, "dtype": dtype, "block_size": 64}
        _check_attention(options, [*contexts[:count], (70, 300)], used, spare_groups=5)


@pytest.mark.parametrize("rows", [0, 1, 5, 512])
@pytest.mark.parametrize("size", [64, 96, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    if rows == 512 and not ON_GPU and (size, dtype) != (96, torch.float16):
        return  # the interpreter takes seconds for each
    wide = torch.randn(rows, size + 8, device=DEVICE).to(dtype)
    x, residual = wide[:, :size], torch.randn(rows, size, device=DEVICE).to(dtype)
    weight = (torch.rand(size, device=DEVICE) + 0.5).to(dtype)
    tolerance = 4 * TOLERANCE[dtype]
    assert largest_error(api.rms_norm(x, weight, 1e-5, backend=BACKEND), reference.rms_norm(x, weight, 1e-5)) < tolerance
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    got = api.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5, backend=BACKEND)
    assert largest_error(got[0], expected[0]) < tolerance
    assert largest_error(got[1], expected[1]) == 0.0


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("size", [8, 96, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * size, device=DEVICE).to(dtype)
    assert largest_error(api.silu_and_mul(x, backend=BACKEND), reference.silu_and_mul(x)) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (7, 1, 128), (12, 12, 96), (3, 3, 80), (2, 1, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_cache_write(normed: bool, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, block_size = 5, 16
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    qkv = torch.randn(tokens, sum(sizes), device=DEVICE).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in qkv.split(sizes, dim=-1))
    angles = torch.randn(100, dim // 2, device=DEVICE)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.tensor([3, 99, 0, 7, 7], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([17, -1, 0, 47, 33], device=DEVICE)
    weights = [torch.rand(dim, device=DEVICE).to(dtype) + 0.5 if normed else None for _ in range(2)]
    shape = (3, kv_heads, block_size, dim)
    caches, expected_caches = ([torch.full(shape, 7.0, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(2))
    expected = reference.rope_and_cache_write(q, k, v, cos_sin, positions, *expected_caches, slots, *weights, 1e-6)
    got = api.rope_and_cache_write(
        q, k, v, cos_sin, positions, *caches, slots, q_norm_weight=weights[0], k_norm_weight=weights[1], eps=1e-6, backend=BACKEND
    )
    assert largest_error(got, expected) < 4 * TOLERANCE[dtype]
    assert largest_error(torch.stack(caches), torch.stack(expected_caches)) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(64, 32, 32), (192, 72, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awq(rows: int, inputs: int, outputs: int, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qweight = torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), dtype=torch.int32, device=DEVICE)
    qzeros = torch.randint(-(2**31), 2**31 - 1, (inputs // group_size, outputs // 8), dtype=torch.int32, device=DEVICE)
    scales = (torch.rand(inputs // group_size, outputs, device=DEVICE) / 8 / inputs**0.5).to(dtype)
    expected = reference.awq_dequantize(qweight, qzeros, scales, group_size)
    assert largest_error(api.awq_dequantize(qweight, qzeros, scales, group_size, backend=BACKEND), expected) < TOLERANCE[dtype]
    x, bias = torch.randn(rows, inputs, device=DEVICE).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    for b in (None, bias):
        got = api.awq_linear(x, qweight, qzeros, scales, group_size, b, backend=BACKEND)
        assert largest_error(got, reference.awq_linear(x, qweight, qzeros, scales, group_size, b)) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True])
def test_linear_with_results_wider_than_inputs(bias: bool) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter does not multiply bfloat16
    x, weight = (torch.randn(n, 64, device=DEVICE).to(dtype) for n in (3, 40))
    b = torch.randn(40, device=DEVICE).to(dtype) if bias else None
    got = api.linear(x, weight, b, out_dtype=torch.float32, backend=BACKEND)
    assert got.dtype == torch.float32
    assert largest_error(got, reference.linear(x, weight, b)) < (1e-4 if ON_GPU else 1e-1)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear(bias: bool) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    x, weight, b = torch.randn(5, 64, device=DEVICE).to(dtype), torch.randn(80, 64, device=DEVICE).to(dtype), torch.randn(80, device=DEVICE)
    given = b.to(dtype) if bias else None
    got = api.gated_linear(x, weight, given, backend=BACKEND)
    expected = reference.gated_linear(x, weight, given)
    assert got.dtype == dtype
    assert largest_error(got / 64, expected / 64) < 4 * TOLERANCE[dtype]


@pytest.mark.skipif(not HAS_HOPPER, reason="of the CUDA kernels for Hopper")
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 128, 129, 256, 257, 700, 2300])
@pytest.mark.parametrize(("inputs", "width"), [(64, 64), (72, 100), (512, 1000), (4096, 14336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gated_kernel_at_every_shape(rows: int, inputs: int, width: int, dtype: torch.dtype) -> None:
    """Also where `api.gated_linear` leaves it to a linear layer and the activation, and with tiles of every size."""
    x = torch.randn(rows, inputs + 64, device=DEVICE).to(dtype)[:, :inputs]
    weight = (torch.randn(2 * width, inputs, device=DEVICE) / inputs**0.5).to(dtype)
    bias = torch.randn(2 * width, device=DEVICE).to(dtype)
    for b in (None, bias):
        expected = reference.gated_linear(x, weight, b)
        for tile in (None, *hopper_gated_linear.TILES):
            torch.full((3, rows, width), torch.nan, device=DEVICE, dtype=dtype)  # the result is likely to get this memory
            got = hopper_gated_linear.gated_linear(x, weight, b, tile=tile)
            assert torch.equal(got, hopper_gated_linear.gated_linear(x, weight, b, tile=tile))
            assert largest_error(got, expected) < TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (4096, 6144), (14336, 4096), (4096, 128256), (192, 1000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, inputs + 8, device=DEVICE).to(dtype)[:, :inputs]
    weight, bias = (torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    for b, out_dtype in ((None, None), (bias, None), (None, torch.float32)):
        got = api.linear(x, weight, b, out_dtype=out_dtype, backend=BACKEND)
        assert got.dtype == (out_dtype or dtype)
        wide = 1e-4 if inputs < 8192 else 2e-4  # sums in one order err the more the longer they are
        assert largest_error(got, reference.linear(x, weight, b)) < (wide if out_dtype else 2 * TOLERANCE[dtype])


def _amid_nan(rows: int, columns: int, beside: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random [rows, columns] with NaN in the rows before and behind, and `beside` of them at the end of each row."""
    whole = torch.full((rows + 2, columns + beside), torch.nan, device=DEVICE, dtype=dtype)
    inner = whole[1:-1, :columns]
    return inner.copy_(torch.randn(rows, columns, device=DEVICE) * scale)


@pytest.mark.skipif(not HAS_LIBRARY, reason="of the CUDA kernels")
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(8, 1), (40, 3), (64, 40), (72, 4), (520, 1001), (200, 2000), (1032, 130), (4104, 1280), (14336, 4096)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_few_rows_at_every_shape(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """The single row too. With 3 blocks each makes many passes over its outputs."""
    torch.manual_seed(0)
    weight, bias = _amid_nan(outputs, inputs, 0, dtype, inputs**-0.5), torch.randn(outputs, device=DEVICE).to(dtype)
    for rows in range(1, 17):
        x = _amid_nan(rows, inputs, 64, dtype)
        for b, out_dtype, blocks in ((None, None, 0), (bias, None, 3), (bias, torch.float32, 0), (None, torch.float32, 3)):
            torch.full((rows, outputs), torch.nan, device=DEVICE, dtype=out_dtype or dtype)  # the result is likely to get this memory
            got = few_rows_linear(x, weight, b, out_dtype, blocks=blocks)
            assert got.dtype == (out_dtype or dtype)
            assert torch.equal(got, few_rows_linear(x, weight, b, out_dtype, blocks=blocks))
            wide = 1e-4 if inputs < 8192 else 2e-4
            assert largest_error(got, reference.linear(x, weight, b)) < (wide if out_dtype else 2 * TOLERANCE[dtype])
            fewer = x[: 1 if rows <= 8 else 9]
            assert torch.equal(got[: len(fewer)], few_rows_linear(fewer, weight, b, out_dtype)), "a row depends on how many there are"


@pytest.mark.skipif(not HAS_LIBRARY, reason="of the CUDA kernels")
@pytest.mark.parametrize(("inputs", "width"), [(8, 1), (40, 3), (72, 4), (520, 1001), (1032, 130), (4104, 1280), (4096, 14336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gated_kernel_for_few_rows_at_every_shape(inputs: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = _amid_nan(2 * width, inputs, 0, dtype, inputs**-0.5), torch.randn(2 * width, device=DEVICE).to(dtype)
    for rows in range(1, 17):
        x = _amid_nan(rows, inputs, 64, dtype)
        for b, blocks in ((None, 0), (bias, 3)):
            torch.full((3, rows, width), torch.nan, device=DEVICE, dtype=dtype)  # the result is likely to get this memory
            got, expected = few_rows_gated_linear(x, weight, b, blocks=blocks), reference.gated_linear(x, weight, b)
            assert torch.equal(got, few_rows_gated_linear(x, weight, b, blocks=blocks))
            assert largest_error(got, expected) < TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.skipif(not HAS_HOPPER, reason="early launches are Hopper's")
@pytest.mark.parametrize("rows", [2, 8, 9, 16])
def test_layers_of_few_rows_that_start_early_equal_those_that_do_not(rows: int) -> None:
    """As graphs, whose memory serves several results in turn: what the kernel ahead writes late must not be read before."""
    torch.manual_seed(0)
    weights = [torch.randn(n, 4096, device=DEVICE, dtype=torch.bfloat16) / 64 for n in (4096, 28672)]
    down, norm = torch.randn(4096, 14336, device=DEVICE, dtype=torch.bfloat16) / 120, torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
    first = torch.randn(rows, 4096, device=DEVICE, dtype=torch.bfloat16)

    def layers(early: bool) -> torch.Tensor:
        h, residual = first, first.clone()  # which the sum takes the place of
        for _ in range(4):
            h, residual = api.add_rms_norm(few_rows_linear(h, weights[0], None, early=early), residual, norm, 1e-5, backend=BACKEND)
            h = few_rows_linear(few_rows_gated_linear(h, weights[1], None, early=early), down, None, early=early)
        return h

    results = []
    for early in (False, True):
        layers(early)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers(early)
        for _ in range(20):
            graph.replay()
            results.append(out.clone())
    assert bool(torch.isfinite(results[0]).all())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not HAS_HOPPER, reason="of the CUDA kernels for Hopper")
@pytest.mark.parametrize("rows", [1, 17, 31, 32, 33, 50, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (72, 130), (520, 1001), (200, 2000), (4104, 1280), (4096, 6144)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_batches_at_every_shape(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Also where `api.linear` leaves it to cuBLAS."""
    x = torch.randn(rows, inputs + 64, device=DEVICE).to(dtype)[:, :inputs]
    weight, bias = (torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    for b, out_dtype in ((None, None), (bias, None), (bias, torch.float32)):
        torch.full((rows, outputs), torch.nan, device=DEVICE, dtype=out_dtype or dtype)  # the result is likely to get this memory
        got = batch_linear(x, weight, b, out_dtype)
        assert torch.equal(got, batch_linear(x, weight, b, out_dtype))
        assert largest_error(got, reference.linear(x, weight, b)) < (1e-4 if out_dtype else 2 * TOLERANCE[dtype])


@pytest.mark.skipif(not HAS_HOPPER, reason="of the CUDA kernels for Hopper")
@pytest.mark.parametrize("rows", [1, 33, 64, 65, 128, 129, 200, 256, 300, 384])
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 4), (1544, 1004), (4096, 6144), (14336, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_split_kernel_at_every_shape(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Also where `api.linear` leaves it to others."""
    x = torch.randn(rows, inputs + 64, device=DEVICE).to(dtype)[:, :inputs]
    weight, bias = (torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    for b in (None, bias):
        for tiles in hopper_split_linear.TILES:
            high = 1 if rows <= 128 else 2 * -(-rows // (128 * tiles.groups))
            if tiles.parts * -(-outputs // tiles.width) * high > 128 or (tiles.groups == 3 and rows <= 128):
                continue
            torch.full((rows, outputs), torch.nan, device=DEVICE, dtype=dtype)  # the result is likely to get this memory
            got = hopper_split_linear.split_linear(x, weight, b, tiles=tiles)
            for _ in range(3):
                assert torch.equal(got, hopper_split_linear.split_linear(x, weight, b, tiles=tiles))
            assert largest_error(got, reference.linear(x, weight, b)) < 2 * TOLERANCE[dtype]


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
@pytest.mark.parametrize("decodes", [0, 1, 3, 8, 30, 120, 300])
@pytest.mark.parametrize("prompts", [[], [40], [70, 1, 300]])
@pytest.mark.parametrize("window", [0, 50])
def test_attention_sees_what_the_kernel_ahead_of_it_writes(decodes: int, prompts: list[int], window: int) -> None:
    """It may begin to read the cache before that one has ended, prompts' attention beside the decodes', the layer behind beside both."""
    lengths = [(1, 1 + 37 * i % 400) for i in range(decodes)] + [(count, count + 33) for count in prompts]
    if not lengths:
        return
    shape = {"heads": 8, "kv_heads": 2, "dim": 128, "block_size": 64, "window": window, "num_decodes": decodes}
    case = paged(lengths, dtype=torch.bfloat16, device=DEVICE, **shape)  # type: ignore[arg-type]
    positions = torch.cat([torch.arange(context - count, context) for count, context in lengths]).to(DEVICE)
    owners = torch.cat([torch.full((count,), i) for i, (count, _) in enumerate(lengths)]).to(DEVICE)
    slots = case.block_tables[owners, positions // 64].long() * 64 + positions % 64
    caches, table = (case.key_cache, case.value_cache), torch.randn(512, 128, device=DEVICE)
    nothing = torch.full((), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    into, out_of = ((torch.randn(n, k, device=DEVICE) / k**0.5).bfloat16() for n, k in ((12 * 128, 256), (256, 1024)))
    x = torch.randn(len(positions), 256, device=DEVICE).bfloat16()

    def rotated() -> torch.Tensor:
        for cache in caches:
            cache[slots // 64, :, slots % 64] = nothing
        heads = api.linear(x, into, backend=BACKEND).unflatten(-1, (-1, 128)).split([8, 2, 2], dim=1)
        return api.rope_and_cache_write(*heads, table, positions, *caches, slots, backend=BACKEND)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        attended = api.paged_attention(rotated(), *case.arguments[1:], **case.options, backend=BACKEND)  # type: ignore[arg-type]
        return attended, api.linear(attended.flatten(1), out_of, backend=BACKEND)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(5):
        x.normal_()
        graph.replay()
        expected = replace(case, q=rotated()).expected()
        assert largest_error(captured[0], expected) < 2 * TOLERANCE[torch.bfloat16]
        assert largest_error(captured[1], reference.linear(captured[0].flatten(1), out_of)) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("rows", [2, 9, 16, 17, 32, 48, 100, 256])
def test_linear_in_a_chain_repeats_itself_in_and_out_of_a_graph(rows: int) -> None:
    """Kernels that start before the one ahead of them ends must wait for what it writes."""
    shapes = [(6144, 1024), (520, 6144), (28672, 520), (1024, 28672)]
    weights = [(torch.randn(shape, device=DEVICE) / shape[1] ** 0.5).bfloat16() for shape in shapes]
    x = torch.randn(rows, 1024, device=DEVICE).bfloat16()

    def chain() -> torch.Tensor:
        y = x
        for weight in weights * 3:
            y = api.linear(y, weight, backend=BACKEND)
        return y

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, expected)
        assert torch.equal(chain(), expected)
    wide = x.float()
    for weight in weights * 3:
        wide = reference.linear(wide, weight)
    assert largest_error(expected, wide) < 0.15


@pytest.mark.skipif(not ON_GPU, reason="large: for a GPU")
@pytest.mark.parametrize("rows", [1, 2, 16, 32])
def test_layers_of_small_kernels_that_start_early_repeat_themselves_in_a_graph(rows: int) -> None:
    norm = torch.rand(1024, device=DEVICE).bfloat16() + 0.5
    up, down = ((torch.randn(n, k, device=DEVICE) / k**0.5).bfloat16() for n, k in ((6144, 1024), (1024, 3072)))
    x = torch.randn(rows, 1024, device=DEVICE).bfloat16()

    def layers() -> torch.Tensor:
        h, residual = x.clone(), x.clone()
        for _ in range(12):
            h, residual = api.add_rms_norm(h, residual, norm, 1e-5, backend=BACKEND)
            h = api.linear(api.silu_and_mul(api.linear(h, up, backend=BACKEND), backend=BACKEND), down, backend=BACKEND)
        return h + residual

    expected = layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, expected)
    assert bool(torch.isfinite(expected).all())


_SIZES = [(3, 10), (2, 300)] + ([(1, 128256), (256, 128256)] if ON_GPU else [(1, 5000)])


@pytest.mark.parametrize(("rows", "size"), _SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_argmax_takes_the_first_of_equals(rows: int, size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, size + 3, device=DEVICE).to(dtype)[:, :size]
    logits[0, size // 2] = logits[0, size - 1] = 100.0
    logits[-1, :] = -torch.inf
    logits[-1, size - 2] = -3.0
    assert torch.equal(api.argmax(logits, backend=BACKEND).cpu(), reference.argmax(logits).cpu())


@pytest.mark.parametrize(("rows", "size"), _SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_tokens_are_forbidden_and_nothing_else_changes(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    padded = torch.randn(rows, size + 3, device=DEVICE).to(dtype)
    before, logits = padded.clone(), padded[:, :size]
    chosen = torch.arange(rows - 1, -1, -2, device=DEVICE)
    allowed = torch.randint(-(2**31), 2**31, (len(chosen), -(-size // 32)), dtype=torch.int32, device=DEVICE)
    allowed[0] = -1
    expected = before.cpu()[:, :size]
    bits = (allowed.cpu().unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)).bitwise_and(1).flatten(1)[:, :size]
    expected[chosen.cpu()] = torch.where(bits == 1, expected[chosen.cpu()], -torch.inf)
    api.mask_tokens(logits, chosen, allowed, backend=BACKEND)
    assert torch.equal(logits.cpu(), expected)
    assert torch.equal(padded[:, size:], before[:, size:])


Limits = tuple[int | None, float | None, float | None]
_DRAWS = [(16, 300, 3.0), (4, 2000, 0.3), (64, 128256, 1.0), (64, 128256, 8.0), (9, 70001, 0.3)] if ON_GPU else [(5, 700, 1.0)]


_LIMITS = [(None, None, None), (5, None, None), (0, 0.7, 0.0), (50, 0.5, 0.05), (1, 1.0, 0.0), (3, 0.0, 0.5), (40, 0.9, None)]
_LIMITS += [(None, None, 0.05), (None, None, 0.6), (5000, 0.9, None), (20000, 0.8, None), (None, 0.99, None)] if ON_GPU else []


@pytest.mark.parametrize("limits", _LIMITS)
@pytest.mark.parametrize(("rows", "size", "spread"), _DRAWS)
def test_sampling(limits: Limits, rows: int, size: int, spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, size, device=DEVICE) * spread
    logits[:, ::7] = -torch.inf
    _check_tokens(logits, limits)


def _check_tokens(logits: torch.Tensor, limits: Limits) -> None:
    """Tokens equal the reference's but where the uniform number falls on an edge of the running sum, within float32's error."""
    rows = len(logits)
    uniforms = torch.rand(rows, device=DEVICE)
    temperature = torch.where(torch.arange(rows, device=DEVICE) % 4 == 0, 0.0, torch.rand(rows, device=DEVICE) + 0.5)
    per_row = [None if x is None else torch.full((rows,), x, device=DEVICE) for x in limits]
    got = api.sample(logits, uniforms, temperature, *per_row, backend=BACKEND).cpu()
    greedy = reference.argmax(logits).cpu()
    for i in range(rows):
        if temperature[i] == 0:
            assert got[i] == greedy[i]
            continue
        top_k, top_p, min_p = limits
        kept = reference.kept_probabilities(logits[i], float(temperature[i]), top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0)
        running = (kept.cumsum(0) / kept.sum()).cpu()
        token, at = int(got[i]), float(uniforms[i])
        assert kept[token] > 0, "a token that the limits drop"
        assert running[token] >= at - 1e-5
        assert token == 0 or running[token - 1] <= at + 1e-5


@pytest.mark.parametrize("limits", [(None, 0.9, None), (None, 0.95, None), (50, 0.9, 0.01), (None, None, 0.001)])
@pytest.mark.parametrize("size", [128256, 152064] if ON_GPU else [600])
def test_sampling_where_a_few_tokens_have_most_of_the_weight(size: int, limits: Limits) -> None:
    """What a look at a part of the row cannot foresee: a few hundred likely tokens side by side, in some rows one far ahead."""
    torch.manual_seed(2)
    logits = torch.randn(64 if ON_GPU else 4, size, device=DEVICE) * 2
    logits[:, 100:400] += torch.rand(len(logits), 300, device=DEVICE) * 10
    logits[::3, 17] = 16.0
    _check_tokens(logits, limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [(None, None, None), (300, 0.8, None), (None, 0.9, 0.01), (None, None, 0.05)])
def test_sampling_of_16_bit_logits_at_any_address(limits: Limits, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for size in (3000, 70003) if ON_GPU else (300,):
        _check_tokens((torch.randn(8, size, device=DEVICE) * 2).to(dtype)[:, 1:], limits)


@pytest.mark.parametrize("size", [2000, 40000, 70001] if ON_GPU else [300])
def test_sampling_of_odd_rows_keeps_what_the_limits_say(size: int) -> None:
    """One large logit and many equal ones; logits of every magnitude; forbidden by large finite values; a single allowed one."""
    torch.manual_seed(0)
    few_values = torch.randint(0, 3, (size,), device=DEVICE).float()
    rows = [
        torch.zeros(size, device=DEVICE).index_fill(0, torch.tensor([7], device=DEVICE), 12.0),
        torch.randn(size, device=DEVICE) * 10.0 ** torch.randint(-30, 30, (size,), device=DEVICE),
        torch.where(torch.arange(size, device=DEVICE) % 3 == 0, torch.randn(size, device=DEVICE), -1e9),
        torch.full((size,), -torch.inf, device=DEVICE).index_fill(0, torch.tensor([size - 1], device=DEVICE), -5.0),
        few_values,
        few_values * 1e-4,
    ]
    logits, ones = torch.stack(rows), torch.ones(len(rows), device=DEVICE)
    half = size // 2
    limits = [(0, 0.9, 0.0), (50, 1.0, 0.0), (half, 1.0, 0.0), (half, 0.7, 0.0), (1, 0.5, 0.0), (0, 1.0, 0.1), (0, 0.999999, 0.0)]
    for k, p, least in limits:
        for at in (0.0, 0.31, 0.77, 0.99999):
            got = api.sample(logits, ones * at, ones, (ones * k).int(), ones * p, ones * least, backend=BACKEND).cpu()
            for i, row in enumerate(rows):
                kept = reference.kept_probabilities(row, 1.0, k, p, least).cpu()
                running, token = kept.cumsum(0) / kept.sum(), int(got[i])
                assert kept[token] > 0, (i, k, p, least, at)
                assert running[token] >= at - 2e-5
                assert token == 0 or running[token - 1] <= at + 2e-5


@pytest.mark.parametrize(("rows", "size"), [(40, 30000), (40, 128256), (150, 70001), (300, 65536)] if ON_GPU else [(5, 500)])
def test_sampling_does_not_depend_on_other_rows(rows: int, size: int) -> None:
    torch.manual_seed(1)
    logits, uniforms, ones = torch.randn(rows, size, device=DEVICE) * 2, torch.rand(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    some = torch.arange(rows, device=DEVICE) % 3
    limits = (torch.where(some == 0, 0, 5000).int(), torch.where(some == 1, 1.0, 0.9), ones * 0.001)
    whole = api.sample(logits, uniforms, ones, *limits, backend=BACKEND)
    for i in (0, rows // 2, rows - 1):
        alone = api.sample(logits[i : i + 1], uniforms[i : i + 1], ones[:1], *(x[i : i + 1] for x in limits), backend=BACKEND)
        assert torch.equal(alone, whole[i : i + 1])
    assert torch.equal(whole, api.sample(logits, uniforms, ones, *limits, backend=BACKEND))


@pytest.mark.skipif(not ON_GPU, reason="graphs and the device's memory")
def test_sampling_in_a_graph_gives_the_same_tokens_and_its_memory_is_bounded() -> None:
    torch.manual_seed(4)
    rows, size = 300, 128256
    logits, uniforms, ones = torch.randn(rows, size, device=DEVICE), torch.rand(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    limits = ((ones * 50).int(), ones * 0.9, ones * 0.0)
    api.sample(logits[:2], uniforms[:2], ones[:2], *(x[:2] for x in limits), backend=BACKEND)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of more rows than ran before
        captured = api.sample(logits, uniforms, ones, *limits, backend=BACKEND)
    for _ in range(3):
        captured.fill_(-1)
        uniforms.uniform_()
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert torch.equal(captured, api.sample(logits, uniforms, ones, *limits, backend=BACKEND))
        assert BACKEND != "cuda" or torch.cuda.max_memory_allocated() - before < 20_000_000


@pytest.mark.parametrize(("rows", "size"), _SIZES)
@pytest.mark.parametrize("count", [0, 20])
def test_log_probabilities(rows: int, size: int, count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, size + 3, device=DEVICE)[:, :size] * 3
    tokens, count = torch.arange(rows, device=DEVICE), min(count, size)
    got, expected = (x(logits, tokens, count) for x in (partial(api.token_logprobs, backend=BACKEND), reference.token_logprobs))
    assert torch.equal(logits.gather(1, got[1]), logits.gather(1, expected[1]))
    assert largest_error(got[0], expected[0]) < 2e-5 and largest_error(got[2], expected[2]) < 2e-5


def test_sampling_keeps_equals_of_the_last_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0, -torch.inf] * 20], device=DEVICE).repeat(8, 1)
    top_k, uniforms = torch.full((8,), 45, device=DEVICE), (torch.arange(8, device=DEVICE) + 0.3) / 8
    ones = torch.ones(8, device=DEVICE)
    got = api.sample(logits, uniforms, ones, top_k, backend=BACKEND).cpu()
    assert torch.equal(got, reference.sample(logits, uniforms, ones, top_k).cpu())


def test_sampling_of_more_equal_logits_than_scratch_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_kernels.triton_kernels import sampling

    monkeypatch.setattr(sampling, "_SCRATCH", 500)
    logits, ones = torch.full((4, 1000), -2.5, device=DEVICE), torch.ones(4, device=DEVICE)
    uniforms = torch.tensor([0.0, 0.2503, 0.5, 0.9999], device=DEVICE)
    got = api.sample(logits, uniforms, ones, None, ones * 0.5, backend=BACKEND).cpu()
    assert torch.equal(got, torch.tensor([0, 250, 500, 999]))
