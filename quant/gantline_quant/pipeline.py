"""From a checkpoint to a quantized one, layer by layer, resumable, judged, and published whole or not at all.

    calibration windows ──embed──> layer 0 ──> layer 1 ──> ... (the original weights, as AWQ's authors do it)
    held-out windows ────embed──> the same twice: through the original and through the quantized layers, for perplexity before and after

    DST.partial/layer-00007.safetensors   one file for each layer done; a killed run goes on behind the last
    DST.partial/state.json                the inputs they were made of; other inputs start afresh

Memory: one layer in float32, its statistics, and the windows' activations.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from gantline_runtime.artefact import Manifest, Recipe, Staging, find_artefact, require_space
from gantline_runtime.checkpoint import FAMILIES, Checkpoint, expected_tensors, open_checkpoint
from gantline_runtime.checkpoint.shape import AwqFormat
from gantline_runtime.checkpoint.tensors import LINEARS
from gantline_runtime.errors import CheckpointError, QuantizationError
from gantline_runtime.progress import Progress
from gantline_runtime.sizing import awq_weight_bytes
from gantline_runtime.termination import Reason
from torch import Tensor, nn

from gantline_quant import awq, output
from gantline_quant.calibration import SHIPPED, CalibrationText, Windows, cut_windows, read_text
from gantline_quant.layers import LayerStream
from gantline_quant.packing import pack, unpack
from gantline_quant.rtn import quantize
from gantline_quant.statistics import Watcher

__all__ = ["ALGORITHM_VERSION", "Perplexity", "QuantizeOptions", "quantize_checkpoint"]

ALGORITHM_VERSION = 1
_BESIDE_BYTES = 64 << 20  # tokenizer and configuration files

log = logging.getLogger("gantline.quantize")


@dataclass(frozen=True)
class QuantizeOptions:
    method: Literal["awq", "rtn"] = "awq"
    """rtn, round to nearest, is the baseline that awq is measured against."""
    group_size: int = 128
    calibration: str = SHIPPED
    """A text file, or `shipped`."""
    samples: int = 32
    """Windows to calibrate with."""
    sequence_length: int = 512
    """Tokens of a window."""
    search_windows: int = 2
    """Windows on which the scales' error is measured; clipping uses all."""
    max_perplexity_increase: float | None = None
    """Largest relative increase allowed: 0.05 lets perplexity grow by 5 %."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a held-out token."""

    before: float
    after: float


def quantize_checkpoint(source: Path, target: Path, options: QuantizeOptions, *, device: torch.device, bar: bool | None = None) -> Manifest:
    """Write the 4-bit copy of `source` to `target`, and return its manifest; nothing is done where it is there already.

    Raises QuantizationError (QuantizationFailed, QualityGateFailed), CheckpointError, CapacityError, ConfigurationError.
    """
    checkpoint = _open_source(source, options)
    text = read_text(options.calibration)
    inputs = _inputs(checkpoint, options, text)
    done = find_artefact(target, options.method, ALGORITHM_VERSION, inputs)
    if done is not None:
        _check_gate(_measured(done), options)
        return done
    windows = cut_windows(
        output.load_tokenizer(source),
        text.text,
        samples=options.samples,
        length=min(options.sequence_length, checkpoint.shape.max_position_embeddings),
        vocab_size=checkpoint.shape.vocab_size,
    )
    with Staging(target, Recipe(options.method, ALGORITHM_VERSION, inputs)) as staging:
        if staging.done is not None:  # another process has made it meanwhile
            _check_gate(_measured(staging.done), options)
            return staging.done
        _prepare(staging, checkpoint, options, inputs)
        with torch.inference_mode(), Progress(log, checkpoint.shape.num_layers, bar=bar, layers=checkpoint.shape.num_layers) as progress:
            perplexity = _Run(checkpoint, staging.folder, options, windows, device, progress).execute()
        _check_gate(perplexity, options, staging)
        output.assemble(staging.folder, checkpoint, options.group_size)
        (staging.folder / "state.json").unlink()
        manifest = _describe(staging.folder, checkpoint, options, inputs, perplexity)
        return staging.publish(manifest)


