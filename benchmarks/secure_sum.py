"""The masked secure sum beside its peers, in one process run: interleaved rounds, medians, ratios.

    python benchmarks/secure_sum.py [--parameters 1048576] [--rounds 5] [--quick]

Peers: `tenseal.ckks_vector` with the parameters of TenSEAL's tutorial (public key) and with NVFlare's (symmetric: every
client holds the secret key), one vector per 4096 values, so that TenSEAL's slow chunking stays out; and plain masks on
32-bit words without encryption. Every sum is compared with the sum in plain numbers; a difference ends the run.

Then 20 million parameters, in processes of their own (--quick leaves them out), and the protocol's phases for 4 to 100
sites. Writes benchmarks/results/secure_sum.{json,md,svg}. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedcollm_privacy import masks
from fedcollm_privacy import secure_sum_messages as messages
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import OpenedSum, PrivateUpdate, RoundPlan, SealedSum
from fedcollm_privacy.quantization import quantize
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.sealing import seal
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.wire import decode, encode

RESULTS = Path(__file__).parent / "results"
VALUE_BITS, CLIP, STEP = 13, 0.1, 0.1 / (2**12 - 1)
LONG, COUNTS, SIZES = 20_000_000, (4, 16, 64, 100), (2**16, 2**18, 2**20, 2**22)
OPERATIONS: dict[str, tuple[type[Any], Callable[..., Any]]] = {
    "advertise": (messages.SignedPlan, Contributor.advertise),
    "share": (messages.PeerKeys, Contributor.share),
    "accept": (messages.PeerShares, Contributor.accept_shares),
    "part": (messages.PartRequest, Contributor.part),
    "agree": (messages.SurvivorSet, Contributor.agree),
    "unmask": (messages.UnmaskRequest, Contributor.unmask),
}
PHASES = ("advertise", "share", "accept", "agree", "unmask", "reconstruct")
Floats = NDArray[np.float32]
Row = dict[str, float]


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = work(*arguments)
    return time.process_time() - start, result


def demand(holds: Any, what: str) -> None:
    if not holds:
        raise SystemExit(f"wrong result: {what}")


def update(seed: int, dimension: int) -> Floats:
    return (np.random.default_rng(seed).random(dimension, dtype=np.float32) - np.float32(0.5)) * np.float32(2 * CLIP)


def on_grid(vector: Floats) -> NDArray[np.int32]:
    return np.rint(np.clip(vector.astype(np.float64), -CLIP, CLIP) / STEP).astype(np.int32)


def grid_sum(seeds: Iterable[int], dimension: int) -> NDArray[np.int64]:
    total = np.zeros(dimension, np.int64)
    for seed in seeds:
        total += on_grid(update(seed, dimension))
    return total


def memory(name: str, process: Any = "self") -> int:
    """VmRSS now, or VmHWM, its peak since the process started or `forget_peak`; bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


class Probe(Aggregator):
    """Notes each upload's wall and CPU time in the process, and the process's peak after it."""

    def __init__(self, hold: bool) -> None:
        super().__init__()
        self.hold = hold
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.peaks: list[int] = []

    def add(self, manifest: messages.UploadManifest, chunks: Iterable[bytes]) -> None:
        if self.hold:  # so that the sites' part is not in the time
            chunks = list(chunks)
        before, start = self._cpu_s(), time.perf_counter()
        super().add(manifest, chunks)
        self.wall_s.append(time.perf_counter() - start)
        self.cpu_s.append(self._cpu_s() - before)
        self.peaks.append(memory("VmHWM", self._process.pid if self._process else 0))

    def _cpu_s(self) -> float:
        return int(Path(f"/proc/{self._process.pid if self._process else 0}/schedstat").read_text().split()[0]) / 1e9


class Opener(Decryptor):
    """Times the opening; with ``apart``, what takes the masks away (in chunks that it asks for) by itself."""

    apart, unmask_s, open_s, wall_s = False, 0.0, 0.0, 0.0
    chunks: Any = ()

    def open_sum(self, plan: RoundPlan, sealed_sum: SealedSum) -> OpenedSum:
        start = time.perf_counter()
        if self.apart:
            self.unmask_s, self.chunks = cpu_seconds(list, sealed_sum.chunks)
            sealed_sum = replace(sealed_sum, chunks=self.chunks)
        self.open_s, opened = cpu_seconds(super().open_sum, plan, sealed_sum)
        self.wall_s = time.perf_counter() - start
        return opened  # type: ignore[no-any-return]


