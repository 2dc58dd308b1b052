"""Every kernel once or twice at small ragged shapes, for compute-sanitizer: `scripts/sanitize_kernels.sh` runs this file.

Results are compared with the references as well, so that a kernel which the sanitizer stops does not pass for a clean one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from gantline_kernels import api, library, reference

from tests.kernels.cases import largest_error, paged

BF16, DEVICE = torch.bfloat16, "cuda"


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(BF16)


def attention(backend: str) -> float:
    worst = 0.0
    for dim, softcap in ((128, 0.0), (64, 2.0), (96, 0.0), (256, 0.0)):
        few = paged([(1, 700), (1, 1), (1, 1300)], heads=8, kv_heads=2, dim=dim, softcap=softcap, block_size=16, dtype=BF16, device=DEVICE)
        got = api.paged_attention(*few.arguments, **few.options, backend=backend)  # type: ignore[arg-type]
        worst = max(worst, largest_error(got, few.expected()))
    short, cut = [(1, 70), (1, 1), (40, 40), (130, 150), (3, 64)], [(1, 70), (40, 1500), (0, 0), (3, 1200)]
    for dim, window, lengths in ((128, 0, short), (64, 20, short), (128, 0, cut), (64, 1100, cut)):
        case = paged(lengths, heads=8, kv_heads=2, dim=dim, block_size=16, dtype=BF16, device=DEVICE, window=window)
        got = api.paged_attention(*case.arguments, **case.options, backend=backend)  # type: ignore[arg-type]
        worst = max(worst, largest_error(got, case.expected()))
    return worst


def shared_prefixes(backend: str) -> float:
    """Taken in by the program of each sequence's own context (where these fill 132 multiprocessors once), and joined by a second launch."""
    worst = 0.0
    for dim, contexts in ((128, [300, 257, 3, 400] * 15 + [300, 400]), (64, [600, 700, 3])):
        case = paged([(1, n) for n in contexts], heads=8, kv_heads=2, dim=dim, block_size=64, dtype=BF16, device=DEVICE)
        case.share([([i for i, n in enumerate(contexts) if n > 256], 4)], spare_groups=2)
        got = api.paged_attention(*case.arguments, **case.options, backend=backend)  # type: ignore[arg-type]
        worst = max(worst, largest_error(got, case.expected()))
    return worst


def linear(backend: str) -> float:
    worst = 0.0
    for rows, inputs, outputs in ((1, 200, 130), (2, 520, 700), (9, 1000, 136), (16, 64, 64), (20, 1000, 300), (33, 520, 300)):
        x, weight, bias = _randn(rows, inputs + 8)[:, :inputs], _randn(outputs, inputs) / inputs**0.5, _randn(outputs)
        worst = max(worst, largest_error(api.linear(x, weight, bias, backend=backend), reference.linear(x, weight, bias)))
    return worst


def few_rows_linear(_: str) -> float:
    """With blocks that make several passes, and with one to each multiprocessor; the single row too."""
    from gantline_kernels.few_rows_linear import few_rows_gated_linear, few_rows_linear

    worst = 0.0
    for rows, inputs, outputs in ((1, 200, 130), (7, 1032, 301), (8, 64, 4), (9, 1000, 139), (16, 520, 300)):
        x, weight, bias = _randn(rows, inputs + 8)[:, :inputs], _randn(outputs, inputs) / inputs**0.5, _randn(outputs)
        even = outputs // 2 * 2
        for blocks in (0, 2):
            got = few_rows_linear(x, weight, bias, blocks=blocks)
            worst = max(worst, largest_error(got, reference.linear(x, weight, bias)))
            got = few_rows_gated_linear(x, weight[:even], bias[:even], blocks=blocks)
            worst = max(worst, largest_error(got, reference.gated_linear(x, weight[:even], bias[:even])))
    return worst


def hopper_linear(_: str) -> float:
    """Also what `api.linear` leaves to others: more than 32 rows of a small weight."""
    from gantline_kernels.hopper_batch_linear import batch_linear
    from gantline_kernels.hopper_gated_linear import GatedTile, gated_linear
    from gantline_kernels.hopper_split_linear import Tiles, split_linear

    worst = 0.0
    for rows in (33, 64):
        x, weight = _randn(rows, 520), _randn(700, 520) / 520**0.5
        worst = max(worst, largest_error(batch_linear(x, weight, None), reference.linear(x, weight)))
    for rows in (50, 100, 200):
        x, weight = _randn(rows, 1544), _randn(700, 1544) / 1544**0.5
        for tiles in (Tiles(128, 4), Tiles(192, 4), Tiles(128, 2, 2 if rows <= 128 else 3)):
            worst = max(worst, largest_error(split_linear(x, weight, None, tiles=tiles), reference.linear(x, weight)))
    for rows in (50, 100, 300):
        x, weight = _randn(rows, 520), _randn(1400, 520) / 520**0.5
        for tile in (None, GatedTile(64, 3)):
            worst = max(worst, largest_error(gated_linear(x, weight, None, tile=tile), reference.gated_linear(x, weight)))
    return worst


