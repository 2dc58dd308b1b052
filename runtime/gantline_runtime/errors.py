"""Errors a user, a network or a cluster can cause, each with its cause and its cure.

GantlineError
├── CheckpointError      the model's files: missing, truncated, lying, unsafe, of an architecture we lack
├── ConfigurationError   an option that is unknown, out of range, or contradicts another
├── SourceError          a model source that cannot be read: not there, unauthorized, rate limited, stalled
├── CapacityError        too little memory or disk
└── QuantizationError    a quantization that failed, or whose result is worse than allowed

Every error carries a `Reason` of the closed set in `termination.py`; `str(error)` is one sentence of cause, `error.cure` one of cure.
"""

from __future__ import annotations

from gantline_runtime.termination import Reason

__all__ = ["CapacityError", "CheckpointError", "ConfigurationError", "GantlineError", "QuantizationError", "SourceError"]


class GantlineError(Exception):
    """Base of all errors that are reported to a user.

    `reason` is the machine-readable cause, `cure` one sentence on what to do.
    """

    reason = Reason.INTERNAL_ERROR

    def __init__(self, message: str, *, reason: Reason | None = None, cure: str = "") -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        self.cure = cure


class CheckpointError(GantlineError):
    reason = Reason.INVALID_CHECKPOINT


class ConfigurationError(GantlineError):
    reason = Reason.INVALID_CONFIGURATION


class SourceError(GantlineError):
    reason = Reason.MODEL_NOT_FOUND


class CapacityError(GantlineError):
    reason = Reason.OUT_OF_MEMORY


class QuantizationError(GantlineError):
    reason = Reason.QUANTIZATION_FAILED
