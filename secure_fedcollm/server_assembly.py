"""From a configuration to a server whose sites are on machines of their own: nothing of a site's is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedcollm_privacy.errors import ConfigError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.roster import Roster
from secure_fedcollm.assembly import Assembly, connect, load_models, scored
from secure_fedcollm.atomic_file import write_atomically
from secure_fedcollm.config import Config
from secure_fedcollm.data import load_public
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.offers import RunOffers
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.ranks import require_ranks
from secure_fedcollm.rounds import State
from secure_fedcollm.terms import terms_of
from secure_fedcollm.transport import Transport

__all__ = ["assemble_server"]


def assemble_server(
    config: Config,
    folder: RunFolder,
    progress: RunProgress,
    *,
    key: SigningKey,
    roster: Roster,
    signed_roster: bytes,
    transport: Transport,
    state: Path,
    told: Callable[[str, str], None] = lambda site, standing: None,
) -> Assembly:
    """Load both models and the public text, and make the offer that sites will be asked to join.

    ``data`` says of the sites' records only what the run takes them for; what they are, each site says itself.

    Args:
        config: of the run.
        folder: of the run.
        progress: where a person sees the steps.
        key: the server's.
        roster: of server and sites.
        signed_roster: the same as the governance signed it; it goes into the run's folder, for auditors.
        transport: to the sites of the roster.
        state: folder of what the server remembers over all runs.
        told: is told when a site has joined, or waits for its administrator.

    Raises:
        ConfigError: the run needs what only one process tree gives, there is no public text, or the federation is too
            small.
        FedCollmError: models or public text do not fit.
    """
    _check(config, key, roster, transport)
    with progress.stage("load", "read the public text"):
        data = load_public(
            config.data, seed=config.seed, unit="record" if config.privacy is None else config.privacy.unit
        )
    slm, llm = load_models(config, folder, progress)
    terms = terms_of(
        config,
        run_id=folder.run_id,
        roster=roster,
        spec=slm.shared_spec(config.adapter.aggregation),
        append_eos=data.append_eos,
    )
    offers = RunOffers(terms, key, told)
    (folder.path / "rosters").mkdir(exist_ok=True)
    write_atomically(folder.path / "rosters" / f"{roster.digest[:16]}.json", signed_roster)
    with progress.stage("load", "tokenise the public text"):
        federation = connect(
            config,
            folder,
            progress,
            slm=slm,
            llm=llm,
            data=data,
            key=key,
            roster=roster,
            transport=transport,
            heads=state / "heads.sqlite",
            offers=offers,
        )
    return Assembly(
        config=config,
        federation=federation,
        start=State(slm=slm.read(), llm=llm.read()),
        slm=slm,
        llm=llm,
        data=data,
        test=scored(config, data.public_test),
        test_source="the published test split"
        if data.public_test and data.public_test[0].choices
        else "public records that nothing was trained on",
        ledgers={},
        data_sets={},
        plans={},
        server_key=key,
        roster=roster,
        deployed=True,
    )


def _check(config: Config, key: SigningKey, roster: Roster, transport: Transport) -> None:
    if key.public != roster.server:
        raise ConfigError("server", key.name, f"the server of the roster, {roster.server.name}, with the key it lists")
    if set(transport.sites) != set(roster.site_names):
        raise ConfigError("sites", sorted(transport.sites), f"those of the roster: {', '.join(roster.site_names)}")
    if config.data.public_fraction:
        raise ConfigError(
            "data.public_fraction", config.data.public_fraction, "0: no record of a site is here to become public"
        )
    sites, least = len(roster.site_names), config.federation.min_contributors
    if sites < least:
        raise ConfigError("federation.min_contributors", least, f"at most the {sites} sites of the roster")
    config.secure_sum.threshold_of(sites)
    require_ranks(config, roster.site_names)
