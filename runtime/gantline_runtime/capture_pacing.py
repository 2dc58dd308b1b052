"""When CUDA graphs are captured (`graphs.py`), so that those who decode do not wait for it.

A capture keeps the host busy for some tens of milliseconds, while the device runs out of work. So one is made in a step only

- where nobody decodes, or no limit is set;
- or where the step and a capture fit the limit together: what both take is known from those before them;
- or where launching the step kernel by kernel takes longer than the limit too, so that the next step would be as late without one;
- or where those launches take longer than the device: seldom, for the sake of the steps to come.

Else the step runs without a graph: its launches hide behind the device's work on the step before.

Where launches take longer than the limit, each class of mixed steps costs one step that is late, so the pacer is told to keep to few.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from enum import IntEnum

from gantline_runtime.graph_sizes import most_padded
from gantline_runtime.pacing import Pacer, StepLoad

__all__ = ["CapturePacer", "Captures"]

_RECENT = 8
"""Captures, of which the median is what the next one is taken to last."""
_HIDDEN = 0.8
"""Share of the device's time up to which launches hide behind it: scheduling and results take the host's time too."""
_SPARE = 0.8
"""Share of the limit up to which a step has time for padding."""
_MOST_DELAY_S = 0.1
"""No step may be later than this for running without a graph and capturing one."""
_SELDOM = 128
"""Steps between two captures that exceed the limit: fewer than one step in a hundred is late for that."""


class Captures(IntEnum):
    """Which classes of batches may be captured in a step."""

    NONE = 0
    """None: launches hide behind the device, and a graph would gain little."""
    LATER = 1
    """None, though launches take time: a graph of a larger class is worth some padding."""
    WIDE_AGAIN = 2
    """One that fits as many batches as possible, when it is met again: running it first and capturing it then are two steps' work."""
    WIDE = 3
    """The same at once."""
    ANY = 4
    """The batch's own, when it is met again."""


class CapturePacer:
    """Decides from times alone; `capture_seconds`, `launch_seconds` (of steps without a graph) and `graph_tokens` (of mixed steps that have
    one) grow while it is in use."""

    def __init__(
        self,
        pacer: Pacer,
        capture_seconds: Sequence[float],
        launch_seconds: Sequence[float],
        graph_tokens: Collection[int],
        *,
        direct: bool,
    ) -> None:
        """`direct`: a wide class is captured without having run before (`StepGraphs`)."""
        self._pacer = pacer
        self._direct = direct
        self._graph_tokens = graph_tokens
        self._capture_seconds = capture_seconds
        self._launch_seconds = launch_seconds
        self._num_captures = 0
        self._steps_since = _SELDOM

    def allow(self, load: StepLoad) -> Captures:
        """What may be captured in the next step, of `load`."""
        if not self._pacer.max_step_s or not load.decodes:
            return Captures.ANY
        self._count_step()
        device, limit = self._pacer.predict(load), self._pacer.limit(load)
        launch = statistics.median(self._launch_seconds) if self._launch_seconds else 0.0
        self._pacer.graph_tokens = self._graph_tokens if launch > limit else None
        capture = statistics.median(self._capture_seconds[-_RECENT:]) if self._capture_seconds else None
        if capture is not None and device + capture <= limit:
            return Captures.ANY
        if self._direct and capture is not None and capture <= _HIDDEN * device:
            return Captures.WIDE
        if launch <= _HIDDEN * device:
            return Captures.NONE
        if launch <= limit and self._steps_since < _SELDOM:
            return Captures.LATER
        if launch > limit and device <= _SPARE * limit and self._is_covered(load):
            return Captures.LATER
        return Captures.WIDE if launch + (capture or 0.0) <= _MOST_DELAY_S else Captures.WIDE_AGAIN

    def _is_covered(self, load: StepLoad) -> bool:
        """Whether a mixed step, such as a prompt's end, can be padded to a graph that there is."""
        tokens = load.decodes + load.prompt_tokens
        return load.prompt_tokens > 0 and any(tokens <= size <= most_padded(tokens) for size in self._graph_tokens)

    def _count_step(self) -> None:
        self._steps_since += 1
        if self._num_captures != len(self._capture_seconds):
            self._num_captures, self._steps_since = len(self._capture_seconds), 0
