"""What a checkpoint's `generation_config.json` says about sampling: the defaults of requests that say nothing themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gantline_runtime.checkpoint import LocalFiles
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json

__all__ = ["GenerationDefaults"]


@dataclass(frozen=True)
class GenerationDefaults:
    """Where the file says nothing, OpenAI's defaults. Its end-of-sequence tokens are the engine's business (`generation.py`).

    `do_sample: false` without a temperature means temperature 0, as it does to `transformers`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, model_dir: str | Path) -> GenerationDefaults:
        """Values that are missing, odd or out of range fall back to the default: a stray file must not keep a model from serving."""
        files = LocalFiles(model_dir)
        size = files.sizes.get("generation_config.json", 0)
        if not 0 < size <= MAX_JSON_BYTES:
            return cls()
        return cls.parse(load_json(files.read("generation_config.json", 0, size), "generation_config.json"))

    @classmethod
    def parse(cls, config: dict[str, Any]) -> GenerationDefaults:
        greedy = config.get("do_sample") is False
        return cls(
            temperature=_number(config.get("temperature"), 0.0, 2.0, 0.0 if greedy else cls.temperature),
            top_p=_number(config.get("top_p"), 1e-6, 1.0, cls.top_p),
            top_k=int(_number(config.get("top_k"), 0, 1 << 20, cls.top_k)),
            min_p=_number(config.get("min_p"), 0.0, 1.0, cls.min_p),
            repetition_penalty=_number(config.get("repetition_penalty"), 0.01, 10.0, cls.repetition_penalty),
        )


def _number(value: object, low: float, high: float, default: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
        return default
    return float(value)
