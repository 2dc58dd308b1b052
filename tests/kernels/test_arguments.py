"""What a kernel would take for something else is refused before it is launched, with what was given and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gantline_kernels import api

from tests.kernels.cases import paged

Given = dict[str, Any]


def _attention(**changes: Any) -> None:
    case = paged([(1, 40), (1, 30)])
    names = ("q", "key_cache", "value_cache", "block_tables", "query_starts", "context_lens", "scale")
    given = dict(zip(names, case.arguments, strict=True)) | case.options
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    api.paged_attention(**given, backend="torch")


def _rope(**changes: Any) -> None:
    q, kv, cache = torch.zeros(3, 4, 64), torch.zeros(3, 2, 64), torch.zeros(2, 2, 16, 64)
    given: Given = {
        "q": q, "k": kv, "v": kv, "cos_sin": torch.zeros(9, 64), "positions": torch.zeros(3, dtype=torch.int32),
        "key_cache": cache, "value_cache": cache.clone(), "slots": torch.arange(3),
    }  # fmt: skip
    api.rope_and_cache_write(**(given | changes), backend="torch")


def _sample(**changes: Any) -> None:
    given: Given = {"logits": torch.randn(4, 50), "uniforms": torch.rand(4), "temperature": torch.ones(4)}
    api.sample(**(given | changes), backend="torch")


def _linear(**changes: Any) -> None:
    given: Given = {"x": torch.randn(3, 16), "weight": torch.randn(8, 16)}
    api.linear(**(given | changes), backend="torch")
    api.gated_linear(**(given | changes), backend="torch")


def _norm(**changes: Any) -> None:
    given: Given = {"x": torch.randn(3, 16), "weight": torch.rand(16), "eps": 1e-5}
    residual = changes.pop("residual", given["x"].clone())
    api.rms_norm(**(given | changes), backend="torch")
    api.add_rms_norm(**(given | changes), residual=residual, backend="torch")


def _awq(**changes: Any) -> None:
    given: Given = {
        "x": torch.randn(3, 64), "qweight": torch.zeros(64, 2, dtype=torch.int32), "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16), "group_size": 32,
    }  # fmt: skip
    api.awq_linear(**(given | changes), backend="torch")


def _others(call: str, *tensors: torch.Tensor) -> None:
    getattr(api, call)(*tensors, backend="torch")


def _apart(x: torch.Tensor) -> torch.Tensor:
    """The same elements, two places from each other."""
    return torch.stack([x, x], dim=-1)[..., 0]


_CACHE = torch.zeros(4, 2, 16, 64)
_ODD = torch.zeros(_CACHE.numel() + 1)[1:].view(_CACHE.shape)
_FARAWAY = torch.empty(2, dtype=torch.int32, device="meta")


@pytest.mark.parametrize("call", [_attention, _rope, _sample, _linear, _norm, _awq])
def test_what_the_changes_below_begin_with_is_taken(call: Callable[..., None]) -> None:
    call()


@pytest.mark.parametrize(
    ("call", "changes", "said"),
    [
        (_attention, {"context_lens": _apart}, "the elements of context_lens lie 2 apart"),
        (_attention, {"query_starts": _apart}, "the elements of query_starts lie 2 apart"),
        (_attention, {"block_tables": _apart}, "the elements of a row of block_tables lie 2 apart"),
        (_attention, {"context_lens": _FARAWAY}, "context_lens is on meta, the rest on cpu: move it"),
        (_attention, {"q": torch.Tensor.half}, "key_cache is torch.float32, expected torch.float16"),
        (_attention, {"value_cache": torch.Tensor.half}, "value_cache is torch.float16, key_cache torch.float32"),
        (_attention, {"q": torch.zeros(2, 4, 100)}, "a head dimension D among"),
        (_attention, {"key_cache": _ODD, "value_cache": _ODD}, "multiples of 16 bytes"),
        (_attention, {"key_cache": torch.zeros(4, 2, 96, 64), "value_cache": torch.zeros(4, 2, 96, 64)}, "blocks of 96 tokens"),
        (_attention, {"key_cache": torch.zeros(4, 2, 8, 64), "value_cache": torch.zeros(4, 2, 8, 64)}, "blocks of 8 tokens"),
        (_attention, {"sliding_window": -1}, "must not be negative"),
        (_rope, {"k": torch.zeros(3, 2, 64).half()}, "k is torch.float16, expected torch.float32"),
        (_rope, {"positions": torch.zeros(3)}, "positions is torch.float32, expected torch.int32 or torch.int64"),
        (_rope, {"slots": torch.zeros(3, dtype=torch.int32)}, "slots is torch.int32, expected torch.int64"),
        (_rope, {"slots": _apart(torch.arange(3))}, "slots lie 2 apart"),
        (_rope, {"cos_sin": torch.zeros(64, 9).t()}, "expected contiguous torch.float32"),
        (_rope, {"q_norm_weight": torch.zeros(32)}, "q_norm_weight is .32., expected .64."),
        (_rope, {"key_cache": _ODD[:2], "value_cache": _ODD[:2]}, "multiples of 16 bytes"),
        (_sample, {"logits": torch.randn(50, 4).t()}, "a row of logits lie 4 apart"),
        (_sample, {"uniforms": _apart(torch.rand(4))}, "uniforms lie 2 apart"),
        (_sample, {"temperature": torch.ones(4, dtype=torch.float64)}, "temperature is torch.float64, expected torch.float32"),
        (_sample, {"top_k": torch.ones(4)}, "top_k is torch.float32, expected torch.int32 or torch.int64"),
        (_sample, {"top_p": torch.ones(3)}, "top_p is .3., expected .4."),
        (_linear, {"x": torch.randn(16, 3).t()}, "a row of x lie 3 apart"),
        (_linear, {"weight": torch.randn(8, 16).half()}, "weight is torch.float16, expected torch.float32"),
        (_linear, {"bias": torch.randn(8).double()}, "bias is torch.float64, expected torch.float32"),
        (_linear, {"bias": torch.randn(7)}, "bias is .7., expected .8."),
        (_norm, {"x": torch.randn(16, 3).t()}, "a row of x lie 3 apart"),
        (_norm, {"weight": torch.rand(16, 2)[:, 0]}, "weight lie 2 apart"),
        (_norm, {"residual": torch.zeros(3, 16).half()}, "residual is torch.float16 .3, 16., expected torch.float32"),
        (_norm, {"residual": torch.zeros(16, 3).t()}, "a row of residual lie 3 apart"),
        (_awq, {"qweight": torch.zeros(64, 2)}, "expected torch.int32"),
        (_awq, {"group_size": 0}, "no multiple of the group size 0"),
        (_awq, {"bias": torch.zeros(8)}, "bias is .8., expected .16."),
    ],
)  # fmt: skip
def test_what_a_kernel_would_misread_is_refused(call: Callable[..., None], changes: Given, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(**changes)


@pytest.mark.parametrize(
    ("call", "tensors", "said"),
    [
        ("silu_and_mul", (torch.randn(8, 3).t(),), "a row of x lie 3 apart"),
        ("silu_and_mul", (torch.zeros(3, 8, dtype=torch.int32),), "x is torch.int32"),
        ("argmax", (torch.randn(8, 3).t(),), "a row of logits lie 3 apart"),
        ("mask_tokens", (torch.randn(4, 40), _apart(torch.arange(2)), torch.zeros(2, 2, dtype=torch.int32)), "rows lie 2 apart"),
        ("token_logprobs", (torch.randn(8, 3).t(), torch.zeros(3, dtype=torch.int64), 1), "a row of logits lie 3 apart"),
    ],
)
def test_so_it_is_by_the_other_operations(call: str, tensors: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _others(call, *tensors)


@pytest.mark.parametrize("backend", ["torch", "triton", "invariant"])
def test_a_step_without_tokens_attends_nothing(backend: str) -> None:
    """Sequences may be there, as in a padded batch: none of them has a query."""
    none, caches = torch.zeros(3, dtype=torch.int32), torch.zeros(2, 4, 2, 16, 64)
    got = api.paged_attention(
        torch.zeros(0, 4, 64), *caches, torch.zeros(2, 2, dtype=torch.int32), none, none[:2], 1.0,
        max_query_len=1, max_context_len=10, num_decodes=1, backend=backend,
    )  # fmt: skip
    assert got.shape == (0, 4, 64)


def test_a_backend_is_chosen_by_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5) if device == torch.device("cuda:1") else (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert api.select("auto", "cuda:0") == "cuda"
    assert api.select("auto", "cuda:1") == "torch"
