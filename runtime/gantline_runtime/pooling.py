"""How a checkpoint's embeddings are pooled, as Sentence Transformers writes it: `1_Pooling/config.json` beside the weights."""

from __future__ import annotations

from pathlib import Path

from gantline_runtime.checkpoint import LocalFiles
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json
from gantline_runtime.messages import Pooling

__all__ = ["load_pooling"]

_FOLDER, _FILE = "1_Pooling", "config.json"


def load_pooling(model_dir: str | Path) -> Pooling:
    """The mean where the checkpoint says so, else the last token, whose state alone has seen the whole text. Raises CheckpointError for a
    broken file."""
    folder = Path(model_dir) / _FOLDER
    if not folder.is_dir():
        return "last"
    files = LocalFiles(folder)
    size = files.sizes.get(_FILE, 0)
    if not 0 < size <= MAX_JSON_BYTES:
        return "last"
    config = load_json(files.read(_FILE, 0, size), f"{_FOLDER}/{_FILE}")
    return "mean" if config.get("pooling_mode_mean_tokens") is True else "last"
