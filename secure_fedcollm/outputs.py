"""What a run leaves behind: both adapters with their model cards, signed statement, ledger exports, summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ckks_parameters import parameters_for
from fedcollm_privacy.dsse import Envelope
from secure_fedcollm import statement
from secure_fedcollm.assembly import Assembly
from secure_fedcollm.atomic_file import sync_files, write_atomically
from secure_fedcollm.claims import Claims, gather
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.promise import assumption, unstated_clause
from secure_fedcollm.rounds import State

__all__ = ["Closing", "read_summary", "released", "write"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What was looked at once: samples, ROUGE-L before/after per model, planted secrets, each site's own records."""

    samples: list[dict[str, str]]
    rouge_l: dict[str, dict[str, float]]
    secrets: list[dict[str, Any]]
    per_site: dict[str, dict[str, dict[str, float]]]


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """``summary.json`` of a finished run."""
    summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text())
    return summary


def write(parts: Assembly, folder: RunFolder, state: State, closing: Closing, seconds: Mapping[str, float]) -> None:
    """Write every output but the report; the summary comes last.

    What sites were asked to sign before the run was cut is what they are asked to sign again: each notes one statement.

    Raises:
        FedCollmError: no site of a private run says what its ledger was charged; the run can be resumed.
    """
    path = folder.path / "statement.json"
    signed = Envelope.from_bytes(path.read_bytes()) if path.exists() else None
    payload = folder.kept_payload() if signed is None else signed.payload
    if payload is not None:
        claims = statement.claims_of(payload)
    else:
        claims = gather(parts, folder)
        final = {"slm": released(state, parts, "slm"), "llm": released(state, parts, "llm")}
        for name, adapted in (("slm", parts.slm), ("llm", parts.llm)):
            adapted.write(final[name])
            adapted.save(folder.path / f"{name}_adapter")
            sync_files(folder.path / f"{name}_adapter")
        payload = statement.compose(parts, folder, final, claims)
        folder.keep_payload(payload)
    if signed is None:
        signed = statement.sign(parts, folder, payload)
        write_atomically(path, signed.to_bytes())
    folder.drop_payload()
    write_atomically(folder.path / "statement.html", statement.page(parts, signed).encode())
    for name, adapted in (("slm", parts.slm), ("llm", parts.llm)):
        card = statement.model_card(name, adapted.name, signed.payload)
        write_atomically(folder.path / f"{name}_adapter" / "README.md", card.encode())
    for site, ledger in parts.ledgers.items():
        ledger.file.export(folder.path / "ledgers" / f"{site}.jsonl")
    folder.write_json("summary.json", _summary(parts, folder, claims, closing, seconds))


def released(state: State, parts: Assembly, which: Literal["slm", "llm"]) -> Float32:
    """The adapter that a run releases, float32: the federation's, or without exchange the first site's."""
    if state.alone and parts.config.federation.site_model == which:
        return next(iter(state.alone.values()))
    return state.slm if which == "slm" else state.llm


def _site_rows(parts: Assembly, claims: Claims) -> dict[str, dict[str, Any]]:
    """What each site spent, by its own claims; caps and the data set's spend only where the ledgers are at hand."""
    privacy, names = parts.config.privacy, parts.federation.transport.sites
    if privacy is None or not parts.config.guaranteed:
        return {name: {"epsilon": None, "delta": None, "unit": "none", "steps": 0} for name in names}
    if parts.config.federation.rounds == 0:  # nothing was trained, nothing spent
        return {name: {"epsilon": 0.0, "delta": 0.0, "unit": privacy.unit, "steps": 0} for name in names}
    rows: dict[str, dict[str, Any]] = {}
    for name, said in claims.stated.items():
        rows[name] = {
            "epsilon": said["epsilon"],
            "delta": said["delta"],
            "unit": privacy.unit,
            "steps": said["steps_reserved"],
            "epsilon_budget": privacy.epsilon,
        }
        if name in parts.ledgers:
            ledger = parts.ledgers[name]
            rows[name] |= {
                "epsilon_cap": privacy.cap_epsilon,
                "spent_on_data_set": ledger.spent_on(parts.data_sets[name]).epsilon,
            }
        rows[name]["epsilon_one_update"] = said["views"]["one_update_seen"]
    return rows


def _note(parts: Assembly, claims: Claims) -> str:
    config = parts.config
    notes = []
    if not config.private:
        notes.append(
            "NOT PRIVATE: no differential privacy was applied; do not release what was trained on private data."
        )
    elif not config.guaranteed:
        notes.append(
            "NOT PRIVATE: a test run with privacy.insecure_test_seed; whoever knows the seed can subtract the noise."
        )
    elif config.privacy is not None and config.privacy.noise == "distributed":
        notes.append(assumption(config.privacy.least_honest, config.secure_sum.max_colluding))
    if claims.unstated:
        notes.append(f"{unstated_clause(claims.unstated)}.")
    if config.data.declared == "synthetic":
        notes.append("All records are synthetic: generated by a program, about nobody.")
    notes.append(f"Metrics are taken on {parts.test_source}.")
    return " ".join(notes)


