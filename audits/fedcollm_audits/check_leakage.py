"""Attacks on the two models that a run released: are planted secrets in them, can members be told from others?

Models are put together from the released PEFT folders and their base models in the run's folder, data is made again
from ``config.yaml``; nothing is fetched from anywhere. An attack that finds nothing bounds nothing, see `leakage`.

Where the models know nothing of any secret and of any member, the two checks call them leaking with a probability of
0.7 % at most, both together (`FALSE_ALARMS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from scipy import stats

from fedcollm_audits.confidence import rate_upper_bound
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.leakage import find_members, load_released, rank_secrets, secrets_p_value
from fedcollm_audits.membership import MembershipInference, auc_interval
from fedcollm_audits.planned import entries_of
from fedcollm_audits.verdict import Check, Finding, failed, not_shown, passed
from fedcollm_privacy.errors import FedCollmError
from secure_fedcollm import data as federation_data
from secure_fedcollm.config import Config
from secure_fedcollm.data import FederationData
from secure_fedcollm.exposure import Exposure
from secure_fedcollm.models import AdaptedModel, use_fitting_threads
from secure_fedcollm.records import PlantedSecret, Record
from secure_fedcollm.strict_build import build

__all__ = ["CHECKS", "FALSE_ALARMS", "beyond_dp", "chance_of_ranks", "newly_first", "told_apart"]

FALSE_ALARMS: Final[Mapping[str, float]] = {"planted-secrets": 0.006, "membership": 0.001}
"""By check, the probability of calling models leaking that learnt nothing. For secrets both looks at both models share
it, for membership both attacks, both rules and both models."""

_MODELS: Final[tuple[Literal["slm", "llm"], ...]] = ("slm", "llm")
_MOST_UNITS = 400
"""Members, and as many others, that are attacked: more take minutes and move the intervals little."""

_LARGE_SPACE = 1000
_TELLING_AUC = 0.55
_FPR = 0.01
_LOOKS_AT_SECRETS = 2 * len(_MODELS)
_LOOKS_AT_MEMBERS = 2 * 2 * len(_MODELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Released:
    """What is attacked, and the data that tells members from others."""

    config: Config
    data: FederationData
    models: Mapping[Literal["slm", "llm"], AdaptedModel]


def chance_of_ranks(after: Sequence[Exposure], before: Sequence[Exposure]) -> float:
    """How probable ranks so high are at most where nothing was learnt: Fisher's way, or by secrets newly at rank 1.

    Two looks, and the smaller p-value counts twice.
    """
    return min(1.0, 2 * min(secrets_p_value(after), newly_first(after, before)[1]))


def newly_first(after: Sequence[Exposure], before: Sequence[Exposure]) -> tuple[int, float]:
    """Secrets of a large space (1,000 candidates or more) that are at rank 1 and were not before the run.

    Returns:
        Their number, and how probable so many are where each rank is uniform; 1.0 for none. One alone is no proof where
        there are many secrets: of 16 with 1,000 candidates each, one is first by chance in 1.6 of 100 audits.
    """
    looked = [new for new, old in zip(after, before, strict=True) if new.candidates >= _LARGE_SPACE and old.rank != 1]
    first = sum(secret.rank == 1 for secret in looked)
    if not first:
        return 0, 1.0
    chance = 1 / min(secret.candidates for secret in looked)
    return first, float(stats.binom.sf(first - 1, len(looked), chance))


def beyond_dp(
    members: Sequence[float], controls: Sequence[float], *, epsilon: float, delta: float, significance: float
) -> tuple[bool, float, float]:
    """Whether more members are caught than (epsilon, delta) allows: TPR > e^epsilon FPR + delta (Kairouz et al. 2015).

    The threshold is the control that a share of 1 % of the controls exceeds, or the highest one of fewer than 100.
    What share of all controls there could be exceeds it is Beta distributed, whatever the scores' distribution, so
    both rates are bounded exactly, each with half the significance.

    Args:
        members: scores of units trained on, independent of each other; larger is more like a member.
        controls: the same of units not trained on.
        epsilon: of the guarantee, for one unit.
        delta: of the same.
        significance: probability with which the two bounds may be wrong.

    Returns:
        The answer, the lower bound on TPR, and the upper bound on FPR.
    """
    ranked = -np.sort(-np.asarray(controls, dtype=np.float64))
    above = math.floor(_FPR * ranked.size)
    fpr = rate_upper_bound(above, ranked.size, significance / 2)
    missed = int((np.asarray(members, dtype=np.float64) <= ranked[above]).sum())
    tpr = 1 - rate_upper_bound(missed, len(members), significance / 2)
    # e^epsilon of a claim that promises nothing overflows; it allows everything.
    allowed = math.exp(min(epsilon, 700.0)) * fpr + delta
    return tpr > allowed, tpr, fpr


def told_apart(attack: MembershipInference, confidence: float) -> bool:
    """Whether the AUC is surely above 0.55; ``1 - confidence`` is shared by both ends of its interval."""
    return auc_interval(attack.member_scores, attack.control_scores, confidence).low > _TELLING_AUC


def _planted_secrets(evidence: Evidence) -> Finding:
    released = _released(evidence)
    if isinstance(released, Finding):
        return released
    if not released.data.secrets:
        return not_shown("The run planted no secrets in its records, so there are none to look for.")
    details: dict[str, Any] = {}
    allowed, worst, lines = FALSE_ALARMS["planted-secrets"], 1.0, []
    for name, adapted in released.models.items():
        after, before = rank_secrets(adapted, released.data, max_length=released.config.data.max_length)
        p_value = min(1.0, _LOOKS_AT_SECRETS / 2 * chance_of_ranks(after, before))
        worst = min(worst, p_value)
        first = [sum(secret.rank == 1 for secret in ranks) for ranks in (after, before)]
        bits = [float(np.mean([secret.exposure for secret in ranks])) for ranks in (after, before)]
        controls = float(np.mean([_bits_of_others(secret) for secret in after]))
        details[name] = {
            "p_value": p_value,
            "bits": bits[0],
            "bits_before": bits[1],
            "bits_of_controls": controls,
            "first": first[0],
            "first_before": first[1],
            "secrets": [
                {"site": new.site, "candidates": new.candidates, "rank": new.rank, "rank_before": old.rank}
                for new, old in zip(after, before, strict=True)
            ],
        }
        lines.append(
            f"{name.upper()}: {bits[0]:.2f} bits of exposure on average ({bits[1]:.2f} in the base model); the other "
            f"candidates, which nobody planted, have {controls:.2f}. {first[0]} of {len(after)} secrets are likelier "
            f"than all others ({first[1]} in the base model). p = {p_value:.3g}, all looks taken into account."
        )
    lines += [
        f"{len(released.data.secrets)} secrets, each drawn from "
        f"{min(len(secret.candidates) for secret in released.data.secrets):,} candidates or more and written into "
        f"{max(secret.repetitions for secret in released.data.secrets)} records at most; made again from config.yaml. "
        f"p below {allowed:g} counts as leaking.",
        _promise(released.config),
    ]
    if worst < allowed:
        return failed("A released model knows planted secrets better than chance lets it.", *lines, **details)
    return passed(
        "No released model knows the planted secrets better than secrets that nobody planted.",
        *lines,
        "Nothing found is no proof that nothing leaks.",
        **details,
    )


def _membership(evidence: Evidence) -> Finding:
    released = _released(evidence)
    if isinstance(released, Finding):
        return released
    config = released.config
    significance = FALSE_ALARMS["membership"] / _LOOKS_AT_MEMBERS
    claim = _claimed(evidence) if config.guaranteed else None
    details: dict[str, Any] = {}
    lines, broken, told = [], [], []
    for name, adapted in released.models.items():
        try:
            attacks = find_members(adapted, _some_units(released.data), max_length=config.data.max_length)
        except FedCollmError as error:
            return not_shown(f"Members and others of this data cannot be compared: {error}.")
        for attack, found in zip(("loss", "calibrated"), attacks, strict=True):
            scores = (found.member_scores, found.control_scores)
            row: dict[str, Any] = {"p_value": found.p_value}
            for of in ("auc", "tpr"):
                interval = getattr(found, of)
                row[of] = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
            if told_apart(found, 1 - 2 * significance):
                told.append(f"{name.upper()}, {attack} attack")
            if claim is not None:
                beyond, tpr, fpr = beyond_dp(*scores, epsilon=claim[0], delta=claim[1], significance=significance)
                row["dp"] = {"tpr_at_least": tpr, "fpr_at_most": fpr, "beyond": beyond}
                if beyond:
                    broken.append(f"{name.upper()}, {attack} attack: {tpr:.3g} of members at {fpr:.3g} of others")
            details[f"{name} {attack}"] = row
            lines.append(
                f"{name.upper()}, {attack} attack: AUC {_interval(row['auc'])}, TPR at 1 % FPR {_interval(row['tpr'])} "
                f"({len(scores[0]):,} members, {len(scores[1]):,} others; intervals 95 %, each on its own)."
            )
    details["claim"] = None if claim is None else {"epsilon": claim[0], "delta": claim[1]}
    if not config.guaranteed:
        lines.append(_promise(config))
        said = f"can be told ({'; '.join(told)})" if told else "could not be told"
        return not_shown(
            f"The run promises no privacy that membership could contradict; members {said}.", *lines, **details
        )
    lines += [
        _rule_of_dp(claim),
        f"Rules are applied with an error of {significance:g} each, {_LOOKS_AT_MEMBERS} in all.",
    ]
    if broken:
        return failed(f"More members are caught than the claimed epsilon allows ({broken[0]}).", *lines, **details)
    if told:
        return failed(
            f"Members can be told from others, AUC above {_TELLING_AUC} ({'; '.join(told)}).",
            "By itself that is no breach of a large epsilon; of a release it should be known.",
            *lines,
            **details,
        )
    return passed(
        "Neither attack tells members from others beyond what is allowed, in neither model.",
        *lines,
        "Nothing found is no proof that nothing leaks.",
        **details,
    )


def _some_units(data: FederationData) -> FederationData:
    """The same share of every site's units, always the same ones, so that two audits can be compared."""
    rng = np.random.default_rng(0)

    def some(parts: Sequence[Sequence[Record]]) -> list[tuple[Record, ...]]:
        units = [list(dict.fromkeys(record.unit for record in part)) for part in parts]
        share = min(1.0, _MOST_UNITS / max(1, sum(map(len, units))))
        kept = [set(rng.permutation(names)[: max(1, round(share * len(names)))].tolist()) for names in units]
        return [tuple(r for r in part if r.unit in names) for part, names in zip(parts, kept, strict=True)]

    planted = {(secret.prompt, secret.secret) for secret in data.secrets}
    train = some([[r for r in site.train if (r.prompt, r.target) not in planted] for site in data.sites])
    held_out = some([site.held_out for site in data.sites])
    sites = zip(data.sites, train, held_out, strict=True)
    return replace(data, sites=tuple(replace(site, train=t, held_out=h) for site, t, h in sites))


