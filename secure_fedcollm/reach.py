"""Whether this machine reaches the federation's server: its name, its port, mutual TLS with the pinned authority.

The handshake is Python's own TLS, and not the engine's. It shows that the firewall lets it pass, that the server's
certificate is of the pinned authority and names the host, and, where the server says a word, that it takes this
party's. It sends no byte of ours, and learns no time: how far the two clocks are apart is not measured.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from secure_fedcollm.finding import Finding

__all__ = ["check_reach"]

_CALL = "call the network's administrator: this machine needs outgoing TCP to {0}, and nothing incoming"


def check_reach(
    host: str, port: int, *, ca: Path, certificate: Path, key: Path, at: str | None = None, timeout_s: float = 5.0
) -> Finding:
    """Look the server up, connect, shake hands; the finding names the first step that fails.

    Args:
        host: the server's name, which its certificate must hold.
        port: its port.
        ca: PEM of the pinned authority.
        certificate: PEM of this party.
        key: PEM of its private key.
        at: connect to this address instead of ``host``; the certificate must hold ``host`` all the same.
        timeout_s: seconds for each step.
    """
    place, call = f"{host}:{port}", _CALL.format(f"{host}:{port}")

    def failed(step: str, detail: str, remedy: str) -> Finding:
        return Finding(name=f"server reach: {step}", ok=False, detail=detail, remedy=remedy)

    try:
        found = socket.getaddrinfo(at or host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return failed("DNS", f"the name {host} is not known here ({error})", f"ask for a DNS entry of {host}")
    try:
        connection = socket.create_connection((at or host, port), timeout=timeout_s)
    except OSError as error:
        tried = ", ".join(sorted({str(entry[4][0]) for entry in found}))
        detail = f"no TCP connection to {place} ({tried}): {error}"
        return failed("TCP", detail, f"is the server running (`fedcollm server --check` there)? Else {call}")
    with connection:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_verify_locations(ca)
            context.load_cert_chain(certificate, key)
            context.set_alpn_protocols(["h2"])
        except (OSError, ValueError) as error:  # an SSLError too
            return failed(
                "certificate", f"this party's certificate files do not load ({error})", "see the checks above"
            )
        try:
            with context.wrap_socket(connection, server_hostname=host) as secured:
                return _word(secured, place)
        except ssl.SSLCertVerificationError as error:
            detail = f"the server at {place} shows a certificate that is not believed: {error.verify_message}"
            remedy = (
                "trust it no further: another authority, another name or an inspecting firewall stands there. Compare "
                "ca.pem with the coordinator's; ask whether the firewall opens TLS connections"
            )
            return failed("certificate", detail, remedy)
        except (OSError, ValueError) as error:
            detail = f"{place} is reached and makes no TLS connection with us: {error}"
            return failed("TLS", detail, f"something else answers at {place}, or a firewall cuts TLS: {call}")


def _word(secured: ssl.SSLSocket, place: str) -> Finding:
    """Whether the server, too, believes: with TLS 1.3 its refusal comes after the handshake."""
    said = f"{place}: name, TCP, {secured.version()}, the server's certificate and name hold"
    try:
        heard = secured.recv(1)
    except TimeoutError:
        detail = f"{said}; the server said nothing, so whether it believes this party's certificate was not seen"
        return Finding(name="server reach", ok=None, detail=detail, remedy="start the party and see whether it joins")
    except OSError as error:
        heard, said = b"", f"{said}; the server then ended it: {error}"
    if heard:
        return Finding(name="server reach", ok=True, detail=f"{said}; the server takes this party's")
    return Finding(
        name="server reach: certificate",
        ok=False,
        detail=f"{said}; the server does not take this party's certificate",
        remedy="ask the coordinator whether this party was revoked; a new certificate: `fedcollm deploy renew`",
    )
