"""What becomes of a step that raises: it is run again in ever smaller parts, until the sequences that raise by themselves are known.

One request whose shape nobody foresaw must not end the others. Parts are built from what the host knows, without reference to the
device's per-request state: a decoding sequence's token is sent like a prompt's, block tables are sent whole, and writing the same keys and
values to the same places twice changes nothing. So it does not matter how far the failed step had come.

Where everything fails, the engine is at fault and not the requests: the first error is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gantline_runtime import logs
from gantline_runtime.failures import is_fatal
from gantline_runtime.messages import PromptLogprobs, TokenLogprobs
from gantline_runtime.request import Sequence
from gantline_runtime.scheduler import Step

if TYPE_CHECKING:
    from gantline_runtime.model_runner import StepResult

__all__ = ["Rescue", "rescue_step"]

_MOST_FAILURES = 8
"""More sequences of one step than this do not fail for reasons of their own."""

log = logging.getLogger("gantline.engine")


@dataclass
class Rescue:
    """What was sampled for, and read of, each sequence that ran; `failures` are those that raise by themselves, with the cause."""

    sampled: dict[Sequence, tuple[int, TokenLogprobs | None]] = field(default_factory=dict)
    read: dict[Sequence, PromptLogprobs | NDArray[np.float32]] = field(default_factory=dict)
    failures: dict[Sequence, Exception] = field(default_factory=dict)
    num_run: int = 0
    """Sequences that did not raise."""

    def take(self, part: Step, result: StepResult) -> None:
        tokens, logprobs, reads = result
        entries = logprobs if logprobs is not None else [None] * len(tokens)
        self.sampled.update(zip(part.samples, zip(tokens, entries, strict=True), strict=True))
        self.read.update({read.sequence: value for read, value in zip(part.reads, reads, strict=True)})
        self.num_run += len(part.sequences)

    def results_of(self, step: Step) -> tuple[list[int], list[TokenLogprobs | None], list[PromptLogprobs | NDArray[np.float32]]]:
        """For `step.samples` and `step.reads`, as the step itself would have given them."""
        sampled = [self.sampled[sequence] for sequence in step.samples]
        return [token for token, _ in sampled], [entry for _, entry in sampled], [self.read[read.sequence] for read in step.reads]


def rescue_step(step: Step, run: Callable[[Step], StepResult], error: Exception) -> Rescue:
    """Run the sequences of `step`, which raised `error`, in parts.

    Raises a fatal error of `run`, and `error` if no sequence of several can be run or too many cannot.
    """
    rescue = Rescue()
    whole = list(range(len(step.sequences)))
    parts = _halves(whole) if len(whole) > 1 else [whole]
    while parts:
        rows = parts.pop(0)
        part = select(step, rows)
        try:
            rescue.take(part, run(part))
        except Exception as failure:
            if is_fatal(failure):
                raise
            if len(rows) > 1:
                parts[:0] = _halves(rows)
                continue
            rescue.failures[part.sequences[0]] = failure
            if len(rescue.failures) > _MOST_FAILURES:
                raise error from failure
    if not rescue.num_run and len(whole) > 1:
        raise error
    log.warning("a step was run again in parts", exc_info=error, extra=logs.fields(failed=len(rescue.failures), saved=rescue.num_run))
    return rescue


def _halves(rows: list[int]) -> list[list[int]]:
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]]


def select(step: Step, rows: list[int]) -> Step:
    """The part of `step` that computes the sequences `rows`, each as a chunk of tokens that the host knows."""
    part, sampled = Step(), set(step.samples)
    firsts = [0, *accumulate(step.query_lens)]
    moved: dict[Sequence, int] = {}
    for row in rows:
        sequence = step.sequences[row]
        moved[sequence] = part.num_tokens - firsts[row]
        part.sequences.append(sequence)
        part.starts.append(step.starts[row])
        part.query_lens.append(step.query_lens[row])
        part.num_tokens += step.query_lens[row]
        if sequence in sampled:
            part.samples.append(sequence)
            part.sample_rows.append(part.num_tokens - 1)
    part.reads = [replace(read, row=read.row + moved[read.sequence]) for read in step.reads if read.sequence in moved]
    return part
