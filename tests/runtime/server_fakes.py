"""An engine whose model costs nothing, and byte tokenizers: the server's tests need neither weights nor torch.

`EchoEngine` is the real loop, scheduler and cache over an executor that only repeats. Its model repeats the prompt's last message, byte by
byte, and then ends; `script.json` in the model's folder changes that (see `Script`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import tokenizers
from gantline_runtime.compilation import MOST_COMPILE_S, expect_silence
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import EngineRequest, PromptLogprobs, TokenLogprobs, TokenOutput
from gantline_runtime.request import Sequence
from gantline_runtime.scheduler import PromptRead, Step
from gantline_runtime.termination import Reason
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ suffix or '' }}"
)


def byte_tokenizer(extra: tuple[str, ...] = SPECIAL) -> tokenizers.Tokenizer:
    """One token a byte (GPT-2's alphabet), then the special tokens, numbers 256 and up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in extra])
    if "<|begin|>" in extra:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 256)])
    return tokenizer


@dataclass
class Script:
    """What the fake model does. Texts are UTF-8, given as a list of byte values so that they may be broken."""

    answer: list[int] | None = None
    """Bytes of every answer, instead of an echo."""
    endless: bool = False
    """Repeat the answer until the request's limit."""
    step_seconds: float = 0.0
    prompt_token_us: float = 0.0
    """Microseconds that a step takes for each token of prompts in it; those that are cached are in none."""
    stalls_at: int = 0
    """From so many steps on it runs none, though it has work: as if its scheduler had lost something."""
    compile_seconds: float = 0.0
    """The tenth step says that it compiles a kernel, and takes so long."""
    tokens_per_output: int = 1
    logprob: float = -0.25
    """Of every token that is chosen."""
    load_seconds: float = 0.0
    fail_at: str = ""
    """What raises: load, smoke (every step), step (the one after the first ten), request or launch (for a prompt that has the byte 1)."""
    error: str = "RuntimeError: scripted"
    session_len: int = 4096
    num_cache_blocks: int = 256
    extra: dict[str, Any] = field(default_factory=dict)


