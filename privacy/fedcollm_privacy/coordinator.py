"""The server's part in the secure sum: who takes part, who survived, and what masks are left to take away.

Stage by stage, each function takes the stage before and what the sites answered, checks every signature, and gives the
next frozen stage::

    Enrolled (U1: keys) -> Sharing (U2: shares) -> Surviving (U3: uploads) -> Agreed (signatures) -> MaskSum

A site whose answer is missing or wrong is left out and named in `failed`; too few sites lose the round. What comes out
at the end are the masks of exactly the agreed sum: self masks of the survivors, and their pair masks with sites that
were lost. No single upload can be opened with them (`fedcollm_privacy.contributor` says why).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcollm_privacy import masks, shares
from fedcollm_privacy.errors import InvalidValue, ProtocolError, RoundLost
from fedcollm_privacy.messages import RoundPlan
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum_messages import (
    Advertisement,
    Agreement,
    PeerKeys,
    PeerShares,
    Ready,
    SealedShare,
    SealedShares,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    UploadManifest,
    keys_digest,
    verify,
)
from fedcollm_privacy.wire import decode, encode

__all__ = [
    "Agreed",
    "Answer",
    "Enrolled",
    "Sharing",
    "Surviving",
    "agree",
    "enrol",
    "ready",
    "remaining_masks",
    "share",
]


class Answer(Protocol):
    """What came back from one site: a body, or the code of why there is none."""

    @property
    def site(self) -> str:
        """The site that was asked."""

    @property
    def body(self) -> bytes | None:
        """Its message."""

    @property
    def code(self) -> str | None:
        """Why there is no message."""


M = TypeVar("M", Advertisement, Agreement, UnmaskShares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """U1: the sites that accepted the plan, with their keys.

    Attributes:
        plan: the round's plan.
        roster: the identities.
        keys: advertisements by site, sorted by site.
        failed: why each other site is not in, by site.
    """

    plan: RoundPlan
    roster: Roster
    keys: Mapping[str, Advertisement]
    failed: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all keys: the one view that all sites must share."""
        return keys_digest(tuple(self.keys.values()))

    @property
    def request(self) -> PeerKeys:
        """What every site in it is told."""
        advertisements = tuple(encode(advertisement) for advertisement in self.keys.values())
        return PeerKeys(plan_digest=self.plan.digest, advertisements=advertisements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """U2: the sites that gave everybody in U1 a share; all masks are among these."""

    enrolled: Enrolled
    shares: Mapping[str, Mapping[str, SealedShare]]  # by sender, then receiver
    failed: Mapping[str, str]

    @property
    def sharers(self) -> tuple[str, ...]:
        """The sites, sorted."""
        return tuple(self.shares)

    def addressed_to(self, site: str) -> PeerShares:
        """The shares that this site is to get, its own among them."""
        addressed = tuple(encode(of_sender[site]) for of_sender in self.shares.values())
        return PeerShares(plan_digest=self.enrolled.plan.digest, shares=addressed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surviving:
    """U3: the sites whose uploads are in the sum."""

    sharing: Sharing
    survivors: SurvivorSet

    @classmethod
    def of(cls, sharing: Sharing, manifests: Mapping[str, UploadManifest]) -> Surviving:
        """The set to agree on, from the manifests of the uploads in the sum.

        Raises:
            RoundLost: fewer than t or k.
        """
        enrolled, survivors = sharing.enrolled, tuple(sorted(manifests))
        _require_enough(enrolled.plan, survivors, "sound uploads", sharing.failed)
        chosen = SurvivorSet(
            plan_digest=enrolled.plan.digest,
            keys_digest=enrolled.digest,
            sharers=sharing.sharers,
            survivors=survivors,
            upload_digests=tuple(manifests[site].digest for site in survivors),
        )
        return cls(sharing=sharing, survivors=chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The survivor set with the signatures of at least t survivors under it."""

    surviving: Surviving
    agreements: Mapping[str, Agreement]
    failed: Mapping[str, str]

    @property
    def request(self) -> UnmaskRequest:
        """What every site that agreed is asked next."""
        survivors = self.surviving.survivors
        agreements = tuple(encode(agreement) for agreement in self.agreements.values())
        return UnmaskRequest(
            plan_digest=survivors.plan_digest, survivors_digest=survivors.digest, agreements=agreements
        )


def enrol(plan: RoundPlan, roster: Roster, answers: Iterable[Answer]) -> Enrolled:
    """U1 from the sites' answers to the plan.

    Raises:
        RoundLost: fewer than t or k sites take part.
    """
    messages, failed = _sound(answers, Advertisement, plan, roster)
    keys = {}
    for site, advertisement in sorted(messages.items()):
        try:  # a point of low order would make every other site refuse, after it has trained
            for point in (advertisement.share_key, advertisement.mask_key):
                masks.agree(X25519PrivateKey.generate(), point)
        except ProtocolError:
            failed[site] = "unusable keys"
        else:
            keys[site] = advertisement
    _require_enough(plan, tuple(keys), "sites accept the plan", failed)
    if len(keys) > plan.max_contributors:
        raise RoundLost(f"{len(keys)} sites accept a plan for {plan.max_contributors}; plan the round for all of them")
    return Enrolled(plan=plan, roster=roster, keys=keys, failed=failed)


def share(enrolled: Enrolled, answers: Iterable[Answer]) -> Sharing:
    """U2 from the sites' answers to the keys: each must hold exactly one share for everybody in U1.

    Raises:
        RoundLost: fewer than t or k sites shared.
    """
    plan, failed, view, plan_digest = enrolled.plan, dict(enrolled.failed), enrolled.digest, enrolled.plan.digest
    found: dict[str, dict[str, SealedShare]] = {}
    for answer in answers:
        try:
            bundle = decode(_body(answer), SealedShares)
            of_sender = {}
            for raw in bundle.shares:
                sealed = decode(raw, SealedShare)
                verify(sealed, enrolled.roster.site(answer.site), plan_digest)
                of_sender[sealed.receiver] = sealed
            one_view = {sealed.keys_digest for sealed in of_sender.values()} == {view}
            one_seed = len({sealed.seed_commitment for sealed in of_sender.values()}) == 1
            complete = set(of_sender) == set(enrolled.keys) and len(bundle.shares) == len(of_sender)
            if not (one_view and one_seed and complete):
                raise ProtocolError("not one share for each site under one view")
        except _Missing as missing:
            failed[answer.site] = str(missing)
        except ProtocolError:
            failed[answer.site] = "malformed shares"
        else:
            found[answer.site] = of_sender
    sharers = dict(sorted(found.items()))
    failed |= {site: "sent no shares" for site in enrolled.keys if site not in sharers and site not in failed}
    _require_enough(plan, tuple(sharers), "sites shared their secrets", failed)
    return Sharing(enrolled=enrolled, shares=sharers, failed=failed)


def ready(sharing: Sharing, answers: Iterable[Answer]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sites that hold their shares and may train, and why others may not; asked before any budget is spent.

    Raises:
        RoundLost: fewer than t or k are ready, or of some site fewer than t hold good shares: its masks could never be
            taken away.
    """
    plan, failed = sharing.enrolled.plan, dict(sharing.failed)
    found: dict[str, Ready] = {}
    for answer in answers:
        try:
            message = decode(_body(answer), Ready)
        except _Missing as missing:
            failed[answer.site] = str(missing)
        except ProtocolError:
            failed[answer.site] = "malformed"
        else:
            if (message.site, message.plan_digest) == (answer.site, plan.digest):
                found[answer.site] = message
    _require_enough(plan, tuple(found), "sites are ready", failed)
    for dealer in sharing.sharers:
        good = sum(dealer not in message.unusable for message in found.values())
        if good < plan.threshold:
            raise RoundLost(f"only {good} sites hold good shares of site {dealer}; {plan.threshold} are needed")
    return tuple(sorted(found)), failed


def agree(surviving: Surviving, answers: Iterable[Answer]) -> Agreed:
    """The survivors' signatures under their set.

    Raises:
        RoundLost: fewer than t or k signed it.
    """
    enrolled, survivors = surviving.sharing.enrolled, surviving.survivors
    messages, failed = _sound(answers, Agreement, enrolled.plan, enrolled.roster)
    agreements, digest = {}, survivors.digest
    for site, agreement in sorted(messages.items()):
        if site in survivors.survivors and agreement.survivors_digest == digest:
            agreements[site] = agreement
        else:
            failed[site] = "signed another survivor set"
    _require_enough(enrolled.plan, tuple(agreements), "sites agreed on the survivors", failed)
    return Agreed(surviving=surviving, agreements=agreements, failed=failed)


def remaining_masks(agreed: Agreed, answers: Iterable[Answer]) -> tuple[masks.MaskSum, dict[str, str]]:
    """What is left on the survivors' sum, from at least t sites' shares; to be subtracted. And who answered wrongly.

    A revealed share that is not what its dealer committed to is dropped, so a lying site costs its own share only.

    Raises:
        RoundLost: of some secret there are fewer than t good shares, or its dealer had dealt wrong ones.
    """
    sharing, survivors = agreed.surviving.sharing, agreed.surviving.survivors
    plan, keys, agreed_on = sharing.enrolled.plan, sharing.enrolled.keys, survivors.digest
    messages, failed = _sound(answers, UnmaskShares, plan, sharing.enrolled.roster)
    lost = tuple(site for site in survivors.sharers if site not in survivors.survivors)
    of_seeds: dict[str, dict[str, bytes]] = {site: {} for site in survivors.survivors}
    of_keys: dict[str, dict[str, bytes]] = {site: {} for site in lost}
    for holder, message in sorted(messages.items()):
        if holder not in survivors.survivors or message.survivors_digest != agreed_on:
            failed[holder] = "shares for another survivor set"
            continue
        for role, found, names, values in (
            ("self", of_seeds, message.self_of, message.self_shares),
            ("mask", of_keys, message.mask_of, message.mask_shares),
        ):
            for dealer, value in zip(names, values, strict=True):
                if dealer in found and _is_committed(sharing.shares[dealer][holder], role, value):
                    found[dealer][holder] = value
                else:
                    failed[holder] = f"a wrong share of site {dealer}"
    try:
        seeds = shares.join_many(of_seeds, threshold=plan.threshold, holders=tuple(keys))
        private = shares.join_many(of_keys, threshold=plan.threshold, holders=tuple(keys))
    except ProtocolError as error:
        raise RoundLost(f"the masks cannot be taken away: {error}{_left_out(failed)}; nothing was opened") from error
    return masks.MaskSum(_terms(sharing, survivors.survivors, seeds, private), plan.ckks.modulus), failed


def _terms(
    sharing: Sharing, survivors: tuple[str, ...], seeds: Mapping[str, bytes], private: Mapping[str, bytes]
) -> list[tuple[bytes, int]]:
    digest, keys = sharing.enrolled.plan.digest, sharing.enrolled.keys
    terms = []
    for site, seed in seeds.items():
        dealt = next(iter(sharing.shares[site].values()))
        if shares.commit(seed, digest, "seed", site) != dealt.seed_commitment:
            raise RoundLost(f"site {site} dealt shares that are not of the seed it committed to; nothing was opened")
        terms.append((masks.self_mask_key(seed, digest, site), 1))
    for site, raw in private.items():
        key = X25519PrivateKey.from_private_bytes(raw)
        if key.public_key().public_bytes_raw() != keys[site].mask_key:
            raise RoundLost(f"site {site} dealt shares that are not of the key it advertised; nothing was opened")
        for survivor in survivors:
            secret = masks.agree(key, keys[survivor].mask_key)
            # As the survivor added it.
            terms.append((masks.pair_mask_key(secret, digest, survivor, site), 1 if survivor < site else -1))
    return terms


def _is_committed(dealt: SealedShare, role: str, value: bytes) -> bool:
    committed = dealt.self_commitment if role == "self" else dealt.mask_commitment
    try:
        return shares.commit(value, dealt.plan_digest, role, dealt.site, dealt.receiver) == committed
    except InvalidValue:
        return False


class _Missing(Exception):
    """A site gave no answer; the text is its code."""


def _body(answer: Answer) -> bytes:
    if answer.body is None:
        raise _Missing(answer.code or "failed")
    return answer.body


def _sound(
    answers: Iterable[Answer], kind: type[M], plan: RoundPlan, roster: Roster
) -> tuple[dict[str, M], dict[str, str]]:
    """The answers that are of this round and signed by the site that was asked, and why others are not, by site."""
    found: dict[str, M] = {}
    failed: dict[str, str] = {}
    plan_digest = plan.digest
    for answer in answers:
        try:
            message = decode(_body(answer), kind)
            verify(message, roster.site(answer.site), plan_digest)
        except _Missing as missing:
            failed[answer.site] = str(missing)
        except ProtocolError:
            failed[answer.site] = "malformed or wrongly signed"
        else:
            found[answer.site] = message
    return found, failed


def _require_enough(plan: RoundPlan, sites: tuple[str, ...], what: str, failed: Mapping[str, str]) -> None:
    needed = max(plan.threshold, plan.min_contributors)
    if len(sites) < needed:
        raise RoundLost(f"{len(sites)} {what}; at least {needed} are needed{_left_out(failed)}; nothing was opened")


def _left_out(failed: Mapping[str, str]) -> str:
    named = ", ".join(f"{site}: {code}" for site, code in sorted(failed.items()))
    return f" (left out: {named})" if named else ""
