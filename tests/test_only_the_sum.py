"""Only the sum is opened: the whole secure sum, attacked by server, sites and network.

The failure modes of a secure sum in 18 groups, and where each is tested:

==  =================================================  ==============================================================
1   exact sums, dropouts at each stage                 here: `TestExact`, `TestTooFew`; test_secure_sum_processes.py
2   who holds the key and all uploads                  here: `TestKeyHolder`
3   something else posed as the sum                    here: `TestPosed`; test_decryptor.py
4   key recovery (Li and Micciancio 2021)              here: `TestKeyRecovery`; test_ckks.py
5   masks: vectors, bits, rounds, attempts, pairs      test_masks.py; here: `TestFreshMasks`
6   unmasking: once, one set, one kind, split views    here: `TestUnmaskRules`, `TestLostAndUploaded`;
                                                       test_secure_sum_processes.py (restarts)
7   keys and plans substituted, replayed, expired      here: `TestPlanRules`, `TestKeyRules`; test_roster.py
8   shares: fewer than t, corrupted, every subset      test_shares.py; here: `TestShareRules`, `TestTooFew`
9   hostile ciphertexts and messages, fuzzed           test_hostile_uploads.py, test_wire.py. There is no protobuf and
                                                       no zstd to forge any more: an upload is words and nothing else
10  the aggregator has no key                          test_aggregator.py (process, bytes received), test_boundaries.py
11  overflow at the grid's edges                       here: `TestEdges`; test_ckks.py (proof), test_quantization.py.
                                                       Weights: none, every site weighs the same
12  residual margin                                    test_ckks.py (16 deviations, refusal at 0.25)
13  an update of 10^6 times the size                   here: `TestEdges`; the gates behind the opening, rollback and the
                                                       charged budget: test_run.py, test_fedcollm_faults.py
14  local policy wins, budget first                    here: `TestPlanRules`; budget: test_site.py, test_ledger.py
15  audit: altered logs; no secrets in logs            test_ledger.py, test_folder.py (transcript); here:
                                                       `TestSecrets`. Not covered: skewed clocks between parties, beyond
                                                       a plan that one site finds expired (`TestPlanRules`)
16  chunks: again, out of order, streamed              here: `TestChunks`; test_hostile_uploads.py; memory:
                                                       test_masks.py, test_ciphertext_sum.py. Not covered: a payload of
                                                       more than 2 GiB, which no test machine should have to hold
17  key rotation, revocation                           here: `TestKeyRules` (revoked site), `TestPosed` (key gone);
                                                       test_decryptor.py (one key, one opening)
18  scale, 1 M and 10 M parameters                     not by tests, which assert no times: benchmarks/secure_sum.py
==  =================================================  ==============================================================

"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from tenseal import sealapi

from fedcollm_privacy import contributor as contributor_module
from fedcollm_privacy import coordinator, masks, sealing, shares
from fedcollm_privacy.ckks import (
    _load_public_key,
    _pack,
    encrypt,
    encrypt_grid,
    parameters_for,
    seal_context,
    to_ciphertext,
    to_words,
    unpack,
)
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.ckks_secret import SecretKey, generate
from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.coordinator import Sharing, Surviving
from fedcollm_privacy.errors import (
    FedCollmError,
    InvalidValue,
    OpeningRefused,
    ProtocolError,
    RoundLost,
    SignatureInvalid,
)
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import OpenedSum, PrivateUpdate, QuantizedUpdate, RoundPlan
from fedcollm_privacy.peer_shares import seal_shares
from fedcollm_privacy.quantization import quantize
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.secure_sum_messages import (
    Advertisement,
    Agreement,
    PartRequest,
    PeerKeys,
    PeerShares,
    SealedShare,
    SealedShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    UploadManifest,
    UploadPart,
    keys_digest,
    sign_plan,
    signed,
)
from fedcollm_privacy.wire import decode, encode
from tests.secure_sums import NOW, Grid, Parties, Round, digest, least_threshold, random_grids

Words = NDArray[np.uint64]
MakeRound = Callable[..., Round]
CHUNK = CkksParameters().chunk_parameters
PHASES = ("advertise", "share", "accept", "upload", "part", "agree", "unmask")
IN_THE_SUM_ALL_THE_SAME = ("agree", "unmask")  # lost after its upload was added
REFUSED = "the decryptor refused to open this sum"


@pytest.fixture
def make_round(tmp_path: Path) -> Iterator[MakeRound]:
    """Rounds whose processes end with the test."""
    made: list[Round] = []

    def make(grids: Sequence[Grid] | int, dimension: int = 40, folder: str = "sites", **options: Any) -> Round:
        chosen = random_grids(grids, dimension) if isinstance(grids, int) else grids
        made.append(Round.of(tmp_path / folder, chosen, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def true_sum(a_round: Round, cohort: Sequence[str]) -> NDArray[np.int64]:
    """By numpy, of the grids that the sites were given."""
    return np.sum([a_round.participants[site].grid.astype(np.int64) for site in cohort], axis=0)


def lose(a_round: Round, lost: dict[str, str]) -> None:
    """Each named site falls silent from its phase on."""

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        silent = site in lost and PHASES.index(operation) >= PHASES.index(lost[site])
        return None if silent else body

    a_round.channel.bend = bend


def sites_of(a_round: Round) -> list[str]:
    return list(a_round.participants)


def sent(a_round: Round, operation: str) -> list[bytes]:
    return [body for asked, _, body in a_round.channel.log if asked == operation and body is not None]


class TestExact:
    @pytest.mark.parametrize("sites", [3, 8, 16])
    def test_the_sum_of_all_is_the_integer_sum(self, make_round: MakeRound, sites: int) -> None:
        a_round = make_round(sites, CHUNK + 5)
        opened = a_round.run()
        assert opened.cohort == tuple(sites_of(a_round))
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("colluding", [0, 1])
    def test_as_many_sites_as_may_be_are_lost_at_one_phase(
        self, make_round: MakeRound, phase: str, colluding: int
    ) -> None:
        a_round = make_round(8)
        spare = 8 - least_threshold(8, colluding)
        lost = sites_of(a_round)[1 : 1 + spare]
        lose(a_round, dict.fromkeys(lost, phase))
        opened = a_round.run(max_colluding=colluding)
        out = set() if phase in IN_THE_SUM_ALL_THE_SAME else set(lost)
        assert set(opened.cohort) == set(sites_of(a_round)) - out
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_one_site_is_lost_at_each_phase_of_one_round(self, make_round: MakeRound) -> None:
        a_round = make_round(16)
        lost = {site: phase for site, phase in zip(sites_of(a_round)[::-2], PHASES, strict=False)}
        assert len(lost) == 16 - least_threshold(16, 1) == len(PHASES)
        lose(a_round, lost)
        opened = a_round.run()
        out = {site for site, phase in lost.items() if phase not in IN_THE_SUM_ALL_THE_SAME}
        assert set(opened.cohort) == set(sites_of(a_round)) - out
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    @pytest.mark.slow
    def test_sixty_four_sites_of_which_all_spare_ones_are_lost(self, make_round: MakeRound) -> None:
        a_round = make_round(64)
        spare = 64 - least_threshold(64, 1)
        lost = dict(zip(sites_of(a_round)[:spare], itertools.cycle(PHASES), strict=False))
        lose(a_round, lost)
        opened = a_round.run()
        out = {site for site, phase in lost.items() if phase not in IN_THE_SUM_ALL_THE_SAME}
        assert set(opened.cohort) == set(sites_of(a_round)) - out
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_which_sites_are_lost_does_not_matter(self, make_round: MakeRound) -> None:
        # Signs of pair masks depend on the order of names: every pair of 5 (c = 0: t = k = 3).
        a_round = make_round(5)
        for number, lost in enumerate(itertools.combinations(sites_of(a_round), 2), start=1):
            lose(a_round, dict.fromkeys(lost, "upload"))
            opened = a_round.run(server_round=number, max_colluding=0)
            assert set(opened.cohort) == set(sites_of(a_round)) - set(lost)
            assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_every_site_that_is_not_in_the_sum_is_in_rejected(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        lose(a_round, {"s01": "upload"})
        opened = a_round.run()
        assert set(a_round.secure_sum.rejected) == set(sites_of(a_round)) - set(opened.cohort)


class TestTooFew:
    @pytest.mark.parametrize("phase", PHASES)
    def test_nothing_is_opened_and_nothing_unmasked(self, make_round: MakeRound, phase: str) -> None:
        a_round = make_round(4)  # c = 1: t = k = 3
        lose(a_round, dict.fromkeys(("s01", "s02"), phase))
        with pytest.raises(RoundLost, match="nothing was opened"):
            a_round.run()
        unmasked = sent(a_round, "unmask")
        assert len(unmasked) == (2 if phase == "unmask" else 0)  # fewer than t even there
        assert a_round.secure_sum._decryptor._key is None or phase in ("advertise", "share")  # nothing was uploaded
        if phase != "unmask":
            assert not any(operation == "unmask" for operation, _, _ in a_round.channel.log)  # not even asked

    def test_with_one_share_too_few_the_server_knows_no_mask(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        seeds = capture_seeds(a_round)
        lose(a_round, dict.fromkeys(("s01", "s02"), "unmask"))
        with pytest.raises(RoundLost):
            a_round.run()
        revealed = [decode(body, UnmaskShares) for body in sent(a_round, "unmask")]
        holders = tuple(sites_of(a_round))
        for dealer in revealed[0].self_of:
            known = {m.site: m.self_shares[m.self_of.index(dealer)] for m in revealed}
            assert len(known) == 2
            with pytest.raises(ProtocolError, match="needed: 3"):
                shares.join({**known}, threshold=3, holders=holders)
            # Any third share gives some seed; test_shares.py shows that each seed is as likely as any other.
            joined = {shares.join({**known, "s01": os.urandom(32)}, threshold=3, holders=holders) for _ in range(20)}
            assert len(joined) == 20
            assert seeds[dealer] not in joined

    def test_nobody_trains_when_too_few_are_ready(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        lose(a_round, dict.fromkeys(("s01", "s02"), "accept"))
        plan = a_round.begin()
        with pytest.raises(RoundLost):
            a_round.secure_sum.enrol(plan)


def capture_seeds(a_round: Round) -> dict[str, bytes]:
    """The true self seeds, noted behind the sites' backs when they are made."""
    seeds: dict[str, bytes] = {}
    before = a_round.channel.bend

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if operation == "accept":
            seeds[site] = state_of(a_round, site).view.seed
        return before(operation, site, body)

    a_round.channel.bend = bend
    # `lose` replaces `bend`: wrap the request instead, which passes first.
    asked_before = a_round.channel.bend_request

    def bend_request(operation: str, site: str, body: bytes | None) -> bytes | None:
        if operation == "accept" and body is not None:
            seeds[site] = state_of(a_round, site).view.seed
        return asked_before(operation, site, body)

    a_round.channel.bend_request = bend_request
    return seeds


def state_of(a_round: Round, site: str) -> Any:
    return a_round.participants[site].contributor._state


# --- the server that holds the key, and everything that passed --------------------------------------------------------


