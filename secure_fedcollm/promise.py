"""What a private run promises, in words: claim, trust, assumptions, what is and is not covered.

Nothing here is computed from data; the numbers per site stand beside it in the `statement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcollm_privacy.accounting import ACCOUNTANT
from secure_fedcollm.config import Config
from secure_fedcollm.privacy_config import PrivacyConfig

__all__ = ["assumption", "promise", "unstated_clause"]

_MECHANISM = "DP-SGD: Poisson sampling of units, per-unit L2 clipping, Gaussian noise on the sum, at each site"


def assumption(least_honest: int, max_colluding: int) -> str:
    """What distributed noise rests on."""
    return (
        "Distributed noise: the stated epsilon is that of sums. It holds while every opened sum holds the noise of at "
        f"least {least_honest} honest sites and no single upload is opened, which the masks of the secure sum see to "
        f"as long as at most {max_colluding} of the sites work with the server. Towards whoever opens a single upload "
        "the larger epsilon of one update holds."
    )


def unstated_clause(sites: Sequence[str]) -> str:
    """What a run says of sites that took part and did not tell, when it ended, what their ledgers were charged."""
    return (
        f"Nothing is claimed for the data of {', '.join(sites)}: took part in this run, did not say at its end what "
        "its ledger was charged, and has not signed. Ask there for an export of the ledger"
    )


def promise(config: Config, privacy: PrivacyConfig, unstated: Sequence[str] = ()) -> dict[str, Any]:
    """The words of a private run's statement; the headings of NIST SP 800-226 and of DP-fy ML section 5.3.3 among them.

    Args:
        config: of the run.
        privacy: its privacy section.
        unstated: sites for which nothing is claimed.
    """
    distributed = privacy.noise == "distributed"
    seen = (
        "Whoever sees the opened sums and all models of the run"
        if distributed
        else "Whoever sees all updates of a site in clear, and all models of the run,"
    )
    trust = (
        assumption(privacy.least_honest, config.secure_sum.max_colluding)
        if distributed
        else "local to each site: it needs an honest site, and nothing of server, key holder or other sites"
    )
    return {
        "claim": f"{seen} learns about any one unit of that site's data at most what (epsilon, delta)-differential "
        "privacy allows." + (f" {unstated_clause(unstated)}." if unstated else ""),
        "unit": privacy.unit,
        "neighboring_relation": "add or remove one unit",
        "mechanism": _MECHANISM,
        "trust_model": trust,
        "views": "per site below; with several local steps a round both are equal, because inside them the noise of "
        "the other sites is absent; released gradients are counted in sums with the noise of "
        f"{privacy.least_honest} honest sites; the claim and the ledger's charge are those of who sees "
        + ("sums only" if distributed else "every update"),
        "accounting": {
            "accountant": ACCOUNTANT,
            "assumes": "the plan was committed before training; sampling is Poisson",
        },
        "randomness": "AES-256-CTR keyed by the operating system for sampling and noise",
        "floating_point": "gradients are clipped onto a lattice; sums and noise are integers on it (no porous floats, "
        "Mironov 2012); no draw is beyond 8.58 standard deviations, an ideal Gaussian's is with probability 1e-17",
        "covered": "all adapters, intermediate and final, of SLM and LLM; server co-tuning reads public text only and "
        "is post-processing; quantisation and encryption error are post-processing",
        "not_covered": [*([unstated_clause(unstated)] if unstated else []), *_not_covered(config, privacy)],
        "assumptions": _assumptions(config, privacy, trust),
        "nist_sp_800_226": _nist(config, privacy, trust),
        "dp_fy_ml": {
            "setting": "cross-silo, "
            + ("noise shared by the sites" if distributed else "local to each site")
            + "; released: opened sums and all models",
            "definition": f"(epsilon, delta)-DP per site; unit: one {privacy.unit}, add or remove one; all data "
            "accesses of training are covered, intermediate models included",
            "accounting": f"{ACCOUNTANT}; Poisson sampling is actual; the privacy profile and mu stand beside epsilon",
            "transparency": "code, ledger exports, transcript and audits are open: `fedcollm-audit` on this folder",
        },
    }


def _not_covered(config: Config, privacy: PrivacyConfig) -> list[str]:
    declared = config.data.declared
    private = declared == "private"
    return [
        "the choice of settings, if it was made by looking at private data",
        "nothing was measured on private records"
        if private
        else "metrics on records of the sites: taken only where the data is declared public or synthetic",
        "each site's number of units, rounded to two significant digits, is treated as public",
        "float32 rounding: how a batch is padded moves other records' gradients by 1e-5 to 1e-3 C (measured)",
        "how many steps a site's clipping was active is told to nobody"
        if private
        else f"clipping and signal-to-noise in metrics.jsonl: told, without noise, because the data was declared "
        f"{declared}",
        "whether a site took part, and when; timing and size of messages",
        "persons with several records, when the unit is one record"
        if privacy.unit == "record"
        else "persons whose data lies at several sites: their epsilons add up",
        "what is true of people in general: differential privacy hides persons, not facts",
    ]


def _assumptions(config: Config, privacy: PrivacyConfig, trust: str) -> list[str]:
    assumed = [
        "each site ran the published code on the records it says, and its operating system's randomness is sound",
        "the plan was committed before training; units are sampled independently (Poisson)",
        "each record is a unit of its own: who has several is protected less"
        if privacy.unit == "record"
        else "a person's records carry the same unit name at a site, and one person has one name",
        "the privacy loss distributions of dp-accounting are an upper bound; PRV and RDP did not contradict it",
    ]
    if privacy.noise == "distributed":
        assumed.append(trust)
    if config.federation.exchange == "secure_sum":
        assumed.append(
            f"no sum of fewer than {config.federation.min_contributors} sites is opened, and none but that of the "
            f"agreed survivors, while at most {config.secure_sum.max_colluding} of the sites work with the server"
            + ("" if privacy.noise == "distributed" else " (the stated epsilon does not rest on it)")
        )
    return assumed


def _nist(config: Config, privacy: PrivacyConfig, trust: str) -> dict[str, str]:
    return {
        "privacy parameters and unit": f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} planned per site; "
        f"unit: one {privacy.unit}, add or remove one",
        "algorithms and correctness": f"{_MECHANISM}; integers on a lattice; the variance of every step's noise is "
        "checked; before each round records are tested for independence",
        "utility and bias": "metrics before and after stand in summary.json; groups with few records lose most, which "
        "this run does not measure",
        "trust model": trust,
        "side channels": "timing, message sizes and participation are not hidden; a lattice closes floating-point gaps",
        "security": "uploads are encrypted and masked; ledger entries, plans, survivor sets and this statement are "
        "signed (Ed25519); the process that adds uploads has no key",
        "data collection": f"records stay at the sites; they were declared {config.data.declared}; how they were "
        "collected is for each site to answer",
    }
