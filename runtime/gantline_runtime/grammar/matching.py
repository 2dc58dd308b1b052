"""Following a grammar, token by token: one matcher a request, and the masks of a step's rows in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gantline_runtime.grammar.library import load_library
from gantline_runtime.sampling import TokenMask

__all__ = ["GrammarMatcher", "MaskWriter"]


class GrammarMatcher:
    """How far one request's answer has come in its grammar. It moves with tokens that have reached the host and count, never with
    those that an overlapped step sampled beyond an end."""

    def __init__(self, compiled: Any, stop_token_ids: Sequence[int]) -> None:
        """Where the grammar may end, the stop tokens are allowed too; with none, its end is the answer's."""
        unlimited_rollback, default_temperature = -1, None
        self._native = load_library().GrammarMatcher(
            compiled, list(stop_token_ids) or None, not stop_token_ids, unlimited_rollback, default_temperature
        )

    def accept(self, token: int) -> bool:
        """Move on; False if the grammar does not allow `token` here."""
        return bool(self._native.accept_token(token, False))

    @property
    def ended(self) -> bool:
        """Nothing can follow."""
        return bool(self._native.is_terminated())


class MaskWriter:
    def __init__(self, *, max_rows: int, vocab_size: int, num_threads: int, pinned: bool) -> None:
        """One buffer is enough: it is written anew only when the tokens of the step that used it have been read."""
        self._bits = torch.empty((max_rows, -(-vocab_size // 32)), dtype=torch.int32, pin_memory=pinned)
        self._filler = load_library().BatchGrammarMatcher(num_threads) if num_threads > 1 else None

    def write(self, rows: Sequence[int], matchers: Sequence[GrammarMatcher]) -> TokenMask:
        """What each row's matcher allows next."""
        native = [matcher._native for matcher in matchers]
        if self._filler is not None and len(native) > 1:
            self._filler.batch_fill_next_token_bitmask(native, self._bits, None, False)
        else:
            for i, matcher in enumerate(native):
                matcher.fill_next_token_bitmask(self._bits, i, False)
        return TokenMask(np.array(rows, dtype=np.int64), self._bits[: len(native)])
