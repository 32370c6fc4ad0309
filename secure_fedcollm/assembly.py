"""From a configuration to a federation in one process tree: data, models, plans, ledgers, roles."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import ConfigError, FedCollmError
from fedcollm_privacy.head_witness import HeadWitness
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum import MaskedSum
from secure_fedcollm import data as federation_data
from secure_fedcollm.alignment import check_tokenizers, tokenize_public
from secure_fedcollm.checkpoints import DeviceMap
from secure_fedcollm.config import Config
from secure_fedcollm.data import FederationData, SiteData
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.heads import LedgerHeads
from secure_fedcollm.home import home
from secure_fedcollm.models import AdaptedModel, load, use_fitting_threads
from secure_fedcollm.parties import Parties, ledger_dir
from secure_fedcollm.pretraining import embedded_pair
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.ranks import require_ranks
from secure_fedcollm.records import Record
from secure_fedcollm.rounds import Federation, Offers, State
from secure_fedcollm.server import Server
from secure_fedcollm.site import Site
from secure_fedcollm.site_assembly import SiteSide, commit, open_site, plan_of, require_same_caps, tokens_of
from secure_fedcollm.site_guard import SiteGuard
from secure_fedcollm.terms import RunTerms, dp_terms, terms_of
from secure_fedcollm.tokenization import TokenDataset
from secure_fedcollm.training import records_of_units
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import InProcessTransport, Transport

__all__ = ["Assembly", "assemble", "connect", "load_models", "scored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Everything a run needs.

    Attributes:
        test: the records that metrics are taken on.
        test_source: where they come from, in words for the report.
        ledgers: for every site of a private run, its ledger.
        data_sets: for every site, its data set's name in the ledger.
        plans: for every site of a private run, its privacy plan.
        server_key: signs the statement.
        roster: of all parties.
        deployed: whether the sites are on machines of their own; then nothing of theirs is here.
    """

    config: Config
    federation: Federation
    start: State
    slm: AdaptedModel
    llm: AdaptedModel
    data: FederationData
    test: tuple[Record, ...]
    test_source: str
    ledgers: dict[str, Ledger]
    data_sets: dict[str, str]
    plans: dict[str, DpPlan]
    server_key: SigningKey
    roster: Roster
    deployed: bool


def assemble(config: Config, folder: RunFolder, progress: RunProgress) -> Assembly:
    """Load, check, tokenise and connect; commits each site's privacy plan to its ledger.

    Raises:
        FedCollmError: whatever does not fit, before anything is trained.
    """
    with progress.stage("load", "read and partition the data"):
        data = federation_data.load(
            config.data,
            sites=config.federation.sites,
            seed=config.seed,
            unit="record" if config.privacy is None else config.privacy.unit,
        )
    if config.federation.pool:
        data = _pooled(data)
    _check_sites(config, data)
    slm, llm = load_models(config, folder, progress)
    narrow = {
        rank: _load(config, slm.name, progress, seed=config.seed, rank=rank)
        for rank in sorted(set((config.adapter.site_ranks or {}).values()))
    }
    test, test_source = _test_records(config, data)
    site_model = slm if config.federation.site_model == "slm" else llm
    parties = Parties.of(config, folder, tuple(site_data.name for site_data in data.sites))
    terms = terms_of(
        config,
        run_id=folder.run_id,
        roster=parties.roster,
        spec=site_model.shared_spec(config.adapter.aggregation),
        append_eos=data.append_eos,
    )
    with progress.stage("load", "tokenise, calibrate noise, commit plans", 2 * len(data.sites)) as step:
        tokens = {}
        for site_data in data.sites:
            tokens[site_data.name] = tokens_of(terms, site_data.train, site_model)
            step()
        plans = _plans(terms, tokens)
        guards = {name: parties.guard(config, folder, name, site_model.spec.base_model) for name in tokens}
        ledgers = _ledgers(config, folder, parties, terms, guards, plans)
        sites = list[Site]()
        for name in tokens:
            side = SiteSide(
                key=parties.sites[name],
                roster=parties.roster,
                guard=guards[name],
                journal=ledger_dir(config, folder) / f"{name}.rounds.sqlite",
                observable=config.data.declared != "private",
                test_seed=None if config.privacy is None else config.privacy.insecure_test_seed,
                persons_known=config.data.unit_field is not None,
                progress=progress,
            )
            opened = open_site(
                terms,
                side,
                adapted=narrow.get(config.adapter.rank_of(name), site_model),
                tokens=tokens[name],
                plan=plans.get(name),
                ledger=ledgers.get(name),
            )
            sites.append(opened.site)
            step()
    federation = connect(
        config,
        folder,
        progress,
        slm=slm,
        llm=llm,
        data=data,
        key=parties.server,
        roster=parties.roster,
        transport=InProcessTransport({site.name: site.handle for site in sites}),
        heads=ledger_dir(config, folder) / "server.heads.sqlite",
        sites=tuple(sites),
        gradient_plan=next(iter(plans.values())) if config.federation.release == "gradient" else None,
    )
    alone = {} if config.federation.exchange == "secure_sum" else {s.name: site_model.read() for s in sites}
    return Assembly(
        config=config,
        federation=federation,
        start=State(slm=slm.read(), llm=llm.read(), alone=alone),
        slm=slm,
        llm=llm,
        data=data,
        test=test,
        test_source=test_source,
        ledgers=ledgers,
        data_sets={name: guard.rule.name for name, guard in guards.items()},
        plans=plans,
        server_key=parties.server,
        roster=parties.roster,
        deployed=False,
    )


