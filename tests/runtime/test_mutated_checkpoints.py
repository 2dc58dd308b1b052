"""A broken checkpoint is refused with a reason, or served: by the whole engine, never with a hang, a crash or an error that nobody foresaw.

`test_checkpoint.py` does the same with headers alone. Here everything is loaded and a token is generated, in another process, so that a
crash is seen. 50 by default; GANTLINE_FUZZ=500 or more: 500, whose last run is recorded in docs/perf-log.md.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COUNT = 500 if int(os.environ.get("GANTLINE_FUZZ", "0")) >= 500 else 50
SEED = 20261126
LIMIT_S = 60.0
_NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 3, 7, 65, 1 << 20, 1 << 31, 1 << 62, 10**30, 0.5, -0.5, 1e-300, 1e300)
_OTHERS: tuple[Any, ...] = (None, True, False, "", "x", "float8", [], [1], {}, {"a": 1}, [None], "linear", "yarn", "llama3", "dynamic")


def _base(folder: Path) -> Path:
    """A whole small checkpoint, as it would be served."""
    from tests.runtime.checkpoints import write_checkpoint
    from tests.runtime.server_fakes import TEMPLATE, byte_tokenizer

    write_checkpoint("llama-tied-llama3-rope", folder, vocab_size=512)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.7, "top_k": 20, "do_sample": True}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def _mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of `folder`; says how."""
    files = ["config.json"] * 5 + [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
        "1_Pooling/config.json",
    ]
    name = rng.choice(files)
    path = folder / name
    data = path.read_bytes()
    kind = rng.randrange(8)
    if kind < 5 and name.endswith(".json"):
        body = json.loads(data)
        for _ in range(rng.choice((1, 1, 2))):
            _mutate_value(body, rng)
        path.write_text(json.dumps(body))
    elif kind == 5:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 6:
        at = rng.randrange(min(len(data), 4000))
        path.write_bytes(data[:at] + rng.randbytes(rng.randint(1, 6)) + data[at + rng.randint(0, 6) :])
    else:
        path.unlink()
    return f"{name}: {kind} {path.read_bytes()[:1500]!r}" if path.exists() else f"{name} removed"


def _mutate_value(body: Any, rng: random.Random) -> None:
    """Another value for one member of `body`, at most three levels down; a number for a number, mostly."""
    for _ in range(3):
        if not isinstance(body, dict) or not body:
            return
        key = rng.choice(list(body))
        if isinstance(body[key], dict) and body[key] and rng.random() < 0.8:
            body = body[key]
            continue
        if rng.random() < 0.1:
            del body[key]
        else:
            is_number = isinstance(body[key], (int, float)) and rng.random() < 0.8
            body[key] = copy.deepcopy(rng.choice(_NUMBERS if is_number else (*_NUMBERS, *_OTHERS)))
        return


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Body of the child: load each folder as the server's two processes do, answer with how it went."""
    import torch
    from gantline_runtime.chat_template import ChatTemplate, TemplateError
    from gantline_runtime.config import EngineConfig
    from gantline_runtime.engine import LLMEngine
    from gantline_runtime.errors import GantlineError
    from gantline_runtime.generation_defaults import GenerationDefaults
    from gantline_runtime.pooling import load_pooling
    from gantline_runtime.tokenizer import Tokenizer

    from tests.runtime.engine_support import drain, request

    torch.set_num_threads(1)
    while folder := pipe.recv():
        try:
            tokenizer = Tokenizer.load(folder)
            GenerationDefaults.load(folder), load_pooling(folder)
            if tokenizer.chat_template is not None:
                with contextlib.suppress(TemplateError):
                    ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render([{"role": "user", "content": "a"}])
            engine = LLMEngine(folder, EngineConfig(device="cpu", block_size=16, num_cache_blocks=64, max_batch_size=4))
            try:
                engine.add_request(request("a", [5, 6, 7], count=2))
                drain(engine)
            finally:
                engine.close()
            pipe.send("served")
        except GantlineError as error:
            assert error.cure and len(str(error)) < 2000, str(error)
            pipe.send(error.reason.value)
        except Exception as error:
            pipe.send(f"! {type(error).__name__}: {error}")


class _Child:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, folder: Path) -> str:
        self.pipe.send(str(folder))
        if not self.pipe.poll(LIMIT_S):
            return f"! nothing for {LIMIT_S} s"
        try:
            return str(self.pipe.recv())
        except EOFError:
            return f"! the process ended with {self.process.exitcode}"


@pytest.fixture
def child() -> Iterator[_Child]:
    made = _Child()
    yield made
    made.process.kill()
    made.process.join()


def test_mutated_checkpoints_are_served_or_refused_with_a_reason(child: _Child, tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    assert child.ask(base) == "served"
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(COUNT):
        folder = Path(shutil.copytree(base, tmp_path / str(number)))
        change = _mutate(folder, rng)
        outcome = child.ask(folder)
        if outcome.startswith("!"):
            findings.append(f"{number}: {outcome}\n    {change}")
            if not child.process.is_alive() or "nothing for" in outcome:
                child.process.kill()
                child = _Child()
        outcomes[outcome.split(":")[0]] += 1
        shutil.rmtree(folder)
    print(f"{COUNT} mutated checkpoints: {dict(outcomes.most_common())}")
    assert not findings, "\n".join(findings)
    assert outcomes["served"] >= COUNT // 20 and outcomes["InvalidCheckpoint"] >= COUNT // 4, outcomes
