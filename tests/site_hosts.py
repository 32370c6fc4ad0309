"""A federation of sites on machines of their own, in one process: each has its own folder with all that it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import SiteFailed
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.refusals import read_refusals
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.run_messages import RunAnswer, RunOffer
from fedcollm_privacy.site_policy import DataSetRule
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.assembly import Assembly
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.rounds import RoundOutcome, State, run_round
from secure_fedcollm.server_assembly import assemble_server
from secure_fedcollm.site_host import SiteHost
from secure_fedcollm.site_settings import SiteSettings, settings_text
from secure_fedcollm.strict_build import build
from secure_fedcollm.terms import RunTerms
from secure_fedcollm.transport import InProcessTransport, Reply

from .site_policies import write_policy
from .test_run import SMALL, write_notes

SITES = ("s00", "s01", "s02")
SEED = 7
VALID_UNTIL = 7_000_000_000


@dataclass
class Federation:
    """Everything that several machines would hold, under ``root``.

    Attributes:
        small: the model that all sites have.
        large: the server's LLM.
        base_model: digest of the small one.
    """

    root: Path
    small: Path
    large: Path
    base_model: str

    def __post_init__(self) -> None:
        self.server_key = SigningKey.generate("server")
        self.keys = {name: SigningKey.generate(name) for name in SITES}
        self.roster = Roster(
            federation="notes",
            server=self.server_key.public,
            sites=tuple(self.keys[name].public for name in SITES),
            valid_until=VALID_UNTIL,
        )
        self.together = write_notes(self.root / "together.jsonl", len(SITES), 40)
        self.public = write_notes(self.root / "public.jsonl", 1, 30, seed=5)
        rows = self.together.read_text().splitlines(keepends=True)
        for name in SITES:
            (self.root / name).mkdir()
            self.notes(name).write_text("".join(row for row in rows if json.loads(row)["site"] == name))
            self.policy(name)

    def notes(self, name: str) -> Path:
        return self.root / name / "notes.jsonl"

    def state(self, name: str) -> Path:
        return self.root / name / "state"

    def policy(self, name: str, **changes: Any) -> Path:
        """Write the policy that a site's administrator writes, with these changes."""
        fields = {"location": str(self.notes(name)), **changes}
        return write_policy(self.root / name / "policy.yaml", name, self.server_key.public, self.base_model, **fields)

    def rule(self, name: str, **changes: Any) -> DataSetRule:
        fields: dict[str, Any] = {"name": "notes", "location": str(self.notes(name)), "unit": "record"}
        return DataSetRule(**(fields | {"caps": (Cap(epsilon=1e4, delta=0.4),)} | changes))

    def settings(self, name: str, **changes: Any) -> SiteSettings:
        import yaml

        plain = yaml.safe_load(settings_text(site=name, path=str(self.notes(name)), model=str(self.small)))
        plain["data"] |= {"declared": "synthetic", "held_out_fraction": 0.2, **changes.pop("data", {})}
        return build(SiteSettings, plain | {"approval": "auto", "insecure_test_seed": SEED} | changes)

    def host(self, name: str, **changes: Any) -> SiteHost:
        made: dict[str, Any] = {"settings": self.settings(name, **changes.pop("settings", {})), "key": self.keys[name]}
        made |= {"roster": self.roster, "state": self.state(name), "progress": RunProgress(quiet=True)}
        return SiteHost(**(made | changes))

    def config(self, *overrides: str) -> Config:
        """The server's configuration; it has no site's data."""
        return build(Config, compose_config([*self._common(), f"data.public_path={self.public}", *overrides]))

    def plain_embedded(self, *overrides: str) -> dict[str, Any]:
        """The same run in one process tree, over the sites' records in one file."""
        own = [f"data.path={self.together}", "data.partition=column", "data.site_field=site"]
        given = [o for o in self._common() if o != "data.path=null" and not o.startswith("data.partition")]
        return compose_config([*given, *own, f"data.public_path={self.public}", *overrides])

    def _common(self) -> list[str]:
        return [
            "data=file",
            "data.path=null",
            "data.partition=iid",
            "data.declared=synthetic",
            "data.held_out_fraction=0.2",
            f"model.slm={self.small}",
            f"model.llm={self.large}",
            *SMALL,
            "federation.local_steps=1",
            "distillation.steps=1",
            f"privacy.insecure_test_seed={SEED}",
        ]

    def serve(self, transport: Any, *overrides: str, output: str = "served", key: SigningKey | None = None) -> Assembly:
        config = self.config(*overrides)
        return self.serve_as(config, transport, output, key)

    def serve_as(
        self, config: Config, transport: Any, output: str = "served", key: SigningKey | None = None
    ) -> Assembly:
        folder = RunFolder.create(str(self.root / output), config.name, {})
        return assemble_server(
            config,
            folder,
            RunProgress(quiet=True),
            key=key or self.server_key,
            roster=self.roster,
            signed_roster=self.roster.to_bytes(),
            transport=transport,
            state=self.root / "server-state",
        )

    def kinds(self, name: str) -> list[str]:
        path = self.state(name) / "ledger.sqlite"
        return [entry["kind"] for entry in LedgerFile(path).entries()] if path.exists() else []

    def refusals(self, name: str) -> list[str]:
        return [entry["rule"] for entry in read_refusals(self.state(name) / "refusals.jsonl")]


class Machines:
    """Sites that can be restarted behind one transport.

    Attributes:
        hosts: by site.
    """

    def __init__(self, hosts: Mapping[str, SiteHost]) -> None:
        self.hosts = dict(hosts)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.hosts)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        handlers = {name: host.handle for name, host in self.hosts.items()}
        return InProcessTransport(handlers).ask(operation, bodies)


def play(parts: Assembly, state: State, server_round: int) -> RoundOutcome:
    """One round, as the loop of a run plays it."""
    federation = parts.federation
    if federation.offers is not None:
        federation.offers.enlist(federation.transport)
    attempt = federation.transcript.attempts(server_round) + 1
    return run_round(federation, state, server_round, attempt, parts.config.secure_sum.value_bits)


def offered(terms: RunTerms | bytes, key: SigningKey, run_id: str = "run") -> bytes:
    data = terms if isinstance(terms, bytes) else terms.to_bytes()
    name = run_id if isinstance(terms, bytes) else terms.run_id
    return encode(RunOffer(run_id=name, terms=data, signature=key.sign("run_offer", data)))


def answer(host: SiteHost, body: bytes) -> str:
    """``joined``, ``waiting``, or the code of a refusal."""
    try:
        return decode(host.handle("offer", body), RunAnswer).standing
    except SiteFailed as failure:
        return failure.code
