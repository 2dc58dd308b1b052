"""What `gantline serve` does once its engine's process is launched: run the server, show how loading goes, say how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from gantline_runtime import garbage, logs, termination
from gantline_runtime.artefact import find_damage, read_manifest
from gantline_runtime.cli import version
from gantline_runtime.commands.display import LoadingDisplay
from gantline_runtime.config import EngineConfig, ServerConfig
from gantline_runtime.engine_launch import EngineProcess
from gantline_runtime.errors import CheckpointError
from gantline_runtime.termination import Reason, TerminationMessage

if TYPE_CHECKING:
    from gantline_runtime.server.service import Model

__all__ = ["serve"]

log = logging.getLogger("gantline.server")


def serve(model_dir: Path, engine_config: EngineConfig, config: ServerConfig, launched: EngineProcess) -> int:
    """Serve until told to stop; returns the exit code. Raises GantlineError if the model cannot be served."""
    _check_artefact(model_dir)
    with _shared_metrics(config.api_workers), asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        message = loop.run(_serve(model_dir, engine_config, config, launched))
    return _end(message)


def _check_artefact(folder: Path) -> None:
    """Of what fetch or quantize made, all files must be there in full. Their bytes are not read: `gantline verify` does that."""
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest) if manifest is not None else ""
    if damage:
        raise CheckpointError(f"{folder} is damaged: {damage}", cure="Fetch or quantize it anew: what is whole of it is kept.")


@contextlib.contextmanager
def _shared_metrics(api_workers: int) -> Iterator[None]:
    """A folder where several API processes keep what they count; prometheus_client must find it when it is imported."""
    if api_workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="gantline-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        yield


async def _serve(model_dir: Path, engine_config: EngineConfig, config: ServerConfig, launched: EngineProcess) -> TerminationMessage:
    with garbage.importing():
        from gantline_runtime.server.runner import Announcer, Runner  # not before _shared_metrics has chosen how to count

    as_text = logs.resolve_format(config.log_format) == "text"
    with LoadingDisplay(bar=as_text and sys.stderr.isatty()) as display:

        def announce(url: str, model: Model, seconds: float) -> None:
            display.close()
            _announce_ready(url, model, seconds, as_text=as_text)

        announcer = Announcer(
            listening=lambda url: log.info("listening", extra=logs.fields(url=url, model=str(model_dir))),
            progress=display.show,
            ready=announce,
        )
        runner = Runner(model_dir, engine_config, config, launched, version=version(), announcer=announcer)
        return await runner.run()


def _announce_ready(url: str, model: Model, seconds: float, *, as_text: bool) -> None:
    example = _example(url, model)
    if as_text:
        print(f"\n{model.name} is ready at {url} after {seconds:.1f} s. Try:\n\n  {example}\n", flush=True)
    else:
        log.info("ready", extra=logs.fields(url=url, model=model.name, seconds=round(seconds, 2), example=example))


def _example(url: str, model: Model) -> str:
    if model.renderer is not None:
        path, body = (
            "chat/completions",
            {"model": model.name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64, "stream": True},
        )
    else:
        path, body = "completions", {"model": model.name, "prompt": "Once upon a time", "max_tokens": 64, "stream": True}
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d '{quoted}'"


def _end(message: TerminationMessage) -> int:
    """Leave the last word where Kubernetes finds it, and on stderr for a person."""
    termination.write(message)
    if message.reason is not Reason.DRAINED:
        print(f"gantline: {message.message}. {message.cure}".rstrip(), file=sys.stderr)
    return termination.exit_code(message.reason)
