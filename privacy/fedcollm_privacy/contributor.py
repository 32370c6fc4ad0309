"""A site's part in the secure sum (Bonawitz et al. 2017, figure 4, the variant against a malicious server).

One object a site, over all rounds. Its state is one of the frozen types below, and every call demands the one before::

    advertise -> share -> accept_shares -> upload (-> part, as often as asked) -> agree -> unmask

What a site insists on, whatever the server says: a plan signed by the pinned server for the pinned roster and not
weaker than its own policy; keys signed by their owners; one view of who takes part; its own upload in the set; at
least k survivors; the signatures of at least t of them under the same set; and its shares given once a round, for one
set, one kind of share a peer, written down before they go out. Whatever fails, it answers nothing.

The secrets of a round live in this object only and go with it: a restarted site is lost to the round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcollm_privacy import _validate
from fedcollm_privacy.ckks import PublicContext
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan
from fedcollm_privacy.peer_shares import Held, RoundKeys, View, mask_terms, open_share, seal_shares
from fedcollm_privacy.ranks import exposed_sites
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.sealing import seal
from fedcollm_privacy.secure_sum_messages import (
    Advertisement,
    Agreement,
    PartRequest,
    PeerKeys,
    PeerShares,
    Ready,
    SealedShare,
    SealedShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    UploadManifest,
    UploadPart,
    keys_digest,
    signed,
    verify,
    verify_plan,
)
from fedcollm_privacy.uploads import Upload
from fedcollm_privacy.wire import decode, encode

__all__ = ["Contributor", "SumPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SumPolicy:
    """What a site demands of every secure sum it takes part in; a plan that offers less is declined.

    Attributes:
        min_contributors: k, the fewest updates in an opened sum, at least 3.
        max_colluding: c, how many other sites may work with the server.
    """

    min_contributors: int
    max_colluding: int

    def __post_init__(self) -> None:
        _validate.integer_at_least(0, max_colluding=self.max_colluding)
        _validate.integer_at_least(max(3, self.max_colluding + 2), min_contributors=self.min_contributors)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advertised:
    plan: RoundPlan
    mine: RoundKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    plan: RoundPlan
    mine: RoundKeys
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    plan: RoundPlan
    mine: RoundKeys
    view: View
    held: Mapping[str, Held]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uploaded:
    plan: RoundPlan
    view: View
    held: Mapping[str, Held]
    upload: Upload
    manifest: UploadManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreed:
    plan: RoundPlan
    uploaded: _Uploaded
    survivors: SurvivorSet


State = TypeVar("State", _Advertised, _Shared, _Ready, _Uploaded, _Agreed)


class Contributor:
    """A site in the secure sum.

    Args:
        key: the site's identity; its public half stands in the roster.
        roster: pinned here, never taken from the server.
        policy: what the site demands.
        journal: its durable memory.
        clock: Unix time in seconds.

    Raises:
        ProtocolError: the roster names another key for this site.
    """

    def __init__(
        self,
        *,
        key: SigningKey,
        roster: Roster,
        policy: SumPolicy,
        journal: RoundJournal,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if roster.site(key.name) != key.public:
            raise ProtocolError(f"the roster names another key for site {key.name} than the one at hand")
        self._key, self._roster, self._policy, self._journal, self._clock = key, roster, policy, journal, clock
        self._state: _Advertised | _Shared | _Ready | _Uploaded | _Agreed | None = None

    @property
    def name(self) -> str:
        """The site's public name."""
        return self._key.name

    def check(self, signed_plan: SignedPlan) -> RoundPlan:
        """The plan, if this site's policy allows it; nothing is kept yet.

        Raises:
            ProtocolError: the signature is not the pinned server's, the roster is another one or has expired, the plan
                has expired, or is weaker than the policy.
            InvalidValue: a sum under this plan could overflow.
        """
        plan = verify_plan(signed_plan, self._roster.server)
        self._roster.require_valid(self._clock())
        self._require_time(plan)
        if plan.roster_digest != self._roster.digest:
            raise ProtocolError("the round plan is for another roster than the one pinned here")
        for name in ("min_contributors", "max_colluding"):
            asked, allowed = getattr(plan, name), getattr(self._policy, name)
            if asked < allowed:
                raise ProtocolError(f"the round plan's {name} is {asked}; this site's policy demands {allowed}")
        plan.ckks.prove(plan.max_contributors, plan.value_bits)
        return plan

    def advertise(self, signed_plan: SignedPlan) -> Advertisement:
        """Take part in a round: two fresh keys, signed. Whatever round was under way here is given up.

        Raises:
            ProtocolError: as `check`, or the plan was answered before.
        """
        plan = self.check(signed_plan)
        self._journal.accept(plan)
        self.forget()
        share_key, mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        advertisement = Advertisement(
            plan_digest=plan.digest,
            site=self.name,
            share_key=share_key.public_key().public_bytes_raw(),
            mask_key=mask_key.public_key().public_bytes_raw(),
        )
        advertisement = signed(advertisement, self._key)
        mine = RoundKeys(share_key=share_key, mask_key=mask_key, advertisement=advertisement)
        self._state = _Advertised(plan=plan, mine=mine)
        return advertisement

    def share(self, request: PeerKeys) -> SealedShares:
        """Give every site that advertised its shares of this site's two secrets.

        Raises:
            ProtocolError: a key is not its owner's, this site's own is missing or altered, a site stands twice, or they
                are fewer than t or k or more than n.
        """
        state = self._require(_Advertised, request.plan_digest)
        plan = state.plan
        keys: dict[str, Advertisement] = {}
        for raw in request.advertisements:
            advertisement = decode(raw, Advertisement)
            verify(advertisement, self._roster.site(advertisement.site), request.plan_digest)
            if advertisement.site in keys:
                raise ProtocolError(f"site {advertisement.site} stands twice among the keys")
            keys[advertisement.site] = advertisement
        if keys.get(self.name) != state.mine.advertisement:
            raise ProtocolError("this site's own keys are missing or altered")
        self._require_enough(plan, len(keys), "sites that advertised")
        if len(keys) > plan.max_contributors:
            raise ProtocolError(f"{len(keys)} sites advertised; the plan allows {plan.max_contributors}")
        view = View(keys=keys, digest=keys_digest(tuple(keys.values())), seed=os.urandom(32))
        sealed = tuple(encode(signed(s, self._key)) for s in seal_shares(state.mine, view, plan.threshold))
        self._state = _Shared(plan=plan, mine=state.mine, view=view)
        return SealedShares(plan_digest=plan.digest, site=self.name, shares=sealed)

    def accept_shares(self, request: PeerShares) -> Ready:
        """Take the shares that others sealed for this site; their senders are the peers it will mask for.

        Raises:
            ProtocolError: a share is another round's, receiver's or view's, is not signed by its sender, stands twice,
                or they are fewer than t or k, or this site's own is missing.
        """
        state = self._require(_Shared, request.plan_digest)
        held: dict[str, Held] = {}
        for raw in request.shares:
            share = decode(raw, SealedShare)
            verify(share, self._roster.site(share.site), request.plan_digest)
            if share.receiver != self.name or share.keys_digest != state.view.digest:
                raise ProtocolError(f"the share of site {share.site} is for another receiver or another view")
            if share.site in held or share.site not in state.view.keys:
                raise ProtocolError(f"site {share.site} stands twice among the shares, or did not advertise")
            held[share.site] = open_share(state.mine, state.view, share)
        own = held.get(self.name)
        if own is None or own.self_share is None or own.mask_share is None:
            raise ProtocolError("this site's own shares are missing or altered")
        self._require_enough(state.plan, len(held), "sites that shared")
        self._state = _Ready(plan=state.plan, mine=state.mine, view=state.view, held=held)
        unusable = tuple(sorted(s for s, h in held.items() if h.self_share is None or h.mask_share is None))
        return Ready(plan_digest=request.plan_digest, site=self.name, unusable=unusable)

    def ready(self, plan_digest: str) -> RoundPlan:
        """The plan of the round, once this site may train for it.

        Raises:
            ProtocolError: another round is under way here, or none, or it is not ready, or has uploaded.
        """
        return self._require(_Ready, plan_digest).plan

    def upload(self, update: QuantizedUpdate, context: PublicContext) -> UploadManifest:
        """Encrypt and mask the update, once; `part` hands it over.

        Args:
            update: the site's private update on the plan's grid.
            context: the round's public key.

        Raises:
            ProtocolError: the update or the key is of another plan.
        """
        state = self._require(_Ready, update.plan.digest)
        if context.parameters != state.plan.ckks:
            raise ProtocolError("the public key has other parameters than the round plan")
        peers = tuple(sorted(state.held))
        upload = seal(update, context, mask_terms(state.mine, state.view, peers))
        manifest = UploadManifest(
            plan_digest=state.plan.digest,
            keys_digest=state.view.digest,
            site=self.name,
            peers=peers,
            chunk_digests=upload.digests,
        )
        manifest = signed(manifest, self._key)
        self._state = _Uploaded(plan=state.plan, view=state.view, held=state.held, upload=upload, manifest=manifest)
        return manifest

    def part(self, request: PartRequest) -> UploadPart:
        """Some chunks of the upload; the same ones as often as asked.

        Raises:
            ProtocolError: nothing was uploaded in this round, or there are not so many chunks.
        """
        state = self._uploaded(request.plan_digest)
        chunks = state.upload.part(request)
        return UploadPart(plan_digest=state.plan.digest, site=self.name, first=request.first, chunks=chunks)

    def agree(self, request: SurvivorSet) -> Agreement:
        """Sign whose uploads are in the sum; one set a round, on disk before the signature leaves.

        Raises:
            ProtocolError: the set is of another view, holds another upload of this site or none, or fewer than t or k
                sites, or so few of high rank that a part of the sum holds fewer than k; or this site has signed another
                set.
        """
        state = self._uploaded(request.plan_digest)
        if request.keys_digest != state.view.digest or request.sharers != state.manifest.peers:
            raise ProtocolError("the survivor set is of another view of who takes part")
        digests = dict(zip(request.survivors, request.upload_digests, strict=True))
        if digests.get(self.name) != state.manifest.digest:
            raise ProtocolError("this site's upload is missing from the survivor set, or another one stands there")
        self._require_enough(state.plan, len(request.survivors), "survivors")
        if exposed := exposed_sites(state.plan, request.survivors):
            raise ProtocolError(f"too few survivors have ranks as high as site {exposed[0]}; its update would be seen")
        self._journal.sign(state.plan, request.digest)
        self._state = _Agreed(plan=state.plan, uploaded=state, survivors=request)
        agreement = Agreement(plan_digest=state.plan.digest, site=self.name, survivors_digest=request.digest)
        return signed(agreement, self._key)

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Reveal one share a peer, once a round, on disk before it leaves; the round's secrets are dropped.

        Raises:
            ProtocolError: the set is not the one this site signed, an agreement is not of a survivor, on another set or
                wrongly signed, they are fewer than t or k, or the shares were given before.
        """
        state = self._require(_Agreed, request.plan_digest)
        plan, survivors, held = state.plan, state.survivors, state.uploaded.held
        if request.survivors_digest != survivors.digest:
            raise ProtocolError("the unmask request is for another survivor set than the one this site signed")
        agreed = set()
        for raw in request.agreements:
            agreement = decode(raw, Agreement)
            verify(agreement, self._roster.site(agreement.site), request.plan_digest)
            if agreement.survivors_digest != survivors.digest or agreement.site not in survivors.survivors:
                raise ProtocolError(f"site {agreement.site} has not agreed on this survivor set")
            agreed.add(agreement.site)
        self._require_enough(plan, len(agreed), "sites that agreed")
        self._journal.unmask(plan, survivors.digest)
        lost = [peer for peer in survivors.sharers if peer not in survivors.survivors]
        of_seeds = {peer: share for peer in survivors.survivors if (share := held[peer].self_share) is not None}
        of_keys = {peer: share for peer in lost if (share := held[peer].mask_share) is not None}
        self.forget()
        answer = UnmaskShares(
            plan_digest=plan.digest,
            site=self.name,
            survivors_digest=survivors.digest,
            self_of=tuple(of_seeds),
            self_shares=tuple(of_seeds.values()),
            mask_of=tuple(of_keys),
            mask_shares=tuple(of_keys.values()),
        )
        return signed(answer, self._key)

    def forget(self) -> None:
        """Give up the round that is under way: its secrets and its upload are dropped, its journal entries stay."""
        if isinstance(self._state, _Uploaded | _Agreed):
            (self._state.uploaded if isinstance(self._state, _Agreed) else self._state).upload.close()
        self._state = None

    def _uploaded(self, plan_digest: str) -> _Uploaded:
        if isinstance(self._state, _Agreed):
            return self._require(_Agreed, plan_digest).uploaded
        return self._require(_Uploaded, plan_digest)

    def _require(self, kind: type[State], plan_digest: str) -> State:
        state = self._state
        if not isinstance(state, kind) or state.plan.digest != plan_digest:
            raise ProtocolError("a message of another round, out of order, answered before, or after a restart")
        self._require_time(state.plan)
        return state

    def _require_time(self, plan: RoundPlan) -> None:
        now = self._clock()
        if not now < plan.expires_at:
            raise ProtocolError(f"the round plan has expired (at {plan.expires_at}, now {now:.0f}); check the clock")

    @staticmethod
    def _require_enough(plan: RoundPlan, count: int, what: str) -> None:
        needed = max(plan.threshold, plan.min_contributors)
        if count < needed:
            raise ProtocolError(f"{count} {what}; at least {needed} are needed")
