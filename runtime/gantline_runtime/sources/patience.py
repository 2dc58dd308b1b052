"""What to do when a server refuses, or goes silent: try again while that can help, wait as long as it asks for, or say what it means.

Sources translate what their libraries raise into `Refused` (an answer that is no success) and `Interrupted` (no answer, or half of one);
`Patience` turns both into a wait or into a SourceError:

    401, 403         DownloadUnauthorized     at once
    404              ModelNotFound            at once
    429              DownloadRateLimited      after several tries, each after the wait that Retry-After asks for
    408, 5xx         DownloadStalled          after several tries
    no (more) bytes  DownloadStalled          after several tries without a single byte in between
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from gantline_runtime import logs
from gantline_runtime.errors import SourceError
from gantline_runtime.termination import Reason

__all__ = ["Interrupted", "Patience", "Refused", "Service", "Trouble", "persist"]

_TRIES = 6
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 600.0
"""Longest wait that a server is granted; one that asks for more is left, and the operator starts the stage again later."""
_RETRIED = (408, 429, 500, 502, 503, 504)

log = logging.getLogger("gantline.fetch")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """How errors speak of the server that a source is read from."""

    label: str
    """The source, such as s3://bucket/path."""
    server: str
    """Such as `the registry`."""
    access: str
    """With which credentials it was asked, in words: `no token was given`."""
    access_cure: str
    missing: str
    """What a 404 means: `has no revision 'x'`."""
    address_cure: str = "Check the address, the network and proxies."


class Trouble(Exception):
    """A try that failed."""

    def passes(self) -> bool:
        """Whether trying again can help."""
        return True

    def asked_wait_s(self) -> float | None:
        """The wait that the server asks for, in seconds."""
        return None

    def error(self, service: Service) -> SourceError:
        raise NotImplementedError


class Refused(Trouble):
    """An answer other than the wanted one. `code` is the server's word for the cause, empty where it has none."""

    def __init__(self, status: int, retry_after: str | None = None, code: str = "") -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.retry_after = status, retry_after
        self.code = code if code.isascii() and code.isalnum() and len(code) <= 64 else ""

    def passes(self) -> bool:
        return self.status in _RETRIED

    def asked_wait_s(self) -> float | None:
        return parse_retry_after(self.retry_after)

    def error(self, service: Service) -> SourceError:
        answer = f"HTTP {self.status}, {self.code}" if self.code else f"HTTP {self.status}"
        if self.status in (401, 403):
            return SourceError(
                f"{service.label} is private or does not exist ({answer}), and {service.access}",
                reason=Reason.DOWNLOAD_UNAUTHORIZED, cure=service.access_cure,
            )  # fmt: skip
        if self.status == 404:
            return SourceError(f"{service.label} {service.missing} ({answer})", cure="Check the name, and the revision or tag.")
        if self.status == 429:
            wait_s = self.asked_wait_s()
            asked = f", and asks to wait {wait_s:.0f} s" if wait_s else ""
            return SourceError(
                f"{service.server} answers too many requests ({answer}) for {service.label}{asked}",
                reason=Reason.DOWNLOAD_RATE_LIMITED, cure="Wait some minutes; with credentials of your own the limit is usually higher.",
            )  # fmt: skip
        return SourceError(
            f"{service.server} answers {answer} for {service.label}",
            reason=Reason.DOWNLOAD_STALLED, cure=f"Try again later. {service.address_cure}",
        )  # fmt: skip


class Interrupted(Trouble):
    """No answer, or one that ended too early or went silent. The cause's text may hold a signed address and is not shown."""

    def __init__(self, cause: BaseException | str) -> None:
        super().__init__(cause if isinstance(cause, str) else type(cause).__name__)
        self._untrusted = "CERTIFICATE_VERIFY_FAILED" in str(cause)

    def passes(self) -> bool:
        return not self._untrusted

    def error(self, service: Service) -> SourceError:
        if self._untrusted:
            return SourceError(
                f"{service.server} of {service.label} shows a certificate that is not trusted", reason=Reason.DOWNLOAD_STALLED,
                cure="Give the certificate of its authority: key ca.crt of the secretRef's Secret, or SSL_CERT_FILE.",
            )  # fmt: skip
        return SourceError(
            f"the download of {service.label} stalled ({self})", reason=Reason.DOWNLOAD_STALLED,
            cure=f"{service.address_cure} Starting again goes on where it stopped.",
        )  # fmt: skip


class Patience:
    """Counts the tries of one piece of work; any progress starts the count anew."""

    def __init__(self, service: Service) -> None:
        self._service, self._failures = service, 0

    def progressed(self) -> None:
        self._failures = 0

    def failed(self, trouble: Trouble) -> None:
        """Wait, if another try can help. Raises SourceError if not, or if it was tried often enough."""
        self._failures += 1
        wait_s = trouble.asked_wait_s()
        if wait_s is None:
            wait_s = _FIRST_WAIT_S * 2 ** (self._failures - 1) * random.uniform(0.75, 1.25)
        if not trouble.passes() or self._failures >= _TRIES or wait_s > _LONGEST_WAIT_S:
            raise trouble.error(self._service) from None
        again = f"{trouble}: trying {self._service.label} again in {wait_s:.1f} s"
        log.warning("%s", again, extra=logs.fields(waiting_s=round(wait_s, 1)))
        time.sleep(wait_s)


def persist(service: Service, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried as often as it can help. Raises SourceError, and whatever else `attempt` raises."""
    patience = Patience(service)
    while True:
        try:
            return attempt()
        except Trouble as trouble:
            patience.failed(trouble)


def parse_retry_after(text: str | None) -> float | None:
    """Seconds to wait: a number, or a date as RFC 9110 has it; None for anything else."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text.strip()[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
