"""What the endpoints share: admission, chat templates and tokenizing off the event loop, and requests to the engine."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from gantline_runtime.chat_template import RESERVED_NAMES, TemplateError
from gantline_runtime.config import EngineConfig, ServerConfig
from gantline_runtime.engine_client import EngineClient
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.messages import EngineRequest, Pooling, SamplingParams
from gantline_runtime.prompt_prefixes import PromptPrefixes
from gantline_runtime.server.answer_form import AnswerForm, is_plain, read_form
from gantline_runtime.server.body_reader import BodyReader
from gantline_runtime.server.callers import Caller, current_caller
from gantline_runtime.server.errors import ApiError, not_accepting, queue_full
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.lifecycle import Lifecycle, State
from gantline_runtime.server.metrics import Metrics
from gantline_runtime.server.output import ChoiceOutput
from gantline_runtime.server.output_plan import PLAIN, ModelFormats, OutputPlan
from gantline_runtime.server.prefix_directory import PrefixDirectory
from gantline_runtime.server.protocol import Message, SamplingFields
from gantline_runtime.server.sampling import build_sampling, seeded, spell_bad_words
from gantline_runtime.server.template_process import TemplateRenderer
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["Model", "Service", "Ticket", "new_request_id"]

T = TypeVar("T")

_LONG = 1 << 18
"""Characters, or tokens: some tenths of a second."""


@dataclass(frozen=True)
class Model:
    """All that the API process knows of the checkpoint. `renderer` is None where it has no chat template; `template_problem` says why one
    that it has cannot be used."""

    name: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    pooling: Pooling = "last"
    formats: ModelFormats = ModelFormats()
    renderer: TemplateRenderer | None = None
    template_problem: str = "This model has no chat template; use /v1/completions, or start the server with --chat-template."
    created: int = 0


class Service:
    """`model` and `session_len` are set once loaded; until then `admit` refuses everything."""

    def __init__(self, engine_config: EngineConfig, config: ServerConfig, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self.config = config
        self.lifecycle = lifecycle
        self.metrics = metrics
        self.prefixes = PrefixDirectory()
        self.bodies = BodyReader(config.max_body_bytes)
        self.engine: EngineClient | None = None
        self.model: Model | None = None
        self.session_len = 0
        self.eos_token_ids: frozenset[int] = frozenset()
        self._capacity = engine_config.max_batch_size + engine_config.max_waiting
        self._caches_prefixes = engine_config.enable_prefix_caching
        self._num_admitted = 0
        self.idle = asyncio.Event()
        """Set while no request is admitted."""
        self.idle.set()
        # Encoding lets other threads run; more of them would only compete with the engine.
        self._pool = ThreadPoolExecutor(max_workers=max(2, min(8, (os.cpu_count() or 2) // 2)), thread_name_prefix="tokenizer")
        self._long_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer-long")
        """For what takes seconds, so that nothing short is behind it."""

    async def close(self) -> None:
        if self.model is not None and self.model.renderer is not None:
            await self.model.renderer.close()
        await self.bodies.close()
        for pool in (self._pool, self._long_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def seconds_without_progress(self) -> float:
        """How long the engine has not got on; 0 while it loads and warms up, which the startup probe bounds."""
        if self.engine is None or self.lifecycle.state in (State.LOADING, State.WARMING):
            return 0.0
        return self.engine.seconds_without_progress()

    # ---- admission

    @property
    def num_admitted(self) -> int:
        """Engine requests that were admitted and have not ended: waiting for a tokenizer, in the engine, or being sent."""
        return self._num_admitted

    @property
    def capacity(self) -> int:
        """Engine requests that may be admitted at a time."""
        return self._capacity

    def check_state(self) -> Model:
        """The model, if requests are taken now. Raises ApiError 503 otherwise."""
        if not self.lifecycle.takes_requests or self.model is None or self.engine is None or self.engine.died.done():
            raise not_accepting(self.lifecycle)
        return self.model

    def check_model_name(self, name: str | None) -> None:
        assert self.model is not None
        if name is not None and name != self.model.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist here. This server has {self.model.name!r}.",
                code="model_not_found",
                param="model",
            )

    def admit(self, count: int) -> Ticket:
        """Places for `count` engine requests. Raises ApiError 429 if more would wait than the queue may hold."""
        if count > self._capacity:
            message = f"{count} choices are asked for at once; this server runs or queues at most {self._capacity}."
            raise ApiError(400, message, code="invalid_value", param="n")
        if self._num_admitted + count > self._capacity:
            assert self.engine is not None
            raise queue_full(f"{self._num_admitted} requests are running or waiting", self.engine.report.seconds_until_room)
        self._num_admitted += count
        self.idle.clear()
        return Ticket(count, self._leave, current_caller.get())

    def _leave(self, count: int) -> None:
        self._num_admitted -= count
        if not self._num_admitted:
            self.idle.set()

    # ---- text to tokens

    async def encode_chat(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        """Token ids of the prompt that the model's template makes of `messages`."""
        return await self.encode_prompt(await self.render_chat(messages, variables))

    async def encode_prompt(self, text: str) -> list[int]:
        """Token ids of what `render_chat` made: templates write their special tokens themselves."""
        return await self.encode(text, add_special_tokens=False, param="messages")

    async def render_chat(self, messages: Sequence[Message], variables: dict[str, Any], tools: msgspec.Raw | None = None) -> str:
        """The prompt that the model's template makes of `messages` and `tools` (`ToolUse.described`). Raises ApiError where it refuses
        them."""
        assert self.model is not None
        reserved = RESERVED_NAMES & variables.keys()
        if reserved:
            raise ApiError(400, f"chat_template_kwargs may not set {min(reserved)!r}.", code="invalid_value", param="chat_template_kwargs")
        if self.model.renderer is None:
            raise ApiError(400, self.model.template_problem, code="invalid_template", param="messages")
        try:
            described = {"tools": tools} if tools is not None else {}
            return await self.model.renderer.render(self._for_template(messages), {**variables, **described})
        except TemplateError as error:
            raise ApiError(400, f"{str(error)[:1].upper()}{str(error)[1:]}.", code="invalid_template", param="messages") from None

    def _for_template(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        assert self.model is not None
        rendered = []
        for i, message in enumerate(messages):
            try:
                rendered.append(message.for_template(arguments_as_text=self.model.formats.tools.arguments_as_text))
            except ValueError as error:
                param = f"messages[{i}].tool_calls"
                raise ApiError(400, f"{param}: {str(error)[:200]}.", code="invalid_value", param=param) from None
        return rendered

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        """Token ids of `text`. With `param`, the field that it comes from, a text that cannot fit the context is refused before it is
        tokenized, which for megabytes takes seconds."""
        assert self.model is not None
        tokenizer = self.model.tokenizer
        if param is not None and len(text) > self.session_len * tokenizer.max_token_chars:
            message = f"The prompt has {len(text)} characters; they cannot fit the {self.session_len} tokens of the model's context."
            raise ApiError(400, message, code="context_length_exceeded", param=param)
        return await self.in_thread(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens), size=len(text))

    async def read_form(self, fields: SamplingFields, form: AnswerForm | None) -> AnswerForm:
        """`form`, or, where it was not read with the body, what `fields` ask: beside the event loop, since a schema of thousands of
        references takes a second. Raises ApiError."""
        if form is not None:
            return form
        return read_form(fields) if is_plain(fields) else await self.in_thread(lambda: read_form(fields))

    async def build_sampling(self, fields: SamplingFields, *, max_new_tokens: int, num_logprobs: int | None) -> SamplingParams:
        """What the engine is told of `fields`. Raises ApiError for what this model cannot do."""
        assert self.model is not None
        tokenizer = self.model.tokenizer
        params = build_sampling(
            fields, self.model.defaults, max_new_tokens=max_new_tokens, num_logprobs=num_logprobs, vocab_size=tokenizer.vocab_size
        )
        if not fields.bad_words:
            return params
        words = await self.in_thread(lambda: spell_bad_words(fields.bad_words, tokenizer))
        return msgspec.structs.replace(params, bad_words=words)

    async def decode(self, tokens: Sequence[int]) -> str:
        assert self.model is not None
        tokenizer = self.model.tokenizer
        return await self.in_thread(lambda: tokenizer.decode(tokens), size=len(tokens))

    async def in_thread(self, work: Callable[[], T], *, size: int = 0) -> T:
        """The result of `work`; `size` is that of the text, or the tokens, that it takes."""
        pool = self._long_pool if size > _LONG else self._pool
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    # ---- requests to the engine

    def start(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        fields: SamplingFields,
        ticket: Ticket,
        *,
        plan: OutputPlan = PLAIN,
        num_prompt_logprobs: int | None = None,
        pooling: Pooling | None = None,
        prefixes: Sequence[PromptPrefixes] = (),
        at_once: int | None = None,
    ) -> Generation:
        """Send `fields.n` requests for each prompt, each with its prompt's `sampling`. Choice i of prompt p has the index p * n + i.
        What is read of a prompt beside sampling is read by its first choice. `prefixes` are those of the prompts, where they are known.
        With `at_once`, so many are in the engine at a time. The generation releases `ticket` when it is closed. Raises ApiError for a
        priority that the caller may not have."""
        assert self.model is not None and self.engine is not None
        caller = ticket.caller
        if fields.priority < caller.best_priority:
            message = f"priority is {fields.priority}; this API key allows {caller.best_priority} and more."
            raise ApiError(400, message, code="invalid_value", param="priority")
        constraint = plan.constraint
        grammar, param = (constraint.grammar, constraint.param) if constraint is not None else ("", "")
        timeout_s = self._timeout(fields.timeout)
        generation = Generation(self.engine.open_group(), self.metrics, ticket, at_once=at_once, timeout_s=timeout_s, grammar_param=param)
        try:
            for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
                marks = prefixes[i].marks(len(prompt)) if self._caches_prefixes and i < len(prefixes) else []
                for choice in range(fields.n):
                    engine_id = f"{request_id}-{i * fields.n + choice}"
                    reads = not choice or not params.max_new_tokens
                    request = EngineRequest(
                        request_id=engine_id,
                        prompt_ids=prompt,
                        sampling=seeded(params, choice),
                        grammar=grammar,
                        num_prompt_logprobs=num_prompt_logprobs if reads else None,
                        pooling=pooling,
                        tenant=caller.name,
                        weight=caller.weight,
                        priority=fields.priority,
                        prefix_marks=[] if choice else marks,
                    )
                    generation.submit(i, request, self._build_output(request, fields, plan))
        except BaseException:
            generation.close()
            raise
        return generation

    def _build_output(self, request: EngineRequest, fields: SamplingFields, plan: OutputPlan) -> ChoiceOutput:
        assert self.model is not None
        sampling = request.sampling
        return ChoiceOutput(
            self.model.tokenizer,
            request.prompt_ids,
            stop=fields.stop,
            stop_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_token_ids),
            min_tokens=sampling.min_new_tokens,
            skip_special_tokens=fields.skip_special_tokens,
            include_stop=fields.include_stop_str_in_output,
            parser=plan.make_parser(),
            shown_ids=plan.shown_ids,
        )

    def _timeout(self, wanted: float | None) -> float | None:
        """Seconds that an answer may take: what the client wants, within what the server allows."""
        return min((t for t in (wanted, self.config.request_timeout) if t is not None), default=None)


class Ticket:
    """Places among the requests that a server takes, until released; releasing twice does nothing."""

    def __init__(self, count: int, release: Callable[[int], None], caller: Caller) -> None:
        self.taken_at = time.monotonic()
        self.caller = caller
        self._count = count
        self._release = release

    def release(self) -> None:
        count, self._count = self._count, 0
        if count:
            self._release(count)


def new_request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
