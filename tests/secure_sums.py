"""A secure sum without models: a plan, keys, sites that answer over a channel that a test can bend."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy import coordinator
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import PublicContext, parameters_for
from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import FedCollmError, ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import OpenedSum, QuantizedUpdate, RoundPlan
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.secure_sum_messages import (
    PartRequest,
    PeerKeys,
    PeerShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UploadManifest,
    sign_plan,
)
from fedcollm_privacy.wire import decode, encode

NOW = 1_800_000_000
Grid = NDArray[np.int32]


def digest(text: str) -> str:
    """Any 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def least_threshold(sites: int, colluding: int) -> int:
    """The smallest t with 2t > n + c."""
    return (sites + colluding) // 2 + 1


def round_plan(**changes: Any) -> RoundPlan:
    """A sound plan for 4 sites; their number and ``value_bits`` decide threshold and parameters, if not given."""
    fields: dict[str, Any] = {
        "run_id": "r",
        "server_round": 1,
        "attempt": 1,
        "spec_digest": digest("spec"),
        "adapter_digest": digest("adapter"),
        "dimension": 5,
        "clip": 1.0,
        "value_bits": 13,
        "min_contributors": 3,
        "max_contributors": 4,
        "max_colluding": 1,
        "roster_digest": digest("roster"),
        "key_digest": digest("key"),
        "max_mean_norm": 1e6,
        "nonce": "00",
        "expires_at": NOW + 3600,
        "dp": None,
    } | changes
    fields.setdefault("threshold", least_threshold(fields["max_contributors"], fields["max_colluding"]))
    if "ckks" not in fields:
        fields["ckks"] = parameters_for(fields["max_contributors"], min(fields["value_bits"], 18))
    return RoundPlan(**fields)


@dataclass(frozen=True)
class Parties:
    """Keys of a server and so many sites, and the roster that names them."""

    server: SigningKey
    sites: Mapping[str, SigningKey]
    roster: Roster

    @classmethod
    def of(cls, count: int) -> Parties:
        return cls.named(*(f"s{i:02d}" for i in range(count)))

    @classmethod
    def named(cls, *names: str) -> Parties:
        server = SigningKey.generate("server")
        sites = {name: SigningKey.generate(name) for name in sorted(names)}
        publics = tuple(key.public for key in sites.values())
        roster = Roster(federation="f", server=server.public, sites=publics, valid_until=NOW + 10**6)
        return cls(server=server, sites=sites, roster=roster)

    def contributor(self, name: str, folder: Path, **policy: int) -> Contributor:
        """A site's part, with a journal in ``folder``."""
        return Contributor(
            key=self.sites[name],
            roster=self.roster,
            policy=SumPolicy(**({"min_contributors": 3, "max_colluding": 1} | policy)),
            journal=RoundJournal(folder / f"{name}.rounds.sqlite"),
            clock=lambda: NOW,
        )

    def bring_to_training(self, plan: RoundPlan, sites: Mapping[str, Callable[[str, bytes], bytes]]) -> None:
        """Lead real sites, and stand-ins for all others of the roster, through advertise, share and accept.

        Raises:
            SiteFailed: as a real site does.
        """
        with tempfile.TemporaryDirectory() as folder:
            others = {n: self.contributor(n, Path(folder), min_contributors=3) for n in self.sites if n not in sites}
            signed_plan = sign_plan(plan, self.server)
            answers = {name: handle("advertise", encode(signed_plan)) for name, handle in sites.items()}
            answers |= {name: encode(other.advertise(signed_plan)) for name, other in others.items()}
            enrolled = coordinator.enrol(
                plan, self.roster, (Answer(site=name, body=body) for name, body in answers.items())
            )
            keys = enrolled.request
            answers = {name: handle("share", encode(keys)) for name, handle in sites.items()}
            answers |= {name: encode(other.share(keys)) for name, other in others.items()}
            sharing = coordinator.share(enrolled, (Answer(site=name, body=body) for name, body in answers.items()))
            for name, handle in sites.items():
                handle("accept", encode(sharing.addressed_to(name)))


@dataclass(frozen=True)
class Answer:
    site: str
    body: bytes | None
    code: str | None = None


