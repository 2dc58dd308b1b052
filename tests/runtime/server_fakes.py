"""An engine whose model costs nothing, and byte tokenizers: the server's tests need neither weights nor torch.

`EchoEngine` has the interface of `LLMEngine` and the real scheduler and cache. Its model repeats the prompt's last message, byte by
byte, and then ends; `script.json` in the model's folder changes that (see `Script`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from gantline_runtime.config import EngineConfig
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import EngineRequest, PromptLogprobs, TokenLogprobs, TokenOutput
from gantline_runtime.request import RequestRejected, Sequence
from gantline_runtime.scheduler import PromptRead, Scheduler
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
    tokens_per_output: int = 1
    load_seconds: float = 0.0
    fail_at: str = ""
    """load, step (the one after the first ten), or a request whose prompt has the byte 1: what raises."""
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
class _StepTimes:
    schedule_s: float = 0.0


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


@dataclass
class _Stats:
    num_running: int
    num_waiting: int
    cache_usage: float
    num_cache_blocks: int
    block_size: int
    prefix_hit_rate: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_steps: int
    step_times: _StepTimes = field(default_factory=_StepTimes)
    memory: _Memory = field(default_factory=_Memory)


class EchoEngine:
    END, ASSISTANT = 257, 259

    def __init__(self, model_dir: str, config: EngineConfig, on_progress: Callable[[Any], None] | None = None) -> None:
        self.script = Script(**json.loads((Path(model_dir) / "script.json").read_text()))
        self._load(on_progress or (lambda _: None))
        self.session_len = config.session_len or self.script.session_len
        self.eos_token_ids = (self.END,)
        size = config.block_size
        self._cache = CacheManager(
            num_blocks=self.script.num_cache_blocks,
            block_size=size,
            max_slots=config.max_batch_size,
            max_blocks=-(-self.session_len // size),
            prefix_caching=config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(
            self._cache, max_running=config.max_batch_size, max_waiting=config.max_waiting, max_tokens=config.max_prefill_token_num
        )
        self._alphabet = {byte: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) for byte in [_byte_of(char)]}
        self._answers: dict[str, list[int]] = {}
        self._counts = {"arrived": 0, "generated": 0, "steps": 0}

    def _load(self, on_progress: Callable[[Any], None]) -> None:
        for i in range(10):
            on_progress(_Progress("weights", i * 100, 1000))
            time.sleep(self.script.load_seconds / 10)
            if self.script.fail_at == "load" and i == 5:
                raise _exception(self.script.error)

    def add_request(self, request: EngineRequest) -> None:
        if not request.prompt_ids or len(request.prompt_ids) >= self.session_len:
            raise RequestRejected("the prompt is empty or too long")
        if self.script.fail_at == "request" and self._alphabet[1] in request.prompt_ids:
            raise _exception(self.script.error)
        self._scheduler.add(
            Sequence(
                msgspec.structs.replace(request, grammar=""),  # it says what its script says
                arrival=self._counts["arrived"],
                session_len=self.session_len,
                eos_token_ids=self.eos_token_ids,
            )
        )
        self._counts["arrived"] += 1
        self._answers[request.request_id] = self._answer(request.prompt_ids)

    def _answer(self, prompt: list[int]) -> list[int]:
        if self.script.answer is not None:
            return [self._alphabet[byte] for byte in self.script.answer]
        body = prompt[:-1] if prompt[-1] == self.ASSISTANT else prompt
        last = max((i for i, token in enumerate(body) if token >= 256), default=-1)
        return body[last + 1 :] or [self._alphabet[ord("?")]]

    def abort(self, request_id: str) -> bool:
        self._answers.pop(request_id, None)
        return self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def step(self) -> list[TokenOutput]:
        time.sleep(self.script.step_seconds)
        self._counts["steps"] += 1
        if self.script.fail_at == "step" and self._counts["steps"] > 10:
            raise _exception(self.script.error)
        outputs: dict[str, list[TokenOutput]] = {}
        for _ in range(self.script.tokens_per_output):
            step = self._scheduler.schedule()
            if step is None:
                break
            wants = any(s.sampling.num_logprobs is not None for s in step.samples)
            tokens = [self._next_token(s) for s in step.samples]
            logprobs = [_logprobs(t, s.sampling.num_logprobs) for t, s in zip(tokens, step.samples, strict=True)] if wants else None
            for output in self._scheduler.postprocess(step, tokens, logprobs, [_read(read) for read in step.reads]):
                outputs.setdefault(output.request_id, []).append(output)
        merged = [_merge(parts) for parts in outputs.values()]
        self._counts["generated"] += sum(len(output.token_ids) for output in merged)
        return merged

    def _next_token(self, sequence: Sequence) -> int:
        answer, position = self._answers[sequence.request_id], sequence.num_generated
        biases = {token: bias for token, bias in sequence.sampling.logit_bias.items() if bias > 0}
        if biases:
            return max(biases, key=lambda token: biases[token])
        if position < len(answer) or self.script.endless:
            return answer[position % len(answer)]
        if sequence.sampling.ignore_eos or position < sequence.sampling.min_new_tokens:
            return answer[position % len(answer)]
        return self.END

    def stats(self) -> _Stats:
        scheduler, cache = self._scheduler, self._cache
        return _Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            cache_usage=cache.usage,
            num_cache_blocks=cache.num_blocks,
            block_size=cache.block_size,
            prefix_hit_rate=cache.hit_rate,
            num_prompt_tokens=cache.num_queried_tokens,
            num_cached_tokens=cache.num_hit_tokens,
            num_generated_tokens=self._counts["generated"],
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._counts["steps"],
        )

    def close(self) -> None:
        self._scheduler.check_integrity()


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
    )


def _logprobs(token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    return TokenLogprobs(-0.25, [token + i for i in range(count)], [-0.25 - i for i in range(count)])


def _read(read: PromptRead) -> PromptLogprobs | np.ndarray[Any, np.dtype[np.float32]]:
    """Log-probability -0.5 of every token, the token after it in the vocabulary the likeliest; hidden states of four numbers."""
    if read.sequence.pooling is not None:
        return np.array([3.0, 0.0, 4.0, 0.0], dtype=np.float32) * read.count
    tokens = read.sequence.tokens[read.start + 1 : read.start + 1 + read.count]
    count = read.sequence.num_prompt_logprobs or 0
    ids = [[token + 1 + i for i in range(count)] for token in tokens]
    return PromptLogprobs(read.start + 1, [-0.5] * read.count, ids, [[-0.25 - i for i in range(count)] for _ in tokens])


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
