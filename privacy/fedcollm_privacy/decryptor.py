"""The decryptor: holds a round's key, opens one sum with it, once, and then the key is gone.

It sees encrypted sums only. With the single CKKS key of this version it cannot tell an encrypted sum from one upload
that an aggregator passes off as the sum of a made-up cohort: that the aggregator and whoever relays its sum do not
lie about the cohort is an assumption here. Masks inside the ciphertexts make it a fact; they are not built yet.
"""

from __future__ import annotations

from fedcollm_privacy import _validate
from fedcollm_privacy.ckks import CkksParameters, PublicContext
from fedcollm_privacy.ckks_secret import SecretKey, decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused
from fedcollm_privacy.messages import OpenedSum, RoundPlan, SealedSum

__all__ = ["MIN_COHORT", "Decryptor"]

MIN_COHORT = 3
"""No plan can lower it: with two, each contributor learns the other's update from the sum."""


class Decryptor:
    """Makes a key a round, opens at most one sum with it, gives out integers and nothing else."""

    def __init__(self) -> None:
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
            OpeningRefused: with one text for every cause: no key left, a plan for another key, a sum for another
                plan, fewer than ``max(3, plan.min_contributors)`` or more than ``plan.max_contributors`` distinct
                contributors, malformed ciphertexts, a residual too large, a total out of range.
        """
        key, key_digest = self._key, self._key_digest
        self.destroy_key()
        if key is None or plan.key_digest != key_digest or sealed_sum.plan_digest != plan.digest:
            raise OpeningRefused
        cohort = sealed_sum.cohort
        lowest = max(MIN_COHORT, plan.min_contributors)
        if len(set(cohort)) != len(cohort) or not lowest <= len(cohort) <= plan.max_contributors:
            raise OpeningRefused
        try:
            for site in cohort:
                _validate.public_name(cohort=site)
            key.parameters.prove(plan.max_contributors, plan.value_bits)
        except InvalidValue:
            raise OpeningRefused from None
        largest = len(cohort) * plan.levels
        total = decrypt_sum(key, sealed_sum.chunks, dimension=plan.dimension, largest=largest)
        return OpenedSum(plan=plan, cohort=cohort, total=total)