def write_model(folder: Path, template: str | None = TEMPLATE, **script: Any) -> Path:
    """A folder that the server takes for a model: tokenizer, chat template, script."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template is not None else {})))
    (folder / "script.json").write_text(json.dumps(script))
    return folder


@dataclass
class _Progress:
    phase: str
    done: int
    total: int


@dataclass
class _Memory:
    weight_bytes: int = 1000
    cache_bytes: int = 2000
    cache_bytes_per_token: int = 1
    workspace_bytes: int = 0
    context_bytes: int = 0
    estimated_weight_bytes: int = 900
    estimated_workspace_bytes: int = 0
    estimated_context_bytes: int = 0
    estimated_cache_bytes_per_token: int = 1


class _EchoExecutor:
    """Knows every answer from its beginning. A sequence whose prompt has the byte 1 raises, if the script says so."""

    depth = 0
    failed = False

    def __init__(self, script: Script, config: EngineConfig) -> None:
        self.script, self.config = script, config
        assert config.session_len is not None and config.num_cache_blocks is not None
        self.num_blocks = config.num_cache_blocks
        self.limits: Any = SimpleNamespace(max_slots=config.max_batch_size, max_blocks=-(-config.session_len // config.block_size))
        self.memory: Any = _Memory()
        self.capture_seconds: list[float] = []
        self.graph_tokens = ()
        self.launch_seconds: list[float] = []
        self.alphabet = {byte: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) for byte in [_byte_of(char)]}

    def launch(self, step: Step, cache: CacheManager, masks: Any = None) -> Any:
        cache.take_table_updates()
        if self.script.prompt_token_us:
            time.sleep((step.num_tokens - step.num_decodes) * self.script.prompt_token_us / 1e6)
        poisoned = any(self.alphabet[1] in s.tokens[: s.prompt_len] for s in step.sequences)
        if self.script.fail_at == "smoke" or (self.script.fail_at == "launch" and poisoned):
            raise _exception(self.script.error)
        tokens = [self._next_token(sequence) for sequence in step.samples]
        chosen = self.script.logprob
        logprobs = [_logprobs(token, s.sampling.num_logprobs, chosen) for token, s in zip(tokens, step.samples, strict=True)]
        return tokens, logprobs, [_read(read) for read in step.reads]

    def read(self, pending: Any) -> Any:
        return pending

    def prepare(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _next_token(self, sequence: Sequence) -> int:
        answer, position = self._answer(sequence.tokens[: sequence.prompt_len].tolist()), sequence.num_generated
        biases = {token: bias for token, bias in sequence.sampling.logit_bias.items() if bias > 0}
        if biases:
            return max(biases, key=lambda token: biases[token])
        goes_on = self.script.endless or sequence.sampling.ignore_eos or position < sequence.sampling.min_new_tokens
        return answer[position % len(answer)] if position < len(answer) or goes_on else EchoEngine.END

    def _answer(self, prompt: list[int]) -> list[int]:
        if self.script.answer is not None:
            return [self.alphabet[byte] for byte in self.script.answer]
        body = prompt[:-1] if prompt[-1] == EchoEngine.ASSISTANT else prompt
        last = max((i for i, token in enumerate(body) if token >= 256), default=-1)
        return body[last + 1 :] or [self.alphabet[ord("?")]]


class EchoEngine(EngineLoop):
    END, ASSISTANT = 257, 259

    def __init__(self, model_dir: str, config: EngineConfig, on_progress: Callable[[Any], None] | None = None) -> None:
        self.script = script = Script(**json.loads((Path(model_dir) / "script.json").read_text()))
        self._load(on_progress or (lambda _: None))
        resolved = replace(config, session_len=config.session_len or script.session_len, num_cache_blocks=script.num_cache_blocks)
        self.executor = _EchoExecutor(script, resolved)
        super().__init__(self.executor, vocab_size=256 + len(SPECIAL), eos_token_ids=(self.END,))
        self._num_calls = 0

    def _load(self, on_progress: Callable[[Any], None]) -> None:
        for i in range(10):
            on_progress(_Progress("weights", i * 100, 1000))
            time.sleep(self.script.load_seconds / 10)
            if self.script.fail_at == "load" and i == 5:
                raise _exception(self.script.error)

    def add_request(self, request: EngineRequest) -> None:
        if self.script.fail_at == "request" and self.executor.alphabet[1] in request.prompt_ids:
            raise _exception(self.script.error)
        super().add_request(msgspec.structs.replace(request, grammar=""))  # it says what its script says

    def step(self) -> list[TokenOutput]:
        time.sleep(self.script.step_seconds)
        self._num_calls += 1
        if self.script.stalls_at and self._num_calls >= self.script.stalls_at:
            return []
        if self.script.compile_seconds and self._num_calls == 10:
            expect_silence(MOST_COMPILE_S)
            time.sleep(self.script.compile_seconds)
            expect_silence(0.0)
        if self.script.fail_at == "step" and self._num_calls > 10:
            raise _exception(self.script.error)
        outputs: dict[str, list[TokenOutput]] = {}
        for _ in range(self.script.tokens_per_output):
            for output in super().step():
                outputs.setdefault(output.request_id, []).append(output)
        return [_merge(parts) for parts in outputs.values()]

    def close(self) -> None:
        self.check_integrity()
        super().close()


def _merge(parts: list[TokenOutput]) -> TokenOutput:
    last = parts[-1]
    return TokenOutput(
        request_id=last.request_id,
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[entry for part in parts for entry in part.logprobs or ()] or None,
        finish_reason=last.finish_reason,
        num_cached_tokens=last.num_cached_tokens,
        queue_seconds=parts[0].queue_seconds,
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
        embedding=last.embedding,
        error=last.error,
    )


def _logprobs(token: int, count: int | None, chosen: float) -> TokenLogprobs | None:
    if count is None:
        return None
    return TokenLogprobs(chosen, [token + i for i in range(count)], [-0.25 - i for i in range(count)])


def _read(read: PromptRead) -> PromptLogprobs | np.ndarray[Any, np.dtype[np.float32]]:
    """Log-probability -0.5 of every token, the token after it in the vocabulary the likeliest; hidden states of four numbers."""
    if read.sequence.pooling is not None:
        return np.array([3.0, 0.0, 4.0, 0.0], dtype=np.float32) * read.count
    tokens = read.sequence.tokens[read.start + 1 : read.start + 1 + read.count]
    count = read.sequence.num_prompt_logprobs or 0
    ids = [[token + 1 + i for i in range(count)] for token in tokens]
    return PromptLogprobs(read.start + 1, [-0.5] * read.count, ids, [[-0.25 - i for i in range(count)] for _ in tokens], [7] * read.count)


def _byte_of(char: str) -> int:
    from gantline_runtime.tokenizer import _BYTE_OF

    return _BYTE_OF[char][0]


def _exception(text: str) -> Exception:
    """`CheckpointError: ...`, `MemoryError: ...`, `RuntimeError: CUDA error: ...`"""
    import builtins

    from gantline_runtime import errors

    name, _, message = text.partition(": ")
    if hasattr(errors, name):
        return getattr(errors, name)(message, cure="Mend it.", reason=Reason.INVALID_CHECKPOINT)  # type: ignore[no-any-return]
    return getattr(builtins, name)(message)  # type: ignore[no-any-return]


def main(argv: list[str]) -> int:
    """`gantline serve` with this engine: python -m tests.runtime.server_fakes DIR --port=0 ..."""
    from gantline_runtime import cli
    from gantline_runtime.commands import serve

    original = serve.run
    serve.run = lambda args: original(args, engine="tests.runtime.server_fakes:EchoEngine")  # type: ignore[assignment,misc]
    return cli.main(["serve", *argv])


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
