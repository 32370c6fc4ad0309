"""A party's side of the ceremony: keys are made here and stay here; what the grant says is believed once it is proved.

A renewed TLS key lies in ``keys/requested`` until its grant has come, so that the kit goes on with the old one. A
grant is taken over in an order in which every cut is mended by the same command again: the request's own folder, which
has the new key, goes last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedcollm_privacy.errors import KitError, ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey, load_key, load_public, save_key, save_public
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import Roster, SignedRoster
from secure_fedcollm import flare_provisioning as flare
from secure_fedcollm.certificates import ca_fingerprint, check_certificate, key_in, load_certificate, public_bytes
from secure_fedcollm.enrolment import Enrolment, Grant, Signed
from secure_fedcollm.kit import Party, Role, read_party, require_member, require_private
from secure_fedcollm.kit_files import read_bytes, write_file
from secure_fedcollm.kit_texts import settings_text, unit_text

__all__ = ["Rules", "complete", "join", "renew", "request_path"]

Rules = Callable[[Path, Role], None]
"""Writes a party's own rules into the engine's ``local`` folder."""


def request_path(folder: Path, party: Party) -> Path:
    """The file that goes to the coordinator."""
    return folder / f"{party.party}.request.json"


def join(folder: Path, passphrase: bytes | None) -> PublicIdentity:
    """Make the party's keys in its kit, and its request.

    Args:
        folder: the kit.
        passphrase: encrypts the identity's key; None leaves the file's mode as its only protection.

    Returns:
        The identity, whose fingerprint the coordinator compares.

    Raises:
        KitError: the kit has keys already, is no kit, or NVIDIA FLARE refuses.
    """
    party = read_party(folder)
    keys = folder / "keys"
    if os.path.lexists(keys):
        raise KitError(
            f"{keys} exists, and keys are never overwritten: send {request_path(folder, party).name} (again), or "
            f"`fedcollm deploy renew {folder}` for a new TLS key under the same identity"
        )
    key = SigningKey.generate(party.party)
    # Made aside, so that a cut leaves no keys without their request.
    with tempfile.TemporaryDirectory(prefix=".keys.", dir=folder) as temporary:
        work = Path(temporary) / "keys"
        work.mkdir(mode=0o700)
        save_key(key, work / "identity.key", passphrase)
        save_public(key.public, work / "identity.pub")
        signed = _request(folder, party, key, work / "requested")
        write_file(request_path(folder, party), signed.to_bytes())
        os.rename(work, keys)
    return key.public


def renew(folder: Path, passphrase: bytes | None, *, again: bool) -> PublicIdentity:
    """Make a new TLS key, and a request for its certificate; the old one stays in use until `complete`.

    Args:
        folder: the kit; its identity stays.
        passphrase: of the identity's key.
        again: throw away a request that was not answered yet.

    Returns:
        The identity.

    Raises:
        KitError: the party has not joined, or a request waits for its answer.
        KeyFileError: the identity's key does not open.
    """
    party = read_party(folder)
    keys = folder / "keys"
    if not keys.is_dir():
        raise KitError(f"{keys} is missing: run `fedcollm deploy join {folder}` first")
    require_private(keys)
    key = load_key(keys / "identity.key", passphrase)
    if key.name != party.party:
        raise KitError(f"{keys}/identity.key is the key of {key.name}, and this is the kit of {party.party}")
    requested = keys / "requested"
    if requested.exists() and not again:
        raise KitError(
            f"{request_path(folder, party).name} was not answered yet: send it (again) and complete, or give --again "
            "to throw its key away and make another"
        )
    with tempfile.TemporaryDirectory(prefix=".keys.", dir=folder) as temporary:
        signed = _request(folder, party, key, Path(temporary) / "requested")
        if requested.exists():
            os.rename(requested, Path(temporary) / "old")
        write_file(request_path(folder, party), signed.to_bytes())
        os.rename(Path(temporary) / "requested", requested)
    return key.public


def complete(folder: Path, grant: Grant, rules: Rules) -> tuple[Roster, tuple[Path, ...]]:
    """Prove a grant and take it over.

    Args:
        folder: the kit.
        grant: unverified.
        rules: writes the party's own rules into the engine's ``local`` folder, which allow nothing but our job.

    Returns:
        The roster, and the files that were written for the administrator.

    Raises:
        KitError: it is another party's, or something in it does not fit this kit; nothing was changed.
        SignatureInvalid: the roster is not signed by the kit's governance.
        ProtocolError: the roster has expired or is malformed.
    """
    party = read_party(folder)
    if (grant.federation, grant.party, grant.kit) != (party.federation, party.party, party.kit):
        raise KitError(
            f"this grant is for {grant.party} in {grant.federation}, kit {grant.kit[:8]}; this is the kit "
            f"{party.kit[:8]} of {party.party} in {party.federation}"
        )
    keys = folder / "keys"
    if not keys.is_dir():
        raise KitError(f"{keys} is missing: run `fedcollm deploy join {folder}` first")
    require_private(keys)
    roster = _proved_roster(folder, party, grant)
    ca = load_certificate(read_bytes(folder / "ca.pem"), f"{folder}/ca.pem")
    pems = _proved_certificates(party, grant, ca)
    if _holds(pems, {stem: flare.key_of(keys / "requested" / stem, s) for stem, s in party.subjects.items()}):
        _install(folder, party, grant, pems, ca_fingerprint(ca), rules)
        write_file(folder / "roster.json", grant.roster.to_bytes())
        shutil.rmtree(keys / "requested")
    elif _holds(pems, {stem: keys / f"{stem}.key" for stem in pems}) and (folder / "engine" / "startup").is_dir():
        rules(folder / "engine" / "local", party.role)  # the kit may have been moved
        write_file(folder / "roster.json", grant.roster.to_bytes())
    else:
        raise KitError(
            f"the certificate in this grant is not for the key of this kit: it answers an earlier request. Ask for the "
            f"grant of the latest {request_path(folder, party).name}, or make one with `fedcollm deploy renew {folder}`"
        )
    if party.role == "server":
        _shut_out(folder / "engine", grant.revoked)
    else:
        write_file(folder / "server.pub", canonical_json(roster.server.as_fields()) + b"\n")
    return roster, _for_the_administrator(folder, party)


def _request(folder: Path, party: Party, key: SigningKey, place: Path) -> Signed:
    ca = load_certificate(read_bytes(folder / "ca.pem"), f"{folder}/ca.pem")
    place.mkdir(mode=0o700)
    requests = {
        stem: flare.make_request(place / stem, party.federation, subject) for stem, subject in party.subjects.items()
    }
    enrolment = Enrolment(
        federation=party.federation,
        party=party.party,
        role=party.role,
        kit=party.kit,
        ca=ca_fingerprint(ca),
        made_at=int(time.time()),
        identity=key.public,
        requests=requests,
    )
    return Signed.by(key, enrolment)


def _proved_roster(folder: Path, party: Party, grant: Grant) -> Roster:
    governance, now = load_public(folder / "governance.pub"), time.time()
    roster = grant.roster.verified_by(governance, now)
    require_member(roster, party, load_public(folder / "keys" / "identity.pub"))
    path = folder / "roster.json"
    if path.exists():
        held = SignedRoster.from_bytes(read_bytes(path))
        try:
            before = held.verified_by(governance, 0.0)
        except ProtocolError:  # damaged or altered here: any that the governance signed is better
            return roster
        if roster.valid_until < before.valid_until:
            raise KitError(
                f"the grant's roster is older than the one that this kit has: it may name a site that was revoked "
                f"since. Ask {party.contact} for the latest grant"
            )
    return roster


def _proved_certificates(party: Party, grant: Grant, ca: x509.Certificate) -> dict[str, bytes]:
    if set(grant.certificates) != set(party.subjects):
        raise KitError(f"the grant has not exactly the certificates {', '.join(party.subjects)}: have it sent again")
    pems = {}
    for stem, subject in party.subjects.items():
        pems[stem] = flare.certificate_in(grant.certificates[stem], subject)
        certificate = load_certificate(pems[stem], f"the certificate of {subject.name}")
        check_certificate(certificate, ca=ca, subject=subject, now=datetime.now(UTC))
    return pems


def _holds(pems: dict[str, bytes], keys: dict[str, Path]) -> bool:
    return all(
        keys[stem].exists() and key_in(keys[stem]) == public_bytes(load_certificate(pem, stem))
        for stem, pem in pems.items()
    )


def _install(folder: Path, party: Party, grant: Grant, pems: dict[str, bytes], fingerprint: str, rules: Rules) -> None:
    keys = folder / "keys"
    places = {"tls": "engine", "lead": "engine-admin"}
    with tempfile.TemporaryDirectory(prefix=".engine.", dir=folder) as temporary:
        for stem, subject in party.subjects.items():
            work, request, engine = Path(temporary) / stem, keys / "requested" / stem, folder / places[stem]
            work.mkdir()
            made = flare.package(grant.certificates[stem], request, fingerprint, work)
            (made / "startup").chmod(0o700)
            engine.mkdir(mode=0o700, exist_ok=True)
            (engine / "transfer").mkdir(mode=0o700, exist_ok=True)
            # The engine does not start without `startup`, so it never starts under its own, wider rules.
            for part in ("startup", "local"):
                if (engine / part).exists():
                    os.rename(engine / part, work / f"{part}.old")
            os.rename(made / "local", engine / "local")
            if stem == "tls":
                rules(engine / "local", party.role)
            os.rename(made / "startup", engine / "startup")
            write_file(folder / f"{stem}.pem", pems[stem])
            write_file(keys / f"{stem}.key", flare.key_of(request, subject).read_bytes(), mode=0o600)


def _shut_out(engine: Path, revoked: tuple[str, ...]) -> None:
    # NVIDIA FLARE has no revocation lists; it turns these names away at its door.
    fields = {"disabled_clients": sorted(revoked)}
    write_file(engine / "disabled_clients.json", json.dumps(fields, indent=2).encode())


def _for_the_administrator(folder: Path, party: Party) -> tuple[Path, ...]:
    for place in ("state", *(["runs"] if party.role == "server" else [])):
        (folder / place).mkdir(mode=0o700, exist_ok=True)
    unit = folder / "systemd" / f"fedcollm-{party.role}.service"
    unit.parent.mkdir(exist_ok=True)
    write_file(unit, unit_text(folder.absolute(), party).encode())
    written = [unit]
    settings = folder / "site.yaml"
    if party.role == "site" and not settings.exists():
        write_file(settings, settings_text(site=party.party).encode())
        written.append(settings)
    return tuple(written)