class Federation:
    """One round of `MaskedSum` among sites in this process, over encoded messages. CPU seconds by phase, and bytes."""

    def __init__(self, sites: int, dimension: int, folder: str, *, colluding: int = 1, apart: bool = False) -> None:
        server, keys = SigningKey.generate("server"), [SigningKey.generate(f"s{i:03d}") for i in range(sites)]
        publics = tuple(key.public for key in keys)
        roster = Roster(federation="bench", server=server.public, sites=publics, valid_until=2**33)
        self.aggregator, self.decryptor = Probe(apart), Opener(roster)
        self.decryptor.apart = apart
        self.secure_sum = MaskedSum(
            aggregator=self.aggregator, decryptor=self.decryptor, key=server, roster=roster, channel=self,
            witness=lambda event, **facts: None,
        )  # fmt: skip
        self.context = self.secure_sum.begin(contributors=sites, value_bits=VALUE_BITS)
        self.plan = RoundPlan(
            run_id="bench", server_round=1, attempt=1, nonce=os.urandom(16).hex(), expires_at=2**33, dp=None,
            spec_digest="0" * 64, adapter_digest="0" * 64, roster_digest=roster.digest, dimension=dimension,
            clip=CLIP, value_bits=VALUE_BITS, max_mean_norm=1e9, min_contributors=3, max_contributors=sites,
            threshold=(sites + colluding) // 2 + 1, max_colluding=colluding,
            ckks=self.context.parameters, key_digest=self.context.digest,
        )  # fmt: skip
        policy = SumPolicy(min_contributors=3, max_colluding=colluding)
        self.contributors = {
            k.name: Contributor(key=k, roster=roster, policy=policy, journal=RoundJournal(Path(folder, f"{k.name}.db")))
            for k in keys
        }
        self.site_s: dict[str, list[float]] = defaultdict(list)
        self.server_s: Row = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)  # of the first site, both ways
        self._phase, self._mark = "advertise", time.process_time()

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.contributors)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Any]:
        kind, answer = OPERATIONS[operation]
        self._server(operation)
        for site, body in bodies.items():
            self._server(operation)
            reply = encode(answer(self.contributors[site], decode(body, kind)))
            self._site(operation)
            if site == self.sites[0]:
                self.bytes[operation] += len(body) + len(reply)
            yield argparse.Namespace(site=site, body=reply, code=None)
        self._server("reconstruct" if operation == "unmask" else operation)

    def upload(self, seed: int) -> messages.UploadManifest:
        vector = update(seed, self.plan.dimension)
        private = PrivateUpdate(vector=vector, spec_digest=self.plan.spec_digest, reservation="non-private")
        self._server("upload")
        manifest = self.contributors[self.sites[seed]].upload(quantize(private, self.plan), self.context)
        self._site("upload")
        self.bytes["part"] += len(encode(manifest)) if seed == 0 else 0
        return manifest

    def open(self, manifests: Iterable[messages.UploadManifest]) -> None:
        """Demands that the sum of the first sites' updates comes out."""
        opened = self.secure_sum.open(manifests)
        self._server("reconstruct")
        self.peak = memory("VmHWM")
        self.secure_sum.close()
        expected = grid_sum(range(len(opened.cohort)), self.plan.dimension)
        demand((opened.total == expected).all(), f"the sum of {len(opened.cohort)} sites is not the integer sum")

    def _server(self, following: str) -> None:
        now = time.process_time()
        self.server_s[self._phase] += now - self._mark
        self._phase, self._mark = following, now

    def _site(self, phase: str) -> None:
        now = time.process_time()
        self.site_s[phase].append(now - self._mark)
        self._mark = now


