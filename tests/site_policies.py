"""Policies of made-up administrators, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.policy_file import load_policy, policy_text
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.site_policy import DataSetRule, PlanRules
from secure_fedcollm.site_guard import SiteGuard

from .secure_sums import NOW

DATA_SET = "notes"


def write_policy(
    path: Path,
    site: str,
    server: PublicIdentity,
    base_model: str,
    location: str = "embedded",
    unit: str = "record",
    **changes: Any,
) -> Path:
    """A policy that allows a run with little protection on one data set, unless ``changes`` says otherwise."""
    fields: dict[str, Any] = {
        "site": site,
        "valid_until": date(2199, 12, 31),
        "servers": (server,),
        "base_models": (base_model,),
        "data_sets": (DataSetRule(name=DATA_SET, location=location, unit=unit, caps=(Cap(epsilon=1e4, delta=0.4),)),),
        "plans": PlanRules(max_epsilon=1e4, max_delta=0.4, noise=("local", "distributed")),
        "opening": SumPolicy(min_contributors=3, max_colluding=1),
        "exceptions": ("non_private", "insecure_test_seed"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(policy_text(**(fields | changes)))
    path.chmod(0o600)
    return path


def guard(
    site: str,
    server: PublicIdentity,
    folder: Path,
    base_model: str,
    clock: Callable[[], float] = lambda: NOW,
    **changes: Any,
) -> SiteGuard:
    """A site's guard over `write_policy`'s policy."""
    path = write_policy(folder / f"{site}.yaml", site, server, base_model, **changes)
    policy = load_policy(path, site)
    return SiteGuard(
        policy=policy,
        path=path,
        rule=policy.data_sets[0],
        server=server,
        base_model=base_model,
        refusals=RefusalLog(folder / f"{site}.refusals.jsonl"),
        clock=clock,
    )


def write_policies(
    home: Path, sites: Iterable[str], location: Path, base_model: str, unit: str = "record", **changes: Any
) -> None:
    """What administrators leave in ``home`` before a run on private data; the server's key is made there."""
    from secure_fedcollm.home import identity_of

    for site in sites:
        path = home / "policies" / f"{site}.yaml"
        write_policy(path, site, identity_of("server").public, base_model, str(location.resolve()), unit, **changes)
