"""Every kernel against its floor: `python -m benchmarks.kernels [--check] [--time] [--backend triton cuda] [--only NAME]`.

Needs a GPU. A time is the median of replays of a CUDA graph over input sets that together exceed 200 MB (or one larger set), so that
nothing is found in the second-level cache that a model would not find there. A floor is the larger of bytes over 4.4 TB/s (read; 4.3
copied) and operations over 700 TFLOP/s; causal operations count the lower triangle. Shapes are those of Llama 3.1 8B unless a name says
more. What prompts' attention is held against, torch's own given contiguous keys and values, is timed in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gantline_kernels import api
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks import ceilings

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 32, 8, 128, 64
HIDDEN, INNER, VOCABULARY = 4096, 14336, 128256
_READ, _COPY, _PRODUCT = 4.4e12, 4.3e12, 700e12
_ROTATED_BYTES = 220_000_000
Run = Callable[[], object]


@dataclass
class Case:
    """`make(i)` builds input set i and returns the call to time; of one call: bytes read, bytes copied (read and written), operations."""

    name: str
    make: Callable[[int], Run]
    read: float = 0.0
    copied: float = 0.0
    operations: float = 0.0

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.read / _READ + self.copied / _COPY, self.operations / _PRODUCT)

    def time_us(self) -> float:
        moved = self.read + self.copied
        sets = max(1, min(64, int(_ROTATED_BYTES // moved) + 1)) if moved else 1
        runs = [self.make(i) for i in range(sets)]

        def all_sets() -> None:
            for run in runs:
                run()

        return 1e3 * ceilings.graph_median_ms(all_sets) / sets

    def report(self, label: str = "") -> dict[str, Any]:
        us = self.time_us()
        row: dict[str, Any] = {"case": self.name + label, "us": round(us, 1), "floor_us": round(self.floor_us, 1)}
        row["of_floor"] = round(self.floor_us / us, 3)
        if self.operations:
            row["TFLOP_s"] = round(self.operations / us / 1e6, 1)
        if self.read:
            row["TB_s"] = round(self.read / us / 1e6, 3)
        return row


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def paged_inputs(
    queries: list[int],
    contexts: list[int],
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    block_size: int = BLOCK_SIZE,
    shared_len: int = 0,
) -> tuple[torch.Tensor, ...]:
    """q, caches, tables, query starts, context lengths; blocks in random order, the first `shared_len` tokens of all the same."""
    counts = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(counts), device="cuda").int()
    tables = torch.zeros((len(contexts), max(counts)), dtype=torch.int32, device="cuda")
    at = 0
    for i, count in enumerate(counts):
        tables[i, :count] = order[at : at + count]
        at += count
    tables[:, : shared_len // block_size] = tables[0, : shared_len // block_size].clone()
    keys, values = (_bf16(sum(counts), kv_heads, block_size, dim) for _ in range(2))
    starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    return _bf16(sum(queries), heads, dim), keys, values, tables, starts, torch.tensor(contexts, device="cuda", dtype=torch.int32)


def attention_case(name: str, queries: list[int], contexts: list[int], backend: str, **shape: int) -> Case:
    heads, kv_heads, dim = shape.get("heads", HEADS), shape.get("kv_heads", KV_HEADS), shape.get("dim", DIM)
    decodes = next((i for i, count in enumerate(queries) if count != 1), len(queries))

    def make(_: int) -> Run:
        inputs = paged_inputs(queries, contexts, **shape)
        limits = {"max_query_len": max(queries), "max_context_len": max(contexts), "num_decodes": decodes}
        return lambda: api.paged_attention(*inputs, dim**-0.5, **limits, backend=backend)  # type: ignore[arg-type]

    pairs = sum(q * (c - q) + q * (q + 1) / 2 for q, c in zip(queries[decodes:], contexts[decodes:], strict=True))
    return Case(name, make, read=4.0 * sum(contexts) * kv_heads * dim, operations=4.0 * pairs * heads * dim)


def shared_inputs(groups: list[tuple[int, int]], own: int, **shape: int) -> tuple[tuple[torch.Tensor, ...], api.SharedPrefixes]:
    """As `paged_inputs`, of decodes: groups of (sequences, tokens that they share), and `own` tokens of each; prefix 0: no group."""
    contexts = [prefix + own for count, prefix in groups for _ in range(count)]
    inputs = paged_inputs([1] * len(contexts), contexts, **shape)
    tables, block_size = inputs[3], inputs[1].shape[2]
    lens, starts, at = [prefix for count, prefix in groups for _ in range(count)], [0], 0
    members = [i for i, length in enumerate(lens) if length]
    for count, prefix in groups:
        tables[at : at + count, : prefix // block_size] = tables[at, : prefix // block_size].clone()
        at += count
        if prefix:
            starts.append(starts[-1] + count)
    members += [0] * (len(contexts) - len(members))
    tensors = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (lens, members, starts))
    return inputs, api.SharedPrefixes(*tensors, max_own_len=max(c - x for c, x in zip(contexts, lens, strict=True)))


def shared_case(name: str, groups: list[tuple[int, int]], own: int, backend: str, *, plain: bool = False, **shape: int) -> Case:
    """`plain`: without being told that anything is shared; the floor is that of reading it once all the same."""
    heads, kv_heads, dim = shape.get("heads", HEADS), shape.get("kv_heads", KV_HEADS), shape.get("dim", DIM)
    longest = max(prefix for _, prefix in groups) + own

    def make(_: int) -> Run:
        inputs, shared = shared_inputs(groups, own, **shape)
        limits = {"max_query_len": 1, "max_context_len": longest, "num_decodes": len(inputs[0])}
        chosen = None if plain else shared
        return lambda: api.paged_attention(*inputs, dim**-0.5, **limits, shared=chosen, backend=backend)  # type: ignore[arg-type]

    tokens = sum(prefix + count * own for count, prefix in groups)
    pairs = sum(count * (prefix + own) for count, prefix in groups)
    return Case(name, make, read=4.0 * tokens * kv_heads * dim, operations=4.0 * pairs * heads * dim)


def mixed_contexts(count: int = 128, longest: int = 16384) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1024, longest, (count,), generator=generator).tolist()


def decode_cases(backend: str) -> Iterator[Case]:
    yield attention_case("decode 256 x 1k", [1] * 256, [1024] * 256, backend)
    yield attention_case("decode 16 x 8k", [1] * 16, [8192] * 16, backend)
    yield attention_case("decode 1 x 32k", [1], [32768], backend)
    yield attention_case("decode 128 x 1-16k", [1] * 128, mixed_contexts(), backend)
    yield attention_case("decode 16 x 512", [1] * 16, [512] * 16, backend)
    yield attention_case("decode 1 x 1k", [1], [1024], backend)
    yield attention_case("decode 256 x 1k, 28/4 heads", [1] * 256, [1024] * 256, backend, heads=28, kv_heads=4)
    yield attention_case("decode 256 x 1k, dim 64", [1] * 256, [1024] * 256, backend, dim=64)


def shared_cases(backend: str) -> Iterator[Case]:
    for plain in (True, False):
        label = ", each by itself" if plain else ""
        yield shared_case(f"shared 256 x (2048 + 256){label}", [(256, 2048)], 256, backend, plain=plain)
        yield shared_case(f"shared 64 x (2048 + 256){label}", [(64, 2048)], 256, backend, plain=plain)
        yield shared_case(f"shared 8 x (8192 + 256){label}", [(8, 8192)], 256, backend, plain=plain)
        yield shared_case(f"shared 4 x 32 x (1024 + 512), 128 alone{label}", [(32, 1024)] * 4 + [(128, 0)], 512, backend, plain=plain)
        yield shared_case(f"shared 256 x (2048 + 256), dim 64{label}", [(256, 2048)], 256, backend, plain=plain, dim=64)


def prefill_cases(backend: str) -> Iterator[Case]:
    yield attention_case("prefill 8 x 4096", [4096] * 8, [4096] * 8, backend)
    yield attention_case("prefill 2 x 4096", [4096] * 2, [4096] * 2, backend)
    yield attention_case("prefill 1 x 32k", [32768], [32768], backend)
    yield attention_case("prefill 2k on 30k", [2048], [32768], backend)
    yield attention_case("prefill 16 x 512", [512] * 16, [512] * 16, backend)
    yield attention_case("prefill 64 x 128", [128] * 64, [128] * 64, backend)
    yield attention_case("prefill 16 x 128 on 2048", [128] * 16, [2176] * 16, backend)
    yield attention_case("prefill 64 x 128 on 2048", [128] * 64, [2176] * 64, backend)
    yield attention_case("prefill 64 x 128 on 2048 shared", [128] * 64, [2176] * 64, backend, shared_len=2048)
    yield attention_case("prefill 1 x 128 on 2048", [128], [2176], backend)
    yield attention_case("prefill 4 x 1024 on 4k", [1024] * 4, [5120] * 4, backend)
    yield attention_case("prefill 32 x 16 on 2048", [16] * 32, [2064] * 32, backend)
    yield attention_case("prefill 8 x 4096, dim 64", [4096] * 8, [4096] * 8, backend, dim=64)


def sdpa_cases() -> Iterator[Case]:
    """Torch's attention of the same prompts by each of its kernels that are made for them; one that cannot says so."""
    for name, batch, new, context in (("8 x 4096", 8, 4096, 4096), ("1 x 32k", 1, 32768, 32768), ("2k on 30k", 1, 2048, 32768)):
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            make = partial(_sdpa, kernel, batch, new, context)
            pairs = batch * (new * (context - new) + new * (new + 1) / 2)
            read = 4.0 * batch * context * KV_HEADS * DIM
            yield Case(f"torch's {kernel.name.lower()} {name}", make, read=read, operations=4.0 * pairs * HEADS * DIM)


