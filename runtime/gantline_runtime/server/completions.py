"""POST /v1/completions"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.prompt_prefixes import PromptPrefixes
from gantline_runtime.server.answer_form import AnswerForm, take_form
from gantline_runtime.server.answers import AnswerWriter, WholeChoice, answer, chosen_logprob, token_logprobs
from gantline_runtime.server.echo import PromptEcho
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta, TokenEntry
from gantline_runtime.server.output_plan import plan_output
from gantline_runtime.server.prompt_scores import list_prompt_scores
from gantline_runtime.server.protocol import CompletionRequest
from gantline_runtime.server.sampling import num_new_tokens, require_token
from gantline_runtime.server.service import Model, Service, Ticket, new_request_id
from gantline_runtime.server.sse import unless_client_leaves

__all__ = ["create_completion"]

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint alone."""


async def create_completion(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields, prefixes, form = await service.bodies.parse_prompt(request, CompletionRequest, take_form)
    model = service.check_state()
    service.check_model_name(fields.model)
    ticket = service.admit(len(fields.prompt) * fields.n)
    request_id = new_request_id("cmpl")
    try:
        prompts, echoes = await unless_client_leaves(request, _read_prompts(service, model, fields))
        generation = await unless_client_leaves(request, _start(service, model, request_id, fields, ticket, prompts, prefixes, form))
    except BaseException:
        ticket.release()
        raise
    frame = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model.name}
    writer: AnswerWriter
    if fields.echo and fields.logprobs is not None:
        writer = _ScoredEchoWriter(generation, model, frame, fields, prompts)
    elif fields.prompt_logprobs is not None:
        writer = _ScoredPromptWriter(generation, model, frame, fields, echoes, prompts)
    else:
        writer = _CompletionWriter(generation, model, frame, fields, echoes)
    return await answer(request, service, writer, stream=fields.stream)


async def _read_prompts(service: Service, model: Model, fields: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """The tokens of each prompt, and what `echo` without log-probabilities puts before each choice."""
    prompts = [prompt if isinstance(prompt, list) else await service.encode(prompt, param="prompt") for prompt in fields.prompt]
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "prompt: an empty text gives this model nothing to continue.", code="invalid_value", param="prompt")
        require_token(max(prompt), model.tokenizer.vocab_size, "prompt")
    texts = [await _echo(service, model, prompt) if fields.echo else "" for prompt in fields.prompt]
    return prompts, [text for text in texts for _ in range(fields.n)]


async def _start(
    service: Service,
    model: Model,
    request_id: str,
    fields: CompletionRequest,
    ticket: Ticket,
    prompts: Sequence[list[int]],
    prefixes: Sequence[PromptPrefixes],
    form: AnswerForm | None,
) -> Generation:
    plan = plan_output((await service.read_form(fields, form)).constraint, min_tokens=fields.min_tokens)
    sampling = []
    for prompt in prompts:
        limit = num_new_tokens(fields.max_tokens, len(prompt), service.session_len, default=_DEFAULT_MAX_TOKENS, param="prompt")
        sampling.append(await service.build_sampling(fields, max_new_tokens=limit, num_logprobs=fields.logprobs))
    wanted = fields.logprobs if fields.echo and fields.logprobs is not None else fields.prompt_logprobs
    if wanted is None and fields.max_tokens == 0:
        wanted = 0
    return service.start(request_id, prompts, sampling, fields, ticket, plan=plan, num_prompt_logprobs=wanted, prefixes=prefixes)


async def _echo(service: Service, model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await service.decode(prompt)


class _CompletionWriter(AnswerWriter):
    def __init__(
        self, generation: Generation, model: Model, frame: dict[str, Any], fields: CompletionRequest, echoes: Sequence[str] = ()
    ) -> None:
        super().__init__(generation, model.tokenizer, frame, usage_events=fields.usage_events, return_token_ids=fields.return_token_ids)
        self._wants_logprobs = fields.logprobs is not None
        self._echoes = echoes

    def build_opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, self._echoes[index], None, None) if self._echoes[index] else None

    def build_chunk(self, index: int, delta: Delta, offset: int = 0) -> dict[str, Any]:
        logprobs = self._logprobs(delta.entries, offset) if delta.entries else None
        return self.add_token_ids(self._choice(index, delta.text, logprobs, delta.finish_reason), delta.tokens)

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        logprobs = self._logprobs(whole.entries) if self._wants_logprobs else None
        return self.add_token_ids(self._choice(index, self._echoes[index] + whole.text, logprobs, whole.finish_reason), whole.tokens)

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, entries: Sequence[TokenEntry], offset: int = 0) -> dict[str, Any]:
        """`text_offset` counts characters of the choice's text, `offset` of which are the echoed prompt's. A prompt's first token has no
        log-probabilities: null."""
        text = self.tokenizer.token_text
        return {
            "tokens": [text(entry.token_id) for entry in entries],
            "token_logprobs": [None if entry.logprobs is None else chosen_logprob(entry) for entry in entries],
            "top_logprobs": [
                None if entry.logprobs is None else {text(id): value for id, value in token_logprobs(entry)} for entry in entries
            ],
            "text_offset": [offset + entry.start for entry in entries],
        }


