"""What an engine says of requests, to be compared to the last bit; under Triton's interpreter when run by itself, on a small model.

TRITON_INTERPRET=1 GANTLINE_KERNEL_BACKEND=invariant_triton python -m tests.runtime.invariance CHECKPOINT
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from gantline_kernels import api
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput

from tests.runtime.engine_support import drain, request, tokens_of

Facts = tuple[Any, ...]


def prompts_of(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Every second one begins with half of a text that they share."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab_size) for _ in range(max(lengths))]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return [shared[: len(prompt) // 2] + prompt[len(prompt) // 2 :] if i % 2 else prompt for i, prompt in enumerate(prompts)]


def ask(engine: LLMEngine, name: str, prompt: list[int], number: int, count: int) -> None:
    """A request, greedy or drawn by its number, and one that reads the log-probabilities of its prompt."""
    sampling: dict[str, Any] = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "top_p": 0.9, "seed": number}
    engine.add_request(request(name, prompt, count=count, num_logprobs=3, **sampling))
    if number % 3 == 0:
        reading = SamplingParams(max_new_tokens=0)
        engine.add_request(EngineRequest(request_id=f"{name}-reads", prompt_ids=prompt, sampling=reading, num_prompt_logprobs=2))


def facts_of(outputs: dict[str, list[TokenOutput]], name: str) -> Facts:
    """Tokens, and all that is known of them and of the prompt."""
    read = [o.prompt_logprobs for o in outputs.get(f"{name}-reads", ()) if o.prompt_logprobs]
    columns = [[entry for part in read for entry in getattr(part, field)] for field in ("chosen", "top_ids", "top_logprobs", "ranks")]
    return tokens_of(outputs[name]), [entry for o in outputs[name] for entry in o.logprobs or ()], columns


def ask_all(engine: LLMEngine, prompts: list[list[int]], count: int, *, together: bool, others: list[list[int]] = []) -> list[Facts]:  # noqa: B006
    """What is said of `prompts`, each by itself or all at once, with `others` before, between and after them."""
    outputs: dict[str, list[TokenOutput]] = {}
    for i, prompt in enumerate(others[::2]):
        engine.add_request(request(f"before {i}", prompt, count=count + 3 * i % 17, temperature=1.0, top_k=5))
    for i, prompt in enumerate(prompts):
        ask(engine, str(i), prompt, i, count)
        if not together:
            outputs |= drain(engine, checked=False)
            engine.reset_prefix_cache()
    for i, prompt in enumerate(others[1::2]):
        engine.add_request(request(f"after {i}", prompt, count=count + 5 * i % 13, num_logprobs=1))
    outputs |= drain(engine, checked=False)
    return [facts_of(outputs, str(i)) for i in range(len(prompts))]


def main(folder: Path) -> None:
    from tests.kernels import interpreter

    interpreter.prepare()

    api.find_variance = lambda products, *, backend: ""  # seconds here; it has a test of its own
    fixed: dict[str, Any] = {"device": "cpu", "backend": "triton", "batch_invariant": True, "dtype": "float16", "block_size": 16}
    prompts, others = prompts_of([5, 21], 512), prompts_of([7], 512, seed=1)
    found = []
    for together, settings in ((False, {}), (True, {"max_prefill_token_num": 17})):
        engine = LLMEngine(folder, EngineConfig(**fixed, num_cache_blocks=64, session_len=128, max_batch_size=8, **settings))
        found.append(ask_all(engine, prompts, 2, together=together, others=others if together else []))
        if together:
            found.append(ask_all(engine, prompts, 2, together=True))
            assert engine.stats().num_cached_tokens > 0
        engine.close()
    assert found[0] == found[1] == found[2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
