"""Facts of models that nobody has here, for simulated pods: what a real inspect Job would find in their files."""

from __future__ import annotations

from typing import Any

__all__ = ["EIGHT_BILLION"]

EIGHT_BILLION: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "family": "llama",
    "supported": True,
    "numLayers": 32,
    "hiddenSize": 4096,
    "intermediateSize": 14336,
    "numHeads": 32,
    "numKvHeads": 8,
    "headDim": 128,
    "vocabSize": 128256,
    "maxPositionEmbeddings": 8192,
    "tieWordEmbeddings": False,
    "dtype": "bfloat16",
    "weightBytes": 16_060_522_496,
    "name": "llama-8b",
    "revision": "main",
    "fingerprint": "sha256:0a",
}
"""Of a Llama of 8 billion parameters: one GPU of most sorts holds it."""
