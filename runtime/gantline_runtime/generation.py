"""What a checkpoint's generation_config.json says about ending: the end-of-sequence tokens."""

from __future__ import annotations

from typing import Any

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json
from gantline_runtime.errors import CheckpointError

__all__ = ["read_eos_token_ids"]

_FILE = "generation_config.json"


def read_eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence tokens: generation_config.json's, else config.json's; none is legal. Raises CheckpointError for anything odd."""
    value = _from_generation_config(checkpoint)
    if value is None:
        value = checkpoint.config.get("eos_token_id")
    if value is None:
        return ()
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids) or len(ids) > 256:
        raise CheckpointError(
            f"eos_token_id is {str(value)[:64]!r}, expected a token number or a list of them", cure="Correct config.json."
        )
    return tuple(token for token in ids if 0 <= token < checkpoint.shape.vocab_size)


def _from_generation_config(checkpoint: Checkpoint) -> object:
    size = checkpoint.source.sizes.get(_FILE)
    if size is None:
        return None
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{_FILE} has {size} bytes; at most {MAX_JSON_BYTES} are read", cure="This is not a model's file.")
    return load_json(checkpoint.source.read(_FILE, 0, size), _FILE).get("eos_token_id")
