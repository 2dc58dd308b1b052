"""AWQ: activation-aware weight quantization (Lin et al., https://arxiv.org/abs/2306.00978).

A few input channels carry large activations; errors in the weights that read them weigh most. Before rounding, such channels' weights are
multiplied by s > 1 and their activations divided by s, which changes nothing but the rounding:

    y = W x = (W diag(s)) (diag(s)^-1 x),   1/s folded into whatever makes x (a norm, the rows of v or up)

1. For each site s = mean|x|^a, or mean|x|^a / mean|w|^(1-a), normalized; `a` from a grid, by the squared error of the layer's output
   (attention's, the MLP's, or the matrix's own where it stands alone) on sample windows. a = 0 is round-to-nearest, so no site gets worse.
2. For each group of weights the largest magnitude is clipped by a ratio from a grid, by the group's share of the squared output error over
   all calibration tokens. Queries and keys are not clipped: their product would amplify what is lost.

Left out: nothing is trained. With grouped-query attention the paper's code skips v -> o; here the query heads that share a value head share
its scales, which is as exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gantline_quant.rtn import fake_quantize, fake_quantize_groups
from gantline_quant.statistics import READERS, SITES, SiteStatistics

__all__ = ["apply_scales", "clip_weights", "search_scales"]

_ALPHAS = tuple(step / 10 for step in range(11))
_CLIP_RATIOS = tuple(1 - step / 20 for step in range(11))
_NOT_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
_SMALLEST = 1e-4
_CLIP_ELEMENTS = 1 << 25
"""Weights that are clipped at once: bounds the memory of the search."""

Scales = dict[str, Tensor]
"""Site -> float32 [K], by which the readers' columns are multiplied."""


def search_scales(layer: nn.Module, statistics: Mapping[str, SiteStatistics], context: Mapping[str, Any], group_size: int) -> Scales:
    """The best scales of each site. `context` is what the layer's attention needs beside its input. The layer is left as it was."""
    scales: Scales = {}
    for site in SITES:
        readers = [layer.get_submodule(name) for name in READERS[site]]
        scales[site] = _search_site(
            readers, statistics[site], _block_of(layer, site, context), group_size, _shared_heads(layer) if site == "heads" else None
        )
    return scales


def _block_of(layer: nn.Module, site: str, context: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """What is computed from a site's activations, and whose error counts."""
    if site == "attention":
        return lambda x: layer.self_attn(hidden_states=x, **context)[0]
    if site == "mlp":
        return lambda x: layer.mlp(x)
    return layer.get_submodule(READERS[site][0])


def _search_site(
    readers: list[nn.Module],
    statistics: SiteStatistics,
    block: Callable[[Tensor], Tensor],
    group_size: int,
    shared: tuple[int, int] | None,
) -> Tensor:
    original = [reader.weight for reader in readers]
    targets = [block(x) for x in statistics.samples]
    best_error, best = float("inf"), torch.ones_like(statistics.mean)
    for scale in _candidates(statistics.mean, original, group_size, shared):
        for reader, weight in zip(readers, original, strict=True):
            reader.weight = nn.Parameter(fake_quantize(weight * scale, group_size) / scale, requires_grad=False)
        error = sum((block(x) - y).square().mean().item() for x, y in zip(statistics.samples, targets, strict=True))
        if error < best_error:  # a NaN never is
            best_error, best = error, scale
    for reader, weight in zip(readers, original, strict=True):
        reader.weight = weight
    return best


def _candidates(mean: Tensor, weights: list[Tensor], group_size: int, shared: tuple[int, int] | None) -> Iterator[Tensor]:
    """Scales [K], their geometric middle at 1; the first is all ones. `shared` is (value heads, head dimension)."""
    activation, weight = (_share(x, shared).clamp(min=_SMALLEST) for x in (mean, _mean_magnitude(weights, group_size)))
    for alpha in _ALPHAS:
        plain = activation**alpha
        yield _normalize(plain)
        if alpha < 1:
            yield _normalize((plain / weight ** (1 - alpha)).clamp(min=_SMALLEST))


def _mean_magnitude(weights: list[Tensor], group_size: int) -> Tensor:
    """Mean over outputs of each column's |w| relative to the largest of its group, [K]."""
    groups = torch.cat(weights).abs().unflatten(-1, (-1, group_size))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).flatten()


def _normalize(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()


def _shared_heads(layer: nn.Module) -> tuple[int, int]:
    attention = layer.self_attn
    return attention.v_proj.weight.shape[0] // attention.head_dim, attention.head_dim


def _share(values: Tensor, shared: tuple[int, int] | None) -> Tensor:
    """Mean over the query heads that share a value head, given to each of them."""
    if shared is None:
        return values
    heads = values.view(shared[0], -1, shared[1])
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def apply_scales(layer: nn.Module, scales: Scales) -> None:
    """Fold the scales into the layer's weights: its function stays the same."""
    for site in SITES:
        for name in READERS[site]:
            layer.get_submodule(name).weight.mul_(scales[site])
    layer.input_layernorm.weight.div_(scales["attention"])
    layer.post_attention_layernorm.weight.div_(scales["mlp"])
    value_heads, head_dim = _shared_heads(layer)
    per_value_head = scales["heads"].view(value_heads, -1, head_dim)[:, 0].reshape(-1)
    _divide_rows(layer.self_attn.v_proj, per_value_head)
    _divide_rows(layer.mlp.up_proj, scales["product"])


def _divide_rows(linear: nn.Module, scale: Tensor) -> None:
    linear.weight.div_(scale.unsqueeze(-1))
    if linear.bias is not None:
        linear.bias.div_(scale)


def clip_weights(layer: nn.Module, statistics: Mapping[str, SiteStatistics], scales: Scales, group_size: int) -> None:
    """Clip each group of weights where that lowers the error; `scales` are those already applied."""
    for site in SITES:
        gram = statistics[site].scaled_gram(scales[site])
        for name in READERS[site]:
            if name not in _NOT_CLIPPED:
                weight = layer.get_submodule(name).weight
                rows = max(1, _CLIP_ELEMENTS // weight.shape[1])
                for part in weight.split(rows):
                    part.copy_(_clip(part.unflatten(-1, (-1, group_size)), gram).flatten(-2))


def _clip(groups: Tensor, gram: Tensor) -> Tensor:
    """`groups` [N, G, g] clipped at the ratio of their largest magnitude that errs least; `gram` [G, g, g]."""
    largest = groups.abs().amax(-1, keepdim=True)
    best_error = torch.full_like(largest, float("inf"))
    best = torch.ones_like(largest)
    for ratio in _CLIP_RATIOS:
        limit = largest * ratio
        change = fake_quantize_groups(groups.clamp(-limit, limit)) - groups
        by_group = change.transpose(0, 1)  # [G, N, g]
        error = ((by_group @ gram) * by_group).sum(-1).T.unsqueeze(-1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, ratio, best)
    limit = largest * best
    return groups.clamp(-limit, limit)
