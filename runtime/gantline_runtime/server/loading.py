"""What an API process loads of a model: its tokenizer, chat template and defaults."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from gantline_runtime import logs
from gantline_runtime.chat_template import TemplateError
from gantline_runtime.checkpoint.files import MAX_JSON_BYTES
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.pooling import load_pooling
from gantline_runtime.server.output_plan import ModelFormats
from gantline_runtime.server.service import Model, Service
from gantline_runtime.server.template_process import TemplateRenderer
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["load_model"]

log = logging.getLogger("gantline.server")


async def load_model(service: Service, model_dir: Path) -> None:
    """Sets `service.model`. Raises CheckpointError, and ConfigurationError for a chat template that was given and cannot be used."""
    began = time.monotonic()
    given = service.config.chat_template
    tokenizer, defaults, pooling = await service.in_thread(
        lambda: (_load_tokenizer(model_dir, given), GenerationDefaults.load(model_dir), load_pooling(model_dir))
    )
    name = service.config.served_model_name or _folder_name(model_dir)
    formats = ModelFormats.of(tokenizer, service.config.tool_call_parser, service.config.reasoning_parser)
    model = Model(name=name, tokenizer=tokenizer, defaults=defaults, formats=formats, pooling=pooling, created=int(time.time()))
    if tokenizer.chat_template is None:
        log.info(
            "chat completions will be refused", extra=logs.fields(cause="the model has no chat template; --chat-template gives it one")
        )
    else:
        model = await _with_template(model, tokenizer.chat_template, is_given=given is not None)
    service.metrics.startup("tokenizer", time.monotonic() - began)
    service.model = model


def _folder_name(folder: Path) -> str:
    """The folder's own name; of a snapshot in a Hugging Face cache, the repository's."""
    whole = folder.resolve()
    repository = whole.parent.parent.name
    if whole.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return whole.name


def _load_tokenizer(model_dir: Path, template_file: str | None) -> Tokenizer:
    tokenizer = Tokenizer.load(model_dir)
    if template_file is not None:
        try:
            with Path(template_file).open("rb") as file:
                tokenizer.chat_template = file.read(MAX_JSON_BYTES).decode()
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"the chat template {template_file} cannot be read: {cause}", cure="Give --chat-template a file in Jinja's language."
            ) from None
    return tokenizer


async def _with_template(model: Model, source: str, *, is_given: bool) -> Model:
    """A broken template of the checkpoint does not keep it from completing texts: chats are refused, with the reason."""
    renderer = TemplateRenderer(source, model.tokenizer.special_tokens)
    try:
        await renderer.start()
    except TemplateError as error:
        if is_given:
            raise ConfigurationError(str(error), cure="Correct the file that --chat-template names.") from None
        log.warning("chat completions will be refused", extra=logs.fields(cause=str(error)))
        return replace(model, template_problem=f"{str(error)[:1].upper()}{str(error)[1:]}.")
    return replace(model, renderer=renderer)
