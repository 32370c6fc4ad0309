"""Heads that both sides sign: whoever takes entries back, forks or begins anew contradicts the other side's memory."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jcs
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcollm_privacy.entries import leaves
from fedcollm_privacy.errors import InvalidValue, LedgerError, ProtocolError, SignatureInvalid
from fedcollm_privacy.head_witness import HeadWitness
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.tree import consistency_proof, tree_root
from fedcollm_privacy.tree_heads import (
    HeadRequest,
    SignedHead,
    WitnessedHead,
    countersigned,
    head_problems,
    require_witnessed,
)

from .ledgers import commit, key_of, ledger_at, path_in, reserve, settle, sql

NORTH, SOUTH, SERVER = key_of("north"), key_of("south"), key_of("server")


def witness_at(folder: Path) -> HeadWitness:
    return HeadWitness(folder / "server" / "heads.sqlite", SERVER)


def asked(witness: HeadWitness, server_round: int = 1, run_id: str = "run-1", site: SigningKey = NORTH) -> HeadRequest:
    return HeadRequest(run_id=run_id, server_round=server_round, tree_size=witness.seen(site.public))


def exchange(ledger: Ledger, witness: HeadWitness, server_round: int = 1) -> WitnessedHead:
    """What server and site do after a round."""
    head = ledger.file.show_head(asked(witness, server_round), NORTH)
    both = witness.countersign(head, NORTH.public, run_id="run-1", server_round=server_round)
    ledger.file.keep_head(both, SERVER.public)
    return both


def one_round(ledger: Ledger, server_round: int = 1) -> None:
    settle(ledger, "run-1", reserve(ledger, "run-1", server_round))


def begun(folder: Path, rounds: int = 2) -> tuple[Ledger, HeadWitness]:
    """A ledger of 1 + 2 * rounds entries, all of them counter-signed."""
    ledger, witness = ledger_at(folder), witness_at(folder)
    commit(ledger, "run-1")
    exchange(ledger, witness, 0)
    for number in range(1, rounds + 1):
        one_round(ledger, number)
        exchange(ledger, witness, number)
    return ledger, witness


def resigned(head: SignedHead, key: SigningKey = NORTH, **changes: Any) -> SignedHead:
    """What a site that lies could send: any content, signed with its true key."""
    lie = dataclasses.replace(head, **changes)
    return dataclasses.replace(lie, signature=key.sign("tree_head", lie.content))


def root_by_the_book(digests: Sequence[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written."""
    if not digests:
        return hashlib.sha256(b"").digest()
    if len(digests) == 1:
        return hashlib.sha256(b"\0" + digests[0]).digest()
    split = 1
    while 2 * split < len(digests):
        split *= 2
    halves = root_by_the_book(digests[:split]) + root_by_the_book(digests[split:])
    return hashlib.sha256(b"\1" + halves).digest()


# ---------------------------------------------------------------- both sides agree


def test_site_and_server_agree_over_many_rounds(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path, rounds=0)
    for number in range(1, 12):
        for _ in range(number % 3):  # rounds without any entry too
            one_round(ledger, number)
        both = exchange(ledger_at(tmp_path), witness_at(tmp_path), number)
        assert both.tree_size == witness.seen(NORTH.public) == len(ledger.entries())
        assert bytes.fromhex(both.tree_root) == root_by_the_book(leaves(ledger.entries()))
    kept = ledger.file.heads()
    assert [line["head"]["server_round"] for line in kept] == list(range(12))
    assert head_problems(kept, leaves(ledger.entries()), ledger.file.ledger, NORTH.public) == []


def test_an_empty_ledger_has_a_head_that_everything_extends(tmp_path: Path) -> None:
    ledger, witness = ledger_at(tmp_path), witness_at(tmp_path)
    assert exchange(ledger, witness, 0).tree_size == 0
    assert exchange(ledger, witness, 0).tree_size == 0
    commit(ledger, "run-1")
    assert exchange(ledger, witness, 1).tree_size == 1


