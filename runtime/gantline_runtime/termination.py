"""The last word of a container: one JSON object of at most 4096 bytes in its termination message.

Kubernetes copies the file into the pod's status, so the operator learns why a pod ended, or what a Job found out, without
a network, a volume, or the right to read logs. Written by `gantline serve` and by every stage's command, read by the operator.

    {"reason": "InvalidCheckpoint", "message": "...", "cure": "...", "facts": {...}, "artefact": {...}}

`reason` is `Completed` for a Job that did its work; `facts` (inspect) and `artefact` (fetch, quantize) are its answer.
Imports no torch: the operator imports this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["MAX_BYTES", "Reason", "TerminationMessage", "exit_code", "parse", "write"]

MAX_BYTES = 4096
"""What Kubernetes keeps of one container's termination message."""

_ENVIRONMENT = "GANTLINE_TERMINATION_LOG"
_DEFAULT_PATH = "/dev/termination-log"


class Reason(StrEnum):
    """Why a container of ours ended; the operator copies the value into a condition."""

    COMPLETED = "Completed"
    DRAINED = "Drained"
    MODEL_NOT_FOUND = "ModelNotFound"
    NOT_A_MODEL = "NotAModel"
    UNSUPPORTED_ARCHITECTURE = "UnsupportedArchitecture"
    INVALID_CHECKPOINT = "InvalidCheckpoint"
    UNSAFE_WEIGHTS = "UnsafeWeights"
    INVALID_QUANTIZATION = "InvalidQuantization"
    DOWNLOAD_UNAUTHORIZED = "DownloadUnauthorized"
    DOWNLOAD_RATE_LIMITED = "DownloadRateLimited"
    DOWNLOAD_STALLED = "DownloadStalled"
    DISK_FULL = "DiskFull"
    QUANTIZATION_FAILED = "QuantizationFailed"
    QUALITY_GATE_FAILED = "QualityGateFailed"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    OUT_OF_MEMORY = "OutOfMemory"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    CUDA_ERROR = "CudaError"
    DRIVER_TOO_OLD = "DriverTooOld"
    SMOKE_REQUEST_FAILED = "SmokeRequestFailed"
    INTERNAL_ERROR = "InternalError"


_USER_CANNOT_RETRY = 64  # sysexits EX_USAGE and up: trying again with the same input cannot help
_EXIT_CODES = {
    Reason.COMPLETED: 0,
    Reason.DRAINED: 0,
    Reason.INVALID_CONFIGURATION: _USER_CANNOT_RETRY,
    Reason.MODEL_NOT_FOUND: 66,
    Reason.NOT_A_MODEL: 65,
    Reason.UNSUPPORTED_ARCHITECTURE: 65,
    Reason.INVALID_CHECKPOINT: 65,
    Reason.UNSAFE_WEIGHTS: 65,
    Reason.INVALID_QUANTIZATION: 65,
    Reason.QUALITY_GATE_FAILED: 65,
    Reason.SMOKE_REQUEST_FAILED: 65,
    Reason.DOWNLOAD_UNAUTHORIZED: 77,
    Reason.DOWNLOAD_RATE_LIMITED: 75,
    Reason.DOWNLOAD_STALLED: 75,
    Reason.DISK_FULL: 73,
}


@dataclass(frozen=True)
class TerminationMessage:
    reason: Reason
    message: str = ""
    cure: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    artefact: Mapping[str, Any] = field(default_factory=dict)


def exit_code(reason: Reason) -> int:
    """The process's exit code for `reason`: 0 done, 64-67 not to be retried, 70-77 may pass, following sysexits.h."""
    return _EXIT_CODES.get(reason, 70)


def encode(message: TerminationMessage) -> str:
    """JSON of at most `MAX_BYTES` bytes; an over-long `message` is cut, `facts` and `artefact` never are (ValueError instead)."""
    body: dict[str, Any] = {"reason": message.reason.value}
    if message.cure:
        body["cure"] = message.cure[:512]
    if message.facts:
        body["facts"] = dict(message.facts)
    if message.artefact:
        body["artefact"] = dict(message.artefact)
    room = MAX_BYTES - len(_dumps({**body, "message": ""}).encode())
    if room < 0:
        raise ValueError(f"termination message exceeds {MAX_BYTES} bytes without its text")
    text = message.message
    while text and len(json.dumps(text).encode()) - 2 > room:
        text = text[: max(0, len(text) - 64)]
    body["message"] = text
    return _dumps(body)


def _dumps(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


def write(message: TerminationMessage, path: str | None = None) -> None:
    """Write to `path`, else to $GANTLINE_TERMINATION_LOG, else to Kubernetes' default if it exists; outside a pod nothing is written."""
    target = path or os.environ.get(_ENVIRONMENT) or (_DEFAULT_PATH if os.path.exists(_DEFAULT_PATH) else "")
    if not target:
        return
    with open(target, "w", encoding="utf-8") as file:
        file.write(encode(message))


def parse(text: str) -> TerminationMessage | None:
    """The message in `text`, or None where the container wrote none of ours (the text is untrusted: anything odd is None)."""
    if not text or len(text) > MAX_BYTES * 4:
        return None
    try:
        body = json.loads(text)
        reason = Reason(body["reason"])
    except (ValueError, KeyError, TypeError):
        return None
    facts, artefact = body.get("facts", {}), body.get("artefact", {})
    return TerminationMessage(
        reason=reason,
        message=str(body.get("message", ""))[:1024],
        cure=str(body.get("cure", ""))[:512],
        facts=facts if isinstance(facts, dict) else {},
        artefact=artefact if isinstance(artefact, dict) else {},
    )
