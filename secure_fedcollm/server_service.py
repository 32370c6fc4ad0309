"""``fedcollm server``: one run of a federation whose sites are on machines of their own.

The loop, the opened sums and the server's key live in this process; the engine's processes carry bytes and may be
killed at any moment. When this process itself is killed it goes on from its last checkpoint: the round that was cut is
run again as another attempt, unless its sum was open.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedcollm_privacy.errors import ConfigError, FedCollmError
from secure_fedcollm.atomic_file import write_atomically
from secure_fedcollm.config import Config
from secure_fedcollm.engine_process import EngineProcess
from secure_fedcollm.engine_transport import EngineTransport, relay_post
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.job_keeper import JobKeeper
from secure_fedcollm.kit import Kit
from secure_fedcollm.kit_files import read_bytes
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run
from secure_fedcollm.server_assembly import assemble_server
from secure_fedcollm.service import Stop, log_to, only_one, ready, signals
from secure_fedcollm.status import StatusBoard
from secure_fedcollm.strict_build import build
from secure_fedcollm.watch import Watch

__all__ = ["current_run", "give_up", "serve"]

_LOG = logging.getLogger("fedcollm")
_QUICK_S = 300.0


def current_run(kit: Kit) -> Path | None:
    """Folder of the run that is not finished; None when there is none."""
    pointer = kit.state / "run"
    return Path(pointer.read_text().strip()) if pointer.exists() else None


def give_up(kit: Kit) -> None:
    """Forget the run that is not finished; its folder stays, and so does what its sites have reserved.

    Raises:
        FedCollmError: there is none, or a process works on it.
    """
    with only_one(kit.state):
        if current_run(kit) is None:
            raise FedCollmError("no run is open here; nothing to give up")
        (kit.state / "run").unlink()


def serve(
    kit: Kit, plain: Mapping[str, Any] | None, *, passphrase: bytes | None, port: int | None, quiet: bool
) -> Path:
    """Begin a run, or go on with the one that is not finished.

    Args:
        kit: the server's.
        plain: the composed configuration of a new run; None goes on with the open one.
        passphrase: of its identity's key file; None where that is not encrypted.
        port: of the read-only page on this machine; None shows none.
        quiet: only errors on stderr.

    Returns:
        The run's folder. It has its summary unless the process was asked to stop before the end.

    Raises:
        FedCollmError: the run cannot begin, or no round gave a sum.
    """
    if kit.role != "server":
        raise FedCollmError(f"{kit.folder} is the kit of a {kit.role}: fedcollm {kit.role} --kit {kit.folder}")
    with ExitStack() as stack:
        stack.enter_context(only_one(kit.state))
        log_to(kit.state / "logs", kit.name, quiet=quiet)
        stop = Stop()
        stack.enter_context(signals(stop))
        folder, config = _open(kit, plain)
        key, roster = kit.identity(passphrase), kit.roster(time.time())
        board = StatusBoard(kit.state / "status.json", role="server", name=kit.name, federation=kit.federation)
        stack.callback(board.close)
        board.begin(
            folder.run_id,
            config.federation.rounds,
            roster.site_names,
            epsilon=None if config.privacy is None else config.privacy.epsilon,
            delta=None if config.privacy is None else config.privacy.delta,
        )
        transport = EngineTransport(
            relay_post(kit.socket),
            folder.run_id,
            roster.site_names,
            key=key,
            deadlines_s={"train": float(config.federation.round_time_limit_s)},
            deadline_s=min(_QUICK_S, float(config.federation.round_time_limit_s)),
            observe=board.observe,
        )
        progress = stack.enter_context(RunProgress(quiet=quiet, told=board.stage))
        if port is not None:
            stack.callback(Watch(kit.state / "status.json", port).close)
        try:
            parts = assemble_server(
                config,
                folder,
                progress,
                key=key,
                roster=roster,
                signed_roster=read_bytes(kit.folder / "roster.json"),
                transport=transport,
                state=kit.state,
                told=board.enlisted,
            )
            stack.callback(parts.federation.secure_sum.close)
            # Only now: a run whose settings do not fit was never begun, and the next try may have others.
            write_atomically(kit.state / "run", f"{folder.path.resolve()}\n".encode())
            engine = EngineProcess.of(kit)
            stack.callback(engine.stop)
            engine.start()
            jobs = JobKeeper.of(kit, roster.site_names)
            stack.callback(jobs.close)
            jobs.start()
            ready(kit.state, f"server {kit.name} is ready: run {folder.run_id} in {folder.path}")
            summary = run(parts, folder, progress, stop=stop, watch=board)
        except FedCollmError as error:
            board.failed(str(error))
            raise
        if summary is None:
            _LOG.info("stopped between rounds; the same command goes on from there")
        else:
            (kit.state / "run").unlink(missing_ok=True)
            board.finished()
        return folder.path


def _open(kit: Kit, plain: Mapping[str, Any] | None) -> tuple[RunFolder, Config]:
    unfinished = current_run(kit)
    if unfinished is not None and RunFolder(unfinished, "").finished:  # killed after the last file was written
        (kit.state / "run").unlink()
        unfinished = None
    if plain is None:
        if unfinished is None:
            raise ConfigError("overrides", "none", "those of a new run, e.g. experiment=medquad; no run is open here")
        folder, kept = RunFolder.resume(str(unfinished))
        return folder, build(Config, kept)
    if unfinished is not None:
        raise ConfigError(
            "overrides",
            str(unfinished),
            "none while this run is not finished: the same command without overrides goes on with it, and "
            "`fedcollm server --give-up` leaves it",
        )
    config = build(Config, plain)
    place = config.output_dir or str(kit.folder / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}")
    return RunFolder.create(place, config.name, plain), config
