"""Arithmetic of launch sizes on the host. Triton's own functions can be called within kernels too, and so take microseconds on the host:
a step without a graph makes hundreds of these calls."""

from __future__ import annotations

__all__ = ["cdiv", "next_power_of_2"]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