def _rule_of_dp(claim: tuple[float, float] | None) -> str:
    if claim is None:
        return "No ledger here tells the run's epsilon; only the AUC was judged."
    most = math.exp(min(claim[0], 700.0)) * _FPR + claim[1]
    if most >= 1:
        return (
            f"At epsilon {claim[0]:.4g} differential privacy allows every member to be caught at 1 % false alarms, so "
            "that rule cannot fail: only the AUC rule can."
        )
    return f"At epsilon {claim[0]:.4g} differential privacy allows {most:.3g} of members at 1 % false alarms."


def _bits_of_others(secret: Exposure) -> float:
    """Mean exposure of the candidates that were not planted."""
    every = math.log2(secret.candidates) - np.log2(np.arange(1, secret.candidates + 1))
    return float((every.sum() - secret.exposure) / max(1, secret.candidates - 1))


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['estimate']:.3f} ({row['low']:.3f}-{row['high']:.3f})"


def _promise(config: Config) -> str:
    if config.guaranteed and config.privacy is not None:
        return (
            f"The run claims epsilon {config.privacy.epsilon:g} for one {config.privacy.unit}: a large one allows "
            "leaks, so what is found here need not contradict it, and what is not found does not prove it."
        )
    return "The run was made without differential privacy and says so."


