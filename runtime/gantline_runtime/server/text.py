"""POST /tokenize and POST /detokenize"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.errors import json_response
from gantline_runtime.server.protocol import DetokenizeRequest, TokenizeRequest
from gantline_runtime.server.sampling import require_token
from gantline_runtime.server.service import Service

__all__ = ["detokenize", "tokenize"]


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields = await service.bodies.parse(request, TokenizeRequest)
    service.check_model_name(fields.model)
    if fields.messages is not None:
        tokens = await service.encode_chat(fields.messages, fields.chat_template_kwargs)
    else:
        assert fields.prompt is not None  # held by TokenizeRequest
        tokens = await service.encode(fields.prompt, add_special_tokens=fields.add_special_tokens)
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": service.session_len})


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.check_state()
    fields = await service.bodies.parse(request, DetokenizeRequest)
    service.check_model_name(fields.model)
    require_token(max(fields.tokens, default=0), model.tokenizer.vocab_size, "tokens")
    return json_response({"prompt": await service.decode(fields.tokens)})
