"""Throughput and latency of the engine on fixed work: `python -m benchmarks.throughput --model DIR --workload chat [decode ...]`.

Greedy, end-of-sequence ignored, requests in order of arrival, prefix reuse on but the cache emptied before every timed repeat; the warm-up
is the first 64 requests of `chat`. Each figure is the median of the repeats, all of them recorded, and counts only with its check
(`checks.py`): 8 requests of the timed run are teacher-forced through transformers in float32. The last accepted run of a row stays in
results/h200.json. --http runs the same work through the server instead, and records nothing; with --text its prompts are text of the same
lengths, which needs a checkpoint with a real tokenizer (`make_checkpoint --tokenizer`).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gantline_runtime import garbage
from gantline_runtime.config import EngineConfig, to_arguments
from gantline_runtime.engine import EngineStats, LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams

from benchmarks import ceilings, checks, workloads
from benchmarks.http_load import Prompt, run_over_http
from benchmarks.serving import running_server
from benchmarks.trained_tokenizer import TextPrompts
from benchmarks.workloads import Workload

_WARM_UP_REQUESTS = 64
_FIRST_TOKEN_RUNS = 5
_REPEATS = 3


@dataclass(frozen=True)
class Run:
    """One timed pass over a workload: seconds, and what each request produced."""

    seconds: float
    tokens: list[list[int]]
    logprobs: list[list[float]]
    first_token_s: list[float]


def run_once(engine: LLMEngine, requests: list[tuple[list[int], int]], checked: Set[int] = frozenset()) -> Run:
    """Run `requests` to their end. Raises RuntimeError if one ends early or with an error."""
    tokens: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    first: list[float] = [0.0] * len(requests)
    engine.reset_prefix_cache()
    started = time.perf_counter()
    for i, (prompt, count) in enumerate(requests):
        sampling = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True, num_logprobs=0 if i in checked else None)
        engine.add_request(EngineRequest(request_id=str(i), prompt_ids=prompt, sampling=sampling))
    while engine.has_work():
        for output in engine.step():
            i = int(output.request_id)
            if output.finish_reason == "error":
                raise RuntimeError(f"request {i}: {output.error}")
            if output.token_ids and not tokens[i]:
                first[i] = time.perf_counter() - started
            tokens[i] += output.token_ids
            logprobs[i] += [entry.chosen for entry in output.logprobs or []]
    seconds = time.perf_counter() - started
    wrong = [i for i, (_, count) in enumerate(requests) if len(tokens[i]) != count]
    if wrong:
        raise RuntimeError(f"{len(wrong)} requests produced too few or too many tokens; request {wrong[0]}: {len(tokens[wrong[0]])}")
    return Run(seconds, tokens, logprobs, first)


def measure(engine: LLMEngine, workload: Workload, repeats: int) -> tuple[dict[str, Any], list[checks.Sample]]:
    """(figures with every repeat, samples to check) of `workload`."""
    if workload.name == "single":
        return _measure_single(engine, workload, repeats)
    checked = set(checks.choose(workload.requests))
    before = engine.stats()
    runs = [run_once(engine, workload.requests, checked) for _ in range(repeats)]
    num_out = sum(count for _, count in workload.requests)
    num_all = num_out + sum(len(prompt) for prompt, _ in workload.requests)
    seconds = statistics.median(run.seconds for run in runs)
    figures = {
        "out_tok_s": round(num_out / seconds, 1), "in_out_tok_s": round(num_all / seconds, 1),
        "seconds": [round(run.seconds, 3) for run in runs], "host": _host_times(before, engine.stats()),
    }  # fmt: skip
    return figures, _samples(workload, runs[-1], checked)


def _host_times(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Steps, and milliseconds of the host in each part of a step."""
    steps = after.num_steps - before.num_steps
    spent = {name: value - getattr(before.step_times, name) for name, value in vars(after.step_times).items()}
    return {"steps": steps, **{name.removesuffix("_s") + "_ms": round(value * 1e3 / steps, 3) for name, value in spent.items()}}


def _measure_single(engine: LLMEngine, workload: Workload, repeats: int) -> tuple[dict[str, Any], list[checks.Sample]]:
    (prompt, count), checked = workload.requests[0], {0}
    firsts = [run_once(engine, [(prompt, 1)], checked).seconds for _ in range(_FIRST_TOKEN_RUNS)]
    runs = [run_once(engine, workload.requests, checked) for _ in range(repeats)]
    first, full = statistics.median(firsts), statistics.median(run.seconds for run in runs)
    figures = {
        "first_ms": round(first * 1e3, 2), "next_ms": round((full - first) / (count - 1) * 1e3, 3),
        "first_runs_ms": [round(s * 1e3, 2) for s in firsts], "seconds": [round(run.seconds, 4) for run in runs],
    }  # fmt: skip
    return figures, _samples(workload, runs[-1], checked)


def _samples(workload: Workload, run: Run, checked: set[int]) -> list[checks.Sample]:
    return [checks.Sample(workload.requests[i][0], run.tokens[i], run.logprobs[i]) for i in sorted(checked)]


