"""Compare an artefact's files with the hashes that they were published with: every byte is read.

Exit code 65 where a file is missing or differs. What fetch and quantize made has a manifest of its files; other folders have none.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.artefact import Manifest, find_damage, hash_file, read_manifest
from gantline_runtime.errors import CheckpointError
from gantline_runtime.progress import Progress
from gantline_runtime.termination import Reason, TerminationMessage

__all__ = ["add_arguments", "run"]

log = logging.getLogger("gantline.verify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="folder that fetch or quantize made")


def run(args: argparse.Namespace) -> int:
    logs.configure("info", "auto")
    for folder in args.folders:
        manifest = _verify(folder)
        print(f"{folder}: {len(manifest.files)} files, {sum(file.size for file in manifest.files)} bytes, as they were published")
    message = TerminationMessage(Reason.COMPLETED, f"Verified {len(args.folders)} artefacts.")
    termination.write(message)
    return termination.exit_code(message.reason)


def _verify(folder: Path) -> Manifest:
    """Raises CheckpointError that names the first file that is not as it was."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.files:
        raise CheckpointError(f"{folder} has no manifest of its files", cure="Name a folder that `gantline fetch` or `quantize` made.")
    damage = find_damage(folder, manifest)
    if not damage:
        with Progress(log, sum(file.size for file in manifest.files), unit="B") as progress:
            read = 0
            for file in manifest.files:
                if hash_file(folder / file.name) != file.sha256:
                    damage = f"{file.name} has another hash"
                    break
                read += file.size
                progress.show("verifying", read)
    if damage:
        raise CheckpointError(f"{folder} is damaged: {damage}", cure="Make it again: remove that file, then fetch or quantize anew.")
    return manifest