def ours(parameters: int) -> Row:
    """11 sites, so 10 peers and 11 masks each; the last one is lost after sharing."""
    with tempfile.TemporaryDirectory() as folder:
        round_ = Federation(11, parameters, folder, apart=True)
        round_.secure_sum.enrol(round_.plan)
        round_.open(map(round_.upload, range(10)))
    plan, opener, aggregator = round_.plan, round_.decryptor, round_.aggregator
    ten = masks.MaskSum([(os.urandom(32), 1)] * 10, plan.ckks.modulus)

    def unmask() -> None:
        for index, words_2N in enumerate(opener.chunks):
            masks.subtract_mod(words_2N[0], ten.chunk(index, words_2N.shape[1]), plan.ckks.modulus)

    return {
        "bytes_per_parameter": round_.bytes["part"] / parameters,
        "client_s": statistics.median(round_.site_s["upload"]),
        "hand_over_s": sum(round_.site_s["part"]) / 10,
        "aggregator_s": statistics.median(aggregator.cpu_s),
        "process_wall_s": statistics.median(aggregator.wall_s),
        "unmask_s": cpu_seconds(unmask)[0],
        "unmask_lost_s": opener.unmask_s,
        "open_s": opener.open_s,
    }


def stock(parameters: int, primes: list[int], *, symmetric: bool, sites: int = 10) -> Row:
    """TenSEAL as its documentation shows; all sites' updates are one site's."""
    kind = tenseal.ENCRYPTION_TYPE.SYMMETRIC if symmetric else tenseal.ENCRYPTION_TYPE.ASYMMETRIC
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=primes, encryption_type=kind)
    context.global_scale = 2**40
    keyless = tenseal.context_from(context.serialize(save_public_key=not symmetric, save_secret_key=False))
    sealing, vector = context if symmetric else keyless, update(0, parameters)
    parts = [vector[start : start + 4096] for start in range(0, parameters, 4096)]
    client_s, uploads = cpu_seconds(lambda: [tenseal.ckks_vector(sealing, part).serialize() for part in parts])
    total = [tenseal.ckks_vector_from(keyless, upload) for upload in uploads]

    def add() -> None:
        for index, upload in enumerate(uploads):
            total[index] += tenseal.ckks_vector_from(keyless, upload)

    add_s = sum(cpu_seconds(add)[0] for _ in range(sites - 1))
    open_s, opened = cpu_seconds(lambda: np.concatenate([part.decrypt(context.secret_key()) for part in total]))
    demand(np.abs(opened - sites * vector.astype(np.float64)).max() < 1e-4, "TenSEAL's sum is off")
    size = sum(map(len, uploads)) / parameters
    return {"bytes_per_parameter": size, "client_s": client_s, "aggregator_s": add_s / (sites - 1), "open_s": open_s}


def plain_masks(parameters: int, sites: int = 10) -> Row:
    """Masks on 32-bit words, no encryption: 9 of pairs and one of the site's own each; X25519, HKDF, AES-CTR."""
    keys, seeds = [X25519PrivateKey.generate() for _ in range(sites)], [os.urandom(32) for _ in range(sites)]
    publics = [key.public_key().public_bytes_raw() for key in keys]

    def stream(secret: bytes) -> NDArray[np.uint32]:
        key = masks.derive(secret, "0" * 64, "plain")
        words = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * parameters))
        return np.frombuffer(words, np.uint32)

    def seal(site: int, vector: Floats) -> bytes:
        words = on_grid(vector).view(np.uint32) + stream(seeds[site])
        for peer in set(range(sites)) - {site}:
            mask = stream(masks.agree(keys[site], publics[peer]))
            words = words + mask if site < peer else words - mask
        return words.tobytes()

    sealed = [cpu_seconds(seal, site, update(site, parameters)) for site in range(sites)]
    add_s, total = cpu_seconds(lambda: sum(np.frombuffer(upload, np.uint32) for _, upload in sealed))
    unmask_s, total = cpu_seconds(lambda: total - sum(stream(seed) for seed in seeds))
    demand((total.view(np.int32) == grid_sum(range(sites), parameters)).all(), "the plain masked sum")
    size, client_s = len(sealed[0][1]) / parameters, statistics.median(seconds for seconds, _ in sealed)
    return {"bytes_per_parameter": size, "client_s": client_s, "aggregator_s": add_s / sites, "unmask_s": unmask_s}


