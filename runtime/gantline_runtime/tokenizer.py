"""A checkpoint's tokenizer: text to token ids and back, special tokens, and the source of its chat template.

Reads `tokenizer.json` with the `tokenizers` library alone. `transformers` would import torch: ten seconds and half a gigabyte in a
process that needs neither. Only a checkpoint without `tokenizer.json` is converted by `transformers`. Encoding and decoding are safe from
several threads at once, and let other threads run meanwhile: the library holds Python's lock except in its functions for batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from gantline_runtime.checkpoint import LocalFiles
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json, not_a_model, refuse_pointer
from gantline_runtime.errors import CheckpointError

__all__ = ["Tokenizer"]

MAX_TOKENIZER_BYTES = 256 << 20
"""Largest tokenizer.json that is read; those of the largest vocabularies (256k) have about 35 MB."""

_OLDER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """`special_ids` are skipped in answers unless a client asks for them; `special_tokens` maps names such as `bos_token` to text."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str] | None = None, chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters (at most) that one token stands for."""
        self._spells_bytes = "ByteLevel" in repr(backend.decoder)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Raises CheckpointError where the folder has no tokenizer, or a broken one."""
        files = LocalFiles(model_dir)
        config = _read_json(files, "tokenizer_config.json")
        special = {**_named(_read_json(files, "special_tokens_map.json")), **_named(config)}
        return cls(_load_backend(files), special_tokens=special, chat_template=_chat_template(files, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, those that the tokenizer puts around a text (often one at its beginning)."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # `encode` keeps other threads waiting
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip: Iterable[int] = ()) -> str:
        """The text of `ids`, without the tokens in `skip`. Ids outside of the vocabulary give no text."""
        omitted = frozenset(skip)
        kept = [i for i in ids if i not in omitted] if omitted else list(ids)
        (text,) = self._backend.decode_batch([kept], skip_special_tokens=False)  # as above
        return str(text)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _token_text(self, id: int) -> str:
        """What one token reads like on its own; U+FFFD for parts of characters."""
        return self._token_bytes(id).decode("utf-8", errors="replace")

    def _token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; empty outside of the vocabulary."""
        token: str | None = self._backend.id_to_token(id)
        if token is None:
            return b""
        if id in self._added_ids:
            return token.encode()
        if self._spells_bytes:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _load_backend(files: LocalFiles) -> tokenizers.Tokenizer:
    size = files.sizes.get("tokenizer.json")
    if size is None:
        if "config.json" not in files.sizes:
            raise not_a_model(files, "config.json")
        return _convert(files.root)
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"tokenizer.json has {size} bytes, more than {MAX_TOKENIZER_BYTES}", cure="Use the model's original tokenizer."
        )
    data = files.read("tokenizer.json", 0, size)
    refuse_pointer(data, "tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:  # the library raises bare Exception, and PanicException (a BaseException) for some broken files
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"tokenizer.json cannot be used: {str(error)[:200]}", cure="Copy or download the file again.") from None


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint that has only older files (tokenizer.model, vocab.json), converted by `transformers`."""
    found = [name for name in _OLDER_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and no other tokenizer that can be converted to one",
            cure="Copy the tokenizer's files beside the weights.",
        )
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return converted.backend_tokenizer
    except Exception as error:  # any of a dozen libraries may raise here, each in its own way
        cause = str(error).split("\n")[0][:120]
        absent = " and ".join(name for name in ("sentencepiece", "tiktoken") if find_spec(name) is None)
        cure = "Save it where that works: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and {found[0]} cannot be converted to one: {cause}",
            cure=f"{cure}, or install {absent}." if absent else f"{cure}.",
        ) from error


def _read_json(files: LocalFiles, name: str) -> dict[str, Any]:
    size = files.sizes.get(name)
    if size is None:
        return {}
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} has {size} bytes, more than {MAX_JSON_BYTES}", cure="Use the model's original file.")
    return load_json(files.read(name, 0, size), name)


def _named(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; a value is the text itself or an object that holds it."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(files: LocalFiles, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the field of tokenizer_config.json, of which the one named `default` counts if there are several."""
    size = files.sizes.get("chat_template.jinja")
    if size is not None:
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"chat_template.jinja has {size} bytes, more than {MAX_JSON_BYTES}", cure="Use the model's original file."
            )
        return files.read("chat_template.jinja", 0, size).decode("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template if isinstance(item, dict) and {"name", "template"} <= item.keys()}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _bytes_of_characters() -> dict[str, bytes]:
    """The inverse of the byte-level alphabet of GPT-2's tokenizer: printable Latin-1 stands for itself, the rest begins at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update({chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)})
    return table


_BYTE_OF = _bytes_of_characters()
