"""The engine's own time per step, with a model that costs nothing: `python -m benchmarks.host_step`.

Everything that the host does is there (scheduling, packing the batch with its block tables, sampling parameters, late results,
post-processing, encoding the outputs for the API process), only the device is not: tokens are constants. Steady decoding, and chat: each
finished request makes room for one whose prompt is prefilled in the same step. Processor time of the one thread, which other work on the
machine hardly changes; the parts are wall time. Limits, launches included: 1 ms at 16 running, 3 ms at 256, 5 ms at 512.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from typing import Any

import msgspec
import numpy as np
from gantline_runtime.batch import BatchLimits, pack_batch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.executor import MemoryReport
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.sampling import SamplingTable
from gantline_runtime.scheduler import Step

LIMITS_MS = {16: 1.0, 256: 3.0, 512: 5.0}
_VOCAB = 128_256
_SESSION = 8192
_BLOCK = 64
_WORDS = (
    *((token,) for token in range(500, 628)),
    *((token, 7) for token in range(500, 692)),
    *((1, token, 7) for token in range(500, 692)),
)
_EDITS: dict[str, dict[str, Any]] = {
    "edited": {"logit_bias": dict.fromkeys(range(30), 1.0), "bad_words": ((5, 6), (7, 8, 9))},
    "much edited": {"logit_bias": dict.fromkeys(range(300), 1.0), "bad_words": _WORDS},
}
"""The second: 300 biases and 256 bad words, each in two spellings, of which 192 are begun in every step."""
_REPORT_STEPS = 50
"""Between two reports, which come twice a second."""


class FreeExecutor:
    """Packs every batch as the real one does, and answers with token 1."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.session_len is not None and config.num_cache_blocks is not None
        self.config = config
        self.depth = 1
        self.num_blocks = config.num_cache_blocks
        self.limits = BatchLimits(config.max_prefill_token_num, config.max_batch_size + 1, -(-config.session_len // config.block_size))
        self.memory = MemoryReport(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.failed = False
        self.capture_seconds: list[float] = []
        self.launch_seconds: list[float] = []
        self.graph_tokens = ()
        self._classes = GraphClasses(
            max_sequences=config.max_batch_size, max_tokens=config.max_prefill_token_num, session_len=config.session_len
        )
        self._table = SamplingTable(self.limits.max_slots)
        self._buffer = np.zeros(self.limits.max_words, dtype=np.int32)

    def launch(self, step: Step, cache: CacheManager, masks: Any = None) -> Any:
        pack_batch(
            self._buffer,
            step,
            tables=cache.tables,
            updates=cache.take_table_updates(),
            block_size=cache.block_size,
            groups=cache.groups,
            pad=self._classes.pad,
        )
        self._table.batch(step)
        return np.ones(len(step.samples), dtype=np.int64)

    def read(self, pending: Any) -> Any:
        return pending.tolist(), None, ()

    def prepare(self) -> bool:
        return False

    def check(self) -> None: ...

    def close(self) -> None: ...


def _engine(running: int) -> EngineLoop:
    config = EngineConfig(
        session_len=_SESSION, num_cache_blocks=running * _SESSION // _BLOCK, block_size=_BLOCK, max_batch_size=running, max_waiting=100_000
    )
    return EngineLoop(FreeExecutor(config), vocab_size=_VOCAB, eos_token_ids=(2,))


def _request(name: int, rng: random.Random, prompt_len: int, count: int, sampling: dict[str, Any]) -> EngineRequest:
    prompt = [rng.randrange(_VOCAB) for _ in range(prompt_len)]
    params = SamplingParams(max_new_tokens=count, ignore_eos=True, **sampling)
    marks = [(place, rng.getrandbits(53)) for place in range(_BLOCK, prompt_len, _BLOCK)]  # as the server gives them with every request
    return EngineRequest(request_id=f"request-{name}", prompt_ids=prompt, sampling=params, prefix_marks=marks)


def measure(running: int, *, chat: bool, sampling: dict[str, Any], steps: int = 400) -> dict[str, float]:
    """Milliseconds of one step: median and 99th percentile, and the median by part."""
    rng, engine, encoder = random.Random(0), _engine(running), msgspec.msgpack.Encoder()
    count = 280 if chat else _SESSION - 1024
    for i in range(running + (steps * running // 280 + running if chat else 0)):
        engine.add_request(_request(i, rng, 220, rng.randint(1, 2 * count) if chat else count, sampling))
    while engine.stats().num_running < running:
        engine.step()
    for _ in range(20):
        engine.step()
    gc.collect()
    gc.freeze()
    times = []
    before = engine.stats().step_times
    for step in range(steps):
        started = time.thread_time()
        encoder.encode(engine.step())
        if step % _REPORT_STEPS == 0:
            encoder.encode(engine.take_prefix_changes())
        times.append((time.thread_time() - started) * 1e3)
    after = engine.stats().step_times
    gc.unfreeze()
    parts = {
        name: round((getattr(after, f"{name}_s") - getattr(before, f"{name}_s")) / steps * 1e3, 3)
        for name in ("schedule", "launch", "postprocess")
    }
    return {"median_ms": round(statistics.median(times), 3), "p99_ms": round(sorted(times)[int(steps * 0.99)], 3), **parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 256, 512])
    parser.add_argument("--check", action="store_true", help="fail if a median exceeds its limit")
    options = parser.parse_args()
    slow = 0
    for running in options.running:
        for name, chat, sampling in (
            ("decode, greedy", False, {"temperature": 0.0}),
            ("decode, sampled", False, {"temperature": 0.8, "top_p": 0.9, "seed": 1}),
            ("chat, greedy", True, {"temperature": 0.0}),
            *((f"{load}, {name}", load == "chat", edits) for load in ("decode", "chat") for name, edits in _EDITS.items()),
        ):
            result = measure(running, chat=chat, sampling=sampling)
            limit = next((ms for size, ms in LIMITS_MS.items() if running <= size), LIMITS_MS[512])
            slow += result["median_ms"] > limit
            print(f"{running:4d} running, {name:19s} {json.dumps(result)}  limit {limit} ms", flush=True)
    return 1 if slow and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
