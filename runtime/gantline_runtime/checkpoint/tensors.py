"""The tensors that a checkpoint of the four families must hold, with their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.checkpoint.headers import TensorInfo
from gantline_runtime.checkpoint.shape import AwqFormat, ModelShape
from gantline_runtime.errors import CheckpointError
from gantline_runtime.termination import Reason

__all__ = ["LINEARS", "check_tensors", "expected_tensors", "is_converted", "quantized_linears"]

FLOAT_DTYPES = ("F32", "F16", "BF16")
_CURE = "config.json and weights do not belong together, or the checkpoint is incomplete: copy or download it again."
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Buffers that old versions of transformers saved, and that are computed from the configuration."""

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The matrices of one layer, by their names under `model.layers.<i>.`."""

Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""name -> (dtypes allowed, shape)"""


def linear_dimensions(shape: ModelShape, linear: str) -> tuple[int, int]:
    """(K inputs, N outputs) of one of `LINEARS`."""
    hidden, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, shape.intermediate_size),
        "up_proj": (hidden, shape.intermediate_size),
        "down_proj": (shape.intermediate_size, hidden),
    }[linear.rpartition(".")[2]]


def is_converted(awq: AwqFormat | None, module: str) -> bool:
    """Whether the matrix `module` (such as `model.layers.3.mlp.up_proj`) is stored quantized.

    A name in `modules_to_not_convert` spares every module whose path contains it, as transformers reads that list.
    """
    return awq is not None and not any(name in module for name in awq.modules_to_not_convert)


def quantized_linears(shape: ModelShape) -> Iterator[str]:
    """Full names of the matrices that the checkpoint stores in 4 bits."""
    for layer in range(shape.num_layers):
        for linear in LINEARS:
            if is_converted(shape.awq, f"model.layers.{layer}.{linear}"):
                yield f"model.layers.{layer}.{linear}"


def expected_tensors(shape: ModelShape) -> Expected:
    """Every tensor that must be there. Raises CheckpointError (InvalidQuantization) where a matrix cannot be cut into groups."""
    hidden = shape.hidden_size
    tensors: Expected = {
        "model.embed_tokens.weight": (FLOAT_DTYPES, (shape.vocab_size, hidden)),
        "model.norm.weight": (FLOAT_DTYPES, (hidden,)),
    }
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (FLOAT_DTYPES, (shape.vocab_size, hidden))
    for layer in range(shape.num_layers):
        tensors.update(_layer_tensors(shape, f"model.layers.{layer}."))
    return tensors


def _layer_tensors(shape: ModelShape, prefix: str) -> Expected:
    tensors: Expected = {
        f"{prefix}input_layernorm.weight": (FLOAT_DTYPES, (shape.hidden_size,)),
        f"{prefix}post_attention_layernorm.weight": (FLOAT_DTYPES, (shape.hidden_size,)),
    }
    if shape.qk_norm:
        tensors |= {f"{prefix}self_attn.{name}_norm.weight": (FLOAT_DTYPES, (shape.head_dim,)) for name in "qk"}
    for linear in LINEARS:
        inputs, outputs = linear_dimensions(shape, linear)
        if has_bias(shape, linear):
            tensors[f"{prefix}{linear}.bias"] = (FLOAT_DTYPES, (outputs,))
        if shape.awq is not None and is_converted(shape.awq, prefix + linear):
            tensors |= _awq_tensors(prefix + linear, inputs, outputs, shape.awq)
        else:
            tensors[f"{prefix}{linear}.weight"] = (FLOAT_DTYPES, (outputs, inputs))
    return tensors


def has_bias(shape: ModelShape, linear: str) -> bool:
    if linear.startswith("mlp."):
        return shape.mlp_bias
    return shape.o_bias if linear.endswith("o_proj") else shape.qkv_bias


def _awq_tensors(module: str, inputs: int, outputs: int, awq: AwqFormat) -> Expected:
    packed = 32 // awq.bits
    if inputs % awq.group_size or outputs % packed:
        raise CheckpointError(
            f"{quote(module)} has {inputs} inputs and {outputs} outputs: no multiples of group_size {awq.group_size} and of {packed}",
            reason=Reason.INVALID_QUANTIZATION,
            cure="Quantize with a group size that divides every matrix's inputs.",
        )
    groups = inputs // awq.group_size
    return {
        f"{module}.qweight": (("I32",), (inputs, outputs // packed)),
        f"{module}.qzeros": (("I32",), (groups, outputs // packed)),
        f"{module}.scales": (("F16", "BF16", "F32"), (groups, outputs)),
    }


def check_tensors(shape: ModelShape, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Compare what is there with what `shape` needs; returns the names that are not used, none of which changes results.

    Raises CheckpointError that names the first tensor that is missing, of another shape or type, or that config.json does not know of.
    """
    expected = expected_tensors(shape)
    for name, (dtypes, dimensions) in expected.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(f"the tensor {quote(name)} is missing", cure=_CURE)
        if found.shape != dimensions:
            raise CheckpointError(
                f"the tensor {quote(name)} in {quote(found.file)} has shape {list(found.shape)}; config.json makes it {list(dimensions)}",
                cure=_CURE,
            )
        if found.dtype not in dtypes:
            raise CheckpointError(
                f"the tensor {quote(name)} in {quote(found.file)} is of type {found.dtype}; expected {' or '.join(dtypes)}", cure=_CURE
            )
    unused = tuple(sorted(set(tensors) - set(expected)))
    for name in unused:
        _check_unused(name, shape)
    return unused


def _check_unused(name: str, shape: ModelShape) -> None:
    """A matrix, bias or norm of a layer that config.json does not know of would be dropped silently, and change the answers."""
    if _IGNORED.fullmatch(name) or (name == "lm_head.weight" and shape.tie_word_embeddings):
        return
    if _LAYER.fullmatch(name) or name.startswith(("lm_head.", "model.embed_tokens.", "model.norm.")):
        raise CheckpointError(f"the tensor {quote(name)} is there, but config.json describes no such tensor", cure=_CURE)
