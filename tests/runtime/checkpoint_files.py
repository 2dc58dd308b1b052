"""Checkpoints made byte by byte, without torch: what a sound one looks like, and any way to break it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gantline_runtime.checkpoint import expected_tensors, parse_shape
from gantline_runtime.checkpoint.headers import DTYPE_BITS

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 11540992\n"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def build_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Any], int]:
    """(header, bytes of data) for name -> (dtype, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return header, position


def encode(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensors_of(config: dict[str, Any], dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor that `config` needs."""
    wanted = expected_tensors(parse_shape(config))
    return {
        name: ("I32" if dtypes == ("I32",) else "F16" if name.endswith(".scales") else dtype, shape)
        for name, (dtypes, shape) in wanted.items()
    }


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int = 1) -> bytes:
    header, size = build_header(tensors)
    pattern = bytes((seed * (i + 1) * 7) % 61 for i in range(61))
    return encode(header, (pattern * (size // 61 + 1))[:size])


def model_files(changes: dict[str, Any] | None = None, seed: int = 1) -> dict[str, bytes]:
    """A whole small checkpoint: file name -> content."""
    config = {**CONFIG, **(changes or {})}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors_of(config), seed)}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
