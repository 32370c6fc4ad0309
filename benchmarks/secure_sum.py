"""The secure sum beside stock TenSEAL, in one process run: interleaved rounds, medians, ratios.

    python benchmarks/secure_sum.py [--parameters 262144] [--sites 8] [--rounds 5]

The peer is `tenseal.ckks_vector` with the parameters of TenSEAL's tutorial (N = 8192, [60, 40, 60], scale 2^40), one
vector per 4096 values, so that its own slow chunking and its warnings stay out. Times are process-CPU seconds, scaled
to a million parameters. Writes benchmarks/results/secure_sum.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tenseal

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import CiphertextSum, parameters_for, seal
from fedcollm_privacy.ckks_secret import decrypt_sum, generate
from fedcollm_privacy.messages import PrivateUpdate, RoundPlan, SealedUpdate
from fedcollm_privacy.quantization import quantize

RESULTS = Path(__file__).parent / "results"
VALUE_BITS, CLIP = 13, 0.1
Row = dict[str, float]


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def plan_for(key_digest: str, dimension: int, sites: int) -> RoundPlan:
    return RoundPlan(
        run_id="bench",
        server_round=1,
        attempt=1,
        spec_digest="",
        dimension=dimension,
        clip=CLIP,
        value_bits=VALUE_BITS,
        min_contributors=3,
        max_contributors=sites,
        key_digest=key_digest,
        nonce="",
    )


def ours(vector: np.ndarray[Any, Any], sites: int) -> Row:
    parameters = parameters_for(sites, VALUE_BITS)
    key, context = generate(parameters)
    plan = plan_for(context.digest, len(vector), sites)
    update = PrivateUpdate(vector=vector, spec_digest="", reservation="non-private")
    client_s, sealed = cpu_seconds(lambda: seal(quantize(update, plan), context, "site-0"))
    total = CiphertextSum(parameters, len(vector))
    total.add(sealed.chunks)
    add_s, _ = cpu_seconds(lambda: [total.add(sealed.chunks) for _ in range(sites - 1)])
    chunks = tuple(total.chunks())
    largest = sites * plan.levels
    open_s, opened = cpu_seconds(lambda: decrypt_sum(key, chunks, dimension=len(vector), largest=largest))
    if not (opened == sites * quantize(update, plan).grid).all():
        raise SystemExit("the encrypted sum is not the integer sum")
    return {
        "bytes_per_parameter": sum(map(len, sealed.chunks)) / len(vector),
        "client_s": client_s,
        "aggregator_s_per_site": add_s / (sites - 1),
        "open_s": open_s,
        "max_error": float(np.abs(opened * plan.grid_step - sites * vector.astype(np.float64)).max()) / sites,
    }


def aggregator_process_wall_s(vector: np.ndarray[Any, Any], sites: int) -> float:
    parameters = parameters_for(sites, VALUE_BITS)
    _, context = generate(parameters)
    plan = plan_for(context.digest, len(vector), sites)
    update = PrivateUpdate(vector=vector, spec_digest="", reservation="non-private")
    chunks = seal(quantize(update, plan), context, "site-0").chunks
    with Aggregator() as aggregator:
        aggregator.begin(plan, parameters)
        start = time.perf_counter()
        for site in range(sites):
            aggregator.add(SealedUpdate(plan_digest=plan.digest, site=f"site-{site}", chunks=chunks))
        return (time.perf_counter() - start) / sites


def stock(vector: np.ndarray[Any, Any], sites: int) -> Row:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    context.global_scale = 2**40
    secret = context.secret_key()
    context.make_context_public()
    parts = [vector[start : start + 4096] for start in range(0, len(vector), 4096)]
    client_s, uploads = cpu_seconds(lambda: [tenseal.ckks_vector(context, part).serialize() for part in parts])
    total = [tenseal.ckks_vector_from(context, upload) for upload in uploads]

    def add() -> None:
        for index, upload in enumerate(uploads):
            total[index] += tenseal.ckks_vector_from(context, upload)

    add_s, _ = cpu_seconds(lambda: [add() for _ in range(sites - 1)])
    open_s, opened = cpu_seconds(lambda: np.concatenate([part.decrypt(secret) for part in total]))
    return {
        "bytes_per_parameter": sum(map(len, uploads)) / len(vector),
        "client_s": client_s,
        "aggregator_s_per_site": add_s / (sites - 1),
        "open_s": open_s,
        "max_error": float(np.abs(opened - sites * vector.astype(np.float64)).max()) / sites,
    }


def medians(rows: list[Row], parameters: int) -> Row:
    return {
        name: statistics.median(row[name] for row in rows) * (1e6 / parameters if "_s" in name else 1)
        for name in rows[0]
    }


def table(report: dict[str, Any]) -> str:
    rows = [
        ("bytes per parameter, up", "bytes_per_parameter", ".2f"),
        ("client: quantise, encrypt, serialise (CPU s per 1M)", "client_s", ".3f"),
        ("aggregator: load, check, add (CPU s per 1M and site)", "aggregator_s_per_site", ".4f"),
        ("decryptor: open the sum (CPU s per 1M)", "open_s", ".3f"),
        ("largest error of the mean", "max_error", ".1e"),
    ]
    mine, peer = report["secure_fedcollm"], report["tenseal_ckks_vector"]
    lines = [
        f"# Secure sum: {report['parameters']} parameters, {report['sites']} sites",
        "",
        f"tenseal {report['tenseal']}, Python {report['python']}; one process run, "
        f"{report['rounds']} interleaved rounds, medians.",
        "",
        "| | Secure FedCoLLM (N = 4096, [60, 49]) | TenSEAL `ckks_vector` (N = 8192, [60, 40, 60]) | ratio |",
        "|---|---|---|---|",
    ]
    for label, name, form in rows:
        # The errors are of two kinds: ours is the grid's, chosen by value_bits; the sum itself is exact.
        ratio = f"{peer[name] / mine[name]:.1f}x" if name != "max_error" else ""
        lines.append(f"| {label} | {mine[name]:{form}} | {peer[name]:{form}} | {ratio} |")
    wall = report["aggregator_process_wall_s_per_site"]
    lines += [
        "",
        f"Through the aggregator's own process, framing included: {wall:.4f} s wall per 1M parameters and site.",
        f"Our error is half a grid step at {VALUE_BITS} bits and clip {CLIP}; the sum of the integers is exact.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=262_144)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    vector = np.random.default_rng(0).uniform(-CLIP, CLIP, chosen.parameters).astype(np.float32)
    mine, peer, wall = [], [], []
    for _ in range(chosen.rounds):
        mine.append(ours(vector, chosen.sites))
        peer.append(stock(vector, chosen.sites))
        wall.append(aggregator_process_wall_s(vector, chosen.sites))
    report = {
        "parameters": chosen.parameters,
        "sites": chosen.sites,
        "rounds": chosen.rounds,
        "python": platform.python_version(),
        "tenseal": version("tenseal"),
        "secure_fedcollm": medians(mine, chosen.parameters),
        "tenseal_ckks_vector": medians(peer, chosen.parameters),
        "aggregator_process_wall_s_per_site": statistics.median(wall) * 1e6 / chosen.parameters,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "secure_sum.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "secure_sum.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
