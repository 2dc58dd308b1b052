"""Read what a model is, without loading it: config.json and the safetensors headers, from a folder, a hub, a bucket or a registry.

Prints the facts as JSON. In a pod they go into the termination message as well, which is how the operator learns them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from gantline_runtime import termination
from gantline_runtime.checkpoint import read_checkpoint
from gantline_runtime.sources import open_source, parse_uri

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="a folder, hf://organisation/name, s3://bucket/path or oci://registry/repository:tag")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub's repository (default: main); digest of an image")


def run(args: argparse.Namespace) -> int:
    files, name, commit = open_source(parse_uri(args.uri), args.revision)
    found = read_checkpoint(files, name=name, revision=commit)
    facts = replace(found.facts, image_folder=getattr(files, "image_folder", None)).to_json()
    print(json.dumps(facts, indent=2))
    termination.write(termination.TerminationMessage(termination.Reason.COMPLETED, "The model was inspected.", facts=facts))
    return termination.exit_code(termination.Reason.COMPLETED)