def _measured(manifest: Manifest) -> Perplexity:
    return Perplexity(**(manifest.perplexity or {"before": math.nan, "after": math.nan}))


def _open_source(source: Path, options: QuantizeOptions) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if checkpoint.shape.awq is not None:
        raise CheckpointError(
            f"{source} is quantized already",
            reason=Reason.INVALID_QUANTIZATION,
            cure="Give the checkpoint it was made of, or serve it as it is.",
        )
    if checkpoint.shape.family == "transformers":
        raise CheckpointError(
            f"this {checkpoint.shape.architecture} cannot be quantized: {checkpoint.shape.fallback_reason}, and transformers' has no AWQ",
            reason=Reason.UNSUPPORTED_ARCHITECTURE,
            cure=f"Serve it as it is, or quantize a model of {', '.join(FAMILIES)}.",
        )
    expected_tensors(replace(checkpoint.shape, awq=AwqFormat(options.group_size)))  # raises where a matrix cannot be cut into groups
    return checkpoint


def _inputs(checkpoint: Checkpoint, options: QuantizeOptions, text: CalibrationText) -> dict[str, Any]:
    """Everything that the artefact depends on; the gate only decides whether it is published."""
    settings = asdict(options)
    del settings["max_perplexity_increase"], settings["calibration"], settings["method"]
    return {"source": checkpoint.facts.fingerprint, "calibration": text.digest, **settings}


def _prepare(staging: Staging, checkpoint: Checkpoint, options: QuantizeOptions, inputs: Mapping[str, Any]) -> None:
    """Check the disk, and drop what another run left behind unless it was making the same thing."""
    state = {"kind": options.method, "algorithm_version": ALGORITHM_VERSION, "inputs": dict(inputs)}
    path = staging.folder / "state.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != state:
        staging.clear()
        path.write_text(json.dumps(state), encoding="utf-8")
    weights = awq_weight_bytes(checkpoint.facts, group_size=options.group_size)
    copies = 2 if weights <= output.MERGE_BYTES else 1  # layers are joined into one file at the end
    present = sum(file.stat().st_size for file in staging.folder.glob("*.safetensors"))
    require_space(staging.folder, weights * copies + _BESIDE_BYTES, present=present)


class _Run:
    """The pass over all layers."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, options: QuantizeOptions, windows: Windows, device: torch.device, progress: Progress
    ) -> None:
        self._checkpoint, self._folder, self._options, self._windows, self._progress = checkpoint, folder, options, windows, progress
        self._stream = LayerStream(checkpoint, device)

    def execute(self) -> Perplexity:
        table = output.read_embedding(self._checkpoint)
        calibration = self._stream.embed(self._windows.calibration, table)
        before = self._stream.embed(self._windows.held_out, table)
        after = self._stream.embed(self._windows.held_out, output.to_half("model.embed_tokens.weight", table))
        del table
        for index in range(self._checkpoint.shape.num_layers):
            layer = self._stream.load(index)
            before = torch.cat(list(self._stream.run(layer, index, before)))
            calibration = self._quantize_layer(layer, index, calibration)
            after = torch.cat(list(self._stream.run(layer, index, after)))
        self._progress.show("measuring perplexity", self._checkpoint.shape.num_layers)
        output.write_rest(self._folder, self._checkpoint)
        return Perplexity(self._perplexity(before, torch.float32), self._perplexity(after, torch.float16))

    def _perplexity(self, hidden: Tensor, dtype: torch.dtype) -> float:
        return math.exp(min(700.0, -self._stream.log_likelihoods(hidden, self._windows.held_out, dtype=dtype).mean().item()))

    def _quantize_layer(self, layer: nn.Module, index: int, calibration: Tensor) -> Tensor:
        """Quantize `layer` in place and write it; returns the original layer's outputs for the calibration windows."""
        path = self._folder / output.layer_file(index)
        if path.exists():  # an earlier run came this far
            outputs = torch.cat(list(self._stream.run(layer, index, calibration)))
            _fill(layer, output.read_file(path), f"model.layers.{index}.")
            self._progress.skip(index + 1)
            return outputs
        report: Callable[[str, float], None] = lambda what, part: self._progress.show(
            f"layer {index + 1} of {self._checkpoint.shape.num_layers}: {what}", index + part
        )
        report("activations", 0.0)
        group_size = self._options.group_size
        with Watcher(layer, group_size=group_size, samples=self._options.search_windows) as watcher:
            outputs = torch.cat(list(self._stream.run(layer, index, calibration)))
        if self._options.method == "awq":
            report("scales", 0.25)
            context = self._stream.context(index, calibration.shape[1])
            scales = awq.search_scales(layer, watcher.statistics, context, group_size)
            awq.apply_scales(layer, scales)
            report("clipping", 0.8)
            awq.clip_weights(layer, watcher.statistics, scales, group_size)
        report("packing", 0.95)
        tensors = _pack_layer(layer, f"model.layers.{index}.", group_size)
        output.write_file(path, tensors)
        _fill(layer, tensors, f"model.layers.{index}.")
        return outputs


