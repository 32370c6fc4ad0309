"""The server asks all ledgers for their heads: what it counter-signs, what it refuses, what the transcript keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedcollm_privacy.head_witness import HeadWitness
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead, require_witnessed
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.heads import LedgerHeads
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import Reply

from .ledgers import commit, key_of, ledger_at, reserve, settle

SERVER = SigningKey.generate("server")
SITES = ("east", "north", "south")
Bend = Callable[[str, HeadRequest, SignedHead], bytes | None]


@dataclass
class Asked:
    """Sites with real ledgers, over a transport that may bend what they answer."""

    ledgers: Mapping[str, Ledger]
    bend: Bend = lambda site, request, head: encode(head)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.ledgers)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        for site, body in bodies.items():
            file = self.ledgers[site].file
            if operation == "witness":
                file.keep_head(decode(body, WitnessedHead), SERVER.public)
                yield Reply(site=site, body=body, code=None)
                continue
            request = decode(body, HeadRequest)
            answer = self.bend(site, request, file.show_head(request, key_of(site)))
            yield Reply(site=site, body=answer, code=None if answer else "declined")


@pytest.fixture
def ledgers(tmp_path: Path) -> dict[str, Ledger]:
    made = {site: ledger_at(tmp_path, site) for site in SITES}
    for ledger in made.values():
        commit(ledger, "run-1")
    return made


@pytest.fixture
def heads(tmp_path: Path) -> LedgerHeads:
    roster = Roster(
        federation="f",
        server=SERVER.public,
        sites=tuple(key_of(site).public for site in SITES),
        valid_until=int(time.time()) + 10**6,
    )
    return LedgerHeads(witness=HeadWitness(tmp_path / "server.heads.sqlite", SERVER), roster=roster)


def a_round(ledger: Ledger, server_round: int) -> None:
    settle(ledger, "run-1", reserve(ledger, "run-1", server_round))


def noted(path: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, dict[str, str]] = [line for line in lines if line["event"] == "tree_heads"][-1]
    return found


def test_every_sound_head_is_counter_signed_kept_by_both_and_noted(
    ledgers: dict[str, Ledger], heads: LedgerHeads, tmp_path: Path
) -> None:
    transcript, transport = Transcript(tmp_path / "t.jsonl"), Asked(ledgers)
    for server_round in range(3):
        assert heads.exchange(transport, transcript, run_id="run-1", server_round=server_round) == {}
        for ledger in ledgers.values():
            a_round(ledger, server_round + 1)
    for site, ledger in ledgers.items():
        kept = ledger.file.heads()
        assert [head["head"]["tree_size"] for head in kept] == [1, 3, 5]
        assert heads.witness.seen(key_of(site).public) == 5
        fields = kept[-1]["head"] | {name: bytes.fromhex(kept[-1][name]) for name in ("signature", "witness")}
        require_witnessed(WitnessedHead(**fields), key_of(site).public, SERVER.public)
    told = noted(tmp_path / "t.jsonl")
    assert (set(told["heads"]), told["refused"]) == (set(SITES), {})


@pytest.mark.parametrize("lie", ["rolled back", "another's", "silent", "nonsense", "another round"])
def test_a_site_that_does_not_extend_its_ledger_is_named_and_gets_no_signature(
    ledgers: dict[str, Ledger], heads: LedgerHeads, tmp_path: Path, lie: str
) -> None:
    transcript = Transcript(tmp_path / "t.jsonl")
    old = ledgers["north"].file.show_head(HeadRequest(run_id="run-1", server_round=1, tree_size=0), key_of("north"))
    for ledger in ledgers.values():
        a_round(ledger, 1)
    assert heads.exchange(Asked(ledgers), transcript, run_id="run-1", server_round=0) == {}

    def bend(site: str, request: HeadRequest, head: SignedHead) -> bytes | None:
        if site != "north":
            return encode(head)
        south = ledgers["south"].file.show_head(replace(request, tree_size=0), key_of("south"))
        other = ledgers["north"].file.show_head(replace(request, server_round=7), key_of("north"))
        lies = {"rolled back": encode(old), "another's": encode(south), "another round": encode(other)}
        return {**lies, "silent": None, "nonsense": b"?"}[lie]

    refused = heads.exchange(Asked(ledgers, bend), transcript, run_id="run-1", server_round=1)
    assert refused == {"north": "no head" if lie in ("silent", "nonsense") else "contradicts"}
    told = noted(tmp_path / "t.jsonl")
    assert (set(told["heads"]), told["refused"]) == ({"east", "south"}, dict(refused))
    assert len(ledgers["north"].file.heads()) == 1
    assert heads.witness.seen(key_of("north").public) == 3


def test_a_head_that_another_run_overtook_is_asked_for_again(
    ledgers: dict[str, Ledger], heads: LedgerHeads, tmp_path: Path
) -> None:
    overtaken = []

    def bend(site: str, request: HeadRequest, head: SignedHead) -> bytes | None:
        if site == "north" and not overtaken:
            overtaken.append(site)
            a_round(ledgers["north"], 1)  # the other run's entries, counter-signed before this answer arrives
            ask = HeadRequest(run_id="run-2", server_round=1, tree_size=request.tree_size)
            other = ledgers["north"].file.show_head(ask, key_of("north"))
            heads.witness.countersign(other, key_of("north").public, run_id="run-2", server_round=1)
        return encode(head)

    transcript = Transcript(tmp_path / "t.jsonl")
    assert heads.exchange(Asked(ledgers, bend), transcript, run_id="run-1", server_round=1) == {}
    assert overtaken == ["north"]
    assert heads.witness.seen(key_of("north").public) == 3