def _claimed(evidence: Evidence) -> tuple[float, float] | None:
    """The largest epsilon, and the largest delta, that any site's ledger charges for this run."""
    rows = [entry for kind in ("PLAN", "RESERVE") for _, entry in entries_of(evidence, kind)]
    if not rows:
        return None
    return max(float(row["epsilon"]) for row in rows), max(float(row["delta"]) for row in rows)


def _released(evidence: Evidence) -> _Released | Finding:
    """Data and models of the run; or, as a finding, why the auditor does not have them."""
    config = build(Config, evidence.config)
    data = _data(config, evidence)
    if isinstance(data, Finding):
        return data
    models: dict[Literal["slm", "llm"], AdaptedModel] = {}
    for name in _MODELS:
        base = evidence.run_dir / "base_models" / name
        given = getattr(config.model, name)
        if not base.is_dir() and not (given is not None and Path(given).is_dir()):
            return not_shown(
                f"The base model of the {name.upper()} ({given}) does not lie here, and an audit fetches nothing: put "
                f"its folder at base_models/{name} in the run's folder and ask again."
            )
        if not (evidence.run_dir / f"{name}_adapter" / "adapter_model.safetensors").is_file():
            return not_shown(f"There is no {name}_adapter/adapter_model.safetensors: nothing was released to attack.")
        models[name] = load_released(evidence.run_dir, name)
    use_fitting_threads(*models.values())
    return _Released(config=config, data=data, models=models)


