"""POST /generate, as LMDeploy's clients know it"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.messages import FinishReason, TokenLogprobs
from gantline_runtime.prompt_prefixes import PromptPrefixes
from gantline_runtime.server.answer_form import AnswerForm, take_form
from gantline_runtime.server.answers import AnswerWriter, WholeChoice, answer, finite_logprob
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta
from gantline_runtime.server.output_plan import plan_output
from gantline_runtime.server.protocol_prompts import GenerateRequest
from gantline_runtime.server.sampling import num_new_tokens, require_token
from gantline_runtime.server.service import Model, Service, Ticket, new_request_id
from gantline_runtime.server.sse import encode_event, unless_client_leaves

__all__ = ["generate"]


async def generate(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields, prefixes, form = await service.bodies.parse_prompt(request, GenerateRequest, take_form)
    model = service.check_state()
    service.check_model_name(fields.model)
    ticket = service.admit(1)
    try:
        generation = await unless_client_leaves(request, _start(service, model, fields, ticket, prefixes, form))
    except BaseException:
        ticket.release()
        raise
    return await answer(request, service, _GenerateWriter(generation, model, fields), stream=fields.stream)


async def _start(
    service: Service,
    model: Model,
    fields: GenerateRequest,
    ticket: Ticket,
    prefixes: Sequence[PromptPrefixes],
    form: AnswerForm | None,
) -> Generation:
    plan = plan_output((await service.read_form(fields, form)).constraint, min_tokens=fields.min_tokens)
    prompt, param = fields.input_ids, "input_ids"
    if prompt is None:
        assert fields.prompt is not None  # held by GenerateRequest
        prompt, param = await service.encode(fields.prompt, param="prompt"), "prompt"
    if not prompt:
        raise ApiError(400, f"{param}: an empty text gives this model nothing to continue.", code="invalid_value", param=param)
    require_token(max(prompt), model.tokenizer.vocab_size, param)
    limit = num_new_tokens(fields.max_tokens, len(prompt), service.session_len, default=None, param=param)
    sampling = await service.build_sampling(fields, max_new_tokens=limit, num_logprobs=0 if fields.return_logprob else None)
    return service.start(new_request_id("gen"), [prompt], [sampling], fields, ticket, plan=plan, prefixes=prefixes)


class _GenerateWriter(AnswerWriter):
    """One choice; a stream's events each hold what was added, and the counts so far."""

    def __init__(self, generation: Generation, model: Model, fields: GenerateRequest) -> None:
        super().__init__(generation, model.tokenizer, {}, return_token_ids=True)
        self._wants_logprobs = fields.return_logprob

    def build_chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._body(delta.text, delta.tokens, delta.finish_reason)

    async def events(self, first: Sequence[tuple[int, Delta]]) -> AsyncGenerator[bytes, None]:
        deltas = first
        while True:
            for index, delta in deltas:
                for chunk in self.build_chunks(index, delta):
                    yield encode_event(chunk)
            if self.generation.finished:
                break
            deltas = await self.generation.next()

    async def whole(self, first: Sequence[tuple[int, Delta]]) -> dict[str, Any]:
        choice = (await self.collect(first))[0]
        return self._whole(choice)

    def _whole(self, choice: WholeChoice) -> dict[str, Any]:
        return self._body(choice.text, choice.tokens, choice.finish_reason)

    def _body(self, text: str, tokens: Sequence[tuple[int, TokenLogprobs | None]], reason: FinishReason | None) -> dict[str, Any]:
        usage = self.generation.usage()
        logprobs = [(finite_logprob(entry.chosen), token) for token, entry in tokens if entry is not None]
        meta = {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "finish_reason": None if reason is None else {"type": reason},
            "output_token_logprobs": logprobs if self._wants_logprobs else None,
        }
        return {"text": text, "output_ids": [token for token, _ in tokens], "meta_info": meta}
