"""Where each step's time goes: what the host did, and on a GPU what the device did and how long it waited for the host.

The engine's own parts are wrapped while a trace is on; a step costs some 40 us more for it. Times are in milliseconds.
"""

from __future__ import annotations

import gc
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.scheduler import Step

__all__ = ["StepTrace", "TracedStep"]

_SHARES = (0.5, 0.9, 0.99, 1.0)


@dataclass
class TracedStep:
    """Of the host: `schedule`, then `launch`, of which `pack`, `sampling`, `upload`, `forward` and `logits` are parts; `tidy`, `wait`
    for the end, `account`. Of the device, between events: `upload`, `forward`, `rest` (logits, sampling, copies), and `idle` before."""

    decodes: int
    prompt_tokens: int
    start: int
    """Position of the first chunk."""
    predicted: float
    graph: str = ""
    """"graph", "first" for the first launch of one, "eager", or "capture"; with the tokens that it was padded to."""
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    disturbed: dict[str, float] = field(default_factory=dict)
    """While it was launched: garbage collections, how often the thread lost its processor or waited, page faults, the processor's time,
    and how often memory was taken from the device."""
    events: list[Any] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        parts = {"host": _rounded(self.host), "device": _rounded(self.device), "disturbed": _rounded(self.disturbed)}
        sizes = {"decodes": self.decodes, "prompt": self.prompt_tokens, "at": self.start, "predicted": round(self.predicted, 1)}
        return {**sizes, "graph": self.graph, **{name: part for name, part in parts.items() if part}}


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in parts.items() if round(value, 2)}


