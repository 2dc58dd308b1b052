"""When graphs are captured, replayed and done without. What torch records and replays is here the call itself."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gantline_runtime.batch import BatchShape
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_plan import GraphPlan
from gantline_runtime.graphs import StepGraphs


class Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


class Graph:
    """Captures, in place of kernels, which shapes the forward pass was asked for meanwhile."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.replays = 0

    def capture_begin(self, **_: Any) -> None:
        Graph.recording = self

    def capture_end(self) -> None:
        Graph.recording = None

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("Stream", Stream),
        ("current_stream", Stream),
        ("graph_pool_handle", tuple),
        ("stream", lambda _: contextlib.nullcontext()),
        ("synchronize", lambda _: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)


def decodes(count: int) -> BatchShape:
    return BatchShape(count, count, count, count, 0, 1, 100)


def make(forward: Callable[[BatchShape], None], max_graphs: int = 256, *, direct: bool = False) -> StepGraphs:
    plan = GraphPlan(GraphClasses(max_sequences=64, max_tokens=512, session_len=4096), max_graphs=max_graphs)
    return StepGraphs(forward, plan, device=torch.device("cpu"), pool_bytes=1 << 20, launch_seconds=deque(maxlen=9), direct=direct)


class Calls:
    def __init__(self) -> None:
        self.eager: list[BatchShape] = []
        self.recorded: list[BatchShape] = []
        self.out_of_memory = self.cannot = False
        self.collector_was_on: list[bool] = []

    def forward(self, shape: BatchShape) -> None:
        if Graph.recording is None:
            self.eager.append(shape)
        elif self.out_of_memory:
            raise torch.OutOfMemoryError("no memory is left")
        elif self.cannot and shape not in self.eager:
            raise RuntimeError("a kernel is loaded while a graph is captured")
        else:
            self.recorded.append(shape)
            self.collector_was_on.append(gc.isenabled())

    def run(self, step_graphs: StepGraphs, shape: BatchShape, captures: Captures = Captures.ANY) -> bool:
        """Whether it was padded, and so could run as a graph."""
        padded = step_graphs.plan.pad(shape, captures)
        if padded.padded:
            step_graphs.run(padded)
        return bool(padded.padded)


def test_a_class_is_run_then_captured_then_replayed_whatever_its_batches_hold() -> None:
    calls = Calls()
    step_graphs = make(calls.forward)
    for count in (17, 18, 19, 24):
        assert calls.run(step_graphs, decodes(count))
    assert [shape.num_sequences for shape in calls.eager] == [24]
    assert [shape.num_sequences for shape in calls.recorded] == [24]
    assert [graph.replays for graph in step_graphs._graphs.values()] == [3]  # type: ignore[attr-defined]
    assert len(step_graphs.capture_seconds) == len(step_graphs._launch_seconds) == 1


def test_where_only_wide_classes_may_be_captured_the_step_runs_and_the_graph_is_for_the_next_ones() -> None:
    calls = Calls()
    step_graphs = make(calls.forward)
    assert calls.run(step_graphs, decodes(17), Captures.WIDE)
    assert calls.eager == calls.recorded and [shape.max_context_len for shape in calls.recorded] == [4096]
    assert calls.run(step_graphs, decodes(18), Captures.NONE)
    assert len(calls.eager) == 1
    assert [graph.replays for graph in step_graphs._graphs.values()] == [1]  # type: ignore[attr-defined]


def test_a_wide_class_needs_no_run_before_its_capture_where_a_start_has_loaded_its_kernels() -> None:
    calls = Calls()
    step_graphs = make(calls.forward, direct=True)
    assert calls.run(step_graphs, decodes(17), Captures.WIDE) and calls.run(step_graphs, decodes(18), Captures.NONE)
    assert not calls.eager and len(calls.recorded) == 1
    assert [graph.replays for graph in step_graphs._graphs.values()] == [2]  # type: ignore[attr-defined]
    for _ in range(2):
        calls.run(step_graphs, decodes(5))
    assert len(calls.eager) == 1, "another class does"


def test_a_capture_that_fails_for_want_of_a_run_before_it_is_made_after_one() -> None:
    calls = Calls()
    calls.cannot = True
    step_graphs = make(calls.forward, direct=True)
    for count in (17, 30):
        assert calls.run(step_graphs, decodes(count), Captures.WIDE)
    assert len(calls.eager) == len(calls.recorded) == 2


def test_a_class_that_is_foreseen_is_captured_by_a_step_without_sequences() -> None:
    calls = Calls()
    step_graphs = make(calls.forward)
    while (shape := step_graphs.plan.foresee()) is not None:
        step_graphs.run(shape)
    assert len(calls.recorded) == len(calls.eager) == len(step_graphs._graphs)
    assert calls.run(step_graphs, decodes(17), Captures.NONE)
    assert len(calls.recorded) == len(calls.eager)


def test_no_garbage_is_collected_while_a_graph_is_captured() -> None:
    calls = Calls()
    step_graphs = make(calls.forward)
    assert gc.isenabled()
    for _ in range(2):
        calls.run(step_graphs, decodes(17))
    assert calls.collector_was_on == [False] and gc.isenabled()


def test_past_the_most_graphs_known_classes_go_on_and_others_run_unpadded() -> None:
    calls = Calls()
    step_graphs = make(calls.forward, max_graphs=2)
    for count in (1, 1, 2, 2):
        assert calls.run(step_graphs, decodes(count))
    assert not calls.run(step_graphs, decodes(40))
    assert calls.run(step_graphs, decodes(2))
    assert len(calls.recorded) == 2


def test_without_memory_for_a_graph_the_step_runs_all_the_same_and_none_is_tried_again() -> None:
    calls = Calls()
    step_graphs = make(calls.forward)
    calls.run(step_graphs, decodes(1))
    calls.run(step_graphs, decodes(1))
    calls.out_of_memory = True
    for _ in range(2):
        calls.run(step_graphs, decodes(16))
    assert [shape.num_sequences for shape in calls.eager] == [1, 16, 16]
    assert not calls.run(step_graphs, decodes(16))
    assert calls.run(step_graphs, decodes(1))
