"""Amounts of CPU and memory as Kubernetes writes them, and the user's wishes laid over the plan's."""

from __future__ import annotations

from collections.abc import Mapping

from gantline_operator.quantities import parse_quantity

__all__ = ["bytes_quantity", "cpu_quantity", "overlay"]

_MI, _GI = 1 << 20, 1 << 30


def bytes_quantity(num_bytes: int) -> str:
    """`8Gi` where it comes out even, else whole Mi, rounded up."""
    if num_bytes % _GI == 0:
        return f"{num_bytes // _GI}Gi"
    return f"{-(-num_bytes // _MI)}Mi"


def cpu_quantity(millis: int) -> str:
    return str(millis // 1000) if millis % 1000 == 0 else f"{millis}m"


def overlay(
    requests: Mapping[str, str], limits: Mapping[str, str], their_requests: Mapping[str, str] | None, their_limits: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """(requests, limits): theirs where they wrote any, ours elsewhere, and ours never in contradiction to theirs.

    A request of theirs lifts a limit of ours that lies below it, a limit of theirs lowers a request of ours that lies above it. Where both
    are theirs they stand as written, and the API server judges them.
    """
    theirs, their_caps = dict(their_requests or {}), dict(their_limits or {})
    merged, caps = {**requests, **theirs}, {**limits, **their_caps}
    for name in merged.keys() & caps.keys():
        if parse_quantity(merged[name]) <= parse_quantity(caps[name]):
            continue
        if name in theirs and name not in their_caps:
            caps[name] = merged[name]
        elif name in their_caps and name not in theirs:
            merged[name] = caps[name]
    return merged, caps
