"""The page: this machine only, to be looked at only, self-contained, and its metrics say what the snapshot says."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedcollm_privacy.errors import FedCollmError, InvalidValue
from secure_fedcollm.snapshot import ROUND_SECONDS, Snapshot, write_status
from secure_fedcollm.status import StatusBoard
from secure_fedcollm.watch import Watch
from secure_fedcollm.watch_page import render_watch

from .test_status import SITES, Clock, Event, ended, settlement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`\u202e"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[StatusBoard]:
    clock = Clock(time.time())
    made = StatusBoard(tmp_path / "status.json", "server", "hub", federation="north", clock=clock)
    made.begin("run-1", 9, SITES, epsilon=3.0, delta=1e-5)
    for number in range(1, 6):
        made.round(number, 1)
        for site in SITES:
            made.observe(Event(site=site, bytes_in=1000 * number, bytes_out=7))
        clock.now += 2.0 * number
        left_out = {"ward-c": "no answer"} if number == 2 else {}
        spent = tuple(settlement(site, 0.25 * number) for site in SITES)
        made.round_done(ended("lost" if number == 3 else "opened", left_out=left_out, settlements=spent))
    made.round(6, 1)
    yield made
    made.close()


@pytest.fixture
def watch(board: StatusBoard) -> Iterator[Watch]:
    made = Watch(board, 0)
    yield made
    made.close()


def port_of(watch: Watch) -> int:
    return int(watch.address.rsplit(":", 1)[1].strip("/"))


def ask(
    watch: Watch, path: str, method: str = "GET", host: str | None = None, body: bytes | None = None
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(watch), timeout=20)
    try:
        headers = {} if host is None else {"Host": host}
        connection.request(method, path, headers=headers, body=body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_it_listens_on_this_machines_own_address_only(watch: Watch) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port_of(watch)
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    others = {
        a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET
    }
    for address in others - {"127.0.0.1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port_of(watch)), timeout=2).close()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_it_can_be_looked_at_and_nothing_else(method: str, watch: Watch) -> None:
    body = b"GET /status.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" if method in ("POST", "PUT", "PATCH") else None
    code, _, headers = ask(watch, "/status.json", method, body=body)
    assert (code, headers["Allow"]) == (405, "GET")
    assert ask(watch, "/status.json")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:{port}", "[::1]:{port}", "", "0.0.0.0:{port}"]
)
def test_a_name_that_points_here_is_refused(host: str, watch: Watch) -> None:
    for path in ("/", "/status.json", "/metrics", "/nothing"):
        code, text, _ = ask(watch, path, host=host.format(port=port_of(watch)))
        assert code == 403
        assert "run-1" not in text


def test_two_host_headers_are_refused(watch: Watch) -> None:
    with socket.create_connection(("127.0.0.1", port_of(watch)), timeout=20) as raw:
        host = f"127.0.0.1:{port_of(watch)}"
        raw.sendall(f"GET /status.json HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n".encode())
        assert raw.recv(12).endswith(b"403")


@pytest.mark.parametrize(
    "path", ["/x", "/status.json/", "/../status.json", "/status.json?x", "/%2e", "http://evil.example/"]
)
def test_there_is_nothing_else(path: str, watch: Watch) -> None:
    code, text, _ = ask(watch, path, host=f"127.0.0.1:{port_of(watch)}")
    assert code == 404
    assert "run-1" not in text


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/nothing"])
def test_every_answer_forbids_what_a_page_could_be_made_to_do(path: str, watch: Watch) -> None:
    headers = ask(watch, path)[2]
    rules = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Access-Control-Allow-Origin"] is None


def test_each_page_has_a_nonce_of_its_own_and_no_other_script_or_style(watch: Watch) -> None:
    seen = set()
    for _ in range(2):
        _, text, headers = ask(watch, "/")
        (nonce,) = set(re.findall(r"'nonce-([A-Za-z0-9_-]{20,})'", headers["Content-Security-Policy"]))
        seen.add(nonce)
        assert re.findall(r"<(?:script|style)[^>]*>", text) == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
        assert " style=" not in text
        assert not re.search(r"\son[a-z]+\s*=", text)
    assert len(seen) == 2


class Sources(HTMLParser):
    """Whatever a page would load, and its scripts' places."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def pages(board: StatusBoard) -> dict[str, str]:
    server = board.snapshot()
    site = replace(server, role="site", sites=(), history=(), own=None)
    return {"server": render_watch(server, "n"), "site": render_watch(site, "n")}


def test_the_page_loads_nothing_from_elsewhere(board: StatusBoard) -> None:
    for page in pages(board).values():
        sources = Sources()
        sources.feed(page)
        assert set(sources.loaded) <= {"/status.json", "/metrics", "#content"}
        assert "http:" not in page
        assert "https:" not in page
        assert "url(" not in page
        assert "@import" not in page


