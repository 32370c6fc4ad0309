"""The server's transcript: one unbroken chain, and in each round at most one opening, of what enough sites signed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from fedcollm_audits import shapes, signatures, strict_json
from fedcollm_audits.check_adapters import ADAPTERS
from fedcollm_audits.evidence import Evidence, Roster
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["CHECKS", "sound_transcript"]

_SMALLEST_SUM: Final = 3
"""With two in a sum, each learns the other's update from it."""


def sound_transcript(evidence: Evidence, notes: Notes) -> bool:
    """Whether there is a transcript whose events all have the fields of their name; else a problem says why."""
    if "transcript.jsonl" in evidence.broken:
        return notes.require(False, f"transcript.jsonl {evidence.broken['transcript.jsonl']}.")
    for event in evidence.transcript:
        if wrong := shapes.event_problem(event):
            return notes.require(
                False, f"Event {event.get('seq')!r:.20} of the transcript {wrong}; it cannot be followed."
            )
    return True


def _chain(evidence: Evidence, notes: Notes) -> None:
    if "transcript.jsonl" in evidence.broken:
        notes.problem(f"transcript.jsonl {evidence.broken['transcript.jsonl']}.")
        return
    previous = "0" * 64
    for position, event in enumerate(evidence.transcript, start=1):
        where = f"Event {position} ({event.get('event')!r:.40})"
        body = {name: value for name, value in event.items() if name != "digest"}
        notes.require(body.get("seq") == position, f"{where}: says that it is event {body.get('seq')!r:.40}.")
        notes.require(body.get("previous") == previous, f"{where}: does not follow the event before it.")
        notes.require(strict_json.digest(body) == event.get("digest"), f"{where}: its content does not fit its digest.")
        if position == 1 and event.get("event") != "start":
            notes.problem(f"{where}: a transcript begins with the event start.")
        if event.get("run_id", evidence.run_id) != evidence.run_id:
            notes.problem(f"{where}: is of the run {event['run_id']!r:.80}, the transcript of {evidence.run_id}.")
        previous = str(event.get("digest"))
    notes.saw(
        f"{len(evidence.transcript)} events, the last digest is {previous[:16]}.", events=len(evidence.transcript)
    )


def _openings(evidence: Evidence, notes: Notes) -> None:
    if not sound_transcript(evidence, notes):
        return
    plans: dict[str, Mapping[str, Any]] = {}
    agreed: dict[str, Mapping[str, Any]] = {}
    uploads: dict[str, dict[str, str]] = {}
    signed: set[str] = set()
    summed: dict[int, Mapping[str, Any]] = {}
    sets_signed: dict[tuple[str, int], str] = {}
    keys: dict[str, int] = {}
    current = ""
    for event in evidence.transcript:
        name, plan, where = event["event"], plans.get(event.get("plan", ""), {}), f"Event {event['seq']}"
        if name == "plan":
            current, terms = event["plan"], event["terms"]
            plans[current], uploads[current] = terms, {}
            for sentence in _plan_problems(evidence, event):
                notes.problem(f"{where}: {sentence}.")
            if keys.setdefault(terms["key_digest"], event["seq"]) != event["seq"]:
                notes.problem(f"{where}: the encryption key of the plan in event {keys[terms['key_digest']]} again.")
        elif name == "upload":
            uploads.setdefault(current, {})[event["site"]] = event["manifest"]
        elif name in ("signed_plan", "agreed", "summed", "opened") and not plan:
            notes.problem(f"{where}: {name} without its plan.")
        elif name == "signed_plan":
            message, signature = bytes.fromhex(event["plan"]), bytes.fromhex(event["signature"])
            server = (
                evidence.rosters[plan["roster_digest"]].server if plan["roster_digest"] in evidence.rosters else None
            )
            if server and signatures.holds(server.public_key, message, signature, purpose="plan"):
                signed.add(event["plan"])
            else:
                notes.problem(
                    f"{where}: the plan of round {plan['server_round']} is not signed by the roster's server."
                )
        elif name == "agreed":
            agreed[event["plan"]] = event
            roster = evidence.rosters.get(plan["roster_digest"])
            for sentence in _agreement_problems(event, plan, uploads[event["plan"]], roster, sets_signed):
                notes.problem(f"{where}, round {plan['server_round']}: {sentence}.")
        elif name == "summed":
            before = summed.setdefault(plan["server_round"], event)
            if before is not event:
                notes.problem(
                    f"{where}: a second opening in round {plan['server_round']}; event {before['seq']} was one."
                )
            for sentence in _opening_problems(event, plan, agreed.get(event["plan"]), event["plan"] in signed):
                notes.problem(f"{where}, round {plan['server_round']}: {sentence}.")
        elif name == "opened":
            sum_of_it = summed.get(event["server_round"], {})
            if sum_of_it.get("plan") != event["plan"] or sum_of_it.get("cohort") != event["cohort"]:
                notes.problem(
                    f"{where}: round {event['server_round']} went on from a sum that no opening before it gave."
                )
    if not plans:
        notes.gap("Nothing was exchanged in this run, so nothing was opened.")
    smallest = min((len(event["cohort"]) for event in summed.values()), default=0)
    notes.saw(f"{len(summed)} sums of at least {smallest} sites were opened in {len(plans)} planned rounds.")
    if plans and not evidence.governance:
        notes.saw("No governance key was given: that these keys are the sites' own rests on the rosters alone.")