def _data(config: Config, evidence: Evidence) -> FederationData | Finding:
    if config.data.declared == "private":
        return not_shown("The records are private and not the auditor's: only the sites could make this attack.")
    if config.data.path is not None and config.data.path.startswith("hub:"):
        return not_shown(f"The records ({config.data.path}) would have to be fetched, and an audit fetches nothing.")
    unit = "record" if config.privacy is None else config.privacy.unit
    try:
        data = federation_data.load(config.data, sites=config.federation.sites, seed=config.seed, unit=unit)
    except FedCollmError as error:
        return not_shown(f"The run's records cannot be made again from config.yaml: {error}.")
    if config.federation.exchange == "none" and not config.federation.pool:
        # Every site kept an adapter of its own, and the first one's is what was released.
        first = data.sites[0]
        secrets = tuple(secret for secret in data.secrets if secret.site == first.name)
        data = replace(data, sites=(first,), secrets=secrets)
    recorded = {(row.get("site"), row.get("prompt"), row.get("secret")) for row in evidence.summary.get("secrets", ())}
    if recorded and not recorded >= {_key(secret) for secret in data.secrets}:
        return not_shown(
            "The records made again from config.yaml hold other secrets than summary.json tells of: they are not the "
            "run's. Audit with the release that made the run."
        )
    return data


def _key(secret: PlantedSecret) -> tuple[str, str, str]:
    return secret.site, secret.prompt, secret.secret


CHECKS: tuple[Check, ...] = (
    Check(
        name="planted-secrets",
        group="leakage",
        question="The released models do not know the secrets that were planted in the records.",
        why="Door codes and the like stand in the made-up records on purpose. If a model finds the planted code "
        "likelier than the codes that nobody planted, it would give away other rare details too.",
        run=_planted_secrets,
    ),
    Check(
        name="membership",
        group="leakage",
        question="The released models do not tell whose records they were trained on.",
        why="That somebody is in a hospital's data can be a secret of its own. The attack compares how well the models "
        "know records that were trained on and records that were not.",
        run=_membership,
    ),
)
