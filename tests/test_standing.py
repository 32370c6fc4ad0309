"""What an administrator says to a site stands in files: whole or not there, and never outside their folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from fedcollm_privacy.errors import ConfigError, FedCollmError, InvalidValue
from secure_fedcollm.standing import Joined, Standing

DIGEST, OTHER = (hashlib.sha256(word).hexdigest() for word in (b"one", b"other"))


@pytest.fixture
def standing(tmp_path: Path) -> Standing:
    made = Standing(tmp_path)
    assert made.remember(DIGEST, run_id="run", summary="epsilon 8", facts={"rounds": 2}) is True
    return made


def test_an_offer_is_answered_by_its_first_digits_and_the_last_answer_holds(standing: Standing, tmp_path: Path) -> None:
    assert standing.remember(DIGEST, run_id="run", summary="another text", facts={}) is False
    (offer,) = standing.offers()
    assert (offer.digest, offer.run_id, offer.summary, offer.standing) == (DIGEST, "run", "epsilon 8", "waiting")
    assert standing.approve(DIGEST[:4]) == "run"
    assert standing.approved(DIGEST)
    assert standing.offers()[0].standing == "approved"
    assert standing.decline(DIGEST[:12]) == "run"
    assert (standing.approved(DIGEST), standing.declined(DIGEST)) == (False, True)
    assert standing.offers()[0].standing == "declined"
    standing.approve(DIGEST)
    assert (standing.approved(DIGEST), standing.declined(DIGEST)) == (True, False)
    # A copied file says no more than the administrator did: of these terms, and of no others.
    assert not standing.approved(OTHER)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("name", ["", "*", "../../etc", DIGEST[:3], DIGEST.upper(), "g" * 64, "0" * 8])
def test_a_name_that_is_no_offers_touches_nothing(standing: Standing, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for answer in (standing.approve, standing.decline):
        with pytest.raises(ConfigError, match=DIGEST[:16]):
            answer(name)
    if name != DIGEST.upper():
        with pytest.raises(InvalidValue):
            standing.approved(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_digits_that_two_offers_begin_with_name_neither(standing: Standing) -> None:
    twin = DIGEST[:6] + OTHER[6:]
    standing.remember(twin, run_id="twin", summary="", facts={})
    with pytest.raises(ConfigError, match="one offer"):
        standing.approve(DIGEST[:6])
    assert standing.approve(twin[:10]) == "twin"


def test_paused_ends_and_left_does_not(standing: Standing, tmp_path: Path) -> None:
    assert standing.stopped is None
    standing.pause()
    assert Standing(tmp_path).stopped == "paused"
    standing.resume()
    standing.resume()
    assert standing.stopped is None
    standing.leave()
    with pytest.raises(ConfigError, match="remove"):
        standing.resume()
    assert standing.stopped == "left"
    os.remove(tmp_path / "left")
    (tmp_path / "paused").symlink_to("/nowhere")  # whatever lies there under this name
    assert standing.stopped == "paused"


def test_the_run_that_was_joined_is_read_as_written_or_not_at_all(standing: Standing, tmp_path: Path) -> None:
    joined = Joined(run_id="run", terms=b'{"a":1}', signature=b"\x01" * 64)
    assert standing.joined() is None
    standing.join(joined)
    assert Standing(tmp_path).joined() == joined
    assert joined.digest == hashlib.sha256(b'{"a":1}').hexdigest()
    path = tmp_path / "joined.json"
    sound = json.loads(path.read_text())
    for wrong in (
        "",
        "[]",
        "{",
        json.dumps({**sound, "more": 1}),
        json.dumps({**sound, "run_id": "../x"}),
        json.dumps({**sound, "signature": "zz"}),
        json.dumps({**sound, "terms": 5}),
        json.dumps({**sound, "format": "other"}),
    ):
        path.write_text(wrong)
        with pytest.raises(FedCollmError, match=r"joined\.json"):
            standing.joined()
    standing.unjoin()
    assert standing.joined() is None


def test_many_offers_do_not_fill_the_disk(tmp_path: Path) -> None:
    standing = Standing(tmp_path)
    for number in range(210):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        standing.remember(digest, run_id=f"run{number}", summary="", facts={})
    assert len(standing.offers()) == 200
