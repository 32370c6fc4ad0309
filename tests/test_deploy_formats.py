"""What a coordinator writes and what parties exchange, before any key or engine is there: read strictly, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedcollm_privacy.errors import ConfigError, KitError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import Roster, sign_roster
from secure_fedcollm.enrolment import Enrolment, Grant, Signed
from secure_fedcollm.federation_file import FederationFile
from secure_fedcollm.flare_provisioning import _members
from secure_fedcollm.kit import Party, read_party
from secure_fedcollm.kit_files import read_bytes, write_file

SOUND: dict[str, Any] = {
    "name": "clinics",
    "org": "example",
    "contact": "A. Coordinator, +00 123 456",
    "server": {"name": "hub", "host": "fed.example.org", "port": 8102},
    "sites": ["ward-a", "ward_b", "3"],
    "min_contributors": 3,
    "max_colluding": 1,
    "valid_days": 365,
    "certificate_days": 300,
}


def read(tmp_path: Path, fields: dict[str, Any] | str) -> FederationFile:
    path = tmp_path / "federation.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return FederationFile.read(path)


def test_a_sound_file_is_read_as_written(tmp_path: Path) -> None:
    federation = read(tmp_path, SOUND)
    assert asdict(federation) == SOUND | {"sites": tuple(SOUND["sites"])}
    assert federation.parties == ("hub", "ward-a", "ward_b", "3")
    assert read(tmp_path, SOUND | {"server": SOUND["server"] | {"host": "10.0.0.7"}}).server.host == "10.0.0.7"
    many = [f"s{number}" for number in range(100)]
    assert read(tmp_path, SOUND | {"sites": many}).sites == tuple(many)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two sites": ({"sites": ["a", "b"]}, "number of sites = 2"),
    "101 sites": ({"sites": [f"s{n}" for n in range(101)]}, "number of sites = 101"),
    "a dot, which the engine refuses": ({"sites": ["a", "b", "c.d"]}, r"sites\[2\] = 'c.d'.*engine"),
    "a dash first": ({"sites": ["a", "b", "-c"]}, r"sites\[2\]"),
    "a line end": ({"sites": ["a", "b", "c\n"]}, r"sites\[2\]"),
    "65 letters": ({"sites": ["a", "b", "c" * 65]}, r"sites\[2\]"),
    "the engine's own word": ({"sites": ["a", "b", "Server"]}, r"sites\[2\] = 'Server'"),
    "the governance": ({"sites": ["a", "b", "governance"]}, r"sites\[2\]"),
    "the server's name": ({"sites": ["a", "b", "hub"]}, "the server's name"),
    "the server's host, for TLS": (
        {"sites": ["a", "b", "FED"], "server": {"name": "hub", "host": "fed", "port": 8102}},
        "the server's host",
    ),
    "twice but for case": ({"sites": ["a", "b", "A"]}, "upper and lower case"),
    "numbers for names": ({"sites": ["a", "b", 3]}, r"sites\[2\] = 3"),
    "a name for a list": ({"sites": "abc"}, "sites = 'abc'"),
    "a bad name": ({"name": "a b"}, "name = 'a b'"),
    "a dash in org, which the engine refuses": ({"org": "my-org"}, "org = 'my-org'"),
    "a contact of two lines": ({"contact": "a\nb"}, "contact"),
    "no contact": ({"contact": " "}, "contact"),
    "a URL": ({"server": {"name": "hub", "host": "https://x", "port": 1}}, r"server\.host"),
    "a host of 65": ({"server": {"name": "hub", "host": "a" * 65, "port": 1}}, r"server\.host"),
    "port 0": ({"server": {"name": "hub", "host": "x", "port": 0}}, r"server\.port"),
    "port as text": ({"server": {"name": "hub", "host": "x", "port": "8102"}}, r"server\.port"),
    "a server that governs": ({"server": {"name": "governance", "host": "x", "port": 1}}, r"server\.name"),
    "k = 2": ({"min_contributors": 2}, "min_contributors = 2"),
    "k beyond the sites": ({"min_contributors": 4}, "min_contributors = 4"),
    "k below c + 2": ({"max_colluding": 2}, "min_contributors = 3"),
    "c < 0": ({"max_colluding": -1}, "max_colluding = -1"),
    "a day that is none": ({"valid_days": 0}, "valid_days = 0"),
    "more days than the authority has": ({"certificate_days": 3651}, "certificate_days = 3651"),
    "true for a number": ({"valid_days": True}, "valid_days = True"),
    "NaN": ({"valid_days": float("nan")}, "valid_days = nan"),
    "an unknown field": ({"site": []}, "site.*did you mean sites"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_is_not_allowed_names_the_field_and_what_is(tmp_path: Path, fault: str) -> None:
    changes, reason = WRONG[fault]
    with pytest.raises(ConfigError, match=reason):
        read(tmp_path, SOUND | changes)


@pytest.mark.parametrize("field", SOUND)
def test_no_field_may_be_missing(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*required"):
        read(tmp_path, {name: value for name, value in SOUND.items() if name != field})


NO_MAPPING = ("name: a\nname: b\n", "[1]", "3", "a: [", "name: ${oc.env:HOME}", "\x00", "? {}\n: 1", "x" * 300_000)


@pytest.mark.parametrize("text", [*NO_MAPPING, "a: !!python/tuple x"], ids=range(9))
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, text)
    with pytest.raises(ConfigError, match="readable"):
        FederationFile.read(tmp_path / "nowhere")


def test_a_site_name_that_passes_here_passes_the_engines_own_check() -> None:
    check = pytest.importorskip("nvflare.apis.utils.format_check").name_check
    for site in SOUND["sites"]:
        assert not check(site, "client")[0]
    assert check("c.d", "client")[0]
    assert not check(SOUND["server"]["host"], "server")[0]
    assert not check(SOUND["org"], "org")[0]
    assert check("my-org", "org")[0]


def test_party_yaml_is_read_as_strictly(tmp_path: Path) -> None:
    party = Party.of(read(tmp_path, SOUND), "ward-a", "0" * 32)
    fields = asdict(party)
    (tmp_path / "party.yaml").write_text(yaml.safe_dump(fields))
    assert read_party(tmp_path) == party
    wrong = ({"format": "2"}, {"kit": "x"}, {"role": "server"}, {"role": "lead"}, {"party": "../x"}, {"more": 1})
    for changes in wrong:
        (tmp_path / "party.yaml").write_text(yaml.safe_dump(fields | changes))
        with pytest.raises(ValueError, match=next(iter(changes))):
            read_party(tmp_path)


def enrolment(key: SigningKey) -> Enrolment:
    return Enrolment(
        federation="clinics",
        party="ward-a",
        role="site",
        kit="0" * 32,
        ca="1" * 64,
        made_at=1_800_000_000,
        identity=key.public,
        requests={"tls": b"\x00\xff"},
    )


def grant() -> Grant:
    keys = [SigningKey.generate(name) for name in ("hub", "a", "b", "c")]
    identities = [key.public for key in keys]
    roster = Roster(federation="clinics", server=identities[0], sites=tuple(identities[1:]), valid_until=2_000_000_000)
    signed = sign_roster(roster, SigningKey.generate("governance"))
    parts = {"tls": b"\x01"}
    return Grant(federation="clinics", party="a", kit="0" * 32, roster=signed, certificates=parts, revoked=("x",))


def test_requests_and_grants_come_back_as_they_were_sent() -> None:
    signed = Signed.by(SigningKey.generate("ward-a"), enrolment(key := SigningKey.generate("ward-a")))
    with pytest.raises(KitError, match="altered"):  # signed by another key than the one it names
        Signed.from_bytes(signed.to_bytes())
    signed = Signed.by(key, enrolment(key))
    assert Signed.from_bytes(signed.to_bytes()) == signed
    given = grant()
    assert Grant.from_bytes(given.to_bytes()) == given


def test_every_byte_of_a_request_is_signed() -> None:
    key = SigningKey.generate("ward-a")
    data = Signed.by(key, enrolment(key)).to_bytes()
    Signed.from_bytes(data)
    for place in range(len(data)):
        for bit in (1, 32):
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            with pytest.raises(KitError):
                Signed.from_bytes(changed)


@pytest.mark.parametrize("change", [{"roster": {}}, {"roster": 3}, {"certificates": {"x": ""}}, {"certificates": 1},
                                    {"certificates": {"tls": "?"}}, {"certificates": {"tls": "é"}}, {"revoked": 1},
                                    {"revoked": ["../x"]}, {"kit": 1}, {"party": "a/b"}, {"format": "x"}, {"more": 1},
                                    {"federation": None}])  # fmt: skip
def test_a_malformed_grant_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(KitError):
        Grant.from_bytes(canonical_json(json.loads(grant().to_bytes()) | change))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"3", b"[" * 100_000, b'{"a":NaN}', b"\xff"])
def test_what_is_no_request_and_no_grant_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(KitError):
        Signed.from_bytes(data)
    with pytest.raises(KitError):
        Grant.from_bytes(data)
    with pytest.raises(KitError):
        _members(data, {"a"}, "the archive")


def test_files_are_read_with_a_bound_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(2**23 + 1))
    with pytest.raises(KitError, match="longer"):
        read_bytes(path)
    with pytest.raises(KitError, match="cannot be read"):
        read_bytes(tmp_path / "nowhere")
    write_file(path, b"secret", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"secret", 0o600)
    with pytest.raises(KitError, match="cannot be written"):
        write_file(tmp_path / "no" / "x", b"")
    assert list(tmp_path.iterdir()) == [path]
