"""The tokenizer that measurements of text use, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import make_checkpoint
from benchmarks.trained_tokenizer import TextPrompts, train

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 1056, "max_position_embeddings": 512,
    "bos_token_id": 1000, "eos_token_id": 1009,
}  # fmt: skip


def test_it_has_the_size_asked_for_and_makes_prompts_of_the_lengths_asked_for(tmp_path: Path) -> None:
    tokenizer = train(300_000, vocabulary=1000, special=56)
    assert tokenizer.get_vocab_size() == 1056
    text = "naïve Größe 東京 🦜\n\tdef f(x): return 'it’s' + x\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lengths = [16, 100, 300, 100]
    texts = TextPrompts(tmp_path / "tokenizer.json", 300_000)
    prompts = texts.cut(lengths, seed=1)
    assert [pytest.approx(len(tokenizer.encode(prompt).ids), abs=3) for prompt in prompts] == lengths and prompts[1] != prompts[3]
    assert prompts != texts.cut(lengths, seed=2)

    make_checkpoint.make(tmp_path / "model", CONFIG, tokenizer=tmp_path / "tokenizer.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.decode(loaded(text)["input_ids"]) == text and loaded.eos_token == "<|special_9|>"
    with pytest.raises(ValueError, match="1056 tokens, the model 1000"):
        make_checkpoint.make(tmp_path / "other", {**CONFIG, "vocab_size": 1000}, tokenizer=tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "model/config.json").read_text()) == CONFIG


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="allow more text"):
        train(1000, vocabulary=5000)
