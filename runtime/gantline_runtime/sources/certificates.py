"""A private certificate authority for all sources: $GANTLINE_CA_CERTIFICATES, in PEM, beside those that are trusted anyway.

Pods get it from the key ca.crt of the secretRef's Secret. It is written to a file that httpx, and with it huggingface_hub, reads.
"""

from __future__ import annotations

import atexit
import os
import ssl
import sys
import tempfile
from pathlib import Path

from gantline_runtime.errors import ConfigurationError

__all__ = ["VARIABLE", "trust_given_authority"]

VARIABLE = "GANTLINE_CA_CERTIFICATES"


def trust_given_authority() -> None:
    """Make clients that are opened from now on trust the authority, if one was given; huggingface_hub's is opened anew. Raises
    ConfigurationError if it is none."""
    given = os.environ.pop(VARIABLE, "").strip()
    if not given:
        return
    try:
        ssl.create_default_context(cadata=given)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"{VARIABLE} holds no certificates ({type(error).__name__})", cure="Put certificates in PEM into ca.crt."
        ) from None
    import certifi

    known = Path(os.environ.get("SSL_CERT_FILE") or certifi.where()).read_text(encoding="utf-8")
    handle, name = tempfile.mkstemp(suffix=".crt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"{known}\n{given}\n")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    os.environ["SSL_CERT_FILE"] = name
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import close_session

        close_session()