def test_a_hostile_name_or_code_is_text(board: StatusBoard) -> None:
    clean = board.snapshot()
    left_out = tuple(replace(left, site=HOSTILE, code=HOSTILE) for past in clean.history for left in past.left_out)
    hostile = replace(
        clean,
        name=HOSTILE,
        federation=HOSTILE,
        run_id=HOSTILE,
        phase=HOSTILE,
        sites=tuple(replace(s, name=HOSTILE, code=HOSTILE, operation=HOSTILE, state=HOSTILE) for s in clean.sites),
        history=tuple(replace(p, outcome=HOSTILE, reason=HOSTILE, left_out=left_out) for p in clean.history),
    )
    for snapshot in (hostile, replace(hostile, trouble=HOSTILE), replace(hostile, state="failed", failure=HOSTILE)):
        page = render_watch(snapshot, "n")
        sources = Sources()
        sources.feed(page)
        plain = Sources()
        plain.feed(render_watch(clean, "n"))
        assert sources.tags.count("script") == plain.tags.count("script") == 1
        assert "img" not in sources.tags
        assert "\u202e" not in page
    # The control: without escaping the same name would be two elements.
    broken = Sources()
    broken.feed(HOSTILE)
    assert broken.tags == ["script", "img"]


def test_the_page_without_scripts_is_whole(board: StatusBoard) -> None:
    page = pages(board)["server"]
    for word in (*SITES, "run-1", "round 6 of 9", "4 opened, 1 lost, 9 planned", "1.25 of 3.00", "ward-c: no answer"):
        assert word in page
    assert re.search(r'id="gone"[^>]*hidden', page)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_are_the_snapshots_numbers(board: StatusBoard, watch: Watch) -> None:
    found = samples(ask(watch, "/metrics")[1])
    status: dict[str, Any] = json.loads(ask(watch, "/status.json")[1])
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("fedcollm_up", ()): 1,
        ("fedcollm_rounds_planned", ()): 9,
        ("fedcollm_server_round", ()): 6,
        ("fedcollm_rounds_total", (("outcome", "opened"),)): status["opened"],
        ("fedcollm_rounds_total", (("outcome", "lost"),)): status["lost"],
        ("fedcollm_epsilon_budget", ()): 3.0,
        ("fedcollm_site_requests_total", (("operation", "train"), ("state", "answered"))): 15,
        ("fedcollm_round_seconds_sum", ()): 2.0 + 4.0 + 6.0 + 8.0 + 10.0,
        ("fedcollm_round_seconds_count", ()): 5,
    }
    for site in status["sites"]:
        expected[("fedcollm_site_bytes_total", (("direction", "up"), ("site", site["name"])))] = 15000
        expected[("fedcollm_site_bytes_total", (("direction", "down"), ("site", site["name"])))] = 35
        expected[("fedcollm_site_joined", (("site", site["name"]),))] = 1
        expected[("fedcollm_site_epsilon_spent", (("site", site["name"]),))] = 1.25
    for end in (*ROUND_SECONDS, float("inf")):
        name = "+Inf" if end == float("inf") else str(end)
        below = sum(seconds <= end for seconds in (2.0, 4.0, 6.0, 8.0, 10.0))
        expected[("fedcollm_round_seconds_bucket", (("le", name),))] = below
    assert {key: pytest.approx(value) for key, value in expected.items()} == found


