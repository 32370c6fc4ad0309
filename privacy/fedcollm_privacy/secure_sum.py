"""The seam of the round: sealed uploads in, the exact integer sum out, nothing else.

What stands behind it may take more phases (masks need keys agreed before the uploads and shares revealed after them):
they happen inside `SecureSum.begin` and `SecureSum.open`, over whatever channel to the sites the implementation was
built with. The round does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import CkksParameters, PublicContext, parameters_for
from fedcollm_privacy.decryptor import MIN_COHORT, Decryptor
from fedcollm_privacy.errors import OpeningRefused, ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.messages import OpenedSum, RoundPlan, SealedUpdate

__all__ = ["CkksSum", "SecureSum"]


class SecureSum(Protocol):
    """Opens the sum of a round's uploads and nothing else."""

    @property
    def parameters(self) -> CkksParameters:
        """Of the round that was begun last."""

    @property
    def rejected(self) -> Mapping[str, str]:
        """Sites whose uploads in the last `open` stayed out of its cohort, each with a code."""

    def begin(self, *, contributors: int, value_bits: int) -> PublicContext:
        """Make the round's key, before the plan, which binds its digest.

        Args:
            contributors: n, the most updates that the sum may hold.
            value_bits: signed bits per coordinate.

        Raises:
            InvalidValue: the sum of so many could not be proven exact.
        """

    def open(self, plan: RoundPlan, uploads: Iterable[SealedUpdate]) -> OpenedSum:
        """Take the uploads as they arrive and open their sum; one attempt per `begin`.

        A malformed upload leaves its site out (`rejected`); the cohort of the result tells who is in.

        Raises:
            RoundLost: fewer than ``plan.min_contributors`` are left, the aggregator crashed, or the opening was
                refused. The key is gone; the next round starts with `begin`.
        """

    def close(self) -> None:
        """Destroy keys and end processes."""


class CkksSum:
    """One CKKS key a round: the aggregator adds without it, the decryptor opens with it.

    Whoever holds both the decryptor's key and single uploads could open those; that aggregator and decryptor do not
    collude is an assumption here (see `fedcollm_privacy.decryptor`).
    """

    def __init__(self, aggregator: Aggregator, decryptor: Decryptor) -> None:
        self._aggregator = aggregator
        self._decryptor = decryptor
        self._parameters: CkksParameters | None = None
        self._rejected: dict[str, str] = {}

    @property
    def parameters(self) -> CkksParameters:
        """Of the round that was begun last."""
        if self._parameters is None:
            raise ProtocolError("no secure sum was begun; call begin first")
        return self._parameters

    @property
    def rejected(self) -> Mapping[str, str]:
        """Sites whose uploads in the last `open` stayed out of its cohort, each with a code."""
        return MappingProxyType(self._rejected)

    def begin(self, *, contributors: int, value_bits: int) -> PublicContext:
        """Make the round's key; see `SecureSum.begin`."""
        self._parameters = parameters_for(contributors, value_bits)
        return self._decryptor.new_round_key(self._parameters)

    def open(self, plan: RoundPlan, uploads: Iterable[SealedUpdate]) -> OpenedSum:
        """Add the uploads as they arrive and open their sum; see `SecureSum.open`."""
        self._rejected = {}
        try:
            self._aggregator.begin(plan, self.parameters)
            included = self._add(uploads)
            lowest = max(MIN_COHORT, plan.min_contributors)
            if included < lowest:
                left_out = ", ".join(f"{site}: {code}" for site, code in self._rejected.items()) or "none"
                raise RoundLost(
                    f"{included} sound uploads and at least {lowest} are needed (left out: {left_out}); "
                    "nothing was opened"
                )
            opened = self._decryptor.open_sum(plan, self._aggregator.finish())
        except OpeningRefused as error:
            raise RoundLost(str(error)) from error
        finally:
            self._decryptor.destroy_key()
        self._rejected = {site: code for site, code in self._rejected.items() if site not in opened.cohort}
        return opened

    def close(self) -> None:
        """Destroy the key and end the aggregator's process."""
        self._decryptor.destroy_key()
        self._aggregator.close()

    def _add(self, uploads: Iterable[SealedUpdate]) -> int:
        included = 0
        for upload in uploads:
            try:
                self._aggregator.add(upload)
                included += 1
            except UploadRefused as refusal:
                self._rejected[refusal.site] = refusal.code
        return included
