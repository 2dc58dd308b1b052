"""What AWQ must know about the inputs of a layer's matrices, gathered while the calibration text flows through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["READERS", "SITES", "SiteStatistics", "Watcher"]

READERS: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "heads": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "product": ("mlp.down_proj",),
}
"""Site -> the matrices that read it: the outputs of the two norms, of the attention heads, and of gate times up."""
SITES = tuple(READERS)


@dataclass
class SiteStatistics:
    """Of one site with K channels, over all calibration tokens."""

    group_size: int
    absolute_sum: Tensor | float = 0.0
    """float32 [K]."""
    gram: Tensor | float = 0.0
    """float32 [K / g, g, g]: sums of x x^T within each group, from which the error of any rounding of a group follows exactly."""
    tokens: int = 0
    samples: list[Tensor] = field(default_factory=list)
    """The first windows themselves, each [1, tokens, K]."""

    def add(self, x: Tensor, *, keep: int) -> None:
        """`x`: [windows, tokens, K]; up to `keep` windows in all are kept as samples."""
        flat = x.flatten(0, 1)
        groups = flat.unflatten(-1, (-1, self.group_size)).transpose(0, 1)
        self.absolute_sum = self.absolute_sum + flat.abs().sum(0)
        self.gram = self.gram + groups.transpose(1, 2) @ groups
        self.tokens += len(flat)
        self.samples += [window.unsqueeze(0).clone() for window in x[: max(0, keep - len(self.samples))]]

    @property
    def mean(self) -> Tensor:
        """Mean absolute activation of each channel, [K]."""
        assert isinstance(self.absolute_sum, Tensor), "no tokens were seen"
        return self.absolute_sum / self.tokens

    def scaled_gram(self, scale: Tensor | None) -> Tensor:
        """`gram` of the inputs divided by `scale` [K]."""
        assert isinstance(self.gram, Tensor), "no tokens were seen"
        if scale is None:
            return self.gram
        groups = scale.view(-1, self.group_size)
        return self.gram / (groups.unsqueeze(-1) * groups.unsqueeze(-2))


class Watcher:
    """Sees every site of `layer` while it runs inside the `with` block; gives `statistics` by site."""

    def __init__(self, layer: nn.Module, *, group_size: int, samples: int) -> None:
        self._layer, self._samples = layer, samples
        self.statistics = {site: SiteStatistics(group_size) for site in SITES}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Watcher:
        for site, readers in READERS.items():
            statistics = self.statistics[site]

            def note(module: nn.Module, inputs: tuple[Tensor, ...], statistics: SiteStatistics = statistics) -> None:
                statistics.add(inputs[0], keep=self._samples)

            self._handles.append(self._layer.get_submodule(readers[0]).register_forward_pre_hook(note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
