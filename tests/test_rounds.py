"""What the round believes of the sites' answers: nobody speaks for another, and a code says why a site is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedcollm_privacy.messages import Settlement
from fedcollm_privacy.secure_sum_messages import UploadManifest
from fedcollm_privacy.wire import encode
from secure_fedcollm.rounds import Federation, RoundOutcome, State, Uploads, _settled
from secure_fedcollm.run import _line
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import Reply

from .secure_sums import digest, round_plan


def settlement(site: str) -> bytes:
    fields: dict[str, Any] = {"private": True, "epsilon": 1.0, "charged": 2.0, "delta": 1e-6, "unit": "record"}
    return encode(Settlement(site=site, **fields, steps=1, clipped_fraction=0.0))


@dataclass
class Saying:
    """A transport over which each site says what it is given to say."""

    answers: Mapping[str, bytes | None]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.answers)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        for site in bodies:
            yield Reply(site=site, body=self.answers[site], code=None if self.answers[site] else "failed")


def test_no_site_settles_for_another(tmp_path: Path) -> None:
    answers = {"a": settlement("a"), "b": settlement("a"), "c": None, "d": b"not a message"}
    federation = Federation(
        server=None,  # type: ignore[arg-type]
        transport=Saying(answers),
        secure_sum=None,  # type: ignore[arg-type]
        transcript=Transcript(tmp_path / "transcript.jsonl"),
        keep=lambda opened: None,
        heads=None,
        sites=(),
    )
    outcome = RoundOutcome(outcome="lost", state=State(slm=np.zeros(2, np.float32), llm=np.zeros(2, np.float32)))
    settled = _settled(federation, round_plan(), outcome).settlements
    assert [told.site for told in settled] == ["a"]


def test_a_ledger_that_was_not_counter_signed_is_told_in_the_rounds_line() -> None:
    row = {"server_round": 3, "outcome": "opened", "slm": None, "llm": None, "epsilon": {}, "left_out": {}}
    state = State(slm=np.zeros(2, np.float32), llm=np.zeros(2, np.float32))
    sound = RoundOutcome(outcome="opened", state=state)
    assert "counter-signed" not in _line(row, sound)
    told = _line(row, replace(sound, distrusted={"b": "contradicts"}))
    assert "not counter-signed" in told
    assert "b (contradicts)" in told


def test_an_upload_in_anothers_name_or_of_another_round_is_not_taken(tmp_path: Path) -> None:
    plan = round_plan()

    def manifest(site: str, plan_digest: str) -> bytes:
        return encode(
            UploadManifest(
                plan_digest=plan_digest, keys_digest=digest("k"), site=site, peers=(site,), chunk_digests=b""
            )
        )

    bodies = {
        "a": manifest("a", plan.digest),
        "b": manifest("a", plan.digest),
        "c": manifest("c", digest("another")),
        "d": b"no message",
        "e": None,
    }
    uploads = Uploads(Transcript(tmp_path / "transcript.jsonl"), plan)
    assert list(uploads) == []
    uploads.expect(
        Reply(site=site, body=body, code="diverged" if body is None else None) for site, body in bodies.items()
    )
    assert [upload.site for upload in uploads] == ["a"]
    assert uploads.failed == {
        "b": "upload of another site or round",
        "c": "upload of another site or round",
        "d": "malformed upload",
        "e": "diverged",
    }
