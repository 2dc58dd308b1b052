"""Download a model from a hub, a bucket or a registry into a folder: only what a model needs, resumable, checked, and whole or not there.

The checkpoint is judged by its headers before the first byte of its weights is downloaded. A killed download goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.artefact import Manifest, Recipe, Staging, find_artefact, require_space
from gantline_runtime.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from gantline_runtime.contents import MAX_LISTED, list_contents
from gantline_runtime.errors import CheckpointError
from gantline_runtime.progress import Progress
from gantline_runtime.shared_files import share_with_group
from gantline_runtime.sources import ModelUri, open_remote, parse_uri
from gantline_runtime.sources.redaction import RedactSecrets
from gantline_runtime.sources.remote import DOWNLOADS, RemoteFile, RemoteSource, is_of_model
from gantline_runtime.sources.transfer import Downloaded

__all__ = ["ALGORITHM_VERSION", "add_arguments", "fetch", "run"]

ALGORITHM_VERSION = 1
_TERMINATED = 128 + signal.SIGTERM

log = logging.getLogger("gantline.fetch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="hf://organisation/name, s3://bucket/path or oci://registry/repository:tag")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; DST.partial holds what is not whole yet")
    parser.add_argument(
        "--revision", default="", help="branch, tag or commit of a hub; elsewhere the revision that inspect printed: no other is fetched"
    )


def run(args: argparse.Namespace) -> int:
    uri = parse_uri(args.uri)
    share_with_group()
    _configure_logs(hub=bool(uri.repository))
    with _exit_when_terminated():
        manifest = fetch(uri, args.target, args.revision)
    artefact = {"kind": manifest.kind, "path": str(args.target), "bytes": manifest.bytes, "facts": manifest.facts}
    artefact["weight_bytes"] = manifest.facts["weightBytes"]
    artefact |= list_contents(args.target.absolute().parent, MAX_LISTED)
    message = f"Fetched {args.uri} at {manifest.inputs['revision'].removeprefix('sha256:')[:12]}."
    termination.write(termination.TerminationMessage(termination.Reason.COMPLETED, message, artefact=artefact))
    print(f"{message} {manifest.bytes} bytes in {args.target}")
    return termination.exit_code(termination.Reason.COMPLETED)


@contextlib.contextmanager
def _exit_when_terminated() -> Iterator[None]:
    """SIGTERM raises SystemExit in here, so that the folder is left in order, and does what it did before afterwards.

    The kernel spares a container's first process signals that it has no handler for.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _configure_logs(*, hub: bool) -> None:
    logs.configure("info", "auto")
    if hub:
        from huggingface_hub.utils import logging as hub_logging

        library = hub_logging.get_logger("huggingface_hub")  # made now, so that its own handlers can be taken away
        library.handlers.clear()
        library.propagate = True
    for handler in logging.root.handlers:
        handler.addFilter(RedactSecrets())


def fetch(uri: ModelUri, target: Path, revision: str = "") -> Manifest:
    """Make `target` hold the repository's model; what is there already is not fetched again.

    Raises SourceError, CheckpointError (also when what came differs from what the hub lists), CapacityError.
    """
    source = open_remote(uri, revision)
    done = find_artefact(target, "fetch", ALGORITHM_VERSION, source.inputs)
    if done is not None:
        log.info("already there", extra=logs.fields(path=str(target)))
        return done
    remote = read_checkpoint(source, name=source.name, revision=source.revision)
    wanted = _choose(source, remote)
    with Staging(target, Recipe("fetch", ALGORITHM_VERSION, source.inputs)) as staging:
        if staging.done is not None:  # another process has made it meanwhile
            return staging.done
        hashes = {file.name: _verify(staging.folder / file.name, file) for file in _download(source, wanted, staging.folder)}
        shutil.rmtree(staging.folder / DOWNLOADS, ignore_errors=True)
        local = open_checkpoint(staging.folder)
        if local.facts.fingerprint != remote.facts.fingerprint:
            raise CheckpointError(f"what came of {uri.text} is not what was inspected", cure="Fetch it again.")
        facts = remote.facts.to_json()
        manifest = Manifest("fetch", ALGORITHM_VERSION, source.inputs, sum(file.size for file in wanted), facts)
        return staging.publish(manifest, hashes)


def _choose(source: RemoteSource, checkpoint: Checkpoint) -> list[RemoteFile]:
    """Small files first, so that a tokenizer that may not be read fails at once."""
    names = {*checkpoint.shards, *(name for name in source.files if is_of_model(name) and not name.endswith(".safetensors"))}
    return sorted((source.files[name] for name in names), key=lambda file: (file.size, file.name))


def _download(source: RemoteSource, wanted: Sequence[RemoteFile], folder: Path) -> Sequence[RemoteFile]:
    room = source.room(wanted)
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_space(folder, room.disk, present=present)
    with Progress(log, room.transfer, unit="B", bytes=room.transfer) as progress:
        return source.download(wanted, folder, Downloaded(progress))


def _verify(path: Path, file: RemoteFile) -> str:
    """The file's SHA-256, after comparing size and hash with what the source lists; a file that differs is removed, so that the next try
    fetches it anew."""
    size = path.stat().st_size
    expected = file.sha256 or file.blob or file.md5
    sha256 = hashlib.sha256()
    listed = sha256 if file.sha256 else hashlib.sha1(b"blob %d\0" % size) if file.blob else hashlib.md5(usedforsecurity=False)
    if size == file.size:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                sha256.update(piece)
                if listed is not sha256 and expected:
                    listed.update(piece)
    if size != file.size or (expected and listed.hexdigest() != expected):
        path.unlink()
        what = f"{size} bytes instead of {file.size}" if size != file.size else "another hash"
        cure = "Fetch it again; if it stays so, ask the publisher."
        raise CheckpointError(f"{file.name} came with {what} than its source lists", cure=cure)
    return sha256.hexdigest()
