"""A server and sites in FLARE's own processes on loopback, for tests/test_flare_transport.py and for measurements.

The classes that FLARE loads are here: `EchoServer`/`EchoSite` move bytes, `RoundServer`/`RoundSite` run the project's
own rounds. What they work on is told by the environment of each party's process, never by the job.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcollm_privacy.errors import SiteFailed
from secure_fedcollm.answer_memory import request_digest
from secure_fedcollm.flare_transport import ServerController, SiteExecutor
from secure_fedcollm.transport import Handler, InProcessTransport, Transport

SITES = ("s00", "s01", "s02")
ROOT = Path(__file__).parents[1]
FOLDER = "FEDCOLLM_TEST_FOLDER"
ROSTER_TIME = 1_800_000_000.0
SERVER_KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"the server of these tests").digest())


def signed(message: bytes, signature: bytes) -> bool:
    """Whether it is the server's signature; a real site pins the public key alone."""
    try:
        SERVER_KEY.public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


def echo_site(name: str, run: str) -> Handler:
    """Answers with what the operation says; notes in ``<name>.calls`` that it was worked on."""
    folder = Path(os.environ[FOLDER])

    def handle(operation: str, body: bytes) -> bytes:
        with (folder / f"{name}.calls").open("a") as file:
            file.write(f"{operation} {hashlib.sha256(body).hexdigest()[:16]}\n")
        if operation == "decline":
            raise SiteFailed(name, "declined")
        if operation == "crash":
            raise RuntimeError(f"SECRET of {name}")
        if operation.startswith("sleep"):
            time.sleep(float(operation[5:]))
        if operation == "give":
            return bytes(int(body))
        return body

    return handle


class EchoSite(SiteExecutor):
    def __init__(self) -> None:
        super().__init__(echo_site, signed=signed, largest_body=200 * 2**20)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == "_start_run" and fl_ctx.get_identity_name() == "s01" and "FEDCOLLM_TEST_EVIL" in os.environ:
            threading.Thread(target=ask_another_site, args=(fl_ctx.get_engine(), fl_ctx.get_job_id())).start()


def ask_another_site(engine: Any, run: str) -> None:
    """What a hostile site can do: send its neighbour a request as the server does; notes what it heard."""
    from nvflare.apis.shareable import Shareable

    request, body = Shareable(), b"from s01"
    request.update(
        digest=request_digest(run, "evil", body), operation="evil", body=body, wait_s=1.0, signature=bytes(64)
    )
    for _ in range(10):
        time.sleep(0.5)
        with engine.new_context() as context:
            answers = engine.send_aux_request(
                targets=["s00"], topic="fedcollm.request", request=request, timeout=5.0, fl_ctx=context, optional=True
            )
        if "word" in answers.get("s00", {}):
            (Path(os.environ[FOLDER]) / "heard").write_text(str(answers["s00"]["word"]))
            return


def _timed_round(transport: Transport, operation: str, body: bytes, sites: tuple[str, ...] = SITES) -> dict[str, Any]:
    start = time.perf_counter()
    replies = list(transport.ask(operation, dict.fromkeys(sites, body)))
    took = time.perf_counter() - start
    return {
        "s": took,
        "order": [reply.site for reply in replies],
        "codes": {reply.site: reply.code for reply in replies},
        "sha": {r.site: hashlib.sha256(r.body).hexdigest() if r.body is not None else None for r in replies},
    }


def lead_echo(transport: Transport, run: str) -> None:
    """Works through ``script.json``: [operation, length or null, repetitions]; writes ``echo.json`` as it goes."""
    folder = Path(os.environ[FOLDER])
    results: list[dict[str, Any]] = []
    for operation, length, count in json.loads((folder / "script.json").read_text()):
        for index in range(count):
            body = str(length).encode() if operation == "give" else index.to_bytes(4, "big") + b"x" * length
            if operation == "give":
                body += b" " * index
            row = _timed_round(transport, operation, body)
            row |= {"operation": operation, "length": length, "rss": psutil.Process().memory_info().rss}
            row |= {"pid": os.getpid(), "run": run, "at": time.time()}
            results.append(row)
            temporary = folder / "echo.part"
            temporary.write_text(json.dumps(results))
            os.replace(temporary, folder / "echo.json")


