"""Keeps what opens a source out of what libraries log."""

from __future__ import annotations

import logging
import os
import re

__all__ = ["SECRETS", "RedactSecrets"]

SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Variables whose values appear nowhere. $DOCKER_AUTH_CONFIG's passwords go to no library that logs."""


class RedactSecrets(logging.Filter):
    """Takes secrets, and the query of any address (storage hosts sign them), out of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']*", r"\1", record.getMessage())
        for name in SECRETS:
            if value := os.environ.get(name, "").strip():
                text = text.replace(value, "***")
        record.msg, record.args = text, None
        return True
