"""The seam of the round: masked, encrypted uploads in, the exact integer sum out, nothing else.

`MaskedSum` leads the sites through the protocol over the channel it was built with; the round sees four calls::

    begin -> enrol (advertise, share, accept) -> open (add uploads, agree, unmask, decrypt) -> close
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Protocol

import numpy as np

from fedcollm_privacy import coordinator
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ciphertext_sum import Words, words_of
from fedcollm_privacy.ckks import CkksParameters, PublicContext, parameters_for
from fedcollm_privacy.coordinator import Agreed, Answer, Sharing, Surviving
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import OpeningRefused, ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.masks import MaskSum, subtract_mod
from fedcollm_privacy.messages import OpenedSum, RoundPlan, SealedSum
from fedcollm_privacy.ranks import exposed_sites
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum_messages import (
    PART_CHUNKS,
    PartRequest,
    UploadManifest,
    UploadPart,
    sign_plan,
    verify,
)
from fedcollm_privacy.wire import decode, encode

__all__ = ["Channel", "MaskedSum", "SecureSum"]

_PART_TRIES = 3


class Channel(Protocol):
    """How the sites are asked; `secure_fedcollm.transport.Transport` is one."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Answer]:
        """Send each named site its body; yield one answer a site, as they arrive."""


class SecureSum(Protocol):
    """Opens the sum of a round's uploads and nothing else."""

    @property
    def rejected(self) -> Mapping[str, str]:
        """Sites that are not in the last round's sum, each with a code."""

    def begin(self, *, contributors: int, value_bits: int) -> PublicContext:
        """Make the round's key, before the plan, which binds its digest.

        Args:
            contributors: n, the most updates that the sum may hold.
            value_bits: signed bits per coordinate.

        Raises:
            InvalidValue: the sum of so many could not be proven exact.
        """

    def enrol(self, plan: RoundPlan) -> tuple[str, ...]:
        """Find out who takes part, and let those exchange keys and shares.

        Returns:
            The sites that are ready to train.

        Raises:
            RoundLost: too few sites take part.
        """

    def open(self, uploads: Iterable[UploadManifest]) -> OpenedSum:
        """Take the uploads as they are announced and open their sum; one attempt per `begin`.

        A malformed upload leaves its site out (`rejected`); the cohort of the result tells who is in.

        Raises:
            RoundLost: fewer than t or k are left in any phase, the aggregator failed, or the opening was refused. The
                key is gone; the next round starts with `begin`.
        """

    def close(self) -> None:
        """Destroy keys and end processes."""


