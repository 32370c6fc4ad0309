"""What a site computes for its peers in a secure sum, and from what they sent: sealed shares, opened shares, masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcollm_privacy import masks, shares
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.secure_sum_messages import Advertisement, SealedShare

__all__ = ["Held", "RoundKeys", "View", "mask_terms", "open_share", "seal_shares"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundKeys:
    """A site's two private X25519 keys of one round, and what it advertised of them."""

    share_key: X25519PrivateKey = field(repr=False)
    mask_key: X25519PrivateKey = field(repr=False)
    advertisement: Advertisement


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who takes part, as this site was told, and its own seed among them.

    Attributes:
        keys: everybody's advertisement, by site.
        digest: of these; all sites must have the same.
        seed: of this site's self mask, 32 bytes.
    """

    keys: Mapping[str, Advertisement]
    digest: str
    seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The shares that one peer gave this site; None where they are not what the peer committed to."""

    self_share: bytes | None = field(repr=False)
    mask_share: bytes | None = field(repr=False)


def seal_shares(mine: RoundKeys, view: View, threshold: int) -> Iterator[SealedShare]:
    """A site's shares for every site in view, itself included; not signed yet."""
    plan_digest, site = mine.advertisement.plan_digest, mine.advertisement.site
    holders = sorted(view.keys)
    of_seed = shares.split(view.seed, threshold=threshold, holders=holders)
    of_key = shares.split(mine.mask_key.private_bytes_raw(), threshold=threshold, holders=holders)
    for peer in holders:
        secret = masks.agree(mine.share_key, view.keys[peer].share_key)
        key = masks.share_key(secret, plan_digest, site, peer)
        both = of_seed[peer] + of_key[peer]
        yield SealedShare(
            plan_digest=plan_digest,
            keys_digest=view.digest,
            site=site,
            receiver=peer,
            box=shares.seal_box(key, both, plan_digest=plan_digest, sender=site, receiver=peer),
            self_commitment=shares.commit(of_seed[peer], plan_digest, "self", site, peer),
            mask_commitment=shares.commit(of_key[peer], plan_digest, "mask", site, peer),
            seed_commitment=shares.commit(view.seed, plan_digest, "seed", site),
        )


def open_share(mine: RoundKeys, view: View, share: SealedShare) -> Held:
    """The two shares in a box.

    A box that its sender filled wrongly is no reason to leave the round, others may hold good ones: what does not fit
    its commitment counts as not held, and will not be revealed.
    """
    plan_digest, site, sender = share.plan_digest, mine.advertisement.site, share.site
    try:
        secret = masks.agree(mine.share_key, view.keys[sender].share_key)
        key = masks.share_key(secret, plan_digest, sender, site)
        both = shares.open_box(key, share.box, plan_digest=plan_digest, sender=sender, receiver=site)
        fits = {
            "self": shares.commit(both[:32], plan_digest, "self", sender, site) == share.self_commitment,
            "mask": shares.commit(both[32:], plan_digest, "mask", sender, site) == share.mask_commitment,
        }
    except (ProtocolError, InvalidValue):
        return Held(self_share=None, mask_share=None)
    return Held(self_share=both[:32] if fits["self"] else None, mask_share=both[32:] if fits["mask"] else None)


def mask_terms(mine: RoundKeys, view: View, peers: tuple[str, ...]) -> list[tuple[bytes, int]]:
    """Keys and signs of the masks that this site adds: its own, and one for every peer, which the peer takes away.

    Of two sites the first by name adds and the second subtracts.
    """
    plan_digest, site = mine.advertisement.plan_digest, mine.advertisement.site
    terms = [(masks.self_mask_key(view.seed, plan_digest, site), 1)]
    for peer in peers:
        if peer != site:
            secret = masks.agree(mine.mask_key, view.keys[peer].mask_key)
            terms.append((masks.pair_mask_key(secret, plan_digest, site, peer), 1 if site < peer else -1))
    return terms
