"""How long a step will take, learned from the steps before it, and how much of a prompt fits in the time that is left.

    seconds = base + [any prompt] * more + a * prompt tokens + b * pairs + c * decodes + d * decode context

`pairs` counts, for each prompt token, the tokens that its attention reads; `decode context` sums the lengths of the sequences that
decode. The six coefficients are fitted, robustly, to the last steps of each size of prompt, without any and from 32 tokens up in powers of
two: neither an hour of decoding nor a thousand equal chunks wash out what larger ones cost. Time does not grow evenly with tokens, though:
products take whole tiles of rows, so one token more may cost what 128 do. So each number of tokens that batches are padded to
(`graph_sizes.py`) has a ratio of its own, of what its last steps took to what was fitted. What is wrong all the same is followed step by
step, as the ratio of what steps with prompts took to what was expected. A limit is divided by its mean; or, if that leaves more room, by
what one of a hundred exceeds, so that this one is late by a twentieth at most: steps that scatter little come close to the limit. Nothing
is assumed about the device; until prompts have been seen, chunks are small.

Of a step whose end was seen late, because the host was launching the next, it is known only that it took no longer. It is news only where
more was expected.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.graph_sizes import most_padded, token_step

__all__ = ["Pacer", "StepLoad"]

_MIN_CHUNK = 32
"""Tokens that a prompt gets on with in any step: on a GPU they cost next to nothing beside the weights that are read anyway."""
_GRAIN = 64
"""Longer chunks are cut so that the step's tokens fill a class of CUDA graphs: padding would cost what tokens cost."""
_FIRST_CHUNK = 512
"""Until `_MIN_SAMPLES` steps with prompts have been measured; twice what was seen to take less than half the limit, if that is more."""
_MIN_SAMPLES = 4
_LEAST_SHARE = 1.25
"""A step may take this many times what its decodes take, whatever the limit."""
_KEPT = 24
"""Steps of each size of prompt that the fit is made from; four times as many without a prompt."""
_FIT_EVERY = 32
"""Steps, of which one with a prompt counts for `_PROMPT_NEWS`: what prompts cost changes as they get on, what decoding costs hardly."""
_PROMPT_NEWS = 4
_TRUSTED, _TURNS = 0.1, 8
"""Error, in times of a typical step of its size, up to which a step counts in full; past it the less the larger (Huber's loss, in so many
turns). A step that compiled a kernel looks slow, and one whose successor did looks slow and the successor fast."""
_SURPRISE = 4
"""Steps with prompts that one counts for whose time was missed by more than `_TRUSTED`: contexts may have come that were never seen."""
_RATIO_GAIN, _RECENT = 1 / 8, 8
"""Weight of the newest step in the mean ratio of what steps took to what was expected; steps that it is made from after a new fit."""
_ERRORS, _LATE_SHARE, _LATE_BY = 128, 0.01, 1.05
"""Of the last so many steps' ratios, less the mean of then: room is left so that this share exceeds the limit by that factor at most."""
_UNSURE = 16
"""So many ratios tell what may happen; with fewer, room is left for more: contexts come that were never seen."""
_OF_CLASS, _LEAST_OFF, _MOST_OFF = 8, 0.95, 1.25
"""Last steps of as many tokens, from whose median ratio follows what is wrong with all such steps, and its bounds."""
_MOST_RATIO, _MOST_ERROR = 1.5, 0.2
"""Of one step, and of all as far as room is left for it: prompts must get on where a machine is disturbed."""
_SCALE = np.array([1.0, 1.0, 1e3, 1e6, 1e2, 1e5])
"""Typical sizes of the six terms, so that they weigh alike where the steps seen do not tell them apart."""
_RIDGE = 1e-4


