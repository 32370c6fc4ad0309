"""Whether the adapters form one thread, from the start over what each round broadcast to what was released."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fedcollm_audits import shapes, strict_json
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["ADAPTERS", "released_digest"]


def released_digest(path: Path, spec: Mapping[str, Any]) -> str:
    """SHA-256 over a PEFT file's float32 values in the order of ``spec``.

    Raises:
        ValueError: no safetensors file, a link, other tensors than the spec names, another shape or another type.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError("is missing, or no regular file")
    whole = hashlib.sha256()
    try:
        with safe_open(path, framework="numpy") as file:
            names = {name.replace(".default.weight", ".weight"): name for name in spec["names"]}
            if set(file.keys()) != set(names):
                raise ValueError("has other tensors than the transcript's start names")
            for name, shape in zip(names, spec["shapes"], strict=True):
                tensor = file.get_tensor(name)
                if list(tensor.shape) != list(shape) or tensor.dtype != np.float32:
                    raise ValueError(
                        f"has {name[:200]} as {tensor.dtype}{list(tensor.shape)}, not float32{list(shape)}"
                    )
                whole.update(np.ascontiguousarray(tensor, dtype="<f4").data)
    except SafetensorError as error:
        raise ValueError(f"is no safetensors file ({error!s:.200})") from error
    return whole.hexdigest()


def _linked(evidence: Evidence, notes: Notes) -> None:
    if "transcript.jsonl" in evidence.broken or not evidence.transcript:
        notes.problem(f"transcript.jsonl {evidence.broken.get('transcript.jsonl', 'is empty')}.")
        return
    for event in evidence.transcript:
        if wrong := shapes.event_problem(event):
            notes.problem(f"Event {event.get('seq')!r:.20} of the transcript {wrong}; it cannot be followed.")
            return
    start = evidence.transcript[0]
    if start["event"] != "start":
        notes.problem("The transcript does not begin with the adapters at the start.")
        return
    for name, spec in start["spec"].items():
        whole = len(spec["names"]) == len(spec["shapes"]) == len(set(spec["names"]))
        notes.require(whole, f"The start's list of {name} tensors is not one name and shape each.")
    last = _followed(evidence, notes, start)
    kept = evidence.events("kept")
    for which in ("slm", "llm"):
        try:
            file = released_digest(
                evidence.run_dir / f"{which}_adapter/adapter_model.safetensors", start["spec"][which]
            )
        except ValueError as error:
            notes.problem(f"{which}_adapter/adapter_model.safetensors {error}.")
            continue
        stated = evidence.predicate.get("adapters", {}).get(which)
        if stated is not None and stated != file:
            notes.problem(f"The {which} adapter in the folder ({file[:16]}) is not the statement's ({stated!s:.16}).")
        if file != last[which] and not kept:
            notes.problem(f"The {which} adapter in the folder ({file[:16]}) is not what the last round left.")
        if evidence.envelope is not None and stated is None:
            notes.problem(f"The statement names no {which} adapter.")
        notes.saw(f"The released {which} adapter is {file[:16]}.")
    if kept:
        notes.gap(
            "Sites kept their own adapters and exchanged nothing: no transcript links what is released to the start."
        )


def _followed(evidence: Evidence, notes: Notes, start: Mapping[str, Any]) -> dict[str, str]:
    """Both adapters after the last round, once every link before it was looked at."""
    now = {which: start[which] for which in ("slm", "llm")}
    before: dict[int, dict[str, str]] = {}
    shared = strict_json.digest(start["spec"]["shared"])
    dimension = sum(math.prod(shape) for shape in start["spec"]["shared"]["shapes"])
    concluded, links = 0, 0
    for event in evidence.transcript:
        name, where = event["event"], f"Event {event['seq']} ({event['event']})"
        if name == "plan":
            terms = event["terms"]
            notes.require(terms["adapter_digest"] == now["slm"], f"{where}: broadcasts another adapter than there was.")
            notes.require(terms["spec_digest"] == shared, f"{where}: is about other tensors than the start's.")
            notes.require(
                terms["dimension"] == dimension, f"{where}: {terms['dimension']} parameters, not {dimension}."
            )
            # A lost round that was cut before it was kept is planned again; it changed nothing.
            lost_again = event["server_round"] == concluded and now == before.get(concluded)
            following = event["server_round"] == concluded + 1 or lost_again
            notes.require(following, f"{where}: plans round {event['server_round']} after round {concluded}.")
            links += 1
        elif name in ("opened", "lost"):
            again = event["server_round"] == concluded and concluded in before  # a round cut short and concluded anew
            start_of_it = before[concluded] if again else now
            if not again and event["server_round"] != concluded + 1:
                notes.problem(f"{where}: ends round {event['server_round']} after round {concluded}.")
            before[event["server_round"]], concluded = start_of_it, event["server_round"]
            after = {which: event[which] for which in ("slm", "llm")}
            if name == "lost":
                notes.require(after == start_of_it, f"{where}: a lost round changed the adapters.")
            now, links = after, links + 1
        elif name == "start" and event is not start:
            # A run that was cut goes on from what was kept last: perhaps from before the round that ended last.
            held = {which: event[which] for which in ("slm", "llm")}
            sound = held in (now, before.get(concluded)) and event["spec"] == start["spec"]
            notes.require(sound, f"{where}: goes on with other adapters or tensors than there were.")
            now, links = held, links + 1
        elif name == "rolled_back":
            now = {which: event[which] for which in ("slm", "llm")}
            due = before.get(event["server_round"])
            notes.require(
                now == due, f"{where}: goes back to other adapters than before round {event['server_round']}."
            )
        elif name == "kept":
            concluded = event["server_round"]
    notes.saw(f"{links} links between start and release were followed over {concluded} rounds.")
    return now


ADAPTERS = Check(
    name="adapters-linked",
    group="transcript",
    question="What was released is what the transcript's rounds led to, from the first adapter on.",
    why="A guarantee about one model says nothing of another that was put in its place.",
    run=asked(_linked),
)
