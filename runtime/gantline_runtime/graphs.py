"""CUDA graphs of decode batches, so that the host launches a whole forward pass at once.

A graph is fixed in its number of sequences and in the bound on their contexts, so both are rounded up to classes. A class is captured when
it is met for the second time: the first time it runs without, which compiles and warms what it needs. Start-up waits for no capture, and a
step waits for one capture at most. All graphs share one pool of memory; their inputs and outputs are the runner's own fixed tensors.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

import torch

from gantline_runtime.batch import BatchShape

__all__ = ["DecodeGraphs", "decode_sizes"]

_MAX_SIZE = 512
_FIRST_CONTEXT = 2048
_CONTEXT_STEP = 4

Key = tuple[int, int]


def decode_sizes(max_size: int) -> list[int]:
    """Classes of batch size: 1, 2, 4, 8, then every 8 to 256, every 16 to 512. Products of up to 8 more rows cost nothing extra."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, _MAX_SIZE + 1, 16)]
    return [size for size in sizes if size < max_size] + ([max_size] if max_size <= _MAX_SIZE else [])


class DecodeGraphs:
    def __init__(self, forward: Callable[[BatchShape], None], *, max_size: int, session_len: int) -> None:
        """`forward(shape)` runs a batch of decodes from fixed inputs to fixed outputs, and never waits for the device."""
        self._forward = forward
        self._sizes = decode_sizes(max_size)
        self._contexts = [_FIRST_CONTEXT]
        while self._contexts[-1] < session_len:
            self._contexts.append(self._contexts[-1] * _CONTEXT_STEP)
        self._contexts = [min(context, session_len) for context in self._contexts]
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._met: set[Key] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self.capture_seconds: list[float] = []

    def padded(self, num_sequences: int, max_context: int) -> Key:
        """The class of a batch: (sequences, context), or (0, 0) where there is none."""
        at = bisect_left(self._sizes, num_sequences)
        if at == len(self._sizes):
            return 0, 0
        return self._sizes[at], self._contexts[bisect_left(self._contexts, max_context)]

    def run(self, shape: BatchShape) -> None:
        """Run a padded batch of decodes, by a graph if there is one by now."""
        key = (shape.num_sequences, shape.max_context_len)
        graph = self._graphs.get(key)
        if graph is None and key in self._met:
            graph = self._graphs[key] = self._capture(shape)
        if graph is None:
            self._met.add(key)
            self._forward(shape)
        else:
            graph.replay()

    def _capture(self, shape: BatchShape) -> torch.cuda.CUDAGraph:
        """Record without running. (torch.cuda.graph would wait for the device and collect garbage first, which running requests feel.)"""
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._forward(shape)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self.capture_seconds.append(time.perf_counter() - started)
        return graph