class MaskedSum:
    """CKKS under masks: the aggregator adds without a key, and not even the key holder can open less than the sum.

    Args:
        aggregator: the keyless process.
        decryptor: holds the round's key.
        key: the server's identity, which signs plans.
        roster: of server and sites.
        channel: to the sites.
        witness: told of every signed step, for the transcript; gets an event's name and its facts.
    """

    def __init__(
        self,
        *,
        aggregator: Aggregator,
        decryptor: Decryptor,
        key: SigningKey,
        roster: Roster,
        channel: Channel,
        witness: Callable[..., None],
    ) -> None:
        self._aggregator, self._decryptor, self._key = aggregator, decryptor, key
        self._roster, self._channel, self._witness = roster, channel, witness
        self._sharing: Sharing | None = None
        self._rejected: dict[str, str] = {}

    @property
    def rejected(self) -> Mapping[str, str]:
        """Sites that are not in the last round's sum, each with a code."""
        return MappingProxyType(self._rejected)

    def begin(self, *, contributors: int, value_bits: int) -> PublicContext:
        """Make the round's key; see `SecureSum.begin`."""
        self._sharing, self._rejected = None, {}
        parameters: CkksParameters = parameters_for(contributors, value_bits)
        return self._decryptor.new_round_key(parameters)

    def enrol(self, plan: RoundPlan) -> tuple[str, ...]:
        """Sign the plan, gather keys, pass shares on; see `SecureSum.enrol`."""
        signed_plan = sign_plan(plan, self._key)
        self._witness("signed_plan", plan=plan.digest, signature=signed_plan.signature.hex())
        enrolled = False
        try:
            answers = self._ask("advertise", self._channel.sites, encode(signed_plan))
            keys = coordinator.enrol(plan, self._roster, answers)
            sharing = coordinator.share(keys, self._ask("share", tuple(keys.keys), encode(keys.request)))
            boxes = {site: encode(sharing.addressed_to(site)) for site in sharing.sharers}
            ready, self._rejected = coordinator.ready(sharing, self._channel.ask("accept", boxes))
            enrolled = True
        finally:
            if not enrolled:
                self._decryptor.destroy_key()
        self._sharing = sharing
        self._witness("enrolled", plan=plan.digest, keys=keys.digest, sites=list(sharing.sharers))
        return ready

    def open(self, uploads: Iterable[UploadManifest]) -> OpenedSum:
        """Add, agree, unmask, decrypt; see `SecureSum.open`."""
        if self._sharing is None:
            raise ProtocolError("nobody was enrolled in this round; call begin and enrol first")
        sharing, self._sharing = self._sharing, None
        plan = sharing.enrolled.plan
        try:
            added = self._add(sharing, uploads)
            if exposed := exposed_sites(plan, added):
                self._rejected |= dict.fromkeys(exposed, "too few sites of its rank")
                added = self._added_again(plan, {site: m for site, m in added.items() if site not in exposed})
            surviving = Surviving.of(sharing, added)
            survivors = surviving.survivors
            answers = self._ask("agree", survivors.survivors, encode(survivors))
            agreed = coordinator.agree(surviving, answers)
            signatures = {site: agreement.signature.hex() for site, agreement in agreed.agreements.items()}
            self._witness(
                "agreed", plan=plan.digest, survivors=survivors.digest, set=asdict(survivors), signatures=signatures
            )
            answers = self._ask("unmask", tuple(agreed.agreements), encode(agreed.request))
            masks, wrong = coordinator.remaining_masks(agreed, answers)
            if agreed.failed or wrong:
                self._witness("faults", plan=plan.digest, sites={**agreed.failed, **wrong})
            opened = self._decryptor.open_sum(plan, self._sealed_sum(agreed, masks))
            self._witness("summed", plan=plan.digest, cohort=list(opened.cohort), total=opened.total_digest)
        except OpeningRefused as error:
            raise RoundLost(str(error)) from error
        finally:
            self._decryptor.destroy_key()
        absent = dict.fromkeys(self._channel.sites, "sent no upload") | self._rejected
        self._rejected = {site: code for site, code in absent.items() if site not in opened.cohort}
        return opened

    def close(self) -> None:
        """Destroy the key and end the aggregator's process."""
        self._decryptor.destroy_key()
        self._aggregator.close()

    def _ask(self, operation: str, sites: Iterable[str], body: bytes) -> Iterator[Answer]:
        return self._channel.ask(operation, dict.fromkeys(sites, body))

    def _add(self, sharing: Sharing, uploads: Iterable[UploadManifest]) -> dict[str, UploadManifest]:
        plan = sharing.enrolled.plan
        added: dict[str, UploadManifest] = {}
        self._aggregator.begin(plan, self._roster)
        for manifest in uploads:
            if not self._signed_by_sharer(manifest, sharing):
                continue  # whoever stands in it has not said it
            if manifest.keys_digest != sharing.enrolled.digest or manifest.peers != sharing.sharers:
                self._rejected[manifest.site] = "masked for another view"
                continue
            try:
                self._aggregator.add(manifest, self._chunks(plan, manifest.site))
            except UploadRefused as refusal:
                self._rejected.setdefault(refusal.site, refusal.code)
            except RoundLost:
                self._rejected[manifest.site] = "crashed_the_aggregator"
                added = self._added_again(plan, added)
            else:
                added[manifest.site] = manifest
        return added

    def _signed_by_sharer(self, manifest: UploadManifest, sharing: Sharing) -> bool:
        if manifest.site not in sharing.sharers:
            return False
        try:
            verify(manifest, self._roster.site(manifest.site), sharing.enrolled.plan.digest)
        except ProtocolError:
            return False
        return True

    def _added_again(self, plan: RoundPlan, known: Mapping[str, UploadManifest]) -> dict[str, UploadManifest]:
        """After a crash: a fresh process, and the uploads that were in. Whoever brings it down again stays out too."""
        left = dict(known)
        while True:
            self._aggregator.begin(plan, self._roster)
            for site, manifest in list(left.items()):
                try:
                    self._aggregator.add(manifest, self._chunks(plan, site))
                except UploadRefused as refusal:
                    self._rejected[site] = refusal.code
                    del left[site]
                except RoundLost:
                    self._rejected[site] = "crashed_the_aggregator"
                    del left[site]
                    break
            else:
                return left

    def _chunks(self, plan: RoundPlan, site: str) -> Iterator[bytes]:
        """An upload's chunks, part by part; ends early where the site gives no more."""
        count = plan.ckks.chunk_count(plan.dimension)
        for first in range(0, count, PART_CHUNKS):
            request = PartRequest(plan_digest=plan.digest, first=first, count=min(PART_CHUNKS, count - first))
            part = self._part(site, request)
            if part is None:
                return
            yield from part.chunks

    def _part(self, site: str, request: PartRequest) -> UploadPart | None:
        for _ in range(_PART_TRIES):
            for answer in self._ask("part", (site,), encode(request)):
                try:
                    part = decode(answer.body or b"", UploadPart)
                except ProtocolError:
                    continue
                given = (part.site, part.plan_digest, part.first, len(part.chunks))
                if given == (site, request.plan_digest, request.first, request.count):
                    return part
        return None

    def _sealed_sum(self, agreed: Agreed, masks: MaskSum) -> SealedSum:
        survivors = agreed.surviving.survivors
        plan = agreed.surviving.sharing.enrolled.plan
        return SealedSum(
            plan_digest=plan.digest,
            cohort=survivors.survivors,
            survivors=encode(survivors),
            agreements=tuple(encode(agreement) for agreement in agreed.agreements.values()),
            chunks=_unmasked(self._aggregator.finish(), masks, plan),
        )


def _unmasked(chunks: Iterable[bytes], masks: MaskSum, plan: RoundPlan) -> Iterator[Words]:
    for index, chunk in enumerate(chunks):
        words_2N = words_of(chunk, plan.ckks)
        opened_N = subtract_mod(words_2N[0], masks.chunk(index, words_2N.shape[1]), plan.ckks.modulus)
        yield np.stack([opened_N, words_2N[1]])
