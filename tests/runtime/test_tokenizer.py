"""Tokenizers are read from a checkpoint's own files, which are not trusted."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gantline_runtime.errors import CheckpointError
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.tokenizer import Tokenizer

from tests.runtime.checkpoint_files import LFS_POINTER
from tests.runtime.server_fakes import SPECIAL, byte_tokenizer, write_model
from tests.runtime.test_detokenizer import PIECES


def test_a_checkpoints_files_give_tokens_names_and_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path))
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert tokenizer.special_ids == frozenset(range(256, 256 + len(SPECIAL)))
    assert tokenizer.chat_template is not None and "assistant" in tokenizer.chat_template
    assert tokenizer.encode("a")[0] == 256 and tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_encoded_or_decoded(direction: str) -> None:
    """Or the server's event loop, and with it all streams and probes, would wait for as long."""
    tokenizer, text = Tokenizer(byte_tokenizer()), "a list is " * 100_000
    ids = tokenizer.encode(text)
    work = (lambda: tokenizer.encode(text)) if direction == "encode" else (lambda: tokenizer.decode(ids))
    with ThreadPoolExecutor(1) as pool:
        done, turns = pool.submit(work), 0
        while not done.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 10


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": '{"chat_template": "field"}', "chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": '{"chat_template": "field"}'}, "field"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}'}, "d"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "r"}]}'}, None),
        ({"tokenizer_config.json": '{"chat_template": 5}'}, None),
        ({}, None),
    ],
)
def test_the_chat_template_is_found_where_checkpoints_put_it(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert Tokenizer.load(tmp_path).chat_template == expected


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no tokenizer.json, and no other"),
        ({"config.json": "{}", "tokenizer.model": "?"}, "no tokenizer.json, and tokenizer.model cannot be converted to one"),
        ({"tokenizer.json": ""}, "tokenizer.json cannot be used"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be used"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x"]]}}'}, "tokenizer.json cannot be used"),
        ({"tokenizer.json": "\x00" * 100}, "tokenizer.json cannot be used"),
        ({"tokenizer.json": LFS_POINTER.decode()}, "tokenizer.json is a pointer of Git LFS"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json is not a JSON object"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path, files: dict[str, str], cause: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=cause) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.cure


def test_a_token_knows_its_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path))
    first, second = tokenizer.encode("é", add_special_tokens=False)
    assert tokenizer.token_bytes(first) + tokenizer.token_bytes(second) == "é".encode()
    assert tokenizer.token_text(first) == "\ufffd" and tokenizer.token_text(256) == "<|begin|>"
    assert tokenizer.token_bytes(10**6) == b""
    hello = PIECES.encode("Hello")[0]
    assert PIECES.token_text(hello) == " Hello"
    byte = PIECES.token_id("<0xE9>")
    assert byte is not None and PIECES.token_bytes(byte) == b"\xe9"


def test_several_threads_may_encode_at_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path))
    texts = [f"text number {i} " * 50 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}, GenerationDefaults(0.6, 0.9, 20)),
        ({"do_sample": False}, GenerationDefaults(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.5}, GenerationDefaults(temperature=0.5)),
        ({"temperature": "hot", "top_p": 7, "top_k": -3, "min_p": True, "repetition_penalty": 0}, GenerationDefaults()),
        ({"repetition_penalty": 1.1, "min_p": 0.05}, GenerationDefaults(min_p=0.05, repetition_penalty=1.1)),
    ],
)
def test_generation_config_gives_the_defaults_of_sampling(tmp_path: Path, config: dict[str, object], expected: GenerationDefaults) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert GenerationDefaults.load(tmp_path) == expected


def test_without_a_generation_config_openais_defaults_hold(tmp_path: Path) -> None:
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(temperature=1.0, top_p=1.0, top_k=0)
