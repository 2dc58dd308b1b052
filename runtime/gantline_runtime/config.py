"""Settings of the engine, of a request's sampling, and of the server.

Each is a frozen dataclass whose fields carry their help text, unit and the reason of their default. The command line, the operator's
`engine` section and the documentation are made from these fields, so none of them can name an option that the others lack.
Names follow LMDeploy's where the meaning is the same. `auto` (None) is resolved once, with `dataclasses.replace`.
Imports no torch: the operator imports this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.settings import is_origin

__all__ = ["Backend", "DataType", "EngineConfig", "ServerConfig", "add_arguments", "from_arguments", "from_mapping", "to_arguments"]

Backend = Literal["auto", "cuda", "triton", "torch"]
DataType = Literal["auto", "float32", "bfloat16", "float16"]

T = TypeVar("T")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EngineConfig:
    """How one engine (all ranks of one replica) runs a model."""

    backend: Backend = _option("auto", "Kernels to use. auto: cuda on NVIDIA sm80 and newer, triton on AMD, torch elsewhere.")
    device: Literal["auto", "cuda", "cpu"] = _option("auto", "Where to run. auto: cuda where torch sees a GPU, else cpu.")
    dtype: DataType = _option("auto", "Type of weights and activations. auto: the checkpoint's; float32 on a CPU.")
    tp: int = _option(1, "Tensor parallelism: GPUs (or CPU processes) that share each layer.")
    session_len: int | None = _option(None, "Longest prompt plus output, in tokens. auto: the model's limit, less if memory demands it.")
    max_batch_size: int = _option(256, "Most requests that run at once; past it they wait.")
    max_waiting: int = _option(1024, "Most requests that wait; past it a client gets 429 with Retry-After.")
    max_waiting_tokens: int | None = _option(
        None, "Most predicted tokens (prompt and answer) of requests that wait; past it 429. auto: 16 times what the cache holds."
    )
    cache_max_entry_count: float = _option(0.8, "Share of the memory free after loading the weights that the KV cache takes.")
    num_cache_blocks: int | None = _option(None, "KV cache size in blocks, instead of a share of free memory.")
    block_size: int = _option(64, "Tokens in one block of the KV cache; a power of two, 16 or more.")
    max_prefill_token_num: int = _option(8192, "Tokens of one step: decoding requests first, chunks of prompts fill the rest.")
    max_step_ms: float = _option(
        50.0, "Milliseconds that a step with decoding requests is to take: chunks of prompts are cut to it, by prediction. 0: no limit."
    )
    enable_prefix_caching: bool = _option(True, "Reuse the cached blocks of a prompt's beginning.")
    eager_mode: bool = _option(False, "Never use CUDA graphs.")
    batch_invariant: bool = _option(False, "The same tokens whatever else runs, to the last bit, at a price.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self.tp in (1, 2, 4, 8), "tp", self.tp, "1, 2, 4 or 8")
        _require(self.session_len is None or 1 <= self.session_len <= 1 << 24, "session_len", self.session_len, "1 or more tokens")
        _require(1 <= self.max_batch_size <= 4096, "max_batch_size", self.max_batch_size, "1 to 4096")
        _require(0 <= self.max_waiting <= 1_000_000, "max_waiting", self.max_waiting, "0 to 1,000,000")
        limit = self.max_waiting_tokens
        _require(limit is None or 0 <= limit <= 1 << 40, "max_waiting_tokens", limit, "0 or more")
        _require(0 <= self.max_step_ms <= 60_000, "max_step_ms", self.max_step_ms, "0 to 60,000 milliseconds")
        share = self.cache_max_entry_count
        _require(0.0 < share < 1.0, "cache_max_entry_count", share, "a number between 0 and 1, both excluded")
        _require(self.num_cache_blocks is None or self.num_cache_blocks >= 1, "num_cache_blocks", self.num_cache_blocks, "1 or more")
        power_of_two = self.block_size & (self.block_size - 1) == 0
        _require(16 <= self.block_size <= 1024 and power_of_two, "block_size", self.block_size, "a power of two from 16 to 1024")
        _require(1 <= self.max_prefill_token_num <= 1 << 20, "max_prefill_token_num", self.max_prefill_token_num, "1 to 1,048,576")


@dataclass(frozen=True)
class ServerConfig:
    """How the HTTP server in front of an engine behaves."""

    host: str = _option("127.0.0.1", "Address to listen on; in a pod 0.0.0.0.")
    port: int = _option(8000, "Port to listen on; 0 picks a free one and prints it.")
    api_workers: int = _option(1, "Processes that answer on the port, in front of one engine: more where many stream at once.")
    served_model_name: str | None = _option(
        None, "Name that clients use. auto: the model folder's name, or the repository's in a Hugging Face cache."
    )
    chat_template: str | None = _option(None, "File with the chat template (Jinja). auto: the checkpoint's.")
    api_keys: str | None = _option(None, "File of API keys, or a folder with one in each file (a mounted Secret). auto: anyone may ask.")
    trust_gateway: bool = _option(
        False, "Believe the header X-Gantline-Caller, by which a gateway says whose request it passes on. Only where nobody else gets in."
    )
    tls_cert: str | None = _option(None, "Certificate and its chain, a PEM file; read again when it changes. auto: no TLS.")
    tls_key: str | None = _option(None, "Private key of --tls-cert, a PEM file without a passphrase.")
    cors_origins: str | None = _option(None, "Web origins, separated by commas, whose pages may ask; * for all. auto: none.")
    otlp_endpoint: str | None = _option(None, "OpenTelemetry collector that traces are sent to, such as http://collector:4318. auto: none.")
    drain_timeout: float = _option(120.0, "Seconds that running streams may go on after SIGTERM.")
    drain_delay: float = _option(3.0, "Seconds after SIGTERM in which new requests are still taken: endpoints lag behind readiness.")
    request_timeout: float | None = _option(
        None, "Most seconds that an answer may take, from its admission; a request's `timeout` may shorten it. auto: no limit."
    )
    stall_timeout: float = _option(
        30.0, "Seconds for which a client may take nothing of an answer that waits for it, before it is cut off."
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "mistral_args", "deepseek_v3", "deepseek_v31"] = _option(
        "auto", "How the model writes tool calls. auto: by its chat template."
    )
    reasoning_parser: Literal["auto", "none", "think", "mistral"] = _option(
        "auto", "How the model marks its reasoning: think is <think>...</think>. auto: by its chat template."
    )
    max_body_bytes: int = _option(8 << 20, "Largest HTTP body accepted, in bytes.")
    step_timeout: float = _option(25.0, "Seconds without progress of the engine after which /health is 503. More where steps are slow.")
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "Least severe message that is logged.")
    log_format: Literal["auto", "json", "text"] = _option("auto", "Form of the log on stderr. auto: text on a terminal, JSON elsewhere.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        _require(1 <= self.api_workers <= 64, "api_workers", self.api_workers, "1 to 64")
        endpoint = self.otlp_endpoint
        is_address = endpoint is None or re.fullmatch(r"https?://\S+", endpoint) is not None
        _require(is_address, "otlp_endpoint", endpoint, "an http:// or https:// address")
        together = (self.tls_cert is None) == (self.tls_key is None)
        _require(together, "tls_key", self.tls_key, "tls_cert and tls_key together, or neither")
        _require(all(map(is_origin, self.cors_origin_list)), "cors_origins", self.cors_origins, "origins such as https://example.org, or *")
        _require(0 <= self.drain_timeout <= 86400, "drain_timeout", self.drain_timeout, "0 to 86400 seconds")
        _require(0 <= self.drain_delay <= 600, "drain_delay", self.drain_delay, "0 to 600 seconds")
        limit = self.request_timeout
        _require(limit is None or 0.0 < limit <= 86400, "request_timeout", limit, "more than 0, at most 86400 seconds")
        _require(1.0 <= self.stall_timeout <= 86400, "stall_timeout", self.stall_timeout, "1 to 86400 seconds")
        _require(1.0 <= self.step_timeout <= 86400, "step_timeout", self.step_timeout, "1 to 86400 seconds")
        _require(1024 <= self.max_body_bytes <= 1 << 30, "max_body_bytes", self.max_body_bytes, "1 KiB to 1 GiB")

    @property
    def cors_origin_list(self) -> list[str]:
        return [origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip()]


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give `parser` one flag for each field of the dataclass `cls`; dashes and underscores are both accepted."""
    group = parser.add_argument_group(cls.__name__.removesuffix("Config").lower())
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind, choices, optional = _kind(hints[item.name])
        default = "auto" if item.default is None else item.default
        options: dict[str, Any] = {"dest": item.name}
        if kind is bool:
            default = "on" if item.default else "off"
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=_or_auto(kind) if optional else kind, choices=choices, metavar=None if choices else _METAVARS[kind])
        text = f"{item.metadata['help']} (default: {default})".replace("%", "%%")
        group.add_argument(_flag(item.name), default=item.default, help=text, **options)
        if "_" in item.name:  # the same flag as LMDeploy's configuration spells it; not worth a line of its own in --help
            group.add_argument(f"--{item.name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def from_arguments(cls: type[T], namespace: argparse.Namespace) -> T:
    """The dataclass `cls` from parsed flags. Raises ConfigurationError for an illegal value."""
    return cls(**{item.name: getattr(namespace, item.name) for item in dataclasses.fields(cls)})  # type: ignore[arg-type]


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `cls` from plain values. Raises ConfigurationError for an unknown key or an illegal value."""
    known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigurationError(f"unknown option {unknown[0]!r}", cure=f"Known options: {', '.join(sorted(known))}.")
    return cls(**values)


def to_arguments(config: Any) -> list[str]:
    """The flags that make `config` again: only fields that differ from their default, in the order of the dataclass."""
    flags: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value == item.default:
            continue
        if isinstance(value, bool):
            flags.append(_flag(item.name) if value else _flag(f"no_{item.name}"))
        else:
            flags.append(f"{_flag(item.name)}={'auto' if value is None else value}")
    return flags


_METAVARS = {str: "TEXT", int: "N", float: "X"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> tuple[Any, Sequence[str] | None, bool]:
    """(converter, choices, may be `auto`) of a field's type."""
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        return inner, None, True
    return hint, None, False


def _or_auto(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text == "auto" else kind(text)

    convert.__name__ = f"{kind.__name__} or auto"
    return convert


def _check_choices(config: Any) -> None:
    for name, allowed in _choices(config.__class__).items():
        _require(getattr(config, name) in allowed, name, getattr(config, name), " or ".join(map(str, allowed)))


@functools.cache
def _choices(of: type) -> dict[str, tuple[Any, ...]]:
    """What each field of a `Literal` type may be. Resolving a class's hints takes a millisecond, and the operator makes many plans."""
    hints = typing.get_type_hints(of).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigurationError(f"{name} is {value!r}, which is not allowed", cure=f"Give {expected}.")