def measure_all(model: Path, config: EngineConfig, names: list[str], repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Every workload of `names` on one engine, then their checks once its memory is free."""
    limits = ceilings.measure() if device == "cuda" else {}
    engine = LLMEngine(model, config)
    run_once(engine, workloads.build("chat").requests[:_WARM_UP_REQUESTS])
    garbage.settle()  # as the engine's process does
    results, samples = {}, {}
    for name in names:
        figures, samples[name] = measure(engine, workloads.build(name), repeats)
        results[name] = {"figures": figures, "ceilings": limits, "stats": str(engine.stats())}
        print(name, json.dumps(figures), flush=True)
    engine.check_integrity()
    engine.close()
    del engine
    gc.unfreeze()  # `settle` has put the engine out of the collector's sight
    gc.collect()
    torch.cuda.empty_cache() if device == "cuda" else None
    for name, verdict in checks.check(model, samples, device).items():
        results[name]["checks"] = verdict
        print(name, json.dumps(verdict), flush=True)
    return results


def measure_over_http(model: Path, flags: list[str], names: list[str], repeats: int, text: bool) -> None:
    """Print the figures of each workload through the server. Tokens are counted, not judged: the engine's own rows are.

    The cache cannot be emptied through the server, so each repeat's prompts begin with another token, and share what they shared before;
    prompts of text differ from their beginnings.
    """
    texts = TextPrompts(model / "tokenizer.json") if text else None
    with running_server(model, flags) as port:
        run_over_http(port, workloads.build("chat").requests[:_WARM_UP_REQUESTS])
        for name in names:
            requests = workloads.build(name).requests
            runs = [run_over_http(port, _repeated(requests, repeat, texts)) for repeat in range(1, repeats + 1)]
            seconds = statistics.median(run.seconds for run in runs)
            rate = sum(count for _, count in requests) / seconds
            print(f"{name} over HTTP", json.dumps({"out_tok_s": round(rate, 1), "runs": [run.summary() for run in runs]}), flush=True)


def _repeated(requests: list[tuple[list[int], int]], repeat: int, texts: TextPrompts | None) -> list[tuple[Prompt, int]]:
    if texts is None:
        return [([repeat, *prompt[1:]], count) for prompt, count in requests]
    prompts = texts.cut([len(prompt) for prompt, _ in requests], seed=repeat)
    return [(prompt, count) for prompt, (_, count) in zip(prompts, requests, strict=True)]


def _versions() -> dict[str, str]:
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        versions["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    return versions


def _commit() -> str:
    """The commit that is measured: $GANTLINE_COMMIT, for a machine that has the files but not their history, else what git says."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return os.environ.get("GANTLINE_COMMIT") or subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _unlike_others(options: argparse.Namespace) -> str:
    """Why these rows cannot stand beside others in the file: other settings, or another kind of GPU; nothing if they can."""
    if options.http:
        return "--http records nothing"
    if options.eager or options.max_step_ms is not None or options.backend not in ("auto", "cuda"):
        return "--eager, --max-step-ms and other backends than cuda make them others"
    if options.repeats < _REPEATS:
        return f"they are medians of {_REPEATS} repeats or more"
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    gpus = {row["versions"].get("gpu", "none").split(",")[0] for row in known.values()}
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"those in {options.out} are of {', '.join(sorted(gpus))}, this is {here}" if gpus - {here} else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", nargs="+", choices=workloads.NAMES, default=["chat"])
    parser.add_argument("--backend", choices=("auto", "cuda", "triton", "torch"), default="auto")
    parser.add_argument("--repeats", type=int, default=_REPEATS)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--max-step-ms", type=float, help="default: none, but the server's own with --http")
    parser.add_argument("--http", action="store_true", help="through `gantline serve`, every request an HTTP stream; nothing is recorded")
    parser.add_argument("--text", action="store_true", help="with --http: prompts of text, for a checkpoint with a real tokenizer")
    parser.add_argument("--api-workers", type=int, default=1, help="with --http")
    parser.add_argument("--out", type=Path, help="write the accepted rows into this JSON file, of one kind of GPU and these defaults")
    options = parser.parse_args()
    if options.out and (cause := _unlike_others(options)):
        parser.error(f"--out keeps rows that are compared with each other, and {cause}; leave out --out")
    config = EngineConfig(backend=options.backend, dtype="bfloat16", max_batch_size=256, max_waiting=4096, eager_mode=options.eager)
    if options.max_step_ms is not None or not options.http:  # without a server nobody reads a stream
        config = replace(config, max_step_ms=options.max_step_ms or 0.0)
    if options.http:
        flags = [f"--api-workers={options.api_workers}", *(to_arguments(config) if torch.cuda.is_available() else [])]
        measure_over_http(options.model, flags, options.workload, options.repeats, options.text)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = measure_all(options.model, replace(config, session_len=None), options.workload, options.repeats, device)
    about = {
        "commit": _commit(), "command": " ".join(["python -m benchmarks.throughput", *sys.argv[1:]]),
        "versions": _versions(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    accepted = {name: {**row, **about} for name, row in results.items() if row["checks"]["passed"]}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**known, **accepted}, indent=1) + "\n")
    refused = sorted(set(results) - set(accepted))
    print(f"accepted: {', '.join(accepted) or 'none'}; refused by their check: {', '.join(refused) or 'none'}", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
