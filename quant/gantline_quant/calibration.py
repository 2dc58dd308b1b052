"""The text that activations are measured on: windows of tokens to calibrate with, and others, held out, to judge the result by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from gantline_runtime.errors import ConfigurationError, QuantizationError
from torch import Tensor

__all__ = ["SHIPPED", "CalibrationText", "Windows", "cut_windows", "read_text"]

SHIPPED = "shipped"
_MAX_BYTES = 64 << 20
_HELD_OUT_SHARE = 0.2
_MOST_HELD_OUT = 16


@dataclass(frozen=True)
class CalibrationText:
    text: str
    digest: str
    """sha256 of the text."""


@dataclass(frozen=True)
class Windows:
    """int64 token ids, [windows, tokens each]."""

    calibration: Tensor
    held_out: Tensor


def read_text(source: str) -> CalibrationText:
    """The text of the file `source`, or the one that comes with Gantline. Raises ConfigurationError."""
    if source == SHIPPED:
        data = (resources.files("gantline_quant") / "data" / "calibration.txt").read_bytes()
    else:
        data = _read_file(Path(source))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the calibration text {source} is not UTF-8: {error.reason}", cure="Give a plain text file.") from None
    return CalibrationText(text, hashlib.sha256(data).hexdigest())


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ConfigurationError(
                f"the calibration text {path} is no file of at most {_MAX_BYTES >> 20} MiB", cure="Give a plain text file, or 'shipped'."
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the calibration text {path} cannot be read: {error.strerror}", cure="Check path and rights.") from None


def cut_windows(tokenizer: Any, text: str, *, samples: int, length: int, vocab_size: int) -> Windows:
    """Up to `samples` windows of `length` tokens from the text's beginning, and up to 16 held-out ones from its last fifth.

    Each begins as the tokenizer begins a text (with BOS, where it has one). Raises QuantizationError where the text is too short.
    """
    prefix = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # or it warns of texts that are longer than a window
    body = length - len(prefix)
    count = len(ids) // body
    held_out = min(_MOST_HELD_OUT, max(1, int(count * _HELD_OUT_SHARE)))
    if count < 2:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens; at least {2 * body} are needed", cure="Give a longer text or shorter sequences."
        )
    if max(ids) >= vocab_size:
        raise QuantizationError(
            f"the tokenizer makes token {max(ids)}, but the model knows {vocab_size}", cure="Give the tokenizer that belongs to the model."
        )
    windows = torch.tensor([prefix + ids[start : start + body] for start in range(0, count * body, body)], dtype=torch.int64)
    return Windows(windows[: min(samples, count - held_out)], windows[count - held_out :])