def connect(
    config: Config,
    folder: RunFolder,
    progress: RunProgress,
    *,
    slm: AdaptedModel,
    llm: AdaptedModel,
    data: FederationData,
    key: SigningKey,
    roster: Roster,
    transport: Transport,
    heads: Path,
    sites: tuple[Site, ...] = (),
    gradient_plan: DpPlan | None = None,
    offers: Offers | None = None,
) -> Federation:
    """The server with all it needs, connected to its sites.

    Args:
        config: of the run.
        folder: of the run.
        progress: where a person sees the steps.
        slm: the server's copy of the SLM.
        llm: the LLM.
        data: its public text is used.
        key: the server's.
        roster: of all parties.
        transport: to the sites.
        heads: file of what the server has counter-signed, over all runs.
        sites: those in this process; none across machines.
        gradient_plan: any site's plan, where sites send gradients.
        offers: invites sites across machines.
    """
    server = Server(
        config=config,
        run_id=folder.run_id,
        slm=slm,
        llm=llm,
        public_tokens=tokenize_public(
            data.public_train, slm, llm, max_length=config.data.max_length, append_eos=data.append_eos
        ),
        sites=len(transport.sites),
        roster_digest=roster.digest,
        terms=dp_terms(config.privacy, config.federation),
        gradient_plan=gradient_plan,
        progress=progress,
    )
    transcript = Transcript(folder.path / "transcript.jsonl")
    with_ledgers = config.privacy is not None and config.federation.rounds > 0
    return Federation(
        server=server,
        transport=transport,
        secure_sum=MaskedSum(
            aggregator=Aggregator(),
            decryptor=Decryptor(roster),
            key=key,
            roster=roster,
            channel=transport,
            witness=transcript.record,
        ),
        transcript=transcript,
        keep=folder.keep_opened,
        heads=LedgerHeads(witness=HeadWitness(heads, key), roster=roster) if with_ledgers else None,
        sites=sites,
        offers=offers,
    )


def _check_sites(config: Config, data: FederationData) -> None:
    federation = config.federation
    if federation.exchange == "secure_sum" and len(data.sites) < federation.min_contributors:
        raise ConfigError(
            "federation.sites",
            len(data.sites),
            f"at least federation.min_contributors = {federation.min_contributors} sites with data",
        )
    if federation.exchange == "secure_sum":
        config.secure_sum.threshold_of(len(data.sites))
    require_ranks(config, [site.name for site in data.sites])


def _pooled(data: FederationData) -> FederationData:
    train = tuple(r for site in data.sites for r in site.train) + data.public_train
    held_out = tuple(r for site in data.sites for r in site.held_out)
    return FederationData(
        sites=(SiteData(name="pooled", train=train, held_out=held_out),),
        public_train=data.public_train,
        public_test=data.public_test,
        append_eos=data.append_eos,
        secrets=data.secrets,
    )


def load_models(config: Config, folder: RunFolder, progress: RunProgress) -> tuple[AdaptedModel, AdaptedModel]:
    """SLM and LLM with their first adapters; without names the embedded pair, whose copies go into the run's folder.

    Raises:
        ModelError: one cannot be loaded, or they have different tokenizers.
    """
    names = (config.model.slm, config.model.llm)
    if names[0] is None or names[1] is None:
        names = _embedded_models(folder, progress)
    loaded = []
    maps = (None, config.model.llm_device_map)
    for name, adapter_seed, device_map in zip(names, (config.seed, config.seed + 1), maps, strict=True):
        rank = config.adapter.r
        loaded.append(_load(config, str(name), progress, seed=adapter_seed, rank=rank, device_map=device_map))
    slm, llm = loaded
    check_tokenizers(slm, llm, config.distillation.alignment)
    use_fitting_threads(slm, llm)
    return slm, llm


