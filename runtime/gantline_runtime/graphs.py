"""CUDA graphs of whole forward passes, so that the host launches a step's hundreds of kernels at once.

Which of them are captured says the plan (`graph_plan.py`), and in which steps `capture_pacing.py`: start-up waits for no capture, and a
step waits for one at most. All graphs share one pool of memory, taken when the cache is; their inputs and outputs are the runner's own
fixed tensors. Where even that is not enough no more are captured, and batches of further classes run without.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from gantline_runtime import garbage
from gantline_runtime.batch import BatchShape
from gantline_runtime.graph_plan import GraphPlan

__all__ = ["StepGraphs", "take_product_workspace"]

log = logging.getLogger(__name__)


def take_product_workspace(device: torch.device) -> None:
    """Have the vendor's library take the memory that it keeps for products on the current stream: with the first of them, for ever."""
    small = torch.ones((128, 128), device=device, dtype=torch.bfloat16)
    torch.mm(small, small)


class StepGraphs:
    def __init__(
        self,
        forward: Callable[[BatchShape], None],
        plan: GraphPlan,
        *,
        device: torch.device,
        pool_bytes: int,
        launch_seconds: deque[float],
        direct: bool,
    ) -> None:
        """`forward(shape)` runs a padded batch from fixed inputs to fixed outputs, and never waits for the device. `pool_bytes` are what
        the activations of the largest class take. `launch_seconds` gets the host's time of each run without a graph. `direct`: wide classes
        are captured without having run before, since a start has loaded all their kernels (`ModelRunner.load_kernels`)."""
        self.plan = plan
        self.capture_seconds: list[float] = []
        self._forward = forward
        self._launch_seconds = launch_seconds
        self._direct = direct
        self._graphs: dict[BatchShape, torch.cuda.CUDAGraph] = {}
        self._warm: set[BatchShape] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._reserved = self._reserve(device, pool_bytes)

    def run(self, shape: BatchShape) -> None:
        """Run a padded batch, by a graph if there is one by now. A class whose kernels may not be there runs without first, and is captured
        afterwards if it is to be: a capture can neither compile a kernel nor load one."""
        key = shape.graph
        if shape.capture and (key in self._warm or (self._direct and self.plan.is_wide(key))):
            self._capture_if_possible(shape)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        started = time.perf_counter()
        self._forward(shape)
        self._launch_seconds.append(time.perf_counter() - started)
        first = key not in self._warm
        self._warm.add(key)
        if shape.capture and first:
            self._capture_if_possible(shape)

    def release(self) -> None:
        """Destroy all; none can be run or captured afterwards. Waits for none that is under way: it may wait for a rank that is gone."""
        for graph in (*self._graphs.values(), self._reserved):
            graph.reset()
        self._graphs.clear()

    def _capture_if_possible(self, shape: BatchShape) -> None:
        try:
            self._graphs[shape.graph] = self._capture(shape)
        except torch.OutOfMemoryError as error:
            self.plan.give_up(shape.graph, error)
        except RuntimeError as error:
            if shape.graph in self._warm:
                raise
            log.warning("a CUDA graph could not be captured before its class had run: %s", error)
            self._direct = False
        else:
            self.plan.captured(shape.graph)

    def _capture(self, shape: BatchShape) -> torch.cuda.CUDAGraph:
        started = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        with garbage.held_back():
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