def test_heads_kept_on_either_side_verify_with_public_keys_and_other_libraries_alone(tmp_path: Path) -> None:
    ledger, _ = begun(tmp_path)
    ledger.file.export(tmp_path / "export.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "export.jsonl").read_text().splitlines()]
    opening = lines[0]
    digests = [bytes.fromhex(line["digest"]) for line in lines if line["kind"] not in ("LEDGER", "HEAD")]
    heads = [line for line in lines if line["kind"] == "HEAD"]
    site = Ed25519PublicKey.from_public_bytes(bytes.fromhex(opening["public_key"]))
    assert len(heads) == 3
    for line in heads:
        head = jcs.canonicalize(line["head"])
        site.verify(bytes.fromhex(line["signature"]), b"fedcollm/v1/tree_head\0" + head)
        server = Ed25519PublicKey.from_public_bytes(bytes.fromhex(line["server_key"]))
        server.verify(bytes.fromhex(line["witness"]), b"fedcollm/v1/witnessed_head\0" + head)
        assert line["head"]["ledger"] == opening["ledger"]
        assert root_by_the_book(digests[: line["head"]["tree_size"]]).hex() == line["head"]["tree_root"]


def test_the_server_remembers_when_it_is_started_again(tmp_path: Path) -> None:
    ledger, _ = begun(tmp_path)
    again = witness_at(tmp_path)
    assert again.seen(NORTH.public) == 5
    assert again.seen(SOUTH.public) == 0
    one_round(ledger, 3)
    assert exchange(ledger, again, 3).tree_size == 7


def test_a_server_that_lost_its_memory_begins_at_zero_and_trusts_what_it_is_shown(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    ledger.file.back_up(tmp_path / "old.jsonl")
    one_round(ledger, 3)
    exchange(ledger, witness, 3)
    (tmp_path / "server" / "heads.sqlite").unlink()
    forgetful = witness_at(tmp_path)
    assert forgetful.seen(NORTH.public) == 0
    old = LedgerFile.restored(tmp_path / "old.jsonl", tmp_path / "old.sqlite")
    head = old.show_head(asked(forgetful, 4), NORTH)
    assert forgetful.countersign(head, NORTH.public, run_id="run-1", server_round=4).tree_size == 5
    # From then on it remembers that, and the true ledger still extends it.
    assert exchange(ledger, forgetful, 5).tree_size == 7


# ---------------------------------------------------------------- taken back


@pytest.mark.parametrize("by", ["copy", "backup"])
def test_a_ledger_that_was_rolled_back_shows_no_head_and_no_lie_gets_one(tmp_path: Path, by: str) -> None:
    ledger, witness = begun(tmp_path)
    shutil.copy(path_in(tmp_path), tmp_path / "copy.sqlite")
    ledger.file.back_up(tmp_path / "backup.jsonl")
    one_round(ledger, 3)
    exchange(ledger, witness, 3)
    if by == "copy":
        shutil.copy(tmp_path / "copy.sqlite", path_in(tmp_path))
    else:
        path_in(tmp_path).unlink()
        LedgerFile.restored(tmp_path / "backup.jsonl", path_in(tmp_path))
    old = ledger_at(tmp_path)  # sound in itself
    assert len(old.entries()) == 5
    with pytest.raises(LedgerError, match=r"counter-signed 7 entries.*has 5.*old copy"):
        old.file.show_head(asked(witness, 4), NORTH)
    # A site that lies says that it was asked about less.
    for size in range(6):
        lie = old.file.show_head(HeadRequest(run_id="run-1", server_round=4, tree_size=size), NORTH)
        with pytest.raises(ProtocolError, match="rolled back or forked"):
            witness.countersign(lie, NORTH.public, run_id="run-1", server_round=4)
    assert witness.seen(NORTH.public) == 7
    # One that spends as much again, with other entries, is found as well.
    for extra in (1, 2):
        settle(old, "run-1", reserve(old, "run-1", 3), "lost")
        head = old.file.show_head(asked(witness, 4), NORTH)
        with pytest.raises(ProtocolError, match="rolled back or forked"):
            witness.countersign(head, NORTH.public, run_id="run-1", server_round=4)
        assert len(old.entries()) == 5 + 2 * extra


def test_a_fork_of_the_same_size_is_refused(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    shutil.copy(path_in(tmp_path), tmp_path / "fork.sqlite")
    one_round(ledger, 3)
    exchange(ledger, witness, 3)
    fork = Ledger(tmp_path / "fork.sqlite", NORTH)
    fork.settle(run_id="run-1", reservation=reserve(fork, "run-1", 3).entry, outcome="lost")
    assert len(fork.entries()) == len(ledger.entries())
    head = fork.file.show_head(asked(witness, 4), NORTH)
    with pytest.raises(ProtocolError, match="forked"):
        witness.countersign(head, NORTH.public, run_id="run-1", server_round=4)


def test_a_new_ledger_under_the_same_key_is_refused(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path, rounds=0)
    fresh = ledger_at(tmp_path / "elsewhere")
    for number in range(4):
        commit(fresh, f"run-{number}")
        head = fresh.file.show_head(asked(witness), NORTH)
        with pytest.raises(ProtocolError, match="another ledger"):
            witness.countersign(head, NORTH.public, run_id="run-1", server_round=1)
        # Nor under the true ledger's name.
        lie = resigned(head, ledger=ledger.file.ledger)
        with pytest.raises(ProtocolError, match="rolled back or forked"):
            witness.countersign(lie, NORTH.public, run_id="run-1", server_round=1)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Path, list[bytes]]:
    """A ledger of 7 entries, the memory of a server that has counter-signed 5 of them, all entries."""
    folder = tmp_path_factory.mktemp("parties")
    ledger, _ = begun(folder)
    one_round(ledger, 3)
    return ledger, folder / "server" / "heads.sqlite", leaves(ledger.entries())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_head_that_a_lying_site_makes_up_is_counter_signed_unless_it_extends(
    parties: tuple[Ledger, Path, list[bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ledger, memory, known = parties
    copied = tmp_path_factory.mktemp("memory") / "heads.sqlite"
    shutil.copy(memory, copied)
    witness = HeadWitness(copied, SERVER)
    seen = witness.seen(NORTH.public)
    assert (seen, len(known)) == (5, 7)
    tree = [*known, b"\xff" * 32, b"\xfe" * 32]
    for place in data.draw(st.sets(st.integers(0, len(tree) - 1), max_size=1)):
        tree[place] = b"\xee" * 32
    del tree[data.draw(st.integers(0, 9)) :]
    honest = consistency_proof(tree, min(seen, len(tree)))
    proof = data.draw(
        st.one_of(
            st.just(honest),
            st.integers(0, len(tree)).map(lambda first: consistency_proof(tree, first)),
            st.lists(st.sampled_from([*known, tree_root(known), *honest]), max_size=4).map(tuple),
        )
    )
    said = data.draw(st.one_of(st.just(len(tree)), st.integers(0, 9)))
    template = ledger.file.show_head(asked(witness, 3), NORTH)
    lie = resigned(template, tree_size=said, tree_root=tree_root(tree).hex(), consistency=proof)
    try:
        witness.countersign(lie, NORTH.public, run_id="run-1", server_round=3)
        accepted = True
    except ProtocolError:
        accepted = False
    extends = tree[:seen] == known[:seen]
    assert extends or not accepted
    if extends and said == len(tree) and proof == honest:
        assert accepted
    assert witness.seen(NORTH.public) == (said if accepted else seen)


def test_the_true_extension_is_counter_signed(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    one_round(ledger, 3)
    head = ledger.file.show_head(asked(witness, 3), NORTH)
    for change in (
        {"tree_size": 4},
        {"tree_size": 5},
        {"tree_root": "0" * 64},
        {"consistency": ()},
        {"consistency": head.consistency[:-1]},
        {"consistency": (*head.consistency, b"\0" * 32)},
        {"consistency": tuple(reversed(head.consistency))},
    ):
        with pytest.raises(ProtocolError, match="rolled back or forked"):
            witness.countersign(resigned(head, **change), NORTH.public, run_id="run-1", server_round=3)
    assert witness.seen(NORTH.public) == 5
    assert witness.countersign(head, NORTH.public, run_id="run-1", server_round=3).tree_size == 7


# ---------------------------------------------------------------- foreign heads


def test_a_head_of_another_site_run_or_round_is_refused(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    for change, words in (
        ({"site": "south"}, "another site, run or round"),
        ({"run_id": "run-2"}, "another site, run or round"),
        ({"server_round": 2}, "another site, run or round"),
    ):
        head = resigned(ledger.file.show_head(asked(witness, 3), NORTH), **change)
        with pytest.raises(ProtocolError, match=words):
            witness.countersign(head, NORTH.public, run_id="run-1", server_round=3)
    assert witness.seen(NORTH.public) == 5


def test_a_head_that_the_site_did_not_sign_is_refused(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    head = ledger.file.show_head(asked(witness, 3), NORTH)
    flipped = bytes([head.signature[0] ^ 1, *head.signature[1:]])
    for signature in (
        b"",
        flipped,
        SOUTH.sign("tree_head", head.content),
        NORTH.sign("ledger_entry", head.content),
        NORTH.sign("witnessed_head", head.content),
    ):
        with pytest.raises(SignatureInvalid):
            witness.countersign(
                dataclasses.replace(head, signature=signature), NORTH.public, run_id="run-1", server_round=3
            )
    changes: tuple[dict[str, Any], ...] = ({"ledger": "0" * 64}, {"tree_size": 6}, {"tree_root": "0" * 64})
    for change in changes:
        with pytest.raises(SignatureInvalid):
            witness.countersign(
                dataclasses.replace(head, **change),
                NORTH.public,
                run_id="run-1",
                server_round=3,
            )
    assert witness.seen(NORTH.public) == 5


def test_a_site_keeps_only_heads_of_its_ledger_that_both_signed(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    head = ledger.file.show_head(asked(witness, 3), NORTH)
    both = witness.countersign(head, NORTH.public, run_id="run-1", server_round=3)
    before = ledger.file.heads()
    unsigned: tuple[dict[str, Any], ...] = (
        {"witness": b""},
        {"witness": head.signature},
        {"signature": both.witness},
        {"server_round": 4},
    )
    for change in unsigned:
        with pytest.raises(SignatureInvalid):
            ledger.file.keep_head(dataclasses.replace(both, **change), SERVER.public)
    with pytest.raises(SignatureInvalid):
        ledger.file.keep_head(countersigned(head, SOUTH), SERVER.public)
    # Signed by both, but not this ledger: the site would have had to lie.
    wrong: tuple[dict[str, Any], ...] = (
        {"ledger": "0" * 64},
        {"tree_size": 4},
        {"tree_size": 99},
        {"tree_root": "0" * 64},
    )
    for change in wrong:
        with pytest.raises(LedgerError, match="another ledger's head"):
            ledger.file.keep_head(countersigned(resigned(head, **change), SERVER), SERVER.public)
    foreign = countersigned(resigned(head, SOUTH, site="south"), SERVER)
    with pytest.raises(ProtocolError, match="south"):
        ledger.file.keep_head(foreign, SERVER.public)
    assert ledger.file.heads() == before
    ledger.file.keep_head(both, SERVER.public)
    require_witnessed(both, NORTH.public, SERVER.public)


def test_of_two_runs_that_asked_at_once_the_second_asks_again(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    one_round(ledger, 3)
    first, second = (ledger.file.show_head(asked(witness, 3), NORTH) for _ in range(2))
    witness.countersign(first, NORTH.public, run_id="run-1", server_round=3)
    # Its proof begins where the server was before: no proof that it extends what the server has now.
    with pytest.raises(ProtocolError, match="does not extend"):
        witness.countersign(second, NORTH.public, run_id="run-1", server_round=3)
    exchange(ledger, witness, 3)


# ---------------------------------------------------------------- kept heads and the file


def test_a_file_whose_entries_were_cut_behind_a_kept_head_does_not_open(tmp_path: Path) -> None:
    ledger, _ = begun(tmp_path)
    one_round(ledger, 3)
    sql(tmp_path, "DELETE FROM entries WHERE seq > 5")
    assert len(ledger_at(tmp_path).entries()) == 5, "what nobody counter-signed can be cut: only the server's next look"
    sql(tmp_path, "DELETE FROM entries WHERE seq > 4")
    with pytest.raises(LedgerError, match="it had 5 entries when the server counter-signed them"):
        ledger_at(tmp_path)
    with pytest.raises(LedgerError, match="it had 5 entries"):
        LedgerFile(path_in(tmp_path))


def test_a_file_rebuilt_with_the_sites_own_key_contradicts_its_kept_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path)
    sql(tmp_path, "DELETE FROM entries WHERE seq > 3")
    monkeypatch.setattr(LedgerFile, "heads", lambda _: [])  # the forger's program does not look
    forger = ledger_at(tmp_path)
    forger.settle(run_id="run-1", reservation=reserve(forger, "run-1", 2).entry, outcome="lost")
    assert len(forger.entries()) == 5
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="not these"):
        ledger_at(tmp_path)


HEAD_CHANGES: dict[str, dict[str, Any]] = {
    "the site's signature": {"signature": "ab" * 64},
    "the server's signature": {"witness": "ab" * 64},
    "another server's key": {"server_key": SOUTH.public.public_key.hex()},
    "a key that is none": {"server_key": "00" * 32},
    "no signature": {"signature": None},
    "no text": {"witness": 7},
    "no head": {"head": None},
    "an empty head": {"head": {}},
}


@pytest.mark.parametrize("change", HEAD_CHANGES)
def test_an_altered_kept_head_is_found(tmp_path: Path, change: str) -> None:
    ledger, _ = begun(tmp_path, rounds=1)
    kept, known = ledger.file.heads(), leaves(ledger.entries())
    altered = copy.deepcopy(kept)
    altered[1] |= HEAD_CHANGES[change]
    assert head_problems(altered, known, ledger.file.ledger, NORTH.public) == [
        "head 2: malformed, of another site, or not signed by both"
    ]
    text = json.dumps(altered[1]).replace("'", "''")
    sql(tmp_path, f"UPDATE heads SET head = '{text}' WHERE seq = 2")
    with pytest.raises(LedgerError, match="head 2"):
        ledger_at(tmp_path)


@settings(max_examples=60)
@given(field=st.sampled_from(["ledger", "run_id", "server_round", "site", "tree_root", "tree_size"]), value=st.data())
def test_any_altered_field_of_a_kept_head_is_found(
    parties: tuple[Ledger, Path, list[bytes]], field: str, value: st.DataObject
) -> None:
    ledger, _, _ = parties
    kept, known = ledger.file.heads(), leaves(ledger.entries())
    assert head_problems(kept, known, ledger.file.ledger, NORTH.public) == []
    number = value.draw(st.integers(0, len(kept) - 1))
    new = value.draw(st.one_of(st.integers(-1, 9), st.sampled_from(["0" * 64, "south", "", None, True])))
    if new == kept[number]["head"][field] and type(new) is type(kept[number]["head"][field]):
        return
    kept[number]["head"][field] = new
    assert head_problems(kept, known, ledger.file.ledger, NORTH.public)


def test_a_kept_head_that_is_no_json_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, rounds=0)
    sql(tmp_path, "UPDATE heads SET head = 'gone'")
    with pytest.raises(LedgerError, match="a head is unreadable"):
        ledger_at(tmp_path)


def test_heads_of_another_ledger_are_no_heads_of_this_one(tmp_path: Path) -> None:
    ledger, _ = begun(tmp_path, rounds=0)
    kept, known = ledger.file.heads(), leaves(ledger.entries())
    assert head_problems(kept, known, "0" * 64, NORTH.public) == ["head 1: of another ledger"]
    assert head_problems(kept, [], ledger.file.ledger, NORTH.public) == [
        "it had 1 entries when the server counter-signed them, and not these"
    ]


# ---------------------------------------------------------------- the server's file


def test_nothing_is_counter_signed_that_the_server_cannot_remember(tmp_path: Path) -> None:
    ledger, witness = begun(tmp_path)
    head = ledger.file.show_head(asked(witness, 3), NORTH)
    (tmp_path / "server" / "heads.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(LedgerError, match="nothing is counter-signed"):
        witness.countersign(head, NORTH.public, run_id="run-1", server_round=3)
    with pytest.raises(LedgerError, match="nothing is counter-signed"):
        witness.seen(NORTH.public)
    with pytest.raises(LedgerError, match="nothing is counter-signed"):
        witness_at(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="choose a folder"):
        HeadWitness(tmp_path / "file" / "heads.sqlite", SERVER)


def test_the_memory_is_per_key_and_not_per_name(tmp_path: Path) -> None:
    _, witness = begun(tmp_path)
    assert witness.seen(key_of("north", "another secret").public) == 0, "a new key begins a new ledger"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "run 1"),
        ("server_round", -1),
        ("server_round", True),
        ("server_round", 1.0),
        ("tree_size", -1),
        ("tree_size", 2**53),
    ],
)
def test_a_request_for_a_head_is_checked(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        HeadRequest(**{"run_id": "run-1", "server_round": 1, "tree_size": 0, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("ledger", "x"), ("tree_root", "A" * 64), ("site", "../x"), ("run_id", ""), ("tree_size", None)],
)
def test_heads_are_checked(tmp_path: Path, field: str, value: Any) -> None:
    ledger, witness = begun(tmp_path, rounds=0)
    head = ledger.file.show_head(asked(witness), NORTH)
    with pytest.raises(InvalidValue, match=field):
        dataclasses.replace(head, **{field: value})
    with pytest.raises(InvalidValue, match=field):
        dataclasses.replace(countersigned(head, SERVER), **{field: value})
