"""Random arrivals, lengths, cancellations and sampling settings at a full cache: `python -m benchmarks.soak --model DIR [--minutes 5]`.

Ends with every request accounted for, every block free and the cache's integrity clean; exits with 1 otherwise. Every finished request has
the number of tokens that was asked for, and no token of an aborted one is heard of again. With few --blocks and --long-answers
(more than was seen when a request was admitted), preemption is frequent; with --share 0.9 and neither, memory is as scarce as it gets. A
minute of each is the short form.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gantline_runtime import garbage
from gantline_runtime.compilation import loaded_kernels
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import EngineLoop, LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.request import QueueFull
from tqdm import tqdm

_CHECK_EVERY = 500
_LONGEST_PROMPT = 8192


@dataclass
class _Ledger:
    """What was asked for and what came."""

    wanted: dict[str, int] = field(default_factory=dict)
    got: dict[str, int] = field(default_factory=dict)
    added: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    longest_step_s: float = 0.0


@dataclass(frozen=True)
class Lengths:
    """Tokens, each log-normal: the logarithm's mean and deviation."""

    prompts: tuple[float, float]
    answers: tuple[float, float]

    def prompt(self, rng: random.Random) -> int:
        return max(1, int(rng.lognormvariate(*self.prompts)))

    def answer(self, rng: random.Random) -> int:
        return max(1, int(rng.lognormvariate(*self.answers)))


PROMPTS, ANSWERS = Lengths((5.5, 1.2), (5.0, 1.0)), Lengths((4.0, 1.0), (6.5, 0.7))


def _random_sampling(rng: random.Random, count: int, vocab: int) -> SamplingParams:
    settings: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True, "temperature": 0.0}
    if rng.random() < 0.5:
        settings |= {"temperature": rng.uniform(0.1, 1.8), "seed": rng.getrandbits(31)}
        settings |= {"top_k": rng.choice([0, 1, 40]), "top_p": rng.choice([1.0, 0.9]), "min_p": rng.choice([0.0, 0.05])}
    if rng.random() < 0.1:
        settings |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    if rng.random() < 0.05:
        settings |= {"logit_bias": {rng.randrange(min(1000, vocab)): rng.uniform(-5, 5) for _ in range(10)}}
        settings |= {"min_new_tokens": 4, "stop_token_ids": (1, 2)}
    if rng.random() < 0.05:
        settings["num_logprobs"] = rng.randint(0, 20)
    return SamplingParams(**settings)


def _arrive(engine: EngineLoop, ledger: _Ledger, rng: random.Random, shared: list[int], vocab: int, lengths: Lengths) -> None:
    length = min(len(shared), lengths.prompt(rng))
    kept = rng.randrange(length) if rng.random() < 0.4 else 0
    prompt = (shared[:kept] + [rng.randrange(vocab) for _ in range(length)])[:length]
    count = min(engine.session_len - length, lengths.answer(rng))
    sampling = _random_sampling(rng, count, vocab)
    name = f"soak-{ledger.added}"
    read = rng.randint(0, 5) if rng.random() < 0.03 else None
    try:
        engine.add_request(EngineRequest(request_id=name, prompt_ids=prompt, sampling=sampling, num_prompt_logprobs=read))
    except QueueFull:
        ledger.refused += 1
        return
    ledger.added += 1
    ledger.wanted[name] = 0 if sampling.stop_token_ids else count


def _step(engine: EngineLoop, ledger: _Ledger) -> None:
    started = time.perf_counter()
    outputs = engine.step()
    ledger.longest_step_s = max(ledger.longest_step_s, time.perf_counter() - started)
    for output in outputs:
        name = output.request_id
        if name not in ledger.wanted:
            raise AssertionError(f"{name} is heard of after its end")
        ledger.got[name] = ledger.got.get(name, 0) + len(output.token_ids)
        if output.finish_reason is not None:
            wanted = ledger.wanted.pop(name)
            if output.finish_reason not in ("stop", "length") or (wanted and ledger.got[name] != wanted):
                raise AssertionError(f"{name} ended by {output.finish_reason!r} with {ledger.got[name]} tokens of {wanted}")
            del ledger.got[name]
            ledger.finished += 1


def soak(engine: EngineLoop, *, seconds: float, vocab: int, seed: int = 0, lengths: Lengths = PROMPTS) -> _Ledger:
    """Run for `seconds`, then to the end. Raises AssertionError for anything that is wrong."""
    rng, ledger = random.Random(seed), _Ledger()
    shared = [rng.randrange(vocab) for _ in range(min(engine.session_len - 2, _LONGEST_PROMPT))]
    started, steps = time.monotonic(), 0
    arriving = tqdm(total=round(seconds), desc="arrivals", unit="s", mininterval=5)
    while (now := time.monotonic()) < started + seconds:
        arriving.update(int(now - started) - arriving.n)
        while len(ledger.wanted) < 2 * engine.config.max_batch_size and rng.random() < 0.7:
            _arrive(engine, ledger, rng, shared, vocab, lengths)
        if ledger.wanted and rng.random() < 0.05:
            name = rng.choice(list(ledger.wanted))
            engine.abort(name)
            del ledger.wanted[name]
            ledger.got.pop(name, None)
            ledger.aborted += 1
        _step(engine, ledger)
        steps += 1
        if steps % _CHECK_EVERY == 0:
            engine.check_integrity()
    arriving.close()
    left = len(ledger.wanted)
    ending = tqdm(total=left, desc="what is left", unit=" requests", mininterval=5)
    while engine.has_work():
        _step(engine, ledger)
        ending.update(left - len(ledger.wanted) - ending.n)
    ending.close()
    engine.check_integrity()
    stats = engine.stats()
    assert not ledger.wanted, f"{len(ledger.wanted)} requests never ended"
    assert (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0), "the engine is not empty"
    return ledger


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--blocks", type=int, help="cache blocks; few make preemption frequent")
    parser.add_argument("--long-answers", action="store_true", help="short prompts, long answers: more is preempted")
    parser.add_argument("--share", type=float, default=0.9, help="cache_max_entry_count")
    parser.add_argument("--backend", choices=("auto", "cuda", "triton", "torch"), default="auto")
    parser.add_argument("--max-batch-size", type=int, default=256)
    options = parser.parse_args()
    config = EngineConfig(
        backend=options.backend,
        max_batch_size=options.max_batch_size,
        num_cache_blocks=options.blocks,
        cache_max_entry_count=options.share,
    )
    engine = LLMEngine(options.model, config)
    garbage.settle()  # as the engine's own process does: a full collection takes as long as three captures
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    ledger = soak(engine, seconds=options.minutes * 60, vocab=vocab, lengths=ANSWERS if options.long_answers else PROMPTS)
    counts = {name: value for name, value in asdict(ledger).items() if isinstance(value, (int, float))}
    stats = engine.stats()
    more = {"preemptions": stats.num_preemptions, "tokens": stats.num_generated_tokens, "steps": stats.num_steps}
    captures = {"captures": stats.num_captures, "longest_capture_s": stats.longest_capture_s}
    memory = {"free_bytes": torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None, "memory": asdict(stats.memory)}
    print(json.dumps({**counts, **more, **captures, **memory, "kernels": loaded_kernels()}))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
