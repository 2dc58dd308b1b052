"""TLS for the server's port, from files that may be renewed while it runs, as cert-manager does: new connections get what is new."""

from __future__ import annotations

import ssl
from pathlib import Path

from gantline_runtime.errors import ConfigurationError

__all__ = ["Certificate"]


class Certificate:
    """`context` is given to the listener once; `reload` puts another certificate into it."""

    def __init__(self, cert: Path, key: Path) -> None:
        """PEM files: the certificate with its chain, and its private key without a passphrase. Raises ConfigurationError."""
        self.paths = (cert, key)
        self.context = _new_context()
        self.reload()

    def reload(self) -> None:
        """Raises ConfigurationError; then the old certificate stays. Both files are tried in a context of their own first, since half of a
        pair must never get into the one in use."""
        for context in (_new_context(), self.context):
            try:
                context.load_cert_chain(*self.paths, password=_refuse_passphrase)
            except (OSError, ValueError) as error:
                cause = f"the certificate {self.paths[0]} and key {self.paths[1]} cannot be used: {error}"
                raise ConfigurationError(cause, cure="Give PEM files that belong together, the key without a passphrase.") from None


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _refuse_passphrase() -> str:
    """Without this, OpenSSL would ask for it on the terminal and wait."""
    raise ValueError("the private key has a passphrase")