def client(parameters: int, sites: int, processes: int = 1) -> Row:
    """One site's upload alone, under as many masks as there are sites: quantise, encrypt, mask, digest."""
    with tempfile.TemporaryDirectory() as folder:
        round_ = Federation(sites, parameters, folder)
    private = PrivateUpdate(vector=update(0, parameters), spec_digest="0" * 64, reservation="non-private")
    terms, workers = [(os.urandom(32), 1 if site % 2 else -1) for site in range(sites)], [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            workers.append(sum(memory("VmHWM", child.pid) for child in multiprocessing.active_children()))

    def children_s() -> float:
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    watcher = threading.Thread(target=watch)
    before, children, start = forget_peak(), children_s(), time.perf_counter()
    watcher.start()
    cpu_s, _ = cpu_seconds(lambda: seal(quantize(private, round_.plan), round_.context, terms, processes=processes))
    done.set()
    watcher.join()
    row = {"wall_s": time.perf_counter() - start, "cpu_s": cpu_s + children_s() - children}
    return row | {"peak": memory("VmHWM") - before, "workers": max(workers)}


def server(parameters: int) -> Row:
    """Three uploads through the aggregator's process to the opened sum; the peak is without the sites' part."""
    with tempfile.TemporaryDirectory() as folder:
        round_ = Federation(3, parameters, folder, colluding=0)
        round_.secure_sum.enrol(round_.plan)
        manifests = [round_.upload(seed) for seed in range(3)]
        before = forget_peak()
        round_.open(manifests)
    row = {f"process_{count}": peak for count, peak in enumerate(round_.aggregator.peaks, start=1)}
    add_s, open_s = statistics.median(round_.aggregator.wall_s), round_.decryptor.wall_s
    return row | {"add_s": add_s, "open_s": open_s, "parent": round_.peak - before}


def alone(work: str, *arguments: int) -> Row:
    """``work`` in a fresh interpreter, whose memory is its own."""
    command = [sys.executable, __file__, "--alone", work, *map(str, arguments)]
    row: Row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row


def phases(sites: int) -> dict[str, Any]:
    """A round of short updates, one site lost after sharing: seconds and bytes of the protocol by itself."""
    with tempfile.TemporaryDirectory() as folder:
        round_ = Federation(sites, 64, folder)
        round_.secure_sum.enrol(round_.plan)
        round_.open(map(round_.upload, range(sites - 1)))
    return {
        "threshold": round_.plan.threshold,
        "site_s": {phase: statistics.median(round_.site_s[phase]) for phase in PHASES[:-1]},
        "server_s": {phase: round_.server_s[phase] for phase in PHASES},
        "kilobytes": {phase: round_.bytes[phase] / 1e3 for phase in PHASES[:-1]},
    }


def side_by_side(parameters: int, rounds: int) -> dict[str, Row]:
    """Medians over the rounds, scaled to a million parameters."""
    found: dict[str, list[Row]] = defaultdict(list)
    for _ in range(rounds):
        found["ours"].append(ours(parameters))
        found["tutorial"].append(stock(parameters, [60, 40, 60], symmetric=False))
        found["nvflare"].append(stock(parameters, [60, 40, 40], symmetric=True))
        found["masks"].append(plain_masks(parameters))
        for rows in found.values():
            rows[-1]["times_ours"] = rows[-1]["client_s"] / found["ours"][-1]["client_s"]
    scale = {True: 1e6 / parameters, False: 1.0}
    return {
        name: {key: statistics.median(row[key] for row in rows) * scale[key.endswith("_s")] for key in rows[0]}
        for name, rows in found.items()
    }


def growth() -> dict[str, Any]:
    tutorial = {n: stock(n, [60, 40, 60], symmetric=False, sites=2)["client_s"] for n in SIZES}
    nvflare = {n: stock(n, [60, 40, 40], symmetric=True, sites=2)["client_s"] for n in SIZES}
    return {
        "sizes": SIZES,
        "by_size": {
            "Secure FedCoLLM, 11 sites": [client(n, 11)["cpu_s"] for n in SIZES],
            "TenSEAL, tutorial": list(tutorial.values()),
            "TenSEAL, NVFlare's": list(nvflare.values()),
        },
        "upload_s": {str(sites): client(10**6, sites)["cpu_s"] for sites in COUNTS},
        "by_sites": {str(sites): phases(sites) for sites in COUNTS},
    }


def long_updates() -> dict[str, Row]:
    found: dict[str, list[Row]] = defaultdict(list)
    for _ in range(3):
        for processes in (1, 2):
            found[f"client_{processes}"].append(alone("client", LONG, 11, processes))
    found["server"].append(alone("server", LONG))
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    grown, rows = report["growth"], report["growth"]["by_sites"].values()
    for label, seconds in grown["by_size"].items():
        left.plot([size / 1e6 for size in SIZES], seconds, marker="o", label=label)
    left.set(title="One client's upload", xlabel="million parameters", xscale="log", yscale="log")
    middle.plot(COUNTS, list(grown["upload_s"].values()), marker="o", label="a site: upload of 1M parameters")
    middle.plot(COUNTS, [sum(r["site_s"].values()) for r in rows], marker="o", label="a site: all other phases")
    middle.plot(COUNTS, [sum(r["server_s"].values()) for r in rows], marker="o", label="server: all phases")
    middle.set(title="By number of sites", xlabel="sites", yscale="log")
    right.plot(COUNTS, [sum(r["kilobytes"].values()) for r in rows], marker="o", color="C4")
    right.set(title="Protocol messages, no upload", xlabel="sites", ylabel="kB a site", ylim=(0, None))
    for axes in (left, middle, right):
        axes.title.set_size(10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (middle, right):
        axes.set_xticks(COUNTS)
    for axes in (left, middle):
        axes.set_ylabel("CPU seconds")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


ROWS = (  # label, target, key, form, factor
    ("bytes a parameter, up, messages included", "at most 8.1", "bytes_per_parameter", ".2f", 1),
    ("client: quantise, encrypt, 11 masks, digest, CPU s", "at most 0.35", "client_s", ".3f", 1),
    ("client: the same, in times ours (median within a round)", "tutorial: at least 5", "times_ours", ".1f", 1),
    ("client: reading the upload back and framing it, CPU ms", "", "hand_over_s", ".0f", 1e3),
    ("aggregator: receive, digest, check, add, CPU ms a site", "at most 50", "aggregator_s", ".1f", 1e3),
    ("the same, wall, both sides of the socket, ms a site", "", "process_wall_s", ".1f", 1e3),
    ("server: unmask, 10 survivors, none lost, CPU ms", "", "unmask_s", ".1f", 1e3),
    ("server: take the sum and unmask, 10 survivors, one lost, CPU ms", "", "unmask_lost_s", ".1f", 1e3),
    ("decryptor: open the sum, CPU ms", "", "open_s", ".1f", 1e3),
)
LONG_ROWS = (
    ("client, 1 process, wall / CPU", "{client_1[wall_s]:.1f} / {client_1[cpu_s]:.1f} s"),
    ("client, 2 processes, wall / CPU", "{client_2[wall_s]:.1f} / {client_2[cpu_s]:.1f} s"),
    ("client: peak RSS above the float32 input (76 MiB), 1 process", "{client_1[peak]:.0f} MiB"),
    ("the same, 2 processes; both workers on top", "{client_2[peak]:.0f} MiB; {client_2[workers]:.0f} MiB"),
    (
        "aggregator's process: peak RSS after 1 upload / after 3",
        "{server[process_1]:.0f} / {server[process_3]:.0f} MiB",
    ),
    ("server: peak RSS above that before the uploads", "{server[parent]:.0f} MiB"),
    ("server: add a site's upload, wall, with the site handing it over", "{server[add_s]:.2f} s"),
    ("server: unmask and open, wall", "{server[open_s]:.2f} s"),
)
SETTING = """\
tenseal {tenseal}, Python {python}; 2 CPU cores, shared with other work (load {load[0]:.1f} at the start, {load[1]:.1f}
at the end). One process run, {rounds} interleaved rounds of {parameters} parameters at {bits} bits, medians, per 1M
parameters. Every sum was compared with the sum in plain numbers. Peers: `ckks_vector`, N = 8192, scale 2^40; tutorial:
[60, 40, 60], public key; NVFlare: [60, 40, 40], secret key at the clients; masks: 10 on 32-bit words, no digest.
"""
NOTES = """\
TenSEAL adds up approximate numbers; the others give the exact integer sum. With NVFlare's setting every client holds
the key that opens every other client's upload. Plain masks are not encrypted: whoever learns the seeds reads the
uploads. They are the price floor: against them the encryption costs twice the bytes and most of the client's time.
One site of 11 is lost after sharing, except where none is.
"""
LONG_NOTES = """
The client's peak is the grid (int32, 76 MiB) and buffers; the upload lies in a file. A second process costs CPU for its
start and the pipes; what it brings in wall time needs a core that is free. The aggregator's peak is one upload's words,
however many sites. The server's is the opened sum (int64, 153 MiB).
"""
MISSED = """\
Not reached in this run: a fifth of the client's time in the tutorial's setting. About a sixth of ours goes into SEAL's
way of saving a ciphertext, which compresses, in vain; its Python binding cannot be told not to.
"""
SITES_NOTES = """
The target of 0.35 s for an upload is for 10 peers; a mask more costs 2 to 4 ms per 1M parameters. A site's share phase
grows faster than the number of sites (Shamir's polynomials in Python), the server's with its square (signatures).
"""


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# The secure sum beside its peers",
        "",
        SETTING.format(**report, bits=VALUE_BITS),
        "| per 1M parameters | target | Secure FedCoLLM | TenSEAL, tutorial | TenSEAL, NVFlare's | plain masks |",
        "|---|---|---|---|---|---|",
    ]
    for label, target, key, form, factor in ROWS:
        rows = report["side_by_side"].values()
        cells = [f"{row[key] * factor:{form}}" if key in row else "" for row in rows]
        lines.append(f"| {label} | {target} | {' | '.join(cells)} |")
    lines += ["", NOTES] + ([MISSED] if report["side_by_side"]["tutorial"]["times_ours"] < 5 else [])
    if report["long"]:
        mib = {"peak", "workers", "process_1", "process_3", "parent"}
        shown = {n: {k: v / 2**20 if k in mib else v for k, v in row.items()} for n, row in report["long"].items()}
        lines += ["## 20 million parameters", "", "| each in a process of its own | |", "|---|---|"]
        lines += [f"| {label} | {form.format(**shown)} |" for label, form in LONG_ROWS] + [LONG_NOTES]
    lines += [
        "## By number of sites",
        "",
        "CPU milliseconds, a site / the server for all sites; 64 parameters, so that the protocol itself is seen; one "
        "site lost. Sites and server take turns in one process. kB: messages of one site, both ways, no upload.",
        "",
        f"| sites, threshold | {' | '.join(PHASES)} | kB a site | upload of 1M, s |",
        "|---" * (len(PHASES) + 3) + "|",
    ]
    for n, row in report["growth"]["by_sites"].items():
        cells = [f"{1e3 * row['site_s'].get(p, 0):.1f} / {1e3 * row['server_s'][p]:.0f}" for p in PHASES]
        last = f"{sum(row['kilobytes'].values()):.0f} | {report['growth']['upload_s'][n]:.2f}"
        lines.append(f"| {n}, {row['threshold']} | {' | '.join(cells)} | {last} |")
    return "\n".join([*lines, SITES_NOTES, "![Growth with parameters and sites](secure_sum.svg)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=2**20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="leave out the updates of 20 million parameters")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.alone:
        name, *arguments = chosen.alone
        works: dict[str, Callable[..., Row]] = {"client": client, "server": server}
        print(json.dumps(works[name](*map(int, arguments))))
        return
    report: dict[str, Any] = {"parameters": chosen.parameters, "rounds": chosen.rounds, "load": [os.getloadavg()[0]]}
    report |= {"python": platform.python_version(), "tenseal": version("tenseal")}
    report["side_by_side"] = side_by_side(chosen.parameters, chosen.rounds)
    report["long"] = {} if chosen.quick else long_updates()
    report["growth"] = growth()
    report["load"].append(os.getloadavg()[0])
    (RESULTS / "secure_sum.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "secure_sum.md").write_text(markdown(report))
    plot(report, RESULTS / "secure_sum.svg")
    print(markdown(report))


if __name__ == "__main__":
    main()
