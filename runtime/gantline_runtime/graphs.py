"""CUDA graphs of whole forward passes, so that the host launches a step's hundreds of kernels at once.

A class of batches (`graph_classes.py`) is captured when it is met for the second time: the first time it runs without, which compiles and
warms what it needs. Start-up waits for no capture, and a step waits for one capture at most. All graphs share one pool of memory, taken
when the cache is; their inputs and outputs are the runner's own fixed tensors. Where even that is not enough, or there are `MAX_GRAPHS`,
no more are captured, and batches of further classes run without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from gantline_runtime.batch import BatchShape
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.sizing import MAX_GRAPHS

__all__ = ["StepGraphs", "take_product_workspace"]

log = logging.getLogger(__name__)


def take_product_workspace(device: torch.device) -> None:
    """Have the vendor's library take the memory that it keeps for products on the current stream: with the first of them, for ever."""
    small = torch.ones((128, 128), device=device, dtype=torch.bfloat16)
    torch.mm(small, small)


class StepGraphs:
    def __init__(self, forward: Callable[[BatchShape], None], classes: GraphClasses, *, device: torch.device, pool_bytes: int) -> None:
        """`forward(shape)` runs a padded batch from fixed inputs to fixed outputs, and never waits for the device. `pool_bytes` are what
        the activations of the largest class take."""
        self._forward = forward
        self._classes = classes
        self._graphs: dict[BatchShape, torch.cuda.CUDAGraph] = {}
        self._met: set[BatchShape] = set()
        self._may_capture = True
        self.capture_seconds: list[float] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._reserved = self._reserve(device, pool_bytes)

    def pad(self, shape: BatchShape) -> BatchShape:
        """What a batch is to be padded to; its own shape where it is to run without a graph."""
        padded = self._classes.pad(shape)
        return padded if self._may_capture or _key(padded) in self._graphs else shape

    def run(self, shape: BatchShape) -> None:
        """Run a padded batch, by a graph if there is one by now."""
        key = _key(shape)
        graph = self._graphs.get(key)
        if graph is None and key in self._met and self._may_capture:
            graph = self._capture_if_possible(shape, key)
        if graph is None:
            self._met.add(key)
            self._forward(shape)
        else:
            graph.replay()

    def release(self) -> None:
        """Destroy all; none can be run or captured afterwards. Waits for none that is under way: it may wait for a rank that is gone."""
        for graph in (*self._graphs.values(), self._reserved):
            graph.reset()
        self._graphs.clear()

    def _capture_if_possible(self, shape: BatchShape, key: BatchShape) -> torch.cuda.CUDAGraph | None:
        try:
            graph = self._graphs[key] = self._capture(shape)
        except torch.OutOfMemoryError as error:
            self._may_capture = False
            log.warning("no memory for a CUDA graph of %s; from now on none is captured: %s", key, error)
            return None
        if len(self._graphs) >= MAX_GRAPHS:
            self._may_capture = False
            log.warning("%d CUDA graphs are captured; batches of further classes run without", MAX_GRAPHS)
        return graph

    def _capture(self, shape: BatchShape) -> torch.cuda.CUDAGraph:
        started = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = self._record(lambda: self._forward(shape))
        torch.cuda.current_stream().wait_stream(self._stream)
        self.capture_seconds.append(time.perf_counter() - started)
        return graph

    def _record(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Record without running. (torch.cuda.graph would wait for the device and collect garbage first, which running requests feel.)"""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the cause is what counts
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def _reserve(self, device: torch.device, num_bytes: int) -> torch.cuda.CUDAGraph:
        """Fill the pool with one block, which the activations of every graph are cut from: taken one by one, classes of growing sizes
        would each add blocks of their own. The graph that is returned keeps the pool; it is never replayed."""
        with torch.cuda.stream(self._stream):  # not in the middle of that block
            take_product_workspace(device)
        torch.cuda.synchronize(device)
        return self._record(lambda: torch.empty(max(num_bytes, 1 << 20), dtype=torch.uint8, device=device)[:1].zero_())


def _key(shape: BatchShape) -> BatchShape:
    return shape._replace(num_samples=0, num_updates=0)