class Participant:
    """A site that answers requests as `secure_fedcollm.site.Site` does, with a given grid in place of training."""

    def __init__(self, contributor: Contributor, grid: Grid) -> None:
        self.contributor, self.grid = contributor, grid
        self.context: PublicContext | None = None
        self.refusals: list[str] = []
        self._plan_digest = ""

    def handle(self, operation: str, body: bytes) -> bytes | None:
        try:
            return self._answer(operation, body)
        except FedCollmError as error:
            self.refusals.append(f"{operation}: {error}")
            return None

    def _answer(self, operation: str, body: bytes) -> bytes:
        contributor = self.contributor
        if operation == "advertise":
            return encode(contributor.advertise(decode(body, SignedPlan)))
        if operation == "share":
            return encode(contributor.share(decode(body, PeerKeys)))
        if operation == "accept":
            request = decode(body, PeerShares)
            self._plan_digest = request.plan_digest
            return encode(contributor.accept_shares(request))
        if operation == "part":
            return encode(contributor.part(decode(body, PartRequest)))
        if operation == "agree":
            return encode(contributor.agree(decode(body, SurvivorSet)))
        if operation == "unmask":
            return encode(contributor.unmask(decode(body, UnmaskRequest)))
        raise ProtocolError(f"unknown operation {operation!r}")

    def upload(self, context: PublicContext) -> UploadManifest | None:
        try:
            plan = self.contributor.ready(self._plan_digest)
            return self.contributor.upload(QuantizedUpdate(plan=plan, grid=self.grid), context)
        except FedCollmError as error:
            self.refusals.append(f"upload: {error}")
            return None


# Given operation, site and the honest answer, what the server gets instead.
Bend = Callable[[str, str, bytes | None], bytes | None]


@dataclass
class BentChannel:
    """Asks participants in turn; ``bend`` may drop or change requests and answers, ``log`` keeps all that passed."""

    participants: Mapping[str, Participant]
    bend: Bend = lambda operation, site, body: body
    bend_request: Bend = lambda operation, site, body: body
    log: list[tuple[str, str, bytes | None]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.participants)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Answer]:
        for site, body in bodies.items():
            asked = self.bend_request(operation, site, body)
            honest = None if asked is None else self.participants[site].handle(operation, asked)
            answer = self.bend(operation, site, honest)
            self.log.append((operation, site, answer))
            yield Answer(site=site, body=answer, code=None if answer is not None else "declined")


@dataclass
class Round:
    """One federation for secure sums; `run` makes a round of it."""

    parties: Parties
    participants: dict[str, Participant]
    channel: BentChannel
    secure_sum: MaskedSum
    context: PublicContext | None = None
    plan: RoundPlan | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        folder: Path,
        grids: Sequence[Grid],
        *,
        policy: SumPolicy | None = None,
        clock: Callable[[], float] = lambda: NOW,
        aggregator: Aggregator | None = None,
    ) -> Round:
        parties = Parties.of(len(grids))
        chosen = policy or SumPolicy(min_contributors=3, max_colluding=0)
        participants = {
            name: Participant(
                Contributor(
                    key=key,
                    roster=parties.roster,
                    policy=chosen,
                    journal=RoundJournal(folder / f"{name}.sqlite"),
                    clock=clock,
                ),
                grid,
            )
            for (name, key), grid in zip(parties.sites.items(), grids, strict=True)
        }
        channel = BentChannel(participants)
        events: list[tuple[str, dict[str, Any]]] = []
        secure_sum = MaskedSum(
            aggregator=aggregator or Aggregator(time_limit_s=60),
            decryptor=Decryptor(parties.roster),
            key=parties.server,
            roster=parties.roster,
            channel=channel,
            witness=lambda event, **facts: events.append((event, facts)),
        )
        return cls(parties=parties, participants=participants, channel=channel, secure_sum=secure_sum, events=events)

    def begin(self, **changes: Any) -> RoundPlan:
        sites, bits = len(self.participants), changes.get("value_bits", 13)
        self.context = self.secure_sum.begin(contributors=sites, value_bits=bits)
        defaults = {
            "dimension": len(next(iter(self.participants.values())).grid),
            "max_contributors": sites,
            "roster_digest": self.parties.roster.digest,
            "key_digest": self.context.digest,
        }
        self.plan = round_plan(**(defaults | changes))
        return self.plan

    def manifests(self, ready: Sequence[str]) -> Iterator[UploadManifest]:
        """Every ready site's upload, announced in turn."""
        assert self.context is not None
        for site in ready:
            manifest = self.participants[site].upload(self.context)
            answer = self.channel.bend("upload", site, None if manifest is None else encode(manifest))
            if answer is not None:
                yield decode(answer, UploadManifest)

    def run(self, **changes: Any) -> OpenedSum:
        """A whole round over the channel.

        Raises:
            RoundLost: as the secure sum does.
        """
        plan = self.begin(**changes)
        return self.secure_sum.open(self.manifests(self.secure_sum.enrol(plan)))

    def close(self) -> None:
        self.secure_sum.close()


def random_grids(sites: int, dimension: int, value_bits: int = 13, seed: int = 0) -> list[Grid]:
    """Uniform grids, int32 [dimension] each."""
    levels = 2 ** (value_bits - 1) - 1
    rng = np.random.default_rng(seed)
    return list(rng.integers(-levels, levels + 1, (sites, dimension)).astype(np.int32))