class EchoServer(ServerController):
    def __init__(self) -> None:
        super().__init__(
            lead_echo,
            SITES,
            sign=SERVER_KEY.sign,
            deadlines_s={"sleep30": 3.0},
            deadline_s=float(os.environ.get("FEDCOLLM_TEST_DEADLINE", "60")),
            unreachable_s=float(os.environ.get("FEDCOLLM_TEST_UNREACHABLE", "10")),
            wait_s=2.0,
        )


def assembled(folder: Path) -> Any:
    """The embedded run's own assembly in a copy of its folder: keys, roster, ledgers, models."""
    from secure_fedcollm import parties
    from secure_fedcollm.assembly import assemble
    from secure_fedcollm.config import Config
    from secure_fedcollm.folder import RunFolder
    from secure_fedcollm.progress import RunProgress
    from secure_fedcollm.strict_build import build

    # Every process makes the roster for itself, and all must make the same one.
    parties.time = SimpleNamespace(time=lambda: ROSTER_TIME)
    os.environ["FEDCOLLM_HOME"] = str(folder / "home")
    run_folder, plain = RunFolder.resume(str(folder / "run"))
    return assemble(build(Config, plain), run_folder, RunProgress(quiet=True))


def round_site(name: str, run: str) -> Handler:
    parts = assembled(Path(os.environ[FOLDER]))
    return next(site for site in parts.federation.sites if site.name == name).handle


class RoundSite(SiteExecutor):
    def __init__(self) -> None:
        super().__init__(round_site, signed=signed)


def run_rounds(folder: Path, transport: Transport | None) -> dict[str, Any]:
    """Two of the project's rounds over ``transport``, or in this process; what came of them."""
    from fedcollm_privacy.aggregator import Aggregator
    from fedcollm_privacy.decryptor import Decryptor
    from fedcollm_privacy.secure_sum import MaskedSum
    from secure_fedcollm.rounds import adapter_digests, run_round

    parts = assembled(folder)
    federation = parts.federation
    if transport is not None:
        federation.secure_sum.close()
        secure_sum = MaskedSum(
            aggregator=Aggregator(),
            decryptor=Decryptor(parts.roster),
            key=parts.server_key,
            roster=parts.roster,
            channel=transport,
            witness=federation.transcript.record,
        )
        federation = replace(federation, transport=transport, secure_sum=secure_sum, sites=())
    state, rows = parts.start, []
    try:
        for server_round in (1, 2):
            start = time.perf_counter()
            result = run_round(federation, state, server_round, 1, parts.config.secure_sum.value_bits)
            state = result.state
            rows.append(
                {
                    "outcome": result.outcome,
                    "reason": result.reason,
                    "cohort": list(result.cohort),
                    "left_out": dict(result.left_out),
                    "distrusted": dict(result.distrusted),
                    "settled": {s.site: [s.steps, s.epsilon] for s in result.settlements},
                    "s": time.perf_counter() - start,
                    **adapter_digests(state),
                }
            )
    finally:
        federation.secure_sum.close()
    return {"rounds": rows}


def lead_rounds(transport: Transport, run: str) -> None:
    folder = Path(os.environ[FOLDER])
    result = run_rounds(folder, transport)
    (folder / "rounds.json").write_text(json.dumps(result))


class RoundServer(ServerController):
    def __init__(self) -> None:
        super().__init__(lead_rounds, SITES, sign=SERVER_KEY.sign, deadline_s=180.0)


