"""Write a checkpoint of random weights: `python -m benchmarks.make_checkpoint DIR [--layers N]` makes Llama-3.1-8B's shape in bf16.

On a GPU this takes seconds; the weights depend on the seed alone (of that device). Written beside and renamed, so a half-written one is
never found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.workloads import LLAMA_31_8B


def make(target: Path, config: dict[str, Any], seed: int = 0, tokenizer: Path | None = None) -> None:
    """Random weights for `config` (a Llama, Mistral, Qwen2 or Qwen3 config.json) into `target`, with `tokenizer` or one of words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index: dict[str, str] = {}

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * 0.02).to(torch.bfloat16).cpu()

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, partial / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for layer in range(config["num_hidden_layers"]):
        save(f"model-{layer:05d}.safetensors", _layer(config, f"model.layers.{layer}.", normal))
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    if not config.get("tie_word_embeddings"):
        head["lm_head.weight"] = normal(vocabulary, hidden)
    save("model-head.safetensors", head)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (partial / "config.json").write_text(json.dumps(config))
    stops = {"bos_token_id": config.get("bos_token_id", 0), "eos_token_id": config.get("eos_token_id", 1)}
    (partial / "generation_config.json").write_text(json.dumps(stops))
    _save_tokenizer(partial, config, tokenizer)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _layer(config: dict[str, Any], prefix: str, normal: Any) -> dict[str, torch.Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    family = config["model_type"]
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
    if family == "qwen2":
        tensors |= {f"{prefix}self_attn.{n}_proj.bias": normal(size) for n, size in (("q", queries), ("k", keys), ("v", keys))}
    ones = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family == "qwen3":
        ones |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    return tensors | {f"{prefix}{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in ones.items()}


def _save_tokenizer(target: Path, config: dict[str, Any], given: Path | None) -> None:
    """`given`, or a word-level tokenizer of the right vocabulary: token i is the word `ti`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if given is None:
        tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer.from_file(str(given))
        if tokenizer.get_vocab_size() > config["vocab_size"]:
            raise ValueError(f"{given} has {tokenizer.get_vocab_size()} tokens, the model {config['vocab_size']}")
    tokenizer.save(str(target / "tokenizer.json"))
    ends = {"bos_token": config.get("bos_token_id", 0), "eos_token": config.get("eos_token_id", 1)}
    names = {name: tokenizer.id_to_token(number) for name, number in ends.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"], **names}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=LLAMA_31_8B["num_hidden_layers"], help="fewer layers for a quick try")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, as benchmarks.trained_tokenizer makes (default: words)")
    options = parser.parse_args()
    started = time.monotonic()
    make(options.target, {**LLAMA_31_8B, "num_hidden_layers": options.layers}, tokenizer=options.tokenizer)
    print(f"checkpoint {options.target}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
