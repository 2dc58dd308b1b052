"""What the stages that read a remote source are told about it: where its server is, and what opens it.

Keys of the Secret are named one by one, since whoever may write it should not set any variable of our containers. No other pod gets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gantline_operator.resources.context import Parent, Settings, source_location
from gantline_operator.resources.naming import Object

__all__ = ["source_env"]


@dataclass(frozen=True)
class _Key:
    """A variable from a key of the secretRef's Secret. One that is needed and not there keeps the pod from starting, and says so."""

    variable: str
    key: str
    needed: bool = False


_AUTHORITY = _Key("GANTLINE_CA_CERTIFICATES", "ca.crt")
_KEYS: Mapping[str, tuple[_Key, ...]] = {
    "hf": (_Key("HF_TOKEN", "HF_TOKEN", needed=True),),
    "s3": (
        _Key("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID", needed=True),
        _Key("AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", needed=True),
        _Key("AWS_SESSION_TOKEN", "AWS_SESSION_TOKEN"),
        # The more special variable, so that the Secret's endpoint wins over the installation's.
        _Key("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        _Key("AWS_REGION", "AWS_REGION"),
        _Key("AWS_S3_ADDRESSING_STYLE", "AWS_S3_ADDRESSING_STYLE"),
    ),
    "oci": (_Key("DOCKER_AUTH_CONFIG", ".dockerconfigjson", needed=True),),
}


def source_env(parent: Parent, settings: Settings) -> list[Object]:
    """Whatever is no hub's is read without one: no library may look for a part of a model there."""
    offline = {"name": "HF_HUB_OFFLINE", "value": "1"}
    if source_location(parent.spec.model.uri) is not None:
        return [offline]
    scheme = parent.spec.model.uri.partition("://")[0]
    secret = parent.spec.model.secret_ref
    keys = (*_KEYS[scheme], _AUTHORITY) if secret else ()
    given = _addresses(scheme, settings) + [_from_secret(key, secret.name) for key in keys if secret]
    return given if scheme == "hf" else [offline, *given]


def _addresses(scheme: str, settings: Settings) -> list[Object]:
    given = {
        "hf": ("HF_ENDPOINT", settings.hf_endpoint),
        "s3": ("AWS_ENDPOINT_URL", settings.s3_endpoint),
        "oci": ("GANTLINE_INSECURE_REGISTRIES", ",".join(settings.insecure_registries)),
    }
    name, value = given[scheme]
    return [{"name": name, "value": value}] if value else []


def _from_secret(key: _Key, secret: str) -> Object:
    optional = {} if key.needed else {"optional": True}
    return {"name": key.variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key.key, **optional}}}