@dataclass
class StepLoad:
    """What a step is made of, as far as its time depends on it."""

    prompt_tokens: int = 0
    pairs: float = 0.0
    decodes: int = 0
    decode_context: int = 0

    def add_chunk(self, start: int, count: int) -> None:
        self.prompt_tokens += count
        self.pairs += count * (start + count / 2)

    def terms(self) -> tuple[float, ...]:
        """In the order of `Coefficients`."""
        return 1.0, float(self.prompt_tokens > 0), self.prompt_tokens, self.pairs, self.decodes, self.decode_context


class Coefficients(NamedTuple):
    """Seconds for one of each term."""

    base: float = 0.0
    any_prompt: float = 0.0
    prompt_token: float = 0.0
    pair: float = 0.0
    decode: float = 0.0
    decode_context: float = 0.0


class Pacer:
    """Chooses chunks so that steps with decodes take at most `max_step_s`; 0 for no limit.

    Where decoding alone takes most of that, prompts get a quarter of what decoding takes: they must get on too.
    """

    def __init__(self, max_step_s: float) -> None:
        self.max_step_s = max_step_s
        self.graph_tokens: Collection[int] | None = None
        """Where launches without a CUDA graph take longer than a step may: the numbers of tokens that mixed steps have graphs of."""
        self._samples: dict[int, deque[tuple[float, ...]]] = {}
        """(terms, seconds) by size of prompt: 0 for none, else the number of bits of its tokens."""
        self._coefficients = Coefficients()
        self._until_fit = 1
        self._num_with_prompts = 0
        self._most_prompt_tokens = 0
        self._first_chunk = _FIRST_CHUNK
        self._of_class: dict[int, deque[tuple[StepLoad, float]]] = {}
        """Last steps with prompts and decodes, by the tokens of their class of CUDA graphs."""
        self._off: dict[int, float] = {}
        """What these took, of what was fitted."""
        self._ratio = 1.0
        self._recent: deque[tuple[StepLoad, float]] = deque(maxlen=_RECENT)
        self._errors: deque[float] = deque(maxlen=_ERRORS)
        self._error = _MOST_ERROR

    @property
    def _knows_prompts(self) -> bool:
        return self._num_with_prompts >= _MIN_SAMPLES

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step of `load` takes."""
        fitted = self._fitted(load)
        return fitted * self._off.get(_class_of(load), 1.0) if load.prompt_tokens and load.decodes else fitted

    def _fitted(self, load: StepLoad) -> float:
        c = self._coefficients
        prompt = c.any_prompt + c.prompt_token * load.prompt_tokens + c.pair * load.pairs if load.prompt_tokens else 0.0
        return self._decoding(load) + prompt

    def limit(self, load: StepLoad) -> float:
        """Seconds that a step with the decodes of `load` may take, if there is a limit."""
        return max(self.max_step_s, _LEAST_SHARE * self._decoding(load))

    def _decoding(self, load: StepLoad) -> float:
        c = self._coefficients
        return c.base + c.decode * load.decodes + c.decode_context * load.decode_context

    def observe(self, load: StepLoad, seconds: float, *, at_most: bool = False) -> None:
        """Note how long a step took that is over; `refit` learns from it. `at_most`: it was over earlier, nobody knows when."""
        if seconds <= 0.0 or not math.isfinite(seconds):
            return
        expected = self.predict(load)
        if at_most and expected <= seconds:
            if seconds <= self.max_step_s / 2:
                self._first_chunk = max(self._first_chunk, 2 * load.prompt_tokens)
            return
        size = max(load.prompt_tokens, _MIN_CHUNK).bit_length() if load.prompt_tokens else 0
        news = _PROMPT_NEWS if load.prompt_tokens else 1
        if expected > 0.0 and self._knows_prompts and load.prompt_tokens and load.decodes:
            self._follow(load, seconds)
            news *= _SURPRISE if abs(seconds / expected - 1.0) > _TRUSTED else 1
        self._samples.setdefault(size, deque(maxlen=_KEPT if size else 4 * _KEPT)).append((*load.terms(), seconds))
        self._num_with_prompts += load.prompt_tokens > 0
        self._most_prompt_tokens = max(self._most_prompt_tokens, load.prompt_tokens)
        self._until_fit -= news

    def refit(self) -> None:
        """Fit anew if enough has been observed since the last time: 1 to 3 ms, for a moment when nobody waits for the caller."""
        if self._until_fit <= 0:
            self._fit()

    def _follow(self, load: StepLoad, seconds: float) -> None:
        """Note what the fit got wrong of a step with decodes and prompts."""
        self._recent.append((load, seconds))
        off = self._ratio_of(load, seconds) - self._ratio
        self._ratio += _RATIO_GAIN * off
        self._errors.append(off)
        unsure = _MOST_ERROR * (1.0 - len(self._errors) / _UNSURE)
        self._error = min(_MOST_ERROR, max(_largest(self._errors, _LATE_SHARE), unsure))
        steps = self._of_class.setdefault(_class_of(load), deque(maxlen=_OF_CLASS))
        steps.append((load, seconds))
        self._off[_class_of(load)] = self._median_off(steps)

    def _median_off(self, steps: Iterable[tuple[StepLoad, float]]) -> float:
        """The median of what steps of a class took, of what was fitted, and of two that were as fitted: a single step is not believed."""
        ratios = [seconds / max(self._fitted(load), 1e-9) for load, seconds in steps]
        return min(max(statistics.median([*ratios, 1.0, 1.0]), _LEAST_OFF), _MOST_OFF)

    def _ratio_of(self, load: StepLoad, seconds: float) -> float:
        """What a step took, of what is expected of it."""
        return min(seconds / max(self.predict(load), 1e-9), _MOST_RATIO)

    def _fit(self) -> None:
        samples = np.array([sample for kept in self._samples.values() for sample in kept])
        typical = np.concatenate([np.full(len(kept), np.median([sample[-1] for sample in kept])) for kept in self._samples.values()])
        self._until_fit = _FIT_EVERY if len(samples) >= _FIT_EVERY else 1
        rows, wanted = samples[:, :-1] / (_SCALE * typical[:, None]), samples[:, -1] / typical
        trust = np.ones(len(samples))
        for _ in range(_TURNS):
            found = _fit_positive(rows, wanted, trust)
            before, trust = trust, np.minimum(1.0, _TRUSTED / np.maximum(np.abs(rows @ found - wanted), 1e-9))
            if np.array_equal(trust, before):  # nor would further turns find anything else
                break
        self._coefficients = Coefficients(*(found / _SCALE).tolist())
        self._off = {tokens: self._median_off(steps) for tokens, steps in self._of_class.items()}
        if self._recent:  # another fit gets other things wrong
            self._ratio = sum(self._ratio_of(*step) for step in self._recent) / len(self._recent)

    def chunk(self, load: StepLoad, start: int, wanted: int) -> int:
        """How many of `wanted` tokens, from position `start` of a prompt, to add to a step of `load`. The first prompt of a step gets on in
        any case; for a further one there may be no room, 0."""
        if not self.max_step_s or not load.decodes:
            return wanted
        count = self._room(load, start, wanted)
        return count if count or load.prompt_tokens else min(wanted, _MIN_CHUNK)

    def _room(self, load: StepLoad, start: int, wanted: int) -> int:
        """As `chunk`, but 0 where not even the least one has room."""
        if not self._knows_prompts:
            return self._with_graph(load, _cut(load, max(0, self._first_chunk - load.prompt_tokens), wanted), wanted)
        most = min(wanted, 2 * self._most_prompt_tokens)  # no leaps into what was never seen
        count = _cut(load, min(most, self._fits(load, start, min(self._off.values(), default=1.0))), wanted)
        while count:  # from the largest class down, since each is wrong in a way of its own
            fits = self._fits(load, start, self._off.get(_class_of(load, count), 1.0))
            if fits >= count:
                break
            count = _cut(load, max(fits, count - 1) if count > _GRAIN else fits, wanted)
        return self._with_graph(load, count, wanted)

    def _with_graph(self, load: StepLoad, count: int, wanted: int) -> int:
        """Of a chunk that is cut to `count`, what fills the largest class that has a graph; or if that is less than half, what fills a
        power of two, or whole 64 tokens, so that few classes are captured. A step's further prompt is left out if it fills none. Few
        tokens that end a prompt are padded."""
        before = load.decodes + load.prompt_tokens
        if self.graph_tokens is None or not count or (count >= wanted and before + count <= most_padded(0)):
            return count
        known = max((size for size in self.graph_tokens if size <= before + count), default=0)
        power, grain = 1 << ((before + count).bit_length() - 1), (before + count) // _GRAIN * _GRAIN
        sizes = (known, power) if load.prompt_tokens else (known, power, grain)
        return next((size - before for size in sizes if 2 * (size - before) >= count), 0 if load.prompt_tokens else count)

    def _fits(self, load: StepLoad, start: int, off: float) -> int:
        """Tokens that there is time for where steps take `off` times what was fitted."""
        c = self._coefficients
        wrong = off * max(1.0, self._ratio, (self._ratio + self._error) / _LATE_BY)
        more = 0.0 if load.prompt_tokens else c.any_prompt
        left = max(self.max_step_s / wrong, _LEAST_SHARE * self._decoding(load)) - self._fitted(load) - more
        return _largest_count(left, c.prompt_token + c.pair * start, c.pair / 2)


def _class_of(load: StepLoad, more: int = 0) -> int:
    """Tokens of the class of CUDA graphs that a step falls into with so many more."""
    tokens = load.decodes + load.prompt_tokens + more
    return -(-tokens // token_step(tokens)) * token_step(tokens)


def _cut(load: StepLoad, count: int, wanted: int) -> int:
    """`wanted` tokens if there is room for them, else as many of `count` as fill a class; none of less than the least chunk."""
    if count >= wanted:
        return wanted
    if count > _GRAIN:
        return count - _surplus(load, count)
    return count if count >= _MIN_CHUNK and not load.prompt_tokens else 0


def _largest(values: Iterable[float], share: float) -> float:
    """What this share of the values exceeds."""
    ordered = sorted(values)
    return ordered[-1 - int(share * len(ordered))]


def _surplus(load: StepLoad, count: int) -> int:
    """Tokens of a chunk of `count` past the class that the step's tokens fill, or past whole least chunks if too few were left."""
    tokens = load.decodes + load.prompt_tokens + count
    surplus = tokens % token_step(tokens)
    return surplus if count - surplus >= _MIN_CHUNK else count % _MIN_CHUNK