class Attacker:
    """Holds the CKKS secret key and whatever ciphertexts it wants."""

    def __init__(self, key: SecretKey) -> None:
        self.parameters = key.parameters
        self.modulus = self.parameters.modulus
        self._key, self._context = key._seal_key, seal_context(self.parameters)
        words = self._key.data().dyn_array()
        self.secret_N = np.array([words[i] for i in range(self.parameters.poly_modulus_degree)], dtype=object)

    def decrypted_coefficients(self, words_2N: Words) -> Words:
        """``c0 + c1 s`` by this test's own arithmetic, as coefficients in [0, q)."""
        message_N = (words_2N[0].astype(object) + words_2N[1].astype(object) * self.secret_N) % self.modulus
        ciphertext = to_ciphertext(np.stack([message_N.astype(np.uint64), words_2N[1]]), self.parameters)
        sealapi.Evaluator(self._context).transform_from_ntt_inplace(ciphertext)
        words = ciphertext.dyn_array()
        return np.array([words[i] for i in range(self.parameters.poly_modulus_degree)], dtype=np.uint64)

    def slots(self, words_2N: Words) -> NDArray[np.complex128]:
        """The raw decryption, by SEAL."""
        plaintext = sealapi.Plaintext()
        decryptor, encoder = sealapi.Decryptor(self._context, self._key), sealapi.CKKSEncoder(self._context)
        decryptor.decrypt(to_ciphertext(words_2N, self.parameters), plaintext)
        return np.asarray(encoder.decode_complex(plaintext))

    def grid(self, upload: Sequence[Words]) -> NDArray[np.int64]:
        """What the honest decoding makes of an upload, without its checks."""
        parts = []
        for words_2N in upload:
            slots = self.slots(words_2N)
            rounded_2S = np.rint(np.stack([slots.real, slots.imag])).clip(-(2.0**62), 2.0**62).astype(np.int64)
            parts.append(unpack(rounded_2S, self.parameters))
        return np.concatenate(parts)

    def add(self, uploads: Sequence[Sequence[Words]]) -> list[Words]:
        return [
            np.add.reduce([c.astype(object) for c in chunks]) % self.modulus for chunks in zip(*uploads, strict=True)
        ]

    def subtract_masks(self, upload: Sequence[Words], keys: Sequence[tuple[bytes, int]]) -> list[Words]:
        """Take masks of these keys and signs off, by Python's integers."""
        stripped = []
        for index, words_2N in enumerate(upload):
            left_N = words_2N[0].astype(object)
            for key, sign in keys:
                left_N = left_N - sign * masks.mask_words(key, index, len(left_N), self.modulus).astype(object)
            stripped.append(np.stack([left_N % self.modulus, words_2N[1].astype(object)]).astype(np.uint64))
        return stripped


def as_words(upload: Sequence[Any]) -> list[Words]:
    return [np.asarray(chunk).astype(np.uint64) for chunk in upload]


def uploads_of(a_round: Round, plan: RoundPlan, sites: Sequence[str]) -> dict[str, list[Words]]:
    """All chunks of each upload, asked for as the server asks."""
    request = PartRequest(plan_digest=plan.digest, first=0, count=plan.ckks.chunk_count(plan.dimension))
    return {
        site: [
            np.frombuffer(chunk, dtype="<u8").reshape(2, -1)
            for chunk in a_round.participants[site].contributor.part(request).chunks
        ]
        for site in sites
    }


def take_everything(a_round: Round, **changes: Any) -> tuple[Attacker, dict[str, list[Words]], OpenedSum]:
    """An honest round, of which the attacker keeps the key and all uploads."""
    plan = a_round.begin(**changes)
    key = a_round.secure_sum._decryptor._key
    assert key is not None
    kept: dict[str, list[Words]] = {}

    def bend_request(operation: str, site: str, body: bytes | None) -> bytes | None:
        if operation == "agree":
            kept.update(uploads_of(a_round, plan, [site]))
        return body

    a_round.channel.bend_request = bend_request
    ready = a_round.secure_sum.enrol(plan)
    opened = a_round.secure_sum.open(a_round.manifests(ready))
    return Attacker(key), kept, opened


def revealed_seeds(a_round: Round, plan: RoundPlan) -> dict[str, bytes]:
    """The self seeds that the unmasking gave to the server, joined from what passed on the channel."""
    messages = [decode(body, UnmaskShares) for body in sent(a_round, "unmask")]
    by_dealer: dict[str, dict[str, bytes]] = {}
    for message in messages:
        for dealer, share in zip(message.self_of, message.self_shares, strict=True):
            by_dealer.setdefault(dealer, {})[message.site] = share
    return shares.join_many(by_dealer, threshold=plan.threshold, holders=tuple(sites_of(a_round)))


def uniform_p_values(values: Words, modulus: int) -> list[float]:
    """Chi-square of the high and the low 6 bits, and Kolmogorov-Smirnov of the whole, against uniform on [0, q)."""
    bits = (modulus - 1).bit_length()
    shift = np.uint64(bits - 6)
    high = np.bincount((values >> shift).astype(np.int64), minlength=64)
    edges = np.array([min((i + 1) << (bits - 6), modulus) - (i << (bits - 6)) for i in range(64)], dtype=float)
    low = np.bincount((values & np.uint64(63)).astype(np.int64), minlength=64)
    return [
        float(scipy.stats.chisquare(high, edges / modulus * len(values)).pvalue),
        float(scipy.stats.chisquare(low).pvalue),
        float(scipy.stats.kstest(values.astype(np.float64) / modulus, "uniform").pvalue),
    ]


def require_noise(
    attacker: Attacker, upload: Sequence[Words], plain: Sequence[NDArray[np.integer[Any]]]
) -> list[float]:
    """The decryption is uniform and has nothing of any of the plaintexts; gives the scaled correlations."""
    words = as_words(upload)
    coefficients = np.concatenate([attacker.decrypted_coefficients(chunk) for chunk in words])
    masked = np.concatenate([chunk[0] for chunk in words])
    for values in (coefficients, masked):
        # A fresh draw in every run and some hundreds of p-values: none below 1e-9 unless something is wrong.
        assert min(uniform_p_values(values, attacker.modulus)) > 1e-9
    guessed = attacker.grid(words)[: len(plain[0])].astype(np.float64)
    scaled = [float(np.corrcoef(guessed, grid)[0, 1] * np.sqrt(len(grid))) for grid in plain]
    # 4.3/sqrt(8192), which in the two chunks of these rounds is six deviations, for the same reason.
    assert max(map(abs, scaled)) < 6
    for grid in plain:
        assert np.mean(guessed == grid) < 0.01
    return scaled


class TestKeyHolder:
    """Who has the secret key and every upload, and also every seed that a legitimate unmasking reveals."""

    def test_each_upload_and_every_proper_subset_is_noise(self, make_round: MakeRound) -> None:
        a_round = make_round(5, 2 * CHUNK)
        attacker, uploads, opened = take_everything(a_round)
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        assert a_round.plan is not None
        plan, seeds = a_round.plan, revealed_seeds(a_round, a_round.plan)
        assert set(seeds) == set(uploads) == set(sites_of(a_round))
        scaled = []
        for size in range(1, 6):
            for chosen in itertools.combinations(uploads, size):
                summed = as_words(attacker.add([uploads[site] for site in chosen]))
                self_keys = [(masks.self_mask_key(seeds[site], plan.digest, site), 1) for site in chosen]
                without_self_masks = attacker.subtract_masks(summed, self_keys)
                plain = [true_sum(a_round, [site]) for site in chosen] + [true_sum(a_round, chosen)]
                scaled += require_noise(attacker, summed, plain)
                if size < 5:
                    scaled += require_noise(attacker, without_self_masks, plain)
                else:  # the one thing that is to be had
                    assert (attacker.grid(without_self_masks) == true_sum(a_round, chosen)).all()
        assert 0.5 < np.mean(np.square(scaled)) < 1.6  # as of independent noise: its mean square is 1

    def test_random_subsets_of_sixteen_are_noise_even_without_their_own_masks(self, make_round: MakeRound) -> None:
        a_round = make_round(16, 2 * CHUNK)
        attacker, uploads, _ = take_everything(a_round)
        assert a_round.plan is not None
        plan, seeds = a_round.plan, revealed_seeds(a_round, a_round.plan)
        rng = np.random.default_rng(7)
        subsets = [tuple(rng.permutation(list(uploads))[: rng.integers(2, 16)]) for _ in range(12)]
        subsets += [tuple(site for site in uploads if site != lost) for lost in ("s00", "s15")]  # all but one
        for chosen in subsets:
            summed = as_words(attacker.add([uploads[site] for site in chosen]))
            keys = [(masks.self_mask_key(seeds[site], plan.digest, site), 1) for site in chosen]
            require_noise(attacker, attacker.subtract_masks(summed, keys), [true_sum(a_round, chosen)])

    def test_the_same_attack_opens_what_has_no_mask(self, make_round: MakeRound) -> None:
        a_round = make_round(3, 2 * CHUNK)
        plan = a_round.begin()
        assert a_round.context is not None
        assert a_round.secure_sum._decryptor._key is not None
        attacker = Attacker(a_round.secure_sum._decryptor._key)
        for participant in a_round.participants.values():
            upload = list(encrypt(QuantizedUpdate(plan=plan, grid=participant.grid), a_round.context))
            assert (attacker.grid(upload) == participant.grid).all()
            coefficients = attacker.decrypted_coefficients(upload[0])
            assert max(uniform_p_values(coefficients, attacker.modulus)[::2]) < 1e-100
            with pytest.raises(AssertionError):
                require_noise(attacker, upload, [participant.grid])

    def test_colluding_sites_open_their_own_pair_masks_and_no_others(self, make_round: MakeRound) -> None:
        # c = 2 of 7 give the server all they have: two honest uploads, freed of every mask that it knows, are noise.
        a_round = make_round(7, 2 * CHUNK)
        lost_keys: dict[str, Any] = {}

        def keep(operation: str, site: str, body: bytes | None) -> bytes | None:
            if operation == "accept":
                lost_keys[site] = state_of(a_round, site)
            return body

        a_round.channel.bend = keep
        attacker, uploads, opened = take_everything(a_round, max_colluding=2, min_contributors=4)
        assert a_round.plan is not None
        plan, seeds = a_round.plan, revealed_seeds(a_round, a_round.plan)
        colluding, honest = ("s01", "s05"), [site for site in uploads if site not in ("s01", "s05")]
        freed = {}
        for site in honest:
            keys = [(masks.self_mask_key(seeds[site], plan.digest, site), 1)]
            for spy in colluding:
                mine, view = lost_keys[spy].mine, lost_keys[spy].view
                secret = masks.agree(mine.mask_key, view.keys[site].mask_key)
                keys.append((masks.pair_mask_key(secret, plan.digest, site, spy), 1 if site < spy else -1))
            freed[site] = attacker.subtract_masks(uploads[site], keys)
        for size in range(1, len(honest)):
            for chosen in itertools.combinations(honest, size):
                summed = as_words(attacker.add([freed[site] for site in chosen]))
                require_noise(attacker, summed, [true_sum(a_round, chosen)])
        # What no protocol can hide: the sum less what the colluding sites put in.
        assert (attacker.grid(as_words(attacker.add(list(freed.values())))) == true_sum(a_round, honest)).all()
        assert (opened.total - true_sum(a_round, colluding) == true_sum(a_round, honest)).all()


