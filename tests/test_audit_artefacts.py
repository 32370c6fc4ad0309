"""No key and no single update stays in a run's folder unnoticed, whatever file and spelling it is hidden in."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors.numpy import load_file, save_file

from fedcollm_audits.check_artefacts import keys_in
from fedcollm_privacy.ckks import save_object
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.ckks_secret import generate
from fedcollm_privacy.identity import SigningKey, save_key

from .audit_answers import failing, reasons
from .run_folders import build
from .run_records import Line, key_of


def _serialized(key: Any, encoding: str, form: str, passphrase: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return bytes(
        key.private_bytes(
            getattr(serialization.Encoding, encoding), getattr(serialization.PrivateFormat, form), encryption
        )
    )


def _key_file(folder: Path, passphrase: bytes | None) -> bytes:
    save_key(SigningKey.generate("ash"), folder / "key", passphrase)
    return (folder / "key").read_bytes()


def _seal_secret() -> bytes:
    secret, _ = generate(CkksParameters())
    return save_object(secret._seal_key)


def _tenseal_context() -> bytes:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 20, 40])
    return bytes(context.serialize(save_secret_key=True))


ED, X = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
KEYS: dict[str, Callable[[Path], bytes]] = {
    "this project's": lambda folder: _key_file(folder, None),
    "this project's, encrypted": lambda folder: _key_file(folder, b"passphrase"),
    "PEM": lambda _: _serialized(ED, "PEM", "PKCS8"),
    "PEM, encrypted": lambda _: _serialized(ED, "PEM", "PKCS8", b"passphrase"),
    "OpenSSH": lambda _: _serialized(ED, "PEM", "OpenSSH"),
    "DER Ed25519": lambda _: _serialized(ED, "DER", "PKCS8"),
    "DER X25519": lambda _: _serialized(X, "DER", "PKCS8"),
    "SEAL": lambda _: _seal_secret(),
    "TenSEAL": lambda _: _tenseal_context(),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("spelling", ["raw", "hex", "HEX", "base64", "base64+1", "base64+2", "url"])
def test_a_key_of_any_kind_in_any_spelling_is_found(tmp_path: Path, kind: str, spelling: str) -> None:
    key = KEYS[kind](tmp_path)
    shift = {"base64+1": b"x", "base64+2": b"xy"}.get(spelling, b"")
    spelled = {
        "raw": key,
        "hex": key.hex().encode(),
        "HEX": key.hex().upper().encode(),
        "url": base64.urlsafe_b64encode(key),
    }.get(spelling, base64.b64encode(shift + key))
    path = tmp_path / "file"
    path.write_bytes(b"noise " * 1000 + spelled + b" more")
    assert keys_in(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"secret_key":"%s"}' % ("0a" * 32),
        '{"private": "%s"}' % ("AB" * 32),
        "seed: %s\n" % ("0f" * 32),
        f"mask_seed = '{base64.b64encode(bytes(32)).decode()}'",
        json.dumps({"SECRET": base64.b64encode(b"k" * 32).decode()}),
    ],
)
def test_thirty_two_bytes_under_a_secret_name_are_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert keys_in(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        '{"public_key":"%s"}' % ("0a" * 32),
        '{"private": true, "digest": "%s"}' % ("0a" * 32),
        "seed: 7\ninsecure_test_seed: null\n",
        "-----BEGIN PUBLIC KEY-----",
        "the private key never leaves the site",
    ],
)
def test_what_is_no_key_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert not keys_in(tmp_path / "file")


def test_random_weights_hold_no_key(tmp_path: Path) -> None:
    for seed in range(40):
        (tmp_path / "weights").write_bytes(np.random.default_rng(seed).bytes(2**17))
        assert not keys_in(tmp_path / "weights")


def test_a_run_that_is_called_private_beside_a_digest_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "north.rounds.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE signed (run_id TEXT, server_round INTEGER, plan TEXT)")
        for server_round in range(1, 100):
            db.execute("INSERT INTO signed VALUES (?, ?, ?)", ("embedded-non-private-0a", server_round, "ab" * 32))
    db.close()
    assert keys_in(path) == []
    (tmp_path / "note.json").write_text('{"private_key": "%s"}' % ("ab" * 32))
    assert keys_in(tmp_path / "note.json") != []


def test_a_key_across_two_reads_is_found(tmp_path: Path) -> None:
    for before in (2**24 - 1, 2**24 - 12):
        (tmp_path / "file").write_bytes(bytes(before) + b"fedcollm-private-key-v1 ash")
        assert keys_in(tmp_path / "file") == ["a private key file of this project"]


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("ash.key", {"no-key-at-rest", "no-single-update"}),
        ("ledgers/.hidden", {"no-key-at-rest", "no-single-update"}),
        ("report.html", {"no-key-at-rest"}),
        ("statement.html", {"no-key-at-rest"}),
    ],
)
def test_a_key_left_on_disk_is_caught(tmp_path: Path, name: str, caught: set[str]) -> None:
    built = build(tmp_path / "run")
    with (built.folder / name).open("ab") as file:
        file.write(_key_file(tmp_path, b"long enough"))
    assert failing(tmp_path / "run") == caught
    assert name in reasons(tmp_path / "run", "no-key-at-rest")


UPDATE = np.random.default_rng(1).normal(size=2000).astype("<f4")
TEXT = base64.b64encode(UPDATE.tobytes()).decode()


def _tensor(name: str, tensor: np.ndarray) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        tensors = load_file(run / "checkpoint.safetensors") | {name: tensor}
        facts = {"server_round": "3", "spec_digest": "0" * 64, "adam_steps": "0"}
        save_file(tensors, run / "checkpoint.safetensors", metadata=facts)

    return write


def _json(name: str, field: str, value: Any) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | {field: value}))

    return write


def _database(*statements: str, name: str = "ash.sqlite") -> Callable[[Path], None]:
    def write(run: Path) -> None:
        db = sqlite3.connect(run / "ledgers" / name)
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
        for statement in statements:
            db.execute(statement)
            db.commit()
        db.close()

    return write


LEAKS: dict[str, Callable[[Path], Any]] = {
    "npy": lambda run: np.save(run / "update.npy", UPDATE),
    "raw": lambda run: (run / "ledgers" / "ash.update").write_bytes(UPDATE.tobytes()),
    "another tensor file": lambda run: save_file({"update": UPDATE}, run / "update.safetensors"),
    "another tensor": _tensor("update.beech", UPDATE),
    "one site's adapter": _tensor("alone.beech", np.zeros(56, "<f4")),
    "for the server's adapter": _tensor("slm", np.ones(40, "<f4")),
    "for the optimizer's state": _tensor("adam.first", UPDATE),
    "opened.safetensors": lambda run: save_file(
        {"total": np.zeros(4, np.int64), "plan": np.zeros(4, np.uint8)}, run / "opened.safetensors"
    ),
    "metadata": lambda run: save_file(
        load_file(run / "checkpoint.safetensors"), run / "checkpoint.safetensors", metadata={"update": TEXT}
    ),
    "numbers in summary.json": _json("summary.json", "update", UPDATE.tolist()),
    "text in summary.json": _json("summary.json", "note", TEXT),
    "text in run.json": _json("run.json", "update", TEXT),
    "text in an adapter's configuration": _json("slm_adapter/adapter_config.json", "update", TEXT),
    "text in a page": lambda run: (run / "report.html").write_text(f"<p>{TEXT}</p>"),
    "bytes in a page": lambda run: (run / "report.html").write_bytes(UPDATE.tobytes()),
    "numbers in metrics.jsonl": lambda run: (run / "metrics.jsonl").write_text(
        json.dumps({"x": UPDATE.tolist()}) + "\n"
    ),
    "refusals": lambda run: (run / "ledgers" / "ash.refusals.jsonl").write_text(json.dumps({"why": TEXT}) + "\n"),
    "part of a file": lambda run: (run / ".checkpoint.part").write_bytes(UPDATE.tobytes()),
    "link": lambda run: (run / "policies").mkdir() or (run / "policies" / "ash.yaml").symlink_to("/etc/hostname"),
    "database table": _database("CREATE TABLE updates (value BLOB)"),
    "database blob": _database("INSERT INTO meta VALUES ('x', zeroblob(9000))"),
    "database text": _database(f"INSERT INTO meta VALUES ('x', '{TEXT[:5000]}')"),
    "deleted rows": _database(
        "INSERT INTO meta VALUES ('x', replace(hex(zeroblob(20000)), '0', 'ab '))", "DELETE FROM meta"
    ),
    "another ledger's tables": _database(name="ash.rounds.sqlite"),
    "no database": lambda run: (run / "ledgers" / "ash.sqlite").write_bytes(UPDATE.tobytes()),
    "base model": lambda run: (
        (run / "base_models" / "slm").mkdir(parents=True)
        or save_file({"layers.0.lora_A": UPDATE}, run / "base_models" / "slm" / "model.safetensors")
    ),
    "unknown file": lambda run: (run / "notes.txt").write_text("nothing"),
    "archive": lambda run: (run / "slm_adapter" / "old.zip").write_bytes(b"PK"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_an_update_left_on_disk_is_caught_by_that_check_alone(tmp_path: Path, leak: str) -> None:
    built = build(tmp_path / "run")
    LEAKS[leak](built.folder)
    found = failing(tmp_path / "run")
    assert "no-single-update" in found
    allowed = {"text in an adapter's configuration": "statement-bound", "link": "no-key-at-rest"}
    assert found - {"no-single-update"} <= {allowed.get(leak, "")}


@pytest.mark.parametrize(
    "hide",
    [
        lambda event: event.update(manifest=TEXT),
        lambda event: event.update(update=TEXT),
        lambda event: event.update(site=TEXT),
        lambda event: event.update(manifest=[float(x) for x in UPDATE[:50]]),
    ],
)
def test_an_update_in_a_transcript_field_is_caught(tmp_path: Path, hide: Callable[[Line], Any]) -> None:
    def on_event(event: Line) -> Sequence[Line]:
        if event["event"] == "upload" and event["server_round"] == 2:
            hide(event)
        return [event]

    build(tmp_path / "run", on_event=on_event)
    assert "no-single-update" in failing(tmp_path / "run")
    assert "transcript-chain" not in failing(tmp_path / "run")


def test_what_a_run_on_synthetic_data_may_leave_is_allowed(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    run = built.folder
    _database("CREATE TABLE entries (seq INTEGER)", "CREATE TABLE heads (seq INTEGER)")(run)
    (run / "policies").mkdir()
    (run / "policies" / "ash.yaml").write_text("caps: []\n")
    (run / "base_models" / "slm").mkdir(parents=True)
    save_file({"layers.0.weight": UPDATE}, run / "base_models" / "slm" / "model.safetensors")
    (run / "ledgers" / "ash.refusals.jsonl").write_text('{"rule":"caps"}\n')
    (run / "audit.json").write_text("{}\n")
    assert not failing(tmp_path / "run")


@pytest.mark.parametrize("name", ["policies/ash.yaml", "base_models/slm/config.json"])
def test_a_run_on_private_data_keeps_no_policy_and_no_base_model(tmp_path: Path, name: str) -> None:
    built = build(tmp_path / "run", declared="private")
    assert not failing(tmp_path / "run")
    (built.folder / name).parent.mkdir(parents=True)
    (built.folder / name).write_text("{}\n")
    assert failing(tmp_path / "run") == {"no-single-update"}


def test_keys_of_the_builder_are_in_no_file_of_it(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    secrets = [key_of(name).private_bytes_raw() for name in ("server", *built.sites)]
    for path in built.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content or secret.hex().encode() in content for secret in secrets)
