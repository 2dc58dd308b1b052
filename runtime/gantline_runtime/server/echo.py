"""The prompt as `echo` gives it back: before each choice's text, with log-probabilities token by token as the engine reads them."""

from __future__ import annotations

from gantline_runtime.detokenizer import Detokenizer
from gantline_runtime.messages import PromptLogprobs, TokenLogprobs
from gantline_runtime.server.output import TokenEntry
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["PromptEcho"]


class PromptEcho:
    """Turns a prompt's log-probabilities, which come chunk by chunk, into text and entries. `text` is what was given back so far."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], *, skip_special_tokens: bool) -> None:
        self._ids = prompt_ids
        self._detokenizer = Detokenizer(tokenizer, (), tokenizer.special_ids if skip_special_tokens else ())
        self._num_taken = 0
        self.num_chars = 0

    @property
    def complete(self) -> bool:
        return self._num_taken == len(self._ids)

    def take(self, chunk: PromptLogprobs | None) -> tuple[str, list[TokenEntry]]:
        """The text and the entries of the tokens that `chunk` adds; without one, of what is left, which has no log-probabilities."""
        if chunk is None:
            logprobs: list[TokenLogprobs | None] = [None] * (len(self._ids) - self._num_taken)
        else:
            assert chunk.start == max(1, self._num_taken), f"tokens from {chunk.start} follow {self._num_taken}"
            logprobs = [None] if self._num_taken == 0 else []
            logprobs += map(TokenLogprobs, chunk.chosen, chunk.top_ids, chunk.top_logprobs)
        text, entries = "", []
        for token, entry in zip(self._ids[self._num_taken :], logprobs, strict=False):
            entries.append(TokenEntry(token, entry, self.num_chars + len(text)))
            text += self._detokenizer.feed(token)
        self._num_taken += len(logprobs)
        if self.complete:
            text += self._detokenizer.finish()
        self.num_chars += len(text)
        return text, entries
