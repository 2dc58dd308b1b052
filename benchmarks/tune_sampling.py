"""Choosing tokens within limits, by variant: `python -m benchmarks.tune_sampling [--nvcc PATH] [--quick] ...`.

Needs a Hopper GPU and, but for --built, nvcc. Compiles `sampling_long_hopper.cu` once for each variant, checks every one against the
float64 reference (and says how many tokens differ from the cluster kernel's: they may where a uniform number falls on an edge of a running
sum), then times all of them over input sets that together exceed 200 MB: medians of replays of CUDA graphs. A reading is the time that a
sum over the logits takes. The part that chooses, timed alone, finds what the call before left of another set.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from gantline_kernels import build, hopper_sampling, reference
from gantline_kernels import library as built

from benchmarks import ceilings
from benchmarks.kernels import VOCABULARY, sampling_logits

_SOURCES = Path(build.__file__).parent / "cuda_kernels"
Limits = tuple[int | None, float | None, float | None]
_LIMITS: dict[str, Limits] = {
    "none": (None, None, None), "min-p": (None, None, 0.05), "k50": (50, None, None), "k50 p.9": (50, 0.9, None), "p.9": (None, 0.9, None),
    "k5000 p.9": (5000, 0.9, None),
}  # fmt: skip
_MORE: list[Limits] = [
    (0, 0.7, 0.0), (50, 0.5, 0.05), (1, 1.0, 0.0), (3, 0.0, 0.5),
    (20000, 0.8, None), (60000, None, None), (None, 0.99, None), (None, 0.3, 1e-3),
]  # fmt: skip
_VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "16 x 2": {"READERS = 8, READING_BLOCKS = 4": "READERS = 16, READING_BLOCKS = 2"},
    "4 x 8": {"READERS = 8, READING_BLOCKS = 4": "READERS = 4, READING_BLOCKS = 8"},
    "8 x 5": {"READERS = 8, READING_BLOCKS = 4": "READERS = 8, READING_BLOCKS = 5"},
    "cached": {"__ldcs(": "__ldg("},
    "32 probed": {"LEAST_PROBED = 96.f": "LEAST_PROBED = 32.f"},
}
_ALL, _EARLY = 7, 8
Sampler = Callable[..., torch.Tensor]


def compile_variant(nvcc: Path, changes: dict[str, str], folder: Path) -> ctypes.CDLL:
    folder.mkdir(parents=True)
    for source in _SOURCES.glob("*.cu*"):
        text = source.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    toolkit = nvcc.resolve().parent.parent
    libraries = [f"-L{path}" for path in (toolkit / "lib", toolkit / "lib64") if path.is_dir()]
    flags = ["-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden", "-gencode=arch=compute_90a,code=sm_90a"]
    command = [nvcc, *flags, "-shared", "-cudart", "static", *libraries, "-o", folder / "long.so", folder / "sampling_long_hopper.cu"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "long.so"))
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    library.gantline_sample_long.argtypes = [integer, pointer, long, *[pointer] * 7, integer, integer, integer, pointer]
    library.gantline_sample_long_scratch.argtypes = [integer, integer]
    return library


_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def sampler(library: ctypes.CDLL, options: int, scratch: dict[tuple[int, int], torch.Tensor]) -> Sampler:
    """`scratch`: by rows and their length; shared by samplers that launch parts of the same."""

    def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: torch.Tensor, *limits: torch.Tensor | None) -> torch.Tensor:
        rows, size = logits.shape
        if (rows, size) not in scratch:
            scratch[rows, size] = torch.full((library.gantline_sample_long_scratch(rows, size),), 255, dtype=torch.uint8, device="cuda")
        out = torch.empty(rows, dtype=torch.int64, device="cuda")
        if not torch.cuda.is_current_stream_capturing():
            out.fill_(-1)
        at = [None if x is None else x.data_ptr() for x in limits]
        code = library.gantline_sample_long(
            _TYPES[logits.dtype], logits.data_ptr(), logits.stride(0), uniforms.data_ptr(), temperature.data_ptr(), *at, out.data_ptr(),
            scratch[rows, size].data_ptr(), rows, size, options, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if code:
            raise RuntimeError(f"CUDA error {code}")
        return out

    return sample


def per_row(limits: Limits, rows: int) -> tuple[torch.Tensor | None, ...]:
    top_k, top_p, min_p = (None if x is None else torch.full((rows,), x, device="cuda", dtype=torch.float32) for x in limits)
    return None if top_k is None else top_k.int(), top_p, min_p


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits, uniforms, temperatures


def faults(got: torch.Tensor, inputs: Inputs, limits: Limits, slack: float = 1e-5) -> int:
    """How many tokens are none that the reference allows, but for float32's error at the edges of its running sum."""
    logits, uniforms, temperature = inputs
    wrong, greedy = 0, reference.argmax(logits).tolist()
    top_k, top_p, min_p = limits
    for i, (token, at, degree) in enumerate(zip(got.tolist(), uniforms.tolist(), temperature.tolist(), strict=True)):
        if degree == 0:
            wrong += token != greedy[i]
            continue
        kept = reference.kept_probabilities(logits[i], degree, top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0)
        running = kept.cumsum(0) / kept.sum()
        allowed = 0 <= token < len(kept) and kept[token] > 0
        wrong += not (allowed and running[token] >= at - slack and (token == 0 or running[token - 1] <= at + slack))
    return wrong


