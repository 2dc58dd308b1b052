"""Turns one request's tokens into text as they arrive, without ever cutting a character.

Tokens are decoded together with a few that came before, because a decoder may treat the beginning of a text specially (SentencePiece drops
its first space), and the text that they add is what that window decodes to beyond what its older part does. While the window ends in
U+FFFD the last tokens may hold the first bytes of a character, so they wait. A character of UTF-8 has at most four bytes and a token at
least one: of more than three waiting tokens the oldest cannot belong to an unfinished character, and is let go as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = ["Decoder", "Detokenizer"]

_CONTEXT_TOKENS = 5
"""Tokens of the prompt's end that are decoded along. One would do for spaces; a few cover markers that decode to nothing."""

_MAX_UNFINISHED = 3
_MAX_SILENT = 16
"""Tokens that decode to nothing are kept as context only so far, or a run of them would cost the square of its length."""

_UNDECODABLE = "\ufffd"


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        ...


class Detokenizer:
    """`skip` are token ids that give no text (special tokens, when they are not wanted)."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = (), skip: Iterable[int] = ()) -> None:
        self._decoder = decoder
        self._skip = skip if isinstance(skip, (set, frozenset)) else frozenset(skip)
        context = [token for token in prompt_ids[-_CONTEXT_TOKENS:] if token not in self._skip]
        self._window = context
        self._num_known = len(context)
        """Tokens of the window whose text was given out (or is the prompt's)."""
        self._known_text = decoder.decode(context) if context else ""

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        if not text.endswith(_UNDECODABLE):
            return self._give_out(len(self._window), text)
        if len(self._window) - self._num_known > _MAX_UNFINISHED:
            count = self._num_known + 1
            return self._give_out(count, self._decoder.decode(self._window[:count]))
        return ""

    def finish(self) -> str:
        """What is left when no more tokens come: an unfinished character as U+FFFD."""
        if len(self._window) == self._num_known:
            return ""
        return self._give_out(len(self._window), self._decoder.decode(self._window))

    def _give_out(self, count: int, text: str) -> str:
        """The text of the window's first `count` tokens beyond what is known; the newest of them become the context of what follows."""
        new = text[len(self._known_text) :]
        first = self._num_known if new else max(0, count - _MAX_SILENT)
        if first:
            self._window = self._window[first:]
            count -= first
            text = self._decoder.decode(self._window[:count])
        self._num_known, self._known_text = count, text
        return new