def _largest_count(seconds: float, linear: float, quadratic: float) -> int:
    """The largest n with `linear * n + quadratic * n^2 <= seconds`."""
    if seconds <= 0.0:
        return 0
    if quadratic * seconds <= 1e-12 * linear * linear or quadratic <= 0.0:
        return int(min(seconds / linear, 1 << 30)) if linear > 0.0 else 1 << 30
    return int((math.sqrt(linear * linear + 4.0 * quadratic * seconds) - linear) / (2.0 * quadratic))


def _fit_positive(rows: NDArray[np.float64], wanted: NDArray[np.float64], trust: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients, none negative, that bring `rows @ coefficients` [N, 6] closest to `wanted` [N], each row as far as it is trusted [N].
    Terms that would be negative are left out, the worst first."""
    used = list(range(rows.shape[1]))
    weighed = rows * trust[:, None]
    gram, target = rows.T @ weighed / len(rows), wanted @ weighed / len(rows)
    gram.flat[:: len(used) + 1] += _RIDGE * max(float(gram.trace()), 1e-300) / len(used)
    while True:
        part = np.linalg.solve(gram[used][:, used], target[used])
        worst = int(part.argmin())
        if part[worst] >= 0.0 or len(used) == 1:
            break
        del used[worst]
    result = np.zeros(rows.shape[1])
    result[used] = np.maximum(part, 0.0)
    return result