def in_process_echo(script: list[list[Any]], folder: Path) -> list[dict[str, Any]]:
    """The same script without an engine."""
    os.environ[FOLDER] = str(folder)
    transport = InProcessTransport({name: echo_site(name, "here") for name in SITES})
    (folder / "script.json").write_text(json.dumps(script))
    lead_echo(transport, "here")
    return list(json.loads((folder / "echo.json").read_text()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Federation:
    """Kits from FLARE's own provisioning, each party a process; `close` ends them and all their children."""

    root: Path
    port: int
    folders: dict[str, Path]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def provision(cls, root: Path, allowed: dict[str, list[str]], folders: dict[str, Path]) -> Federation:
        """Make the kits and write the parties' own rules; ``allowed`` lists classes for ``server`` and ``site``."""
        port = free_port()
        admin = {"name": "admin@example.org", "type": "admin", "org": "example", "role": "project_admin"}
        server = {
            "name": "localhost",
            "type": "server",
            "org": "example",
            "fed_learn_port": port,
            "admin_port": port,
            "default_host": "localhost",
        }
        project = {
            "api_version": 3,
            "name": "fedcollm",
            "description": "loopback",
            "participants": [server, admin, *({"name": s, "type": "client", "org": "example"} for s in SITES)],
            "builders": [
                {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
                {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
                {"path": "nvflare.lighter.impl.cert.CertBuilder"},
                {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
            ],
        }
        root.mkdir(parents=True, exist_ok=True)
        (root / "project.yml").write_text(yaml.safe_dump(project))
        subprocess.run(
            [sys.executable, "-m", "nvflare.lighter.provision", "-p", str(root / "project.yml"), "-w", str(root / "w")],
            check=True,
            capture_output=True,
            env=os.environ | {"HOME": str(root)},
            cwd=root,
        )
        self = cls(root=root, port=port, folders=folders)
        for name in ("localhost", *SITES):
            self._rules(name, allowed["server" if name == "localhost" else "site"])
        return self

    def kit(self, name: str) -> Path:
        return self.root / "w" / "fedcollm" / "prod_00" / name

    def _rules(self, name: str, classes: list[str]) -> None:
        local = self.kit(name) / "local"
        resources = json.loads((local / "resources.json.default").read_text())
        resources["class_allow_list"] = classes
        if name == "localhost":
            storage = self.root / "storage"
            resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
            for component in resources["components"]:
                if component["id"] == "job_manager":
                    component["args"]["uri_root"] = str(storage / "jobs")
        if "FEDCOLLM_TEST_STREAM_LOGS" not in os.environ:  # FLARE's own default sends sites' error logs to the server
            resources["allow_log_streaming"] = False
            resources["components"] = [c for c in resources["components"] if c["id"] != "site_log_streamer"]
        (local / "resources.json").write_text(json.dumps(resources))
        rules = json.loads((local / "authorization.json.default").read_text())
        # No code of the submitter's, whoever that is.
        rules["permissions"]["project_admin"] = {
            "submit_job": "any",
            "manage_job": "any",
            "view": "any",
            "byoc": "none",
        }
        (local / "authorization.json").write_text(json.dumps(rules))

    def start(self, name: str) -> None:
        side = "server" if name == "localhost" else "client"
        command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{side}.{side}_train"]
        command += ["-m", str(self.kit(name)), "-s", f"fed_{side}.json", "--set", "secure_train=true", "org=example"]
        command += ["config_folder=config", *([] if side == "server" else [f"uid={name}"])]
        env = (
            os.environ
            | self.env
            | {
                "HOME": str(self.root),
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "privacy"), str(ROOT / "audits")]),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "4",
                FOLDER: str(self.folders[name]),
            }
        )
        (self.kit(name) / "transfer").mkdir(exist_ok=True)
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=self.kit(name))

    def start_all(self) -> None:
        for name in ("localhost", *SITES):
            self.start(name)

    def job_process(self, name: str) -> psutil.Process | None:
        """The process that works on the job at this party; FLARE's parent process starts one a job."""
        for child in psutil.Process(self.processes[name].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(m in " ".join(child.cmdline()) for m in ("worker_process", "runner_process")):
                    return child
        return None

    @contextlib.contextmanager
    def session(self, timeout_s: float = 60.0) -> Iterator[Any]:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        session = new_secure_session("admin@example.org", str(self.kit("admin@example.org")), timeout=timeout_s)
        try:
            yield session
        finally:
            session.close()

    def wait_for_sites(self, session: Any, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while len(session.get_system_info().client_info) < len(SITES):
            if time.monotonic() > end:
                raise TimeoutError("not all sites registered")
            time.sleep(0.5)

    def job(self, server: str, site: str, **meta: Any) -> Path:
        """A job's folder: three JSON files that name one class at each side."""
        folder = self.root / "job"
        shutil.rmtree(folder, ignore_errors=True)
        config = folder / "app" / "config"
        config.mkdir(parents=True)
        fields = {"name": "fedcollm", "deploy_map": {"app": ["@ALL"]}, "min_clients": 2, "resource_spec": {}} | meta
        (folder / "meta.json").write_text(json.dumps(fields))
        (config / "config_fed_server.json").write_text(
            json.dumps({"format_version": 2, "workflows": [{"id": "rounds", "path": server}], "components": []})
        )
        executor = {"tasks": ["none"], "executor": {"path": site}}
        (config / "config_fed_client.json").write_text(
            json.dumps({"format_version": 2, "executors": [executor], "components": []})
        )
        return folder

    def close(self) -> None:
        gone: list[psutil.Process] = []
        for process in self.processes.values():
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                gone += [*parent.children(recursive=True), parent]
        for process in gone:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait(timeout=30)


def finished(session: Any, job: str, seconds: float) -> str:
    """How the job ended, or its status after so long."""
    end = time.monotonic() + seconds
    while True:
        status = str(session.get_job_meta(job)["status"])
        if status.startswith("FINISHED") or time.monotonic() > end:
            return status
        time.sleep(0.3)


def refusals(federation: Federation, folders: dict[str, Path]) -> dict[str, Any]:
    """Jobs and a site that must be turned away, and what became of each; then an honest job."""
    ours = ("tests.flare_federation.EchoServer", "tests.flare_federation.EchoSite")
    result: dict[str, Any] = {}
    with federation.session() as session:
        federation.wait_for_sites(session)
        # A class that FLARE's own default list allows and this site's list does not.
        job = federation.job(ours[0], "nvflare.app_common.np.np_trainer.NPTrainer")
        result["class not listed"] = finished(session, session.submit_job(str(job)), 60)
        job = federation.job(*ours)
        (job / "app" / "custom").mkdir()
        (job / "app" / "custom" / "evil.py").write_text("open('/dev/null')\n")
        try:
            result["code with a job"] = finished(session, session.submit_job(str(job)), 60)
        except Exception as error:
            result["code with a job"] = f"refused: {error}"
        honest = session.submit_job(str(federation.job(*ours)))
        result["honest"] = finished(session, honest, 60)
        # The same name, with a key of another authority; then, as a control, with its own key again. It trusts the
        # true authority all the time, so that the refusal is the server's.
        other = Federation.provision(federation.root / "other", {"server": [], "site": []}, folders)
        startup = federation.kit("s02") / "startup"
        shutil.copytree(startup, federation.root / "own")
        for source, seconds in ((other.kit("s02") / "startup", 20.0), (federation.root / "own", 60.0)):
            federation.processes["s02"].kill()
            federation.processes["s02"].wait()
            for name in ("client.crt", "client.key"):
                shutil.copy(source / name, startup / name)
            log = federation.kit("s02") / "log.txt"
            seen, end = len(log.read_text()), time.monotonic() + seconds
            federation.start("s02")
            registered = False
            while not registered and time.monotonic() < end:
                time.sleep(0.5)
                registered = "Successfully registered" in log.read_text()[seen:]
            result.setdefault("registered", []).append(registered)
    result["calls"] = {name: (folders[name] / f"{name}.calls").exists() for name in SITES}
    return result


def main(arguments: list[str]) -> None:
    """``rounds ROOT``, ``embedded ROOT``, ``echo ROOT SCRIPT``, ``refusals ROOT``; its last line is the result."""
    what, root = arguments[0], Path(arguments[1])
    if what == "embedded":
        result: dict[str, Any] = run_rounds(root / "embedded", None)
        (root / "embedded" / "rounds.json").write_text(json.dumps(result))
    else:
        folders = {name: root / name for name in ("localhost", *SITES)}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        kind = "Round" if what == "rounds" else "Echo"
        server, site = f"tests.flare_federation.{kind}Server", f"tests.flare_federation.{kind}Site"
        federation = Federation.provision(root / "flare", {"server": [server], "site": [site]}, folders)
        (folders["localhost"] / "script.json").write_text(arguments[2] if what == "echo" else '[["echo", 9, 1]]')
        start = time.monotonic()
        try:
            federation.start_all()
            if what == "refusals":
                result = refusals(federation, folders)
            else:
                with federation.session() as session:
                    federation.wait_for_sites(session)
                    ready_s = time.monotonic() - start
                    status = finished(session, session.submit_job(str(federation.job(server, site))), 240)
                written = folders["localhost"] / ("rounds.json" if what == "rounds" else "echo.json")
                result = {"status": status, "ready_s": ready_s, "job_s": time.monotonic() - start - ready_s}
                result |= {"got": json.loads(written.read_text()) if written.exists() else None}
        finally:
            federation.close()
    sys.stdout.write("\n" + json.dumps(result) + "\n")