def sampling(backend: str) -> float:
    """Short rows and long ones, whose limits are foreseen, or found by a second reading, or (equal logits) by a search."""
    wrong = torch.zeros((), device=DEVICE)
    for rows, size in ((6, 9001), (3, 66001)):
        logits, uniforms, ones = torch.randn(rows, size, device=DEVICE), torch.rand(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
        logits[1, 100:400] += 10 * torch.rand(300, device=DEVICE)
        logits[2] = torch.where(torch.arange(size, device=DEVICE) == 7, 12.0, 0.0)
        wrong += (api.argmax(logits, backend=backend) != logits.argmax(dim=-1)).sum()
        for k, p, least in ((0, 0.9, 0.0), (50, 0.8, 0.01), (3000, 0.9, 0.0), (0, 1.0, 0.05), (0, 1.0, 0.0)):
            got = api.sample(logits, uniforms, ones, (ones * k).int(), ones * p, ones * least, backend=backend)
            for i in range(rows):
                wrong += reference.kept_probabilities(logits[i], 1.0, k, p, least)[got[i]] <= 0
    return float(wrong)


def masks(backend: str) -> float:
    logits, rows = torch.randn(5, 2100, device=DEVICE), torch.tensor([3, 0], device=DEVICE)
    allowed = torch.randint(-(2**31), 2**31 - 1, (2, 66), dtype=torch.int32, device=DEVICE)
    expected = logits.clone()
    reference.mask_tokens(expected, rows, allowed)
    api.mask_tokens(logits, rows, allowed, backend=backend)
    return float((logits != expected).sum())


def logprobs(backend: str) -> float:
    logits, tokens = torch.randn(5, 9001, device=DEVICE)[:, 1:], torch.arange(5, device=DEVICE)
    got, expected = api.token_logprobs(logits, tokens, 3, backend=backend), reference.token_logprobs(logits, tokens, 3)
    return max(largest_error(got[0], expected[0]), largest_error(got[2], expected[2]))


def elementwise(backend: str) -> float:
    x, weight = _randn(5, 1000), _randn(1000)
    normed, _ = api.add_rms_norm(x.clone(), x.clone(), weight, 1e-5, backend=backend)
    worst = largest_error(normed, reference.add_rms_norm(x, x, weight, 1e-5)[0])
    worst = max(worst, largest_error(api.silu_and_mul(x, backend=backend), reference.silu_and_mul(x)))
    q, k, v = (t.unflatten(-1, (-1, 128)) for t in _randn(5, 8 * 128).split([512, 256, 256], dim=-1))
    caches, expected = ([torch.zeros(3, 2, 16, 128, device=DEVICE, dtype=BF16) for _ in range(2)] for _ in range(2))
    slots, at = torch.tensor([17, -1, 0, 47, 33], device=DEVICE), torch.arange(5, device=DEVICE, dtype=torch.int32)
    table = torch.rand(9, 128, device=DEVICE)
    got = api.rope_and_cache_write(q, k, v, table, at, *caches, slots, backend=backend)
    return max(worst, largest_error(got, reference.rope_and_cache_write(q, k, v, table, at, *expected, slots)))


def awq(backend: str) -> float:
    qweight, qzeros = (torch.randint(-(2**31), 2**31 - 1, (n, 9), dtype=torch.int32, device=DEVICE) for n in (192, 3))
    scales = _randn(3, 72) / 100
    worst = 0.0
    for rows in (3, 40):
        x = _randn(rows, 192)
        expected = reference.awq_linear(x, qweight, qzeros, scales, 64)
        worst = max(worst, largest_error(api.awq_linear(x, qweight, qzeros, scales, 64, backend=backend), expected))
    return worst


CASES: dict[str, list[Callable[[str], float]]] = {
    "cuda": [attention, linear, few_rows_linear, hopper_linear, sampling],
    "triton": [attention, shared_prefixes, linear, sampling, masks, elementwise, awq],
    "invariant_triton": [attention, linear, sampling, logprobs, awq],
}


def main() -> int:
    if library.load() is None:
        print("the CUDA kernels are not built: run python -m gantline_kernels.build", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    ok = True
    for backend in sys.argv[1:] or CASES:
        for case in CASES[backend]:
            error = case(backend)
            torch.cuda.synchronize()
            ok = ok and error < 0.06
            print(f"{backend} {case.__name__}: largest error {error:.4f}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
