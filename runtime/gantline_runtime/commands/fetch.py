"""Download a model from a hub into a folder: only what a model needs, resumable, checked, and whole or not there.

The checkpoint is judged by its headers before the first byte of its weights is downloaded. A killed download goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gantline_runtime import logs, termination
from gantline_runtime.artefact import Manifest, Staging, find_artefact, require_space
from gantline_runtime.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.progress import Progress
from gantline_runtime.sources import HubFiles, HubModel, ModelUri, RemoteFile, hub_errors, parse_uri

__all__ = ["ALGORITHM_VERSION", "add_arguments", "fetch", "run"]

ALGORITHM_VERSION = 1
_BESIDE = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "README.md", "LICENSE", "LICENSE.txt"),
)
"""What is fetched beside the weights: nothing that is code, nothing that is a pickle."""

log = logging.getLogger("gantline.fetch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="hf://organisation/name ($HF_ENDPOINT, $HF_TOKEN)")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; DST.partial holds what is not whole yet")
    parser.add_argument("--revision", default="", help="branch, tag or commit (default: main)")


def run(args: argparse.Namespace) -> int:
    logs.configure("info", "auto")
    uri = parse_uri(args.uri)
    if not uri.repository:
        raise ConfigurationError(
            f"{args.uri} is a folder; there is nothing to fetch", cure="Serve the folder, or give hf://organisation/name."
        )
    manifest = fetch(uri, args.target, args.revision)
    artefact = {"kind": manifest.kind, "path": str(args.target), "bytes": manifest.bytes, "facts": manifest.facts}
    artefact["weight_bytes"] = manifest.facts["weightBytes"]
    message = f"Fetched {args.uri} at {manifest.inputs['revision'][:12]}."
    termination.write(termination.TerminationMessage(termination.Reason.COMPLETED, message, artefact=artefact))
    print(f"{message} {manifest.bytes} bytes in {args.target}")
    return termination.exit_code(termination.Reason.COMPLETED)


def fetch(uri: ModelUri, target: Path, revision: str = "") -> Manifest:
    """Make `target` hold the repository's model; what is there already is not fetched again.

    Raises SourceError, CheckpointError (also when what came differs from what the hub lists), CapacityError.
    """
    hub = HubFiles(uri.repository, revision)
    inputs = {"endpoint": hub.model.endpoint, "repository": uri.repository, "revision": hub.model.commit}
    done = find_artefact(target, "fetch", ALGORITHM_VERSION, inputs)
    if done is not None:
        log.info("already there", extra=logs.fields(path=str(target)))
        return done
    remote = read_checkpoint(hub, name=uri.repository, revision=hub.model.commit)
    wanted = _choose(hub.model, remote)
    with Staging(target) as staging:
        present = sum(path.stat().st_size for path in staging.folder.rglob("*") if path.is_file())
        require_space(staging.folder, sum(file.size for file in wanted), present=present)
        _download(hub.model, wanted, staging.folder)
        for file in wanted:
            _verify(staging.folder / file.name, file)
        shutil.rmtree(staging.folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on what is half done
        local = open_checkpoint(staging.folder)
        if local.facts.fingerprint != remote.facts.fingerprint:
            raise CheckpointError(f"what came of {uri.text} is not what was inspected", cure="Fetch it again.")
        facts = remote.facts.to_json()
        manifest = Manifest("fetch", ALGORITHM_VERSION, inputs, sum(file.size for file in wanted), facts)
        staging.publish(manifest)
    return manifest


def _choose(model: HubModel, checkpoint: Checkpoint) -> list[RemoteFile]:
    """Small files first, so that a tokenizer that may not be read fails at once."""
    names = {*checkpoint.shards, *(name for name in _BESIDE if name in model.files)}
    return sorted((model.files[name] for name in names), key=lambda file: (file.size, file.name))


def _download(model: HubModel, wanted: Sequence[RemoteFile], folder: Path) -> None:
    total = sum(file.size for file in wanted)
    with Progress(log, total, unit="B", bytes=total) as progress:
        downloaded = _Downloaded(progress)
        for file in wanted:
            _download_file(model, file, folder, downloaded)


def _download_file(model: HubModel, file: RemoteFile, folder: Path, downloaded: _Downloaded) -> None:
    from huggingface_hub import hf_hub_download

    with hub_errors(f"hf://{model.repository}", model.commit):
        hf_hub_download(
            model.repository,
            file.name,
            revision=model.commit,
            local_dir=folder,
            endpoint=model.endpoint,
            token=os.environ.get("HF_TOKEN", "").strip() or False,
            tqdm_class=downloaded.bar_class(),
        )
    downloaded.finish(file)


def _verify(path: Path, file: RemoteFile) -> None:
    """Compare size and hash with the hub's listing; a file that differs is removed, so that the next try fetches it anew."""
    size = path.stat().st_size
    expected = file.sha256 or file.blob
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size)
    if size == file.size and expected:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    if size != file.size or (expected and digest.hexdigest() != expected):
        path.unlink()
        what = f"{size} bytes instead of {file.size}" if size != file.size else "another hash"
        raise CheckpointError(f"{file.name} came with {what} than the hub lists", cure="Fetch it again; if it stays so, ask the publisher.")


class _Downloaded:
    """Bytes of all files so far, as huggingface_hub's bars (one for each file, and again after each resumption) tell them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._finished, self._current = progress, 0, 0

    def bar_class(self) -> type[tqdm[Any]]:
        downloaded = self

        class Bar(tqdm):  # type: ignore[type-arg]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                downloaded._current = int(kwargs.get("initial", 0) or 0)
                kwargs = {key: value for key, value in kwargs.items() if key not in ("name", "log_level")}
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                downloaded._current += int(n or 0)
                downloaded._progress.show("fetching", downloaded._finished + downloaded._current)
                return None

        return Bar

    def finish(self, file: RemoteFile) -> None:
        self._finished, self._current = self._finished + file.size, 0
        self._progress.show(f"fetched {file.name}", self._finished)