def _summary(
    parts: Assembly, folder: RunFolder, claims: Claims, closing: Closing, seconds: Mapping[str, float]
) -> dict[str, Any]:
    config, rows = parts.config, folder.metrics()
    opened = [row for row in rows if row["outcome"] == "opened"]
    measured = [row for row in rows if row["slm"]]
    shared = parts.slm.shared_spec(config.adapter.aggregation)
    uploads = sum(len(row["cohort"]) for row in opened)
    bytes_up = sum(row["bytes_up"] for row in rows)
    accepted = sum(row["bytes_up"] for row in opened if not row["left_out"])
    accepted_uploads = sum(len(row["cohort"]) for row in opened if not row["left_out"])
    summary: dict[str, Any] = {
        "run_id": folder.run_id,
        "name": config.name,
        "method": config.method,
        "private": config.guaranteed,
        "deployed": parts.deployed,
        "declared": config.data.declared,
        "noise": None if config.privacy is None else config.privacy.noise,
        "note": _note(parts, claims),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": config.federation.rounds,
        "rounds_lost": sum(row["outcome"] == "lost" for row in rows),
        "aggregation": config.adapter.aggregation,
        "models": {name: _model_facts(adapted) for name, adapted in (("slm", parts.slm), ("llm", parts.llm))},
        "test_records": len(parts.test),
        "public_records": len(parts.data.public_train),
        "slm": {"before": dict(measured[0]["slm"]), "after": dict(measured[-1]["slm"])},
        "llm": {"before": dict(measured[0]["llm"]), "after": dict(measured[-1]["llm"])},
        "sites": _site_rows(parts, claims),
        "uploads": uploads,
        "uploaded_parameters": shared.dimension,
        "bytes_up": bytes_up,
        "bytes_per_parameter": round(accepted / (accepted_uploads * shared.dimension), 3) if accepted_uploads else None,
        "claims": _claims(parts, claims),
        "secrets": closing.secrets,
        "samples": closing.samples,
        "per_site": closing.per_site,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "versions": statement.versions(),
    }
    if config.federation.exchange == "secure_sum" and opened:
        sites = len(parts.federation.transport.sites)
        parameters = parameters_for(sites, config.secure_sum.value_bits)
        summary["secure_sum"] = {
            "poly_modulus_degree": parameters.poly_modulus_degree,
            "coeff_mod_bit_sizes": list(parameters.coeff_mod_bit_sizes),
            "value_bits": config.secure_sum.value_bits,
            "sites": sites,
            "threshold": config.secure_sum.threshold_of(sites),
            "min_contributors": config.federation.min_contributors,
            "max_colluding": config.secure_sum.max_colluding,
        }
    if claims.unstated:
        summary["unstated"] = list(claims.unstated)
    for name, values in closing.rouge_l.items():
        for when, value in values.items():
            summary[name][when]["rouge_l"] = value
    return summary


def _model_facts(adapted: AdaptedModel) -> dict[str, Any]:
    total = sum(p.numel() for p in adapted.model.parameters())
    return {
        "name": Path(adapted.name).name if Path(adapted.name).exists() else adapted.name,
        "parameters": total - adapted.spec.dimension,
        "adapter_parameters": adapted.spec.dimension,
        "base_digest": adapted.spec.base_model,
    }


def _claims(parts: Assembly, claims: Claims) -> list[dict[str, Any]]:
    config = parts.config
    sums = config.federation.exchange == "secure_sum"
    distributed = config.privacy is not None and config.privacy.noise == "distributed"
    return [
        {
            "claim": "Each site's update is differentially private before it leaves the site",
            "holds": config.guaranteed and not distributed and not claims.unstated,
            "detail": "not in a run without differential privacy, or seeded for a test"
            if not config.guaranteed
            else "each site adds a share of the noise; the sum is private, a single update much less (see statement)"
            if distributed
            else f"not shown for {', '.join(claims.unstated)}, which did not say what its ledger was charged"
            if claims.unstated
            else "DP-SGD with Poisson sampling, calibrated for the whole run",
        },
        {
            "claim": "The process that adds uploads holds no key",
            "holds": sums,
            "detail": "CKKS ciphertexts are added in a process of their own that never receives a secret key"
            if sums
            else "nothing was exchanged in this run",
        },
        {
            "claim": "The decryptor opened one sum per round, of at least k sites, as integers",
            "holds": sums,
            "detail": f"k = {config.federation.min_contributors}; a fresh key each round, destroyed after the opening"
            if sums
            else "nothing was exchanged in this run",
        },
        {
            "claim": "No single upload can be opened, not even with the key and all uploads",
            "holds": sums,
            "detail": (
                "masks inside the ciphertexts cancel in the sum of the agreed survivors only, as long as at most "
                f"{config.secure_sum.max_colluding} of the sites work with the server. "
                + (
                    "In this run sites and server were programs of their own, joined by a network; the process that "
                    "adds and the one that opens ran beside each other at the server"
                    if parts.deployed
                    else "In this run all roles shared one machine: whoever runs it could read everything"
                )
            )
            if sums
            else "nothing was exchanged in this run",
        },
    ]
