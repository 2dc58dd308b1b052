"""The gateway's settings: from GANTLINE_GATEWAY_* variables (the chart sets them) and flags of the same names, flags winning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.settings import Source, document, namespaces, number, one_of, origins, read, seconds, setting, text

__all__ = ["PREFIX", "GatewaySettings", "documented_settings", "from_environment"]

PREFIX = "GANTLINE_GATEWAY_"


def _path(value: str) -> Path | None:
    return Path(value) if value.strip() else None


def _namespace(value: str) -> str:
    return next(iter(namespaces(value)), "")


def _service(value: str) -> str:
    namespace, slash, name = value.strip().partition("/")
    if value.strip() and not (slash and name and namespaces(namespace) == (namespace,)):
        raise ValueError("expected namespace/name")
    return value.strip()


@dataclass(frozen=True)
class GatewaySettings:
    """The environment's name is the field's in capitals after `GANTLINE_GATEWAY_`."""

    host: str = setting(text, "0.0.0.0", "Address to listen on.")
    port: int = setting(number(0, 65535), 8000, "Port of the OpenAI API; 0 picks a free one.")
    internal_port: int = setting(number(0, 65535), 8081, "Port of /healthz, /readyz, /metrics and /demand; 0 picks a free one.")
    watch_namespaces: tuple[str, ...] = setting(
        namespaces, (), "Namespaces whose services are offered, separated by commas; empty offers the whole cluster's."
    )
    services: Path | None = setting(
        _path, None, "File (YAML or JSON) that lists services and their replicas; given, no Kubernetes is asked."
    )
    api_keys: Path | None = setting(
        _path, None, "File of API keys, or a folder with one in each file; empty, as with the next one: anyone may ask."
    )
    api_key_secrets: str = setting(_namespace, "", 'Namespace whose Secrets with the label gantline.io/api-keys: "true" hold API keys.')
    own_service: str = setting(_service, "", "namespace/name of the Service before this gateway, over whose endpoints limits are split.")
    tls_cert: Path | None = setting(
        _path, None, "Certificate of the OpenAI API and its chain, a PEM file; read again when it changes. Empty: no TLS."
    )
    tls_key: Path | None = setting(_path, None, "Private key of the certificate, a PEM file without a passphrase.")
    cors_origins: tuple[str, ...] = setting(
        origins, (), "Web origins, separated by commas, whose pages may ask; * for all, empty for none."
    )
    hold_silence: float = setting(
        seconds(0, 3600), 15.0, "Seconds for which nothing is said to a stream that waits for a replica; then comments keep it alive."
    )
    hold_timeout: float = setting(seconds(0, 86400), 300.0, "Seconds for which a request waits for a replica before it gets an error.")
    hold_requests: int = setting(number(0, 1_000_000), 256, "Requests of one service that may wait for a replica; more get a 429.")
    hold_bytes: int = setting(number(0, 1 << 40), 64 << 20, "Bytes of their bodies together, for one service.")
    max_body_bytes: int = setting(number(1024, 1 << 30), 8 << 20, "Largest HTTP body accepted, in bytes.")
    body_bytes: int = setting(
        number(1024, 1 << 40), 128 << 20, "Bytes of all bodies in memory at once, of running and of waiting requests; more get a 503."
    )
    head_timeout: float = setting(
        seconds(0.1, 3600), 30.0, "Seconds in which a request's headers have to come, from the first of them or from the connection."
    )
    body_timeout: float = setting(seconds(0.1, 86400), 60.0, "Seconds in which a request's body has to come; slower ones get a 408.")
    stall_timeout: float = setting(
        seconds(0.1, 86400),
        30.0,
        "Seconds for which a client may send nothing of its body (then a 408), or take nothing of an answer that waits (it is cut off).",
    )
    connect_timeout: float = setting(seconds(0.1, 60), 3.0, "Seconds in which a replica has to take a connection.")
    max_resets: int = setting(
        number(0, 10), 2, "How often a request is sent again after a replica's connection broke before the first byte of its answer."
    )
    drain_delay: float = setting(seconds(0, 600), 5.0, "Seconds after SIGTERM in which new requests are still taken: endpoints lag.")
    drain_timeout: float = setting(seconds(0, 86400), 120.0, "Seconds after SIGTERM for which running requests may go on.")
    log_level: str = setting(one_of("debug", "info", "warning", "error"), "info", "Least severe level that is logged.")
    log_format: str = setting(one_of("auto", "json", "text"), "auto", "One JSON object a line, or text; auto: text on a terminal.")

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("TLS needs a certificate and its key", cure="Give tls_cert and tls_key, or neither.")


def documented_settings() -> list[tuple[str, str, str, str]]:
    """(variable, flag, default, help) of every setting: the table in docs/gateway.md, which a test compares."""
    return document(GatewaySettings, PREFIX)


def from_environment(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> GatewaySettings:
    """Raises ConfigurationError naming the variable or flag and what it takes."""
    source = Source("gantline-gateway", "Answers for every InferenceService under one address.", PREFIX)
    return read(GatewaySettings, source, environment, arguments)
