"""The transcript: openings of enough agreeing sites, one a round, and one thread from the first adapter to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from .audit_answers import failing, findings, reasons
from .run_folders import build
from .run_records import Line, jcs, key_of, sha, sign

OnEvent = Callable[[Line], Sequence[Line]]


def changed(name: str, change: Callable[[Line], Any], *, server_round: int = 2) -> OnEvent:
    """An ``on_event`` that changes the event of this name in one round."""
    current = [0]

    def on_event(event: Line) -> Sequence[Line]:
        current[0] = event.get("server_round", current[0])
        if event["event"] == name and current[0] == server_round:
            change(event)
        return [event]

    return on_event


def without(name: str) -> OnEvent:
    current = [0]

    def on_event(event: Line) -> Sequence[Line]:
        current[0] = event.get("server_round", current[0])
        return [] if event["event"] == name and current[0] == 2 else [event]

    return on_event


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[5].update(manifest="1" * 64),
        lambda lines: lines.pop(4),
        lambda lines: lines.reverse(),
        lambda lines: lines.insert(3, dict(lines[3])),
        lambda lines: lines[0].update(seq=2),
    ],
)
def test_an_edited_transcript_is_caught(tmp_path: Path, edit: Callable[[list[Line]], Any]) -> None:
    built = build(tmp_path / "run")
    built.edit_transcript(edit, rechain=False)
    assert "transcript-chain" in failing(tmp_path / "run")


def test_a_transcript_chained_anew_contradicts_the_signed_statement(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_transcript(lambda lines: lines[10].update(total="1" * 64) or lines.pop(3))
    assert "transcript-chain" not in failing(tmp_path / "run")
    assert "statement-bound" in failing(tmp_path / "run")


def test_a_transcript_cut_at_its_end_contradicts_the_signed_statement(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_transcript(lambda lines: lines.__delitem__(slice(-3, None)), rechain=False)
    assert "it was cut" in reasons(tmp_path / "run", "statement-bound")


def test_events_of_another_run_are_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", on_event=changed("tree_heads", lambda event: event.update(run_id="another")))
    assert failing(tmp_path / "run") == {"transcript-chain", "ledger-heads"}


def test_an_opening_of_too_few_is_caught_by_that_check_alone(tmp_path: Path) -> None:
    build(tmp_path / "run", left_out="beech")
    assert failing(tmp_path / "run") == {"openings"}
    assert "a sum of 2 sites was opened" in reasons(tmp_path / "run", "openings")


@pytest.mark.parametrize("cohort", [["ash", "beech", "cedar"], ["ash", "beech", "cedar", "dogwood"]])
def test_a_second_opening_of_a_round_is_caught_by_that_check_alone(tmp_path: Path, cohort: list[str]) -> None:
    def on_event(event: Line) -> Sequence[Line]:
        return [event, {**event, "cohort": cohort}] if event["event"] == "summed" else [event]

    build(tmp_path / "run", sites=4, on_event=on_event)
    assert failing(tmp_path / "run") == {"openings"}
    assert "a second opening in round" in reasons(tmp_path / "run", "openings")


def _drop_signatures(event: Line) -> None:
    event["signatures"] = dict(list(event["signatures"].items())[:2])


@pytest.mark.parametrize(
    ("on_event", "reason"),
    [
        (
            changed("agreed", lambda e: e["signatures"].update(beech=e["signatures"]["ash"])),
            "beech under the survivors",
        ),
        (changed("agreed", lambda e: e["signatures"].update(mallory="1" * 128)), "mallory signed, but is no survivor"),
        (changed("agreed", _drop_signatures), "2 sites signed the set, needed are 3"),
        (changed("agreed", lambda e: e.update(survivors="1" * 64)), "does not fit its digest"),
        (changed("agreed", lambda e: e["set"]["survivors"].pop()), "another set of sites was opened"),
        (changed("agreed", lambda e: e["set"].update(plan_digest="1" * 64)), "of another plan"),
        (changed("agreed", lambda e: e["set"]["upload_digests"].reverse()), "not the one that was announced"),
        (changed("signed_plan", lambda e: e.update(signature="1" * 128)), "not signed by the roster's server"),
        (changed("summed", lambda e: e.update(cohort=["ash", "beech", "dogwood"])), "another set of sites was opened"),
        (changed("summed", lambda e: e.update(plan="1" * 64)), "without its plan"),
        (without("plan"), "without its plan"),
        (without("agreed"), "no agreement of the sites"),
        (without("signed_plan"), "did not sign the plan"),
        (without("summed"), "no opening before it gave"),
        (changed("plan", lambda e: e["terms"].update(min_contributors=2)), "allows sums of 2 sites"),
        (changed("plan", lambda e: e["terms"].update(threshold=2)), "two sums could be agreed on"),
        (changed("plan", lambda e: e["terms"].update(run_id="another")), "of the run another"),
        (changed("plan", lambda e: e["terms"].update(attempt=2)), "another round or attempt"),
        (
            changed("plan", lambda e: e["terms"].update(key_digest=sha(["key", 1]))),
            "encryption key of the plan in event",
        ),
        (changed("plan", lambda e: e["terms"].update(clip=9)), "do not fit its digest"),
        (changed("plan", lambda e: e["terms"].update(roster_digest="1" * 64)), "does not lie here"),
    ],
)
def test_an_opening_without_its_agreement_is_caught(tmp_path: Path, on_event: OnEvent, reason: str) -> None:
    build(tmp_path / "run", on_event=on_event)
    assert "openings" in failing(tmp_path / "run")
    assert failing(tmp_path / "run") <= {"openings", "ledger-complete", "statement-bound"}
    assert reason in reasons(tmp_path / "run", "openings")


def test_a_site_that_signs_two_sets_in_a_round_is_caught(tmp_path: Path) -> None:
    def on_event(event: Line) -> Sequence[Line]:
        if event["event"] != "agreed":
            return [event]
        other = {**event["set"], "sharers": [*event["set"]["sharers"], "dogwood"]}
        survivors = sha(jcs(other).decode())
        message = {"plan_digest": event["plan"], "site": "ash", "survivors_digest": survivors}
        signed = {"ash": sign(key_of("ash"), "agreement", jcs(message))}
        return [{**event, "set": other, "survivors": survivors, "signatures": signed}, event]

    build(tmp_path / "run", on_event=on_event)
    assert failing(tmp_path / "run") == {"openings"}
    assert "ash signed a second set in this round" in reasons(tmp_path / "run", "openings")


def _other_tensors(event: Line) -> None:
    shared = event["spec"]["shared"]
    event["spec"] = {**event["spec"], "shared": {**shared, "names": shared["names"][::-1]}}


@pytest.mark.parametrize(
    ("on_event", "reason"),
    [
        (changed("opened", lambda e: e.update(slm="1" * 64)), "broadcasts another adapter"),
        (changed("start", lambda e: e.update(slm="1" * 64), server_round=0), "broadcasts another adapter"),
        (changed("start", _other_tensors, server_round=0), "other tensors"),
        (changed("opened", lambda e: e.update(llm="1" * 64), server_round=3), "not what the last round left"),
        (changed("lost", lambda e: e.update(llm="1" * 64)), "a lost round changed"),
    ],
)
def test_a_broken_thread_of_adapters_is_caught(tmp_path: Path, on_event: OnEvent, reason: str) -> None:
    lost = (2,) if "lost" in reason else ()
    build(tmp_path / "run", on_event=on_event, lost=lost)
    assert {"adapters-linked"} <= failing(tmp_path / "run") <= {"adapters-linked", "no-single-update"}
    assert reason in reasons(tmp_path / "run", "adapters-linked")


def _resumed(change: Callable[[Line], Any], *, again: bool = False) -> OnEvent:
    """A run that was cut after round 2 and goes on; with ``again``, before that round's end was kept."""
    starts: list[Line] = []

    def on_event(event: Line) -> Sequence[Line]:
        if event["event"] == "start":
            starts.append(event)
        if event["event"] == "opened" and event["server_round"] == 1:
            starts.append({**starts[0], "slm": event["slm"], "llm": event["llm"]})
        if event["event"] != "opened" or event["server_round"] != 2:
            return [event]
        begun = dict(starts[1]) if again else {**starts[0], "slm": event["slm"], "llm": event["llm"]}
        change(begun)
        return [event, begun, event] if again else [event, begun]

    return on_event


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_was_cut_goes_on_from_what_was_kept(tmp_path: Path, again: bool) -> None:
    build(tmp_path / "sound", on_event=_resumed(lambda event: None, again=again))
    assert not failing(tmp_path / "sound")
    build(tmp_path / "broken", on_event=_resumed(lambda event: event.update(llm="1" * 64), again=again))
    assert failing(tmp_path / "broken") == {"adapters-linked"}


