"""A tokenizer of the size that real models have, trained here: `python -m benchmarks.trained_tokenizer FILE [--megabytes 120]`.

Byte-level BPE of 128,000 merges and bytes plus 256 special tokens, as Llama 3 has, from the text that every environment holds: the sources
and documents of Python and its installed packages. Training takes a minute or two and 4 GB. A checkpoint with it
(`make_checkpoint --tokenizer FILE`) makes the server's work on text real: long merges to find, pieces of characters, prompts of text.
"""

from __future__ import annotations

import argparse
import os
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

__all__ = ["LLAMA_3_SPECIAL", "VOCABULARY", "TextPrompts", "train"]

VOCABULARY = 128_000
LLAMA_3_SPECIAL = 256
_ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".json")
_LARGEST_FILE = 400_000
"""Bytes; larger ones are tables and generated code."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(limit_bytes: int, vocabulary: int = VOCABULARY, special: int = LLAMA_3_SPECIAL) -> tokenizers.Tokenizer:
    """A tokenizer of exactly `vocabulary + special` tokens. Raises ValueError where `limit_bytes` of text hold too few merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=bytes_, max_token_length=24, show_progress=False)
    tokenizer.train_from_iterator(_texts(limit_bytes), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        got = tokenizer.get_vocab_size()
        raise ValueError(f"{limit_bytes >> 20} MiB of text gave {got} tokens of {vocabulary}; allow more text (--megabytes)")
    tokenizer.add_special_tokens([tokenizers.AddedToken(f"<|special_{i}|>", special=True, normalized=False) for i in range(special)])
    return tokenizer


class TextPrompts:
    """Prompts of text for the tokenizer in `file`, cut from anywhere in `limit_bytes` of it."""

    def __init__(self, file: Path, limit_bytes: int = 2 << 20) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        encodings = self._tokenizer.encode_batch(list(_texts(limit_bytes)), add_special_tokens=False)
        self._ids = [i for encoding in encodings for i in encoding.ids]

    def cut(self, lengths: Sequence[int], seed: int = 0) -> list[str]:
        """Texts of `lengths` tokens each: a few more or less, where a cut falls into a character or a word."""
        rng = random.Random(seed)
        starts = [rng.randrange(len(self._ids) - length) for length in lengths]
        return [self._tokenizer.decode(self._ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def _texts(limit_bytes: int) -> Iterator[str]:
    paths = sysconfig.get_paths()
    for root in dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"]]):
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if not name.endswith(_ENDINGS) or not 0 < path.stat().st_size < _LARGEST_FILE:
                    continue
                text = path.read_text(errors="ignore")
                yield text
                limit_bytes -= len(text)
                if limit_bytes <= 0:
                    return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=int, default=120, help="text to train on, at most")
    options = parser.parse_args()
    started = time.monotonic()
    tokenizer = train(options.megabytes << 20)
    tokenizer.save(str(options.file))
    print(f"{tokenizer.get_vocab_size()} tokens into {options.file}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