def check(name: str, sample: Sampler) -> bool:
    """Shapes and limits of the kernels' tests and more; the same again, and each row by itself."""
    bad = 0
    for (rows, size, spread), limits in itertools.product(
        [(48, 128256, 1.0), (48, 128256, 8.0), (8, 40000, 0.3)], [*_LIMITS.values(), *_MORE]
    ):
        logits, uniforms = torch.randn(rows, size, device="cuda") * spread, torch.rand(rows, device="cuda")
        temperature = torch.where(torch.arange(rows, device="cuda") % 4 == 0, 0.0, torch.rand(rows, device="cuda") + 0.5)
        logits[:, ::7] = -torch.inf
        bad += _wrong(name, sample, (logits, uniforms, temperature), limits, f"{spread} of {size}")
    for limits in [*_LIMITS.values(), *_MORE]:
        logits, ones = sampling_logits("text", 64), torch.ones(64, device="cuda")
        bad += _wrong(name, sample, (logits, torch.rand(64, device="cuda"), ones), limits, "text")
    bad += _odd_rows(name, sample)
    for dtype in (torch.bfloat16, torch.float16):
        logits, ones = (torch.randn(16, 50003, device="cuda") * 2).to(dtype)[:, 1:], torch.ones(16, device="cuda")
        bad += _wrong(name, sample, (logits, torch.rand(16, device="cuda"), ones), (300, 0.8, None), str(dtype))
    return not bad


def _wrong(name: str, sample: Sampler, inputs: Inputs, limits: Limits, label: str) -> int:
    given = (*inputs, *per_row(limits, len(inputs[0])))
    got = sample(*given)
    unstable = sum(not torch.equal(got, sample(*given)) for _ in range(4))
    some = (0, 1, len(got) - 1)
    alone = [sample(*(None if x is None else x[i : i + 1] for x in given)) for i in some]
    changed = int((torch.cat(alone) != got[list(some)]).sum())
    wrong = faults(got, inputs, limits)
    if wrong or unstable or changed:
        print(f"FAULT {name}: {label} {limits}: {wrong} wrong, {unstable} unstable, {changed} changed alone", flush=True)
    return wrong + unstable + changed


def _odd_rows(name: str, sample: Sampler, size: int = 40000) -> int:
    few = torch.randint(0, 3, (size,), device="cuda").float()
    index = torch.arange(size, device="cuda")
    rows = [
        torch.where(index == 7, 12.0, 0.0),
        torch.randn(size, device="cuda") * 10.0 ** torch.randint(-30, 30, (size,), device="cuda"),
        torch.where(index % 3 == 0, torch.randn(size, device="cuda"), -1e9),
        torch.where(index == size - 1, -5.0, -torch.inf),
        few,
        few * 1e-4,
    ]
    logits, ones, bad, half = torch.stack(rows), torch.ones(len(rows), device="cuda"), 0, size // 2
    for limits in [(0, 0.9, 0.0), (50, 1.0, 0.0), (half, 1.0, 0.0), (half, 0.7, 0.0), (1, 0.5, 0.0), (0, 1.0, 0.1), (0, 0.999999, 0.0)]:
        for at in (0.0, 0.31, 0.77, 0.99999):
            inputs = (logits, ones * at, ones)
            wrong = faults(sample(*inputs, *per_row(limits, len(rows))), inputs, limits, 2e-5)
            if wrong:
                print(f"FAULT {name}: odd rows {limits} at {at}: {wrong}", flush=True)
            bad += wrong
    return bad


