"""Tree heads: what site and server signed of a ledger's past, against the ledger as it is shown now.

The tree is that of RFC 6962, section 2.1, written here a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from fedcollm_audits import shapes, signatures, strict_json
from fedcollm_audits.evidence import Evidence, LedgerExport
from fedcollm_audits.ledger_exports import sound_exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.statement_of import took_part
from fedcollm_audits.verdict import Check

__all__ = ["HEADS", "prefix_roots"]

_SILENT: Final = "no head"
"""A site that could not be reached is no misdeed; its next head covers the entries all the same."""


def prefix_roots(leaves: Sequence[bytes]) -> list[str]:
    """Roots of the trees over the first 0, 1, ... leaves, in hex.

    Perfect subtrees are kept as on an abacus: a new leaf merges those of equal size, and a root folds what is left
    from the right.
    """
    roots = [hashlib.sha256(b"").hexdigest()]
    kept: list[tuple[int, bytes]] = []
    for leaf in leaves:
        size, node = 1, hashlib.sha256(b"\x00" + leaf).digest()
        while kept and kept[-1][0] == size:
            size, node = 2 * size, hashlib.sha256(b"\x01" + kept.pop()[1] + node).digest()
        kept.append((size, node))
        folded = kept[-1][1]
        for _, left in reversed(kept[:-1]):
            folded = hashlib.sha256(b"\x01" + left + folded).digest()
        roots.append(folded.hex())
    return roots


def _signed(evidence: Evidence, notes: Notes, where: str, site: str, line: Mapping[str, Any]) -> None:
    message = strict_json.canonical(line["head"])
    for who, keys, field, purpose in (
        ("the site", evidence.site_keys(site), "signature", "tree_head"),
        ("the server", evidence.server_keys, "witness", "witnessed_head"),
    ):
        signature = bytes.fromhex(line[field])
        if not any(signatures.holds(key, message, signature, purpose=purpose) for key in keys):
            notes.problem(f"{where}: not signed by {who}, as the rosters have its key.")


def _of_transcript(evidence: Evidence, notes: Notes) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    present = took_part(evidence)
    for event in evidence.events("tree_heads"):
        if wrong := shapes.event_problem(event):
            notes.problem(f"Transcript, event {event.get('seq')}: {wrong}.")
            continue
        for site, code in sorted(event["refused"].items()):
            said = f"Site {site}: its head after round {event['server_round']} was refused ({code})."
            if code != _SILENT:
                notes.problem(said)
            elif not any(
                site in later["heads"] for later in evidence.events("tree_heads") if later["seq"] > event["seq"]
            ):
                # Who never came has no ledger of this run to show a head of.
                (notes.gap if site in present else notes.saw)(f"{said} None came later.")
        for site, line in sorted(event["heads"].items()):
            where, head = f"Site {site}, head after round {event['server_round']} in the transcript", line["head"]
            if (head["site"], head["run_id"], head["server_round"]) != (site, event["run_id"], event["server_round"]):
                notes.problem(f"{where}: it is the head of another site, run or round.")
            yield site, where, line


def _of_export(export: LedgerExport, site: str, notes: Notes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(export.heads, start=1):
        where = f"Site {site}, head {number} of its export"
        if wrong := shapes.HEAD(line):
            notes.problem(f"{where} {wrong}.")
        else:
            yield where, line


def _heads(evidence: Evidence, notes: Notes) -> None:
    ledgers = dict(sound_exports(evidence, notes))
    known: dict[tuple[str, str, int], tuple[str, str]] = {}
    sizes: dict[tuple[str, str, str], tuple[int, str]] = {}
    witnessed: dict[str, set[str]] = {}
    exported: dict[str, set[str]] = {}
    roots = {site: prefix_roots([bytes.fromhex(e["digest"]) for e in x.entries]) for site, x in ledgers.items()}
    lines = [("transcript", *found) for found in _of_transcript(evidence, notes)]
    lines += [("export", site, *found) for site, export in ledgers.items() for found in _of_export(export, site, notes)]
    for source, site, where, line in lines:
        head = line["head"]
        size, root = head["tree_size"], head["tree_root"]
        _signed(evidence, notes, where, site, line)
        if source == "export":
            notes.require(line["server_key"] in evidence.server_keys, f"{where}: counter-signed by a stranger's key.")
        if source == "transcript" or head["run_id"] == evidence.run_id:
            (witnessed if source == "transcript" else exported).setdefault(site, set()).add(strict_json.digest(head))
        before, earlier = sizes.get((source, site, head["ledger"]), (0, ""))
        if size < before:
            notes.problem(f"{where}: covers {size} entries, fewer than the {before} of the one before ({earlier}).")
        sizes[source, site, head["ledger"]] = (size, where)
        other, elsewhere = known.setdefault((site, head["ledger"], size), (root, where))
        if other != root:
            notes.problem(f"{where}: another root over {size} entries than {elsewhere}: the ledger was forked.")
        if site in ledgers:
            _fits(notes, where, head, ledgers[site], roots[site])
    for site, export in ledgers.items():
        _same_on_both_sides(notes, site, export, witnessed.get(site, set()), exported.get(site, set()))
    notes.saw(f"{len(lines)} heads of {len(ledgers)} ledgers were recomputed.", heads=len(lines))


def _fits(notes: Notes, where: str, head: Mapping[str, Any], export: LedgerExport, roots: list[str]) -> None:
    size = head["tree_size"]
    if export.opening and head["ledger"] != export.opening.get("ledger"):
        notes.problem(f"{where}: is of another ledger than the one shown.")
    elif size >= len(roots):
        notes.problem(
            f"{where}: covers {size} entries, the ledger shown has {len(roots) - 1}: it was cut or rolled back."
        )
    elif roots[size] != head["tree_root"]:
        notes.problem(f"{where}: the first {size} entries shown have another root: the ledger was rewritten.")


def _same_on_both_sides(notes: Notes, site: str, export: LedgerExport, witnessed: set[str], exported: set[str]) -> None:
    if not witnessed and not exported:
        if export.entries:
            notes.gap(f"Site {site}: no head of its ledger was ever counter-signed; a cut at its end would not show.")
        return
    if only := len(witnessed - exported):
        notes.problem(f"Site {site}: {only} heads in the transcript are missing in its export.")
    if only := len(exported - witnessed):
        notes.problem(f"Site {site}: {only} heads of this run in its export are missing in the transcript.")


HEADS = Check(
    name="ledger-heads",
    group="ledger",
    question="Every head that site and server signed is of the ledger shown: nothing was cut, rewritten or forked.",
    why="A site may re-sign its whole ledger; it cannot take back a head that the server holds and counter-signed.",
    run=asked(_heads),
)