def _pack_layer(layer: nn.Module, prefix: str, group_size: int) -> dict[str, Tensor]:
    """The layer's tensors as the checkpoint will hold them."""
    tensors: dict[str, Tensor] = {}
    for name, weight in layer.named_parameters():
        module = name.removesuffix(".weight")
        if module in LINEARS and name.endswith(".weight"):
            packed = pack(quantize(weight.cpu(), group_size))
            tensors |= {f"{prefix}{module}.{part}": tensor for part, tensor in packed.items()}
        else:
            tensors[prefix + name] = output.to_half(prefix + name, weight)
    return tensors


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give `layer` the weights that a reader of `tensors` gets, in float32."""
    for name, weight in layer.named_parameters():
        module = prefix + name.removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            stored = unpack(*(tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))).dequantize()
        else:
            stored = tensors[prefix + name].float()
        weight.copy_(stored)


def _check_gate(perplexity: Perplexity, options: QuantizeOptions, staging: Staging | None = None) -> None:
    """Raise QuantizationError where the copy is broken, or worse than allowed; what was made is removed then."""
    text = f"held-out perplexity {perplexity.before:.3f} before, {perplexity.after:.3f} after"
    limit = options.max_perplexity_increase
    if math.isfinite(perplexity.before + perplexity.after) and (limit is None or perplexity.after <= perplexity.before * (1 + limit)):
        log.info(text)
        return
    if staging is not None:
        staging.discard()
    if limit is None or not math.isfinite(perplexity.before + perplexity.after):
        raise QuantizationError(
            f"the quantized model gives no finite perplexity ({text})", cure="Report the model; its original can be served."
        )
    raise QuantizationError(
        f"the quantized model is worse than allowed: {text}, and {limit:.1%} more was allowed",
        reason=Reason.QUALITY_GATE_FAILED,
        cure="Allow more (maxPerplexityIncrease), use smaller groups (groupSize), or serve the original.",
    )


def _describe(
    folder: Path, checkpoint: Checkpoint, options: QuantizeOptions, inputs: Mapping[str, Any], perplexity: Perplexity
) -> Manifest:
    """The manifest of the finished folder, which is read back as any other checkpoint."""
    facts = replace(open_checkpoint(folder).facts, name=checkpoint.facts.name, revision=checkpoint.facts.revision)
    size = sum(os.path.getsize(path) for path in folder.iterdir() if path.is_file())
    return Manifest(options.method, ALGORITHM_VERSION, dict(inputs), size, facts.to_json(), asdict(perplexity))
