"""Make a 4-bit copy of a model with AWQ, in the public layout that other engines read too.

Layer by layer: memory stays near one layer in float32 plus the calibration text's activations. A killed run goes on where it stopped; DST
appears only when it is whole, and only if its held-out perplexity is within the limit.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.checkpoint.shape import AWQ_GROUP_SIZES
from gantline_runtime.contents import MAX_LISTED, list_contents
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.shared_files import share_with_group

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", choices=("awq",), help="activation-aware weight quantization")
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; DST.partial holds what is not whole yet")
    parser.add_argument("--bits", type=int, choices=(4,), default=4, help="bits of a weight (default: 4)")
    parser.add_argument(
        "--group-size", type=int, choices=AWQ_GROUP_SIZES, default=128, help="inputs that share a scale and a zero point (default: 128)"
    )
    parser.add_argument(
        "--calibration", default="shipped", metavar="FILE|shipped", help="plain text like what the model will see (default: shipped)"
    )
    parser.add_argument("--samples", type=_count, default=32, help="windows of that text to calibrate with (default: 32)")
    parser.add_argument("--sequence-length", type=_count, default=512, help="tokens of a window (default: 512)")
    parser.add_argument(
        "--max-perplexity-increase",
        type=_share,
        metavar="X",
        help="publish nothing if held-out perplexity grows by more than this share (0.05: 5 %%)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (default: a GPU if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    logs.configure("info", "auto")
    share_with_group()
    # Threads that wait by spinning take the processor from whoever they wait for, once something else runs on the machine.
    # OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gantline_quant.pipeline import QuantizeOptions, quantize_checkpoint  # imports torch: not for --help

    options = QuantizeOptions(
        method=args.method,
        group_size=args.group_size,
        calibration=args.calibration,
        samples=args.samples,
        sequence_length=args.sequence_length,
        max_perplexity_increase=args.max_perplexity_increase,
    )
    manifest = quantize_checkpoint(args.source, args.target, options, device=_device(args.device))
    perplexity = manifest.perplexity or {}
    artefact = {
        "kind": manifest.kind,
        "path": str(args.target),
        "weight_bytes": manifest.facts["weightBytes"],
        "bytes": manifest.bytes,
        "facts": manifest.facts,
        "perplexity": perplexity,
        **list_contents(args.target.absolute().parent, MAX_LISTED),
    }
    change = f"held-out perplexity {perplexity['before']:.3f} before, {perplexity['after']:.3f} after"
    print(f"{args.target}: {manifest.facts['weightBytes']} bytes of weights; {change}")
    message = termination.TerminationMessage(termination.Reason.COMPLETED, f"Quantized: {change}.", artefact=artefact)
    termination.write(message)
    return termination.exit_code(message.reason)


def _device(name: str) -> object:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("there is no GPU that torch can use", cure="Give --device=cpu, or see `gantline check-env`.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _count(text: str) -> int:
    value = int(text)
    if not 2 <= value <= 1 << 16:
        raise argparse.ArgumentTypeError("expected 2 to 65536")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError("expected a share of 0 or more, such as 0.05")
    return value