def _sdpa(kernel: SDPBackend, batch: int, new: int, context: int, _: int) -> Run:
    q, (k, v) = _bf16(batch, HEADS, new, DIM), (_bf16(batch, KV_HEADS, context, DIM) for _ in range(2))
    options: dict[str, Any] = {"is_causal": True} if new == context else {"attn_mask": causal_lower_right(new, context)}

    def run() -> None:
        with sdpa_kernel([kernel]):
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    return run


def chunk_cases(backend: str) -> Iterator[Case]:
    """Few tokens on long prefixes, as prompts get on beside sequences that decode."""
    for new in (32, 64, 128, 256, 384, 512, 640, 1024):
        yield attention_case(f"chunk {new} on 30k", [new], [30_000 + new], backend)
    yield attention_case("chunk 4 x 64 on 30k", [64] * 4, [30_064] * 4, backend)
    yield attention_case("chunk 256 on 8k", [256], [8448], backend)
    yield attention_case("chunk 128 on 30k, dim 64", [128], [30_128], backend, dim=64)
    yield attention_case("chunk 128 on 30k, 4/1 heads", [128], [30_128], backend, heads=4, kv_heads=1)
    yield attention_case("chunk 128 on 30k beside 64 decodes at 1k", [1] * 64 + [128], [1024] * 64 + [30_128], backend)


