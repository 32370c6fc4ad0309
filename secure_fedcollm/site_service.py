"""``fedcollm site``: a site that waits for its server's requests, for months if need be.

Ledger, journal, keys and models live in this process. The engine's processes beside it carry bytes to and from it and
may be killed at any moment; when this process itself is killed, what it knew of the round under way is gone, the round
goes on without it, and the next one finds it again.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

from fedcollm_privacy.errors import FedCollmError
from secure_fedcollm.door import SiteDoor
from secure_fedcollm.engine_process import EngineProcess
from secure_fedcollm.kit import Kit
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.service import Stop, log_to, only_one, ready, signals
from secure_fedcollm.site_host import SiteHost
from secure_fedcollm.site_settings import read_settings
from secure_fedcollm.status import StatusBoard
from secure_fedcollm.watch import Watch

__all__ = ["serve_site"]

_LOG = logging.getLogger("fedcollm")
_LARGEST_BODY = 2**30


def serve_site(kit: Kit, *, passphrase: bytes | None, port: int | None, quiet: bool) -> None:
    """Answer the server of the kit's roster until asked to stop.

    Args:
        kit: the site's.
        passphrase: of its identity's key file; None where that is not encrypted.
        port: of the read-only page on this machine; None shows none.
        quiet: only errors on stderr.

    Raises:
        FedCollmError: the kit, its policy or settings do not allow to begin; nothing was answered.
    """
    if kit.role != "site":
        raise FedCollmError(f"{kit.folder} is the kit of a {kit.role}: fedcollm {kit.role} --kit {kit.folder}")
    with ExitStack() as stack:
        stack.enter_context(only_one(kit.state))
        log_to(kit.state / "logs", kit.name, quiet=quiet)
        stop = Stop()
        stack.enter_context(signals(stop))
        roster = kit.roster(time.time())
        host = SiteHost(
            settings=read_settings(kit.folder / "site.yaml", kit.name),
            key=kit.identity(passphrase),
            roster=roster,
            state=kit.state,
            progress=RunProgress(quiet=True),
        )
        stack.callback(host.close)
        board = StatusBoard(kit.state / "status.json", role="site", name=kit.name, federation=kit.federation)
        stack.callback(board.close)
        door = SiteDoor(host.handle, name=kit.name, server=roster.server, socket=kit.socket, largest_body=_LARGEST_BODY)
        stack.callback(door.close)
        engine = EngineProcess.of(kit)
        stack.callback(engine.stop)
        engine.start()
        if port is not None:
            stack.callback(Watch(kit.state / "status.json", port).close)
        ready(kit.state, f"site {kit.name} is ready; it connects to {kit.server_host}:{kit.server_port}")
        while not stop.wait(1.0):
            board.site(host.status())
        _LOG.info("site %s stops; what it owes is in its ledger and is taken up at the next start", kit.name)