def _load(
    config: Config, name: str, progress: RunProgress, *, seed: int, rank: int, device_map: DeviceMap | None = None
) -> AdaptedModel:
    adapter = config.adapter
    with progress.stage("load", f"load {name}"):
        return load(
            name,
            dtype=config.model.dtype,
            device=config.device,
            r=rank,
            lora_alpha=adapter.lora_alpha * rank / adapter.r,  # a component counts the same at every site
            lora_dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules,
            seed=seed,
            activation_checkpointing=config.model.activation_checkpointing,
            device_map=device_map,
        )


def _embedded_models(folder: RunFolder, progress: RunProgress) -> tuple[str, str]:
    with progress.stage("pretrain", "pre-train the embedded pair on public synthetic text (first run only)") as step:
        pair = embedded_pair(home() / "embedded", 0, lambda *_: step())
    copies = (folder.path / "base_models" / "slm", folder.path / "base_models" / "llm")
    for source, copy in zip(pair, copies, strict=True):
        shutil.copytree(source, copy, dirs_exist_ok=True)
    return str(copies[0].resolve()), str(copies[1].resolve())


def _test_records(config: Config, data: FederationData) -> tuple[tuple[Record, ...], str]:
    if config.data.declared == "private":
        # A metric on private records would be a release that no budget pays for.
        chosen, source = list(data.public_test), "public records that nothing was trained on"
    elif data.public_test and data.public_test[0].choices:
        chosen, source = list(data.public_test), "the published test split"
    else:
        chosen = [r for site in data.sites for r in site.held_out]
        source = f"held-out records of all sites (declared {config.data.declared})"
    return scored(config, chosen), source


def scored(config: Config, records: Sequence[Record]) -> tuple[Record, ...]:
    """The records that metrics are taken on: at most ``evaluation.max_records`` of these, chosen by the seed."""
    chosen = list(records)
    random.Random(config.seed).shuffle(chosen)  # noqa: S311 - which public records are scored is no secret
    return tuple(chosen[: config.evaluation.max_records])


def _plans(terms: RunTerms, tokens: dict[str, TokenDataset]) -> dict[str, DpPlan]:
    """Each site's plan; none in a run without DP or rounds."""
    plans = {
        name: plan
        for name, site_tokens in tokens.items()
        if (plan := plan_of(terms, len(records_of_units(site_tokens)))) is not None
    }
    if terms.federation.release == "update":
        return plans
    # Sites share one grid, and with distributed noise rely on each other's shares: the largest noise serves all.
    most = max((plan.noise_multiplier for plan in plans.values()), default=0.0)
    return {name: replace(plan, noise_multiplier=most) for name, plan in plans.items()}


def _ledgers(
    config: Config,
    folder: RunFolder,
    parties: Parties,
    terms: RunTerms,
    guards: dict[str, SiteGuard],
    plans: dict[str, DpPlan],
) -> dict[str, Ledger]:
    """Each private site's ledger with its plan committed; a plan that one site refuses is given up at the others."""
    if terms.federation.rounds > 0:  # without rounds no record is read
        for name, guard in guards.items():
            with _refusal_logged(guard, terms):
                guard.check_privacy(plans.get(name))
    ledgers = {n: Ledger(ledger_dir(config, folder) / f"{n}.sqlite", parties.sites[n]) for n in plans}
    for name, ledger in ledgers.items():
        with _refusal_logged(guards[name], terms):
            require_same_caps(terms, guards[name], ledger)
    committed = list[Ledger]()
    for name, ledger in ledgers.items():
        try:
            with _refusal_logged(guards[name], terms):
                commit(terms, guards[name], ledger, plans[name])
        except FedCollmError:
            for other in committed:
                other.abort(terms.run_id)
            raise
        committed.append(ledger)
    return ledgers


@contextmanager
def _refusal_logged(guard: SiteGuard, terms: RunTerms) -> Iterator[None]:
    try:
        yield
    except FedCollmError as refusal:
        guard.log(refusal, terms.run_id, None)
        raise
