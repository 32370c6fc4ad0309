"""``--check``: a healthy kit passes, and each planted fault is found, named, and comes with something to do."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.identity import SigningKey, save_key, save_public
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.roster import sign_roster
from fedcollm_privacy.site_policy import DataSetRule, PlanRules
from secure_fedcollm import doctor, site_checks
from secure_fedcollm.doctor import Finding, check_server, check_site, show_findings
from secure_fedcollm.kit import Kit
from secure_fedcollm.models import base_digest_of
from secure_fedcollm.snapshot import write_status
from secure_fedcollm.status import StatusBoard

from .kits import DAY, NOW, Authority, MadeKit, deaf_server, give, make_kit, tls_server, write
from .ledgers import PLAN
from .site_policies import write_policy

CAP = Cap(epsilon=100.0, delta=1e-3)
Fault = Callable[[MadeKit], None]


def policy(kit: MadeKit, model: str, caps: tuple[Cap, ...] = (CAP,), **changes: object) -> Path:
    rule = DataSetRule(name="notes", location=str(kit.folder / "records.jsonl"), unit="record", caps=caps)
    fields = {
        "exceptions": (),
        "data_sets": (rule,),
        "plans": PlanRules(max_epsilon=3.0, max_delta=1e-5, noise=("local",)),
    }
    return write_policy(
        kit.folder / "policy.yaml",
        "ward-a",
        kit.server.public,
        model,
        **(fields | changes),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> tuple[Path, str]:
    path = tiny_checkpoint("llama")
    return path, base_digest_of(str(path), "float32")


@pytest.fixture
def kit(tmp_path: Path, checkpoint: tuple[Path, str]) -> Iterator[MadeKit]:
    """A healthy site, whose server answers."""
    made = make_kit(tmp_path / "kit", "site", port=1)
    with tls_server(made.authority, tmp_path) as port:
        at_port(made, port)
        text = (made.folder / "site.yaml").read_text().replace('"/path/to/model"', json.dumps(str(checkpoint[0])))
        write(made.folder / "site.yaml", text.encode())
        policy(made, checkpoint[1])
        yield made


def at_port(kit: MadeKit, port: int, host: str = "localhost") -> None:
    party = json.loads((kit.folder / "party.yaml").read_text())
    write(
        kit.folder / "party.yaml", json.dumps(party | {"server": {"name": "hub", "host": host, "port": port}}).encode()
    )


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults elsewhere need not load the model each time."""
    monkeypatch.setattr(site_checks, "_model", lambda *arguments: "not looked at in this test")


def problems(findings: list[Finding]) -> dict[str, str]:
    for finding in findings:
        assert bool(finding.remedy) or finding.ok is True, finding
    return {finding.name: finding.detail for finding in findings if finding.ok is False}


def test_a_healthy_site_passes_every_check(kit: MadeKit) -> None:
    findings = check_site(Kit.open(kit.folder))
    assert {finding.name: (finding.ok, finding.detail) for finding in findings if finding.ok is not True} == {}
    names = {finding.name for finding in findings}
    assert names >= {"kit", "file modes", "identity", "certificate tls", "roster", "clock", "engine", "disk", "policy"}
    assert names >= {"settings", "data", "data in policy", "model", "ledger", "server reach", "ports"}


