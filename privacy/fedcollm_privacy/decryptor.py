"""The decryptor: holds a round's key, opens one sum with it, once, and then the key is gone.

It opens what at least t sites have signed as the survivors of a round, and only when no mask is left on it: an upload,
or a sum of other uploads than all the survivors', decrypts to noise in Z_q and is refused by the checks of range and
residual. That is confidentiality. Integrity against whoever relays the sum is not promised: an aggregator that adds
encrypted integers of its own shifts what is opened.
"""

from __future__ import annotations

from fedcollm_privacy.ckks import CkksParameters, PublicContext
from fedcollm_privacy.ckks_secret import SecretKey, decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError
from fedcollm_privacy.messages import OpenedSum, RoundPlan, SealedSum
from fedcollm_privacy.ranks import exposed_sites
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum_messages import Agreement, SurvivorSet, verify
from fedcollm_privacy.wire import decode

__all__ = ["MIN_COHORT", "Decryptor"]

MIN_COHORT = 3
"""No plan can lower it: with two, each contributor learns the other's update from the sum."""


class Decryptor:
    """Makes a key a round, opens at most one sum with it, gives out integers and nothing else.

    Args:
        roster: whose signatures count; the decryptor's own copy.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._key: SecretKey | None = None
        self._key_digest = ""

    def new_round_key(self, parameters: CkksParameters) -> PublicContext:
        """Make the next round's key; an earlier one is destroyed, whether it was used or not."""
        self.destroy_key()
        self._key, context = generate(parameters)
        self._key_digest = context.digest
        return context

    def destroy_key(self) -> None:
        """Forget the key: what was sealed for it and not opened stays closed for good."""
        self._key = None
        self._key_digest = ""

    def open_sum(self, plan: RoundPlan, sealed_sum: SealedSum) -> OpenedSum:
        """The exact integer sum, int64 [d].

        One attempt per key: whatever the outcome, the key is destroyed and nothing opens until `new_round_key`.

        Raises:
            OpeningRefused: with one text for every cause: no key left, a plan for another key or roster, a sum for
                another plan, fewer than ``max(3, k, t)`` or more than n contributors, fewer than t sites' signatures
                under exactly these, malformed ciphertexts, a residual too large, a total out of range.
        """
        key, key_digest = self._key, self._key_digest
        self.destroy_key()
        if key is None or plan.key_digest != key_digest or plan.ckks != key.parameters:
            raise OpeningRefused
        try:
            self._require_agreement(plan, sealed_sum)
            key.parameters.prove(plan.max_contributors, plan.value_bits)
        except (InvalidValue, ProtocolError):
            raise OpeningRefused from None
        largest = len(sealed_sum.cohort) * plan.levels
        try:
            total = decrypt_sum(key, sealed_sum.chunks, dimension=plan.dimension, largest=largest)
        except ProtocolError:  # also of whoever makes the chunks while they are decrypted
            raise OpeningRefused from None
        return OpenedSum(plan=plan, cohort=sealed_sum.cohort, total=total)

    def _require_agreement(self, plan: RoundPlan, sealed_sum: SealedSum) -> None:
        survivors = decode(sealed_sum.survivors, SurvivorSet)
        same_plan = plan.digest == sealed_sum.plan_digest == survivors.plan_digest
        if not same_plan or plan.roster_digest != self._roster.digest or survivors.survivors != sealed_sum.cohort:
            raise OpeningRefused
        lowest = max(MIN_COHORT, plan.min_contributors, plan.threshold)
        agreed = set()
        for raw in sealed_sum.agreements:
            agreement = decode(raw, Agreement)
            verify(agreement, self._roster.site(agreement.site), plan.digest)
            if agreement.survivors_digest != survivors.digest or agreement.site not in survivors.survivors:
                raise OpeningRefused
            agreed.add(agreement.site)
        needed = max(plan.threshold, plan.min_contributors)
        if not lowest <= len(survivors.survivors) <= plan.max_contributors or len(agreed) < needed:
            raise OpeningRefused
        if exposed_sites(plan, survivors.survivors):
            raise OpeningRefused
