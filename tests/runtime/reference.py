"""The reference: transformers in float32, made cheap.

`generate` is greedy decoding, so a sequence is what it would produce if, and only if, each token is the likeliest one after those before
it. That is checked with one teacher-forced pass over whole sequences, in batches, instead of token by token; where the reference's two best
logits lie within `TIE`, either is accepted and the check goes on from the token that the engine chose. Sequences that one configuration has
verified are remembered, so that further settings of the engine cost nothing here unless they answer differently.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

TIE = 1e-4
NEW_TOKENS = 64
_BATCH_TOKENS = 4096


def make_prompts(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, mostly short, block boundaries among them; every third begins with one of four shared texts."""
    rng = random.Random(seed)
    shared = [[rng.randrange(vocab_size) for _ in range(longest)] for _ in range(4)]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, longest - 1, longest]
    lengths += [max(1, int(longest ** rng.random())) for _ in range(count - len(lengths))]
    prompts = []
    for i, length in enumerate(lengths[:count]):
        own = [rng.randrange(vocab_size) for _ in range(length)]
        kept = rng.randrange(length) if i % 3 == 0 else 0
        prompts.append(shared[i % 4][:kept] + own[kept:])
    return prompts


class Reference:
    """transformers' model of one checkpoint, and what it has verified."""

    def __init__(self, model_dir: Path, *, is_ordinary: bool = True) -> None:
        """`is_ordinary`: logits are the head's product with hidden states, and attention is torch's; else the class does all it does."""
        from transformers import AutoModelForCausalLM

        attention = "sdpa" if is_ordinary else "eager"
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=attention).eval()
        self._is_ordinary = is_ordinary
        self._verified: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self.num_ties = 0

    def verify(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """Assert that each answer is what greedy generation gives, up to ties."""
        todo = [(p, a) for p, a in zip(prompts, answers, strict=True) if (tuple(p), tuple(a)) not in self._verified]
        todo.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        while todo:
            longest = len(todo[-1][0]) + len(todo[-1][1])
            size = max(1, _BATCH_TOKENS // longest)
            batch, todo = todo[-size:], todo[:-size]
            for (prompt, answer), logits in zip(batch, self._logits(batch), strict=True):
                self._compare(prompt, answer, logits)
                self._verified.add((tuple(prompt), tuple(answer)))

    @torch.inference_mode()
    def _logits(self, batch: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """Of each pair, the logits [len(answer), vocabulary] that its answer's tokens were chosen from."""
        longest = max(len(p) + len(a) for p, a in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, (prompt, answer) in enumerate(batch):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        # padding lies to the right, where causal attention never looks from a real token
        spans = [slice(len(p) - 1, len(p) + len(a) - 1) for p, a in batch]
        mask = torch.ones_like(ids)
        if not self._is_ordinary:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return [logits[row, span] for row, span in enumerate(spans)]
        hidden = self._model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = [hidden[row, span] for row, span in enumerate(spans)]
        return list(self._model.lm_head(torch.cat(wanted)).split([len(w) for w in wanted]))

    def _compare(self, prompt: list[int], answer: list[int], logits: torch.Tensor) -> None:
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        gap = logits.max(dim=1).values - chosen
        assert torch.isfinite(logits).all()
        wrong = (gap > TIE).nonzero().flatten().tolist()
        assert not wrong, f"a prompt of {len(prompt)} tokens: answer differs at {wrong[0]}, {gap[wrong[0]]:.6f} below the best logit"
        self.num_ties += int((gap > 0).sum())
