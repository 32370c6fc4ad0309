"""What sites and server say to each other in a secure sum (Bonawitz et al. 2017, figure 4; malicious-server variant).

======================  ================  ====================================================================
message                 from -> to        says
======================  ================  ====================================================================
`SignedPlan`            server -> site    the round's plan
`Advertisement`         site -> server    two fresh X25519 keys
`PeerKeys`              server -> site    everybody's advertisements
`SealedShares`          site -> server    shares of its two secrets, one sealed box a peer
`PeerShares`            server -> site    the boxes addressed to it
`Ready`                 site -> server    it holds them, and knows for whom to mask
`TrainRequest`          server -> site    (messages.py) train and upload
`UploadManifest`        site -> server    digests of the upload's chunks
`PartRequest`           server -> site    asks for some chunks, as often as it likes
`UploadPart`            site -> server    these chunks
`SurvivorSet`           server -> site    whose uploads are in the sum
`Agreement`             site -> server    signs that set, one a round
`UnmaskRequest`         server -> site    everybody's agreements
`UnmaskShares`          site -> server    for every peer one of two shares, once a round
======================  ================  ====================================================================

Every message names the plan's digest. Those of sites are signed, over all their fields, for one purpose each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import RoundPlan, canonical_json, digest_of

__all__ = [
    "DIGEST_BYTES",
    "PART_CHUNKS",
    "Advertisement",
    "Agreement",
    "PartRequest",
    "PeerKeys",
    "PeerShares",
    "Ready",
    "SealedShare",
    "SealedShares",
    "SignedPlan",
    "SurvivorSet",
    "UnmaskRequest",
    "UnmaskShares",
    "UploadManifest",
    "UploadPart",
    "content",
    "keys_digest",
    "sign_plan",
    "signed",
    "verify",
    "verify_plan",
]

DIGEST_BYTES = 32
_BOX_BYTES = 2 * 32 + 16
PART_CHUNKS = 48
"""Chunks in one `UploadPart` at most: 3 MiB at N = 4096."""


def _length(length: int, **values: bytes) -> None:
    for name, value in values.items():
        if len(value) != length:
            raise InvalidValue(name, f"{len(value)} bytes", f"{length} bytes")


def _names(**values: tuple[str, ...]) -> None:
    for name, value in values.items():
        for item in value:
            _validate.public_name(**{name: item})
        if list(value) != sorted(set(value)):
            raise InvalidValue(name, f"{len(value)} names", "different names in ascending order")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedPlan:
    """The round's plan with the server's signature."""

    plan: RoundPlan
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertisement:
    """A site's fresh X25519 public keys for this round: one to encrypt shares to it, one for its masks."""

    plan_digest: str
    site: str
    share_key: bytes
    mask_key: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _length(32, share_key=self.share_key, mask_key=self.mask_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKeys:
    """The advertisements of all sites that take part, this one's among them, sorted by site."""

    plan_digest: str
    advertisements: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShare:
    """A site's shares for one peer, readable by that peer only, and what the server needs to check them later.

    Attributes:
        keys_digest: of the advertisements that the sender has seen: everybody must have seen the same.
        site: the sender.
        box: ChaCha20-Poly1305 over the two shares.
        self_commitment: to the share of the self mask's seed.
        mask_commitment: to the share of the private mask key.
        seed_commitment: to the seed itself, the same for every receiver.
    """

    plan_digest: str
    keys_digest: str
    site: str
    receiver: str
    box: bytes
    self_commitment: bytes
    mask_commitment: bytes
    seed_commitment: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site, receiver=self.receiver)
        _length(_BOX_BYTES, box=self.box)
        commitments = {name: getattr(self, f"{name}_commitment") for name in ("self", "mask", "seed")}
        _length(DIGEST_BYTES, **commitments)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShares:
    """All `SealedShare` messages of one site, one a peer and one for itself."""

    plan_digest: str
    site: str
    shares: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerShares:
    """The `SealedShare` messages addressed to one site, its own among them; their senders are whom it masks for."""

    plan_digest: str
    shares: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The site has its shares and waits for the request to train.

    Attributes:
        unusable: peers that gave it shares which are not what they committed to, sorted.
    """

    plan_digest: str
    site: str
    unusable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _names(unusable=self.unusable)


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadManifest:
    """What a site is about to hand over, signed before the first chunk.

    Attributes:
        keys_digest: of the advertisements that it masks under.
        peers: the sites it masks for, itself included, sorted.
        chunk_digests: SHA-256 of every chunk, one after the other.
    """

    plan_digest: str
    keys_digest: str
    site: str
    peers: tuple[str, ...]
    chunk_digests: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _names(peers=self.peers)
        if len(self.chunk_digests) % DIGEST_BYTES:
            raise InvalidValue("chunk_digests", f"{len(self.chunk_digests)} bytes", f"a multiple of {DIGEST_BYTES}")

    @property
    def digest(self) -> str:
        """SHA-256 over all that is signed."""
        return digest_of(content(self).decode())

    def chunk_digest(self, chunk: int) -> bytes:
        """SHA-256 that chunk must have."""
        return self.chunk_digests[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRequest:
    """Chunks ``first`` to ``first + count - 1`` of the upload, please (again)."""

    plan_digest: str
    first: int
    count: int

    def __post_init__(self) -> None:
        _validate.integer_at_least(0, first=self.first)
        _validate.integer_at_least(1, count=self.count)
        if self.count > PART_CHUNKS:
            raise InvalidValue("count", self.count, f"at most {PART_CHUNKS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPart:
    """The chunks asked for; each is checked against the signed manifest, so the part needs no signature."""

    plan_digest: str
    site: str
    first: int
    chunks: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivorSet:
    """Whose uploads the sum holds; what every survivor signs.

    Attributes:
        keys_digest: of the advertisements.
        sharers: sites whose shares everybody holds, sorted: all masks are among these.
        survivors: sites whose uploads are in the sum, sorted.
        upload_digests: of their manifests, in the same order.
    """

    plan_digest: str
    keys_digest: str
    sharers: tuple[str, ...]
    survivors: tuple[str, ...]
    upload_digests: tuple[str, ...]

    def __post_init__(self) -> None:
        _names(sharers=self.sharers, survivors=self.survivors)
        if not set(self.survivors) <= set(self.sharers) or len(self.upload_digests) != len(self.survivors):
            raise InvalidValue("survivors", f"{len(self.survivors)} sites", "some of the sharers, each with a digest")

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return digest_of(content(self).decode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A survivor's signature under exactly one `SurvivorSet` of a round."""

    plan_digest: str
    site: str
    survivors_digest: str
    signature: bytes = b""

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _validate.hex_digest(survivors_digest=self.survivors_digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmaskRequest:
    """The agreements of at least t survivors on one set: please reveal its shares."""

    plan_digest: str
    survivors_digest: str
    agreements: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmaskShares:
    """For every survivor a share of its self mask's seed, for every lost site a share of its mask key; never both.

    Attributes:
        self_of: survivors, sorted; ``self_shares`` in the same order.
        mask_of: lost sharers, sorted; ``mask_shares`` in the same order.
    """

    plan_digest: str
    site: str
    survivors_digest: str
    self_of: tuple[str, ...]
    self_shares: tuple[bytes, ...] = field(repr=False)
    mask_of: tuple[str, ...]
    mask_shares: tuple[bytes, ...] = field(repr=False)
    signature: bytes = b""

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _names(self_of=self.self_of, mask_of=self.mask_of)
        if set(self.self_of) & set(self.mask_of):
            raise InvalidValue("mask_of", "a site that is in self_of too", "one kind of share a site")
        if len(self.self_of) != len(self.self_shares) or len(self.mask_of) != len(self.mask_shares):
            raise InvalidValue("self_shares", "another number than of names", "one share a name")


_Signed = Advertisement | SealedShare | UploadManifest | Agreement | UnmaskShares
S = TypeVar("S", Advertisement, SealedShare, UploadManifest, Agreement, UnmaskShares)
_PURPOSES: dict[type, str] = {
    Advertisement: "advertisement",
    SealedShare: "sealed_share",
    UploadManifest: "upload",
    Agreement: "agreement",
    UnmaskShares: "unmask",
}


def content(message: _Signed | SurvivorSet) -> bytes:
    """All fields of a message but its signature, as canonical JSON with bytes in hex: what is signed and digested."""
    plain = {}
    for each in fields(message):
        value = getattr(message, each.name)
        if each.name == "signature":
            continue
        if isinstance(value, tuple):
            value = [item.hex() if isinstance(item, bytes) else item for item in value]
        plain[each.name] = value.hex() if isinstance(value, bytes) else value
    return canonical_json(plain)


def signed(message: S, key: SigningKey) -> S:
    """The message with its site's signature, for the purpose of its type."""
    return replace(message, signature=key.sign(_PURPOSES[type(message)], content(message)))


def verify(message: _Signed, identity: PublicIdentity, plan_digest: str) -> None:
    """Refuse a message of another site or round, or without that site's signature.

    Raises:
        ProtocolError: `SignatureInvalid` among them.
    """
    name = type(message).__name__
    if message.site != identity.name or message.plan_digest != plan_digest:
        raise ProtocolError(f"the {name} is of another site or another round")
    identity.verify(_PURPOSES[type(message)], content(message), message.signature)


def sign_plan(plan: RoundPlan, key: SigningKey) -> SignedPlan:
    """The plan with the server's signature over its digest."""
    return SignedPlan(plan=plan, signature=key.sign("plan", bytes.fromhex(plan.digest)))


def verify_plan(signed_plan: SignedPlan, server: PublicIdentity) -> RoundPlan:
    """The plan, once the signature is the server's.

    Raises:
        SignatureInvalid: it is not.
    """
    server.verify("plan", bytes.fromhex(signed_plan.plan.digest), signed_plan.signature)
    return signed_plan.plan


def keys_digest(advertisements: tuple[Advertisement, ...]) -> str:
    """SHA-256 over all advertised keys, sorted by site: one view of who takes part, for all."""
    ordered = sorted(advertisements, key=lambda advertisement: advertisement.site)
    return digest_of([content(advertisement).decode() for advertisement in ordered])
