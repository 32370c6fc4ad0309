"""What released models leak: embedded federation with DP and without, attacked; and settings at which attacks succeed.

    python benchmarks/leakage.py [--work outputs/leakage-benchmark] [--jobs 2]

Membership inference and planted secrets (`fedcollm_audits.leakage`) on the released SLM adapter and on the LLM. A run
that leaks nothing shows nothing about DP unless the same run without DP leaks; so beside the default stand settings
that memorise more. Runs and attacks already finished under --work are not made again. Writes
benchmarks/results/leakage.{md,json,svg}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedcollm_audits.leakage import LOOKS, Comparison, Leakage, compare, load_released, measure
from fedcollm_audits.membership import Interval, MembershipInference
from secure_fedcollm.embedded import load_embedded
from secure_fedcollm.exposure import Exposure

RESULTS = Path(__file__).parent / "results"
MEMORISING = [
    "federation.rounds=8",
    "federation.local_steps=60",
    "adapter.r=32",
    "adapter.lora_alpha=64",
    "adapter.target_modules=[all-linear]",
    "adapter.aggregation=factor_average",
]
# What is changed, and which of the two models to attack: those that saw private records or somebody who did.
SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "embedded default": ([], ("slm", "llm")),
    "memorising": (MEMORISING, ("slm", "llm")),
    "LLM trained on the records": (["method=centralised_llm", *MEMORISING], ("llm",)),
}
PRIVACY = {True: "embedded", False: "embedded_non_private"}
SEED, HELD_OUT, MAX_LENGTH = 0, 0.2, 256


def one_run(arguments: argparse.Namespace, setting: str, private: bool) -> Path:
    """Run one cell in its own process; gives its folder."""
    name = "".join(c if c.isalnum() else "-" for c in setting)
    folder: Path = arguments.work / f"{name}-{'private' if private else 'non-private'}"
    if not (folder / "report.html").exists():
        command = [
            *(sys.executable, "-c", "from secure_fedcollm.cli import main; main()", "run", "--quiet"),
            *(f"experiment={PRIVACY[private]}", *SETTINGS[setting][0], f"seed={SEED}"),
            *("evaluation.every=1000", "evaluation.generations=0", f"output_dir={folder}"),
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def attacked(folder: Path, model: str, private: bool) -> Leakage:
    """Attack one released model, or read what the attack found."""
    kept = folder / f"leakage-{model}.json"
    if not kept.exists():
        torch.set_num_threads(1)
        data = load_embedded(SEED, HELD_OUT)
        found = measure(load_released(folder, model), data, model=model, private=private, max_length=MAX_LENGTH)
        kept.write_text(json.dumps(asdict(found)))
    row = json.loads(kept.read_text())
    for attack in ("loss", "calibrated"):
        intervals = {name: Interval(**row[attack][name]) for name in ("auc", "tpr")}
        scores = {name: tuple(row[attack][name]) for name in ("member_scores", "control_scores")}
        row[attack] = MembershipInference(**(row[attack] | intervals | scores))
    for secrets in ("secrets", "secrets_before"):
        row[secrets] = tuple(Exposure(**one) for one in row[secrets])
    return Leakage(**row)


def numbers(leakage: Leakage) -> dict[str, Any]:
    """For the JSON file: everything but the scores of single units."""
    row = asdict(leakage)
    for attack in ("loss", "calibrated"):
        for scores in ("member_scores", "control_scores"):
            row[attack][scores.replace("_scores", "s")] = len(row[attack].pop(scores))
    return row | {"exposed": leakage.exposed, "bits": leakage.bits}


def _interval(found: Interval) -> str:
    return f"{found.estimate:.3f} ({found.low:.3f}-{found.high:.3f})"


def table(rows: list[dict[str, Any]], comparisons: dict[tuple[str, str], Comparison]) -> str:
    """Markdown: what the attacks found, and what that shows."""
    lines = [
        "| setting | model | privacy | AUC, loss | AUC, calibrated | TPR at 1 % FPR, loss | TPR at 1 % FPR, calibrated "
        "| secrets at rank 1 | mean exposure, bits | p of the ranks |",
        "|---" * 10 + "|",
    ]
    for (setting, model), both in comparisons.items():
        for leakage, name in ((both.control, "non-private"), (both.private, "ε = 8, per person")):
            lines.append(
                f"| {setting} | {model.upper()} | {name} | {_interval(leakage.loss.auc)} | "
                f"{_interval(leakage.calibrated.auc)} | {_interval(leakage.loss.tpr)} | "
                f"{_interval(leakage.calibrated.tpr)} | {leakage.exposed} of {len(leakage.secrets)} | "
                f"{leakage.bits:.2f} | {leakage.secrets_p_value:.2g} |"
            )
    lines += ["", "| setting | model | " + " | ".join(LOOKS) + " |", "|---" * (2 + len(LOOKS)) + "|"]
    for (setting, model), both in comparisons.items():
        lines.append(f"| {setting} | {model.upper()} | " + " | ".join(both.verdicts[look] for look in LOOKS) + " |")
    lines += ["", "| setting | privacy | SLM perplexity | LLM perplexity |", "|---|---|---|---|"]
    for row in rows:
        drops = (" → ".join(f"{row[m][when]:.2f}" for when in ("before", "after")) for m in ("slm", "llm"))
        lines.append(f"| {row['setting']} | {row['privacy']} | {' | '.join(drops)} |")
    return "\n".join(lines) + "\n"


def plot(comparisons: dict[tuple[str, str], Comparison], path: Path) -> None:
    """A line for each setting and model: AUC and TPR of both attacks with intervals, exposure of every secret."""
    from matplotlib import pyplot

    colours = {False: "#b3431e", True: "#1e6fb3"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 1.6 + 0.75 * len(comparisons)), sharey=True, layout="constrained")
    for place, both in enumerate(comparisons.values()):
        for leakage in (both.control, both.private):
            for number, (attack, marker) in enumerate((("loss", "o"), ("calibrated", "s"))):
                at = place + 0.16 * (2 * number + leakage.private) - 0.24
                for axis, name in ((axes[0], "auc"), (axes[1], "tpr")):
                    found = getattr(getattr(leakage, attack), name)
                    axis.plot([found.low, found.high], [at, at], color=colours[leakage.private], linewidth=1.2)
                    axis.plot(found.estimate, at, marker, color=colours[leakage.private], markersize=5)
            at = place + 0.3 * leakage.private - 0.15
            bits = [secret.exposure for secret in leakage.secrets]
            axes[2].plot(bits, [at] * len(bits), "D", color=colours[leakage.private], markersize=4.5, alpha=0.55)
    axes[0].axvline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes[1].axvline(0.01, color="grey", linewidth=0.8, linestyle="--")
    most = next(iter(comparisons.values())).control.secrets[0].candidates
    bits_of_rank_1 = math.log2(most)
    axes[2].axvline(bits_of_rank_1, color="grey", linewidth=0.8, linestyle="--")
    axes[2].annotate(
        "rank 1", (bits_of_rank_1, 1), (-3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", color="grey", fontsize=8,
    )  # fmt: skip
    titles = ("membership: AUC", "membership: TPR at 1 % FPR", "planted secrets: exposure, bits")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(comparisons)), [f"{setting}\n{model.upper()}" for setting, model in comparisons])
    axes[0].invert_yaxis()
    handles = [
        pyplot.Line2D([], [], color=colours[False], label="without DP"),
        pyplot.Line2D([], [], color=colours[True], label="ε = 8, per person"),
        pyplot.Line2D([], [], color="black", marker="o", linestyle="", label="loss attack"),
        pyplot.Line2D([], [], color="black", marker="s", linestyle="", label="calibrated attack"),
        pyplot.Line2D([], [], color="black", marker="D", linestyle="", label="one secret"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path)


HEAD = """# What the released models leak: embedded federation, with DP and without

