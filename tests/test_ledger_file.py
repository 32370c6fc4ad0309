"""A ledger's file: altered ones are found, older ones are carried on, and what leaves it can be checked by anybody."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.entries import charges, verify_chain
from fedcollm_privacy.errors import BudgetExceeded, LedgerError
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.plan import calibrate
from fedcollm_privacy.tree_heads import HeadRequest, countersigned

from .ledgers import (
    DAY,
    NOISIER,
    PLAN,
    Clock,
    body_bytes,
    commit,
    filled,
    key_of,
    kinds,
    ledger_at,
    path_in,
    private_of,
    rechained,
    reserve,
    settle,
    sql,
    upto,
)

COST = PLAN.epsilon(6)
NORTH = key_of("north").public
SERVER = key_of("server")


def witnessed(ledger: Ledger) -> None:
    """The server counter-signs the ledger as it is; both keep it."""
    head = ledger.file.show_head(HeadRequest(run_id="run-1", server_round=1, tree_size=0), key_of("north"))
    ledger.file.keep_head(countersigned(head, SERVER), SERVER.public)


def exported(ledger: Ledger | LedgerFile, folder: Path) -> list[dict[str, Any]]:
    file = ledger.file if isinstance(ledger, Ledger) else ledger
    file.export(folder / "out" / "export.jsonl")
    return [json.loads(line) for line in (folder / "out" / "export.jsonl").read_bytes().splitlines()]


def salt_of(folder: Path) -> str:
    db = sqlite3.connect(path_in(folder))
    ((salt,),) = db.execute("SELECT value FROM meta WHERE key = 'salt'").fetchall()
    db.close()
    return str(salt)


# ---------------------------------------------------------------- who may read what


def test_a_data_set_is_committed_to_under_a_salt_of_the_ledger(tmp_path: Path) -> None:
    north, again, south = ledger_at(tmp_path), ledger_at(tmp_path), ledger_at(tmp_path, "south")
    other_north = ledger_at(tmp_path / "elsewhere")
    name = north.file.commitment("notes")
    assert again.file.commitment("notes") == name
    assert south.file.commitment("notes") != name
    assert other_north.file.commitment("notes") != name, "not even the same site's other ledger"
    assert north.file.commitment("letters") != name
    salt = bytes.fromhex(salt_of(tmp_path))
    assert len(salt) == 32
    assert name == hmac.new(salt, b"notes", hashlib.sha256).hexdigest()
    assert north.file.ledger == hashlib.sha256(b"ledger" + salt).hexdigest()
    # No guess of the name reproduces it without the salt.
    assert name != hashlib.sha256(b"notes").hexdigest()


def test_neither_salt_nor_name_of_a_data_set_leaves_with_an_export_and_a_backup_brings_both_back(
    tmp_path: Path,
) -> None:
    ledger = filled(tmp_path)
    witnessed(ledger)
    name, salt = ledger.file.commitment("notes"), salt_of(tmp_path)
    ledger.file.export(tmp_path / "export.jsonl")
    ledger.file.back_up(tmp_path / "backup.jsonl")
    public, secret = ((tmp_path / f"{kind}.jsonl").read_text() for kind in ("export", "backup"))
    assert name in public
    assert "notes" not in public
    assert salt not in public
    assert "salt" not in public
    assert salt in secret
    assert stat.S_IMODE((tmp_path / "backup.jsonl").stat().st_mode) == 0o600
    restored = LedgerFile.restored(tmp_path / "backup.jsonl", tmp_path / "new" / "north.sqlite")
    assert restored.commitment("notes") == name
    assert restored.ledger == ledger.file.ledger


def test_no_entry_holds_the_number_of_records(tmp_path: Path) -> None:
    plan = calibrate(
        target_epsilon=8.0,
        delta=1e-5,
        unit="record",
        max_records_per_unit=1,
        max_grad_norm=1.0,
        expected_batch_size=64,
        steps_per_round=2,
        rounds=2,
        units=1237,
    )
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", plan)
    settle(ledger, "run-1", reserve(ledger, "run-1", plan=plan))
    witnessed(ledger)
    ledger.file.export(tmp_path / "export.jsonl")
    text = (tmp_path / "export.jsonl").read_text()
    assert not re.search(r"(?<![\w.])1237(?![\w.])", text)
    assert str(64 / 1237)[:8] not in text
    assert '"sample_rate":"4/75"' in text, "the nominal rate, 64/1200, is what may be read"


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        commit(ledger_at(tmp_path), "run-1")
    finally:
        os.umask(old)
    for file in (tmp_path / "ledgers").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_ledger_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    ledger_at(tmp_path)
    path_in(tmp_path).chmod(0o644)
    ledger_at(tmp_path)
    assert stat.S_IMODE(path_in(tmp_path).stat().st_mode) == 0o600


def test_a_ledger_of_another_site_or_key_is_refused_and_left_alone(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1")
    path = path_in(tmp_path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="of site 'north', not of 'south'"):
        Ledger(path, key_of("south"))
    with pytest.raises(LedgerError, match="another key of north"):
        Ledger(path, key_of("north", "another secret"))
    assert path.read_bytes() == before
    commit(ledger_at(tmp_path), "run-2")


# ---------------------------------------------------------------- altered entries


ALTERED = {
    "a smaller epsilon": ["UPDATE entries SET body = json_set(body, '$.epsilon', 0.01) WHERE seq = 1"],
    "an epsilon that is no number": ['UPDATE entries SET body = replace(body, \'"epsilon":\', \'"epsilon":NaN,"x":\')'],
    "fewer steps": ["UPDATE entries SET body = json_set(body, '$.steps', 0) WHERE seq = 3"],
    "another outcome": ["UPDATE entries SET body = json_set(body, '$.outcome', 'lost') WHERE seq = 4"],
    "an added field": ["UPDATE entries SET body = json_set(body, '$.note', 'x') WHERE seq = 2"],
    "another data set": ["UPDATE entries SET body = json_set(body, '$.data_set', 'x') WHERE seq = 1"],
    "an older schema": ["UPDATE entries SET body = json_set(body, '$.schema', 1) WHERE seq = 6"],
    "another digest": ["UPDATE entries SET digest = hex(randomblob(32)) WHERE seq = 3"],
    "another signature": ["UPDATE entries SET signature = lower(hex(randomblob(64))) WHERE seq = 3"],
    "another entry's signature": [
        "UPDATE entries SET signature = (SELECT signature FROM entries WHERE seq = 1) WHERE seq = 3"
    ],
    "a signature spelled in capitals": ["UPDATE entries SET signature = upper(signature) WHERE seq = 3"],
    "no signature": ["UPDATE entries SET signature = NULL WHERE seq = 6"],
    "a deleted first entry": ["DELETE FROM entries WHERE seq = 1"],
    "a deleted middle entry": ["DELETE FROM entries WHERE seq = 3"],
    "a deleted middle entry, renumbered": [
        "DELETE FROM entries WHERE seq = 3",
        "UPDATE entries SET seq = seq - 1 WHERE seq > 3",
    ],
    "two entries swapped": [
        "UPDATE entries SET seq = 99 WHERE seq = 3",
        "UPDATE entries SET seq = 3 WHERE seq = 4",
        "UPDATE entries SET seq = 4 WHERE seq = 99",
    ],
    "an inserted entry": ["INSERT INTO entries SELECT 7, body, 'x', signature FROM entries WHERE seq = 6"],
    "a body that is no JSON": ["UPDATE entries SET body = 'gone' WHERE seq = 2"],
    "a body that is no object": ["UPDATE entries SET body = '[1]' WHERE seq = 2"],
    "a body nested without end": [f"UPDATE entries SET body = '{'[' * 200_000}' WHERE seq = 2"],
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_ledger_is_found_when_it_is_opened(tmp_path: Path, change: str) -> None:
    filled(tmp_path)
    sql(tmp_path, *ALTERED[change])
    with pytest.raises(LedgerError, match="altered"):
        ledger_at(tmp_path)
    with pytest.raises(LedgerError, match="altered"):
        LedgerFile(path_in(tmp_path))


@pytest.mark.parametrize("change", [name for name in ALTERED if "body" not in name])
def test_an_altered_ledger_is_found_in_its_entries(tmp_path: Path, change: str) -> None:
    ledger = filled(tmp_path)
    assert verify_chain(ledger.entries(), NORTH) == []
    sql(tmp_path, *ALTERED[change])
    assert verify_chain(ledger.entries(), NORTH)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three entries of schema 1, then one of every other kind."""
    folder = tmp_path_factory.mktemp("sound")
    old_file(folder)
    ledger = ledger_at(folder)
    commit(ledger, "run-1")
    settle(ledger, "run-1", reserve(ledger, "run-1"))
    commit(ledger, "run-2", NOISIER)
    ledger.abort("run-2")
    ledger.record_statement(run_id="run-1", statement="5" * 64, epsilon=9.0, delta=1e-5)
    return ledger.entries()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values without parts stand in nested JSON."""
    if isinstance(value, dict) and value:
        return [place for name, part in value.items() for place in places(part, (*path, name))]
    if isinstance(value, list) and value:
        return [place for number, part in enumerate(value) for place in places(part, (*path, number))]
    return [path]


def other(value: Any, seed: int) -> Any:
    if isinstance(value, bool) or value is None:
        return 7
    if isinstance(value, int | float):
        return (value + 1, -value - 1, str(value), None, True)[seed % 5]
    if isinstance(value, str) and value:
        place = seed % len(value)
        return value[:place] + chr(ord(value[place]) ^ (1 << seed % 5)) + value[place + 1 :]
    return "x"


@settings(max_examples=250)
@given(position=st.integers(0, 99), place=st.integers(0, 999), seed=st.integers(0, 99), what=st.integers(0, 7))
def test_any_altered_added_or_missing_field_is_named_with_its_entry(
    sound: list[dict[str, Any]], position: int, place: int, seed: int, what: int
) -> None:
    entries = copy.deepcopy(sound)
    number = position % len(entries)
    entry = entries[number]
    path = places(entry)[place % len(places(entry))]
    holder: Any = entry
    for step in path[:-1]:
        holder = holder[step]
    if what == 0 and isinstance(holder, dict):
        del holder[path[-1]]
    elif what == 1:
        entry["note" if "signature" in entry else "signature"] = "ab" * 64
    elif what == 2 and "signature" in entry:
        entry["signature"] = entry["signature"][:64] + " " + entry["signature"][64:]
    else:
        holder[path[-1]] = other(holder[path[-1]], seed)
    problems = verify_chain(entries, NORTH)
    assert any(problem.startswith(f"entry {number + 1}:") for problem in problems), (path, problems)


@settings(max_examples=100)
@given(position=st.integers(0, 99), bit=st.integers(0, 511), field=st.sampled_from(["digest", "signature", "previous"]))
def test_any_flipped_bit_of_digest_link_or_signature_is_named(
    sound: list[dict[str, Any]], position: int, bit: int, field: str
) -> None:
    entries = copy.deepcopy(sound)
    entry = entries[position % len(entries)]
    if field not in entry:
        field = "digest"
    flipped = bytearray.fromhex(entry[field])
    flipped[bit // 8 % len(flipped)] ^= 1 << bit % 8
    entry[field] = flipped.hex()
    assert any(p.startswith(f"entry {position % len(entries) + 1}:") for p in verify_chain(entries, NORTH))


@settings(max_examples=30)
@given(position=st.integers(0, 99), cheaper=st.floats(0.01, 0.5), drop=st.booleans(), signer=st.booleans())
def test_whoever_makes_the_chain_anew_without_the_key_is_found_at_the_first_entry_he_touched(
    sound: list[dict[str, Any]], position: int, cheaper: float, drop: bool, signer: bool
) -> None:
    signed = [number for number, entry in enumerate(sound) if entry["schema"] == 2]
    number = signed[position % (len(signed) - 1)]
    entries = copy.deepcopy(sound)
    if drop:
        del entries[number]
    else:
        entries[number]["epsilon"] = cheaper
    forged = rechained(entries, private_of("a forger") if signer else None)
    assert verify_chain(forged, None) == [], "the chain itself holds again"
    problems = verify_chain(forged, NORTH)
    first = min(int(problem.split(":")[0].removeprefix("entry ")) for problem in problems)
    assert first == number + 1
    assert len(problems) == len(forged) - number
    # With the key, nothing is left to see; the server's counter-signed heads are there for that.
    assert verify_chain(rechained(entries, private_of("north")), NORTH) == []


def test_no_entry_says_that_it_is_older_than_the_one_before(sound: list[dict[str, Any]]) -> None:
    entries = copy.deepcopy(sound)
    # An unsigned entry smuggled in behind signed ones, with a chain that holds.
    entries[-1] = {k: v for k, v in entries[-1].items() if k != "signature"} | {"schema": 1, "epsilon": 0.0}
    forged = rechained(entries, private_of("north"))
    assert verify_chain(forged, NORTH)[0] == f"entry {len(forged)}: schema 1 after schema 2"
    for schema in (0, 3, "2", None, True, 2.0):
        entries = copy.deepcopy(sound)
        entries[-1]["schema"] = schema
        assert any("schema" in problem for problem in verify_chain(rechained(entries), NORTH)), schema


def test_older_entries_are_bound_by_the_first_signed_one_behind_them(sound: list[dict[str, Any]]) -> None:
    entries = copy.deepcopy(sound)
    entries[0]["epsilon"] = 0.01
    problems = verify_chain(rechained(entries), NORTH)
    assert problems[0] == "entry 4: not signed by the site's key"
    # What `verify_chain` says of itself: nothing signs them when nothing signed follows.
    assert verify_chain(rechained(entries)[:3], NORTH) == []


def test_an_entry_with_a_fitting_digest_of_its_own_breaks_chain_and_signature(tmp_path: Path) -> None:
    entries = filled(tmp_path).entries()
    entries[2]["steps"] = 1
    entries[2]["digest"] = hashlib.sha256(body_bytes(entries[2])).hexdigest()
    assert verify_chain(entries, NORTH) == [
        "entry 3: not signed by the site's key",
        "entry 4: does not follow the entry before it",
    ]


def test_what_the_chain_alone_cannot_show(tmp_path: Path) -> None:
    # As its docstring says: the end can be cut off. The heads that the server counter-signs are there for that.
    entries = filled(tmp_path).entries()
    assert verify_chain(entries[:-1], NORTH) == []
    assert verify_chain([], NORTH) == []


def test_a_signature_for_another_purpose_is_none(tmp_path: Path) -> None:
    entries = filled(tmp_path).entries()
    entries[-1]["signature"] = key_of("north").sign("tree_head", body_bytes(entries[-1])).hex()
    assert verify_chain(entries, NORTH) == ["entry 6: not signed by the site's key"]


def test_another_salt_is_noticed_because_it_would_make_every_data_set_new(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1")
    sql(tmp_path, f"UPDATE meta SET value = '{'00' * 32}' WHERE key = 'salt'")
    with pytest.raises(LedgerError, match="salt"):
        ledger_at(tmp_path)
    sql(tmp_path, "DELETE FROM meta WHERE key = 'salt'")
    with pytest.raises(LedgerError, match="salt"):
        ledger_at(tmp_path)


@pytest.mark.parametrize("field", ["schema", "site", "salt", "public_key"])
def test_a_damaged_description_of_the_file_is_refused(tmp_path: Path, field: str) -> None:
    filled(tmp_path)
    sql(tmp_path, f"UPDATE meta SET value = 'xyz!' WHERE key = '{field}'")
    with pytest.raises(LedgerError):
        ledger_at(tmp_path)
    with pytest.raises(LedgerError):
        LedgerFile(path_in(tmp_path))


def test_without_its_key_in_the_description_the_file_is_judged_by_the_key_at_hand(tmp_path: Path) -> None:
    filled(tmp_path)
    sql(tmp_path, "DELETE FROM meta WHERE key = 'public_key'")
    shutil.copy(path_in(tmp_path), tmp_path / "copy.sqlite")
    with pytest.raises(LedgerError, match="not signed by the site's key"):
        Ledger(tmp_path / "copy.sqlite", key_of("north", "another secret"))
    ledger_at(tmp_path)


# ---------------------------------------------------------------- exports


def test_the_export_verifies_with_other_libraries_and_nothing_but_itself(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    witnessed(ledger)
    ledger.abort("run-2")
    lines = exported(ledger, tmp_path)
    opening, entries, head = lines[0], lines[1:-1], lines[-1]
    assert opening == {
        "kind": "LEDGER",
        "format": 2,
        "ledger": ledger.file.ledger,
        "site": "north",
        "public_key": NORTH.public_key.hex(),
    }
    assert entries == ledger.entries()
    assert (head["kind"], head["server_key"]) == ("HEAD", SERVER.public.public_key.hex())
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(opening["public_key"]))
    previous, last_time = "0" * 64, ""
    for number, entry in enumerate(entries, start=1):
        body = body_bytes(entry)  # by `jcs`; the ledger spells with `rfc8785`
        assert (entry["seq"], entry["previous"], entry["site"]) == (number, previous, "north")
        assert hashlib.sha256(body).hexdigest() == entry["digest"]
        key.verify(bytes.fromhex(entry["signature"]), b"fedcollm/v1/ledger_entry\0" + body)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entry["time"])
        assert entry["time"] >= last_time
        previous, last_time = entry["digest"], entry["time"]
    assert previous == ledger.head
    with pytest.raises(InvalidSignature):
        key.verify(bytes.fromhex(entries[0]["signature"]), b"fedcollm/v1/ledger_entry\0" + body_bytes(entries[1]))


def test_every_line_of_an_export_is_in_the_one_canonical_spelling(tmp_path: Path) -> None:
    import jcs

    ledger = filled(tmp_path)
    witnessed(ledger)
    ledger.file.export(tmp_path / "export.jsonl")
    lines = (tmp_path / "export.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [jcs.canonicalize(json.loads(line)) for line in lines] == lines


def test_an_export_to_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "export.jsonl"):
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.file.export(path)
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.file.back_up(tmp_path / "file" / "backup.jsonl")


# ---------------------------------------------------------------- backups


def test_a_restored_backup_is_the_same_ledger_and_can_be_spent_on(tmp_path: Path) -> None:
    old_file(tmp_path)
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(2 * COST + 3.5))
    witnessed(ledger)
    ledger.file.back_up(tmp_path / "backup.jsonl")
    restored = LedgerFile.restored(tmp_path / "backup.jsonl", tmp_path / "new" / "north.sqlite")
    assert restored.entries() == ledger.entries()
    assert restored.heads() == ledger.file.heads() != []
    assert (restored.site, restored.identity, restored.ledger) == ("north", NORTH, ledger.file.ledger)
    assert stat.S_IMODE((tmp_path / "new" / "north.sqlite").stat().st_mode) == 0o600
    assert stored(tmp_path / "new" / "north.sqlite") == stored(path_in(tmp_path)), "byte by byte"
    spent = Ledger(tmp_path / "new" / "north.sqlite", key_of("north"))
    commit(spent, "run-2", caps=upto(2 * COST + 3.5))
    with pytest.raises(BudgetExceeded):
        commit(spent, "run-3", caps=upto(2 * COST + 3.5))


def test_nothing_is_overwritten_by_a_backup_or_by_restoring_one(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.file.back_up(tmp_path / "backup.jsonl")
    before = (tmp_path / "backup.jsonl").read_bytes()
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.file.back_up(tmp_path / "backup.jsonl")
    assert (tmp_path / "backup.jsonl").read_bytes() == before
    whole = path_in(tmp_path).read_bytes()
    with pytest.raises(LedgerError, match="never overwritten"):
        LedgerFile.restored(tmp_path / "backup.jsonl", path_in(tmp_path))
    assert path_in(tmp_path).read_bytes() == whole


def test_an_export_is_no_backup(tmp_path: Path) -> None:
    filled(tmp_path).file.export(tmp_path / "export.jsonl")
    with pytest.raises(LedgerError, match="no salt"):
        LedgerFile.restored(tmp_path / "export.jsonl", tmp_path / "new.sqlite")
    assert not (tmp_path / "new.sqlite").exists()


BACKUP_DAMAGE: dict[str, Callable[[list[str]], list[str]]] = {
    "nothing": lambda lines: [],
    "no JSON": lambda lines: ["{", *lines[1:]],
    "no objects": lambda lines: ["[]", "7"],
    "no opening": lambda lines: lines[1:],
    "another format": lambda lines: [lines[0].replace('"format":2', '"format":3'), *lines[1:]],
    "another salt": lambda lines: [re.sub(r'"salt":"..', '"salt":"00', lines[0]), *lines[1:]],
    "a salt that is no hex": lambda lines: [re.sub(r'"salt":"..', '"salt":"zz', lines[0]), *lines[1:]],
    "another key": lambda lines: [lines[0].replace(NORTH.public_key.hex(), SERVER.public.public_key.hex()), *lines[1:]],
    "an entry missing": lambda lines: [lines[0], *lines[2:]],
    "an entry twice": lambda lines: [lines[0], lines[1], lines[1], *lines[2:]],
    "an entry altered": lambda lines: [lines[0], lines[1].replace('"delta":0.00001', '"delta":0.000001'), *lines[2:]],
    "the end missing behind a head": lambda lines: [*lines[:-2], lines[-1]],
    "a head altered": lambda lines: [*lines[:-1], lines[-1].replace('"server_round":1', '"server_round":2')],
    "a head of nothing": lambda lines: [*lines, '{"kind":"HEAD"}'],
    "a number without end": lambda lines: [lines[0], lines[1].replace('"seq":1', '"seq":1e999'), *lines[2:]],
    "a signature that is no text": lambda lines: [
        lines[0],
        re.sub(r'"signature":"[0-9a-f]*"', '"signature":{}', lines[1]),
        *lines[2:],
    ],
    "a nest without end": lambda lines: [lines[0], "[" * 200_000],
}


@pytest.mark.parametrize("damage", BACKUP_DAMAGE)
def test_a_damaged_backup_is_refused_and_leaves_no_half_a_ledger(tmp_path: Path, damage: str) -> None:
    ledger = filled(tmp_path)
    witnessed(ledger)
    ledger.file.back_up(tmp_path / "backup.jsonl")
    lines = (tmp_path / "backup.jsonl").read_text().splitlines()
    changed = BACKUP_DAMAGE[damage](lines)
    assert changed != lines
    (tmp_path / "damaged.jsonl").write_text("".join(line + "\n" for line in changed))
    with pytest.raises(LedgerError):
        LedgerFile.restored(tmp_path / "damaged.jsonl", tmp_path / "new.sqlite")
    assert not (tmp_path / "new.sqlite").exists()
    LedgerFile.restored(tmp_path / "backup.jsonl", tmp_path / "new.sqlite")


# ---------------------------------------------------------------- files from before signatures

OLD_SALT = bytes(range(32))
OLD_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL UNIQUE) STRICT",
)


def old_entries() -> list[tuple[int, str, str]]:
    """Rows as schema 1 wrote them: Python's spelling of floats, one cap, no signature."""
    data_set = hmac.new(OLD_SALT, b"notes", "sha256").hexdigest()
    common = {"schema": 1, "site": "north", "data_set": data_set, "run_id": "old"}
    plan = PLAN.as_dict() | {"max_grad_norm": 10.0}
    planned: dict[str, Any] = {
        "kind": "PLAN",
        "ledger": hashlib.sha256(b"ledger" + OLD_SALT).hexdigest(),
        "plan": plan,
        "plan_digest": hashlib.sha256(
            json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        ).hexdigest(),
        "epsilon": 3.0,
        "delta": 1e-05,
        "cap_epsilon": 10.0,
        "cap_delta": 1e-03,
        "steps": 6,
        "accountant": "dp-accounting 0.6.0 PLD (discretization 0.001)",
        "cross_check": {"prv": 3.01, "rdp": 3.5},
    }
    reserved: dict[str, Any] = {"kind": "RESERVE", "plan_digest": planned["plan_digest"], "server_round": 1, "steps": 2}
    reserved |= {"steps_so_far": 2, "epsilon": 3.0, "delta": 1e-05}
    rows: list[tuple[int, str, str]] = []
    settled: dict[str, Any] = {"kind": "SETTLE", "outcome": "included"}
    for number, content in enumerate((planned, reserved, settled), start=1):
        previous = rows[-1][2] if rows else "0" * 64
        body = {**common, "seq": number, "previous": previous, "time": f"2026-05-0{number}T12:00:00+00:00", **content}
        body |= {"reservation": previous} if content["kind"] == "SETTLE" else {}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        rows.append((number, text, hashlib.sha256(text.encode()).hexdigest()))
    return rows


