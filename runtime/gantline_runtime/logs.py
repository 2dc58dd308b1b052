"""Logging of every process of the runtime: one JSON object a line, or plain lines for a person at a terminal.

No log line ever holds a prompt, an answer or a secret: callers pass counts, names and identifiers as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Literal

__all__ = ["LogFormat", "configure", "fields", "resolve_format"]

LogFormat = Literal["auto", "json", "text"]


def resolve_format(format: LogFormat) -> Literal["json", "text"]:
    if format == "auto":
        return "text" if sys.stderr.isatty() else "json"
    return format


def configure(level: str, format: LogFormat) -> None:
    """Send everything from `level` on to stderr. Replaces whatever handlers the process had."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if resolve_format(format) == "json" else _TextFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "asyncio", "httpx", "urllib3"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(logging.WARNING, logging.root.level))


def fields(**values: Any) -> dict[str, Any]:
    """`extra=` of a logging call with structured `values`."""
    return {"fields": values}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        extra = "".join(f" {key}={value}" for key, value in getattr(record, "fields", {}).items() if value is not None)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{time} {level}{record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
