"""Decode attention by Triton's kernels and the CUDA C++ one: `python -m benchmarks.tune_decode [--parts] [SHAPE ...]`.

As planned, with the exact bound on contexts and with one four times as high, as a graph may have; with `--parts`, by how contexts are cut.
Every result is compared with Triton's, twice, and the counters must be zero afterwards; then it is timed over input sets that together
exceed the second-level cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gantline_kernels import scratch
from gantline_kernels.hopper_decode import HopperDecodePlan, hopper_decode, plan_hopper_decode
from gantline_kernels.triton_kernels.decode import decode_attention

from benchmarks import ceilings
from benchmarks.kernels import DIM, KV_HEADS, mixed_contexts, paged_inputs

SHAPES: dict[str, list[int]] = {
    "1 x 32k": [32768], "1 x 8k": [8192], "1 x 1k": [1024], "4 x 8k": [8192] * 4, "9 x 8k": [8192] * 9, "16 x 8k": [8192] * 16,
    "16 x 512": [512] * 16, "16 x 2k": [2048] * 16, "4 x 512-32k": [512, 32768, 2000, 9000], "16 x 1-16k": mixed_contexts(16),
    "64 x 1k": [1024] * 64, "256 x 1k": [1024] * 256, "128 x 1-16k": mixed_contexts(),
}  # fmt: skip
Run = Callable[[int], object]
"""Attend the queries of one set of inputs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--parts", action="store_true", help="by numbers of parts and of warps")
    arguments = parser.parse_args()
    print(ceilings.measure(), torch.cuda.get_device_name(), flush=True)
    for name in arguments.shapes or SHAPES:
        compare(name, SHAPES[name], arguments.parts)
        torch.cuda.empty_cache()
    return 0


def plans(batch: int, longest: int) -> Iterator[HopperDecodePlan]:
    pairs, sms = batch * KV_HEADS, torch.cuda.get_device_properties(0).multi_processor_count
    for warps, per_sm in ((8, 1), (4, 2), (4, 1)):
        fill = max(1, sms * per_sm // pairs)
        for parts in sorted({fill, fill + 1, -(-longest // 4096), -(-longest // 2048)}):
            if parts <= 128 and (parts - 1) * 128 < longest and parts * pairs <= 4200:
                yield HopperDecodePlan(parts, 128, warps)


def compare(name: str, contexts: list[int], by_parts: bool) -> None:
    total, longest, batch = sum(contexts) * 4 * KV_HEADS * DIM, max(contexts), len(contexts)
    sets = [paged_inputs([1] * batch, contexts) for _ in range(max(1, min(64, 220_000_000 // total + 1)))]
    out = [torch.empty_like(one[0]) for one in sets]

    def attend(run: Callable[..., object], bound: int, i: int) -> None:
        q, keys, values, tables, _, lens = sets[i]
        run(q, keys, values, tables, lens, out[i], DIM**-0.5, bound, 0, 0.0)

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    attend(decode_attention, longest, 0)
    expected = out[0].float().clone()
    for bound in (longest, 4 * longest):
        label = f"{name} | bound {bound}"
        triton = partial(attend, decode_attention, bound)
        triton(0)
        print(f"{label} | triton | {_time(triton, len(sets)):.1f} us | floor at 4.4 TB/s {total / 4.4e6:.1f}", flush=True)
        chosen = [plan_hopper_decode(batch, KV_HEADS, DIM, bound, sms)]
        for plan in chosen + (list(plans(batch, longest)) if by_parts and bound == longest else []):
            run = partial(attend, partial(hopper_decode, plan=plan), bound)
            results = []
            for _ in range(2):
                out[0].fill_(torch.nan)
                run(0)
                results.append(out[0].clone())
            apart, same = float((results[0].float() - expected).abs().max()), torch.equal(*results)
            us = _time(run, len(sets))
            clean = all(not bool(memory.any()) for memory in scratch._memory.values() if isinstance(memory, torch.Tensor))
            print(f"{label} | cuda {plan.parts} parts >= {plan.least}, {plan.warps} warps | {us:.1f} us | {apart:.4f} apart,"
                  f" repeats {same}, counters zero {clean}", flush=True)  # fmt: skip
        print(f"{label} | triton again | {_time(triton, len(sets)):.1f} us", flush=True)


def _time(run: Run, count: int) -> float:
    return 1e3 * ceilings.graph_median_ms(lambda: [run(i) for i in range(count)], repeats=30) / count


if __name__ == "__main__":
    sys.exit(main())
