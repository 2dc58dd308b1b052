"""`prompt_logprobs`, in vLLM's form: for each token of a prompt its own log-probability and those of the likeliest tokens, by number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gantline_runtime.messages import PromptLogprobs
from gantline_runtime.server.answers import finite_logprob
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["list_prompt_scores"]


def list_prompt_scores(tokenizer: Tokenizer, ids: Sequence[int], chunks: Iterable[PromptLogprobs]) -> list[dict[str, Any] | None]:
    """An entry for each token of the prompt `ids`, of which the engine read `chunks`; None for the first, which follows nothing."""
    return [None, *_scores(tokenizer, ids, chunks)]


def _scores(tokenizer: Tokenizer, ids: Sequence[int], chunks: Iterable[PromptLogprobs]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        columns = zip(ids[chunk.start :], chunk.chosen, chunk.ranks, chunk.top_ids, chunk.top_logprobs, strict=False)
        for token, logprob, rank, top_ids, top in columns:
            likeliest = {id: (value, place) for place, (id, value) in enumerate(zip(top_ids, top, strict=True), 1)}
            entries = {token: (logprob, rank), **likeliest}
            yield {str(id): _ranked(tokenizer, id, *entry) for id, entry in entries.items()}


def _ranked(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": finite_logprob(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}
