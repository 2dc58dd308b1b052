"""Where models come from: a folder, a hub, a bucket, or an image registry.

    /path, ./path, file:///path              a folder of this machine (in a pod: of the image, or a mounted claim)
    hf://org/name                            a repository of a hub that speaks Hugging Face's HTTP (`hub.py`)
    s3://bucket/path                         the objects below a path of a bucket, of any S3 endpoint (`s3.py`)
    oci://registry/repository:tag@digest     an artifact or image of a registry (`oci.py`)

Remote sources are read in pieces, so that a checkpoint is judged by its headers before anything is downloaded.
"""

from __future__ import annotations

from gantline_runtime.checkpoint.files import FileSource, LocalFiles, quote
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.sources.certificates import trust_given_authority
from gantline_runtime.sources.remote import RemoteSource
from gantline_runtime.sources.uri import ModelUri, parse_uri

__all__ = ["ModelUri", "open_remote", "open_source", "parse_uri"]


def open_source(uri: ModelUri, revision: str = "") -> tuple[FileSource, str, str]:
    """(files, name, revision) of a model source; name and revision are empty for a folder. Raises GantlineError."""
    if uri.path is not None:
        if revision:
            raise ConfigurationError(f"a revision ({quote(revision)}) means nothing for a folder", cure="Leave --revision away.")
        return LocalFiles(uri.path), "", ""
    files = open_remote(uri, revision)
    return files, files.name, files.revision


def open_remote(uri: ModelUri, revision: str = "") -> RemoteSource:
    """The files of a source that is no folder. Raises SourceError, CheckpointError, ConfigurationError."""
    trust_given_authority()
    if uri.s3 is not None:
        from gantline_runtime.sources.s3 import S3Files

        return S3Files(uri.s3, revision)
    if uri.oci is not None:
        from gantline_runtime.sources.oci import OciFiles

        return OciFiles(uri.oci, revision)
    if uri.repository:
        from gantline_runtime.sources.hub import HubFiles

        return HubFiles(uri.repository, revision)
    raise ConfigurationError(f"{quote(uri.text)} is a folder; there is nothing to fetch", cure="Serve the folder, or give a remote source.")
