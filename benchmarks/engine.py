"""What the engine costs: latency, throughput, memory, and the seconds that a killed process of it takes.

``PYTHONPATH=. python benchmarks/engine.py`` starts a server and three sites on loopback in FLARE's own processes (as
tests/test_flare.py does) and writes ``benchmarks/results/engine.md``. It takes some minutes and needs the extra
``deploy``.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nvflare
import psutil

from secure_fedcollm.transport import InProcessTransport, Transport
from tests.flare_drive import KILLS, kills, restart_site
from tests.flare_federation import SERVER, SITES, Federation, resident
from tests.flare_site import echo_site

RESULT = Path(__file__).parent / "results" / "engine.md"
MB = 1_000_000
WORDS = {"job": "FLARE job process", "parent": "FLARE parent process"}


def seconds(transport: Transport, operation: str, body: bytes) -> float:
    begun = time.perf_counter()
    replies = list(transport.ask(operation, dict.fromkeys(SITES, body)))
    took = time.perf_counter() - begun
    if any(reply.body is None for reply in replies):
        raise RuntimeError(f"{operation}: {[reply.code for reply in replies]}")
    return took


def row(transport: Transport) -> list[str]:
    """Latency of small requests, then what long bodies and answers take."""
    small = [seconds(transport, "echo", index.to_bytes(4, "big") * 25) for index in range(50)]
    cells = [f"{1000 * statistics.median(small):.1f} ms, {1000 * max(small):.0f} ms at most"]
    for operation, body in (("take", bytes(100 * MB)), ("give", str(100 * MB).encode())):
        took = seconds(transport, operation, body)
        cells.append(f"{took:.2f} s" + (f", {300 / took:.0f} MB/s" if took > 0.1 else ""))
    return cells


def memory(federation: Federation) -> dict[str, float]:
    sizes = resident(federation)
    kinds = {"server parent": f"{SERVER} parent", "server job": f"{SERVER} job", "site parent": "s00 parent"}
    return {name: sizes.get(key, float("nan")) for name, key in (kinds | {"site job": "s00 job"}).items()}


def main() -> None:
    load: list[float] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fe") as temporary:
        root = Path(temporary)
        federation = Federation.make(root)
        try:
            begun = time.monotonic()
            federation.start()
            federation.wait_for_job()
            ready_s = time.monotonic() - begun
            memories = {"after the start": memory(federation)}
            transport = federation.transport(deadline_s=600.0)
            load.append(os.getloadavg()[0])
            over_engine = row(transport)
            memories["after 100 MB to and from each of three sites"] = memory(federation)
            load.append(os.getloadavg()[0])
            killed: dict[str, Any] = kills(federation)
            load.append(os.getloadavg()[0])
            site = restart_site(federation)["killed"]
        finally:
            federation.close()
        in_process = row(InProcessTransport({name: echo_site(name, root / name) for name in SITES}))
    lines += [
        "# The engine, measured",
        "",
        f"`PYTHONPATH=. python benchmarks/engine.py`: nvflare {nvflare.__version__}, "
        f"Python {platform.python_version()}, "
        f"{psutil.cpu_count()} CPU cores, load {min(load):.0f} to {max(load):.0f} from other work, so times are upper "
        "bounds. Server and three sites on loopback, mutual TLS. One run.",
        "",
        f"From the start of all processes until every site could be asked: {ready_s:.0f} s.",
        "",
        "| three sites at once | over FLARE | in one process |",
        "|---|---|---|",
    ]
    labels = ("100-byte requests, median of 50", "100 MB to each site", "100 MB from each site")
    lines += [f"| {label} | {a} | {b} |" for label, a, b in zip(labels, over_engine, in_process, strict=True)]
    lines += [
        "",
        "| SIGKILL while every site works | request in flight | worked on | answered after |",
        "|---|---|---|---|",
    ]
    for name, kind in KILLS:
        lines.append(told(f"{'server' if name == SERVER else 'a site'}'s {WORDS[kind]}", killed[f"{name} {kind}"]))
    lines.append(told("a site's own process, started again at once", site))
    lines += ["", "| resident, MB | " + " | ".join(memories["after the start"]) + " |", "|---|---|---|---|---|"]
    lines += [
        f"| {when} | " + " | ".join(f"{size:.0f}" for size in found.values()) + " |" for when, found in memories.items()
    ]
    RESULT.write_text("\n".join(lines) + "\n")


def told(what: str, row: dict[str, Any]) -> str:
    answered = "answered by all" if all(row["sha"].values()) else f"codes {row['codes']}"
    return f"| {what} | {answered} | {'/'.join(str(n) for n in row['calls'].values())} times | {row['after_s']:.1f} s |"


if __name__ == "__main__":
    main()