def elementwise_cases(backend: str) -> Iterator[Case]:
    for rows in (8192, 256):
        yield _add_norm_case(rows, backend)
        yield _silu_case(rows, backend)
        yield _rope_case(rows, backend, normed=False)
    yield _rope_case(8192, backend, normed=True)


def _add_norm_case(rows: int, backend: str) -> Case:
    def make(_: int) -> Run:
        x, residual, weight = _bf16(rows, HIDDEN), _bf16(rows, HIDDEN), _bf16(HIDDEN)
        return lambda: api.add_rms_norm(x, residual, weight, 1e-5, backend=backend)

    return Case(f"add_rms_norm {rows}", make, copied=4.0 * rows * HIDDEN * 2)


def _silu_case(rows: int, backend: str) -> Case:
    def make(_: int) -> Run:
        x = _bf16(rows, 2 * INNER)
        return lambda: api.silu_and_mul(x, backend=backend)

    return Case(f"silu_and_mul {rows}", make, copied=3.0 * rows * INNER * 2)


def _rope_case(rows: int, backend: str, *, normed: bool) -> Case:
    def make(_: int) -> Run:
        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        q, k, v = (x.unflatten(-1, (-1, DIM)) for x in _bf16(rows, sum(sizes)).split(sizes, dim=-1))
        keys, values = (_bf16(rows // BLOCK_SIZE, KV_HEADS, BLOCK_SIZE, DIM) for _ in range(2))
        table = torch.rand(8192, DIM, device="cuda")
        positions, slots = torch.arange(rows, device="cuda", dtype=torch.int32), torch.randperm(rows, device="cuda")
        weights = {f"{x}_norm_weight": _bf16(DIM) if normed else None for x in "qk"}
        return lambda: api.rope_and_cache_write(q, k, v, table, positions, keys, values, slots, **weights, backend=backend)

    return Case(f"rope {rows}{' + norms' if normed else ''}", make, copied=2.0 * rows * (HEADS + 2 * KV_HEADS) * DIM * 2)


_LIMITS: dict[str, tuple[int | None, float | None, float | None]] = {
    "top-k and top-p": (50, 0.9, None), "top-p": (None, 0.9, None), "top-k": (50, None, None), "min-p": (None, None, 0.05),
    "no limit": (None, None, None), "top-k 5000 and top-p": (5000, 0.9, None),
}  # fmt: skip


def sampling_cases(backend: str) -> Iterator[Case]:
    for rows in (256, 32, 1):
        for shape in ("peaked", "flat", "text"):
            yield _sampling_case(f"argmax {shape}", shape, rows, lambda logits: lambda: api.argmax(logits, backend=backend))
            for name, limits in _LIMITS.items():
                yield _sampling_case(f"{name} {shape}", shape, rows, partial(_limited, limits=limits, backend=backend))


def _sampling_case(name: str, shape: str, rows: int, make: Callable[[torch.Tensor], Run]) -> Case:
    return Case(f"{name} {rows}", lambda _: make(sampling_logits(shape, rows)), read=4.0 * rows * VOCABULARY)


def sampling_logits(shape: str, rows: int, size: int = VOCABULARY) -> torch.Tensor:
    """peaked, flat; text: a few hundred likely tokens, one far ahead in half of the rows, over a broad rest."""
    if shape != "text":
        return torch.randn(rows, size, device="cuda") * {"peaked": 8.0, "flat": 0.5}[shape]
    logits = torch.randn(rows, size, device="cuda") * 2.0
    logits[:, 100:400] += torch.rand(rows, 300, device="cuda") * 10.0
    logits[::2, 17] = 16.0
    return logits


def _limited(logits: torch.Tensor, *, limits: tuple[int | None, float | None, float | None], backend: str) -> Run:
    uniforms, temperature = torch.rand(len(logits), device="cuda"), torch.ones(len(logits), device="cuda")
    top_k, top_p, min_p = (None if x is None else torch.full((len(logits),), x, device="cuda") for x in limits)
    top_k = None if top_k is None else top_k.int()
    return lambda: api.sample(logits, uniforms, temperature, top_k, top_p, min_p, backend=backend)


def linear_cases(backend: str) -> Iterator[Case]:
    shapes = [((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    weight_bytes = 2.0 * sum(n * k for n, k in shapes)
    for rows in (1, 8, 16, 32, 64, 128, 256, 512, 8192):

        def make(_: int, rows: int = rows) -> Run:
            weights, inputs = [_bf16(n, k) * 0.02 for n, k in shapes], {k: _bf16(rows, k) for _, k in shapes}
            return lambda: [api.linear(inputs[w.shape[1]], w, backend=backend) for w in weights]

        yield Case(f"linear chain {rows}", make, read=weight_bytes, operations=weight_bytes * rows)


GROUPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "decode": decode_cases, "shared": shared_cases, "prefill": prefill_cases, "chunk": chunk_cases,
    "elementwise": elementwise_cases, "sampling": sampling_cases, "linear": linear_cases,
}  # fmt: skip


def run_checks(backends: list[str]) -> bool:
    """The kernels' tests, every backend at once (their time is compilation)."""
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "--tb=short", "-n8", "--timeout=100"]
    command = [sys.executable, "-m", "pytest", *options, "tests/kernels/kernel_checks.py"]
    running = [subprocess.Popen(command, env=os.environ | {"GANTLINE_KERNEL_BACKEND": backend}) for backend in backends]
    codes = [process.wait() for process in running]
    return not any(codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the references first")
    parser.add_argument("--time", action="store_true", help="time every case")
    parser.add_argument("--backend", nargs="+", default=["triton"], choices=api.BACKENDS)
    parser.add_argument("--only", default="", help="cases whose group or name contains this")
    args = parser.parse_args()
    ok = run_checks(args.backend) if args.check else True
    if args.time:
        print(json.dumps(ceilings.measure()), flush=True)
        for group, cases in GROUPS.items():
            for backend in args.backend:
                for case in cases(backend):
                    if args.only in group or args.only in case.name:
                        _print(case, backend)
        for case in sdpa_cases():
            if args.only in "prefill" or args.only in case.name:
                _print(case, "torch")
    return 0 if ok else 1


def _print(case: Case, backend: str) -> None:
    try:
        print(json.dumps(case.report() | {"backend": backend}), flush=True)
    except Exception as error:  # one failure must not hide the other figures
        print(json.dumps({"case": case.name, "backend": backend, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