def time_us(sample: Sampler, inputs: list[tuple[torch.Tensor | None, ...]]) -> float:
    return 1e3 * ceilings.graph_median_ms(lambda: [sample(*x) for x in inputs]) / len(inputs)


def compile_samplers(nvcc: Path, variants: dict[str, dict[str, str]]) -> tuple[dict[str, Sampler], dict[str, Sampler]]:
    """Each variant with and without overlapping launches, and the parts of the first."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(8) as pool:
        main_library = pool.submit(lambda: built.find() or build.build(nvcc, build.library_path(), jobs=4))
        compiled = [pool.submit(compile_variant, nvcc, changes, Path(work) / str(i)) for i, changes in enumerate(variants.values())]
        libraries = [x.result() for x in compiled]
        main_library.result()
    samplers: dict[str, Sampler] = {}
    of_first: dict[tuple[int, int], torch.Tensor] = {}
    for name, library in zip(variants, libraries, strict=True):
        scratch = {} if samplers else of_first
        samplers |= {name: sampler(library, _ALL, scratch), f"{name}, early": sampler(library, _ALL | _EARLY, scratch)}
    parts = {"(probe)": 1, "(probe, read)": 3, "(choose)": 4}
    return samplers, {name: sampler(libraries[0], options, of_first) for name, options in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvcc", default="")
    parser.add_argument("--quick", action="store_true", help="only the variant as it is")
    parser.add_argument("--built", action="store_true", help="the library's kernels alone: compiles nothing, times no parts")
    parser.add_argument("--unchecked", action="store_true", help="only time")
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1, 32])
    parser.add_argument("--sizes", nargs="+", type=int, default=[VOCABULARY], help="logits of a row, at most 409600")
    args = parser.parse_args()
    samplers: dict[str, Sampler] = {"cluster": hopper_sampling.sample_in_cluster}
    parts: dict[str, Sampler] = {}
    if args.built:
        samplers |= {f"as it is{name}": partial(hopper_sampling.sample_long, early=bool(name)) for name in ("", ", early")}
    else:
        nvcc = build.find_nvcc(args.nvcc)
        if nvcc is None:
            print("gantline: no nvcc found", file=sys.stderr)
            return 2
        of_variants, parts = compile_samplers(nvcc, dict(itertools.islice(_VARIANTS.items(), 1 if args.quick else None)))
        samplers |= of_variants
    torch.manual_seed(0)
    print(json.dumps(ceilings.measure() | {"device": torch.cuda.get_device_name()}), flush=True)
    right = {} if args.unchecked else {name: check(name, sample) for name, sample in samplers.items() if name != "cluster"}
    print(json.dumps({"right": right}), flush=True)
    for size, rows in itertools.product(args.sizes, args.rows):
        _time_rows(rows, size, samplers | parts)
    return 0 if all(right.values()) else 1


def _time_rows(rows: int, size: int, samplers: dict[str, Sampler]) -> None:
    sets = max(2, min(64, 220_000_000 // (rows * size * 4) + 1))
    table: dict[str, list[str]] = {name: [] for name in samplers}
    columns, differ = [], {}
    for shape in ("peaked", "flat", "text"):
        all_logits = [sampling_logits(shape, rows, size) for _ in range(sets)]
        reading = 1e3 * ceilings.graph_median_ms(lambda all_logits=all_logits: [x.sum(dim=1) for x in all_logits]) / sets
        columns.append(f"{shape}: one reading {reading:.1f} us")
        for label, limits in _LIMITS.items():
            inputs = [(x, torch.rand(rows, device="cuda"), torch.ones(rows, device="cuda"), *per_row(limits, rows)) for x in all_logits]
            expected = samplers["cluster"](*inputs[0])
            differ[f"{shape} {label}"] = int((samplers["as it is"](*inputs[0]) != expected).sum())
            for name, sample in samplers.items():
                samplers["as it is"](*inputs[0])  # what (choose) finds
                table[name].append(f"{time_us(sample, inputs):6.1f}")
        del all_logits, inputs
        torch.cuda.empty_cache()
    print(f"\n{rows} rows of {size}, us; {'; '.join(columns)}\nfor each of them: {', '.join(_LIMITS)}")
    print(f"tokens unlike the cluster's: {json.dumps(differ)}")
    for name, times in table.items():
        each = len(_LIMITS)
        print(f"{name:18s} " + " | ".join(" ".join(times[i : i + each]) for i in range(0, len(times), each)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
