"""Where a step's time goes: `python -m benchmarks.profile_step --model DIR [--running 256] [--prompt 512]`.

Fills the engine with decoding requests, then traces some steps: GPU time by kernel, the wall time, and the hole between the two. With
--prefill it traces the steps that compute prompts instead. A trace slows the host; its wall time is an upper bound.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams
from torch.profiler import ProfilerActivity, profile


def trace(engine: LLMEngine, steps: int) -> None:
    """Print the time of `steps` steps by kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    kernels = sorted(recorded.key_averages(), key=lambda k: -k.self_device_time_total)
    busy = sum(k.self_device_time_total for k in kernels) / 1e3
    print(f"{steps} steps: wall {wall * 1e3 / steps:.3f} ms a step, kernels {busy / steps:.3f} ms a step")
    for kernel in kernels[:25]:
        each = kernel.self_device_time_total
        print(f"  {each / 1e3 / steps:8.4f} ms {each / max(busy * 1e3, 1e-9):6.1%} {kernel.count / steps:7.1f} x  {kernel.key[:100]}")


def untraced(engine: LLMEngine, steps: int) -> None:
    torch.cuda.synchronize()
    before, started = engine.stats().step_times, time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    wall, after = time.perf_counter() - started, engine.stats().step_times
    names = ("schedule_s", "launch_s", "wait_s", "postprocess_s")
    parts = {n: round((getattr(after, n) - getattr(before, n)) * 1e3 / steps, 3) for n in names}
    print(f"untraced: {wall * 1e3 / steps:.3f} ms a step; host, ms a step: {parts}")


def fill(engine: LLMEngine, repeat: int, options: argparse.Namespace, num_logprobs: int) -> None:
    rng = random.Random(1)
    for i in range(options.running):
        prompt = [rng.randrange(1000, 120_000) for _ in range(options.prompt)]
        wanted = 0 if i < num_logprobs else None
        sampling = SamplingParams(max_new_tokens=40 + 4 * options.steps, temperature=0.0, ignore_eos=True, num_logprobs=wanted)
        engine.add_request(EngineRequest(request_id=f"{repeat}.{i}", prompt_ids=prompt, sampling=sampling))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--backend", choices=("auto", "cuda", "triton", "torch"), default="auto")
    options = parser.parse_args()
    engine = LLMEngine(options.model, EngineConfig(backend=options.backend, dtype="bfloat16", max_batch_size=512, max_waiting=4096))
    for repeat, num_logprobs in enumerate((0, 0, 8)):
        engine.reset_prefix_cache()
        fill(engine, repeat, options, num_logprobs)
        if repeat == 1 and options.prefill:
            trace(engine, options.steps)
        while engine.stats().num_waiting:
            engine.step()
        for _ in range(20):
            engine.step()
        if repeat:
            print(f"{options.running} running, {num_logprobs} of them want log-probabilities")
            untraced(engine, options.steps)
            trace(engine, options.steps)
        while engine.has_work():
            engine.step()
    engine.close()


if __name__ == "__main__":
    main()
