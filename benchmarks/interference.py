"""How much long prompts delay those who decode: `python -m benchmarks.interference --model DIR [--limits 50 twice 0]`.

64 requests decode at a context of 1000 tokens; then 4 prompts of 30,000 tokens arrive at once. For each limit (`max_step_ms`; `twice` is
twice the undisturbed step, 0 none) it prints the time between tokens of the 64 while the prompts are computed, and the prompts' first-token
times, in each of `--passes`: the first of them captures graphs and teaches the prediction (and compiles kernels that are not there), and
the last is what a service that has run for a while does. With `--rested` the engine first makes ready what an idle service does. Prompts
are random and prefixes are not reused.

`--simulated`: the same on a device of known cost and a clock of its own (`simulated_device.py`), without a model or a GPU: with captures as
they come, with those that are planned, and with what an idle service makes ready.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gantline_runtime import garbage
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import EngineLoop, LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams

from benchmarks.simulated_device import VOCAB, Host, MeasuredProducts, simulated_engine
from benchmarks.step_trace import StepTrace

_QUIET_STEPS = 60
"""Undisturbed steps before the prompts arrive; their median is the undisturbed step."""
_SLOWEST = 8
_MOST_SECONDS = 20.0
"""A pass that takes longer is given up, with what it has."""


@dataclass(frozen=True)
class Pass:
    """Milliseconds."""

    limit: float
    undisturbed: float
    between_p50: float
    between_p99: float
    between_max: float
    first_tokens: list[float]
    steps: int
    slowest: list[dict[str, Any]]
    """The steps with the longest times between tokens: how long, the step's number since the prompts arrived, and where its time went
    (`step_trace.py`)."""
    parts: dict[str, list[float]]
    """Of all steps: the median, 90 %, 99 % and the largest of each part."""


class _Crowd:
    """Adds requests of random tokens, and steps the engine."""

    def __init__(self, engine: EngineLoop, vocab_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine = engine
        self.clock = clock
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._names: list[str] = []

    def prompt(self, length: int) -> list[int]:
        """Takes a millisecond for 5000 tokens, so not while anybody is timed."""
        return [self._random.randrange(self._vocab_size) for _ in range(length)]

    def add(self, name: str, prompt: list[int], count: int) -> None:
        sampling = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
        self._names.append(name)
        self.engine.add_request(EngineRequest(request_id=name, prompt_ids=prompt, sampling=sampling))

    def step(self) -> tuple[list[str], float]:
        """Who got a token, and when."""
        outputs = self.engine.step()
        failed = next((output for output in outputs if output.finish_reason == "error"), None)
        if failed is not None:
            raise RuntimeError(f"{failed.request_id}: {failed.error}")
        return [output.request_id for output in outputs], self.clock()

    @property
    def num_captures(self) -> int:
        return self.engine.stats().num_captures

    def leave(self) -> None:
        for name in self._names:
            self.engine.abort(name)
        self._names.clear()
        while self.engine.has_work():
            self.engine.step()


def run_pass(crowd: _Crowd, limit_ms: float | None, *, decoding: int, context: int, prompts: int, length: int) -> Pass:
    """`limit_ms` None: twice the undisturbed step, once that is known."""
    pacer = crowd.engine.pacer
    pacer.max_step_s = 0.0  # the ones that will decode come in as fast as they can
    for i in range(decoding):
        crowd.add(f"decode-{i}", crowd.prompt(context), 20_000)
    arriving = [crowd.prompt(length) for _ in range(prompts)]
    last: dict[str, float] = {}
    while len(last) < decoding:
        names, now = crowd.step()
        last.update(dict.fromkeys(names, now))
    quiet: list[float] = []
    while len(quiet) < _QUIET_STEPS:
        names, now = crowd.step()
        quiet.append(now - last[names[0]])
        last.update(dict.fromkeys(names, now))
    undisturbed = statistics.median(quiet)
    pacer.max_step_s = 2 * undisturbed if limit_ms is None else limit_ms / 1000
    for i in range(prompts):
        crowd.add(f"prompt-{i}", arriving.pop(), 64)  # held by nobody afterwards, as in a service
    gaps, of_steps, first, began, steps = [], [], {}, crowd.clock(), 0
    trace = StepTrace(crowd.engine, crowd.clock)
    while len(first) < prompts and crowd.clock() - began < _MOST_SECONDS:
        num_done = len(trace.done)
        names, now = crowd.step()
        steps += 1
        if "decode-0" in names and len(trace.done) > num_done:
            of_steps.append((now - last["decode-0"], steps, len(trace.done) - 1))
        for name in names:
            if name.startswith("prompt"):
                first.setdefault(name, now - began)
            else:
                gaps.append(now - last[name])
                last[name] = now
    trace.close()
    limit = 1000 * pacer.max_step_s
    crowd.leave()
    gaps.sort()
    ms = [round(1000 * x, 2) for x in (undisturbed, gaps[len(gaps) // 2], gaps[int(0.99 * len(gaps))], gaps[-1])]
    slowest = [_described(trace, *step) for step in sorted(of_steps, reverse=True)[:_SLOWEST]]
    return Pass(round(limit, 2), *ms, sorted(round(1000 * x) for x in first.values()), steps, slowest, trace.summary())


def _described(trace: StepTrace, gap: float, number: int, at: int) -> dict[str, Any]:
    """`meanwhile`: what the host did between the step's launch and its end, for the next."""
    following = trace.done[at + 1].as_dict() if at + 1 < len(trace.done) else {}
    meanwhile = {name: following.get("host", {}).get(name, 0.0) for name in ("schedule", "launch", "tidy")}
    disturbed = following.get("disturbed", {})
    return {"ms": round(1000 * gap, 1), "step": number, **trace.done[at].as_dict(), "meanwhile": {**meanwhile, **disturbed}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--simulated", action="store_true", help="a device of known cost, instead of a model")
    parser.add_argument("--rested", action="store_true", help="first capture what a service captures while it rests")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--limits", nargs="+", default=["50", "twice", "0"])
    parser.add_argument("--decoding", type=int, default=64)
    parser.add_argument("--context", type=int, default=1000, help="tokens of those that decode")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=30_000)
    parser.add_argument("--passes", type=int, default=3, help="of each limit")
    options = parser.parse_args()
    if options.simulated:
        for captures, rested in (("as they come", False), ("planned", False), ("planned", True)):
            print(json.dumps({"captures": captures, "rested": rested}), flush=True)
            _run_passes(_simulated_crowd(options, planned=captures == "planned"), options, rested=rested)
        return
    if options.model is None:
        parser.error("give --model or --simulated")
    facts = json.loads((options.model / "config.json").read_text())
    session_len = min(facts["max_position_embeddings"], _session_len(options))
    config = EngineConfig(backend=options.backend, session_len=session_len, max_batch_size=128, enable_prefix_caching=False)
    engine = LLMEngine(options.model, config)
    garbage.settle()  # as the engine's own process does
    garbage.collect_by_hand()
    print(json.dumps({"load_seconds": round(engine.stats().load_seconds, 2)}), flush=True)
    _run_passes(_Crowd(engine, facts["vocab_size"]), options, rested=options.rested)
    engine.close()


