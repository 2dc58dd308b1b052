"""A model's files, read without torch and without trust: config.json, safetensors headers, the shard index.

    config.json ──> ModelShape ──> expected tensors ─┐
    *.safetensors headers ──> TensorInfo ────────────┴─> Checkpoint (facts, and where each tensor's bytes lie)

Used by `gantline inspect` (local folders and, through range requests, a hub), by the engine's loader and by the quantizer. Weights are
never read here, so a 70B checkpoint is judged in milliseconds; every length, offset, shape and name in the files is checked before use.
"""

from gantline_runtime.checkpoint.files import FileSource, LocalFiles
from gantline_runtime.checkpoint.headers import TensorInfo, parse_header
from gantline_runtime.checkpoint.reader import Checkpoint, describe_checkpoint, open_checkpoint, read_checkpoint
from gantline_runtime.checkpoint.shape import FAMILIES, AwqFormat, ModelShape, parse_shape
from gantline_runtime.checkpoint.tensors import expected_tensors, quantized_linears

__all__ = [
    "FAMILIES",
    "AwqFormat",
    "Checkpoint",
    "FileSource",
    "LocalFiles",
    "ModelShape",
    "TensorInfo",
    "describe_checkpoint",
    "expected_tensors",
    "open_checkpoint",
    "parse_header",
    "parse_shape",
    "quantized_linears",
    "read_checkpoint",
]
