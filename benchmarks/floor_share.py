"""How near decoding is to what memory and matrix units allow: `python -m benchmarks.floor_share` prints its tables in a minute.

One whole decode step (forward pass, logits, argmax) as a CUDA graph, for batch {1, 8, 32, 128, 512} x context {512, 8k, 32k} and models of
the size of Llama 3.1 8B, Qwen3 8B, Qwen2.5 7B (7 queries to a key) and Llama 3.2 1B (head dimension 64), weights random and made in place.
Contexts that exceed the cache share its blocks, in random order, so that as many bytes are read from memory as if each had its own.

The floor of a step is that of its parts, one after the other: each linear layer the larger of its bytes over the read rate and its
operations over 700 TFLOP/s (what long products reach), attention its cached bytes over the read rate. The read rate is measured in the same
call. A share is floor over time.
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

import torch
from gantline_kernels import api
from gantline_runtime.checkpoint import parse_shape
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.models import Decoder, build_model
from gantline_runtime.parallel import Parallel

from benchmarks import ceilings
from benchmarks.workloads import LLAMA_31_8B

BATCHES = (1, 8, 32, 128, 512)
CONTEXTS = (512, 8192, 32768)
QWEN3_8B: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN25_7B: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064, "max_position_embeddings": 32832,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 151643,
    "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_32_1B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True,
    "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip
FAMILIES = {"Llama-3.1-8B": LLAMA_31_8B, "Qwen3-8B": QWEN3_8B, "Qwen2.5-7B": QWEN25_7B, "Llama-3.2-1B": LLAMA_32_1B}
_BLOCK = 64
_CACHE_BYTES = 24 << 30
_PRODUCT_RATE = 700e12


def random_model(config: dict[str, object], backend: str) -> Decoder:
    """A model of that shape, weights normal with deviation 0.02, norms 1."""
    checkpoint: Any = SimpleNamespace(config=config, shape=parse_shape(config))
    build = BuildContext(dtype=torch.bfloat16, device=torch.device("cuda"), backend=backend)
    model = build_model(checkpoint, session_len=CONTEXTS[-1] + _BLOCK, parallel=Parallel(), build=build)
    for target in model.targets():
        if target.destination.dim() == 1:
            target.destination.fill_(1.0)
        else:
            target.destination.normal_(0.0, 0.02)
    return model


def make_caches(config: dict[str, Any], model: Decoder) -> list[LayerCache]:
    """As many blocks as _CACHE_BYTES hold, random."""
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    block = 2 * layers * model.kv_heads * _BLOCK * dim * 2
    shape = (layers, 2, _CACHE_BYTES // block, model.kv_heads, _BLOCK, dim)
    cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, 1.0)
    return [LayerCache(layer[0], layer[1]) for layer in cache]


def make_context(batch: int, length: int, num_blocks: int) -> AttentionContext:
    """`batch` sequences that decode their token number `length`; each has the blocks of its own as far as the cache goes."""
    width = -(-length // _BLOCK)
    rounds = -(-batch * width // num_blocks)
    order = torch.cat([torch.randperm(num_blocks, device="cuda") for _ in range(rounds)])[: batch * width]
    bound = GraphClasses(max_sequences=batch, max_tokens=8192, session_len=CONTEXTS[-1]).pad_context(length)
    tables = torch.zeros((batch, -(-bound // _BLOCK)), dtype=torch.int32, device="cuda")
    tables[:, :width] = order.view(batch, width)
    counts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    return AttentionContext(
        positions=torch.full((batch,), length - 1, dtype=torch.int32, device="cuda"),
        slots=torch.full((batch,), -1, dtype=torch.int64, device="cuda"),
        block_tables=tables,
        query_starts=counts,
        context_lens=torch.full((batch,), length, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        max_context_len=bound,
        num_decodes=batch,
    )


def floor_ms(config: dict[str, Any], batch: int, length: int, read_rate: float) -> float:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    products = sum(_product_s(*shape, batch, read_rate) for shape in layer) * config["num_hidden_layers"]
    attention = config["num_hidden_layers"] * batch * length * 2 * keys * 2 / read_rate
    return (products + _product_s(hidden, config["vocab_size"], batch, read_rate) + attention) * 1e3


def _product_s(inputs: int, outputs: int, rows: int, read_rate: float) -> float:
    return max(inputs * outputs * 2 / read_rate, 2 * rows * inputs * outputs / _PRODUCT_RATE)


@torch.inference_mode()
def step_ms(model: Decoder, caches: list[LayerCache], batch: int, length: int, backend: str) -> float:
    context = make_context(batch, length, len(caches[0].keys))
    ids = torch.randint(0, 100_000, (batch,), device="cuda")

    def step() -> None:
        logits = model.logits(model.forward(ids, caches, context, None))
        assert logits is not None
        api.argmax(logits, backend=backend)

    return ceilings.graph_median_ms(step, repeats=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("triton", "cuda"), default="cuda")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    started, limits = time.monotonic(), ceilings.measure()
    print(f"{torch.cuda.get_device_name()}, {json.dumps(limits)}, backend {options.backend}; ms a step (share of the floor)")
    for name in options.family:
        config: dict[str, Any] = FAMILIES[name]
        model = random_model(config, options.backend)
        caches = make_caches(config, model)
        print(f"| {name} | " + " | ".join(f"context {length}" for length in CONTEXTS) + " |\n|---|---|---|---|")
        for batch in BATCHES:
            cells = []
            for length in CONTEXTS:
                ms = step_ms(model, caches, batch, length, options.backend)
                floor = floor_ms(config, batch, length, limits["read_TB_s"] * 1e12)
                cells.append(f"{ms:.2f} ({floor / ms:.0%})")
            print(f"| {batch} running | " + " | ".join(cells) + " |", flush=True)
        del model, caches
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
