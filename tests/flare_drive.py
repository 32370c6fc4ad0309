"""One federation on loopback, and all that is tried on it; its last line is the result, for tests/test_flare.py."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from secure_fedcollm.engine_transport import EngineTransport
from secure_fedcollm.flare import FlareJobs

from .flare_federation import (
    LEAD,
    SERVER,
    SITES,
    STRANGER,
    Federation,
    job_folder,
    provision,
    registered,
    replace_keys,
    resident,
)

KILLS = (("s00", "job"), ("s00", "parent"), (SERVER, "job"), (SERVER, "parent"))
LONG = 60_000_000


def ask(transport: EngineTransport, operation: str, body: bytes) -> dict[str, Any]:
    begun = time.monotonic()
    replies = list(transport.ask(operation, dict.fromkeys(SITES, body)))
    return {
        "s": time.monotonic() - begun,
        "codes": {reply.site: reply.code for reply in replies},
        "sha": {r.site: hashlib.sha256(r.body).hexdigest() if r.body is not None else None for r in replies},
    }


def until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def in_flight(federation: Federation, operation: str, body: bytes, harm: Callable[[], None]) -> dict[str, Any]:
    """Do harm while every site works on the request; what came of the request, and how often it was worked on."""
    before = {site: len(federation.calls(site, operation)) for site in SITES}
    result: dict[str, Any] = {}
    asking = threading.Thread(target=lambda: result.update(ask(federation.transport(), operation, body)))
    asking.start()
    begun = until(lambda: all(len(federation.calls(s, operation)) > before[s] for s in SITES))
    harmed = time.monotonic()
    harm()
    asking.join()
    result["after_s"] = time.monotonic() - harmed
    result["calls"] = {site: len(federation.calls(site, operation)) - before[site] for site in SITES}
    return result | {"begun": begun}


def kills(federation: Federation, kinds: tuple[tuple[str, str], ...] = KILLS) -> dict[str, Any]:
    rows = {}
    for name, kind in kinds:
        federation.wait_for_job()
        rows[f"{name} {kind}"] = in_flight(
            federation, "sleep2", f"{name} {kind}".encode(), lambda n=name, k=kind: federation.kill(n, k)
        )
    federation.wait_for_job()
    return rows


def restart_site(federation: Federation) -> dict[str, Any]:
    def harm() -> None:
        federation.sites["s00"].kill()
        federation.sites["s00"].wait()
        federation.start_site("s00")

    row = in_flight(federation, "sleep1", b"the site's own process", harm)
    return {"killed": row, "next": ask(federation.transport(), "echo", b"after it")}


def long_bodies(federation: Federation) -> dict[str, Any]:
    before, peak, done = resident(federation), dict[str, float](), threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            for name, size in resident(federation).items():
                peak[name] = max(size, peak.get(name, 0.0))

    sampling = threading.Thread(target=sample)
    sampling.start()
    echo = ask(federation.transport(), "echo", bytes(range(250)) * (LONG // 250))
    done.set()
    sampling.join()
    return {"before": before, "peak": peak, "echo": echo}


def refused_jobs(federation: Federation) -> dict[str, str]:
    """Jobs that must be turned away, and what became of each."""
    jobs, result = FlareJobs(federation.kits / LEAD, LEAD), {}
    ours = ("secure_fedcollm.flare.ServerRelay", "secure_fedcollm.flare.SiteRelay")
    # A class that FLARE's own default list allows and these parties' lists do not.
    named = {"class not listed": (ours[0], "nvflare.app_common.np.np_trainer.NPTrainer"), "code": ours}
    for what, classes in named.items():
        folder = job_folder(federation.root / "other", *classes)
        if what == "code":
            (folder / "app" / "custom").mkdir()
            (folder / "app" / "custom" / "evil.py").write_text("open('/dev/null')\n")
        try:
            with federation.session() as session:
                job = session.submit_job(str(folder))
            until(lambda job=job: jobs.status(job).startswith("FINISHED"))
            result[what] = jobs.status(job)
        except Exception as error:
            result[what] = f"refused: {type(error).__name__}"
    jobs.close()
    return result


def loaded(process: psutil.Process, part: str) -> bool:
    return any(part in mapped.path for mapped in process.memory_maps())


def main(root: Path) -> dict[str, Any]:
    federation = Federation.make(root, hostile=True)
    shutil.copytree(federation.kits / STRANGER / "startup", root / "own")
    other = provision(root / "another")
    replace_keys(federation, other / STRANGER / "startup")
    result: dict[str, Any] = {}
    try:
        begun = time.monotonic()
        federation.start()
        federation.engines[STRANGER].start()
        federation.wait_for_job()
        result["ready_s"] = time.monotonic() - begun
        transport = federation.transport(deadlines_s={"sleep30": 2.0})
        result["rows"] = {
            operation: ask(transport, operation, b"x" * 100)
            for operation in ("echo", "decline", "crash", "sleep6", "sleep30")
        }
        result["heard"] = (root / "heard").read_text() if until((root / "heard").exists, 20) else "nothing"
        result["evil calls"] = len(federation.calls("s00", "evil"))
        result["torch"] = {
            f"{name} {kind}": loaded(federation.process(name, kind), "torch")
            for name in (SERVER, *SITES)
            for kind in ("job", "parent")
        }
        result["msgpack"] = loaded(federation.process(SERVER, "job"), "msgpack")
        for site in SITES:  # they still sleep
            federation.sites[site].kill()
            federation.sites[site].wait()
            federation.start_site(site)
        result["long"] = long_bodies(federation)
        result["kills"] = kills(federation)
        result["site"] = restart_site(federation)
        result["foreign"] = registered(federation, STRANGER)
        federation.engines[STRANGER].stop()
        replace_keys(federation, root / "own")
        federation.engines[STRANGER].start()
        result["own"] = until(lambda: registered(federation, STRANGER))
        result["jobs"] = refused_jobs(federation)
    finally:
        federation.close()
    result["left"] = sum(len(engine.processes()) for engine in federation.engines.values())
    return result


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(Path(sys.argv[1]))) + "\n")
