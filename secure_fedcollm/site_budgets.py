"""What a site's own ledger says of each cap of its policy: for its administrator, never for the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcollm_privacy.entries import charges, entry_time, total, window_start
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.policy_file import load_policy

__all__ = ["budgets_of"]


def budgets_of(policy: Path, site: str, ledger: Path, now: float) -> list[dict[str, Any]]:
    """One row a cap: ``data_set``, ``epsilon``, ``cap_epsilon``, ``delta``, ``cap_delta``, ``days``.

    Args:
        policy: its file, as it is now.
        site: whose it is.
        ledger: the site's; one that is not there yet has spent nothing.
        now: Unix time in seconds, for caps that look back a number of days.

    Raises:
        PolicyRefused: the policy cannot be read.
        LedgerError: the ledger cannot be read.
    """
    rules = load_policy(policy, site).data_sets
    file = LedgerFile(ledger) if ledger.exists() else None
    entries: Sequence[Mapping[str, Any]] = [] if file is None else file.entries()
    at = entry_time(now, entries[-1] if entries else None)
    rows = []
    for rule in rules:
        account = "" if file is None else file.commitment(rule.name)
        for cap in rule.caps:
            spent = total(charges(entries, account, window_start(cap, at)).values())
            rows.append(
                {
                    "data_set": rule.name,
                    "epsilon": spent.epsilon,
                    "cap_epsilon": cap.epsilon,
                    "delta": spent.delta,
                    "cap_delta": cap.delta,
                    "days": cap.days,
                }
            )
    return rows
