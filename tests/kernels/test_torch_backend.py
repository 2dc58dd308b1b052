"""The plain torch backend against the references, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gantline_kernels import api, reference

from tests.kernels.cases import largest_error, paged


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)], [(1, 16), (1, 17), (1, 300), (1, 3)], [(20, 20)], [(1, 50), (7, 33), (1, 9), (64, 64), (2, 2)], [(600, 700)]],
)
def test_paged_attention_equals_the_reference(lengths: list[tuple[int, int]], window: int, softcap: float) -> None:
    case = paged(lengths, window=window, softcap=softcap)
    got = api.paged_attention(*case.arguments, **case.options, backend="torch")
    assert largest_error(got, case.expected()) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 20])
def test_shared_prefixes_change_no_result(window: int, softcap: float) -> None:
    lengths = [(1, 40), (1, 100), (1, 33), (1, 300), (1, 200), (1, 49), (1, 3), (7, 33)]
    case = paged(lengths, window=window, softcap=softcap).share([([1, 3], 5), ([5, 0, 4], 2)], spare_groups=1)
    got = api.paged_attention(*case.arguments, **case.options, backend="torch")
    assert largest_error(got, case.expected()) < 1e-5


_SHARED = {"lens": [16, 16], "members": [0, 1], "starts": [0, 2], "max_own_len": 9}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lens": [16]}, "must be \\[2\\]"),
        ({"members": [0, 1, 2]}, "must be \\[2\\]"),
        ({"starts": [0]}, "without a sequence or a group"),
        ({"max_own_len": 0}, "expected 1 or more"),
        ({"lens": [16.0, 16.0]}, "int32"),
    ],
)
def test_wrong_shared_prefixes_are_refused(wrong: dict[str, Any], said: str) -> None:
    case = paged([(1, 20), (1, 25)])
    given = _SHARED | wrong
    tensors = (torch.tensor(given[x], dtype=torch.int32 if isinstance(given[x][0], int) else None) for x in ("lens", "members", "starts"))
    case.options["shared"] = api.SharedPrefixes(*tensors, max_own_len=given["max_own_len"])
    with pytest.raises(ValueError, match=said):
        api.paged_attention(*case.arguments, **case.options, backend="torch")


def test_the_reference_refuses_a_group_that_shares_nothing() -> None:
    case = paged([(1, 20), (1, 25)])
    tensors = (torch.tensor(_SHARED[x], dtype=torch.int32) for x in ("lens", "members", "starts"))
    case.options["shared"] = api.SharedPrefixes(*tensors, max_own_len=9)
    with pytest.raises(ValueError, match="do not share"):
        case.expected()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 1, 96), (16, 1, 128), (6, 2, 256)])
def test_every_grouping_of_heads_is_attended(heads: int, kv_heads: int, dim: int) -> None:
    case = paged([(1, 33), (1, 32), (40, 55)], heads=heads, kv_heads=kv_heads, dim=dim)
    assert largest_error(api.paged_attention(*case.arguments, **case.options, backend="torch"), case.expected()) < 1e-5


@pytest.mark.parametrize("normed", [False, True])
def test_rope_rotates_and_writes_all_but_padding(normed: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(5, 4 * 64 + 2 * 2 * 64)
    q, k, v = (x.unflatten(-1, (-1, 64)) for x in qkv.split([256, 128, 128], dim=-1))
    angles = torch.randn(100, 32)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions, slots = torch.tensor([3, 99, 0, 7, 7]), torch.tensor([17, -1, 0, 47, 33])
    weights = [torch.randn(64), torch.randn(64)] if normed else [None, None]
    caches, expected_caches = ([torch.full((3, 2, 16, 64), 7.0) for _ in range(2)] for _ in range(2))
    expected = reference.rope_and_cache_write(q, k, v, cos_sin, positions, *expected_caches, slots, *weights, 1e-6)
    got = api.rope_and_cache_write(
        q, k, v, cos_sin, positions, *caches, slots, q_norm_weight=weights[0], k_norm_weight=weights[1], eps=1e-6, backend="torch"
    )
    assert largest_error(got, expected) < 1e-5
    assert largest_error(torch.stack(caches), torch.stack(expected_caches)) < 1e-5


def test_norms_and_activation_equal_the_reference() -> None:
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    assert largest_error(api.rms_norm(x, weight, 1e-5, backend="torch"), reference.rms_norm(x, weight, 1e-5)) < 1e-5
    for got, expected in zip(
        api.add_rms_norm(x, residual, weight, 1e-5, backend="torch"), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        assert largest_error(got, expected) < 1e-5
    assert largest_error(api.silu_and_mul(x, backend="torch"), reference.silu_and_mul(x)) < 1e-5


def test_awq_equals_the_reference_and_unpacks_in_the_published_order() -> None:
    torch.manual_seed(0)
    columns = torch.randint(0, 16, (32, 16))
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies in each nibble, lowest first
    words = torch.zeros(32, 2, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= columns.view(32, 2, 8)[:, :, column] << (4 * nibble)
    qweight = words.to(torch.int32)
    zeros, scales = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 16)
    assert torch.equal(reference.awq_dequantize(qweight, zeros, scales, 16), columns.float())
    qzeros, scales = torch.randint(-(2**31), 2**31 - 1, (2, 2), dtype=torch.int32), torch.randn(2, 16)
    expected = reference.awq_dequantize(qweight, qzeros, scales, 16)
    assert largest_error(api.awq_dequantize(qweight, qzeros, scales, 16, backend="torch"), expected) < 1e-6
    x, bias = torch.randn(3, 32), torch.randn(16)
    got = api.awq_linear(x, qweight, qzeros, scales, 16, bias, backend="torch")
    assert largest_error(got, reference.awq_linear(x, qweight, qzeros, scales, 16, bias)) < 1e-3


def test_masked_tokens_equal_the_reference() -> None:
    torch.manual_seed(0)
    logits, rows = torch.randn(5, 70), torch.tensor([3, 0])
    allowed = torch.randint(-(2**31), 2**31, (2, 3), dtype=torch.int32)
    expected = logits.clone()
    reference.mask_tokens(expected, rows, allowed)
    api.mask_tokens(logits, rows, allowed, backend="torch")
    assert torch.equal(logits, expected) and bool(logits[[1, 2, 4]].isfinite().all())


@pytest.mark.parametrize("limits", [(None, None, None), (5, None, None), (0, 0.7, 0.0), (50, 0.5, 0.05), (1, 1.0, 0.0), (3, 0.0, 0.5)])
def test_sampling_equals_the_reference(limits: tuple[int | None, float | None, float | None]) -> None:
    torch.manual_seed(0)
    logits, uniforms = torch.randn(64, 501) * 3, torch.rand(64)
    temperature = torch.where(torch.arange(64) % 4 == 0, 0.0, torch.rand(64) + 0.5)
    logits[:, ::7] = -torch.inf
    top_k, top_p, min_p = limits
    arguments = (
        logits, uniforms, temperature,
        None if top_k is None else torch.full((64,), top_k), None if top_p is None else torch.full((64,), top_p),
        None if min_p is None else torch.full((64,), min_p),
    )  # fmt: skip
    expected = reference.sample(*arguments)
    assert torch.equal(api.sample(*arguments, backend="torch"), expected)
    assert bool(torch.isfinite(logits.gather(1, expected[:, None])).all())


@pytest.mark.parametrize("backend", ["torch", "triton", "invariant"])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_log_probabilities_equal_the_reference(count: int, backend: str) -> None:
    torch.manual_seed(0)
    for logits in (torch.randn(5, 501) * 3, torch.randn(0, 501), (torch.randn(2, 64) * 3).half(), torch.randn(4, 80)[:, 3:60]):
        logits[:, ::7] = -torch.inf
        tokens = torch.arange(len(logits)) + 1
        got = api.token_logprobs(logits, tokens, count, backend=backend)
        expected = reference.token_logprobs(logits, tokens, count)
        assert torch.equal(got[1], expected[1])
        assert largest_error(got[0], expected[0]) < 1e-5 and largest_error(got[2], expected[2]) < 1e-5


def test_every_operation_has_a_reference_and_every_backend_has_every_operation() -> None:
    about_backends = {"BACKENDS", "HEAD_DIMS", "INVARIANT", "INVARIANT_TRITON", "Products", "SharedPrefixes", "find_variance"}
    operations = set(api.__all__) - about_backends - {"select", "select_invariant"}
    assert operations == set(reference.__all__) - {"kept_probabilities"}
    for name in (*api.BACKENDS, api.INVARIANT, api.INVARIANT_TRITON):
        assert operations == set(api._implementation(name).__all__) - {"find_variance"}, name


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4096, 4)
    uniforms = (torch.arange(4096) + 0.5) / 4096
    tokens = api.sample(logits, uniforms, torch.ones(4096), backend="torch")
    assert torch.equal(tokens.bincount(minlength=4), torch.tensor([2048, 1024, 512, 512]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 64)}, "3 query heads over 2"),
        ({"block_tables": torch.zeros(1, 4, dtype=torch.int64)}, "block_tables is torch.int64"),
        ({"max_context_len": 65}, "tables for 64"),
        ({"num_decodes": 2}, "num_decodes is 2 of 1"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(1, 4, 64), "key_cache": torch.zeros(4, 2, 16, 64), "value_cache": torch.zeros(4, 2, 16, 64),
        "block_tables": torch.zeros(1, 4, dtype=torch.int32), "query_starts": torch.zeros(2, dtype=torch.int32),
        "context_lens": torch.ones(1, dtype=torch.int32), "scale": 1.0, "max_query_len": 1, "max_context_len": 64,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        api.paged_attention(**(arguments | change), backend="torch")  # type: ignore[arg-type]


def test_a_backend_is_chosen_by_device_and_unknown_ones_are_refused() -> None:
    assert api.select("auto", "cpu") == "torch"
    assert api.select("triton", "cpu") == "triton"
    with pytest.raises(ValueError, match="needs a GPU"):
        api.select("cuda", "cpu")
    with pytest.raises(ValueError, match="'fast'"):
        api.select("fast", "cpu")
