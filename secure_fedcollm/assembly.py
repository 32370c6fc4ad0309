"""From a configuration to a federation in one process tree: data, models, plans, ledgers, roles."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace

import numpy as np

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import ConfigError, FedCollmError
from fedcollm_privacy.head_witness import HeadWitness
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan, calibrate
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum import MaskedSum
from secure_fedcollm import data as federation_data
from secure_fedcollm.config import Config
from secure_fedcollm.data import FederationData, SiteData
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.heads import LedgerHeads
from secure_fedcollm.models import AdaptedModel, check_same_tokenizer, load, use_fitting_threads
from secure_fedcollm.parties import Parties, home, ledger_dir
from secure_fedcollm.pretraining import embedded_pair
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.records import Record
from secure_fedcollm.rounds import Federation, State
from secure_fedcollm.server import Server
from secure_fedcollm.site import NonPrivate, PrivateBudget, Site
from secure_fedcollm.site_guard import SiteGuard
from secure_fedcollm.tokenization import TokenDataset, tokenize
from secure_fedcollm.training import LocalTraining, records_of_units
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import InProcessTransport

__all__ = ["Assembly", "assemble"]


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
    slm, llm = _models(config, folder, progress)
    test, test_source = _test_records(config, data)
    site_model = slm if config.federation.site_model == "slm" else llm
    sites = []
    with progress.stage("load", "tokenise, calibrate noise, commit plans", 2 * len(data.sites)) as step:
        tokens = {}
        for site_data in data.sites:
            tokens[site_data.name] = tokenize(
                site_data.train, site_model.tokenizer, max_length=config.data.max_length, append_eos=data.append_eos
            )
            step()
        plans = _plans(config, tokens)
        parties = Parties.of(config, folder, tuple(tokens))
        guards = {name: parties.guard(config, folder, name, site_model.spec.base_model) for name in tokens}
        ledgers = _ledgers(config, folder, parties, guards, plans)
        for name in tokens:
            sites.append(
                _site(
                    config,
                    folder,
                    progress,
                    parties,
                    guards[name],
                    tokens[name],
                    site_model,
                    plans.get(name),
                    ledgers.get(name),
                )
            )
            step()
    public_tokens = tokenize(
        data.public_train, slm.tokenizer, max_length=config.data.max_length, append_eos=data.append_eos
    )
    server = Server(
        config=config,
        run_id=folder.run_id,
        slm=slm,
        llm=llm,
        public_tokens=public_tokens,
        sites=len(sites),
        roster_digest=parties.roster.digest,
        terms=next((plan.terms for plan in plans.values()), None),
        gradient_plan=next(iter(plans.values())) if config.federation.release == "gradient" else None,
        progress=progress,
    )
    transcript = Transcript(folder.path / "transcript.jsonl")
    heads = None
    if ledgers:
        memory = ledger_dir(config, folder) / "server.heads.sqlite"
        heads = LedgerHeads(witness=HeadWitness(memory, parties.server), roster=parties.roster)
    transport = InProcessTransport({site.name: site.handle for site in sites})
    federation = Federation(
        server=server,
        transport=transport,
        secure_sum=MaskedSum(
            aggregator=Aggregator(),
            decryptor=Decryptor(parties.roster),
            key=parties.server,
            roster=parties.roster,
            channel=transport,
            witness=transcript.record,
        ),
        transcript=transcript,
        keep=folder.keep_opened,
        heads=heads,
        sites=tuple(sites),
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


def _models(config: Config, folder: RunFolder, progress: RunProgress) -> tuple[AdaptedModel, AdaptedModel]:
    names = (config.model.slm, config.model.llm)
    if names[0] is None or names[1] is None:
        names = _embedded_models(folder, progress)
    loaded = []
    for name, adapter_seed in zip(names, (config.seed, config.seed + 1), strict=True):
        with progress.stage("load", f"load {name}"):
            loaded.append(
                load(
                    str(name),
                    dtype=config.model.dtype,
                    device=config.device,
                    r=config.adapter.r,
                    lora_alpha=config.adapter.lora_alpha,
                    lora_dropout=config.adapter.lora_dropout,
                    target_modules=config.adapter.target_modules,
                    seed=adapter_seed,
                    activation_checkpointing=config.model.activation_checkpointing,
                )
            )
    slm, llm = loaded
    check_same_tokenizer(slm, llm)
    use_fitting_threads(slm, llm)
    return slm, llm


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
    random.Random(config.seed).shuffle(chosen)  # noqa: S311 - which public records are scored is no secret
    return tuple(chosen[: config.evaluation.max_records]), source


def _plans(config: Config, tokens: dict[str, TokenDataset]) -> dict[str, DpPlan]:
    """Each site's plan; none in a run without DP or rounds."""
    privacy, federation = config.privacy, config.federation
    if privacy is None or federation.rounds == 0:
        return {}
    plans = {
        name: calibrate(
            target_epsilon=privacy.epsilon,
            delta=privacy.delta,
            unit=privacy.unit,
            max_records_per_unit=privacy.max_records_per_unit,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=privacy.expected_batch_size,
            steps_per_round=federation.local_steps,
            rounds=federation.rounds,
            units=len(records_of_units(site_tokens)),
            clipping=privacy.clipping,
            noise=privacy.noise,
            least_honest=privacy.least_honest,
            release=federation.release,
            randomness="operating_system" if privacy.insecure_test_seed is None else "insecure_test_seed",
        )
        for name, site_tokens in tokens.items()
    }
    if federation.release == "update":
        return plans
    # Sites share one grid, and with distributed noise rely on each other's shares: the largest noise serves all.
    most = max(plan.noise_multiplier for plan in plans.values())
    return {name: replace(plan, noise_multiplier=most) for name, plan in plans.items()}