def test_a_healthy_server_passes_every_check(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = make_kit(tmp_path / "kit", "server", port=port)
    findings = check_server(made.folder)
    assert problems(findings) == {}
    assert {f.name for f in findings} >= {"certificate tls", "certificate lead", "roster", "port"}


def _expired(kit: MadeKit) -> None:
    give(kit.folder, "tls", kit.authority.issue("ward-a", "client", end=NOW - DAY), "site")


def _not_yet(kit: MadeKit) -> None:
    give(kit.folder, "tls", kit.authority.issue("ward-a", "client", begin=NOW + DAY), "site")


def _other_authority(kit: MadeKit) -> None:
    give(kit.folder, "tls", Authority().issue("ward-a", "client"), "site")


def _other_site(kit: MadeKit) -> None:
    give(kit.folder, "tls", kit.authority.issue("ward-b", "client"), "site")


def _wrong_tls_key(kit: MadeKit) -> None:
    write(kit.folder / "keys" / "tls.key", kit.authority.issue("ward-a", "client").key, 0o600)


def _other_governance(kit: MadeKit) -> None:
    (kit.folder / "governance.pub").unlink()
    save_public(SigningKey.generate("governance").public, kit.folder / "governance.pub")


def _wrong_identity(kit: MadeKit) -> None:
    (kit.folder / "keys" / "identity.key").unlink()
    save_key(SigningKey.generate("ward-a"), kit.folder / "keys" / "identity.key", None)


def _revoked(kit: MadeKit) -> None:
    others = tuple(
        sorted((SigningKey.generate(n).public for n in ("ward-b", "ward-c", "ward-d")), key=lambda s: s.name)
    )
    write(kit.folder / "roster.json", sign_roster(replace(kit.roster, sites=others), kit.governance).to_bytes())


def _old_roster(kit: MadeKit) -> None:
    old = replace(kit.roster, valid_until=int((NOW - DAY).timestamp()))
    write(kit.folder / "roster.json", sign_roster(old, kit.governance).to_bytes())


def _other_servers_policy(kit: MadeKit) -> None:
    policy(replace(kit, server=SigningKey.generate("hub")), "0" * 64)


def _ledger(kit: MadeKit, clock: Callable[[], float], key: SigningKey | None = None) -> Ledger:
    ledger = Ledger(kit.folder / "state" / "ledger.sqlite", key or kit.key, clock)
    ledger.commit_plan(run_id="run-1", data_set="notes", plan=PLAN, caps=(CAP,))
    return ledger


def _ledger_of_tomorrow(kit: MadeKit) -> None:
    _ledger(kit, (NOW + DAY).timestamp)


def _ledger_of_another(kit: MadeKit) -> None:
    _ledger(kit, NOW.timestamp, SigningKey.generate("ward-a"))


def _forged_ledger(kit: MadeKit) -> None:
    import sqlite3

    _ledger(kit, NOW.timestamp)
    db = sqlite3.connect(kit.folder / "state" / "ledger.sqlite")
    with db:
        db.execute("UPDATE entries SET body = replace(body, '\"epsilon\":', '\"epsilon\":0')")
    db.close()


def _budget_gone(kit: MadeKit) -> None:
    spent = _ledger(kit, NOW.timestamp).spent_on("notes").epsilon
    policy(kit, "0" * 64, caps=(Cap(epsilon=spent, delta=1e-3, days=30), CAP))


def _change(name: str, old: str, new: str) -> Fault:
    def change(kit: MadeKit) -> None:
        text = (kit.folder / name).read_text()
        assert old in text
        write(kit.folder / name, text.replace(old, new).encode(), 0o600)

    return change


def _chmod(name: str, mode: int) -> Fault:
    return lambda kit: (kit.folder / name).chmod(mode)


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "expired certificate": (_expired, "certificate tls", "holds from"),
    "certificate of tomorrow": (_not_yet, "clock", "tls.pem begins to hold"),
    "certificate of another authority": (_other_authority, "certificate tls", "not issued by this federation"),
    "certificate of another site": (_other_site, "certificate tls", "ward-b"),
    "key of another certificate": (_wrong_tls_key, "kit", "tls.key is not the key"),
    "swapped governance": (_other_governance, "roster", "does not hold"),
    "identity key of another": (_wrong_identity, "identity", "not the key of identity.pub"),
    "revoked": (_revoked, "roster", "does not name ward-a"),
    "expired roster": (_old_roster, "roster", "not valid any more"),
    "no grant yet": (lambda kit: (kit.folder / "roster.json").unlink(), "kit", "fedcollm deploy complete"),
    "keys folder open": (_chmod("keys", 0o755), "kit", "chmod 700"),
    "key readable": (_chmod("keys/identity.key", 0o640), "file modes", "identity.key has mode 0640: chmod 600"),
    "engine key readable": (_chmod("engine/startup/client.key", 0o644), "file modes", "client.key has mode 0644"),
    "state readable": (_chmod("state", 0o755), "file modes", "state has mode 0755"),
    "pinned authority writable": (_chmod("ca.pem", 0o666), "file modes", "can be changed by other users"),
    "policy world-writable": (_chmod("policy.yaml", 0o666), "policy", "can be changed by other users"),
    "no policy": (lambda kit: (kit.folder / "policy.yaml").unlink(), "policy", "does not exist"),
    "policy of another server key": (_other_servers_policy, "policy", "does not list the server hub"),
    "policy expired": (
        lambda kit: policy(kit, "0" * 64, valid_until=dt.date(2020, 1, 1)) and None,
        "policy",
        "2020-01-01",
    ),
    "policy demands more sites": (
        lambda kit: policy(kit, "0" * 64, opening=SumPolicy(min_contributors=5, max_colluding=1)) and None,
        "policy",
        "it demands 5; the federation agreed on 3",
    ),
    "settings misspelt": (_change("site.yaml", "approval:", "aproval:"), "settings", "aproval"),
    "settings of another site": (_change("site.yaml", 'site: "ward-a"', 'site: "ward-b"'), "settings", "ward-b"),
    "data missing": (lambda kit: (kit.folder / "records.jsonl").unlink(), "data", "records.jsonl"),
    "data broken": (
        lambda kit: write(kit.folder / "records.jsonl", b'{"text": "a"}\n{"te'),
        "data",
        ":2: not a JSON object",
    ),
    "data without its field": (
        lambda kit: write(kit.folder / "records.jsonl", b'{"note": "a"}\n'),
        "data",
        "'text' is missing",
    ),
    "data empty": (lambda kit: write(kit.folder / "records.jsonl", b"\n"), "data", "no row"),
    "data that the policy does not list": (
        _change("policy.yaml", "records.jsonl", "elsewhere.jsonl"),
        "data in policy",
        "elsewhere.jsonl",
    ),
    "ledger forged": (_forged_ledger, "ledger", "was altered"),
    "ledger of another key": (_ledger_of_another, "ledger", "another"),
    "clock behind the ledger": (_ledger_of_tomorrow, "ledger", "it was set back"),
    "budget exhausted": (_budget_gone, "budget of notes", "nothing is left"),
}


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize(("plant", "name", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_each_planted_fault_is_found_and_named(plant: Fault, name: str, said: str, kit: MadeKit) -> None:
    plant(kit)
    findings = check_site(kit.folder)
    assert said in problems(findings)[name]
    assert show_findings(findings, Console(file=StringIO())) == 1


@pytest.mark.usefixtures("without_model")
def test_a_clock_before_the_certificate_is_named(kit: MadeKit) -> None:
    found = problems(check_site(kit.folder, clock=(NOW - 20 * DAY).timestamp))
    assert "this machine's clock is behind" in found["clock"]
    assert "holds from" in found["certificate tls"]


@pytest.mark.usefixtures("without_model")
def test_what_ends_soon_is_a_warning_and_no_failure(kit: MadeKit) -> None:
    give(kit.folder, "tls", kit.authority.issue("ward-a", "client", end=NOW + 29 * DAY + DAY / 2), "site")
    findings = check_site(kit.folder)
    (soon,) = (finding for finding in findings if finding.ok is None)
    assert (soon.name, "29 days left" in soon.detail) == ("certificate tls", True)
    assert show_findings(findings, Console(file=StringIO())) == 0


def test_another_model_is_found_by_its_digest(kit: MadeKit, tiny_checkpoint: Callable[..., Path]) -> None:
    other = tiny_checkpoint("gpt2")
    text = (kit.folder / "site.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("model:"))
    write(kit.folder / "site.yaml", text.replace(line, f"model: {json.dumps(str(other))}").encode())
    assert base_digest_of(str(other), "float32") in problems(check_site(kit.folder))["model"]


def reach_of(kit: MadeKit) -> Finding:
    return next(f for f in check_site(kit.folder, timeout_s=2.0) if f.name.startswith("server reach"))


@pytest.mark.usefixtures("without_model")
def test_an_unreachable_server_is_told_apart_by_the_step_that_fails(kit: MadeKit, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    at_port(kit, port)
    assert (reach_of(kit).name, reach_of(kit).ok) == ("server reach: TCP", False)
    at_port(kit, port, host="nowhere.invalid")
    assert (reach_of(kit).name, reach_of(kit).ok) == ("server reach: DNS", False)
    with deaf_server() as deaf:
        at_port(kit, deaf)
        assert (reach_of(kit).name, reach_of(kit).ok) == ("server reach: TLS", False)


@pytest.mark.usefixtures("without_model")
def test_a_server_of_another_authority_or_name_is_not_believed(kit: MadeKit, tmp_path: Path) -> None:
    with tls_server(Authority(), tmp_path, trusts=kit.authority) as port:
        at_port(kit, port)
        found = reach_of(kit)
        assert (found.name, found.ok) == ("server reach: certificate", False)
        assert "not believed" in found.detail
    with tls_server(kit.authority, tmp_path, host="other.example") as port:
        at_port(kit, port)
        assert "not believed" in reach_of(kit).detail
    # The same server under its right name and authority is believed: the refusals above are of these two alone.
    with tls_server(kit.authority, tmp_path) as port:
        at_port(kit, port)
        assert reach_of(kit).ok is True


@pytest.mark.usefixtures("without_model")
def test_a_server_that_does_not_take_this_sites_certificate_is_named(kit: MadeKit, tmp_path: Path) -> None:
    with tls_server(kit.authority, tmp_path, trusts=Authority()) as port:
        at_port(kit, port)
        found = reach_of(kit)
    assert (found.name, found.ok) == ("server reach: certificate", False)
    assert "does not take this party's certificate" in found.detail


@pytest.mark.usefixtures("without_model")
def test_the_kind_of_server_that_the_engine_runs_is_told_right(kit: MadeKit) -> None:
    grpc = pytest.importorskip("grpc")
    issued = kit.authority.issue("localhost", "server")
    for trusts, expected in ((kit.authority, True), (Authority(), False)):
        credentials = grpc.ssl_server_credentials(
            [(issued.key, issued.certificate)], root_certificates=trusts.pem, require_client_auth=True
        )
        with ThreadPoolExecutor(1) as pool:
            server = grpc.server(pool)
            at_port(kit, server.add_secure_port("127.0.0.1:0", credentials))
            server.start()
            found = reach_of(kit)
            server.stop(None).wait()
        assert found.ok is expected, found


@pytest.mark.usefixtures("without_model")
def test_an_encrypted_key_is_not_opened_and_not_called_good(kit: MadeKit) -> None:
    (kit.folder / "keys" / "identity.key").unlink()
    save_key(kit.key, kit.folder / "keys" / "identity.key", b"correct horse")
    (finding,) = (finding for finding in check_site(kit.folder) if finding.name == "identity")
    assert finding.ok is None
    assert kit.key.public.fingerprint in finding.detail


@pytest.mark.usefixtures("without_model")
def test_a_silent_server_is_not_called_good(kit: MadeKit, tmp_path: Path) -> None:
    with tls_server(kit.authority, tmp_path, talks=False) as port:
        at_port(kit, port)
        assert reach_of(kit).ok is None


@pytest.mark.usefixtures("without_model")
def test_a_site_that_listens_to_others_is_found_and_one_on_loopback_is_not(kit: MadeKit) -> None:
    for address, expected in (("0.0.0.0", False), ("127.0.0.1", True)):
        code = f"import socket, sys; s = socket.create_server(('{address}', 0)); print(flush=True); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            process.stdout.readline()  # type: ignore[union-attr]
            board = StatusBoard(kit.folder / "state" / "status.json", "site", "ward-a")
            snapshot = board.snapshot()
            board.close()
            write_status(
                kit.folder / "state" / "status.json", replace(snapshot, pid=process.pid, since=snapshot.since + 5)
            )
            (ports,) = (finding for finding in check_site(kit.folder) if finding.name == "ports")
        finally:
            process.communicate()
        assert ports.ok is expected


def test_a_taken_port_is_found_at_the_server(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        made = make_kit(tmp_path / "kit", "server", port=taken.getsockname()[1])
        assert "another program has it" in problems(check_server(made.folder))["port"]


def test_a_running_server_is_asked_at_its_own_port(tmp_path: Path) -> None:
    made = make_kit(tmp_path / "kit", "server", port=1, host="localhost")
    board = StatusBoard(made.folder / "state" / "status.json", "server", "hub")
    board.begin("run", 1, ("ward-a",))
    board.close()  # its last file stands; its process, this one, lives
    with tls_server(made.authority, tmp_path) as port:
        at_port(made, port)
        findings = check_server(made.folder)
    assert problems(findings) == {}
    assert next(f for f in findings if f.name == "server reach").ok is True


def test_another_engine_version_is_named(kit: MadeKit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(site_checks, "_model", lambda *arguments: "not looked at in this test")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.7.1")
    assert "2.7.1 is installed; 2.9.0" in problems(check_site(kit.folder))["engine"]


def test_a_full_disk_is_named(kit: MadeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_checks, "_model", lambda *arguments: "not looked at in this test")
    usage = shutil.disk_usage(kit.folder)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=2**29))
    assert "cannot be written" in problems(check_site(kit.folder))["disk"]


@pytest.mark.usefixtures("without_model")
def test_a_kit_of_the_other_role_is_refused(kit: MadeKit) -> None:
    assert "is the kit of a site" in problems(check_server(kit.folder))["kit"]


@pytest.mark.usefixtures("without_model")
def test_nothing_secret_and_nothing_of_records_is_printed(kit: MadeKit) -> None:
    _ledger(kit, NOW.timestamp)
    write(kit.folder / "records.jsonl", b'{"text": "SECRETWORD"}\n' * 12345, 0o600)
    said = StringIO()
    show_findings(check_site(kit.folder), Console(file=said, width=300))
    text = said.getvalue()
    assert "SECRETWORD" not in text
    assert "12345" not in text
    for path in (kit.folder / "keys").glob("*.key"):
        for line in path.read_text().splitlines():
            assert line.startswith("-----") or line not in text
    write(kit.folder / "records.jsonl", b'{"text": "SECRETWORD"}\n{"text": SECRETWORD}\n')
    assert "SECRETWORD" not in " ".join(f.detail + f.remedy for f in check_site(kit.folder))


@pytest.mark.usefixtures("without_model")
def test_looking_changes_nothing(kit: MadeKit) -> None:
    _ledger(kit, NOW.timestamp)

    def contents() -> dict[str, tuple[int, bytes]]:
        files = (path for path in kit.folder.rglob("*") if path.is_file())
        return {str(path): (os.stat(path).st_mode, path.read_bytes()) for path in files}

    before = contents()
    check_site(kit.folder)
    assert contents() == before


def test_a_persons_policy_needs_the_column_that_names_them(kit: MadeKit, checkpoint: tuple[Path, str]) -> None:
    rule = DataSetRule(name="notes", location=str(kit.folder / "records.jsonl"), unit="person", caps=(CAP,))
    policy(kit, checkpoint[1], data_sets=(rule,))
    assert "data.unit_field" in problems(check_site(kit.folder))["data in policy"]