One seed. Members are persons of the sites' training data, controls are held-out persons of the same sites (2,560 and
640); intervals at 95 %, each on its own. Eight secrets of 1,000 candidates, each in 12 records of one person at one
site; a model that knows nothing has 1.44 bits on average. Verdicts share an error of 5 % between the three looks.
"Nothing is shown" means that the attack found nothing in the run without DP either: that is no merit of DP. Nor is it
where DP spoiled the model (see the perplexities at the end).

*Memorising*: 8 rounds of 60 steps in place of 6 of 10, and an adapter of rank 32 on all linear layers, both factors
averaged. *LLM trained on the records*: the same steps and adapter on the LLM, all records in one place; in FedCoLLM the
LLM never sees a private record, only the SLM's opinion of public text.

"""


def main() -> None:
    """Make the runs and attacks that are missing, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/leakage-benchmark"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells = [(setting, private) for setting in arguments.settings for private in (False, True)]
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("FEDCOLLM_HOME", home)
        # The first run alone: it makes the base models that all of them start from.
        folders = [one_run(arguments, *cells[0])]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            folders += pool.map(lambda cell: one_run(arguments, *cell), cells[1:])
    folder_of = dict(zip(cells, folders, strict=True))
    comparisons = {
        (setting, model): compare(
            attacked(folder_of[setting, True], model, True), attacked(folder_of[setting, False], model, False)
        )
        for setting in arguments.settings
        for model in SETTINGS[setting][1]
    }
    rows = []
    for (setting, private), folder in folder_of.items():
        summary = json.loads((folder / "summary.json").read_text())
        perplexity = {m: {when: summary[m][when]["perplexity"] for when in ("before", "after")} for m in ("slm", "llm")}
        rows.append(
            {
                "setting": setting,
                "overrides": SETTINGS[setting][0],
                "privacy": "ε = 8" if private else "non-private",
                "epsilon": {site: row["epsilon"] for site, row in summary["sites"].items()},
                **perplexity,
                "leakage": [
                    numbers(both.private if private else both.control)
                    for (of, _), both in comparisons.items()
                    if of == setting
                ],
            }
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "leakage.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    text = HEAD + table(rows, comparisons) + "\n![What the attacks found](leakage.svg)\n"
    (RESULTS / "leakage.md").write_text(text)
    plot(comparisons, RESULTS / "leakage.svg")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
