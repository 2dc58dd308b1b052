"""Which batches run as CUDA graphs, and which graphs are made: decided from shapes, on the host of rank 0.

A batch whose class (`graph_classes.py`) has a graph is padded to it. Where a step may capture, a class that is met for the second time is
captured: the first time it runs without, which loads what it needs and may be the only time; a wide class is captured at once. Where a step
has no time for that (`capture_pacing.py`), the batch is padded to a wider class that has a graph, of about as many tokens, since only these
cost much when they are padding, or of more where launches take time; with none, it runs as it is. In idle times the widest class of each
number of tokens is captured, so that there is one.
"""

from __future__ import annotations

import logging
from collections import deque

from gantline_runtime.batch import BatchShape
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_sizes import most_padded
from gantline_runtime.sizing import MAX_GRAPHS

__all__ = ["GraphPlan"]

log = logging.getLogger(__name__)

_FREE_TOKENS, _FREE_SHARE = 8, 1 / 16
"""Tokens of padding that are always taken for the sake of a graph: so many, or this share of the batch's."""
_MOST_DECODES = 2.0
"""Times a batch's tokens that its padded one may have where launches take time, if all decode; of mixed ones see `most_padded`."""


class GraphPlan:
    def __init__(self, classes: GraphClasses, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._classes = classes
        self._max_graphs = max_graphs
        self._captured: set[BatchShape] = set()
        self._met: set[BatchShape] = set()
        self._covers: dict[BatchShape, BatchShape | None] = {}
        """Found since the last capture."""
        self._foreseen = deque(classes.foreseen())
        self.may_capture = True
        self.mixed_tokens: set[int] = set()
        """Numbers of tokens for which a mixed batch of any contexts and decodes, and few prompts, has a graph."""

    def pad(self, shape: BatchShape, captures: Captures) -> BatchShape:
        """What a batch is to be padded to, with `capture` set where its graph is to be made; its own shape where it is to run as it is."""
        padded = self._classes.pad(shape)
        if not padded.padded or padded.graph in self._captured:
            return padded
        if captures is Captures.ANY and self.may_capture:
            return padded._replace(capture=int(self._meet(padded.graph)))
        cover = self._cover(padded.graph)
        if cover is None or _costs(cover, padded):
            if captures in (Captures.WIDE, Captures.WIDE_AGAIN) and self.may_capture:
                wide = self._classes.widen(padded)
                again = self._meet(wide.graph)
                return wide._replace(capture=int(again or captures is Captures.WIDE))
            if cover is None or captures is Captures.NONE:
                return shape
        return cover._replace(num_samples=shape.num_samples, num_updates=shape.num_updates)

    def _meet(self, graph: BatchShape) -> bool:
        """Whether the class has been met before."""
        again = graph in self._met
        self._met.add(graph)
        return again

    def foresee(self) -> BatchShape | None:
        """The next class to capture while nothing else is to be done: a batch of it, without any sequence; None if there is none left."""
        while self._foreseen and self.may_capture:
            shape = self._foreseen.popleft()
            if shape not in self._captured:
                return shape._replace(capture=1)
        return None

    def captured(self, graph: BatchShape) -> None:
        """Note that `BatchShape.graph` has been captured."""
        self._captured.add(graph)
        self._covers.clear()
        if not graph.is_decode and self.is_wide(graph):
            self.mixed_tokens.add(graph.num_tokens)
        if len(self._captured) >= self._max_graphs and self.may_capture:
            self.may_capture = False
            log.warning("%d CUDA graphs are captured; batches of further classes run without", self._max_graphs)

    def is_wide(self, graph: BatchShape) -> bool:
        """Whether it is the class of its number of tokens that fits the most batches."""
        return self._classes.widen(graph) == graph

    def give_up(self, graph: BatchShape, error: Exception) -> None:
        """Capture no more, since there was no memory for this one."""
        self.may_capture = False
        log.warning("no memory for a CUDA graph of %s; from now on none is captured: %s", graph, error)

    def _cover(self, graph: BatchShape) -> BatchShape | None:
        """The class that has a graph, holds all batches of the class `graph`, and pads them least."""
        if graph not in self._covers:
            found = [other for other in self._captured if _covers(other, graph)]
            self._covers[graph] = min(found, key=_size, default=None)
        return self._covers[graph]


def _covers(wide: BatchShape, graph: BatchShape) -> bool:
    most_tokens = _MOST_DECODES * graph.num_tokens if graph.is_decode else most_padded(graph.num_tokens)
    return (
        wide.is_decode == graph.is_decode
        and graph.num_tokens <= wide.num_tokens <= most_tokens
        and wide.num_decodes >= graph.num_decodes
        and wide.num_prompts >= graph.num_prompts
        and wide.max_context_len >= graph.max_context_len
        and bool(wide.max_own_len) == bool(graph.max_own_len)
        and wide.max_own_len >= graph.max_own_len
    )


def _costs(cover: BatchShape, graph: BatchShape) -> bool:
    """Whether `cover` has so many more tokens that they cost time."""
    return cover.num_tokens > graph.num_tokens + max(_FREE_TOKENS, _FREE_SHARE * graph.num_tokens)


def _size(shape: BatchShape) -> tuple[int, int, int, int]:
    return shape.num_tokens, shape.max_context_len, shape.num_sequences, shape.max_own_len
