"""Small checkpoints of all four families with a tokenizer of bytes, so that calibration has something to read."""

from __future__ import annotations

from pathlib import Path

from tests.runtime.checkpoints import CONFIGURATIONS, write_checkpoint

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"
CONFIGURATION_NAMES = tuple(CONFIGURATIONS)


def write_model(name: str, folder: Path) -> Path:
    """The configuration `name` of tests/runtime/checkpoints.py, random weights, and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_checkpoint(name, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
