"""What an API process loads of a model: its tokenizer, chat template and defaults."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from gantline_runtime import logs
from gantline_runtime.chat_template import TemplateError
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.pooling import load_pooling
from gantline_runtime.server.output_plan import ModelFormats
from gantline_runtime.server.service import Model, Service
from gantline_runtime.server.template_process import TemplateRenderer
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["load_model"]

log = logging.getLogger("gantline.server")


async def load_model(service: Service, model_dir: Path) -> None:
    """Sets `service.model`. Raises CheckpointError."""
    began = time.monotonic()
    tokenizer, defaults, pooling = await service.in_thread(
        lambda: (Tokenizer.load(model_dir), GenerationDefaults.load(model_dir), load_pooling(model_dir))
    )
    name = service.config.served_model_name or _folder_name(model_dir)
    formats = ModelFormats.of(tokenizer, service.config.tool_call_parser, service.config.reasoning_parser)
    model = Model(name=name, tokenizer=tokenizer, defaults=defaults, formats=formats, pooling=pooling, created=int(time.time()))
    if tokenizer.chat_template is not None:
        model = await _with_template(model, tokenizer.chat_template)
    service.metrics.startup("tokenizer", time.monotonic() - began)
    service.model = model


def _folder_name(folder: Path) -> str:
    return folder.resolve().name


async def _with_template(model: Model, source: str) -> Model:
    """A broken template does not keep a model from completing texts: chats are refused, with the reason."""
    renderer = TemplateRenderer(source, model.tokenizer.special_tokens)
    try:
        await renderer.start()
    except TemplateError as error:
        log.warning("chat completions will be refused", extra=logs.fields(cause=str(error)))
        return replace(model, template_problem=f"{str(error)[:1].upper()}{str(error)[1:]}.")
    return replace(model, renderer=renderer)
