"""Who takes part in a run of one process tree: keys, roster, policies, and where each party keeps its memory.

Roles that share a machine need no keys against each other. They have them all the same, so that the code is that of
sites on machines of their own, and ledgers and transcript can be checked by others.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import KeyFileError, PolicyRefused
from fedcollm_privacy.identity import SigningKey, load_key, save_key, save_public
from fedcollm_privacy.policy_file import load_policy, policy_text
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.roster import MIN_SITES, Roster
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.site_policy import DataSetRule, PlanRules, SitePolicy
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder, write_atomically
from secure_fedcollm.site_guard import SiteGuard

__all__ = ["Parties", "home", "identity_of", "ledger_dir"]

_TEN_YEARS = timedelta(days=3650)
_OF_THE_RUN = "Written by the run, whose data is declared {declared}; for private data each administrator writes one."


def home() -> Path:
    """Where keys, ledgers and policies for private data, and the embedded models' cache live.

    ``$FEDCOLLM_HOME`` or ``~/.fedcollm``.
    """
    return Path(os.environ.get("FEDCOLLM_HOME", Path.home() / ".fedcollm"))


def ledger_dir(config: Config, folder: RunFolder) -> Path:
    """Where the sites' ledgers and journals lie: with the run, unless the data is private or the configuration says so.

    Ledgers of private data outlive runs, so that caps hold over all of them.
    """
    if config.privacy is not None and config.privacy.ledger_dir is not None:
        return Path(config.privacy.ledger_dir).expanduser()
    return home() / "ledgers" if config.data.declared == "private" else folder.path / "ledgers"


def identity_of(name: str) -> SigningKey:
    """A party's own key in ``<home>/keys``, made when absent; never in a run's folder.

    Raises:
        KeyFileError: the file is damaged, encrypted or open to others.
    """
    folder = home() / "keys"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, public = folder / f"{name}.key", folder / f"{name}.pub"
    if not path.exists():
        public.unlink(missing_ok=True)  # of a key that is gone
        try:
            save_key(SigningKey.generate(name), path, None)
        except KeyFileError:
            if not path.exists():  # else another run made it a moment ago
                raise
    key = load_key(path, None)
    if not public.exists():
        try:
            save_public(key.public, public)
        except KeyFileError:
            if not public.exists():
                raise
    return key


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
        """The parties of a run; puts their roster into its folder where sums are opened."""
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
            policy = self._policy(config, folder, site, base_model)
            rule = policy.data_set(_location(config))
        except PolicyRefused as refusal:
            refusals.record(rule=refusal.rule, reason=str(refusal), run_id=folder.run_id, server_round=None)
            raise
        return SiteGuard(policy=policy, rule=rule, server=self.server.public, base_model=base_model, refusals=refusals)

    def contributor(self, config: Config, folder: RunFolder, site: str, demands: SumPolicy) -> Contributor:
        """A site's part in the secure sum; the stricter of policy and configuration holds."""
        asked = config.federation.min_contributors
        least = SumPolicy(
            min_contributors=max(asked, demands.min_contributors, config.secure_sum.max_colluding + 2),
            max_colluding=max(config.secure_sum.max_colluding, demands.max_colluding),
        )
        journal = RoundJournal(ledger_dir(config, folder) / f"{site}.rounds.sqlite")
        return Contributor(key=self.sites[site], roster=self.roster, policy=least, journal=journal)

    def _policy(self, config: Config, folder: RunFolder, site: str, base_model: str) -> SitePolicy:
        given = config.data.policy_dir
        if given is None and config.data.declared != "private":
            path = folder.path / "policies" / f"{site}.yaml"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, self._text(config, site, base_model).encode())
                path.chmod(0o600)
            return load_policy(path, site)
        return load_policy((home() / "policies" if given is None else Path(given).expanduser()) / f"{site}.yaml", site)

    def _text(self, config: Config, site: str, base_model: str) -> str:
        privacy = config.privacy
        location = _location(config)
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


def _location(config: Config) -> str:
    """Where the data lies, as a policy names it."""
    path = config.data.path
    if path is None:
        return "embedded"
    return path if path.startswith("hub:") else str(Path(path).resolve())