class TestPosed:
    """An aggregator, or who owns it, hands something else to the decryptor than the sum of the agreed set."""

    @pytest.mark.parametrize("posed", ["one", "two", "less one", "one twice", "zero", "swapped", "last round's"])
    def test_it_opens_nothing_and_says_nothing(self, make_round: MakeRound, posed: str) -> None:
        a_round = make_round(4, 2 * CHUNK)
        earlier: list[bytes] = []
        first, finish = a_round.run, a_round.secure_sum._aggregator.finish
        if posed == "last round's":
            a_round.secure_sum._aggregator.finish = lambda: iter(  # type: ignore[method-assign]
                [earlier.append(chunk) or chunk for chunk in finish()]  # type: ignore[func-returns-value]
            )
            first()
        plan = a_round.begin(server_round=2)
        ready = a_round.secure_sum.enrol(plan)
        manifests = list(a_round.manifests(ready))
        uploads = uploads_of(a_round, plan, ready)
        modulus = plan.ckks.modulus

        def posed_chunks() -> Iterator[bytes]:
            sums = [np.frombuffer(chunk, dtype="<u8").reshape(2, -1).astype(object) for chunk in finish()]
            one, two = uploads["s00"], uploads["s01"]
            if posed == "zero":
                sums = [words - words + 1 for words in sums]
            elif posed == "swapped":
                sums = sums[::-1]
            elif posed == "one":
                sums = [words.astype(object) for words in one]
            elif posed == "two":
                sums = [a.astype(object) + b.astype(object) for a, b in zip(one, two, strict=True)]
            elif posed != "last round's":
                sign = -1 if posed == "less one" else 1
                sums = [words + sign * mine.astype(object) for words, mine in zip(sums, one, strict=True)]
            chunks = [(words % modulus).astype("<u8").tobytes() for words in sums]
            yield from (earlier if posed == "last round's" else chunks)

        a_round.secure_sum._aggregator.finish = posed_chunks  # type: ignore[method-assign]
        with pytest.raises(RoundLost) as refused:
            a_round.secure_sum.open(iter(manifests))
        assert str(refused.value) == REFUSED
        assert vars(refused.value) == {}  # no plaintext on the error
        assert a_round.secure_sum._decryptor._key is None
        # And once more is not possible: key and shares are given once.
        with pytest.raises(ProtocolError):
            a_round.secure_sum.open(iter(manifests))

    def test_the_true_sum_opens_through_the_same_detour(self, make_round: MakeRound) -> None:
        a_round = make_round(4, 2 * CHUNK)
        finish = a_round.secure_sum._aggregator.finish
        a_round.secure_sum._aggregator.finish = lambda: iter([bytes(c) for c in finish()])  # type: ignore[method-assign]
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    @staticmethod
    def adds(a_round: Round, value: float) -> OpenedSum:
        """A round whose aggregator adds an encryption of ``value`` everywhere: all it needs is the public key."""
        plan = a_round.begin()
        assert a_round.context is not None
        seal_ctx, plaintext, ciphertext = seal_context(plan.ckks), sealapi.Plaintext(), sealapi.Ciphertext()
        sealapi.CKKSEncoder(seal_ctx).encode([value] * plan.ckks.slots, 2.0**plan.ckks.lsb_bits, plaintext)
        public_key = _load_public_key(plan.ckks, a_round.context.public_key)
        sealapi.Encryptor(seal_ctx, public_key).encrypt(plaintext, ciphertext)
        added = to_words(ciphertext, plan.ckks).astype(object)
        finish = a_round.secure_sum._aggregator.finish
        a_round.secure_sum._aggregator.finish = lambda: (  # type: ignore[method-assign]
            ((np.frombuffer(c, "<u8").reshape(2, -1) + added) % plan.ckks.modulus).astype("<u8").tobytes()
            for c in finish()
        )
        return a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))

    @pytest.mark.parametrize("fraction", [0.3, 0.5, -0.4])
    def test_a_sum_that_is_off_by_a_fraction_is_refused(self, make_round: MakeRound, fraction: float) -> None:
        # In range and unmasked, so that the residual alone tells.
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            self.adds(make_round(4, CHUNK), fraction)

    def test_what_no_check_can_see_an_aggregator_that_adds_whole_numbers(self, make_round: MakeRound) -> None:
        # Masks hide uploads, they do not authenticate the sum: who adds can add.
        a_round = make_round([grid // 2 for grid in random_grids(4, CHUNK // 4)])
        opened = self.adds(a_round, 7.0)
        assert (opened.total == true_sum(a_round, opened.cohort) + 7).all()

    def test_a_sum_under_a_smaller_cohort_is_refused(self, make_round: MakeRound) -> None:
        # The decryptor counts contributors and signatures itself, whatever server asks it.
        a_round = make_round(4)
        decryptor = a_round.secure_sum._decryptor
        opener = decryptor.open_sum

        def lie(plan: RoundPlan, sealed_sum: Any) -> OpenedSum:
            return opener(plan, replace(sealed_sum, cohort=sealed_sum.cohort[:3]))

        decryptor.open_sum = lie  # type: ignore[method-assign]
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            a_round.run()

    @pytest.mark.parametrize("broken", ["short", "transparent", "word q"])
    def test_a_malformed_sum_loses_the_round_like_any_other(self, make_round: MakeRound, broken: str) -> None:
        a_round = make_round(4)
        plan = a_round.begin()
        finish = a_round.secure_sum._aggregator.finish

        def malformed() -> Iterator[bytes]:
            for chunk in finish():
                half = len(chunk) // 2
                yield {
                    "short": chunk[:-8],
                    "transparent": chunk[:half] + bytes(half),
                    "word q": plan.ckks.modulus.to_bytes(8, "little") + chunk[8:],
                }[broken]

        a_round.secure_sum._aggregator.finish = malformed  # type: ignore[method-assign]
        ready = a_round.secure_sum.enrol(plan)
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            a_round.secure_sum.open(a_round.manifests(ready))


class TestKeyRecovery:
    """Li and Micciancio (2021): from a raw CKKS decryption m' = c0 + c1 s follows s = (m' - c0) / c1, word by word."""

    @staticmethod
    def recovered(published: NDArray[np.complex128], words_2N: Words, attacker: Attacker) -> float:
        plaintext = sealapi.Plaintext()
        encoder = sealapi.CKKSEncoder(seal_context(attacker.parameters))
        encoder.encode(published.tolist(), 2.0**attacker.parameters.lsb_bits, plaintext)
        words, degree = plaintext.dyn_array(), attacker.parameters.poly_modulus_degree
        message_N = np.array([words[i] for i in range(degree)], dtype=object)
        inverse_N = np.array([pow(int(word), -1, attacker.modulus) for word in words_2N[1]], dtype=object)
        guess_N = (message_N - words_2N[0].astype(object)) * inverse_N % attacker.modulus
        return float(np.mean(guess_N == attacker.secret_N))

    def test_raw_floats_give_the_key_and_our_integers_do_not(self, make_round: MakeRound) -> None:
        # Small values in the low field only, so that float64 holds the raw decryption exactly, as float CKKS does.
        grids = [grid.clip(-100, 100) for grid in random_grids(3, CHUNK // 2)]
        a_round = make_round(grids)
        plan = a_round.begin()
        decryptor = a_round.secure_sum._decryptor
        assert decryptor._key is not None
        attacker, opener = Attacker(decryptor._key), decryptor.open_sum
        seen: list[Words] = []

        def keep(plan: RoundPlan, sealed_sum: Any) -> OpenedSum:  # the server knows the sum's ciphertext anyway
            seen.extend(sealed_sum.chunks)
            return opener(plan, replace(sealed_sum, chunks=iter(seen)))

        decryptor.open_sum = keep  # type: ignore[method-assign]
        opened = a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))
        assert (opened.total == np.sum(grids, axis=0)).all()
        raw = attacker.slots(seen[0])
        assert self.recovered(raw, seen[0], attacker) >= 0.99
        ours = _pack(opened.total.astype(np.int32), plan.ckks)
        assert np.abs(raw - ours).max() < 0.01  # all the difference there is
        assert self.recovered(ours, seen[0], attacker) == 0.0

    def test_nothing_is_recovered_at_full_range_either(self, make_round: MakeRound) -> None:
        a_round = make_round(3, CHUNK)
        decryptor, seen = a_round.secure_sum._decryptor, []
        opener = decryptor.open_sum

        def keep(plan: RoundPlan, sealed_sum: Any) -> OpenedSum:
            seen.extend(sealed_sum.chunks)
            return opener(plan, replace(sealed_sum, chunks=iter(seen)))

        decryptor.open_sum = keep  # type: ignore[method-assign]
        plan = a_round.begin()
        assert decryptor._key is not None
        attacker = Attacker(decryptor._key)
        opened = a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))
        assert self.recovered(_pack(opened.total.astype(np.int32), plan.ckks), seen[0], attacker) == 0.0


