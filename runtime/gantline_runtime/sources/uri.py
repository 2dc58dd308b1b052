"""What a model's URI names: a folder, a hub's repository, a prefix of a bucket, or an image of a registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.errors import ConfigurationError

__all__ = ["ImageReference", "ModelUri", "S3Location", "parse_uri"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_BUCKET = r"(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])"
_S3 = re.compile(rf"s3://{_BUCKET}(?P<prefix>(/[\w-][\w.-]*)*)/?", re.ASCII)
_HOST = r"(?P<registry>[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(:[0-9]{1,5})?)"
_IMAGE_NAME = r"(?P<repository>[a-z0-9]([a-z0-9._-]*[a-z0-9])?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*)"
_OCI = re.compile(rf"oci://{_HOST}/{_IMAGE_NAME}(:(?P<tag>\w[\w.-]{{0,127}}))?(@(?P<digest>sha256:[0-9a-f]{{64}}))?", re.ASCII)
_FORMS = "/path, file:///path, hf://organisation/name, s3://bucket/path or oci://registry/repository:tag"


@dataclass(frozen=True)
class S3Location:
    """The objects right below `prefix`, which is empty or ends in a slash."""

    bucket: str
    prefix: str


@dataclass(frozen=True)
class ImageReference:
    """`digest` wins over `tag` where both are given, as everywhere else."""

    registry: str
    repository: str
    tag: str = "latest"
    digest: str = ""


@dataclass(frozen=True)
class ModelUri:
    """A parsed model URI: one of `path`, `repository`, `s3` and `oci` is set."""

    text: str
    path: Path | None = None
    repository: str = ""
    s3: S3Location | None = None
    oci: ImageReference | None = None


def parse_uri(text: str) -> ModelUri:
    """Raises ConfigurationError for a URI that names no source of a model."""
    if "://" not in text:
        return ModelUri(text, path=Path(text))
    scheme = text.partition("://")[0]
    if scheme == "file":
        return _parse_file(text)
    if scheme == "hf":
        repository = text.removeprefix("hf://").rstrip("/")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            raise ConfigurationError(f"{quote(text)} names no repository", cure="Give hf://organisation/name.")
        return ModelUri(text, repository=repository)
    if scheme == "s3":
        return ModelUri(text, s3=_parse_s3(text))
    if scheme == "oci":
        return ModelUri(text, oci=_parse_oci(text))
    if scheme == "pvc":
        raise ConfigurationError(f"{quote(text)} is a claim of a cluster", cure="Give the path where the claim is mounted.")
    raise ConfigurationError(f"{quote(text)} is no model source", cure=f"Give {_FORMS}.")


def _parse_file(text: str) -> ModelUri:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigurationError(f"{quote(text)} is no folder of this machine", cure="Give file:///path.")
    return ModelUri(text, path=Path(unquote(parts.path)))


def _parse_s3(text: str) -> S3Location:
    match = _S3.fullmatch(text)
    if match is None or ".." in match["bucket"]:
        raise ConfigurationError(
            f"{quote(text)} names no prefix of a bucket",
            cure="Give s3://bucket/path, in letters, digits and _ - . (no part of the path starts with a dot).",
        )
    prefix = match["prefix"].strip("/")
    return S3Location(match["bucket"], f"{prefix}/" if prefix else "")


def _parse_oci(text: str) -> ImageReference:
    match = _OCI.fullmatch(text)
    if match is None or len(match["repository"]) > 255:
        raise ConfigurationError(
            f"{quote(text)} names no image of a registry", cure="Give oci://registry/repository:tag or ...@sha256:digest, in small letters."
        )
    registry, repository = match["registry"], match["repository"]
    if registry == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    return ImageReference(registry, repository, match["tag"] or "latest", match["digest"] or "")
