"""A whole federation of separate processes, as its people would set it up: kits, ceremony, services, real engine.

Everything goes through the commands. What a test adds is the editing that an administrator does by hand: the site's
settings and its policy. Parties can be put into network namespaces of their own.
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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedcollm_privacy.identity import load_public
from secure_fedcollm.models import base_digest_of

from .site_policies import write_policy

ROOT = Path(__file__).parents[1]
SERVER = "server"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployment:
    """Kits under ``root``, parties as processes.

    Attributes:
        sites: their names.
        notes: for every site, its own file of records.
        public: the server's public file, or None for the packaged text.
        model: the SLM that all have on their disk.
        host: the server's name for its sites.
        prefix: for a party, words that its commands begin with, e.g. ``ip netns exec``.
        env: further environment of all parties.
        settings: changes to every site's ``site.yaml``.
        policy: changes to every site's policy.
    """

    root: Path
    sites: tuple[str, ...]
    notes: Mapping[str, Path]
    model: Path
    host: str = "localhost"
    prefix: Mapping[str, Sequence[str]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    _watching: threading.Event = field(default_factory=threading.Event)
    _commands: dict[str, list[str]] = field(default_factory=dict)

    def kit(self, name: str) -> Path:
        return self.root / "at" / name

    def command(self, *words: str, party: str | None = None, fails: bool = False) -> str:
        """Run a command to its end; gives what it printed, in colour of nothing."""
        done = subprocess.run(
            [*self.prefix.get(party or "", ()), *_fedcollm(), *words],
            env=self._environment(),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=300,
        )
        output = done.stdout + done.stderr
        if (done.returncode != 0) is not fails:
            raise RuntimeError(f"fedcollm {' '.join(words)}: exit {done.returncode}\n{output}")
        return output

    def ceremony(self) -> None:
        """Kits, keys, certificates, roster; then the two files that an administrator edits."""
        self.root.mkdir(parents=True, exist_ok=True)
        federation = {
            "name": "ward-notes",
            "server": {"name": SERVER, "host": self.host, "port": free_port()},
            "sites": list(self.sites),
            "min_contributors": 3,
            "max_colluding": 1,
            "valid_days": 30,
            "certificate_days": 30,
            "org": "example",
            "contact": "the federation office, +00 000",
        }
        (self.root / "federation.yaml").write_text(yaml.safe_dump(federation))
        self.command("deploy", "init", "federation.yaml", "--out", "coordinator")
        parties = (SERVER, *self.sites)
        for name in parties:
            # The coordinator hands a kit to its party, who works on it in a place of its own.
            shutil.copytree(self.root / "coordinator" / "kits" / name, self.kit(name))
        requests = [str(self.kit(name) / f"{name}.request.json") for name in parties]
        grants = self.root / "coordinator" / "grants"
        with ThreadPoolExecutor(max_workers=2) as each:  # people work side by side
            list(each.map(lambda name: self.command("deploy", "join", str(self.kit(name))), parties))
            self.command("deploy", "admit", "coordinator", *requests, "--yes")
            list(
                each.map(
                    lambda n: self.command("deploy", "complete", str(self.kit(n)), f"{grants}/{n}.grant.json"), parties
                )
            )
        self.administrate()

    def administrate(self) -> None:
        server = load_public(self.kit(SERVER) / "keys" / "identity.pub")
        digest = base_digest_of(str(self.model), "float32")
        for name in self.sites:
            kit = self.kit(name)
            (kit / "site.yaml").write_text(yaml.safe_dump(self._settings(name), sort_keys=False))
            (kit / "policy.yaml").unlink(missing_ok=True)
            write_policy(
                kit / "policy.yaml", name, server, digest, str(self.notes[name].resolve()), "record", **self.policy
            )

    def _settings(self, name: str) -> dict[str, Any]:
        data = {
            "declared": "synthetic",
            "task": "text",
            "path": str(self.notes[name].resolve()),
            "split": "train",
            "prompt_field": None,
            "target_field": "text",
            "prompt_template": None,
            "unit_field": None,
            "held_out_fraction": 0.1,
            "max_records": None,
        }
        own = {
            "site": name,
            "data": data,
            "model": str(self.model),
            "device": "cpu",
            "activation_checkpointing": False,
            "approval": "auto",
            "insecure_test_seed": None,
        }
        return own | dict(self.settings)

    def start(self, name: str, *words: str) -> None:
        """Start a site, or the server with these overrides."""
        role = "server" if name == SERVER else "site"
        self._launch(name, [*_fedcollm(), role, "--kit", str(self.kit(name)), *words])

    def start_dying_server(self, schedule: Path, *words: str) -> None:
        """The server with the deaths of ``tests/deaths.py``."""
        command = [sys.executable, "-m", "tests.deaths", str(schedule), "server", "--kit", str(self.kit(SERVER))]
        self._launch(SERVER, [*command, *words])
        self._commands[SERVER] = command  # without overrides it goes on

    def _launch(self, name: str, command: list[str]) -> None:
        self._commands[name] = command
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [*self.prefix.get(name, ()), *command],
                env=self._environment(),
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(self.root),
            "FEDCOLLM_HOME": str(self.root / "home"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "4",
            "PYTHONWARNINGS": "ignore",
            **self.env,
        }

    def supervise(self) -> None:
        """From now on restart whoever was killed by a signal, after 2 seconds, as systemd would."""

        def watch() -> None:
            while not self._watching.wait(0.2):
                for name, process in list(self.processes.items()):
                    if process.poll() is not None and process.returncode < 0:
                        time.sleep(2.0)
                        if not self._watching.is_set():
                            self.restarts[name] = self.restarts.get(name, 0) + 1
                            self._launch(name, self._commands[name])

        threading.Thread(target=watch, daemon=True).start()

    def status(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.kit(name) / "state" / "status.json").read_text()))

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if condition():
                    return
            time.sleep(0.2)
        raise RuntimeError(f"not within {seconds:.0f} s: {what}\n{self.tails()}")

    def ready(self, name: str) -> bool:
        return (self.kit(name) / "state" / "ready").exists() and self.processes[name].poll() is None

    def ended(self, name: str = SERVER) -> bool:
        process = self.processes[name]
        return process.poll() is not None and process.returncode >= 0

    def run_folder(self) -> Path:
        (folder,) = (self.kit(SERVER) / "runs").iterdir()
        return folder

    def tails(self) -> str:
        texts = []
        for name in (SERVER, *self.sites):
            path = self.root / f"{name}.out"
            if path.exists():
                texts.append(f"--- {name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(texts)

    def descendants(self) -> list[psutil.Process]:
        """All living processes that belong to this federation, by their kits' paths."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.root) in " ".join(process.cmdline()) and process.pid != os.getpid():
                    found.append(process)
        return found

    def stop(self, name: str) -> int:
        """SIGTERM, as `systemctl stop`; gives the exit code."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)

    def close(self) -> None:
        """End all that is left, the hard way."""
        self._watching.set()
        time.sleep(0.3)
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        for left in self.descendants():
            with contextlib.suppress(psutil.Error):
                left.kill()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fedcollm() -> list[str]:
    return [str(Path(sys.executable).with_name("fedcollm"))]
