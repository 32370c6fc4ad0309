"""Who takes part in a run of one process tree: keys, roster, policies, and where each party keeps its memory.

Roles that share a machine need no keys against each other. They have them all the same, so that the code is that of
sites on machines of their own, and ledgers and transcript can be checked by others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import PolicyRefused
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.policy_file import policy_text
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.roster import MIN_SITES, Roster
from fedcollm_privacy.site_policy import DataSetRule, PlanRules
from secure_fedcollm.atomic_file import write_atomically
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.home import home, identity_of
from secure_fedcollm.site_guard import SiteGuard

__all__ = ["Parties", "ledger_dir", "location_of"]

_TEN_YEARS = timedelta(days=3650)
_OF_THE_RUN = "Written by the run, whose data is declared {declared}; for private data each administrator writes one."


def ledger_dir(config: Config, folder: RunFolder) -> Path:
    """Where the sites' ledgers and journals lie: with the run, unless the data is private or the configuration says so.

    Ledgers of private data outlive runs, so that caps hold over all of them.
    """
    if config.privacy is not None and config.privacy.ledger_dir is not None:
        return Path(config.privacy.ledger_dir).expanduser()
    return home() / "ledgers" if config.data.declared == "private" else folder.path / "ledgers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """Server and sites with their keys.

    Attributes:
        server: the server's key.
        sites: the sites' keys.
        roster: of all of them; without a governance's signature, because one process tree has nobody to distrust.
    """

    server: SigningKey
    sites: dict[str, SigningKey]
    roster: Roster

    @staticmethod
    def of(config: Config, folder: RunFolder, names: tuple[str, ...]) -> Parties:
        """The parties of a run; puts their roster into its folder. A run that goes on keeps the roster it has."""
        server, sites = identity_of("server"), {name: identity_of(name) for name in sorted(names)}
        # A roster has three sites at least; the baselines without exchange may have fewer, and use none of it.
        listed = dict(sites)
        while len(listed) < MIN_SITES:
            listed[f"absent-{len(listed)}"] = SigningKey.generate(f"absent-{len(listed)}")
        roster = Roster(
            federation=folder.run_id,
            server=server.public,
            sites=tuple(listed[name].public for name in sorted(listed)),
            valid_until=int(time.time() + _TEN_YEARS.total_seconds()),
        )
        for path in sorted((folder.path / "rosters").glob("*.json")):
            known = Roster.from_bytes(path.read_bytes())
            if replace(known, valid_until=roster.valid_until) == roster and known.valid_until > time.time():
                return Parties(server=server, sites=sites, roster=known)
        (folder.path / "rosters").mkdir(exist_ok=True)
        write_atomically(folder.path / "rosters" / f"{roster.digest[:16]}.json", roster.to_bytes())
        return Parties(server=server, sites=sites, roster=roster)

    def guard(self, config: Config, folder: RunFolder, site: str, base_model: str) -> SiteGuard:
        """A site's policy, for the data set of this run.

        Raises:
            PolicyRefused: there is no policy, or it does not allow this data set; the text says what to do.
        """
        refusals = RefusalLog(ledger_dir(config, folder) / f"{site}.refusals.jsonl")
        try:
            path = self._policy_file(config, folder, site, base_model)
            return SiteGuard.of(
                path,
                site,
                location=location_of(config.data.path),
                server=self.server.public,
                base_model=base_model,
                refusals=refusals,
            )
        except PolicyRefused as refusal:
            refusals.record(rule=refusal.rule, reason=str(refusal), run_id=folder.run_id, server_round=None)
            raise

    def _policy_file(self, config: Config, folder: RunFolder, site: str, base_model: str) -> Path:
        given = config.data.policy_dir
        if given is None and config.data.declared != "private":
            path = folder.path / "policies" / f"{site}.yaml"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, self._text(config, site, base_model).encode())
                path.chmod(0o600)
            return path
        return (home() / "policies" if given is None else Path(given).expanduser()) / f"{site}.yaml"

    def _text(self, config: Config, site: str, base_model: str) -> str:
        privacy = config.privacy
        location = location_of(config.data.path)
        cap = (
            Cap(epsilon=1.0, delta=1e-5)
            if privacy is None
            else Cap(epsilon=privacy.cap_epsilon, delta=privacy.cap_delta)
        )
        exceptions = () if config.guaranteed else ("non_private",) if privacy is None else ("insecure_test_seed",)
        return policy_text(
            site=site,
            valid_until=(datetime.now(UTC) + _TEN_YEARS).date(),
            servers=(self.server.public,),
            base_models=(base_model,),
            data_sets=(
                DataSetRule(
                    name=f"{location}#{site}",
                    location=location,
                    unit="record" if privacy is None else privacy.unit,
                    caps=(cap,),
                ),
            ),
            plans=PlanRules(
                max_epsilon=1.0 if privacy is None else privacy.epsilon,
                max_delta=1e-5 if privacy is None else privacy.delta,
                noise=("local",) if privacy is None else (privacy.noise,),
            ),
            opening=SumPolicy(
                min_contributors=max(config.federation.min_contributors, config.secure_sum.max_colluding + 2),
                max_colluding=config.secure_sum.max_colluding,
            ),
            exceptions=exceptions,
            comment=_OF_THE_RUN.format(declared=config.data.declared),
        )


def location_of(path: str | None) -> str:
    """Where data lies, as a policy names it; null is the embedded text."""
    if path is None:
        return "embedded"
    return path if path.startswith("hub:") else str(Path(path).resolve())
