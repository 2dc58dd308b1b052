"""Decoding under grammars against free decoding: `python -m benchmarks.grammar --model DIR`.

64 requests run, each with a JSON schema of its own (an endless array of objects, so that no answer ends before its limit), greedy:

    free     without grammars
    cold     with grammars that were never met: their compilation counts, from the first request's arrival
    warm     with the same grammars again, from the cache
    half     every other request with a grammar, from the cache

Each is timed from the arrival of the first request to the end of the last, the prefix cache emptied before; `warm / free` is the figure.
A model without a real tokenizer gets one made up of 128,000 syllables, numbers and punctuation. `--host` needs no model: it measures the
host's time for the masks of one step alone, with 128,256 tokens, and the steps of an engine whose device sleeps `--device-ms` a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import EngineLoop, LLMEngine
from gantline_runtime.grammar.requests import Grammars
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.memory import available_cpus
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.request import Sequence
from gantline_runtime.scheduler import Step
from gantline_runtime.server.json_schema import prepare_schema
from gantline_runtime.server.structured import Constraint, json_format
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.host_step import FreeExecutor

VOCABULARY = 128_256
_NUM_SPECIAL = 256
_KINDS = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "number", "minimum": 0},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue", "none of them"]},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
)


def schema(number: int) -> dict[str, Any]:
    """An endless array of objects with six properties, their names and types those of `number` alone."""
    rng = random.Random(number)
    properties = {f"{rng.choice(_SYLLABLES)}{rng.choice(_SYLLABLES)}_{number}_{i}": rng.choice(_KINDS) for i in range(6)}
    item = {"type": "object", "properties": properties, "required": list(properties)[:4], "additionalProperties": False}
    return {"type": "array", "items": item, "minItems": 1000}


def grammar(number: int) -> str:
    return Constraint(json_format(prepare_schema(schema(number), "", strict=False)), "").grammar


_SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on", "um")]


def made_up_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """All bytes; words with and without a space before them; numbers; punctuation and white space; then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = dict.fromkeys(alphabet)
    marks = ['"', "{", "}", "[", "]", ":", ",", ".", "-", "(", ")", "/", "'", "_", "=", "\\", "<", ">", "?", "!"]
    texts |= dict.fromkeys(a + b for a in marks for b in marks)
    texts |= dict.fromkeys(f'{a}"' for a in ('", ', '": ', "{", "[", " "))
    texts |= dict.fromkeys(str(i) for i in range(1000))
    texts |= dict.fromkeys(" " * n for n in range(2, 33))
    rng = random.Random(0)
    while len(texts) < vocab_size - _NUM_SPECIAL:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))
        texts |= dict.fromkeys((word, f" {word}", word.capitalize(), f" {word.capitalize()}"))
    vocabulary = {text.replace(" ", "Ġ"): i for i, text in enumerate(list(texts)[: vocab_size - _NUM_SPECIAL])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(f"<|{i}|>", special=True) for i in range(vocab_size - len(vocabulary))])
    return tokenizer


