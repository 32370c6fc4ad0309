"""A server and sites in FLARE's own processes on loopback, for tests/test_flare.py and benchmarks/engine.py.

Kits come from FLARE's own provisioning. The process that makes a `Federation` is the server's; sites' own processes are
tests/flare_site.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedcollm_privacy.identity import SigningKey, save_public
from secure_fedcollm.engine_process import EngineProcess
from secure_fedcollm.engine_rules import engine_rules
from secure_fedcollm.engine_transport import EngineTransport, RequestEvent, relay_post
from secure_fedcollm.flare import FlareJobs
from secure_fedcollm.job_keeper import JobKeeper

SITES = ("s00", "s01", "s02")
STRANGER = "s03"  # provisioned, but no site of the roster
SERVER = "localhost"
LEAD = "lead@fedcollm.server"
ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "privacy"), str(ROOT / "audits")])

# What a hostile administrator can do: FLARE's job process at his site runs his code.
HOSTILE = """
import sys
if any("worker_process" in word for word in sys.orig_argv):
    import os, threading, time
    from pathlib import Path
    from nvflare.apis.shareable import Shareable
    from secure_fedcollm import flare
    from secure_fedcollm.answer_memory import request_digest

    honest = flare.SiteRelay.handle_event

    def ask_neighbour(engine):
        request, body = Shareable(), b"from s01"
        request.update(digest=request_digest("run", bytes(16), "evil", body), operation="evil", body=body, wait_s=1.0)
        request.update(signature=bytes(64), run="run", nonce=bytes(16), size=len(body), at=0, offset=0)
        for _ in range(40):
            time.sleep(0.25)
            with engine.new_context() as context:
                answers = engine.send_aux_request(
                    targets=["s00"], topic="fedcollm", request=request, timeout=5.0, fl_ctx=context, optional=True
                )
            word = answers.get("s00", {}).get("word", "away")
            if word != "away":
                Path(os.environ["HEARD"]).write_text(word)
                return

    def handle_event(self, event_type, fl_ctx):
        honest(self, event_type, fl_ctx)
        if event_type == "_start_run" and fl_ctx.get_identity_name() == "s01":
            threading.Thread(target=ask_neighbour, args=(fl_ctx.get_engine(),), daemon=True).start()

    flare.SiteRelay.handle_event = handle_event
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def provision(root: Path) -> Path:
    """Kits of FLARE's own provisioning in a folder each; the folder of folders."""
    port = free_port()
    server: dict[str, Any] = {"name": SERVER, "type": "server", "org": "example", "default_host": "localhost"}
    lead = {"name": LEAD, "type": "admin", "org": "example", "role": "lead"}
    project = {
        "api_version": 3,
        "name": "fedcollm",
        "description": "loopback",
        "participants": [
            server | {"fed_learn_port": port, "admin_port": port},
            lead,
            *({"name": site, "type": "client", "org": "example"} for site in (*SITES, STRANGER)),
        ],
        "builders": [
            {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
            {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": "nvflare.lighter.impl.cert.CertBuilder"},
            {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
        ],
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "project.yml").write_text(yaml.safe_dump(project))
    command = [
        sys.executable,
        "-m",
        "nvflare.lighter.provision",
        "-p",
        str(root / "project.yml"),
        "-w",
        str(root / "w"),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HOME": str(root)}, cwd=root)
    kits = root / "w" / "fedcollm" / "prod_00"
    for name in (SERVER, *SITES, STRANGER):
        engine_rules(kits / name / "local", "server" if name == SERVER else "site")
    return kits


@dataclass
class Federation:
    """Server and sites on loopback; `close` ends all of them."""

    root: Path
    kits: Path
    key: SigningKey
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    events: list[RequestEvent] = field(default_factory=list)
    keeper: JobKeeper | None = None

    @classmethod
    def make(cls, root: Path, *, hostile: bool = False) -> Federation:
        key = SigningKey.generate("server")
        self = cls(root=root, kits=provision(root / "flare"), key=key)
        save_public(key.public, root / "server.pub")
        hook = root / "hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(HOSTILE)
        for name in (SERVER, *SITES, STRANGER):
            folder = root / name
            folder.mkdir()
            evil = hostile and name == "s01"
            self.engines[name] = EngineProcess(
                side="server" if name == SERVER else "site",
                engine=self.kits / name,
                name=name,
                org="example",
                socket=folder / "engine.sock",
                state=folder,
                environment={
                    "PYTHONPATH": f"{hook}{os.pathsep}{PATHS}" if evil else PATHS,
                    "HEARD": str(root / "heard"),
                },
            )
        return self

    def start(self) -> None:
        for name in (SERVER, *SITES):
            self.engines[name].start()
        for name in SITES:
            self.start_site(name)
        self.keeper = JobKeeper(FlareJobs(self.kits / LEAD, LEAD), SITES, self.root / SERVER / "engine.sock")
        self.keeper.start()

    def start_site(self, name: str) -> None:
        (self.root / name / "up").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.flare_site", name, str(self.root / name)]
        with (self.root / name / "out").open("ab") as out:
            environment = os.environ | {"PYTHONPATH": PATHS}
            self.sites[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def transport(self, **options: Any) -> EngineTransport:
        post = relay_post(self.root / SERVER / "engine.sock")
        options = {"key": self.key, "observe": self.events.append} | options
        return EngineTransport(post, "run", SITES, **options)

    def wait_for_job(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while self.keeper is None or len(self.keeper.reachable) < len(SITES):
            if time.monotonic() > end:
                raise TimeoutError("not all sites can be reached")
            time.sleep(0.1)

    def calls(self, name: str, operation: str) -> list[str]:
        path = self.root / name / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0] == operation]

    def process(self, name: str, kind: str) -> psutil.Process:
        """FLARE's ``parent`` or ``job`` process of this party."""
        found = [p for p in self.engines[name].processes() if is_job(p) == (kind == "job")]
        if not found:
            raise LookupError(f"{name} has no {kind} process")
        return found[0]

    def kill(self, name: str, kind: str) -> None:
        """End all of this kind: beside a job's process that of the job before it may still be there."""
        found = [p for p in self.engines[name].processes() if is_job(p) == (kind == "job")]
        if not found:
            raise LookupError(f"{name} has no {kind} process")
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        session = new_secure_session(LEAD, str(self.kits / LEAD), timeout=30.0)
        try:
            yield session
        finally:
            session.close()

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.close()
        for process in self.sites.values():
            process.kill()
            process.wait(timeout=30)
        for engine in self.engines.values():
            engine.stop()


def is_job(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(word in " ".join(process.cmdline()) for word in ("worker_process", "runner_process"))
    return False


def replace_keys(federation: Federation, source: Path) -> None:
    """Give the stranger the keys that lie in ``source``; it trusts the true authority all the time."""
    for name in ("client.crt", "client.key"):
        shutil.copy(source / name, federation.kits / STRANGER / "startup" / name)


def registered(federation: Federation, name: str) -> bool:
    log = federation.kits / name / "log.txt"
    return log.exists() and "Successfully registered" in log.read_text()


def resident(federation: Federation) -> dict[str, float]:
    """Resident memory now, MB, by party and kind of process."""
    found = {}
    for name in (SERVER, *SITES):
        for process in federation.engines[name].processes():
            with contextlib.suppress(psutil.Error):
                found[f"{name} {'job' if is_job(process) else 'parent'}"] = process.memory_info().rss / 1e6
    return found


def job_folder(root: Path, server: str, site: str) -> Path:
    """A job that names other classes than the relays."""
    shutil.rmtree(root, ignore_errors=True)
    config = root / "app" / "config"
    config.mkdir(parents=True)
    meta = {"name": "other", "deploy_map": {"app": ["server", *SITES]}, "min_clients": 1, "resource_spec": {}}
    (root / "meta.json").write_text(json.dumps(meta))
    (config / "config_fed_server.json").write_text(
        json.dumps({"format_version": 2, "workflows": [{"id": "relay", "path": server}], "components": []})
    )
    executor = {"tasks": ["none"], "executor": {"path": site}}
    (config / "config_fed_client.json").write_text(
        json.dumps({"format_version": 2, "executors": [executor], "components": []})
    )
    return root
