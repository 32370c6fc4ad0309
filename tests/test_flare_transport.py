"""The engine of real sites: server and three sites in FLARE's own processes, mutual TLS on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secure_fedcollm.answer_memory import request_digest
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.strict_build import build
from secure_fedcollm.transport import Handler

from .test_run import SMALL, write_notes

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install 'secure-fedcollm[deploy]'")

ROOT = Path(__file__).parents[1]


def driver(*arguments: str) -> dict[str, Any]:
    """One command of tests/flare_federation.py in a process of its own, so that FLARE leaves no thread here."""
    paths = [str(ROOT), str(ROOT / "privacy"), str(ROOT / "audits")]
    code = f"import sys; sys.path[:0] = {paths!r}; from tests.flare_federation import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def files_with(folder: Path, content: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and content in path.read_bytes()]


@pytest.fixture
def run_folders(tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """``<name>/home`` and ``<name>/run`` for the embedded run, the server and each site: all the same at first."""
    from secure_fedcollm.parties import identity_of

    from .flare_federation import SITES

    base = tmp_path / "embedded"
    monkeypatch.setenv("FEDCOLLM_HOME", str(base / "home"))
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    given = [
        f"data.path={notes}",
        "data.declared=public",
        "data.partition=column",
        "data.site_field=site",
        f"model.slm={tiny_checkpoint('llama')}",
        f"model.llm={tiny_checkpoint('llama', width=64)}",
        f"output_dir={base / 'run'}",
        *SMALL,
        "distillation.steps=2",
        "privacy.insecure_test_seed=7",
    ]
    plain = compose_config(given)
    config = build(Config, plain)
    RunFolder.create(config.output_dir, config.name, plain)
    for name in ("server", *SITES):
        identity_of(name)
    for name in ("localhost", *SITES):
        shutil.copytree(base, tmp_path / name, copy_function=shutil.copy2)
    return tmp_path


def test_two_rounds_over_the_engine_give_what_the_embedded_run_gives(run_folders: Path) -> None:
    engine = driver("rounds", str(run_folders))
    embedded = driver("embedded", str(run_folders))
    assert engine["status"] == "FINISHED:COMPLETED"
    here, there = embedded["rounds"], engine["got"]["rounds"]
    assert [row["outcome"] for row in there] == ["opened", "opened"], there
    assert here[0]["slm"] != here[1]["slm"]
    for mine, other in zip(here, there, strict=True):
        for key in ("outcome", "cohort", "left_out", "distrusted", "settled", "slm", "llm"):
            assert other[key] == mine[key], key


def test_bytes_codes_and_deadlines_over_the_engine_and_no_request_is_worked_on_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = 3 * 2**20
    script = [["echo", 100, 1], ["echo", 100, 1], ["echo", long, 1], ["give", long, 1]]
    script += [["decline", 9, 1], ["crash", 9, 1], ["sleep4", 9, 1], ["sleep30", 9, 1]]
    monkeypatch.setenv("FEDCOLLM_TEST_EVIL", "1")
    result = driver("echo", str(tmp_path), json.dumps(script))
    # s01 asked s00 in the server's place: it was heard and declined, and is in no list of calls.
    assert (tmp_path / "s01" / "heard").read_text() == "declined"
    assert result["status"] == "FINISHED:COMPLETED"
    rows = {(row["operation"], row["length"]): row for row in result["got"]}
    assert all(sorted(row["order"]) == ["s00", "s01", "s02"] for row in result["got"])

    def sha(body: bytes) -> set[str]:
        return {hashlib.sha256(body).hexdigest()}

    for length in (100, long):
        assert set(rows["echo", length]["sha"].values()) == sha(b"\0" * 4 + b"x" * length)
    assert set(rows["give", long]["sha"].values()) == sha(bytes(long))
    assert set(rows["sleep4", 9]["sha"].values()) == sha(b"\0" * 4 + b"x" * 9)  # longer than any one question waits
    for operation, code in (("decline", "declined"), ("crash", "failed"), ("sleep30", "no answer")):
        assert set(rows[operation, 9]["codes"].values()) == {code}
        assert set(rows[operation, 9]["sha"].values()) == {None}
    for site in ("s00", "s01", "s02"):
        calls = (tmp_path / site / f"{site}.calls").read_text().split("\n")[:-1]
        assert len(calls) == len(set(calls)) == 7
    # The text of a site's error stays with the site.
    assert files_with(tmp_path / "flare/w/fedcollm/prod_00/s01", b"SECRET of s01")
    assert not files_with(tmp_path / "flare/w/fedcollm/prod_00/localhost", b"SECRET")
    assert not files_with(tmp_path / "localhost", b"SECRET")


def test_jobs_with_code_or_unlisted_classes_and_keys_of_another_authority_are_turned_away(tmp_path: Path) -> None:
    result = driver("refusals", str(tmp_path))
    assert result["class not listed"].startswith("FINISHED")
    assert "COMPLETED" not in result["class not listed"]
    assert "COMPLETED" not in result["code with a job"]
    assert result["honest"] == "FINISHED:COMPLETED"
    assert result["registered"] == [False, True]


def test_what_the_engine_decodes_besides_bytes_is_a_closed_list_without_pickle() -> None:
    from nvflare.fuel.utils import fobs

    assert fobs.loads(fobs.dumps({"body": b"abc"})) == {"body": b"abc"}
    for name in ("subprocess.Popen", "tests.flare_federation.Federation", "builtins.eval"):
        told = {
            "__fobs_type__": name,
            "__fobs_data__": {},
            "__fobs_dc__": "nvflare.fuel.utils.fobs.decomposer.DataClassDecomposer",
        }
        crafted = fobs.dumps({"body": told})
        with pytest.raises(ValueError, match="not allowed"):
            fobs.loads(crafted)


class LossyEngine:
    """Stands in for FLARE's engine: a site's executor in this process behind a line that loses and repeats messages.

    Args:
        faults: for each message in turn: ``deliver``, ``lose`` (before the site), ``lose answer`` or ``twice``.
    """

    def __init__(self, handler: Handler, faults: list[str], bend: Callable[[Any], Any] = lambda reply: reply) -> None:
        from secure_fedcollm.flare_transport import SiteExecutor

        from .flare_federation import signed

        self.site = SiteExecutor(lambda name, run: handler, signed=signed)
        self.faults, self.bend = list(faults), bend
        self.bodies = 0
        self.heard: list[str] = []
        context = SimpleNamespace(
            get_identity_name=lambda: "s00",
            get_job_id=lambda: "run",
            get_engine=lambda: SimpleNamespace(register_aux_message_handler=lambda topic, message_handle_func: None),
        )
        self.site.handle_event("_start_run", context)

    @contextlib.contextmanager
    def new_context(self) -> Iterator[None]:
        yield None

    def send_aux_request(self, targets: list[str], topic: str, request: Any, **more: Any) -> dict[str, Any]:
        fault = self.faults.pop(0) if self.faults else "deliver"
        self.bodies += "body" in request
        if fault == "lose":
            return {}
        reply = self.site._answer(topic, request, None)
        if fault == "twice":
            reply = self.site._answer(topic, request, None)
        if fault == "lose answer":
            return {}
        self.heard.append(reply["word"])
        return {targets[0]: self.bend(reply)}


def over(engine: LossyEngine, **options: Any) -> Any:
    from secure_fedcollm.flare_transport import FlareTransport

    from .flare_federation import SERVER_KEY

    settings = {"deadline_s": 30.0, "wait_s": 0.05, "sign": SERVER_KEY.sign} | options
    return FlareTransport(engine, "run", ("s00",), **settings)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fedcollm import flare_transport

    monkeypatch.setattr(
        flare_transport, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(0.001))
    )


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("faults", [*itertools.product(["deliver", "lose", "lose answer", "twice"], repeat=3)])
def test_lost_and_repeated_messages_change_no_answer_and_nothing_is_worked_on_twice(faults: tuple[str, ...]) -> None:
    calls: list[bytes] = []

    def handler(operation: str, body: bytes) -> bytes:
        calls.append(body)
        return body[::-1]

    engine = LossyEngine(handler, list(faults))
    assert [(r.site, r.body, r.code) for r in over(engine).ask("train", {"s00": b"abc"})] == [("s00", b"cba", None)]
    assert calls == [b"abc"]
    # The body goes out again only when the site said that it never got it.
    assert engine.bodies == 1 + engine.heard.count("unknown")


@pytest.mark.usefixtures("no_pause")
def test_a_site_that_cannot_be_reached_gives_no_answer_long_before_a_long_deadline() -> None:
    engine = LossyEngine(lambda operation, body: body, ["lose"] * 10**6)
    started = time.monotonic()
    replies = list(over(engine, deadline_s=3600.0, unreachable_s=0.2).ask("train", {"s00": b"abc"}))
    assert [reply.code for reply in replies] == ["no answer"]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "content",
    [
        {"word": "answered", "body": "text"},
        {"word": "answered"},
        {"word": "answered", "body": [b"x"]},
        {"word": "a text that data wrote", "body": b""},
        {"word": ["answered"], "body": b""},
        {"word": "answered", "body": bytes(11)},
    ],
)
def test_an_answer_that_is_not_bytes_of_the_allowed_length_is_the_word_failed(content: dict[str, Any]) -> None:
    def bend(reply: Any) -> Any:
        for key in ("word", "body"):
            reply.pop(key)
        reply.update(content)
        return reply

    engine = LossyEngine(lambda operation, body: body, [], bend)
    replies = list(over(engine, largest_answer=10).ask("train", {"s00": b"abc"}))
    assert [(reply.body, reply.code) for reply in replies] == [(None, "failed")]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": 5},
        {"digest": "0" * 64},
        {"digest": "0" * 63},
        {"operation": "o" * 65},
        {"operation": None},
        {"body": "abc"},
        {"body": bytearray(b"abc")},
        {"wait_s": float("nan")},
        {"wait_s": "1"},
        {"wait_s": None},
        {"signature": None},
        {"signature": bytes(64)},
        {"signature": "for s01"},
    ],
)
def test_a_request_of_another_shape_is_declined_and_never_worked_on(change: dict[str, Any]) -> None:
    from nvflare.apis.shareable import Shareable

    calls: list[bytes] = []
    engine = LossyEngine(lambda operation, body: calls.append(body) or body, [])
    request = Shareable()
    from .flare_federation import SERVER_KEY

    digest = request_digest("run", "train", b"abc")
    request.update(digest=digest, operation="train", body=b"abc", wait_s=1.0)
    request["signature"] = SERVER_KEY.sign(f"{digest}\0s00".encode())
    honest = Shareable(request)
    if change.get("signature") == "for s01":
        change = {"signature": SERVER_KEY.sign(f"{digest}\0s01".encode())}
    if "digest" in change or "operation" in change:
        change = change | {"signature": SERVER_KEY.sign(f"{change.get('digest', digest)}\0s00".encode())}
    request.update(change)
    assert engine.site._answer("", request, None)["word"] == "declined"
    assert calls == []
    assert engine.site._answer("", honest, None)["word"] == "answered"


def test_a_job_that_is_stopped_waits_for_nobody() -> None:
    engine = LossyEngine(lambda operation, body: body, [])
    replies = list(over(engine, stopped=lambda: True).ask("train", {"s00": b"abc"}))
    assert [reply.code for reply in replies] == ["no answer"]