def _session_len(options: argparse.Namespace) -> int:
    return int(max(options.length, options.context + 20_000)) + 64


def _simulated_crowd(options: argparse.Namespace, *, planned: bool) -> _Crowd:
    """Of an 8B model on a GPU on which 64 requests at a context of 1000 decode in 9 ms. A launch kernel by kernel and a capture cost the
    host what they did on an H100's machine (docs/perf-log.md)."""
    settings = {"session_len": _session_len(options), "num_cache_blocks": 1 << 14}
    host = Host(step=1.5e-3, eager=33e-3, capture=29e-3)
    engine, executor = simulated_engine(MeasuredProducts(), host, graphs=True, enable_prefix_caching=False, **settings)
    if not planned:
        engine._captures.allow = lambda _: Captures.ANY  # type: ignore[method-assign]
    return _Crowd(engine, VOCAB, lambda: executor.now)


def _run_passes(crowd: _Crowd, options: argparse.Namespace, *, rested: bool) -> None:
    began = crowd.clock()
    while rested and crowd.engine.prepare():
        pass
    if rested:
        print(json.dumps({"made ready": crowd.num_captures, "seconds": round(crowd.clock() - began, 2)}), flush=True)
    sizes = {"decoding": options.decoding, "context": options.context, "prompts": options.prompts}
    for limit in [limit for limit in options.limits for _ in range(options.passes)]:
        found = run_pass(crowd, None if limit == "twice" else float(limit), length=options.length, **sizes)
        stats = crowd.engine.stats()
        captures = {"captures": stats.num_captures, "longest_capture_ms": round(1000 * stats.longest_capture_s, 1)}
        slowest, parts = (figures := asdict(found)).pop("slowest"), figures.pop("parts")
        print(json.dumps({"asked": limit, **figures, **captures}), flush=True)
        print("   ", json.dumps(parts), flush=True)
        for step in slowest:
            print("   ", json.dumps(step), flush=True)


if __name__ == "__main__":
    main()
