"""The operator's settings: from GANTLINE_* environment variables (the chart sets them) and flags of the same names, flags winning.

An unknown GANTLINE_* variable is an error: a misspelt one would otherwise be ignored for as long as nobody looks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.termination import Reason

__all__ = ["PREFIX", "OperatorSettings", "documented_settings", "from_environment"]

PREFIX = "GANTLINE_"

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NOT_OURS = {"GANTLINE_CACHE", "GANTLINE_TERMINATION_LOG"}  # of the development cluster, and of every container
_LEVELS = ("debug", "info", "warning", "error")


def _text(value: str) -> str:
    return value.strip()


def _names(value: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in value.split(",")) if name)


def _namespaces(value: str) -> tuple[str, ...]:
    names = _names(value)
    for name in names:
        if not _NAMESPACE.fullmatch(name):
            raise ValueError(f"{name!r} is not a namespace's name")
    return names


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip() not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value.strip()

    return parse


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return number

    return parse


def _switch(value: str) -> bool:
    return _one_of("true", "false")(value) == "true"


def _setting(parse: Callable[[str], Any], default: Any, help: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class OperatorSettings:
    """Each default is followed by what it is for and its unit; the environment's name is the field's in capitals after `GANTLINE_`."""

    watch_namespaces: tuple[str, ...] = _setting(
        _namespaces, (), "Namespaces to serve, separated by commas; empty serves the whole cluster and needs the cluster-wide role."
    )
    image_cuda: str = _setting(_text, "", "Runtime image for NVIDIA GPUs; empty: plans that need it are refused with NoRuntimeImage.")
    image_cpu: str = _setting(_text, "", "Runtime image for CPUs, also used by inspect and fetch Jobs.")
    image_rocm: str = _setting(_text, "", "Runtime image for AMD GPUs.")
    image_ascend: str = _setting(_text, "", "Runtime image for Ascend NPUs.")
    image_pull_policy: str = _setting(
        _one_of("IfNotPresent", "Always", "Never"), "IfNotPresent", "Pull policy of every pod that the operator makes."
    )
    image_pull_secrets: tuple[str, ...] = _setting(
        _names, (), "Pull secrets for every pod, separated by commas, beside those of spec.pod.imagePullSecrets."
    )
    hf_endpoint: str = _setting(_text, "", "Address of a Hugging Face hub or mirror for hf:// sources; empty is the public hub.")
    network_policies: bool = _setting(
        _switch, False, "true makes NetworkPolicies for each service's pods, which do nothing unless the cluster's network enforces them."
    )
    inventory_configmap: str = _setting(
        _text, "", "namespace/name of a ConfigMap that describes node pools which labels do not, or which are now at zero."
    )
    observe_nodes: str = _setting(
        _one_of("auto", "never"), "auto", "auto lists nodes and all pods where that is allowed; never leaves capacity to the scheduler."
    )
    metrics_port: int = _setting(_number(0, 65535), 8080, "Port of /metrics; 0 turns it off.")
    health_port: int = _setting(_number(0, 65535), 8081, "Port of /healthz; 0 turns it off.")
    listen_address: str = _setting(_text, "0.0.0.0", "Address that both ports listen on.")
    workers: int = _setting(_number(1, 64), 8, "Services reconciled at once.")
    resync_seconds: int = _setting(
        _number(10, 86400), 450, "Every service is reconciled again after this many seconds, give or take a third, whatever happened."
    )
    reconcile_deadline_seconds: int = _setting(
        _number(5, 3600), 120, "A reconcile that takes longer is cancelled and retried; a worker that ignores that fails /healthz."
    )
    job_retention_seconds: int = _setting(
        _number(60, 2592000), 86400, "How long finished Jobs are kept for their logs once their result is recorded."
    )
    log_level: str = _setting(_one_of(*_LEVELS), "info", "Least severe level that is logged.")

    @property
    def images(self) -> dict[str, str]:
        """Runtime images by accelerator, those that are set."""
        images = {"cuda": self.image_cuda, "cpu": self.image_cpu, "rocm": self.image_rocm, "ascend": self.image_ascend}
        return {kind: image for kind, image in images.items() if image}


def documented_settings() -> list[tuple[str, str, str, str]]:
    """(variable, flag, default, help) of every setting: the table in docs/operations.md, which a test compares."""
    return [(PREFIX + item.name.upper(), _flag(item.name), _show(item.default), item.metadata["help"]) for item in fields(OperatorSettings)]


def from_environment(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> OperatorSettings:
    """Settings from variables, then flags. Raises ConfigurationError naming the variable or flag and what it takes."""
    known = {PREFIX + item.name.upper(): item for item in fields(OperatorSettings)}
    unknown = sorted(name for name in environment if name.startswith(PREFIX) and name not in known and name not in _NOT_OURS)
    if unknown:
        raise _refused(f"unknown setting {unknown[0]}", f"Known are {', '.join(known)}.")
    given = {item.name: (name, environment[name]) for name, item in known.items() if name in environment}
    given |= {name: (_flag(name), value) for name, value in _flags(arguments).items()}
    parsers = {item.name: item.metadata["parse"] for item in fields(OperatorSettings)}
    return OperatorSettings(**{name: _parsed(parsers[name], source, value) for name, (source, value) in given.items()})


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    about = "Runs InferenceServices. Every flag is also a GANTLINE_* variable."
    parser = argparse.ArgumentParser(prog="gantline-operator", description=about)
    for item in fields(OperatorSettings):
        text = f"{item.metadata['help']} (default: {_show(item.default) or 'none'})"
        parser.add_argument(_flag(item.name), dest=item.name, metavar="VALUE", help=text)
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def _parsed(parse: Callable[[str], Any], source: str, value: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise _refused(f"{source} is {value!r}: {error}", "Correct it in the chart's values or the operator's environment.") from None


def _refused(message: str, cure: str) -> ConfigurationError:
    return ConfigurationError(message, reason=Reason.INVALID_CONFIGURATION, cure=cure)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