def old_file(folder: Path, entries: int = 3) -> list[tuple[int, str, str]]:
    path = path_in(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    rows = old_entries()[:entries]
    with db:
        for table in OLD_TABLES:
            db.execute(table)
        meta = {"schema": "1", "site": "north", "salt": OLD_SALT.hex()}
        db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        db.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
    db.close()
    return rows


def stored(path: Path) -> list[tuple[int, str, str, str | None]]:
    db = sqlite3.connect(path)
    rows = db.execute("SELECT seq, body, digest, signature FROM entries ORDER BY seq").fetchall()
    db.close()
    return rows


MAY = 1_777_650_000.0  # in the afternoon of 1 May 2026


def test_an_old_file_is_carried_on_without_touching_its_entries(tmp_path: Path) -> None:
    rows = old_file(tmp_path)
    assert '"max_grad_norm":10.0' in rows[0][1]
    assert '"delta":1e-05' in rows[0][1]
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    settle(ledger, "run-1", reserve(ledger, "run-1"))
    witnessed(ledger)
    assert stored(path_in(tmp_path))[:3] == [(*row, None) for row in rows]
    again = ledger_at(tmp_path)
    entries = again.entries()
    assert [entry["schema"] for entry in entries] == [1, 1, 1, 2, 2, 2]
    assert entries[3]["previous"] == rows[2][2]
    assert ["signature" in entry for entry in entries] == [False] * 3 + [True] * 3
    assert verify_chain(entries, NORTH) == []
    lines = exported(again, tmp_path)
    assert verify_chain(lines[1:-1], NORTH) == []
    raw = (tmp_path / "out" / "export.jsonl").read_text().splitlines()
    assert all(json.loads(old[1]).items() <= json.loads(line).items() for old, line in zip(rows, raw[1:], strict=False))
    assert '"max_grad_norm":10.0' in raw[1], "its digest depends on its own spelling"


def test_old_entries_verify_in_their_own_spelling_and_in_no_other(tmp_path: Path) -> None:
    old_file(tmp_path)
    entries = LedgerFile(path_in(tmp_path)).entries()
    assert verify_chain(entries, None) == []
    for entry in entries:
        entry["schema"] = 2
    assert len(verify_chain(entries, None)) >= 3


def test_charges_of_old_runs_count_against_caps(tmp_path: Path) -> None:
    old_file(tmp_path)
    ledger = ledger_at(tmp_path)
    assert ledger.spent_on("notes").epsilon == 3.0
    assert ledger.spent_in_run("old").steps == 2
    with pytest.raises(BudgetExceeded):
        commit(ledger, "run-1", caps=upto(2.9 + COST))
    commit(ledger, "run-1", caps=upto(3.1 + COST))
    assert ledger.spent_on("notes").epsilon == pytest.approx(3.0 + COST)


def test_caps_over_days_see_old_entries(tmp_path: Path) -> None:
    old_file(tmp_path)
    clock = Clock(MAY)
    ledger = ledger_at(tmp_path, clock=clock)
    caps = upto(2.9 + COST, days=30)
    clock.now = MAY + 20 * DAY
    with pytest.raises(BudgetExceeded, match="30 days"):
        commit(ledger, "run-1", caps=caps)
    clock.now = MAY + 33 * DAY
    commit(ledger, "run-1", caps=caps)
    data_set = ledger.file.commitment("notes")
    assert set(charges(ledger.entries(), data_set)) == {"old", "run-1"}


def test_an_old_run_can_neither_be_resumed_nor_lost(tmp_path: Path) -> None:
    old_file(tmp_path, entries=2)  # a reservation is open
    ledger = ledger_at(tmp_path)
    before = ledger.entries()
    with pytest.raises(LedgerError, match="another plan"):
        commit(ledger, "old")
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve(ledger, "old")
    assert ledger.entries() == before
    ledger.settle(run_id="old", reservation=before[1]["digest"], outcome="lost")
    ledger.abort("old")
    assert ledger.spent_on("notes").epsilon == 3.0
    assert verify_chain(ledger.entries(), NORTH) == []


def test_an_altered_old_file_is_refused(tmp_path: Path) -> None:
    old_file(tmp_path)
    sql(tmp_path, "UPDATE entries SET body = replace(body, '\"epsilon\":3.0', '\"epsilon\":1.0') WHERE seq = 1")
    with pytest.raises(LedgerError, match="altered"):
        ledger_at(tmp_path)


def test_an_old_file_of_another_site_does_not_get_this_sites_key(tmp_path: Path) -> None:
    old_file(tmp_path)
    before = path_in(tmp_path).read_bytes()
    with pytest.raises(LedgerError, match="of site 'north', not of 'south'"):
        Ledger(path_in(tmp_path), key_of("south"))
    assert path_in(tmp_path).read_bytes() == before
    assert ledger_at(tmp_path).file.identity == NORTH


def test_an_old_file_can_be_read_exported_and_restored_without_any_key(tmp_path: Path) -> None:
    rows = old_file(tmp_path)
    opened = LedgerFile(path_in(tmp_path))
    assert opened.identity is None
    assert exported(opened, tmp_path)[0]["public_key"] is None
    opened.back_up(tmp_path / "backup.jsonl")
    restored = LedgerFile.restored(tmp_path / "backup.jsonl", tmp_path / "restored" / "ledgers" / "north.sqlite")
    assert restored.identity is None
    assert stored(path_in(tmp_path / "restored")) == [(*row, None) for row in rows]
    request = HeadRequest(run_id="old", server_round=0, tree_size=0)
    head = countersigned(opened.show_head(request, key_of("north")), SERVER)
    with pytest.raises(LedgerError, match="never opened with a key"):
        opened.keep_head(head, SERVER.public)
    commit(ledger_at(tmp_path / "restored"), "run-1")


# ---------------------------------------------------------------- unusable files


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "north.sqlite"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="cannot be used as a ledger"):
        Ledger(path, key_of("north"))
    with pytest.raises(LedgerError, match="cannot be used as a ledger"):
        LedgerFile(path)
    assert path.read_bytes() == content


