"""The method: scales that change nothing but the rounding, clipping that never hurts, statistics that are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_quant import awq
from gantline_quant.layers import LayerStream
from gantline_quant.rtn import fake_quantize, fake_quantize_groups
from gantline_quant.statistics import READERS, SITES, Watcher
from gantline_runtime.checkpoint import open_checkpoint
from torch import Tensor, nn

from tests.quant.models import CONFIGURATION_NAMES, write_model

CPU = torch.device("cpu")
GROUP = 32


def watched_layer(name: str, folder: Path) -> tuple[LayerStream, nn.Module, Watcher, Tensor, dict[str, Any]]:
    """The last layer of a small model, and what was seen while 3 windows of 64 tokens ran through it."""
    stream = LayerStream(open_checkpoint(write_model(name, folder)), CPU)
    layer, hidden = stream.load(1), torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(7))
    with Watcher(layer, group_size=GROUP, samples=2) as watcher:
        list(stream.run(layer, 1, hidden, windows_at_once=2))
    return stream, layer, watcher, hidden, stream.context(1, 64)


@pytest.mark.parametrize("name", CONFIGURATION_NAMES)
def test_layers_one_at_a_time_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = LayerStream(open_checkpoint(folder), CPU)
    ids = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        expected = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        hidden = stream.embed(ids, model.get_input_embeddings().weight)
        for index in range(2):
            hidden = torch.cat(list(stream.run(stream.load(index), index, hidden, windows_at_once=1)))
        found = stream.log_likelihoods(hidden, ids, dtype=torch.float32)
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", CONFIGURATION_NAMES)
def test_applying_scales_leaves_the_layers_function_as_it_was(name: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        stream, layer, watcher, hidden, _ = watched_layer(name, tmp_path)
        before = torch.cat(list(stream.run(layer, 1, hidden)))
        generator = torch.Generator().manual_seed(9)
        scales = {site: torch.rand(watcher.statistics[site].mean.shape, generator=generator) * 4 + 0.2 for site in SITES}
        scales["heads"] = awq._share(scales["heads"], awq._shared_heads(layer))
        awq.apply_scales(layer, scales)
        after = torch.cat(list(stream.run(layer, 1, hidden)))
    assert (after - before).norm() / before.norm() < 1e-4


def test_the_search_leaves_the_layer_as_it_was_and_never_chooses_worse_than_rounding(tmp_path: Path) -> None:
    with torch.inference_mode():
        _, layer, watcher, _, context = watched_layer("qwen2-tied", tmp_path)
        before = {name: weight.clone() for name, weight in layer.named_parameters()}
        scales = awq.search_scales(layer, watcher.statistics, context, GROUP)
        assert all(torch.equal(weight, before[name]) for name, weight in layer.named_parameters())
        for site, readers in READERS.items():
            block, errors = awq._block_of(layer, site, context), []
            targets = [block(x) for x in watcher.statistics[site].samples]
            for scale in (torch.ones_like(scales[site]), scales[site]):
                for reader in readers:
                    weight = before[f"{reader}.weight"]
                    layer.get_submodule(reader).weight = nn.Parameter(fake_quantize(weight * scale, GROUP) / scale, requires_grad=False)
                errors.append(
                    sum((block(x) - y).square().mean().item() for x, y in zip(watcher.statistics[site].samples, targets, strict=True))
                )
                for reader in readers:
                    layer.get_submodule(reader).weight = nn.Parameter(before[f"{reader}.weight"], requires_grad=False)
            assert errors[1] <= errors[0] * (1 + 1e-6), site


def test_a_channel_with_large_activations_is_scaled_up(tmp_path: Path) -> None:
    with torch.inference_mode():
        stream, layer, _, hidden, context = watched_layer("llama", tmp_path)
        layer.input_layernorm.weight[5] *= 64
        for reader in READERS["attention"]:
            layer.get_submodule(reader).weight[:, 5] /= 64
        with Watcher(layer, group_size=GROUP, samples=3) as watcher:
            list(stream.run(layer, 1, hidden))
        scale = awq.search_scales(layer, watcher.statistics, context, GROUP)["attention"]
    assert scale[5] > 8 * scale.median()


def test_query_heads_that_share_a_value_head_share_its_scale(tmp_path: Path) -> None:
    with torch.inference_mode():
        _, layer, watcher, _, context = watched_layer("llama", tmp_path)  # 4 query heads, 2 value heads of 16
        heads = awq.search_scales(layer, watcher.statistics, context, GROUP)["heads"].view(2, 2, 16)
    assert torch.equal(heads[:, 0], heads[:, 1])


def test_statistics_are_those_of_all_tokens(tmp_path: Path) -> None:
    with torch.inference_mode():
        _, layer, watcher, hidden, _ = watched_layer("mistral-window", tmp_path)
        x = layer.input_layernorm(hidden).flatten(0, 1)
    seen = watcher.statistics["attention"]
    assert seen.tokens == 3 * 64 and len(seen.samples) == 2
    torch.testing.assert_close(seen.mean, x.abs().mean(0))
    torch.testing.assert_close(seen.gram[1], x[:, GROUP : 2 * GROUP].T @ x[:, GROUP : 2 * GROUP], rtol=1e-4, atol=1e-3)
    scale = torch.rand(64) + 0.5
    torch.testing.assert_close(seen.scaled_gram(scale)[0], (x / scale)[:, :GROUP].T @ (x / scale)[:, :GROUP], rtol=1e-4, atol=1e-3)


def test_clipping_lowers_each_groups_error_on_the_tokens_it_saw() -> None:
    generator = torch.Generator().manual_seed(10)
    groups = torch.randn(32, 4, GROUP, generator=generator)
    groups[:, :, 3] *= 6  # one weight that stretches every range
    x = torch.randn(256, 4, GROUP, generator=generator)
    x[:, :, 3] *= 0.05  # ... and that hardly anything reads
    gram = torch.einsum("tgi,tgj->gij", x, x)

    def error(weights: Tensor) -> Tensor:
        return torch.einsum("tgi,ngi->tng", x, fake_quantize_groups(weights) - groups).square().sum(0)

    before, after = error(groups), error(awq._clip(groups, gram))
    assert (after <= before * (1 + 1e-3)).all()
    assert after.sum() < 0.8 * before.sum()


def test_queries_and_keys_are_not_clipped(tmp_path: Path) -> None:
    with torch.inference_mode():
        _, layer, watcher, _, _ = watched_layer("qwen3", tmp_path)
        before = {name: weight.clone() for name, weight in layer.named_parameters()}
        ones = {site: torch.ones_like(watcher.statistics[site].mean) for site in SITES}
        awq.clip_weights(layer, watcher.statistics, ones, GROUP)
        changed = {name.split(".")[1] for name, weight in layer.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
