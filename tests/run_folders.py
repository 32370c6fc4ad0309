"""Run folders as ``docs/formats.md`` describes them, without any training: coherent, signed, and breakable at will."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from fedcollm_privacy import accounting

from .run_records import (
    CODE,
    SITES,
    START,
    Book,
    Built,
    Line,
    charge,
    dsse_signatures,
    jcs,
    key_of,
    plan_of,
    public,
    sha,
    sign,
    size_of,
    specs,
)


@dataclass
class _Run:
    """A run while it is written."""

    built: Built
    on_event: Callable[[Line], Sequence[Line]]
    plans: dict[str, Line]
    roster: str
    terms_of: Callable[[int], Line]
    events: list[Line] = field(default_factory=list)
    slm: np.ndarray = field(default_factory=lambda: np.zeros(size_of(specs()["slm"]), "<f4"))
    llm: np.ndarray = field(default_factory=lambda: np.zeros(size_of(specs()["llm"]), "<f4"))

    def record(self, event: str, **facts: Any) -> None:
        for line in self.on_event({"event": event, **facts}):
            body = {**line, "seq": len(self.events) + 1, "previous": self.head}
            self.events.append({**body, "digest": sha(body)})

    @property
    def head(self) -> str:
        return str(self.events[-1]["digest"]) if self.events else "0" * 64

    @property
    def digests(self) -> Line:
        return {"slm": sha(self.slm.tobytes()), "llm": sha(self.llm.tobytes())}

    def witness(self, server_round: int) -> None:
        heads, server = {}, key_of("server")
        for site, book in self.built.books.items():
            head = {
                "ledger": book.ledger, "run_id": self.built.run_id, "server_round": server_round, "site": site,
                "tree_root": book.root(), "tree_size": len(book.entries),
            }  # fmt: skip
            signatures = {
                "signature": sign(book.key, "tree_head", jcs(head)),
                "witness": sign(server, "witnessed_head", jcs(head)),
            }
            heads[site] = {"head": head, **signatures}
            book.heads.append({"kind": "HEAD", "head": head, **signatures, "server_key": public(server)})
        facts = {"run_id": self.built.run_id, "server_round": server_round}
        self.record("tree_heads", **facts, heads=heads, refused={})

    def reserve(self, site: str, server_round: int) -> str:
        book, plan, each = self.built.books[site], self.plans[site], self.plans[site]["steps_per_round"]
        mine = [e for e in book.entries if e["kind"] == "RESERVE" and e["run_id"] == self.built.run_id]
        steps = each * (len(mine) + 1)
        return book.append(
            "RESERVE", self.built.run_id, plan_digest=sha(plan), server_round=server_round, steps=each,
            steps_so_far=steps, epsilon=charge(plan, steps), delta=plan["delta"],
        )  # fmt: skip

    def settle(self, site: str, reservation: str, outcome: str) -> None:
        plan = self.plans[site]
        shared = math.sqrt(plan["least_honest"]) if plan["noise"] == "distributed" else 1.0
        ran = {
            "steps": plan["steps_per_round"], "noise_multiplier": plan["noise_multiplier"] / shared,
            "max_grad_norm": plan["max_grad_norm"], "sample_rate": plan["sample_rate"], "sampling": "poisson",
            "clipping": plan["clipping"], "randomness": "operating_system", "code": CODE,
        }  # fmt: skip
        facts = {"reservation": reservation, "outcome": outcome, "ran": ran}
        self.built.books[site].append("SETTLE", self.built.run_id, **facts)

    def round(self, number: int, *, lost: bool, cohort: Sequence[str]) -> None:
        sites, terms = self.built.sites, self.terms_of(number) | {"adapter_digest": self.digests["slm"]}
        plan = sha(terms)
        self.record("plan", server_round=number, attempt=1, plan=plan, terms=terms)
        self.record("signed_plan", plan=plan, signature=sign(key_of("server"), "plan", bytes.fromhex(plan)))
        keys = sha([plan, "keys"])
        self.record("enrolled", plan=plan, keys=keys, sites=list(sites))
        reserved, manifests = {}, {}
        for site in sites:
            if site in self.plans:
                reserved[site] = self.reserve(site, number)
            manifests[site] = sha([plan, site])
            self.record("upload", server_round=number, site=site, manifest=manifests[site])
        agreed = {
            "plan_digest": plan, "keys_digest": keys, "sharers": list(sites), "survivors": list(cohort),
            "upload_digests": [manifests[site] for site in cohort],
        }  # fmt: skip
        survivors = sha(jcs(agreed).decode())
        said = {site: {"plan_digest": plan, "site": site, "survivors_digest": survivors} for site in cohort}
        signed = {site: sign(key_of(site), "agreement", jcs(message)) for site, message in said.items()}
        self.record("agreed", plan=plan, survivors=survivors, set=agreed, signatures=signed)
        self.record("summed", plan=plan, cohort=list(cohort), total=sha([plan, "total"]))
        if not lost:
            change = np.random.default_rng(number).normal(size=self.slm.size + self.llm.size).astype("<f4")
            self.slm, self.llm = self.slm + change[: self.slm.size], self.llm + change[self.slm.size :]
        facts = {"server_round": number, "plan": plan, "cohort": [] if lost else list(cohort), **self.digests}
        self.record("lost" if lost else "opened", **facts)
        for site, reservation in reserved.items():
            self.settle(site, reservation, "lost" if lost else "included" if site in cohort else "left_out")


def build(
    folder: Path,
    *,
    rounds: int = 3,
    sites: int = 3,
    lost: Sequence[int] = (),
    left_out: str = "",
    private: bool = True,
    kept: bool = False,
    distributed: bool = False,
    earlier: Sequence[float] = (),
    caps: Sequence[Line] | None = None,
    plan_changes: Line | None = None,
    terms_changes: Line | None = None,
    governed: bool = False,
    declared: str = "synthetic",
    on_entry: Callable[[Line], Line | None] = lambda entry: entry,
    on_event: Callable[[Line], Sequence[Line]] = lambda event: [event],
    on_planned: Callable[[Book], Any] = lambda book: None,
    on_statement: Callable[[Line], Any] = lambda predicate: None,
    signers: Sequence[str] | None = None,
) -> Built:
    """Write the folder of a finished run.

    Args:
        folder: made here.
        rounds: as planned, and run.
        sites: at most 16.
        lost: rounds whose sum was of no use.
        left_out: a site that uploads and is in no sum.
        private: with plans and ledgers.
        kept: nothing is exchanged.
        distributed: noise, in released gradients.
        earlier: for each earlier run on the same data, how many days before this one it was.
        caps: of every PLAN; by default twice the charge of all runs.
        plan_changes: to every site's plan.
        terms_changes: to every round's plan.
        governed: the roster is signed by the key of ``governance``.
        declared: of the data.
        on_entry: sees every ledger entry before it is chained and signed; gives what is written, or None.
        on_event: the same for transcript events; gives those that are written.
        on_planned: may add to a ledger after this run's PLAN.
        on_statement: may change the statement before it is signed and noted.
        signers: of the statement; everybody by default.
    """
    names = tuple(SITES[:sites])
    built = Built(folder=folder, run_id="run-0123456789ab", sites=names)
    for name in ("rosters", "ledgers", "slm_adapter", "llm_adapter"):
        (folder / name).mkdir(parents=True)
    parties = [{"name": name, "public_key": public(key_of(name))} for name in ("server", *names)]
    roster = {"federation": "trees", "format": "fedcollm-roster-v1", "server": parties[0], "sites": parties[1:],
              "valid_until": 2_000_000_000}  # fmt: skip
    signature = sign(key_of("governance"), "roster", jcs(roster))
    signed_roster = {"format": "fedcollm-signed-roster-v1", "roster": roster, "signature": signature}
    content = jcs(signed_roster) if governed else jcs(roster)
    (folder / "rosters" / f"{sha(content)[:16]}.json").write_bytes(content)
    plans = {
        site: plan_of(i, rounds, distributed=distributed, **(plan_changes or {}))
        for i, site in enumerate(names)
        if private
    }
    dp_names = (
        "unit",
        "max_records_per_unit",
        "max_grad_norm",
        "expected_batch_size",
        "steps_per_round",
        "clipping",
        "noise",
    )
    one = next(iter(plans.values()), plan_of(0, rounds))
    spec = specs()

    def terms_of(number: int) -> Line:
        return {
            "run_id": built.run_id, "server_round": number, "attempt": 1, "spec_digest": sha(spec["shared"]),
            "dimension": size_of(spec["shared"]), "clip": 0.05, "value_bits": 13, "min_contributors": 3,
            "max_contributors": max(3, sites), "threshold": (max(3, sites) + 1) // 2 + 1, "max_colluding": 1,
            "roster_digest": sha(roster), "key_digest": sha(["key", number]), "max_mean_norm": 0.5,
            "ckks": {"poly_modulus_degree": 4096, "coeff_mod_bit_sizes": [60, 49], "lsb_bits": 19, "field_bits": 20,
                     "fields": 2},
            "nonce": sha(["nonce", number])[:32], "expires_at": 1_900_000_000,
            "dp": {name: one[name] for name in dp_names} if private else None,
            "release": one["release"], "noise_multiplier": one["noise_multiplier"] if distributed else 0,
            "least_honest": one["least_honest"], **(terms_changes or {}),
        }  # fmt: skip

    run = _Run(built=built, on_event=on_event, plans=plans, roster=sha(roster), terms_of=terms_of)
    run.record("start", run_id=built.run_id, roster=sha(roster), spec=spec, **run.digests)
    for site, plan in plans.items():
        book = built.books[site] = Book(site, on_entry)
        due = charge(plan)
        # Twice what all runs cost, so that nothing is crossed where a test does not ask for it.
        limits = caps or [{"epsilon": 2 * due * (len(earlier) + 1), "delta": 1e-3, "days": None}]
        fields = {
            "ledger": book.ledger, "plan": plan, "plan_digest": sha(plan), "epsilon": due, "delta": plan["delta"],
            "caps": list(limits), "policy": sha(["policy", site]), "accountant": "dp-accounting PLD",
            "steps": plan["rounds"] * plan["steps_per_round"], "cross_check": {"prv": due, "rdp": 2 * due},
        }  # fmt: skip
        for number, days in enumerate(sorted(earlier, reverse=True), start=1):
            book.now = START - timedelta(days=days)
            book.append("PLAN", f"earlier-{number}", **fields)
        book.now = START
        book.append("PLAN", built.run_id, **fields)
        on_planned(book)
    if private:
        run.witness(0)
    for number in range(1, rounds + 1):
        for book in built.books.values():
            book.now += timedelta(minutes=1)
        if kept:
            for site in plans:
                run.settle(site, run.reserve(site, number), "left_out")
            run.record("kept", server_round=number)
        else:
            run.round(number, lost=number in lost, cohort=[name for name in names if name != left_out])
        if private:
            run.witness(number)
    _conclude(
        run,
        spec,
        rounds=rounds,
        lost=len(lost),
        private=private,
        declared=declared,
        signers=signers,
        kept=kept,
        on_statement=on_statement,
    )
    return built


def _conclude(
    run: _Run,
    spec: Line,
    *,
    rounds: int,
    lost: int,
    private: bool,
    declared: str,
    signers: Sequence[str] | None,
    kept: bool,
    on_statement: Callable[[Line], Any],
) -> None:
    built, folder, names = run.built, run.built.folder, run.built.sites
    config = {"name": "run", "data": {"declared": declared, "path": None}, "model": {"slm": None, "llm": None},
              "federation": {"rounds": rounds}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_bytes(jcs({"run_id": built.run_id}))
    (folder / "report.html").write_text("<!doctype html><p>report</p>")
    (folder / "statement.html").write_text("<!doctype html><p>statement</p>")
    built.write("metrics.jsonl", [{"server_round": r, "slm": {"loss": 1.5}} for r in range(rounds + 1)])
    for which, vector in (("slm", run.slm), ("llm", run.llm)):
        tensors, at = {}, 0
        for name, shape in zip(spec[which]["names"], spec[which]["shapes"], strict=True):
            tensors[name.replace(".default.weight", ".weight")] = vector[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        save_file(tensors, folder / f"{which}_adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / f"{which}_adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    state = {"slm": run.slm, "llm": run.llm, **({f"alone.{name}": run.slm.copy() for name in names} if kept else {})}
    facts = {"server_round": str(rounds), "spec_digest": sha(spec["slm"]), "adam_steps": "0"}
    save_file(state, folder / "checkpoint.safetensors", metadata=facts)
    rows = {site: _site_row(run, site) for site in run.plans}
    counts = {"planned": rounds, "opened": 0 if kept else rounds - lost, "lost": lost}
    words = ("neighboring_relation", "mechanism", "trust_model", "views", "accounting", "randomness", "floating_point",
             "covered", "not_covered", "assumptions", "nist_sp_800_226", "dp_fy_ml")  # fmt: skip
    predicate = {
        "run_id": built.run_id, "private": private, "claim": "a claim", "data": {"declared": declared},
        "rounds": counts, "transcript": {"head": run.head, "events": len(run.events)}, "rosters": [run.roster],
        "adapters": run.digests, "versions": {"secure-fedcollm": "0"}, "code": CODE,
        "server": {"name": "server", "public_key": public(key_of("server"))},
        **({"unit": "person", **dict.fromkeys(words, "in words"), "sites": rows} if private else {}),
    }  # fmt: skip
    on_statement(predicate)
    told = {n: {"epsilon": r["epsilon"], "delta": r["delta"], "steps": r["steps_reserved"]} for n, r in rows.items()}
    summary = {"run_id": built.run_id, "private": private, "rounds": rounds, "rounds_lost": lost, "declared": declared,
               "sites": told or {n: {"epsilon": None, "delta": None, "steps": 0} for n in names}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    subjects = [
        "config.yaml",
        *(f"{w}_adapter/adapter_{x}" for w in ("slm", "llm") for x in ("config.json", "model.safetensors")),
    ]
    payload = jcs(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": n, "digest": {"sha256": sha((folder / n).read_bytes())}} for n in subjects],
            "predicateType": "urn:secure-fedcollm:privacy-statement:1",
            "predicate": predicate,
        }
    )
    for site, row in rows.items():
        told = {"statement": sha(payload), "epsilon": row["epsilon"], "delta": row["delta"]}
        built.books[site].append("STATEMENT", built.run_id, **told)
    run.record("statement", statement=sha(payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": dsse_signatures(payload, ["server", *names] if signers is None else signers),
    }
    (folder / "statement.json").write_bytes(jcs(envelope))
    for which in ("slm", "llm"):
        (folder / f"{which}_adapter" / "README.md").write_text(f"# {which}\n\nStatement: {sha(payload)}\n")
    for site, book in built.books.items():
        opening = {"kind": "LEDGER", "format": 2, "ledger": book.ledger, "site": site, "public_key": public(book.key)}
        built.write(f"ledgers/{site}.jsonl", [opening, *book.entries, *book.heads])
    built.write("transcript.jsonl", run.events)


@lru_cache
def _more_numbers(sigma: float, rate: Fraction, steps: int) -> tuple[float, Line]:
    schedule, points = [accounting.Steps(noise_multiplier=sigma, sample_rate=rate, steps=steps)], (0.5, 1.0)
    deltas = accounting.privacy_profile(schedule, points)
    return accounting.gdp_mu(schedule), {f"{point:g}": delta for point, delta in zip(points, deltas, strict=True)}


def _site_row(run: _Run, site: str) -> Line:
    book, plan = run.built.books[site], run.plans[site]
    mine = [e for e in book.entries if e["run_id"] == run.built.run_id and e["kind"] in ("PLAN", "RESERVE")]
    steps = mine[-1].get("steps_so_far", 0)
    total = max(steps, plan["rounds"] * plan["steps_per_round"])
    own = plan["noise_multiplier"] / (math.sqrt(plan["least_honest"]) if plan["noise"] == "distributed" else 1.0)
    mu, profile = _more_numbers(plan["noise_multiplier"], Fraction(plan["sample_rate"]), total)
    return {
        "epsilon": mine[-1]["epsilon"], "delta": mine[-1]["delta"], "steps_reserved": steps,
        "views": {"one_update_seen": charge(plan, total, own), "only_sums_and_models_seen": charge(plan, total)},
        "other_units": {"two": 2 * mine[-1]["epsilon"]}, "gdp_mu": mu,
        "privacy_profile": dict(profile),
        "plan": plan, "plan_digest": sha(plan), "caps": mine[0]["caps"], "policy": mine[0]["policy"],
        "ledger": {"ledger": book.ledger, "head": book.head, "tree_size": len(book.entries), "tree_root": book.root()},
    }  # fmt: skip
