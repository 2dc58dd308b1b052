"""Certificates for tests: made by openssl, each its own authority, and the subject that a server shows."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

__all__ = ["make_certificate", "shown_subject"]


def make_certificate(folder: Path, name: str, *, cert: str = "cert.pem", key: str = "key.pem", hosts: str = "IP:127.0.0.1") -> Path:
    """The files `cert` and `key` in `folder`, whose subject is `name`; the certificate's. `hosts` as openssl writes alternative names."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={hosts}", "-days", "2"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*new, *subject, "-keyout", str(folder / key), "-out", str(folder / cert)], check=True, capture_output=True)
    return folder / cert


def shown_subject(url: str, trusted: Path) -> str:
    """The common name of whoever answers at `url`. Raises httpx.HTTPError where `trusted` has not signed its certificate."""
    with httpx.Client(verify=ssl.create_default_context(cafile=str(trusted)), timeout=60) as client:
        certificate = client.get(url).extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
    return str(dict(pair for entry in certificate["subject"] for pair in entry)["commonName"])