class _ScoredPromptWriter(_CompletionWriter):
    """Each choice has its prompt's `prompt_logprobs`, as vLLM has it for this endpoint."""

    def __init__(
        self,
        generation: Generation,
        model: Model,
        frame: dict[str, Any],
        fields: CompletionRequest,
        echoes: Sequence[str],
        prompts: Sequence[list[int]],
    ) -> None:
        super().__init__(generation, model, frame, fields, echoes)
        self._n, self._prompts = fields.n, prompts
        self._scores: list[dict[str, Any] | None] = []

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        if index % self._n == 0:  # it is built before the others of its prompt, and has read it for all
            self._scores = list_prompt_scores(self.tokenizer, self._prompts[index // self._n], whole.prompt_logprobs)
        return {**super().build_choice(index, whole), "prompt_logprobs": self._scores}


class _ScoredEchoWriter(_CompletionWriter):
    """`echo` with log-probabilities. The first choice of each prompt reads it; the others wait until it is read, and share what was."""

    def __init__(
        self, generation: Generation, model: Model, frame: dict[str, Any], fields: CompletionRequest, prompts: Sequence[list[int]]
    ) -> None:
        super().__init__(generation, model, frame, fields)
        self._n = fields.n
        self._echoed = [PromptEcho(model.tokenizer, prompt, skip_special_tokens=fields.skip_special_tokens) for prompt in prompts]
        self._waiting: dict[int, list[Delta]] = {}

    def build_opening(self, index: int) -> dict[str, Any] | None:
        return None

    def build_chunks(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        prompt, choice = divmod(index, self._n)
        echo = self._echoed[prompt]
        if choice and not echo.complete:
            self._waiting.setdefault(index, []).append(delta)
            return
        if not choice:
            yield from self._echo_chunks(prompt, delta)
        if self.shows(delta):
            yield self.build_chunk(index, delta, echo.num_chars)

    def _echo_chunks(self, prompt: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """What `delta` adds to the prompt, for each of its choices; then what the others have been waiting with."""
        echo, indices = self._echoed[prompt], range(prompt * self._n, (prompt + 1) * self._n)
        if echo.complete:
            return
        ends = bool(delta.tokens or delta.finish_reason is not None)
        for chunk in (*delta.prompt_logprobs, *((None,) if ends else ())):
            text, entries = echo.take(chunk) if not echo.complete else ("", [])
            for index in indices if entries else ():
                yield self._choice(index, text, self._logprobs(entries), None)
        for index in indices if echo.complete else ():
            for waiting in self._waiting.pop(index, ()):
                yield from self.build_chunks(index, waiting)

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        text, entries = self._whole_echo(index // self._n, whole)
        logprobs, own = self._logprobs(entries), self._logprobs(whole.entries, len(text))
        joined = {name: logprobs[name] + own[name] for name in logprobs}
        return self.add_token_ids(self._choice(index, text + whole.text, joined, whole.finish_reason), whole.tokens)

    def _whole_echo(self, prompt: int, whole: WholeChoice) -> tuple[str, list[TokenEntry]]:
        """The first choice of a prompt is built first, and has what was read of it."""
        if not self._echoed[prompt].complete:
            pieces = [self._echoed[prompt].take(chunk) for chunk in whole.prompt_logprobs]
            if not self._echoed[prompt].complete:
                pieces.append(self._echoed[prompt].take(None))
            self._whole = "".join(text for text, _ in pieces), [entry for _, entries in pieces for entry in entries]
        return self._whole