def _ledgers(
    config: Config, folder: RunFolder, parties: Parties, guards: dict[str, SiteGuard], plans: dict[str, DpPlan]
) -> dict[str, Ledger]:
    """Each private site's ledger with its plan committed; a plan that one site refuses is given up at the others."""
    privacy = config.privacy
    if config.federation.rounds > 0:  # without rounds no record is read
        for name, guard in guards.items():
            guard.check_privacy(plans.get(name), folder.run_id)
    if privacy is None:
        return {}
    asked = Cap(epsilon=privacy.cap_epsilon, delta=privacy.cap_delta)
    ledgers = {n: Ledger(ledger_dir(config, folder) / f"{n}.sqlite", parties.sites[n]) for n in plans}
    committed = list[Ledger]()
    for name, ledger in ledgers.items():
        guard = guards[name]
        try:
            ledger.commit_plan(
                run_id=folder.run_id,
                data_set=guard.rule.name,
                plan=plans[name],
                caps=guard.caps(asked),
                policy=guard.policy.digest,
            )
        except FedCollmError as refusal:
            guard.log(refusal, folder.run_id, None)
            for other in committed:
                other.abort(folder.run_id)
            raise
        committed.append(ledger)
    return ledgers


def _site(
    config: Config,
    folder: RunFolder,
    progress: RunProgress,
    parties: Parties,
    guard: SiteGuard,
    tokens: TokenDataset,
    adapted: AdaptedModel,
    plan: DpPlan | None,
    ledger: Ledger | None,
) -> Site:
    privacy, federation, name = config.privacy, config.federation, guard.policy.site
    budget: PrivateBudget | NonPrivate = NonPrivate(
        steps=federation.local_steps,
        batch_size=federation.batch_size,
        seed=_seed_of(config.seed, name),
    )
    if privacy is not None and plan is not None and ledger is not None:
        budget = PrivateBudget(
            plan=plan,
            ledger=ledger,
            observable=config.data.declared != "private",
            test_seed=privacy.insecure_test_seed,
        )
    return Site(
        key=parties.sites[name],
        contributor=parties.contributor(config, folder, name, guard.policy.opening),
        guard=guard,
        run_id=folder.run_id,
        adapted=adapted,
        tokens=tokens,
        aggregation=config.adapter.aggregation,
        budget=budget,
        how=LocalTraining(learning_rate=federation.learning_rate, batch_tokens=federation.batch_tokens),
        progress=progress,
    )


def _seed_of(seed: int, site: str) -> int:
    return int(np.random.SeedSequence([seed, *site.encode()]).generate_state(1)[0])