def with_tokenizer(model: Path, folder: Path) -> Path:
    """`model` if its tokenizer spells bytes, else `folder`, on the same file system, with its files linked and a tokenizer made up."""
    path = model / "tokenizer.json"
    if path.exists() and "ByteLevel" in path.read_text():
        return model
    for file in model.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file.name).hardlink_to(file)
    made_up_tokenizer(json.loads((model / "config.json").read_text())["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


class SleepingDevice(FreeExecutor):
    """Takes `seconds` for each forward pass, from when it is launched and the step before is over; then takes the first allowed tokens."""

    def __init__(self, config: EngineConfig, seconds: float) -> None:
        super().__init__(config)
        self._seconds, self._free_at = seconds, 0.0

    def launch(self, step: Step, cache: CacheManager, masks: Any = None) -> Any:
        tokens = super().launch(step, cache)
        forward_done = max(self._free_at, time.perf_counter()) + self._seconds
        mask = masks() if masks is not None else None
        if mask is not None:
            words = mask.allowed.numpy().view(np.uint32)
            first = (words != 0).argmax(axis=1)
            bits = words[np.arange(len(words)), first].astype(np.int64)
            tokens[mask.rows] = first * 32 + np.log2(bits & -bits).astype(np.int64)
        self._free_at = max(forward_done, time.perf_counter())
        return tokens, self._free_at

    def read(self, pending: Any) -> Any:
        tokens, done = pending
        time.sleep(max(0.0, done - time.perf_counter()))
        return tokens.tolist(), None, ()


def measure_overlap(grammars: Grammars, running: int, device_ms: float, steps: int = 150) -> None:
    """Milliseconds of a step with a grammar in every row and without any, over a device that sleeps."""
    medians: dict[str, list[float]] = {}
    for name in ("free", "warm", "free", "warm"):
        config = EngineConfig(session_len=1024, num_cache_blocks=running * 16, block_size=64, max_batch_size=running)
        executor = SleepingDevice(config, device_ms / 1e3)
        engine = EngineLoop(executor, vocab_size=VOCABULARY, eos_token_ids=(VOCABULARY - 1,), grammars=grammars)
        for i in range(running):
            params = SamplingParams(max_new_tokens=900, ignore_eos=True)
            text = grammar(i) if name == "warm" else ""
            engine.add_request(EngineRequest(request_id=f"r{i}", prompt_ids=[1, 2, 3], sampling=params, grammar=text))
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            assert not any(output.error for output in engine.step())
            times.append((time.perf_counter() - began) * 1e3)
        medians.setdefault(name, []).append(statistics.median(times[20:]))
    free, warm = min(medians["free"]), min(medians["warm"])
    print(f"a device of {device_ms:g} ms a step: free {free:.2f} ms, warm {warm:.2f} ms a step, warm / free {free / warm:.3f}", flush=True)


class Bench:
    def __init__(self, engine: LLMEngine, *, running: int, tokens: int, vocab_size: int) -> None:
        self._engine, self._running, self._tokens, self._vocab_size = engine, running, tokens, vocab_size
        self._count = 0

    def run(self, name: str, grammars: list[str]) -> float:
        """Generated tokens a second; `grammars` has one for each request, empty for none."""
        engine = self._engine
        engine.reset_prefix_cache()
        before, rng = engine.stats(), random.Random(1)
        started = time.perf_counter()
        for text in grammars:
            prompt = [rng.randrange(256, min(self._vocab_size, 4000)) for _ in range(64)]
            params = SamplingParams(max_new_tokens=self._tokens, temperature=0.0, ignore_eos=True)
            engine.add_request(EngineRequest(request_id=f"r{self._count}", prompt_ids=prompt, sampling=params, grammar=text))
            self._count += 1
        generated, errors = 0, []
        while engine.has_work():
            for output in engine.step():
                generated += len(output.token_ids)
                errors += [output.error] if output.error else []
        seconds, after = time.perf_counter() - started, engine.stats()
        steps = after.num_steps - before.num_steps
        parts = {k: round((v - vars(before.step_times)[k]) / steps * 1e3, 3) for k, v in vars(after.step_times).items()}
        assert not errors, errors[:3]
        rate = f"{generated / seconds:9.1f} tok/s  {generated} tokens in {seconds:.3f} s"
        print(f"{name:6s} {rate}, {steps} steps, ms a step: {parts}", flush=True)
        return generated / seconds


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.model.resolve().parent) as folder:
        model = with_tokenizer(options.model, Path(folder))
        length = 64 + options.tokens + 1
        blocks = None if torch.cuda.is_available() else (options.running + 8) * -(-length // 64)
        config = EngineConfig(backend=options.backend, max_batch_size=options.running, session_len=length, num_cache_blocks=blocks)
        engine = LLMEngine(model, config)
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        bench = Bench(engine, running=options.running, tokens=options.tokens, vocab_size=vocab_size)
        free, own = [""] * options.running, [grammar(i) for i in range(options.running)]
        for _ in range(2):
            bench.run("(warm)", free)
        bench.run("(mask)", [grammar(-1)] * options.running)
        plain = [bench.run("free", free)]
        bench.run("cold", own)
        warm = [bench.run("warm", own)]
        for _ in range(options.repeats - 1):
            plain.append(bench.run("free", free))
            warm.append(bench.run("warm", own))
        bench.run("half", [text if i % 2 else "" for i, text in enumerate(own)])
        engine.check_integrity()
        engine.close()
        print(f"warm / free: {statistics.median(warm) / statistics.median(plain):.3f}", flush=True)


def measure_host(running: int, device_ms: list[float], steps: int = 200) -> None:
    """Milliseconds of the masks of one step: `running` matchers advanced by a token each, their masks put together."""
    with tempfile.TemporaryDirectory() as folder:
        made_up_tokenizer(VOCABULARY).save(str(Path(folder) / "tokenizer.json"))
        grammars = Grammars(Path(folder), vocab_size=VOCABULARY, eos_token_ids=(VOCABULARY - 1,), max_rows=running, pinned=False)
        requests = [EngineRequest(request_id=str(i), prompt_ids=[1], grammar=grammar(i)) for i in range(running)]
        sequences = [Sequence(r, arrival=i, session_len=4096, eos_token_ids=(), vocab_size=VOCABULARY) for i, r in enumerate(requests)]
        started = time.perf_counter()
        for sequence in sequences:
            grammars.add(sequence)
        while grammars.num_compiling:
            grammars.wait(1.0)
            assert not list(grammars.take())
        print(f"{running} schemas compiled, with the start of the compilers, in {time.perf_counter() - started:.2f} s", flush=True)
        rng, times, processor, rows = random.Random(0), [], [], list(range(running))
        for _ in range(steps):
            began, computed = time.perf_counter(), time.process_time()
            mask, over = grammars.masks(rows, sequences)
            times.append((time.perf_counter() - began) * 1e3)
            processor.append((time.process_time() - computed) * 1e3)
            assert mask is not None and not over
            flags = (mask.allowed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
            for sequence, row in zip(sequences, flags.flatten(1), strict=True):
                allowed = row.nonzero().flatten()
                assert sequence.matcher is not None
                sequence.matcher.push(int(allowed[rng.randrange(len(allowed))]))
        times = sorted(times[10:])
        median, late = times[len(times) // 2], times[int(len(times) * 0.99)]
        print(f"masks of one step, {running} rows, {available_cpus()} cores: median {median:.2f} ms, 99 % {late:.2f} ms")
        print(f"of processor time, all threads together: median {statistics.median(processor[10:]):.2f} ms")
        for milliseconds in device_ms:
            measure_overlap(grammars, running, milliseconds)
        grammars.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--host", action="store_true", help="the masks alone, without a model")
    parser.add_argument("--device-ms", type=float, nargs="*", default=[], help="with --host: steps of devices that sleep so long")
    options = parser.parse_args()
    if options.host:
        measure_host(options.running, options.device_ms)
    if options.model:
        measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
