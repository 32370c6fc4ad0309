"""Noisy sums of an audit's sites through the secure sum as it ships: masks, signatures, CKKS, the aggregator's process.

All parties run here, with keys made for the purpose, so nothing is secret from the auditor; what is shown is that the
number that comes out is the exact sum, and what that number tells.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcollm_audits.one_run import Opened, grids_added
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import parameters_for
from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import FedCollmError, ProtocolError, SiteFailed
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.quantization import on_grid
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
)
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.transport import Handler, InProcessTransport

__all__ = ["honest_part", "real_secure_sum", "smallest_round"]

_AN_HOUR = 3600
_NOBODY = "0" * 64
_LARGEST_MEAN = 1e12


def smallest_round(plan: DpPlan, *, dimension: int, value_bits: int = 18) -> RoundPlan:
    """The round in which the plan's claim for sums has least room: just ``plan.least_honest`` honest sites.

    A sum has three sites at least and the protocol an honest majority of its threshold; where that takes more sites
    than are honest, the others collude.

    Args:
        plan: of every site, with ``release="gradient"``.
        dimension: parameters.
        value_bits: of the round's grid, as in the run's configuration.

    Raises:
        InvalidValue: an argument is out of range.
    """
    sites = max(3, plan.least_honest)
    colluding = 1 if sites > plan.least_honest else 0
    return RoundPlan(
        run_id="audit",
        server_round=1,
        attempt=1,
        spec_digest=_NOBODY,
        adapter_digest=_NOBODY,
        dimension=dimension,
        clip=plan.gradient_clip,
        value_bits=value_bits,
        min_contributors=sites,
        max_contributors=sites,
        threshold=(sites + colluding) // 2 + 1,
        max_colluding=colluding,
        roster_digest=_NOBODY,
        ckks=parameters_for(sites, value_bits),
        key_digest=_NOBODY,
        max_mean_norm=_LARGEST_MEAN,
        nonce="00",
        expires_at=int(time.time()) + _AN_HOUR,
        dp=plan.terms,
        release="gradient",
        noise_multiplier=plan.noise_multiplier,
        least_honest=plan.least_honest,
    )


def honest_part(opened: Opened) -> Opened:
    """What is left of an opened sum to colluders, who know what they put in: the first ``least_honest`` sites' part."""

    def remains(plan: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
        total = opened(plan, sums)
        colluders = sums[plan.least_honest :]
        return total - grids_added(plan, colluders) if colluders else total

    return remains


def _handler(site: Contributor) -> Handler:
    """Answers as `secure_fedcollm.site.Site` does, without its training."""
    answers: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
        "advertise": (SignedPlan, site.advertise),
        "share": (PeerKeys, site.share),
        "accept": (PeerShares, site.accept_shares),
        "part": (PartRequest, site.part),
        "agree": (SurvivorSet, site.agree),
        "unmask": (UnmaskRequest, site.unmask),
    }

    def handle(operation: str, body: bytes) -> bytes:
        kind, answer = answers[operation]
        try:
            return encode(answer(decode(body, kind)))
        except FedCollmError as error:
            raise SiteFailed(site.name, "declined") from error

    return handle


@contextmanager
def real_secure_sum(round_plan: RoundPlan) -> Iterator[Opened]:
    """A federation of ``round_plan.max_contributors`` sites; gives what opens their sums, a round a call.

    Every opened sum is compared with the sum of what went in.

    Raises:
        ProtocolError: from a call: the decryptor gave out another number than the exact sum.
        RoundLost: from a call: no sum was opened.
    """
    server = SigningKey.generate("server")
    keys = [SigningKey.generate(f"site-{number:03d}") for number in range(round_plan.max_contributors)]
    roster = Roster(
        federation="audit",
        server=server.public,
        sites=tuple(key.public for key in keys),
        valid_until=int(time.time()) + 2 * _AN_HOUR,
    )
    policy = SumPolicy(min_contributors=round_plan.min_contributors, max_colluding=round_plan.max_colluding)
    with TemporaryDirectory() as folder:
        contributors = {
            key.name: Contributor(
                key=key, roster=roster, policy=policy, journal=RoundJournal(Path(folder) / f"{key.name}.sqlite")
            )
            for key in keys
        }
        secure_sum = MaskedSum(
            aggregator=Aggregator(),
            decryptor=Decryptor(roster),
            key=server,
            roster=roster,
            channel=InProcessTransport({name: _handler(site) for name, site in contributors.items()}),
            witness=lambda event, **facts: None,
        )
        rounds = 0

        def opened(asked: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
            nonlocal rounds
            rounds += 1
            context = secure_sum.begin(contributors=asked.max_contributors, value_bits=asked.value_bits)
            plan = replace(
                asked,
                server_round=rounds,
                roster_digest=roster.digest,
                key_digest=context.digest,
                nonce=os.urandom(16).hex(),
                expires_at=int(time.time()) + _AN_HOUR,
            )
            noisy = dict(zip(contributors, sums, strict=True))

            def uploads() -> Iterator[UploadManifest]:
                for name in ready:
                    site = contributors[name]
                    yield site.upload(on_grid(noisy[name], site.ready(plan.digest)), context)

            ready = secure_sum.enrol(plan)
            total = secure_sum.open(uploads()).total
            if not np.array_equal(total, grids_added(asked, sums)):
                raise ProtocolError("the secure sum opened another number than the exact sum of the sites' uploads")
            return total

        try:
            yield opened
        finally:
            secure_sum.close()
