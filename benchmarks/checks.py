"""The correctness check that belongs to every figure: what the timed run produced, teacher-forced through transformers in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["Sample", "check", "choose"]

_ALLOWED_RATIO = 1.5
_ALLOWED_GAP = 0.1
_LEAST_TOKENS = 500
"""Of output, that a row is checked on if it has them."""
_ROWS = 512
"""Rows of logits turned into log-probabilities at a time: 512 x 128k float32 is 260 MB."""


@dataclass(frozen=True)
class Sample:
    """One request of the timed run: its prompt, what was generated, and the engine's log-probability of each generated token."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def choose(requests: list[tuple[list[int], int]], count: int = 8) -> list[int]:
    """Indices of `count` requests to check: the longest, and the rest spread over the order of arrival.

    Where these have less than `_LEAST_TOKENS` of output together, as many as have, up to four times `count`: the largest of a hundred
    errors is too noisy to compare with another's.
    """
    mean = sum(tokens for _, tokens in requests) / max(1, len(requests))
    count = max(count, min(4 * count, math.ceil(_LEAST_TOKENS / max(1.0, mean))))
    longest = max(range(len(requests)), key=lambda i: len(requests[i][0]) + requests[i][1])
    if len(requests) <= count:
        return list(range(len(requests)))
    spread = [round(i * (len(requests) - 1) / (count - 1)) for i in range(count)]
    return sorted(spread if longest in spread else [longest, *spread[:-1]])


@dataclass(frozen=True)
class _Forced:
    """One model's view of the generated tokens, a row each: their log-probabilities, its own choices, and the gap from its best logit to
    that of the generated token and to that of another model's choice. float64, int64."""

    logprobs: torch.Tensor
    choices: torch.Tensor
    gaps: torch.Tensor
    other_gaps: torch.Tensor


@torch.inference_mode()
def check(model_dir: Path, groups: dict[str, list[Sample]], device: str = "cuda") -> dict[str, dict[str, Any]]:
    """Each group judged by itself; the two reference models are loaded once for all of them.

    Figures: mean and 99.9th-percentile error of the log-probabilities against float32, beside those of transformers' own bf16, and the
    largest gap from the reference's best logit to the chosen token's, beside that of the tokens that transformers' bf16 would have chosen.
    `passed`: the errors within 1.5 times bf16's own, the gap within 0.1 or, where bf16's own is larger, 1.5 times that (on random weights
    the best logits lie so close together that no bf16 arithmetic keeps within 0.1). NaN never passes.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rounded = _teacher_forced(model_dir, groups, torch.bfloat16, device, {})
    exact = _teacher_forced(model_dir, groups, torch.float32, device, {name: forced.choices for name, forced in rounded.items()})
    return {name: _judge(samples, exact[name], rounded[name]) for name, samples in groups.items()}


def _judge(samples: list[Sample], exact: _Forced, rounded: _Forced) -> dict[str, Any]:
    ours = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
    error, floor = (ours - exact.logprobs).abs(), (rounded.logprobs - exact.logprobs).abs()
    figures = {
        "mean_error": error.mean().item(), "p999_error": error.quantile(0.999).item(),
        "bf16_mean_error": floor.mean().item(), "bf16_p999_error": floor.quantile(0.999).item(),
        "largest_gap": exact.gaps.max().item(), "bf16_largest_gap": exact.other_gaps.max().item(),
    }  # fmt: skip
    passed = (
        bool(torch.isfinite(ours).all())
        and figures["mean_error"] <= _ALLOWED_RATIO * figures["bf16_mean_error"]
        and figures["p999_error"] <= _ALLOWED_RATIO * figures["bf16_p999_error"]
        and figures["largest_gap"] <= max(_ALLOWED_GAP, _ALLOWED_RATIO * figures["bf16_largest_gap"])
    )
    return {"passed": passed, "tokens": ours.numel(), **{name: round(value, 6) for name, value in figures.items()}}


def _teacher_forced(
    model_dir: Path, groups: dict[str, list[Sample]], dtype: torch.dtype, device: str, others: dict[str, torch.Tensor]
) -> dict[str, _Forced]:
    from transformers import AutoModelForCausalLM

    where = {} if device == "cpu" else {"device_map": device}
    how = {"attn_implementation": _exact_attention()} if dtype == torch.float32 else {}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **where, **how).eval()
    results = {}
    for name, samples in groups.items():
        logits_parts = (part for sample in samples for part in _logits(model, sample, device))
        results[name] = _view(logits_parts, [t for s in samples for t in s.tokens], others.get(name))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return results


def _exact_attention() -> str:
    """The name of an attention for float32 that needs no memory for scores: torch's kernels of that kind take heads that share keys in
    16 bits only, and 32k tokens of a few heads are 70 GB of scores. So keys and values are repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "gantline_exact"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, T, D] -> [1, T, heads, D]; without a mask causal."""
    del module
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=causal)
    return out.transpose(1, 2).contiguous(), None


def _logits(model: Any, sample: Sample, device: str) -> Iterator[torch.Tensor]:
    """The logits from which each generated token was chosen, float64, some rows at a time."""
    ids = torch.tensor([sample.prompt + sample.tokens[:-1]], device=device)
    hidden = model.model(ids).last_hidden_state[0, len(sample.prompt) - 1 :]
    for start in range(0, len(sample.tokens), _ROWS):
        yield model.lm_head(hidden[start : start + _ROWS]).double()


def _view(parts: Iterator[torch.Tensor], tokens: list[int], other: torch.Tensor | None) -> _Forced:
    rows: list[tuple[torch.Tensor, ...]] = []
    at = 0
    for logits in parts:
        generated = torch.tensor(tokens[at : at + len(logits)], device=logits.device)
        best, choices = logits.max(-1)
        picked = logits.gather(1, generated[:, None])[:, 0]
        compared = choices if other is None else other[at : at + len(logits)].to(logits.device)
        gaps = (best - picked, best - logits.gather(1, compared[:, None])[:, 0])
        rows.append(tuple(t.cpu() for t in (picked - logits.logsumexp(-1), choices, *gaps)))
        at += len(logits)
    return _Forced(*(torch.cat(column) for column in zip(*rows, strict=True)))