def test_a_round_taken_back_goes_to_where_it_began(tmp_path: Path) -> None:
    def on_event(event: Line) -> Sequence[Line]:
        if event["event"] != "opened" or event["server_round"] != 3:
            return [event]
        return [event, {"event": "rolled_back", "server_round": 3, "slm": event["slm"], "llm": event["llm"]}]

    build(tmp_path / "run", on_event=on_event, on_statement=lambda s: s["rounds"].update(opened=2, lost=1))
    assert failing(tmp_path / "run") == {"adapters-linked", "statement-true"}  # the summary counts no lost round
    assert "goes back to other adapters" in reasons(tmp_path / "run", "adapters-linked")


@pytest.mark.parametrize("which", ["slm", "llm"])
@pytest.mark.parametrize("change", ["value", "shape", "dtype", "more", "less", "none"])
def test_an_adapter_swapped_after_signing_is_caught(tmp_path: Path, which: str, change: str) -> None:
    built = build(tmp_path / "run")
    path = built.folder / f"{which}_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    match change:
        case "value":
            tensors[name] = tensors[name] + np.float32(1e-6)
        case "shape":
            tensors[name] = tensors[name].T.copy()
        case "dtype":
            tensors[name] = tensors[name].astype(np.float64)
        case "more":
            tensors["base_model.model.layers.9.lora_A.weight"] = tensors[name].copy()
        case "less":
            tensors.pop(name)
    if change == "none":
        path.unlink()
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    found = failing(tmp_path / "run")
    assert found >= {"adapters-linked", "statement-bound"}
    assert found <= {"adapters-linked", "statement-bound", "no-single-update"}


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"event":"start"}\n', b"no json\n", b'{"event":"plan","seq":1}'])
def test_a_transcript_that_is_none_fails_the_checks_that_need_it(tmp_path: Path, content: bytes) -> None:
    built = build(tmp_path / "run")
    (built.folder / "transcript.jsonl").write_bytes(content)
    assert failing(tmp_path / "run") >= {"adapters-linked", "statement-bound"}


def test_without_a_transcript_nothing_that_needs_one_passes(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    (built.folder / "transcript.jsonl").unlink()
    assert failing(tmp_path / "run") >= {"transcript-chain", "openings", "adapters-linked", "ledger-complete"}
    assert "is missing" in reasons(tmp_path / "run", "openings")
    assert findings(tmp_path / "run")["ledger-chain"].status == "pass"