def _plan_problems(evidence: Evidence, event: Mapping[str, Any]) -> Iterator[str]:
    terms = event["terms"]
    if strict_json.digest(terms) != event["plan"]:
        yield "the plan's terms do not fit its digest"
    if (terms["server_round"], terms["attempt"]) != (event["server_round"], event["attempt"]):
        yield "the plan's terms are of another round or attempt"
    if terms["run_id"] != evidence.run_id:
        yield f"the plan is of the run {terms['run_id']}"
    n, c = terms["max_contributors"], terms["max_colluding"]
    if not n + c < 2 * terms["threshold"] <= 2 * n:
        yield f"with threshold {terms['threshold']} of {n} sites, {c} of them colluding, two sums could be agreed on"
    if terms["min_contributors"] < max(_SMALLEST_SUM, c + 2):
        yield f"the plan allows sums of {terms['min_contributors']} sites while {c} may work with the server"
    if terms["least_honest"] > max(1, terms["min_contributors"] - c):
        yield f"a sum may hold the noise of fewer honest sites than the {terms['least_honest']} that are counted"
    if len(terms.get("narrow_sites", ())) != len(terms.get("narrow_ranks", ())):
        yield "it does not give one rank for each site of lower rank"
    roster = evidence.rosters.get(terms["roster_digest"])
    if roster is None:
        yield f"its roster {terms['roster_digest'][:16]} does not lie here"
    elif evidence.governance and not roster.governed:
        yield f"its roster {terms['roster_digest'][:16]} is not signed by the governance"


def _agreement_problems(
    event: Mapping[str, Any],
    plan: Mapping[str, Any],
    uploads: Mapping[str, str],
    roster: Roster | None,
    sets_signed: dict[tuple[str, int], str],
) -> Iterator[str]:
    agreed = event["set"]
    survivors, sharers = agreed["survivors"], agreed["sharers"]
    if strict_json.digest(strict_json.canonical(agreed).decode()) != event["survivors"]:
        yield "the set that was agreed on does not fit its digest"
    if agreed["plan_digest"] != event["plan"]:
        yield "the set that was agreed on is of another plan"
    if survivors != sorted(set(survivors)) or sharers != sorted(set(sharers)) or not set(survivors) <= set(sharers):
        yield "survivors and sharers are not sorted sets, one within the other"
    if len(agreed["upload_digests"]) != len(survivors):
        yield "the set has not one upload a survivor"
    for site, manifest in zip(survivors, agreed["upload_digests"], strict=False):
        if uploads.get(site) != manifest:
            yield f"the agreed upload of {site} is not the one that was announced"
    for site, text in sorted(event["signatures"].items()):
        party = None if roster is None else roster.sites.get(site)
        message = {"plan_digest": event["plan"], "site": site, "survivors_digest": event["survivors"]}
        signed, signature = strict_json.canonical(message), bytes.fromhex(text)
        if site not in survivors or party is None:
            yield f"{site} signed, but is no survivor in the roster"
        elif not signatures.holds(party.public_key, signed, signature, purpose="agreement"):
            yield f"the signature of {site} under the survivors is forged"
        elif sets_signed.setdefault((site, plan["server_round"]), event["survivors"]) != event["survivors"]:
            yield f"{site} signed a second set in this round"


def _opening_problems(
    event: Mapping[str, Any], plan: Mapping[str, Any], agreed: Mapping[str, Any] | None, plan_signed: bool
) -> Iterator[str]:
    cohort = event["cohort"]
    if not plan_signed:
        yield "the server did not sign the plan under which it was opened"
    lowest = max(_SMALLEST_SUM, plan["min_contributors"])
    if not lowest <= len(cohort) <= plan["max_contributors"]:
        yield f"a sum of {len(cohort)} sites was opened, allowed are {lowest} to {plan['max_contributors']}"
    ranks = dict(zip(plan.get("narrow_sites", ()), plan.get("narrow_ranks", ()), strict=False))
    widest = [site for site in cohort if site not in ranks] or _highest(cohort, ranks)
    if len(widest) < lowest:
        yield f"parts of the sum hold the updates of only {len(widest)} sites, of the highest rank"
    if agreed is None:
        yield "no agreement of the sites stands before the opening"
        return
    if agreed["set"]["survivors"] != cohort:
        yield "another set of sites was opened than was agreed on"
    if len(agreed["signatures"]) < plan["threshold"]:
        yield f"{len(agreed['signatures'])} sites signed the set, needed are {plan['threshold']}"


def _highest(cohort: Sequence[str], ranks: Mapping[str, int]) -> list[str]:
    most = max((ranks[site] for site in cohort), default=0)
    return [site for site in cohort if ranks[site] == most]


CHECKS: tuple[Check, ...] = (
    Check(
        name="transcript-chain",
        group="transcript",
        question="The server's transcript is one unbroken chain of events of this run.",
        why="An event that was edited, taken out or put in breaks the chain of digests behind it.",
        run=asked(_chain),
    ),
    Check(
        name="openings",
        group="transcript",
        question="In each round at most one sum was opened, of enough sites, enough of which signed exactly that set.",
        why="Two sums of almost the same sites differ by one site's update; a sum of few hides nobody.",
        run=asked(_openings),
    ),
    ADAPTERS,
)