class StepTrace:
    """Wraps an engine's parts until `close`. `done` has the steps whose tokens have been read, in order."""

    def __init__(self, engine: EngineLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        self.done: list[TracedStep] = []
        self._clock = clock
        self._in_flight: dict[int, TracedStep] = {}
        """By the identity of what `launch` gave."""
        self._current: TracedStep | None = None
        self._schedule_ms = 0.0
        self._gc_ms = 0.0
        self._gc_began = 0.0
        self._replayed: set[Any] = set()
        self._undo: list[tuple[Any, str, Any]] = []
        self._engine = engine
        executor, scheduler = engine._executor, engine._scheduler
        self._wrap(scheduler, "schedule", self._around_schedule)
        self._wrap(executor, "launch", self._around_launch)
        self._wrap(executor, "read", self._around_read)
        self._wrap(engine, "_account", self._around_account)
        self._wrap(engine, "_tidy", self._around_tidy)
        self._runner = getattr(executor, "_runner", None)
        self._on_gpu = self._runner is not None and self._runner.device.type == "cuda"
        self._in_graph = False
        self._launch_began = 0.0
        self._launched: TracedStep | None = None
        if self._runner is not None:
            self._wrap_runner(executor, self._runner)
        gc.callbacks.append(self._on_gc)

    def summary(self) -> dict[str, list[float]]:
        """Of each part of the steps that are done: median, 90 %, 99 %, largest."""
        parts: defaultdict[str, list[float]] = defaultdict(list)
        for traced in self.done:
            for kind in ("host", "device"):
                for name, value in getattr(traced, kind).items():
                    parts[f"{kind}.{name}"].append(value)
        return {name: [round(sorted(values)[int(share * (len(values) - 1))], 2) for share in _SHARES] for name, values in parts.items()}

    def close(self) -> None:
        gc.callbacks.remove(self._on_gc)
        for owner, name, old in reversed(self._undo):
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        if self._on_gpu:
            torch.cuda.synchronize()
        self._measure_device()

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Have `around(inner, *arguments)` called in place of a method."""
        inner = getattr(owner, name)
        self._undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, lambda *args, **kw: around(inner, *args, **kw))

    def _wrap_runner(self, executor: Any, runner: Any) -> None:
        self._wrap(executor._table, "batch", self._timed("sampling"))
        self._wrap(runner, "execute", self._around_execute)
        self._wrap(runner, "_upload", self._timed("upload", marked=True))
        self._wrap(runner, "_forward", self._around_forward)
        if runner._graphs is not None:
            self._wrap(runner._graphs, "run", self._around_graph)
        self._wrap(runner, "_sample", self._timed("logits"))

    # ---- parts

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            if self._current is not None:
                self._current.host[name] = self._current.host.get(name, 0.0) + 1000 * (self._clock() - began)

    def _timed(self, name: str, *, marked: bool = False) -> Callable[..., Any]:
        def around(inner: Callable[..., Any], *args: Any, **kw: Any) -> Any:
            with self._part(name):
                result = inner(*args, **kw)
            if marked:
                self._mark()
            return result

        return around

    def _around_schedule(self, inner: Callable[[], Step | None]) -> Step | None:
        began = self._clock()
        step = inner()
        self._schedule_ms = 1000 * (self._clock() - began)
        return step

    def _around_launch(self, inner: Callable[..., Any], step: Step, *args: Any) -> Any:
        predicted = 1000 * self._engine.pacer.predict(step.load)
        chunk = step.starts[step.num_decodes] if step.num_decodes < len(step.starts) else 0
        traced = self._current = TracedStep(step.num_decodes, step.load.prompt_tokens, chunk, predicted)
        traced.host["schedule"] = self._schedule_ms
        before, self._launch_began = self._disturbances(), self._clock()
        with self._part("launch"):
            pending = inner(step, *args)
        traced.disturbed = {name: value - before[name] for name, value in self._disturbances().items()}
        self._in_flight[id(pending)] = traced
        self._launched = traced
        self._current = None
        return pending

    def _disturbances(self) -> dict[str, float]:
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return {
            "gc_ms": self._gc_ms,
            "preempted": usage.ru_nivcsw,
            "waited": usage.ru_nvcsw,
            "faults": usage.ru_minflt,
            "cpu_ms": 1000 * (usage.ru_utime + usage.ru_stime),
            "device_allocations": torch._C._cuda_memoryStats(0).get("num_device_alloc", 0) if self._on_gpu else 0,
        }

    def _around_execute(self, inner: Callable[..., Any], *args: Any) -> Any:
        if self._current is not None:
            host = self._current.host
            host["pack"] = 1000 * (self._clock() - self._launch_began) - host.get("sampling", 0.0)
        self._mark()
        pending = inner(*args)
        self._mark()
        return pending

    def _around_forward(self, inner: Callable[..., Any], *args: Any) -> Any:
        """Without a graph, or while one is captured."""
        if self._in_graph or self._current is None:
            return inner(*args)
        with self._part("forward"):
            result = inner(*args)
        self._current.graph = f"eager {args[1].num_tokens}"
        self._mark()
        return result

    def _around_graph(self, inner: Callable[..., Any], shape: Any) -> Any:
        assert self._runner is not None
        graphs = self._runner._graphs
        num_captures, had = len(graphs.capture_seconds), shape.graph in graphs._graphs
        self._in_graph = True
        try:
            with self._part("forward"):
                inner(shape)
        finally:
            self._in_graph = False
        if self._current is None:
            return
        captured = len(graphs.capture_seconds) != num_captures
        kind = "capture" if captured else "eager" if not had else "graph" if shape.graph in self._replayed else "first"
        if had:
            self._replayed.add(shape.graph)
        self._current.graph = f"{kind} {shape.num_tokens}"
        self._mark()

    def _around_read(self, inner: Callable[..., Any], pending: Any) -> Any:
        began = self._clock()
        result = inner(pending)
        traced = self._in_flight.pop(id(pending), None)  # None: launched before the trace began
        if traced is not None:
            traced.host["wait"] = 1000 * (self._clock() - began)
            self.done.append(traced)
        return result

    def _around_tidy(self, inner: Callable[[], None]) -> None:
        began, gc_ms = self._clock(), self._gc_ms
        inner()
        if self._launched is not None:
            self._launched.host["tidy"] = 1000 * (self._clock() - began)
            self._launched.disturbed["tidy_gc_ms"] = self._gc_ms - gc_ms

    def _around_account(self, inner: Callable[..., Any], *args: Any) -> Any:
        began, gc_ms = self._clock(), self._gc_ms
        result = inner(*args)
        if self.done:
            self.done[-1].host["account"] = 1000 * (self._clock() - began)
            self.done[-1].disturbed["account_gc_ms"] = self._gc_ms - gc_ms
        return result

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began = time.perf_counter()
        else:
            self._gc_ms += 1000 * (time.perf_counter() - self._gc_began)

    # ---- the device

    def _mark(self) -> None:
        """An event of the device, where there is one."""
        if self._current is None or not self._on_gpu:
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._current.events.append(event)

    def _measure_device(self) -> None:
        """From the events, which are four a step: before the batch's copy and after it, after the forward pass, at the end."""
        before = None
        for traced in self.done:
            events = traced.events
            if events and before is not None:
                traced.device["idle"] = before.elapsed_time(events[0])
            if len(events) == 4:
                spans = zip(("upload", "forward", "rest"), events, events[1:], strict=False)
                traced.device.update({name: first.elapsed_time(last) for name, first, last in spans})
            before = events[-1] if events else None
            traced.events = []
