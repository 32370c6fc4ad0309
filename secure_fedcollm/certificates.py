"""What is demanded of the TLS certificates that NVIDIA FLARE issues and uses, before they are believed.

FLARE writes a certificate's role into the subject's ``unstructuredName`` and a party's name into its common name. The
authority of a federation issues nothing else; so a certificate that it signed, for another name or role, is the only
way in which one party could pass for another, and this is looked at here.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from fedcollm_privacy.errors import KitError

__all__ = [
    "CertificateRole",
    "Subject",
    "ca_fingerprint",
    "check_certificate",
    "check_request",
    "key_in",
    "load_certificate",
    "public_bytes",
]

CertificateRole = Literal["server", "client", "lead"]

_LEAST_BITS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whom a certificate must name.

    Attributes:
        name: the common name; at the server its host, for that is what the engine calls it.
        role: what the party may do in the engine.
        org: the organisation.
    """

    name: str
    role: CertificateRole
    org: str


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """The one certificate in ``pem``; KitError, which calls it ``what``, for anything else."""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        found = []
    if len(found) != 1:
        raise KitError(f"{what} is damaged or no certificate: put back a copy, or ask the coordinator for it again")
    return found[0]


def ca_fingerprint(ca: x509.Certificate) -> str:
    """SHA-256 of the certificate, as 64 hex digits."""
    return hashlib.sha256(ca.public_bytes(serialization.Encoding.DER)).hexdigest()


def public_bytes(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """The public key that is certified, in its one DER spelling."""
    return holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_in(path: Path) -> bytes:
    """The public half, as `public_bytes`, of an unencrypted private key in a file of its owner's alone.

    Raises:
        KitError: the file is missing, damaged or can be read by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise KitError(
                f"{path} can be read by other users: chmod 600 {path}, and if somebody may have read it, "
                "`fedcollm deploy renew` for a new key"
            )
        private = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise KitError(
            f"{path} cannot be read ({error.strerror}): put back a copy, or `fedcollm deploy renew`"
        ) from None
    except (ValueError, TypeError):
        raise KitError(f"{path} is damaged or no private key: put back a copy, or `fedcollm deploy renew`") from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.public_key().public_bytes(*form)


def check_request(request: x509.CertificateSigningRequest, subject: Subject) -> None:
    """Return if a signing request is sound and asks for this subject.

    Raises:
        KitError: another name, role or organisation, a weak or another kind of key, or its signature does not hold.
    """
    if not request.is_signature_valid:
        raise KitError("the certificate request was altered: its own signature does not hold")
    _require_subject(request.subject, subject, "the certificate request")
    key = request.public_key()
    if not isinstance(key, RSAPublicKey) or key.key_size < _LEAST_BITS:
        raise KitError(
            f"the certificate request has a weak or another kind of key; RSA of {_LEAST_BITS} bits is needed"
        )


def check_certificate(certificate: x509.Certificate, *, ca: x509.Certificate, subject: Subject, now: datetime) -> None:
    """Return if the authority ``ca`` issued the certificate to this subject and both hold at ``now``.

    Args:
        certificate: the party's.
        ca: the authority's, pinned by the kit.
        subject: whom it must name, and no other name or host beside it.
        now: with a time zone.

    Raises:
        KitError: it is not so; the text says which of it.
    """
    what = f"the certificate of {subject.name}"
    for name, held in (("the certificate authority's certificate", ca), (what, certificate)):
        if not held.not_valid_before_utc <= now <= held.not_valid_after_utc:
            raise KitError(
                f"{name} holds from {held.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{held.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}: "
                "`fedcollm deploy renew` asks for a new one; or correct this machine's clock"
            )
    verifier = (
        PolicyBuilder()
        .store(Store([ca]))
        .time(now)
        .extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=ExtensionPolicy.permit_all())
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, [])
    except VerificationError:
        raise KitError(
            f"{what} was not issued by this federation's certificate authority (ca.pem): nothing of it was used; "
            "ask the coordinator for the grant again"
        ) from None
    _require_subject(certificate.subject, subject, what)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        raise KitError(f"{what} lacks its names or its constraints; ask for a new one") from None
    if list(names) != [_host(subject.name)] or basic.ca:
        raise KitError(f"{what} holds for other names too, or may issue certificates; ask for a new one")


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _require_subject(found: x509.Name, wanted: Subject, what: str) -> None:
    for oid, word, text in (
        (NameOID.COMMON_NAME, "name", wanted.name),
        (NameOID.UNSTRUCTURED_NAME, "role", wanted.role),
        (NameOID.ORGANIZATION_NAME, "organisation", wanted.org),
    ):
        values = [str(attribute.value) for attribute in found.get_attributes_for_oid(oid)]
        if values != [text]:
            raise KitError(f"{what} is for the {word} {', '.join(values)[:80] or 'nobody'!r}, and not {text!r}")
