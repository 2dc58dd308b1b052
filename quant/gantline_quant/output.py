"""The files of a quantized checkpoint: written one by one and durably, joined or indexed at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gantline_runtime.artefact import sync
from gantline_runtime.checkpoint import Checkpoint, LocalFiles
from gantline_runtime.checkpoint.files import load_json
from gantline_runtime.checkpoint.reader import INDEX, SINGLE
from gantline_runtime.errors import CheckpointError, QuantizationError
from gantline_runtime.shared_files import open_up
from torch import Tensor

from gantline_quant.layers import read_tensor

__all__ = ["MERGE_BYTES", "assemble", "layer_file", "load_tokenizer", "read_embedding", "read_file", "to_half", "write_file", "write_rest"]

MERGE_BYTES = 1 << 30
"""Checkpoints up to this size become one file; larger ones keep a file a layer and get an index."""
_REST = "layer-rest.safetensors"
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_BESIDE_BYTES = 64 << 20


def layer_file(index: int) -> str:
    return f"layer-{index:05}.safetensors"


def load_tokenizer(source: Path) -> Any:
    """The checkpoint's tokenizer; code that a repository brings along is never run. Raises CheckpointError."""
    from transformers import AutoTokenizer

    if not any((source / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{source} has no tokenizer", cure="Add tokenizer.json; calibration needs tokens.")
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        raise CheckpointError(
            f"the tokenizer in {source} cannot be loaded ({cause})", cure="Add tokenizer.json; calibration needs tokens."
        ) from error


def read_embedding(checkpoint: Checkpoint) -> Tensor:
    return read_tensor(checkpoint, "model.embed_tokens.weight")


def to_half(name: str, tensor: Tensor) -> Tensor:
    """float16, as readers of AWQ checkpoints expect it. Raises QuantizationError where a value does not fit."""
    half = tensor.to(torch.float16).cpu().contiguous()
    if not torch.isfinite(half).all():
        raise QuantizationError(f"the tensor {name!r} has values past float16's range", cure="This model cannot be quantized with AWQ.")
    return half


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` so that the file is whole and on the disk once it has its name."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
    except Exception as error:  # the library wraps the system's error in its own
        temporary.unlink(missing_ok=True)
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(28, "No space left on device", str(path)) from error
        raise
    open_up(temporary)  # the library makes it its user's alone
    sync(temporary)
    temporary.rename(path)


def read_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def write_rest(folder: Path, checkpoint: Checkpoint) -> None:
    """Embedding, last norm and head, which stay unquantized."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not checkpoint.shape.tie_word_embeddings:
        names.append("lm_head.weight")
    write_file(folder / _REST, {name: to_half(name, read_tensor(checkpoint, name)) for name in names})


def assemble(folder: Path, checkpoint: Checkpoint, group_size: int) -> None:
    """Give the weights their public names, and put configuration and tokenizer beside them."""
    for stray in folder.glob("*.tmp"):
        stray.unlink()
    parts = sorted(folder.glob("layer-*.safetensors"))
    if sum(os.path.getsize(part) for part in parts) <= MERGE_BYTES:
        write_file(folder / SINGLE, {name: tensor for part in parts for name, tensor in read_file(part).items()})
        for part in parts:
            part.unlink()
    else:
        _index(folder, parts)
    _write_config(folder, checkpoint, group_size)
    assert isinstance(checkpoint.source, LocalFiles)
    for name in _BESIDE:
        if checkpoint.source.sizes.get(name, _MAX_BESIDE_BYTES + 1) <= _MAX_BESIDE_BYTES:
            shutil.copyfile(checkpoint.source.path(name), folder / name)


def _index(folder: Path, parts: list[Path]) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        named = part.rename(folder / f"model-{number:05}-of-{len(parts):05}.safetensors")
        for name, tensor in read_file(named).items():
            places[name] = named.name
            total += tensor.nbytes
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1), encoding="utf-8")


def _write_config(folder: Path, checkpoint: Checkpoint, group_size: int) -> None:
    config = dict(load_json(json.dumps(dict(checkpoint.config)).encode(), "config.json"))
    config |= {"dtype": "float16", "torch_dtype": "float16"}
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
