"""The aggregator's own process: adds encrypted updates, blind. It never holds a key.

Started by `fedcollm_privacy.aggregator` with a socket as standard input and nothing else; it ends when that socket
closes. Standard output is no channel here, so whatever SEAL prints disturbs nothing.

Frames in, each answered by one frame with a word of `CODES`::

    {"op": "begin", "parameters": {...}}  then the plan as a wire message
    {"op": "add", "site": ..., "plan_digest": ..., "lengths": [...]}
        answered; if "accepted", the chunks follow, one frame each, and are answered again
    {"op": "finish"}
        answered; then the sum's chunks, one frame each (none if nothing was added)
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from fedcollm_privacy import wire
from fedcollm_privacy.ckks import CiphertextSum, CkksParameters, parameters_from_json
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.messages import RoundPlan, canonical_json

__all__ = ["ACCEPTED", "CODES", "MAX_HEADER", "Accumulation", "main", "serve"]

ACCEPTED = "accepted"
CODES = (
    ACCEPTED,
    "wrong_plan",
    "already_in_sum",
    "cohort_full",
    "wrong_chunk_count",
    "wrong_chunk_length",
    "malformed_ciphertext",
)
MAX_HEADER = 2**22


class Accumulation:
    """One round's sum so far, and whose updates are in it."""

    def __init__(self, plan: RoundPlan, parameters: CkksParameters) -> None:
        parameters.prove(plan.max_contributors, plan.value_bits)
        self._plan_digest = plan.digest
        self._max_contributors = plan.max_contributors
        self._chunk_count = parameters.chunk_count(plan.dimension)
        self._max_chunk = parameters.max_ciphertext_bytes
        self._total = CiphertextSum(parameters, plan.dimension)
        self._cohort: set[str] = set()

    def check(self, site: str, plan_digest: str, lengths: list[int]) -> str:
        """`ACCEPTED`, or the code of why this upload stays out, before a byte of it is parsed."""
        if plan_digest != self._plan_digest:
            return "wrong_plan"
        if site in self._cohort:
            return "already_in_sum"
        if len(self._cohort) >= self._max_contributors:
            return "cohort_full"
        if len(lengths) != self._chunk_count:
            return "wrong_chunk_count"
        if not all(0 < length <= self._max_chunk for length in lengths):
            return "wrong_chunk_length"
        return ACCEPTED

    def add(self, site: str, chunks: Iterator[bytes]) -> str:
        """Add an upload that passed `check`, whole or not at all; ``chunks`` is used up either way."""
        try:
            self._total.add(chunks)
        except ProtocolError:
            for _ in chunks:
                pass
            return "malformed_ciphertext"
        self._cohort.add(site)
        return ACCEPTED

    def chunks(self) -> Iterator[bytes]:
        """The sum's ciphertexts; none before the first upload."""
        return self._total.chunks()


def serve(connection: socket.socket, time_limit_s: int) -> None:
    """Answer requests until the other side closes.

    Args:
        connection: the stream socket to the parent.
        time_limit_s: a single request may take so long; then the operating system ends this process, even inside
            SEAL, so that a hang cannot outlive a parent that was killed.
    """
    accumulation: Accumulation | None = None
    while True:
        try:
            request = _receive_header(connection)
        except EOFError:
            return
        signal.alarm(time_limit_s)
        if request["op"] == "begin":
            parameters = parameters_from_json(canonical_json(request["parameters"]))
            plan = wire.decode(receive_frame(connection, largest=MAX_HEADER), RoundPlan)
            accumulation = Accumulation(plan, parameters)
            _reply(connection, ACCEPTED)
        elif accumulation is None:
            raise ProtocolError("the parent asked for a sum before it began one")
        elif request["op"] == "add":
            _add(connection, accumulation, request)
        else:
            _reply(connection, ACCEPTED)
            for chunk in accumulation.chunks():
                send_frame(connection, chunk)
            accumulation = None
        signal.alarm(0)


def _add(connection: socket.socket, accumulation: Accumulation, request: dict[str, Any]) -> None:
    site, lengths = request["site"], request["lengths"]
    code = accumulation.check(site, request["plan_digest"], lengths)
    _reply(connection, code)
    if code == ACCEPTED:
        chunks = (receive_frame(connection, largest=length) for length in lengths)
        _reply(connection, accumulation.add(site, chunks))


def _receive_header(connection: socket.socket) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(receive_frame(connection, largest=MAX_HEADER))
    return header


def _reply(connection: socket.socket, code: str) -> None:
    send_frame(connection, code.encode())


def main() -> None:
    """Entry point of the process: standard input is the socket, the argument the time limit in seconds."""
    serve(socket.socket(fileno=sys.stdin.fileno()), int(sys.argv[1]))


if __name__ == "__main__":
    main()
