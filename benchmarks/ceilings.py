"""What the machine's memory and matrix units reach, measured in the same call as every figure: machines differ by several per cent."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

__all__ = ["graph_median_ms", "measure"]


def graph_median_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds of one replay of `run` captured as a CUDA graph."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure() -> dict[str, float]:
    """{copy_TB_s, read_TB_s, bf16_TFLOP_s}: 4 GiB read and 4 GiB written (both counted), a 4 GiB sum, an 8192-cubed product of random data.

    What is written is the negated source: a plain copy in a graph goes to the copy engines, which reach four fifths of the rate.
    """
    copy, read = _memory_TB_s()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / graph_median_ms(lambda: a @ b) / 1e9
    return {"copy_TB_s": round(copy, 3), "read_TB_s": round(read, 3), "bf16_TFLOP_s": round(product, 1)}


def _memory_TB_s() -> tuple[float, float]:
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    rows = source.view(torch.float32).view(-1, 4096).nan_to_num_()
    target = torch.empty_like(rows)
    copy_ms = graph_median_ms(lambda: torch.neg(rows, out=target))
    read_ms = graph_median_ms(lambda: torch.sum(rows, dim=1))
    return 2 * source.numel() / copy_ms / 1e9, source.numel() / read_ms / 1e9


if __name__ == "__main__":
    print(json.dumps(measure()))
