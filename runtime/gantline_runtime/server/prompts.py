"""What only reads prompts: POST /v1/embeddings, POST /get_ppl, POST /v1/encode"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.messages import SamplingParams
from gantline_runtime.server.errors import ApiError, json_response
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta
from gantline_runtime.server.protocol import Message, SamplingFields
from gantline_runtime.server.protocol_prompts import EmbeddingRequest, EncodeRequest, PerplexityRequest
from gantline_runtime.server.sampling import num_new_tokens, require_token
from gantline_runtime.server.service import Service, new_request_id
from gantline_runtime.server.sse import unless_client_leaves

__all__ = ["compute_perplexity", "create_embeddings", "encode"]

_READS_AT_ONCE = 256
"""Of one request; thousands of texts must not fill the queue that others wait in."""
_WRITTEN_AT_ONCE = 8
_encode = msgspec.json.Encoder().encode
_READ_ONLY = SamplingParams(max_new_tokens=0)


async def create_embeddings(request: Request) -> Response:
    """One vector for each input: the final hidden state of its last token, or the mean over its tokens."""
    service: Service = request.app.state.service
    service.check_state()
    fields = await service.bodies.parse(request, EmbeddingRequest)
    model = service.check_state()
    service.check_model_name(fields.model)
    pooling = fields.pooling or model.pooling
    generation = await _read(request, service, fields.input, fields.sampling, add_special_tokens=fields.add_special_tokens, pooling=pooling)
    data = []
    for i, choice in enumerate(generation.choices):
        data.append(msgspec.Raw(_encode({"object": "embedding", "index": i, "embedding": _written(choice.output.embedding, fields)})))
        if i % _WRITTEN_AT_ONCE == 0:
            await asyncio.sleep(0)  # thousands of vectors take a second
    usage = generation.usage()
    counted = {name: usage[name] for name in ("prompt_tokens", "total_tokens", "prompt_tokens_details")}
    return json_response({"object": "list", "model": model.name, "data": data, "usage": counted})


def _written(vector: bytes, fields: EmbeddingRequest) -> str | list[float]:
    values = np.frombuffer(vector, dtype="<f4")
    if not np.isfinite(values).all():
        raise ApiError(
            500, "The model gave a hidden state that is not a number. Its weights or its type may be at fault.", code="engine_error"
        )
    if fields.normalize:
        length = float(np.linalg.norm(values.astype(np.float64)))
        values = values / np.float32(length) if length else values
    return base64.b64encode(values.tobytes()).decode() if fields.encoding_format == "base64" else values.tolist()


async def compute_perplexity(request: Request) -> Response:
    """The mean cross-entropy of a text's tokens after the first, as LMDeploy's clients expect it under `ppl`, and the perplexity itself."""
    service: Service = request.app.state.service
    service.check_state()
    fields = await service.bodies.parse(request, PerplexityRequest)
    service.check_state()
    service.check_model_name(fields.model)
    total, count = 0.0, 0

    def add(index: int, delta: Delta) -> None:
        nonlocal total, count
        for chunk in delta.prompt_logprobs:
            total, count = total - math.fsum(chunk.chosen), count + len(chunk.chosen)

    await _read(request, service, [fields.input], fields.sampling, num_prompt_logprobs=0, on_delta=add)
    if not count:
        raise ApiError(400, "input: a text of one token has no perplexity; give at least two.", code="invalid_value", param="input")
    loss = total / count
    return json_response({"ppl": _finite(loss), "perplexity": _finite(math.exp(min(loss, 700.0))), "num_tokens": count})


def _finite(value: float) -> float | None:
    """JSON has no infinity; a text that the model thinks impossible has no finite loss."""
    return value if math.isfinite(value) else None


async def _read(
    request: Request,
    service: Service,
    inputs: Sequence[str | list[int]],
    fields: SamplingFields,
    *,
    add_special_tokens: bool = True,
    on_delta: Any = lambda index, delta: None,
    **wanted: Any,
) -> Generation:
    """Have the engine read each of `inputs`; the generation is over and closed when it is returned."""
    at_once = min(len(inputs), service.capacity, _READS_AT_ONCE)
    ticket = service.admit(at_once)
    try:
        prompts = await unless_client_leaves(request, _encode_all(service, inputs, add_special_tokens))
        sampling = [_READ_ONLY] * len(prompts)
        generation = service.start(new_request_id("read"), prompts, sampling, fields, ticket, at_once=at_once, **wanted)
    except BaseException:
        ticket.release()
        raise
    request.state.generation = generation
    try:
        await unless_client_leaves(request, _drain(generation, on_delta))
    finally:
        generation.close()
    return generation


async def _drain(generation: Generation, on_delta: Any) -> None:
    while not generation.finished:
        for index, delta in await generation.next():
            on_delta(index, delta)


async def _encode_all(service: Service, inputs: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
    prompts = []
    for given in inputs:
        prompt = given
        if isinstance(given, str):
            prompt = await service.encode(given, add_special_tokens=add_special_tokens, param="input")
        if not prompt:
            raise ApiError(400, "input: an empty text has no tokens.", code="invalid_value", param="input")
        assert isinstance(prompt, list) and service.model is not None
        require_token(max(prompt), service.model.tokenizer.vocab_size, "input")
        num_new_tokens(0, len(prompt), service.session_len, default=None, param="input")
        prompts.append(prompt)
    return prompts


async def encode(request: Request) -> Response:
    """LMDeploy's /tokenize: a text or several to tokens."""
    service: Service = request.app.state.service
    service.check_state()
    fields = await service.bodies.parse(request, EncodeRequest)
    service.check_model_name(fields.model)
    texts = [fields.input] if isinstance(fields.input, str) else fields.input
    encoded = [await _encode_one(service, text, fields) for text in texts]
    if isinstance(fields.input, str):
        return json_response({"input_ids": encoded[0], "length": len(encoded[0])})
    return json_response({"input_ids": encoded, "length": [len(ids) for ids in encoded]})


async def _encode_one(service: Service, text: str, fields: EncodeRequest) -> list[int]:
    if fields.do_preprocess:
        return await service.encode_chat([Message.model_validate({"role": "user", "content": text})], {})
    return await service.encode(text, add_special_tokens=fields.add_bos)
