"""All that must be shown on a GPU before a release, in calls of bounded length: `python -m benchmarks.acceptance --model DIR --out DIR`.

Runs the steps of `STEPS` in their order, each a process of its own, as many as fit `--seconds`; what is left is named at the end, for the
next call's `--steps`. Everything printed goes into `<out>/acceptance.log`, what became of each step into `<out>/acceptance.json`, accepted
rows of the engine into `<out>/rows.json` (README's table is made from results/h200.json and h100.json). Exit code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["STEPS", "Outcome", "Step", "run_steps"]

_STOP_S = 10.0
"""Kept of the time for the last step's end."""


@dataclass(frozen=True)
class Step:
    """`command`: arguments of Python, `{model}` and `{out}` filled in. `expected_s`: what it takes on one H100 or H200, roughly."""

    name: str
    expected_s: int
    command: str


ROWS = "single batch16 prefix prefill decode chat"
STEPS = (
    Step("rows", 260, f"-m benchmarks.throughput --model {{model}} --workload {ROWS} --out {{out}}/rows.json"),
    Step("http", 90, "-m benchmarks.throughput --model {model} --workload chat --http --text --api-workers 2"),
    Step("startup", 40, "-m benchmarks.startup --model {model}"),
    Step("engine-tests", 160, "-m pytest -q -p no:cacheprovider -m gpu tests/runtime/test_gpu_engine.py"),
    Step("invariance-tests", 100, "-m pytest -q -p no:cacheprovider -m gpu tests/runtime/test_gpu_invariance.py"),
    Step("prebuild-tests", 60, "-m pytest -q -p no:cacheprovider -m gpu tests/runtime/test_prebuild.py"),
    Step("kernel-tests", 330, "-m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_gpu.py"),
    Step("interference", 130, "-m benchmarks.interference --model {model} --limits 50 twice"),
    Step("grammar", 90, "-m benchmarks.grammar --model {model}"),
    Step("kernels", 90, "-m benchmarks.kernels --check --time --backend triton cuda"),
    Step("linear", 60, "-m benchmarks.linear"),
    Step("startup-cold", 60, "-m benchmarks.startup --model {model} --cold --repeats 2"),
    Step("floor-share", 110, "-m benchmarks.floor_share"),
    Step("triton-rows", 120, "-m benchmarks.throughput --model {model} --workload decode chat --backend triton --repeats 1"),
    Step("soak-few-blocks", 75, "-m benchmarks.soak --model {model} --minutes 0.8 --blocks 600 --max-batch-size 128 --long-answers"),
    Step("soak-full-memory", 420, "-m benchmarks.soak --model {model}"),
)


@dataclass(frozen=True)
class Outcome:
    """`code`: the exit code, None where the step was ended for want of time."""

    name: str
    code: int | None
    seconds: float
    last_line: str


def run_steps(steps: tuple[Step, ...], model: Path, out: Path, limit_s: float) -> tuple[list[Outcome], list[str]]:
    """(what became of each step that was begun, names of those left): a step is begun if what it is expected to take is there."""
    out.mkdir(parents=True, exist_ok=True)
    deadline, outcomes, left = time.monotonic() + limit_s - _STOP_S, [], []
    for step in steps:
        if time.monotonic() + step.expected_s > deadline:
            left.append(step.name)
            continue
        outcome = _run(step, model, out, deadline)
        outcomes.append(outcome)
        end = "out of time" if outcome.code is None else f"exit code {outcome.code}"
        print(f"{step.name}: {end}, {outcome.seconds:.0f} of {step.expected_s} s: {outcome.last_line}", flush=True)
        (out / "acceptance.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes, left


def _run(step: Step, model: Path, out: Path, deadline: float) -> Outcome:
    command = [sys.executable, *step.command.format(model=model, out=out).split()]
    started = time.monotonic()
    with (out / "acceptance.log").open("a") as log:
        log.write(f"===== {step.name}: {step.command}\n")
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(deadline - started)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # tests have processes of their own
            process.wait()
    lines = (out / "acceptance.log").read_bytes()[begin:].decode(errors="replace").splitlines()
    return Outcome(step.name, code, round(time.monotonic() - started, 1), next((line for line in reversed(lines) if line.strip()), ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of benchmarks.make_checkpoint --tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=590.0, help="of the whole call")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], default=[step.name for step in STEPS])
    options = parser.parse_args()
    outcomes, left = run_steps(tuple(step for step in STEPS if step.name in options.steps), options.model, options.out, options.seconds)
    failed = [outcome.name for outcome in outcomes if outcome.code != 0]
    print(f"failed: {' '.join(failed) or 'none'}; left: {' '.join(left) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
