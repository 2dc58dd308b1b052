"""The correctness check that belongs to every figure: what the timed run produced, teacher-forced through transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Sample", "check", "choose"]

_ALLOWED_RATIO = 1.5
_ALLOWED_GAP = 0.1
_ROWS = 512
"""Rows of logits turned into log-probabilities at a time: 512 x 128k float32 is 260 MB."""


@dataclass(frozen=True)
class Sample:
    """One request of the timed run: its prompt, what was generated, and the engine's log-probability of each generated token."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def choose(requests: list[tuple[list[int], int]], count: int = 8) -> list[int]:
    """Indices of `count` requests to check: the longest, and the rest spread over the order of arrival."""
    longest = max(range(len(requests)), key=lambda i: len(requests[i][0]) + requests[i][1])
    spread = [round(i * (len(requests) - 1) / max(1, count - 1)) for i in range(count)]
    return sorted({longest, *spread[: count - 1]} if len(requests) >= count else range(len(requests)))


@torch.inference_mode()
def check(model_dir: Path, groups: dict[str, list[Sample]], device: str = "cuda") -> dict[str, dict[str, Any]]:
    """Each group judged by itself; the two reference models are loaded once for all of them.

    Figures: mean and 99.9th-percentile error of the log-probabilities against float32, beside those of transformers' own bf16, and the
    largest gap between the reference's best logit and the chosen token's. `passed` holds the three bounds; NaN never passes.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    exact = _teacher_forced(model_dir, groups, torch.float32, device)
    rounded = _teacher_forced(model_dir, groups, torch.bfloat16, device)
    return {name: _judge(samples, *exact[name], rounded[name][0]) for name, samples in groups.items()}


def _judge(samples: list[Sample], reference: torch.Tensor, gaps: torch.Tensor, rounded: torch.Tensor) -> dict[str, Any]:
    ours = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
    error, floor = (ours - reference).abs(), (rounded - reference).abs()
    figures = {
        "mean_error": error.mean().item(), "p999_error": error.quantile(0.999).item(),
        "bf16_mean_error": floor.mean().item(), "bf16_p999_error": floor.quantile(0.999).item(),
        "largest_gap": gaps.max().item(),
    }  # fmt: skip
    passed = (
        bool(torch.isfinite(ours).all())
        and figures["mean_error"] <= _ALLOWED_RATIO * figures["bf16_mean_error"]
        and figures["p999_error"] <= _ALLOWED_RATIO * figures["bf16_p999_error"]
        and figures["largest_gap"] <= _ALLOWED_GAP
    )
    return {"passed": passed, "tokens": ours.numel(), **{name: round(value, 6) for name, value in figures.items()}}


def _teacher_forced(
    model_dir: Path, groups: dict[str, list[Sample]], dtype: torch.dtype, device: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(log-probability of each generated token, gap of its logit to the best), float64, each group's samples in one row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, device_map=device).eval()
    results = {}
    for name, samples in groups.items():
        pairs = [pair for sample in samples for pair in _rows_of(model, sample, device)]
        results[name] = (torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return results


def _rows_of(model: Any, sample: Sample, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.tensor([sample.prompt + sample.tokens[:-1]], device=device)
    hidden = model.model(ids).last_hidden_state[0, len(sample.prompt) - 1 :]
    chosen = torch.tensor(sample.tokens, device=device)
    for start in range(0, len(sample.tokens), _ROWS):
        logits = model.lm_head(hidden[start : start + _ROWS]).double()
        picked = logits.gather(1, chosen[start : start + _ROWS, None])[:, 0]
        yield (picked - logits.logsumexp(-1)).cpu(), (logits.max(-1).values - picked).cpu()
