"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.messages import FinishReason
from gantline_runtime.parsers.events import ArgumentsDelta, CallBegin, ContentDelta, Event, ReasoningDelta, gather
from gantline_runtime.prompt_prefixes import PromptPrefixes
from gantline_runtime.server.answer_form import AnswerForm, take_form
from gantline_runtime.server.answers import AnswerWriter, WholeChoice, answer, chosen_logprob, token_logprobs
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta, TokenEntry
from gantline_runtime.server.output_plan import plan_output
from gantline_runtime.server.prompt_scores import list_prompt_scores
from gantline_runtime.server.protocol import ChatRequest
from gantline_runtime.server.sampling import num_new_tokens
from gantline_runtime.server.service import Model, Service, Ticket, new_request_id
from gantline_runtime.server.sse import unless_client_leaves
from gantline_runtime.server.tools import new_tool_call

__all__ = ["ChatWriter", "create_chat_completion", "start_chat"]


async def create_chat_completion(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields, prefixes, form = await service.bodies.parse_prompt(request, ChatRequest, take_form)
    model = service.check_state()
    service.check_model_name(fields.model)
    ticket = service.admit(fields.n)
    request_id = new_request_id("chatcmpl")
    try:
        prompt, generation = await unless_client_leaves(request, start_chat(service, model, request_id, fields, ticket, prefixes, form))
    except BaseException:
        ticket.release()
        raise
    kind = "chat.completion.chunk" if fields.stream else "chat.completion"
    frame = {"id": request_id, "object": kind, "created": int(time.time()), "model": model.name}
    return await answer(request, service, ChatWriter(generation, model, frame, fields, prompt), stream=fields.stream)


async def start_chat(
    service: Service,
    model: Model,
    request_id: str,
    fields: ChatRequest,
    ticket: Ticket,
    prefixes: Sequence[PromptPrefixes],
    form: AnswerForm | None,
) -> tuple[list[int], Generation]:
    """The prompt's tokens, and its answer. Raises ApiError for what the model, its template or its context cannot do."""
    form = await service.read_form(fields, form)
    use = form.use
    if use is not None and not use.held and not model.formats.takes_tools:
        message = "tools: this model's chat template does not tell it of tools. With tool_choice required or a name it is made to call."
        raise ApiError(400, message, code="unsupported_parameter", param="tools")
    variables = {**model.formats.variables(fields.reasoning_effort), **fields.chat_template_kwargs}
    text = await service.render_chat(fields.messages, variables, use.described if use is not None else None)
    prompt = await service.encode_prompt(text)
    plan = plan_output(form.constraint, formats=model.formats, use=use, prompt=text, min_tokens=fields.min_tokens)
    wanted = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    sampling = await service.build_sampling(
        fields,
        max_new_tokens=num_new_tokens(wanted, len(prompt), service.session_len, default=None, param="messages"),
        num_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    generation = service.start(
        request_id, [prompt], [sampling], fields, ticket, plan=plan, num_prompt_logprobs=fields.prompt_logprobs, prefixes=prefixes
    )
    return prompt, generation


class ChatWriter(AnswerWriter):
    def __init__(
        self, generation: Generation, model: Model, frame: dict[str, Any], fields: ChatRequest, prompt: Sequence[int] = ()
    ) -> None:
        """`prompt` is needed for `prompt_logprobs` alone."""
        super().__init__(generation, model.tokenizer, frame, usage_events=fields.usage_events, return_token_ids=fields.return_token_ids)
        self._wants_logprobs = fields.logprobs
        self._scored_prompt = prompt if fields.prompt_logprobs is not None else ()
        self._id_length = model.formats.tools.id_length
        self._called: set[int] = set()
        """Choices that have called a tool."""

    def build_opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def build_chunks(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """One chunk for each event: a client's delta is content, reasoning, or calls. The last one tells the end."""
        if not self.shows(delta):
            return
        events = delta.events if delta.events is not None else [ContentDelta(delta.text)] if delta.text else []
        for event in events[:-1]:
            yield {"index": index, "delta": self._delta(index, event), "logprobs": None, "finish_reason": None}
        content = self._delta(index, events[-1]) if events else {}
        logprobs = self._logprobs(delta.entries) if delta.entries else None
        reason = self._finish_reason(index, delta.finish_reason)
        choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        yield self.add_token_ids(choice, delta.tokens)

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        match event:
            case ContentDelta():
                return {"content": event.text}
            case ReasoningDelta():
                return {"reasoning_content": event.text}
            case CallBegin():
                self._called.add(index)
                return {"tool_calls": [{"index": event.index, **new_tool_call(event.name, "", self._id_length)}]}
            case ArgumentsDelta():
                return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        return "tool_calls" if reason == "stop" and index in self._called else reason

    def build_whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        """The prompt is one for all choices, so that its log-probabilities stand beside them, as vLLM has it; the first has read it."""
        body = super().build_whole(choices)
        if self._scored_prompt:
            body["prompt_logprobs"] = list_prompt_scores(self.tokenizer, self._scored_prompt, choices[0].prompt_logprobs)
        return body

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        content, reasoning, calls = gather(whole.events)
        if calls:
            self._called.add(index)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [new_tool_call(name, arguments, self._id_length) for name, arguments in calls]
        logprobs = self._logprobs(whole.entries) if self._wants_logprobs else None
        reason = self._finish_reason(index, whole.finish_reason)
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return self.add_token_ids(choice, whole.tokens)

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.token_id, chosen_logprob(entry)),
                "top_logprobs": [self._token(id, value) for id, value in token_logprobs(entry)],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """`bytes` lets a client put characters together that are spread over several tokens."""
        return {"token": self.tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token_id))}
