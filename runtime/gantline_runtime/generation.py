"""What a checkpoint's files say about ending: the end-of-sequence tokens."""

from __future__ import annotations

import json
import re
from typing import Any

from gantline_runtime.checkpoint import Checkpoint, FileSource
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json
from gantline_runtime.errors import CheckpointError

__all__ = ["read_eos_token_ids"]

_HEAD_BYTES = 1 << 20
"""Of tokenizer.json, what is read for its special tokens. They stand before the vocabulary, and the largest public models' have 200 KB."""


def read_eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence tokens: generation_config.json's, else config.json's; and the tokenizer's own, which fine-tuning often changes alone.
    None is legal. Raises CheckpointError for anything odd."""
    value = _read(checkpoint.source, "generation_config.json").get("eos_token_id")
    if value is None:
        value = checkpoint.config.get("eos_token_id")
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_number(token) for token in ids) or len(ids) > 256:
        raise CheckpointError(
            f"eos_token_id is {str(value)[:64]!r}, expected a token number or a list of them", cure="Correct config.json."
        )
    every = dict.fromkeys([*ids, *_of_tokenizer(checkpoint.source)])
    return tuple(token for token in every if 0 <= token < checkpoint.shape.vocab_size)


def _of_tokenizer(files: FileSource) -> list[int]:
    """The number of the token that the tokenizer calls `eos_token`, or none."""
    config = _read(files, "tokenizer_config.json")
    token = config.get("eos_token") or _read(files, "special_tokens_map.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        entries = [{**entry, "id": int(id)} for id, entry in declared.items() if isinstance(entry, dict) and re.fullmatch("[0-9]{1,9}", id)]
    else:
        entries = _added_tokens(files)
    return [entry["id"] for entry in entries if isinstance(text, str) and entry.get("content") == text and _is_number(entry.get("id"))][:1]


def _added_tokens(files: FileSource) -> list[dict[str, Any]]:
    """`added_tokens` of tokenizer.json, whose tens of megabytes are not read for it; none where they do not stand at the beginning."""
    size = files.sizes.get("tokenizer.json", 0)
    head = files.read("tokenizer.json", 0, min(size, _HEAD_BYTES)).decode("utf-8", errors="replace") if size else ""
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', head)
    try:
        entries = json.JSONDecoder().raw_decode(head, found.end())[0] if found else []
    except (ValueError, RecursionError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def _read(files: FileSource, name: str) -> dict[str, Any]:
    size = files.sizes.get(name)
    if size is None:
        return {}
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} has {size} bytes; at most {MAX_JSON_BYTES} are read", cure="This is not a model's file.")
    return load_json(files.read(name, 0, size), name)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
