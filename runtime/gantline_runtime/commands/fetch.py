"""Download a model from a hub into a folder: only what a model needs, resumable, checked, and whole or not there.

The checkpoint is judged by its headers before the first byte of its weights is downloaded. A killed download goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.artefact import Manifest, Staging, find_artefact, require_space
from gantline_runtime.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.hub_download import DOWNLOADS, Downloaded, download_file
from gantline_runtime.progress import Progress
from gantline_runtime.sources import HubFiles, HubModel, ModelUri, RedactSecrets, RemoteFile, parse_uri

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
    _configure_logs()
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


def _configure_logs() -> None:
    from huggingface_hub.utils import logging as hub_logging

    logs.configure("info", "auto")
    library = hub_logging.get_logger("huggingface_hub")  # made now, so that its own handlers can be taken away
    library.handlers.clear()
    library.propagate = True
    for handler in logging.root.handlers:
        handler.addFilter(RedactSecrets())


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
        shutil.rmtree(staging.folder / DOWNLOADS, ignore_errors=True)
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
        downloaded = Downloaded(progress)
        for file in wanted:
            download_file(model, file, folder, downloaded)


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
