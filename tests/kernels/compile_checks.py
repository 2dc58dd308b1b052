"""Compile every Triton kernel for a GPU that need not be there: the operations run on CPU tensors, and each launch only compiles.

Run by `test_compilation.py` in a process of its own: `python -m tests.kernels.compile_checks 90`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from gantline_kernels import api, devices
from gantline_kernels.absent_gpu import CHIPS, AbsentGpus
from gantline_kernels.triton_kernels import decode, invariant_attention, invariant_linear, prefill, prefill_plan, shared_prefix
from triton.runtime.jit import JITFunction

from tests.kernels.cases import paged

compiled: list[tuple[str, Any]] = []


def compile_only(capability: int) -> None:
    chip = next(chip for chip in CHIPS if chip.target == capability)
    triton.runtime.driver.set_active(AbsentGpus(chip))
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_launch
    devices.num_sms = lambda index: 132
    if capability >= 90:
        decode.capability = invariant_linear.capability = lambda device: chip.capability
        prefill._can_use_tma = shared_prefix._can_use_tma = invariant_attention._can_use_tma = lambda q, dim, tile, block_size: (
            dim & (dim - 1) == 0 and 64 <= dim <= 256 and tile <= block_size and q.dtype != torch.float32
        )


def run_attention() -> None:
    for dim, window in ((128, 0), (256, 100)):
        case = paged([(1, 5000), (1, 30), (200, 300)], heads=8, kv_heads=2, dim=dim, dtype=torch.bfloat16, block_size=64, window=window)
        api.paged_attention(*case.arguments, **case.options, backend="triton")
    for dim, window in ((128, 0), (256, 3000)):  # few chunks of prompts on long contexts
        case = paged([(20, 9000), (3, 5000)], heads=8, kv_heads=2, dim=dim, dtype=torch.bfloat16, block_size=64, window=window)
        api.paged_attention(*case.arguments, **case.options, backend="triton")
    wide = {"heads": 8, "kv_heads": 2, "dim": 256, "dtype": torch.float32, "block_size": 64}
    for case in (paged([(1, 5000), (20, 9000)], **wide), paged([(1, 5000)] * 128, **wide).share([(list(range(128)), 48)])):  # type: ignore[arg-type]
        api.paged_attention(*case.arguments, **case.options, backend="triton")
    for dim, batch, own in ((128, 64, 500), (256, 4, 5000)):  # taken in by each sequence's program; joined
        lengths = [(1, 3072 + own)] * batch
        case = paged(lengths, heads=32, kv_heads=8, dim=dim, dtype=torch.bfloat16, block_size=64).share([(list(range(batch)), 48)])
        api.paged_attention(*case.arguments, **case.options, backend="triton")


def run_invariant() -> None:
    """The operations whose rows depend on themselves alone: every tile of the linear layers, and attention of both kinds of launch."""
    x, weight = torch.zeros(300, 4096, dtype=torch.bfloat16), torch.zeros(640, 4096, dtype=torch.bfloat16)
    for tile in invariant_linear.TILES:
        invariant_linear.invariant_linear(x, weight, None, None, tile=tile)
    qweight, qzeros = (torch.zeros(n, 64, dtype=torch.int32) for n in (256, 2))
    for tile in invariant_linear.AWQ_TILES:
        invariant_linear.invariant_awq_linear(x[:, :256], qweight, qzeros, torch.zeros(2, 512, dtype=torch.bfloat16), 128, None, tile=tile)
    for dim, window in ((128, 0), (256, 100)):
        counts = []
        for lengths in ([(1, 5000), (1, 30), (200, 300)], [(1, 50)], [(20, 300), (3, 90)]):
            case = paged(lengths, heads=8, kv_heads=2, dim=dim, dtype=torch.bfloat16, block_size=64, window=window)
            api.paged_attention(*case.arguments, **case.options, backend=api.INVARIANT_TRITON)
            counts.append(sum(len(cached[0]) for cached in invariant_attention._invariant_attention.device_caches.values()))
        assert len(set(counts)) == 1, f"prompts and single queries have kernels of their own: {counts}"
    api.token_logprobs(torch.randn(2, 20000), torch.zeros(2, dtype=torch.int64), 0, backend=api.INVARIANT_TRITON)


def run_other_mixtures() -> None:
    """Assert that batches of other sizes, whose parts lie differently in one packed array, compile nothing anew."""
    kernels = (decode._decode, decode._join, shared_prefix._shared_prefix, prefill._prefill, prefill_plan.join_parts)
    counts = []
    for batch, prefix, chunks in ((64, 1024, 1), (65, 1088, 2), (99, 1152, 17)):
        lengths = [(1, prefix + 100)] * batch + [(30, 60)] * chunks
        case = paged(lengths, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16, block_size=64)
        case.share([(list(range(batch)), prefix // 64)])
        shared, at = case.options["shared"], batch % 4
        parts = [_moved(x, at + i) for i, x in enumerate((shared.lens, shared.members, shared.starts))]
        case.options["shared"] = api.SharedPrefixes(*parts, max_own_len=shared.max_own_len)
        case = replace(case, query_starts=_moved(case.query_starts, at + 3), context_lens=_moved(case.context_lens, at + 1))
        api.paged_attention(*case.arguments, **case.options, backend="triton")
        counts.append([len(cached[0]) for kernel in kernels for cached in kernel.device_caches.values()])
    assert counts[0] == counts[1] == counts[2], f"compiled anew: {counts}"


def _moved(x: torch.Tensor, words: int) -> torch.Tensor:
    """A copy that begins so many words into other memory."""
    memory = torch.zeros(len(x) + words, dtype=x.dtype)
    memory[words:] = x
    return memory[words:]


def run_others() -> None:
    bf16 = torch.bfloat16
    x, weight = torch.randn(4, 4096).to(bf16), torch.randn(4096).to(bf16)
    api.rms_norm(x, weight, 1e-5, backend="triton")
    api.add_rms_norm(x, x.clone(), weight, 1e-5, backend="triton")
    api.silu_and_mul(x, backend="triton")
    for norm in (None, weight[:128]):
        q, k, v = (x.view(4, 32, 128)[:, :n] for n in (16, 8, 8))
        caches = [torch.zeros(1, 8, 64, 128, dtype=bf16) for _ in range(2)]
        table, positions, slots = torch.zeros(9, 128), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
        api.rope_and_cache_write(q, k, v, table, positions, *caches, slots, q_norm_weight=norm, k_norm_weight=norm, backend="triton")
    qweight, qzeros = (torch.zeros(n, 64, dtype=torch.int32) for n in (256, 2))
    scales = torch.zeros(2, 512, dtype=bf16)
    api.awq_dequantize(qweight, qzeros, scales, 128, backend="triton")
    api.awq_linear(x[:, :256], qweight, qzeros, scales, 128, backend="triton")
    logits, one = torch.randn(2, 20000), torch.ones(2)
    api.argmax(logits, backend="triton")
    api.mask_tokens(logits, torch.arange(2), torch.zeros(2, 625, dtype=torch.int32), backend="triton")
    api.sample(logits, one, one, backend="triton")
    api.sample(logits, one, one, torch.ones(2, dtype=torch.int64), one, one, backend="triton")


if __name__ == "__main__":
    compile_only(int(sys.argv[1]))
    run_attention()  # what takes much shared memory, and so differs between chips
    run_invariant()
    if sys.argv[1] == "90":
        run_other_mixtures()
        run_others()
    for name, kernel in compiled:
        print(name, "registers", getattr(kernel, "n_regs", "?"), "shared", kernel.metadata.shared)
    print(len(compiled), "kernels")