def test_another_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    for schema in ("3", "0", "two"):
        sql(tmp_path, f"UPDATE meta SET value = '{schema}' WHERE key = 'schema'")
        with pytest.raises(LedgerError, match=f"schema {schema}|damaged"):
            ledger_at(tmp_path)


def test_a_file_that_is_missing_or_empty_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="does not exist"):
        LedgerFile(tmp_path / "nobody.sqlite")
    assert not (tmp_path / "nobody.sqlite").exists()
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(LedgerError, match="cannot be used"):
        LedgerFile(tmp_path / "empty.sqlite")
    assert Ledger(tmp_path / "empty.sqlite", key_of("north")).entries() == []  # what a crash at the start leaves


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "north.sqlite", tmp_path):
        with pytest.raises(LedgerError, match=r"privacy\.ledger_dir"):
            Ledger(path, key_of("north"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match=r"privacy\.ledger_dir"):
            Ledger(tmp_path / "north.sqlite", key_of("north"))
    finally:
        tmp_path.chmod(0o700)


def connecting(monkeypatch: pytest.MonkeyPatch, setup: str, timeout: float) -> None:
    real = sqlite3.connect

    def connect(path: Path, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(path, **(options | {"timeout": timeout}))
        connection.execute(setup)
        return connection

    monkeypatch.setattr("fedcollm_privacy.durable.sqlite3.connect", connect)


def test_a_full_disk_refuses_the_reservation_and_keeps_the_ledger_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    before = ledger.entries()
    with monkeypatch.context() as patch:
        connecting(patch, "PRAGMA max_page_count = 1", 1.0)  # SQLite never goes below what is in use
        reserved: list[Any] = []
        with pytest.raises(LedgerError, match="full"):
            reserved.extend(reserve(ledger, "run-1", 3) for _ in range(100))
    after = ledger_at(tmp_path).entries()
    assert after[: len(before)] == before
    made = [entry["digest"] for entry in after[len(before) :] if entry["kind"] == "RESERVE"]
    assert made == [reservation.entry for reservation in reserved]


def test_a_ledger_held_by_another_process_refuses_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    holder = sqlite3.connect(path_in(tmp_path), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with monkeypatch.context() as patch:
        connecting(patch, "SELECT 1", 0.05)
        with pytest.raises(LedgerError, match="locked"):
            reserve(ledger, "run-1", 3)
    holder.close()
    reserve(ledger, "run-1", 3)


def test_a_ledger_that_grows_while_it_is_opened_is_not_taken_for_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    witnessed(ledger)
    real = LedgerFile.entries
    grown: list[bool] = []

    def grows(self: LedgerFile) -> list[dict[str, Any]]:
        entries = real(self)
        if not grown:
            grown.append(True)
            reserve(ledger, "run-1", 3)
            witnessed(ledger)
        return entries

    with monkeypatch.context() as patch:
        patch.setattr(LedgerFile, "entries", grows)
        opened = LedgerFile(path_in(tmp_path))
    assert grown
    assert len(opened.heads()) == 2
    assert kinds(ledger)[-1] == "RESERVE"


def test_an_identity_with_another_name_verifies_the_same_signatures(tmp_path: Path) -> None:
    # Names are the roster's matter; a signature knows its key.
    renamed = PublicIdentity(name="elsewhere", public_key=NORTH.public_key)
    assert verify_chain(filled(tmp_path).entries(), renamed) == []
