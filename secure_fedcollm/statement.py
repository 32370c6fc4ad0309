"""The privacy statement: what a run promises to the people in its data, bound to what it released, signed by all.

An in-toto statement in a DSSE envelope; ``docs/formats.md`` has its form, `statement_page` the page to read. The server
composes it of what every site says of itself (`claims`), and a site signs it only if it says of that site no less than
the site's own ledger.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.dsse import PAYLOAD_TYPE, Envelope, Signature, sign_payload, verify_payload
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.messages import canonical_json, vector_digest
from fedcollm_privacy.reservation import code_digest
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.assembly import Assembly
from secure_fedcollm.claims import Claims
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.promise import promise
from secure_fedcollm.statement_page import render_statement

__all__ = ["PREDICATE_TYPE", "claims_of", "compose", "model_card", "page", "sign", "versions"]

Float32 = NDArray[np.float32]
PREDICATE_TYPE = "urn:secure-fedcollm:privacy-statement:1"
_PACKAGES = ("secure-fedcollm", "torch", "transformers", "peft", "opacus", "tenseal", "dp-accounting", "cryptography")
_SUBJECTS = (
    "config.yaml",
    *(
        f"{model}_adapter/{name}"
        for model in ("slm", "llm")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ),
)


def versions() -> dict[str, str]:
    """The packages that a run's guarantees and results depend on."""
    return {package: version(package) for package in _PACKAGES}


def compose(parts: Assembly, folder: RunFolder, adapters: Mapping[str, Float32], claims: Claims) -> bytes:
    """The statement's payload.

    Args:
        parts: the run.
        folder: holds the released adapters already: their digests are in the statement.
        adapters: what is released, float32, by ``slm`` and ``llm``.
        claims: of the sites, as `claims.gather` gives them.
    """
    subjects = [{"name": name, "digest": {"sha256": _file_digest(folder.path / name)}} for name in _SUBJECTS]
    return canonical_json(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": subjects,
            "predicateType": PREDICATE_TYPE,
            "predicate": _predicate(parts, folder, adapters, claims),
        }
    )


def sign(parts: Assembly, folder: RunFolder, payload: bytes) -> Envelope:
    """The payload in its envelope, signed by the server and by every site that finds its own ledger in it.

    A site that does not sign is missing in the envelope, and any audit says so. A run that was cut here signs the same
    payload again when it is resumed.
    """
    digest = hashlib.sha256(payload).hexdigest()
    federation, roster = parts.federation, parts.roster
    signatures = [sign_payload(parts.server_key, payload)]
    offer = encode(StatementOffer(run_id=folder.run_id, payload=payload))
    for reply in federation.transport.ask("endorse", dict.fromkeys(federation.transport.sites, offer)):
        try:
            endorsement = decode(reply.body or b"", Endorsement)
            site = roster.site(reply.site)
            verify_payload(site, payload, endorsement.signature)
        except ProtocolError:
            continue
        signatures.append(Signature(keyid=site.public_key.hex(), signature=endorsement.signature))
    if not federation.transcript.names_statement(digest):
        federation.transcript.record("statement", statement=digest)
    if federation.heads is not None:  # so that the sites' notes of the statement are counter-signed too
        last = parts.config.federation.rounds
        federation.heads.exchange(federation.transport, federation.transcript, run_id=folder.run_id, server_round=last)
    return Envelope(payload_type=PAYLOAD_TYPE, payload=payload, signatures=tuple(signatures))


def claims_of(payload: bytes) -> Claims:
    """What a payload says of the sites."""
    predicate = json.loads(payload)["predicate"]
    return Claims(stated=predicate.get("sites", {}), unstated=tuple(predicate.get("unstated", ())))


def page(parts: Assembly, signed: Envelope) -> str:
    """The statement to read, as one self-contained page; it names who signed."""
    names = {party.public_key.hex(): party.name for party in (parts.roster.server, *parts.roster.sites)}
    return render_statement(
        json.loads(signed.payload)["predicate"],
        payload_sha256=hashlib.sha256(signed.payload).hexdigest(),
        signers=[names[signature.keyid] for signature in signed.signatures],
    )


def _predicate(parts: Assembly, folder: RunFolder, adapters: Mapping[str, Float32], claims: Claims) -> dict[str, Any]:
    config, privacy, transcript = parts.config, parts.config.privacy, parts.federation.transcript
    outcomes = [row["outcome"] for row in folder.metrics()]
    predicate: dict[str, Any] = {
        "run_id": folder.run_id,
        "private": config.guaranteed and config.federation.rounds > 0,
        "data": {"declared": config.data.declared, "sites": _sites(parts, claims)},
        "rounds": {
            "planned": config.federation.rounds,
            "opened": outcomes.count("opened"),
            "lost": outcomes.count("lost"),
        },
        "transcript": {"head": transcript.head, "events": transcript.events},
        "rosters": sorted(_file_digest(path) for path in (folder.path / "rosters").glob("*.json")),
        "adapters": {name: vector_digest(adapter) for name, adapter in adapters.items()},
        "server": parts.server_key.public.as_fields(),
        "versions": versions(),
        "code": code_digest(),
    }
    if config.federation.rounds == 0:
        return predicate | {"claim": "none: nothing was trained in this run, and no site's budget was touched"}
    if privacy is None:
        return predicate | {"claim": "none: this run applied no differential privacy to the sites' training"}
    if not config.guaranteed:
        return predicate | {"claim": "none: NOT PRIVATE, a test run whose sampling and noise come from a known seed"}
    said: dict[str, Any] = {"sites": dict(claims.stated)}
    if claims.unstated:
        said["unstated"] = list(claims.unstated)
    return predicate | promise(config, privacy, claims.unstated) | said


def _sites(parts: Assembly, claims: Claims) -> list[str]:
    """Whose data the run is about: in a private run those that are known to have taken part."""
    known = {*claims.stated, *claims.unstated}
    return [site for site in parts.federation.transport.sites if site in known or not known]


def model_card(name: str, base: str, payload: bytes) -> str:
    """The README of a released adapter: what it is, what the statement says of it, and how to load it."""
    statement = json.loads(payload)["predicate"]
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        "tags: [lora, federated, differential-privacy]" if statement["private"] else "tags: [lora, federated]",
        "---",
        "",
        f"# {name.upper()} adapter of run {statement['run_id']}",
        "",
    ]
    if not statement["private"]:
        lines += [f"**NOT PRIVATE.** {statement['claim']}.", ""]
    else:
        lines += [
            f"{statement['claim']} The unit is one {statement['unit']}. Trust: {statement['trust_model']}",
            "",
            "| site | epsilon | delta | noise multiplier |",
            "|---|---|---|---|",
            *(
                # Rounded up: a spend is never shown smaller than it is.
                f"| {site} | {math.ceil(1000 * row['epsilon']) / 1000:.3f} | {row['delta']:.1e} | "
                f"{math.floor(1000 * row['plan']['noise_multiplier']) / 1000:.3f} |"
                for site, row in statement["sites"].items()
            ),
            "",
            "Not covered: " + "; ".join(statement["not_covered"]) + ".",
            "",
        ]
    lines += [
        "Load it with:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), <this folder>)",
        "```",
        "",
        "The full statement is `statement.json` of the run, signed by the server and the sites.",
        f"SHA-256 of its payload: `{hashlib.sha256(payload).hexdigest()}`.",
        "",
    ]
    return "\n".join(lines)


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