class TestFreshMasks:
    def test_rounds_attempts_sites_and_pairs_never_share_a_mask(
        self, make_round: MakeRound, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[list[tuple[bytes, int]]] = []
        original = contributor_module.mask_terms

        def note(*arguments: Any) -> list[tuple[bytes, int]]:
            used.append(original(*arguments))
            return used[-1]

        monkeypatch.setattr(contributor_module, "mask_terms", note)
        a_round = make_round(4)
        for where in ({"server_round": 1}, {"server_round": 2}, {"server_round": 3, "attempt": 1}):
            a_round.run(**where)
        lose(a_round, dict.fromkeys(("s01", "s02"), "upload"))
        with pytest.raises(RoundLost):
            a_round.run(server_round=4)
        lose(a_round, {})
        a_round.run(server_round=4, attempt=2)
        assert len(used) == 5 * 4
        by_round = [list(itertools.chain(*used[start : start + 4])) for start in range(0, 20, 4)]
        keys = set()
        for terms in by_round:
            signs: dict[bytes, list[int]] = {}
            for key, sign in terms:
                signs.setdefault(key, []).append(sign)
            # Four own masks, and six pairs whose two masks cancel.
            assert sorted(map(sorted, signs.values())) == sorted([[1]] * 4 + [[-1, 1]] * 6)
            assert not keys & signs.keys()
            keys |= signs.keys()
        assert len(keys) == 5 * 10

    def test_equal_grids_in_two_rounds_have_nothing_in_common(self, make_round: MakeRound) -> None:
        a_round = make_round(4, CHUNK)
        first, uploads_1, _ = take_everything(a_round)
        second, uploads_2, _ = take_everything(a_round, server_round=2)
        modulus = first.modulus
        for site in sites_of(a_round):
            assert np.intersect1d(uploads_1[site][0], uploads_2[site][0]).size <= 1  # 2^26 pairs of 60-bit words
            # Without masks both would decrypt to the same polynomial, up to noise of some 2^20 of 2^60.
            one = first.decrypted_coefficients(uploads_1[site][0]).astype(object)
            two = second.decrypted_coefficients(uploads_2[site][0]).astype(object)
            difference = (one - two) % modulus
            assert min(uniform_p_values(difference.astype(np.uint64), modulus)) > 1e-9


# --- a site that faces a malicious server -----------------------------------------------------------------------------


class Federation:
    """Five sites (c = 1: t = 4, k = 3), led by hand to any point of a round."""

    def __init__(self, a_round: Round, **changes: Any) -> None:
        self.round = a_round
        self.plan = a_round.begin(**changes)
        self.names = sites_of(a_round)

    def site(self, name: str) -> Contributor:
        return self.round.participants[name].contributor

    def signed_plan(self) -> SignedPlan:
        return sign_plan(self.plan, self.round.parties.server)

    def advertised(self) -> PeerKeys:
        found = tuple(encode(self.site(name).advertise(self.signed_plan())) for name in self.names)
        return PeerKeys(plan_digest=self.plan.digest, advertisements=found)

    def sharing(self) -> Sharing:
        self.round.secure_sum.enrol(self.plan)
        sharing = self.round.secure_sum._sharing
        assert sharing is not None
        return sharing

    def uploaded(self) -> Surviving:
        sharing = self.sharing()
        manifests = {manifest.site: manifest for manifest in self.round.manifests(self.names)}
        assert len(manifests) == len(self.names)
        return Surviving.of(sharing, manifests)

    @staticmethod
    def without(survivors: SurvivorSet, *lost: str) -> SurvivorSet:
        kept = [(s, d) for s, d in zip(survivors.survivors, survivors.upload_digests, strict=True) if s not in lost]
        return replace(survivors, survivors=tuple(s for s, _ in kept), upload_digests=tuple(d for _, d in kept))

    def agreement(self, name: str, survivors: SurvivorSet, **changes: Any) -> Agreement:
        """Signed by the site's key without asking the site: a colluding one's."""
        said = Agreement(plan_digest=self.plan.digest, site=name, survivors_digest=survivors.digest)
        return signed(replace(said, **changes), self.round.parties.sites[name])

    def request(self, survivors: SurvivorSet, agreements: Sequence[Agreement]) -> UnmaskRequest:
        return UnmaskRequest(
            plan_digest=self.plan.digest,
            survivors_digest=survivors.digest,
            agreements=tuple(encode(agreement) for agreement in agreements),
        )

    def journal(self, name: str) -> Path:
        return self.site(name)._journal._path

    def restarted(self, name: str) -> Contributor:
        """The site after a crash: a new object over the same journal."""
        old = self.site(name)
        return Contributor(
            key=self.round.parties.sites[name],
            roster=self.round.parties.roster,
            policy=old._policy,
            journal=RoundJournal(self.journal(name)),
            clock=old._clock,
        )


@pytest.fixture
def federation(make_round: MakeRound) -> Federation:
    return Federation(make_round(5, clock=Clock()))


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


class TestUnmaskRules:
    def test_the_honest_way_through_works(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        agreements = [federation.site(name).agree(survivors) for name in federation.names]
        revealed = federation.site("s00").unmask(federation.request(survivors, agreements))
        assert revealed.self_of == tuple(federation.names)
        assert revealed.mask_of == ()

    def test_both_shares_of_one_site_have_no_message(self) -> None:
        fields: dict[str, Any] = {"plan_digest": digest("plan"), "survivors_digest": digest("set"), "site": "s00"}
        for self_of, mask_of in (((), ()), (("a",), ("b",)), (("a", "b"), ("b",))):
            message = {
                **fields,
                "self_of": self_of,
                "self_shares": (bytes(32),) * len(self_of),
                "mask_of": mask_of,
                "mask_shares": (bytes(32),) * len(mask_of),
            }
            if set(self_of) & set(mask_of):
                with pytest.raises(InvalidValue, match="mask_of"):
                    UnmaskShares(**message)
            else:
                UnmaskShares(**message)

    def test_a_site_reveals_one_kind_for_every_peer(self, federation: Federation) -> None:
        survivors = federation.without(federation.uploaded().survivors, "s03")
        agreements = [federation.site(name).agree(survivors) for name in survivors.survivors]
        revealed = federation.site("s00").unmask(federation.request(survivors, agreements))
        assert revealed.self_of == survivors.survivors
        assert revealed.mask_of == ("s03",)

    def test_a_site_that_is_in_and_out_has_no_set(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        twice = {"survivors": (*survivors.survivors, "s04"), "upload_digests": (*survivors.upload_digests, digest("x"))}
        stranger = {"survivors": (*survivors.survivors, "s99"), "upload_digests": twice["upload_digests"]}
        for wrong in (twice, stranger, {"sharers": survivors.sharers[:-1]}, {"upload_digests": ()}):
            with pytest.raises(InvalidValue):
                replace(survivors, **wrong)

    def test_a_second_set_is_not_signed_also_after_a_restart(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        other = federation.without(survivors, "s03")
        site = federation.site("s00")
        assert site.agree(survivors) == site.agree(survivors)  # an answer lost on the way
        with pytest.raises(ProtocolError, match="another survivor set"):
            site.agree(other)
        with pytest.raises(ProtocolError):  # its secrets went with it
            federation.restarted("s00").agree(other)
        with pytest.raises(ProtocolError, match="another survivor set"):
            RoundJournal(federation.journal("s00")).sign(federation.plan, other.digest)

    def test_shares_are_given_once_whatever_is_asked_later(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        agreements = [federation.site(name).agree(survivors) for name in federation.names]
        request = federation.request(survivors, agreements)
        site = federation.site("s00")
        site.unmask(request)
        other = federation.without(survivors, "s03")
        forged = federation.request(other, [federation.agreement(n, other) for n in other.survivors])
        restarted = federation.restarted("s00")
        for asked, again in itertools.product((site, restarted), (request, forged)):
            with pytest.raises(ProtocolError):
                asked.unmask(again)
        for asked in (site, restarted):
            with pytest.raises(ProtocolError):
                asked.agree(other)
            for attempt in (1, 2, 7):
                plan = replace(federation.plan, attempt=attempt, nonce=f"{attempt:02}")
                with pytest.raises(ProtocolError, match="may have been opened"):
                    asked.advertise(sign_plan(plan, federation.round.parties.server))
        journal = RoundJournal(federation.journal("s00"))
        for survivors_digest in (survivors.digest, other.digest):
            with pytest.raises(ProtocolError):
                journal.unmask(federation.plan, survivors_digest)

    def test_the_record_is_on_disk_before_the_shares_leave(
        self, federation: Federation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        survivors = federation.uploaded().survivors
        agreements = [federation.site(name).agree(survivors) for name in federation.names]

        def dies(*_: Any) -> None:
            raise SystemExit

        monkeypatch.setattr(contributor_module, "signed", dies)  # the last thing before the shares go
        with pytest.raises(SystemExit):
            federation.site("s00").unmask(federation.request(survivors, agreements))
        with pytest.raises(ProtocolError, match="given before"):
            RoundJournal(federation.journal("s00")).unmask(federation.plan, survivors.digest)

    @pytest.mark.parametrize(
        ("changes", "lost"),
        [({}, ("s03", "s04")), ({"min_contributors": 5, "threshold": 4}, ("s04",))],
        ids=["fewer than t", "fewer than k"],
    )
    def test_a_small_set_is_not_signed(
        self, make_round: MakeRound, changes: dict[str, Any], lost: tuple[str, ...]
    ) -> None:
        federation = Federation(make_round(5), **changes)
        small = federation.without(federation.uploaded().survivors, *lost)
        for name in small.survivors:
            with pytest.raises(ProtocolError, match=r"at least . are needed"):
                federation.site(name).agree(small)

    def test_of_a_split_view_neither_half_unmasks(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        one, other = federation.without(survivors, "s04"), federation.without(survivors, "s00")
        said_one = [federation.site(name).agree(one) for name in ("s00", "s01")]
        said_other = [federation.site(name).agree(other) for name in ("s03", "s04")]
        for site in ("s02",):  # the colluding one signs both
            said_one.append(federation.agreement(site, one))
            said_other.append(federation.agreement(site, other))
        for name, chosen, said in [
            *((name, one, said_one) for name in ("s00", "s01")),
            *((name, other, said_other) for name in ("s03", "s04")),
        ]:
            for agreements in (said, said_one + said_other):
                with pytest.raises(ProtocolError):
                    federation.site(name).unmask(federation.request(chosen, agreements))
        # Nothing was written down either: the honest set can still be asked for where it was signed.
        assert all(
            RoundJournal(federation.journal(name)).unmask(federation.plan, one.digest) is None for name in ("s00",)
        )

    def test_its_own_upload_must_be_in_the_set_as_it_was_signed(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        altered = replace(survivors, upload_digests=(digest("other"), *survivors.upload_digests[1:]))
        swapped = replace(survivors, upload_digests=survivors.upload_digests[::-1])
        for wrong in (federation.without(survivors, "s00"), altered, swapped):
            with pytest.raises(ProtocolError, match="this site's upload"):
                federation.site("s00").agree(wrong)

    def test_another_view_of_who_takes_part_is_not_signed(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        four = federation.without(survivors, "s04")
        for wrong in (
            replace(survivors, keys_digest=digest("other keys")),
            replace(four, sharers=four.survivors),
            replace(survivors, sharers=(*survivors.sharers, "s99")),
        ):
            with pytest.raises(ProtocolError, match="another view"):
                federation.site("s00").agree(wrong)

    @pytest.mark.parametrize(
        "forged",
        [
            "bit flipped",
            "unsigned",
            "signed by another",
            "outsider",
            "of a lost site",
            "another set",
            "another attempt",
        ],
    )
    def test_one_forged_agreement_refuses_the_request(self, federation: Federation, forged: str) -> None:
        survivors = federation.without(federation.uploaded().survivors, "s04")
        agreements = [federation.site(name).agree(survivors) for name in survivors.survivors]
        good, outsider = agreements[3], SigningKey.generate("s03")
        wrong = {
            "bit flipped": replace(good, signature=bytes([good.signature[0] ^ 1]) + good.signature[1:]),
            "unsigned": replace(good, signature=b""),
            "signed by another": replace(good, signature=federation.agreement("s01", survivors).signature),
            "outsider": signed(good, outsider),
            "of a lost site": federation.agreement("s04", survivors),
            "another set": federation.agreement("s03", federation.without(survivors, "s02")),
            "another attempt": federation.agreement("s03", survivors, plan_digest=digest("attempt 2")),
        }[forged]
        site = federation.site("s00")
        for agreement_list in ([*agreements[:3], wrong], [*agreements, wrong]):
            with pytest.raises(ProtocolError):
                site.unmask(federation.request(survivors, agreement_list))
        revealed = site.unmask(federation.request(survivors, agreements))  # nothing of it was used
        assert revealed.mask_of == ("s04",)

    def test_an_agreement_of_a_stranger_refuses_the_request(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        agreements = [federation.site(name).agree(survivors) for name in federation.names]
        said = Agreement(plan_digest=federation.plan.digest, site="s99", survivors_digest=survivors.digest)
        stranger = signed(said, SigningKey.generate("s99"))
        with pytest.raises(ProtocolError, match="is no site of the federation"):
            federation.site("s00").unmask(federation.request(survivors, [*agreements, stranger]))

    def test_fewer_than_t_agreements_or_one_repeated_are_too_few(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        agreements = [federation.site(name).agree(survivors) for name in federation.names]
        for too_few in ([], agreements[:3], agreements[:3] + agreements[:3], [agreements[0]] * 9):
            with pytest.raises(ProtocolError, match="at least 4 are needed"):
                federation.site("s00").unmask(federation.request(survivors, too_few))

    def test_agreements_of_another_round_do_not_count(self, federation: Federation) -> None:
        survivors = federation.uploaded().survivors
        old = [federation.site(name).agree(survivors) for name in federation.names]
        later = Federation(federation.round, server_round=2)
        again = later.uploaded().survivors
        for name in later.names:
            later.site(name).agree(again)
        for request in (later.request(again, old), later.request(survivors, old), federation.request(survivors, old)):
            with pytest.raises(ProtocolError):
                later.site("s00").unmask(request)

    def test_the_same_rounds_update_is_in_one_opened_sum_at_most(self, make_round: MakeRound) -> None:
        a_round = make_round(7)
        half = {"s00", "s01", "s02", "s03"}
        a_round.channel.bend = lambda operation, site, body: (
            None if operation == "advertise" and site not in half else body
        )
        a_round.channel.bend_request = lambda operation, site, body: (
            None if operation == "unmask" and site == "s03" else body
        )
        chosen = {"max_contributors": 4, "max_colluding": 0, "ckks": parameters_for(7, 13)}
        first = a_round.run(**chosen)
        half -= {"s00", "s01", "s02"}
        half |= {"s04", "s05", "s06"}
        a_round.channel.bend_request = lambda operation, site, body: body
        try:
            second = a_round.run(attempt=2, **chosen)
        except RoundLost:
            return
        assert not set(first.cohort) & set(second.cohort)


class TestLostAndUploaded:
    """The attack of Bonawitz et al. 2017 (section 4): call a site lost to get its mask key, and keep its upload."""

    def test_the_upload_of_a_site_called_lost_stays_closed(self, make_round: MakeRound) -> None:
        federation = Federation(make_round(5, 2 * CHUNK))
        a_round, plan = federation.round, federation.plan
        assert a_round.secure_sum._decryptor._key is not None
        attacker = Attacker(a_round.secure_sum._decryptor._key)
        surviving = federation.uploaded()
        seed = state_of(a_round, "s00").view.seed  # for the control at the end only
        upload = uploads_of(a_round, plan, ["s00"])["s00"]
        lie = federation.without(surviving.survivors, "s00")
        with pytest.raises(ProtocolError):  # the victim does not sign
            federation.site("s00").agree(lie)
        agreements = [federation.site(name).agree(lie) for name in lie.survivors]
        request = federation.request(lie, agreements)
        revealed = [federation.site(name).unmask(request) for name in lie.survivors]

        of_key = {m.site: m.mask_shares[m.mask_of.index("s00")] for m in revealed}
        private = X25519PrivateKey.from_private_bytes(
            shares.join(of_key, threshold=plan.threshold, holders=federation.names)
        )
        keys = surviving.sharing.enrolled.keys
        assert private.public_key().public_bytes_raw() == keys["s00"].mask_key  # the attack got that far
        pair_masks = [
            (masks.pair_mask_key(masks.agree(private, keys[peer].mask_key), plan.digest, "s00", peer), 1)
            for peer in lie.survivors
        ]
        stripped = attacker.subtract_masks(upload, pair_masks)
        assert not any("s00" in message.self_of for message in revealed)  # 0 shares of its seed
        with pytest.raises(ProtocolError):  # and the victim, which holds all of them, is asked in vain
            federation.site("s00").unmask(request)
        require_noise(attacker, stripped, [a_round.participants["s00"].grid])
        own_mask = [(masks.self_mask_key(seed, plan.digest, "s00"), 1)]
        assert (attacker.grid(attacker.subtract_masks(stripped, own_mask)) == a_round.participants["s00"].grid).all()


class TestPlanRules:
    def test_a_plan_that_a_site_must_not_accept(self, make_round: MakeRound) -> None:
        a_round = make_round(5, policy=SumPolicy(min_contributors=4, max_colluding=1))
        plan = a_round.begin(min_contributors=4)
        server, site = a_round.parties.server, a_round.participants["s00"].contributor
        good = sign_plan(plan, server)
        other = Parties.of(5)

        def resigned(**changes: Any) -> SignedPlan:
            return sign_plan(replace(plan, **changes), server)

        wrong: dict[str, tuple[SignedPlan, str]] = {
            "altered": (replace(good, plan=replace(plan, clip=2.0)), "does not hold"),
            "unsigned": (replace(good, signature=b""), "does not hold"),
            "another server": (sign_plan(plan, SigningKey.generate("server")), "does not hold"),
            "a site's": (replace(good, signature=a_round.parties.sites["s01"].sign("plan", b"")), "does not hold"),
            "another purpose": (
                replace(good, signature=server.sign("roster", bytes.fromhex(plan.digest))),
                "does not hold",
            ),
            "expired": (resigned(expires_at=NOW), "expired"),
            "another roster": (resigned(roster_digest=other.roster.digest), "another roster"),
            "smaller k": (resigned(min_contributors=3), "policy demands 4"),
            "smaller c": (resigned(max_colluding=0), "policy demands 1"),
            "overflow": (resigned(value_bits=18), "value_bits"),
        }
        for name, (signed_plan, words) in wrong.items():
            with pytest.raises(FedCollmError, match=words):
                site.advertise(signed_plan)
            assert site._state is None, name
        site.advertise(good)  # and none of these was counted as an answer
        with pytest.raises(ProtocolError, match="answered before"):
            site.advertise(good)

    def test_a_plan_cannot_be_made_that_two_sets_could_pass(self, make_round: MakeRound) -> None:
        plan = make_round(5).begin()
        for changes in ({"threshold": 3}, {"threshold": 6}, {"min_contributors": 2}, {"max_colluding": 2}):
            with pytest.raises(InvalidValue):
                replace(plan, **changes)

    def test_an_earlier_round_or_attempt_is_over(self, federation: Federation) -> None:
        server = federation.round.parties.server
        site = federation.site("s00")
        site.advertise(sign_plan(replace(federation.plan, server_round=3, attempt=2), server))
        for server_round, attempt in ((3, 2), (3, 1), (2, 9), (1, 1)):
            plan = replace(federation.plan, server_round=server_round, attempt=attempt, nonce="01")
            for asked in (site, federation.restarted("s00")):
                with pytest.raises(ProtocolError, match="before, or a later one"):
                    asked.advertise(sign_plan(plan, server))
        site.advertise(sign_plan(replace(federation.plan, server_round=3, attempt=3), server))

    def test_an_expired_roster_takes_part_in_nothing(self, federation: Federation) -> None:
        clock = federation.site("s00")._clock
        assert isinstance(clock, Clock)
        plan = replace(federation.plan, expires_at=NOW + 10**7)
        for now in (NOW + 10**6, float("nan"), float("inf")):
            clock.now = now
            with pytest.raises(ProtocolError):
                federation.site("s00").advertise(sign_plan(plan, federation.round.parties.server))

    def test_a_plan_expires_at_every_phase(self, federation: Federation) -> None:
        clock, site, plan = federation.site("s00")._clock, federation.site("s00"), federation.plan
        assert isinstance(clock, Clock)
        a_round = federation.round
        refused = []

        def first_too_late(operation: str, name: str, body: bytes | None) -> bytes | None:
            if name == "s00" and body is not None:
                for clock.now in (plan.expires_at, plan.expires_at + 0.5, float("nan")):
                    before = state_of(a_round, "s00")
                    assert a_round.participants["s00"].handle(operation, body) is None
                    assert state_of(a_round, "s00") is before
                    assert "expired" in (said := a_round.participants["s00"].refusals[-1]) or "not valid" in said
                refused.append(operation)
                clock.now = plan.expires_at - 0.5
            return body

        def before_upload(operation: str, name: str, body: bytes | None) -> bytes | None:
            if operation == "accept" and name == "s00":
                clock.now = plan.expires_at
                with pytest.raises(ProtocolError, match="expired"):
                    site.ready(plan.digest)
                assert a_round.context is not None
                with pytest.raises(ProtocolError, match="expired"):
                    site.upload(QuantizedUpdate(plan=plan, grid=a_round.participants["s00"].grid), a_round.context)
                clock.now = NOW
            return body

        a_round.channel.bend_request, a_round.channel.bend = first_too_late, before_upload
        opened = a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))
        assert refused == ["advertise", "share", "accept", "part", "agree", "unmask"]
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_no_step_can_be_left_out_or_taken_twice(self, federation: Federation) -> None:
        # Every request of an honest round, to a site at every point of that round but the right one.
        a_round, plan = federation.round, federation.plan
        asked: list[tuple[str, bytes]] = []

        def replay(operation: str, name: str, body: bytes | None) -> bytes | None:
            if name == "s00" and body is not None:
                for earlier, request in asked:
                    # Parts and the one agreement may be asked for again; a plan is in the next test.
                    if earlier not in ("advertise", "part") and (earlier, operation) != ("agree", "unmask"):
                        assert a_round.participants["s00"].handle(earlier, request) is None
                asked.append((operation, body))
            return body

        a_round.channel.bend_request = replay
        opened = a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        for operation, request in asked:
            assert a_round.participants["s00"].handle(operation, request) is None
        fresh = federation.restarted("s00")
        for kind, request in zip((SignedPlan, PeerKeys, PeerShares), (r for _, r in asked), strict=False):
            call = {SignedPlan: fresh.advertise, PeerKeys: fresh.share, PeerShares: fresh.accept_shares}[kind]
            with pytest.raises(ProtocolError):
                call(decode(request, kind))  # type: ignore[operator]

    def test_a_replayed_plan_does_not_disturb_the_round(self, federation: Federation) -> None:
        # A retry by the transport, or anybody who kept the plan, which is no secret.
        federation.sharing()
        with pytest.raises(ProtocolError, match="answered before"):
            federation.site("s00").advertise(federation.signed_plan())
        assert federation.site("s00").ready(federation.plan.digest) == federation.plan

    @pytest.mark.parametrize("field", ["server_round", "attempt"])
    def test_a_round_number_beyond_the_journal_is_refused(self, federation: Federation, field: str) -> None:
        with pytest.raises(FedCollmError, match=field):
            replace(federation.plan, **{field: 2**63})
        largest = replace(federation.plan, **{field: 2**53 - 1})
        federation.site("s00").advertise(sign_plan(largest, federation.round.parties.server))

    def test_the_public_key_is_the_plans(self, federation: Federation) -> None:
        federation.sharing()
        site, grid = federation.site("s00"), federation.round.participants["s00"].grid
        update = QuantizedUpdate(plan=federation.plan, grid=grid)
        _, another = generate(federation.plan.ckks)
        _, other_parameters = generate(parameters_for(4, 17))
        for context in (another, other_parameters):
            with pytest.raises(ProtocolError):
                site.upload(update, context)
        later = replace(federation.plan, attempt=2)
        assert federation.round.context is not None
        with pytest.raises(ProtocolError):
            site.upload(QuantizedUpdate(plan=later, grid=grid), federation.round.context)
        with pytest.raises(InvalidValue, match="grid"):
            site.upload(QuantizedUpdate(plan=federation.plan, grid=grid + 10**6), federation.round.context)
        site.upload(update, federation.round.context)
        with pytest.raises(ProtocolError):  # once: a second update under the same masks would give the difference away
            site.upload(update, federation.round.context)


class TestKeyRules:
    @staticmethod
    def of(advertisements: Sequence[Advertisement], plan: RoundPlan) -> PeerKeys:
        return PeerKeys(plan_digest=plan.digest, advertisements=tuple(encode(a) for a in advertisements))

    @pytest.mark.parametrize(
        "forged",
        [
            "substituted",
            "substituted and signed by the server",
            "substituted and signed by another site",
            "unsigned",
            "duplicate",
            "two of one site",
            "low order",
            "own altered",
            "own with another signature",
            "own missing",
            "unknown name",
            "server as a site",
            "another round's",
            "too few",
            "nothing",
            "another message",
        ],
    )
    def test_a_site_gives_no_share_under_forged_keys(self, federation: Federation, forged: str) -> None:
        honest = [decode(raw, Advertisement) for raw in federation.advertised().advertisements]
        parties, plan = federation.round.parties, federation.plan
        fresh = X25519PrivateKey.generate().public_key().public_bytes_raw()
        changed = replace(honest[3], mask_key=fresh, share_key=fresh)
        by_peer = signed(changed, parties.sites["s03"])
        stranger = signed(replace(changed, site="s99"), SigningKey.generate("s99"))
        cases: dict[str, list[Advertisement]] = {
            "substituted": [*honest[:3], changed, honest[4]],
            "substituted and signed by the server": [*honest[:3], signed(changed, parties.server), honest[4]],
            "substituted and signed by another site": [*honest[:3], signed(changed, parties.sites["s01"]), honest[4]],
            "unsigned": [*honest[:3], replace(honest[3], signature=b""), honest[4]],
            "duplicate": [*honest, honest[3]],
            "two of one site": [*honest, by_peer],
            "low order": [
                *honest[:3],
                signed(replace(honest[3], share_key=bytes(32)), parties.sites["s03"]),
                honest[4],
            ],
            "own altered": [replace(honest[0], mask_key=fresh), *honest[1:]],
            "own with another signature": [replace(honest[0], signature=honest[1].signature), *honest[1:]],
            "own missing": honest[1:],
            "unknown name": [*honest[:4], stranger],
            "server as a site": [*honest[:4], signed(replace(changed, site="server"), parties.server)],
            "another round's": [
                *honest[:3],
                signed(replace(honest[3], plan_digest=digest("attempt 2")), parties.sites["s03"]),
                honest[4],
            ],
            "too few": honest[:3],
            "nothing": [],
        }
        site = federation.site("s00")
        if forged == "another message":
            request = replace(self.of(honest, plan), advertisements=(encode(federation.signed_plan()),))
        else:
            request = self.of(cases[forged], plan)
        with pytest.raises(ProtocolError):
            site.share(request)
        shared = site.share(self.of(honest, plan))  # nothing of it was kept
        assert len(shared.shares) == 5

    def test_a_peer_whose_mask_key_is_of_low_order_is_left_out_by_the_server(self, make_round: MakeRound) -> None:
        for name, point in (("zero", bytes(32)), ("one", (1).to_bytes(32, "little"))):
            a_round = make_round(5, folder=name)
            bend_signed(a_round, "advertise", "s03", lambda a, point=point: replace(a, mask_key=point))
            opened = a_round.run()
            assert "s03" not in opened.cohort
            assert a_round.secure_sum.rejected == {"s03": "unusable keys"}
            assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_a_low_order_mask_key_from_a_malicious_server_stops_the_upload(self, federation: Federation) -> None:
        # s03 colludes, so that the signature is good. The pair mask would be known to all; s00 gives no upload.
        honest = [decode(raw, Advertisement) for raw in federation.advertised().advertisements]
        key = federation.round.parties.sites["s03"]
        honest[3] = signed(replace(honest[3], mask_key=bytes(32)), key)
        keys = self.of(honest, federation.plan)
        bundles = {name: federation.site(name).share(keys) for name in federation.names if name != "s03"}
        addressed = [raw for b in bundles.values() for raw in b.shares if decode(raw, SealedShare).receiver == "s00"]
        view = state_of(federation.round, "s00").view
        state = state_of(federation.round, "s03")
        s03_view = replace(view, keys={**view.keys}, seed=os.urandom(32))
        mine = next(s for s in seal_shares(state.mine, s03_view, federation.plan.threshold) if s.receiver == "s00")
        addressed.append(encode(signed(mine, key)))
        site = federation.site("s00")
        site.accept_shares(PeerShares(plan_digest=federation.plan.digest, shares=tuple(addressed)))
        assert federation.round.context is not None
        with pytest.raises(ProtocolError, match="low order"):
            site.upload(
                QuantizedUpdate(plan=federation.plan, grid=federation.round.participants["s00"].grid),
                federation.round.context,
            )
        with pytest.raises(ProtocolError):
            site.part(PartRequest(plan_digest=federation.plan.digest, first=0, count=1))

    def test_more_sites_than_the_plan_allows_share_nothing(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        federation = Federation(a_round, max_contributors=4, ckks=parameters_for(5, 13))
        keys = federation.advertised()
        with pytest.raises(ProtocolError, match="the plan allows 4"):
            federation.site("s00").share(keys)

    def test_of_two_views_of_the_keys_only_one_goes_on(self, make_round: MakeRound) -> None:
        # Half of the sites is told of four sites, the other half of all five.
        federation = Federation(make_round(5, CHUNK), max_colluding=0, min_contributors=3)
        keys = [decode(raw, Advertisement) for raw in federation.advertised().advertisements]
        five, four = self.of(keys, federation.plan), self.of(keys[:4], federation.plan)
        views = {"s00": four, "s01": four, "s02": five, "s03": five, "s04": five}
        bundles = {name: federation.site(name).share(view) for name, view in views.items()}
        sealed = {name: [decode(raw, SealedShare) for raw in b.shares] for name, b in bundles.items()}
        for receiver in ("s00", "s01", "s02", "s03"):
            request = PeerShares(
                plan_digest=federation.plan.digest,
                shares=tuple(encode(s) for of in sealed.values() for s in of if s.receiver == receiver),
            )
            with pytest.raises(ProtocolError, match="another view"):
                federation.site(receiver).accept_shares(request)
        # Each view alone: those of four are too few for t, those of five go on among themselves.
        digest_of_five = keys_digest(tuple(keys))
        for receiver, senders in (("s00", ("s00", "s01")), ("s02", ("s02", "s03", "s04"))):
            request = PeerShares(
                plan_digest=federation.plan.digest,
                shares=tuple(encode(s) for n in senders for s in sealed[n] if s.receiver == receiver),
            )
            if receiver == "s00":
                with pytest.raises(ProtocolError, match="at least 3 are needed"):
                    federation.site(receiver).accept_shares(request)
            else:
                federation.site(receiver).accept_shares(request)
                assert state_of(federation.round, receiver).view.digest == digest_of_five

    def test_the_coordinator_leaves_out_who_saw_other_keys(self, make_round: MakeRound) -> None:
        a_round = make_round(8)

        def other_view(operation: str, site: str, body: bytes | None) -> bytes | None:
            if operation == "share" and site in ("s06", "s07") and body is not None:
                keys = decode(body, PeerKeys)
                return encode(replace(keys, advertisements=keys.advertisements[1:]))
            return body

        a_round.channel.bend_request = other_view
        opened = a_round.run()
        assert set(sites_of(a_round)) - set(opened.cohort) == {"s06", "s07"}
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_a_revoked_site_is_in_no_further_round(self, make_round: MakeRound, tmp_path: Path) -> None:
        # The governance signs a roster without s04 and the sites pin it: plans of the old one are declined.
        a_round = make_round(5)
        a_round.run()
        parties = a_round.parties
        shorter = replace(parties.roster, sites=parties.roster.sites[:4])
        plan = replace(a_round.begin(server_round=2), roster_digest=shorter.digest)
        old_plan = replace(plan, roster_digest=parties.roster.digest)
        for name in ("s00", "s01"):
            renewed = Contributor(
                key=parties.sites[name],
                roster=shorter,
                policy=SumPolicy(min_contributors=3, max_colluding=1),
                journal=RoundJournal(tmp_path / "sites" / f"{name}.sqlite"),
                clock=lambda: NOW,
            )
            with pytest.raises(ProtocolError, match="another roster"):
                renewed.advertise(sign_plan(old_plan, parties.server))
            renewed.advertise(sign_plan(plan, parties.server))
        with pytest.raises(ProtocolError, match="no site of the federation"):
            Contributor(
                key=parties.sites["s04"],
                roster=shorter,
                policy=SumPolicy(min_contributors=3, max_colluding=1),
                journal=RoundJournal(tmp_path / "s04.sqlite"),
            )


def bend_signed(a_round: Round, operation: str, site: str, change: Callable[[Any], Any]) -> None:
    """A malicious site changes its own answer and signs it again."""
    kinds: dict[str, Any] = {"advertise": Advertisement, "agree": Agreement, "unmask": UnmaskShares}
    before = a_round.channel.bend

    def bend(asked: str, name: str, body: bytes | None) -> bytes | None:
        body = before(asked, name, body)
        if (asked, name) != (operation, site) or body is None:
            return body
        return encode(signed(change(decode(body, kinds[operation])), a_round.parties.sites[site]))

    a_round.channel.bend = bend


def bend_shares(a_round: Round, dealer: str, change: Callable[[SealedShare], SealedShare]) -> None:
    """A malicious dealer changes what it deals and signs it again."""
    before = a_round.channel.bend

    def bend(asked: str, name: str, body: bytes | None) -> bytes | None:
        body = before(asked, name, body)
        if (asked, name) != ("share", dealer) or body is None:
            return body
        bundle = decode(body, SealedShares)
        key = a_round.parties.sites[dealer]
        dealt = tuple(encode(signed(change(decode(raw, SealedShare)), key)) for raw in bundle.shares)
        return encode(replace(bundle, shares=dealt))

    a_round.channel.bend = bend


class TestShareRules:
    """Five sites, t = 4: one wrong share can be spared, two cannot."""

    @pytest.mark.parametrize("kind", ["box", "self_commitment", "mask_commitment"])
    @pytest.mark.parametrize("lost", [None, "s01"])
    def test_one_corrupted_share_is_not_revealed_and_the_round_goes_on(
        self, make_round: MakeRound, kind: str, lost: str | None
    ) -> None:
        a_round = make_round(6)  # t = 4
        flipped: dict[str, Callable[[bytes], bytes]] = {"box": lambda b: b[:-1] + bytes([b[-1] ^ 1])}
        flip = flipped.get(kind, lambda _: os.urandom(32))
        bend_shares(
            a_round, "s01", lambda s: replace(s, **{kind: flip(getattr(s, kind))}) if s.receiver == "s00" else s
        )
        if lost is not None:
            before = a_round.channel.bend
            a_round.channel.bend = lambda o, s, b: None if (o, s) == ("upload", lost) else before(o, s, b)
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        assert ("s01" in opened.cohort) == (lost is None)
        of_s00 = next(m for m in map(lambda b: decode(b, UnmaskShares), sent(a_round, "unmask")) if m.site == "s00")
        if kind == "box" or (kind == "self_commitment" and lost is None) or (kind == "mask_commitment" and lost):
            assert "s01" not in of_s00.self_of + of_s00.mask_of
        else:
            assert "s01" in of_s00.self_of + of_s00.mask_of

    def test_a_box_that_is_none_is_not_revealed(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        bend_shares(a_round, "s01", lambda s: replace(s, box=bytes(80)) if s.receiver == "s00" else s)
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_a_dealer_that_spoils_too_many_boxes_loses_the_round_and_is_named(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        bend_shares(a_round, "s01", lambda s: replace(s, box=bytes(80)) if s.receiver in ("s00", "s02") else s)
        with pytest.raises(RoundLost, match="only 3 sites hold good shares of site s01; 4 are needed"):
            a_round.run()
        assert not sent(a_round, "part"), "before anybody has trained"

    @pytest.mark.parametrize("length", [0, 1, 79, 81, 10_000])
    def test_no_box_of_another_length_travels(self, length: int) -> None:
        sealed = SealedShare(
            plan_digest=digest("p"),
            keys_digest=digest("k"),
            site="s00",
            receiver="s01",
            box=bytes(80),
            self_commitment=bytes(32),
            mask_commitment=bytes(32),
            seed_commitment=bytes(32),
        )
        with pytest.raises(InvalidValue, match="box"):
            replace(sealed, box=bytes(length))

    def test_a_dealer_whose_shares_are_not_of_its_seed_is_named(self, make_round: MakeRound) -> None:
        a_round = make_round(5)

        def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
            if (operation, site) != ("share", "s01") or body is None:
                return body
            state, key = state_of(a_round, "s01"), a_round.parties.sites["s01"]
            other = replace(state.view, seed=os.urandom(32))
            of_seed = shares.commit(state.view.seed, state.plan.digest, "seed", "s01")
            dealt = seal_shares(state.mine, other, state.plan.threshold)
            lied = tuple(encode(signed(replace(s, seed_commitment=of_seed), key)) for s in dealt)
            return encode(SealedShares(plan_digest=state.plan.digest, site="s01", shares=lied))

        a_round.channel.bend = bend
        with pytest.raises(RoundLost, match="site s01 dealt shares that are not of the seed"):
            a_round.run()

    @pytest.mark.parametrize("lost", [False, True])
    def test_a_dealer_whose_shares_are_not_of_its_mask_key_is_named_once_it_is_lost(
        self, make_round: MakeRound, lost: bool
    ) -> None:
        a_round = make_round(5)

        def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
            if (operation, site) == ("upload", "s01") and lost:
                return None
            if (operation, site) != ("share", "s01") or body is None:
                return body
            state, key = state_of(a_round, "s01"), a_round.parties.sites["s01"]
            other = replace(state.mine, mask_key=X25519PrivateKey.generate())
            dealt = seal_shares(other, state.view, state.plan.threshold)
            lied = tuple(encode(signed(s, key)) for s in dealt)
            return encode(SealedShares(plan_digest=state.plan.digest, site="s01", shares=lied))

        a_round.channel.bend = bend
        if lost:
            with pytest.raises(RoundLost, match="site s01 dealt shares that are not of the key"):
                a_round.run()
        else:
            opened = a_round.run()
            assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_a_site_that_masks_otherwise_than_it_shared_spoils_the_round_and_stays_unnamed(
        self, make_round: MakeRound, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Poisoning: it can be told from no other well-formed upload. The round is lost, and nothing wrong is opened.
        a_round = make_round(5)
        original = contributor_module.mask_terms

        def other_masks(mine: Any, view: Any, peers: Any) -> Any:
            mine_is = mine.advertisement.site == "s01"
            return original(mine, replace(view, seed=os.urandom(32)) if mine_is else view, peers)

        monkeypatch.setattr(contributor_module, "mask_terms", other_masks)
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            a_round.run()

    @pytest.mark.parametrize("what", ["incomplete", "twice", "two seeds", "other receiver", "other view", "unsigned"])
    def test_a_dealer_of_a_wrong_bundle_is_left_out_by_name(self, make_round: MakeRound, what: str) -> None:
        a_round = make_round(5)

        def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
            if (operation, site) != ("share", "s01") or body is None:
                return body
            bundle, key = decode(body, SealedShares), a_round.parties.sites["s01"]
            dealt = [decode(raw, SealedShare) for raw in bundle.shares]
            if what == "incomplete":
                dealt = dealt[:-1]
            elif what == "twice":
                dealt = [*dealt, dealt[0]]
            elif what == "two seeds":
                dealt[2] = signed(replace(dealt[2], seed_commitment=bytes(32)), key)
            elif what == "other receiver":
                dealt[2] = signed(replace(dealt[2], receiver="s99"), key)
            elif what == "other view":
                dealt = [signed(replace(s, keys_digest=digest("other")), key) for s in dealt]
            else:
                dealt[2] = replace(dealt[2], signature=b"")
            return encode(replace(bundle, shares=tuple(encode(s) for s in dealt)))

        a_round.channel.bend = bend
        opened = a_round.run()
        assert a_round.secure_sum.rejected == {"s01": "malformed shares"}
        assert "s01" not in opened.cohort
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_shares_that_a_site_must_not_take(self, federation: Federation) -> None:
        keys = federation.advertised()
        sealed = {
            name: {
                s.receiver: s for s in (decode(raw, SealedShare) for raw in federation.site(name).share(keys).shares)
            }
            for name in federation.names
        }
        mine = [sealed[name]["s00"] for name in federation.names]
        parties, site = federation.round.parties, federation.site("s00")
        wrong: dict[str, list[SealedShare]] = {
            "another receiver's": [*mine[:4], sealed["s04"]["s01"]],
            "twice": [*mine, mine[1]],
            "unsigned": [*mine[:4], replace(mine[4], signature=b"")],
            "signed by another": [*mine[:4], signed(mine[4], parties.sites["s03"])],
            "own missing": mine[1:],
            "own altered": [signed(replace(mine[0], box=bytes(80)), parties.sites["s00"]), *mine[1:]],
            "too few": mine[:3],
            "a stranger's": [*mine[:4], signed(replace(mine[4], site="s99"), SigningKey.generate("s99"))],
            "another view": [*mine[:4], signed(replace(mine[4], keys_digest=digest("x")), parties.sites["s04"])],
        }
        for name, taken in wrong.items():
            request = PeerShares(plan_digest=federation.plan.digest, shares=tuple(encode(share) for share in taken))
            with pytest.raises(ProtocolError):
                site.accept_shares(request)
            assert type(site._state).__name__ == "_Shared", name
        site.accept_shares(PeerShares(plan_digest=federation.plan.digest, shares=tuple(encode(s) for s in mine)))

    def test_a_liar_at_the_unmasking_costs_its_own_share_only(self, make_round: MakeRound) -> None:
        def lie(message: UnmaskShares) -> UnmaskShares:
            return replace(message, self_shares=(os.urandom(32), *message.self_shares[1:]))

        a_round = make_round(5)
        bend_signed(a_round, "unmask", "s02", lie)
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        bend_signed(a_round, "unmask", "s03", lie)
        with pytest.raises(RoundLost, match=r"s02: a wrong share of site s00, s03: a wrong share of site s00"):
            a_round.run(server_round=2)

    @pytest.mark.parametrize("what", ["another set", "of strangers", "wrong length", "unsigned"])
    def test_an_unmasking_of_another_form_is_dropped(self, make_round: MakeRound, what: str) -> None:
        a_round = make_round(5)

        def change(m: UnmaskShares) -> UnmaskShares:
            if what == "another set":
                return replace(m, survivors_digest=digest("another"))
            if what == "of strangers":
                return replace(m, mask_of=("s99",), mask_shares=(bytes(32),))
            return replace(m, self_shares=tuple(share[:-1] for share in m.self_shares))

        if what == "unsigned":
            a_round.channel.bend = lambda o, s, b: (
                encode(replace(decode(b, UnmaskShares), signature=b"")) if (o, s) == ("unmask", "s02") and b else b
            )
        else:
            bend_signed(a_round, "unmask", "s02", change)
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_a_site_that_signs_another_set_is_not_counted(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        bend_signed(a_round, "agree", "s02", lambda a: replace(a, survivors_digest=digest("other")))
        opened = a_round.run()
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        assert len(sent(a_round, "unmask")) == 4
        bend_signed(a_round, "agree", "s03", lambda a: replace(a, survivors_digest=digest("other")))
        with pytest.raises(RoundLost, match="s02: signed another survivor set, s03"):
            a_round.run(server_round=2)


class TestChunks:
    def test_parts_come_in_any_order_as_often_as_asked(self, make_round: MakeRound) -> None:
        federation = Federation(make_round(5, 3 * CHUNK))
        manifest = federation.uploaded().survivors.upload_digests[0]
        site = federation.site("s00")

        def part(first: int, count: int) -> tuple[bytes, ...]:
            return site.part(PartRequest(plan_digest=federation.plan.digest, first=first, count=count)).chunks

        whole = part(0, 3)
        assert len(set(whole)) == 3
        for first, count in ((2, 1), (0, 1), (1, 2), (2, 1), (0, 3)):
            assert part(first, count) == whole[first : first + count]
        for first, count in ((3, 1), (0, 4), (2**40, 1)):
            with pytest.raises(ProtocolError, match="of 3"):
                part(first, count)
        assert state_of(federation.round, "s00").manifest.digest == manifest

    def test_a_part_that_is_lost_on_the_way_is_asked_for_again(self, make_round: MakeRound) -> None:
        a_round = make_round(4, 50 * CHUNK)  # two parts
        tries: dict[tuple[str, bytes], int] = {}

        def flaky(operation: str, site: str, body: bytes | None) -> bytes | None:
            if operation != "part" or body is None:
                return body
            tries[site, body] = tries.get((site, body), 0) + 1
            return None if tries[site, body] == 1 else b"cut" if tries[site, body] == 2 else body

        a_round.channel.bend = flaky
        opened = a_round.run()
        assert set(tries.values()) == {3}
        assert (opened.total == true_sum(a_round, opened.cohort)).all()

    def test_who_gives_no_more_parts_is_left_out(self, make_round: MakeRound) -> None:
        a_round = make_round(4, 50 * CHUNK)
        asked: list[PartRequest] = []

        def stops(operation: str, site: str, body: bytes | None) -> bytes | None:
            if (operation, site) == ("part", "s01") and body is not None:
                asked.append(decode(body, PartRequest))
                return body if asked[-1].first == 0 else None
            return body

        a_round.channel.bend_request = stops
        opened = a_round.run()
        assert a_round.secure_sum.rejected == {"s01": "broken_off"}
        assert [(r.first, r.count) for r in asked] == [(0, 48)] + [(48, 2)] * 3
        assert (opened.total == true_sum(a_round, opened.cohort)).all()


class TestEdges:
    @pytest.mark.parametrize(("sites", "bits"), [(3, 13), (3, 18), (16, 13), (16, 18)])
    def test_nothing_wraps_at_the_edges_of_the_grid(self, make_round: MakeRound, sites: int, bits: int) -> None:
        top = 2 ** (bits - 1) - 1
        alternating = np.where(np.arange(64) % 2, top, -top)
        full = np.full(64, top)

        def grid(index: int) -> Grid:
            sign = (-1) ** index
            parts = [full, -full, alternating, alternating * sign, full * sign, full - 1, np.zeros(64)]
            return np.concatenate([np.tile(part, CHUNK // 64) for part in parts]).astype(np.int32)

        # A whole chunk of each, so that both fields of a number, both parts of a slot and all slots are at the edge.
        a_round = make_round([grid(index) for index in range(sites)])
        opened = a_round.run(value_bits=bits)
        assert len(opened.cohort) == sites
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        assert opened.total.max() == -opened.total.min() == sites * top

    def test_an_update_of_a_million_times_the_clip_moves_the_sum_by_one_grid(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        plan = a_round.begin()
        vector = np.random.default_rng(1).normal(size=40).astype(np.float32) * np.float32(1e6 * plan.clip)
        vector[0] = np.float32(3e38)
        huge = quantize(PrivateUpdate(vector=vector, spec_digest=plan.spec_digest, reservation="non-private"), plan)
        assert set(np.abs(huge.grid)) == {plan.levels}
        a_round.participants["s01"].grid = huge.grid
        opened = a_round.secure_sum.open(a_round.manifests(a_round.secure_sum.enrol(plan)))
        assert (opened.total == true_sum(a_round, opened.cohort)).all()
        assert np.abs(opened.total).max() <= len(opened.cohort) * plan.levels

    def test_a_grid_beyond_its_levels_is_not_sealed(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        a_round.participants["s01"].grid = a_round.participants["s01"].grid * 10**5
        opened = a_round.run()
        assert "s01" not in opened.cohort
        assert "off the grid" in a_round.participants["s01"].refusals[0]

    def test_a_site_that_seals_beyond_its_levels_all_the_same_cannot_lift_the_sum(
        self, make_round: MakeRound, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # It skips the check of honest code: the total leaves [-n levels, n levels] and is refused.
        a_round = make_round(4)

        monkeypatch.setattr(sealing, "encrypt", lambda update, context: encrypt_grid(update.grid, context))
        for participant in a_round.participants.values():
            participant.grid = np.full(40, 4095, np.int32)
        a_round.participants["s01"].grid = np.full(40, 4096, np.int32)
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            a_round.run()


class TestSecrets:
    def test_no_state_error_journal_or_witness_shows_a_secret(self, make_round: MakeRound, tmp_path: Path) -> None:
        grids = random_grids(5, 40)
        a_round = make_round(grids)
        federation_secrets: set[bytes] = set()
        shown: list[str] = []
        journals: list[bytes] = []

        def collect(operation: str, site: str, body: bytes | None) -> bytes | None:
            state = state_of(a_round, site)
            federation_secrets.update(secrets_in(state))
            shown.extend((repr(state), str(state), repr(a_round.participants[site].contributor)))
            shown.extend(repr(part) for part in parts_of(state))
            # Provoke what a site says no to; the texts go to its log.
            for wrong in ("share", "accept", "agree", "unmask", "part"):
                a_round.participants[site].handle(wrong, body or b"")
            journals.extend(path.read_bytes() for path in tmp_path.glob("sites/*"))
            return body

        a_round.channel.bend = collect
        opened = a_round.run()
        assert (opened.total == np.sum(grids, axis=0)).all()
        for name, key in a_round.parties.sites.items():
            federation_secrets.add(key._private.private_bytes_raw())
            shown.append(repr(key))
            shown.extend(a_round.participants[name].refusals)
        shown += [repr(event) for event in a_round.events] + [repr(a_round.secure_sum), repr(a_round.channel.sites)]
        with pytest.raises(FedCollmError) as refused:
            a_round.secure_sum.open(iter(()))
        shown.append(str(refused.value))
        assert len(federation_secrets) >= 5 * (1 + 3 + 2 * 5)  # identity; two keys and a seed; two shares of everybody
        assert len(shown) > 100
        everything = "\n".join(shown)
        for secret in federation_secrets:
            assert secret.hex() not in everything
            assert repr(secret) not in everything
            assert str(list(secret)) not in everything
            assert str(int.from_bytes(secret, "big")) not in everything
            for journal in journals:
                assert secret not in journal
                assert secret.hex().encode() not in journal
        for grid in grids:
            for form in (str(grid[:4].tolist())[1:-1], str(grid[:4])[1:-1], grid.tobytes()[:16].hex()):
                assert form not in everything
            assert not any(grid.tobytes()[:16] in journal for journal in journals)

    def test_what_passes_before_the_unmasking_holds_no_secret_in_clear(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        secrets: set[bytes] = set()

        def collect(operation: str, site: str, body: bytes | None) -> bytes | None:
            secrets.update(secrets_in(state_of(a_round, site)))
            return body

        a_round.channel.bend = collect
        a_round.run()
        passed = b"".join(b for o, _, b in a_round.channel.log if o != "unmask" and b is not None)
        assert len(secrets) >= 5 * (3 + 2 * 5)
        for secret in secrets:
            assert secret not in passed
            assert secret.hex().encode() not in passed
        # The search would have found them: shares stand in the answers to the last request.
        unmasked = b"".join(sent(a_round, "unmask"))
        assert any(secret in unmasked for secret in secrets)

    def test_the_secrets_of_a_round_go_with_it(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        a_round.run()
        assert all(state_of(a_round, site) is None for site in sites_of(a_round))
        assert a_round.secure_sum._decryptor._key is None

    def test_what_holds_a_grid_or_a_share_does_not_show_it(self, make_round: MakeRound) -> None:
        plan = make_round(3).begin()
        update = QuantizedUpdate(plan=plan, grid=np.array([1234, -3210, 77], np.int32))
        revealed = UnmaskShares(
            plan_digest=digest("p"),
            site="s00",
            survivors_digest=digest("s"),
            self_of=("s00",),
            self_shares=(b"\x01secret" * 4 + b"1234",),
            mask_of=(),
            mask_shares=(),
        )
        assert "1234" not in repr(update)
        assert "secret" not in repr(revealed)


def parts_of(state: Any) -> Iterator[Any]:
    """A state and everything in it, down to what is no dataclass and no mapping."""
    yield state
    inside: Sequence[Any] = ()
    if is_dataclass(state) and not isinstance(state, type):
        inside = [getattr(state, field.name) for field in fields(state)]
    elif isinstance(state, dict):
        inside = list(state.values())
    for each in inside:
        if not isinstance(each, bytes | str | int | None):
            yield from parts_of(each)


def secrets_in(state: Any) -> Iterator[bytes]:
    for part in parts_of(state):
        if isinstance(part, X25519PrivateKey):
            yield part.private_bytes_raw()
        for name in ("seed", "self_share", "mask_share"):
            secret = getattr(part, name, None)
            if isinstance(secret, bytes):
                yield secret


class TestServerSide:
    """What one site can do to the server, and so to all others."""

    def test_an_upload_of_a_site_that_did_not_share_is_left_out(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        lose(a_round, {"s04": "share"})
        plan = a_round.begin()
        manifests = list(a_round.manifests(a_round.secure_sum.enrol(plan)))
        chunk = np.ones((2, 4096), dtype="<u8").tobytes()
        evil = forged_upload(a_round, "s04", manifests[0], [chunk])
        opened = a_round.secure_sum.open(iter([evil, *manifests]))
        assert opened.cohort == ("s00", "s01", "s02", "s03")

    def test_nobody_is_blamed_for_what_it_did_not_sign(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        plan = a_round.begin()
        manifests = list(a_round.manifests(a_round.secure_sum.enrol(plan)))
        forged = UploadManifest(
            plan_digest=plan.digest, keys_digest=digest("x"), site="s04", peers=("s04",), chunk_digests=b""
        )
        a_round.secure_sum.open(iter([forged, *manifests[:4]]))
        assert a_round.secure_sum.rejected.get("s04") != "masked for another view"

    def test_a_liar_at_the_unmasking_is_named_though_the_round_opens(self, make_round: MakeRound) -> None:
        a_round = make_round(5)
        bend_signed(a_round, "unmask", "s02", lambda m: replace(m, self_shares=(bytes(32), *m.self_shares[1:])))
        a_round.run()
        told = repr([event for event in a_round.events if event[0] not in ("signed_plan", "enrolled", "agreed")])
        assert "s02" in told or "s02" in a_round.secure_sum.rejected


def forged_upload(a_round: Round, site: str, like: UploadManifest, chunks: Sequence[bytes]) -> UploadManifest:
    """A manifest of ``site`` over these chunks, well signed, and a channel that hands them over."""
    digests = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    before = a_round.channel.bend

    def bend(operation: str, name: str, body: bytes | None) -> bytes | None:
        if (operation, name) != ("part", site):
            return before(operation, name, body)
        return encode(UploadPart(plan_digest=like.plan_digest, site=site, first=0, chunks=tuple(chunks)))

    a_round.channel.bend = bend
    manifest = replace(like, site=site, chunk_digests=digests, signature=b"")
    return signed(manifest, a_round.parties.sites[site])


class TestDecryptorAlone:
    def test_the_decryptor_believes_signatures_of_its_own_roster_only(self, make_round: MakeRound) -> None:
        a_round = make_round(4)
        decryptor = a_round.secure_sum._decryptor
        opener, other = decryptor.open_sum, Parties.of(4)

        def by_strangers(plan: RoundPlan, sealed_sum: Any) -> OpenedSum:
            said = [decode(raw, Agreement) for raw in sealed_sum.agreements]
            forged = tuple(encode(signed(agreement, other.sites[agreement.site])) for agreement in said)
            return opener(plan, replace(sealed_sum, agreements=forged))

        decryptor.open_sum = by_strangers  # type: ignore[method-assign]
        with pytest.raises(RoundLost, match=f"^{REFUSED}$"):
            a_round.run()

    def test_errors_say_the_same_whatever_was_wrong(self) -> None:
        assert str(OpeningRefused()) == REFUSED
        assert issubclass(SignatureInvalid, ProtocolError)
        assert coordinator.Agreed.__dataclass_params__.frozen  # type: ignore[attr-defined]
