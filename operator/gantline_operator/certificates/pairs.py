"""An authority that signs one serving certificate, and whose key is thrown away at once.

Nobody can sign another one, so a stolen Secret is worth what it is worth until the next rotation. A rotation makes both anew.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["LIFETIME", "Pair", "belongs_together", "load_pair", "make_pair", "must_renew", "read_authorities"]

LIFETIME = timedelta(days=90)
_AUTHORITY = "gantline authority"
_SKEW = timedelta(hours=1)
"""How far the API server's clock may be behind ours."""
_RENEW_SHARE = 2 / 3
"""Of its lifetime, after which a certificate is replaced."""


@dataclass(frozen=True)
class Pair:
    """PEM texts."""

    authority: str
    certificate: str
    key: str


def make_pair(hosts: Sequence[str], now: datetime, lifetime: timedelta = LIFETIME) -> Pair:
    """A certificate for these names and addresses, valid from an hour before `now`."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ends = now + lifetime
    authority = (
        _builder(_AUTHORITY, _AUTHORITY, authority_key, now, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        _builder("gantline", _AUTHORITY, key, now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(_pem(authority), _pem(certificate), secret.decode())


def load_pair(context: ssl.SSLContext, pair: Pair) -> None:
    """New connections of `context` are answered with it; those that are open go on. Raises ssl.SSLError for what is no certificate."""
    descriptor, path = tempfile.mkstemp(prefix="gantline-certificate-")  # 0600; the ssl module reads keys from files only
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(pair.certificate + "\n" + pair.key)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)


def must_renew(certificate: str, hosts: Sequence[str], now: datetime) -> bool:
    """Whether it is none, is for other names, or has used up two thirds of its time."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate.encode())
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return True
    began, ends = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    return list(names) != [_general_name(host) for host in hosts] or not began <= now < began + (ends - began) * _RENEW_SHARE


def belongs_together(pair: Pair) -> bool:
    """Whether the key is the certificate's, and one of the authorities has signed it."""
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate.encode())
        key = serialization.load_pem_private_key(pair.key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return key.public_key() == certificate.public_key() and any(map(partial(_signed_by, certificate), read_authorities(pair.authority)))


def read_authorities(bundle: str) -> list[x509.Certificate]:
    """None where it is no bundle of certificates."""
    try:
        return x509.load_pem_x509_certificates(bundle.encode())
    except ValueError:
        return []


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, now: datetime, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - _SKEW).astimezone(UTC))
        .not_valid_after(ends.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
