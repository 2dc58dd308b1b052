"""What a prompt begins with, as a few hashes that need no tokenizer: how a gateway and a server speak of the same beginnings.

    a request's body ──> the text that its prompt is made of ──> cut at fixed places ──> for each cut a hash of all that is before it

Prompts that begin alike share the hashes of all cuts in what they have in common. Cuts lie 256 bytes apart at first (about a block of 64
tokens), then each an eighth further than the one before, so that 64 of them reach a megabyte, and what two prompts share is never
underestimated by more than an eighth. A server relates cuts to cached blocks once it has tokenized the prompt, by proportion
(`PromptPrefixes.marks`): close enough for what is a hint.

Hashes are the same everywhere, so that a gateway makes one for all replicas. They tell no text, but who knows a text can find out whether
it is among them; docs/server.md says who may read them. They have 53 bits, which any JSON number holds. Imports no torch.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

__all__ = ["CUTS", "MOST_TOLD", "NO_PREFIXES", "SCHEME", "CachedPrefixes", "PromptPrefixes", "first_prefixes", "read_prefixes"]

SCHEME = 1
"""Another number wherever equal bodies would get other hashes: who publishes with another one is not understood."""

MOST_TOLD = 1 << 16
"""Hashes that a server tells of at once: a megabyte of them."""

_MOST_MESSAGES = 4096
"""As many as an endpoint takes."""
_NUM_CUTS = 64
_FIRST_CUTS_BYTES = 256
_HASH_BITS = 53


def _cuts() -> Iterator[int]:
    place = 0
    for _ in range(_NUM_CUTS):
        place += max(_FIRST_CUTS_BYTES, place // 8)
        yield place


CUTS = tuple(_cuts())
"""Bytes before each cut."""


@dataclass(frozen=True)
class PromptPrefixes:
    """`hashes[i]` is of the first `CUTS[i]` of the `num_bytes` bytes of a prompt."""

    hashes: tuple[int, ...] = ()
    num_bytes: int = 0

    def marks(self, num_tokens: int) -> list[tuple[int, int]]:
        """(tokens before it, hash) of each cut, in a prompt of `num_tokens` tokens, which are taken to be of one length."""
        return [(cut * num_tokens // self.num_bytes, name) for cut, name in zip(CUTS, self.hashes, strict=False)]


NO_PREFIXES = PromptPrefixes()


class CachedPrefixes(msgspec.Struct, frozen=True):
    """What a server answers to GET /internal/prefixes: hashes whose tokens are cached, or what changed since an earlier answer."""

    scheme: int
    cursor: str
    """To be given back as `since`."""
    whole: bool
    """`added` is all that there is."""
    added: list[int]
    removed: list[int]


class _Body(msgspec.Struct):
    """What prompts are made of; the rest of a body is passed over."""

    messages: Any = None
    tools: Any = None
    prompt: Any = None
    input_ids: Any = None
    input: Any = None
    instructions: Any = None


_decoder = msgspec.json.Decoder(_Body)


def first_prefixes(body: bytes) -> PromptPrefixes:
    """Those of the first prompt of a request's body; none where it has no prompt."""
    return next(read_prefixes(body), NO_PREFIXES)


def read_prefixes(body: bytes) -> Iterator[PromptPrefixes]:
    """Those of each prompt of a request's body: of chat, text completions, responses or generate. A body that no endpoint would take has
    none, or some that mean nothing."""
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    prompts = next((given for given in (fields.prompt, fields.input_ids, fields.input) if given is not None), None)
    if any(
        isinstance(given, list) and len(given) > _MOST_MESSAGES and isinstance(given[0], Mapping) for given in (fields.messages, prompts)
    ):
        return
    if isinstance(fields.messages, list):
        yield _hashed(_conversation(fields.tools, fields.messages))
    elif isinstance(prompts, list) and prompts and isinstance(prompts[0], Mapping):
        yield _hashed(_conversation(fields.tools, [fields.instructions, *prompts]))
    elif isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list)):
        yield from (_hashed(_plain(prompt)) for prompt in prompts)
    elif isinstance(prompts, (str, list)):
        yield _hashed([*_texts(fields.instructions), *_plain(prompts)])


def _conversation(tools: Any, messages: Iterable[Any]) -> Iterator[bytes]:
    """In the order in which templates use to write them: tools first."""
    if tools:
        yield _coded(tools)
    for message in messages:
        if isinstance(message, Mapping):
            yield from _texts(message.get("role"))
            yield from _texts(message.get("content"))
            others = {name: value for name, value in message.items() if name not in ("role", "content") and value}
            if others:
                yield _coded(others)
        else:
            yield from _texts(message)


def _texts(content: Any) -> Iterator[bytes]:
    """A text, or the texts of a content's parts."""
    if isinstance(content, str):
        yield content.encode("utf-8", "surrogatepass")
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            yield from _texts(text if isinstance(text, str) else None)


def _plain(prompt: Any) -> Iterator[bytes]:
    """A prompt that no template changes: a text, or tokens, four bytes each."""
    if isinstance(prompt, str):
        yield prompt.encode("utf-8", "surrogatepass")
    elif isinstance(prompt, list):
        with contextlib.suppress(struct.error):  # no endpoint takes what is not a token's number
            yield struct.pack(f"<{len(prompt)}I", *prompt)


def _coded(value: Any) -> bytes:
    """Members in an order of their own, so that it does not matter in which a client writes them."""
    return msgspec.json.encode(value, order="deterministic")


def _hashed(pieces: Iterable[bytes]) -> PromptPrefixes:
    data = memoryview(b"\0".join(pieces))
    hasher, hashes, start = blake2b(digest_size=8), [], 0
    for cut in CUTS:
        if cut > len(data):
            break
        hasher.update(data[start:cut])
        hashes.append(int.from_bytes(hasher.digest(), "little") >> (64 - _HASH_BITS))
        start = cut
    return PromptPrefixes(tuple(hashes), len(data))