def test_two_watches_share_no_numbers(board: StatusBoard, watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = StatusBoard(tmp_path / "other" / "status.json", "server", "hub")
    with contextlib.closing(Watch(other, 0)) as second:
        assert samples(ask(second, "/metrics")[1])[("fedcollm_server_round", ())] == 0
    other.close()
    assert samples(ask(watch, "/metrics")[1])[("fedcollm_server_round", ())] == 6


def test_a_hostile_label_cannot_add_a_metric(board: StatusBoard, tmp_path: Path) -> None:
    snapshot = board.snapshot()
    name = 'x"} 1\nfedcollm_up 0\n#'
    write_status(tmp_path / "other.json", replace(snapshot, sites=(replace(snapshot.sites[0], name=name),)))
    with contextlib.closing(Watch(tmp_path / "other.json", 0)) as watch:
        found = samples(ask(watch, "/metrics")[1])
    assert found[("fedcollm_up", ())] == 1
    assert found[("fedcollm_site_joined", (("site", name),))] == 1


def test_a_file_that_is_missing_or_broken_is_said_and_the_metric_is_down(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with contextlib.closing(Watch(path, 0)) as watch:
        for _ in range(2):
            for page in ("/", "/status.json"):
                code, text, _ = ask(watch, page)
                assert code == 503
                assert str(path) in text
            assert samples(ask(watch, "/metrics")[1]) == {("fedcollm_up", ()): 0}
            path.write_text("[]")


def test_a_process_that_is_gone_or_failed_is_down(board: StatusBoard, tmp_path: Path) -> None:
    snapshot = board.snapshot()
    process = subprocess.Popen(["true"])
    process.wait()
    for change in ({"pid": process.pid}, {"state": "failed", "failure": "no round gave a sum"}):
        write_status(tmp_path / "other.json", replace(snapshot, **change))  # type: ignore[arg-type]
        with contextlib.closing(Watch(tmp_path / "other.json", 0)) as watch:
            assert samples(ask(watch, "/metrics")[1])[("fedcollm_up", ())] == 0
            assert 'class="banner no"' in ask(watch, "/")[1]


def test_a_site_shows_its_own_budgets(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", "site", "ward-a")
    budget = {"data_set": "notes", "epsilon": 1.5, "cap_epsilon": 4.0, "delta": 1e-5, "cap_delta": 1e-4, "days": 365}
    used = budget | {"epsilon": 4.0, "days": None, "data_set": "letters"}
    board.site({"run": "r", "standing": "paused", "refusals": 3, "paused": True, "budgets": [budget, used]})
    with contextlib.closing(Watch(board, 0)) as watch:
        found = samples(ask(watch, "/metrics")[1])
        page = ask(watch, "/")[1]
    board.close()
    assert found[("fedcollm_data_set_epsilon_spent", (("data_set", "notes"), ("days", "365")))] == 1.5
    assert found[("fedcollm_data_set_epsilon_cap", (("data_set", "letters"), ("days", "")))] == 4.0
    assert found[("fedcollm_refusals_total", ())] == 3
    assert found[("fedcollm_paused", ())] == 1
    assert "letters: used up" in page
    assert "notes: used up" not in page
    assert "paused by its administrator" in page


def test_a_taken_port_is_named_and_a_closed_one_is_free_again(board: StatusBoard) -> None:
    first = Watch(board, 0)
    with pytest.raises(FedCollmError, match=str(port_of(first))):
        Watch(board, port_of(first))
    first.close()
    Watch(board, port_of(first)).close()
    with pytest.raises(InvalidValue, match="port"):
        Watch(board, 65536)


def test_many_readers_at_once_all_get_whole_answers(board: StatusBoard, watch: Watch) -> None:
    wrong: list[object] = []

    def look() -> None:
        for path in ("/status.json", "/metrics", "/") * 4:
            code, text, _ = ask(watch, path)
            if code != 200 or (path == "/status.json" and json.loads(text)["name"] != "hub"):
                wrong.append((code, path))

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(60):
        board.observe(Event(site=SITES[number % 3], bytes_in=number))
    for thread in threads:
        thread.join()
    assert wrong == []


def dom(address: str, profile: Path, milliseconds: int = 1000) -> str:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", f"--virtual-time-budget={milliseconds}"]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@needs_browser
def test_a_browser_shows_what_happens_without_a_reload(tmp_path: Path) -> None:
    """The board moves on after the page was served: what the browser then shows can only come from its script."""

    class Moving:
        def __init__(self) -> None:
            self.board = StatusBoard(tmp_path / "status.json", "server", "hub")
            self.board.begin("run-1", 9, SITES)
            self.pages = 0

        def snapshot(self) -> Snapshot:
            now = self.board.snapshot()
            self.pages += 1
            if self.pages == 1:
                self.board.round(7, 1)
                self.board.observe(Event(site="ward-b", operation="advertise", state="declined"))
            return now

    moving = Moving()
    with contextlib.closing(Watch(moving, 0)) as watch:
        shown = dom(watch.address, tmp_path / "browser", 9000)
    moving.board.close()
    assert moving.pages >= 3
    assert "round 7 of 9" in shown
    assert "ward-b: its policy or its administrator says no" in shown
    assert re.search(r'id="gone"[^>]*hidden', shown)


@needs_browser
def test_a_browser_says_when_the_process_gives_no_answer(tmp_path: Path) -> None:
    class Dying:
        def __init__(self) -> None:
            self.board = StatusBoard(tmp_path / "status.json", "server", "hub")
            self.pages = 0

        def snapshot(self) -> Snapshot:
            self.pages += 1
            if self.pages > 1:
                raise FedCollmError("gone")
            return self.board.snapshot()

    dying = Dying()
    with contextlib.closing(Watch(dying, 0)) as watch:
        shown = dom(watch.address, tmp_path / "browser", 9000)
    dying.board.close()
    assert dying.pages > 1
    assert not re.search(r'id="gone"[^>]*hidden', shown)
    assert "No answer from the server process" in shown


@needs_browser
def test_a_hostile_name_runs_nothing_in_a_browser(board: StatusBoard, tmp_path: Path) -> None:
    snapshot = board.snapshot()
    name = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    write_status(
        tmp_path / "other.json", replace(snapshot, sites=(replace(snapshot.sites[0], name=name),), run_id=name)
    )
    with contextlib.closing(Watch(tmp_path / "other.json", 0)) as watch:
        shown = dom(watch.address, tmp_path / "browser", 5000)
    assert "<title>server hub" in shown
    assert "&lt;img src=x" in shown
