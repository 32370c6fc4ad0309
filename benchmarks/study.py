"""The study of docs/results.md: methods x privacy x seeds on MedQuAD, and settings of FedCoLLM one at a time.

    python benchmarks/study.py --data medquad.jsonl --slm <folder> --llm <folder> [--seeds 5] [--jobs 2] [--quick]
    python benchmarks/study.py --subject e2e --data <folder of the E2E data set> --slm <folder> --llm <folder>

Every cell is one `fedcollm sweep` cell under --work; those that are finished are not run again, so a study that was cut
goes on. Writes docs/results.md and docs/results.svg (e2e: docs/results_e2e.*; with --quick: <work>/results.md).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from secure_fedcollm.figures import scatter_files
from secure_fedcollm.sweep_cells import kept_cells
from secure_fedcollm.sweep_charts import charts
from secure_fedcollm.sweep_cli import sweep
from secure_fedcollm.sweep_results import Estimate, Setting, estimate, rows_of, settings_of

DOCS = Path(__file__).parents[1] / "docs"
LEVELS = ("null", "8", "3", "1")
FEDERATED = ("fedcollm", "llm_to_slm", "fedavg_public", "fedavg", "standalone")
UNFEDERATED = ("zero_shot", "centralised_slm", "centralised_llm")
AIMS = {"8": 90, "3": 75}  # per cent of the gain without DP
PAIRS = (
    ("fedcollm", "fedavg_public", "distillation, both ways, against fine-tuning on the same public text"),
    ("llm_to_slm", "fedavg_public", "distillation one way, against the same"),
    ("fedcollm", "llm_to_slm", "letting the LLM learn too"),
    ("fedavg_public", "fedavg", "public text at the server"),
    ("fedavg", "standalone", "summing the sites' updates"),
)
# One at a time, away from the experiment's settings; steps taken in all stay the same.
CHANGES: tuple[tuple[str, ...], ...] = (
    ("distillation.direction=reverse",),
    ("distillation.temperature=2.0",),
    ("distillation.kd_weight=0.03",),
    ("distillation.kd_weight=0.3",),
    ("distillation.kd_weight=1.0",),
    ("adapter.aggregation=freeze_a",),
    ("adapter.aggregation=factor_average",),
    ("federation.rounds=8", "federation.local_steps=2", "distillation.steps=8"),
    ("federation.rounds=2", "federation.local_steps=8", "distillation.steps=30"),
    ("data.partition=iid",),
    ("data.partition=dirichlet", "data.dirichlet_alpha=0.1"),
)
# What may lift learning at epsilon 3, and costs no more privacy; FedAvg learns from private text alone.
LIFTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fedavg", ("privacy.expected_batch_size=128",)),
    ("fedavg", ("privacy.expected_batch_size=256", "federation.local_steps=2")),
    ("fedavg", ("federation.rounds=8",)),
    ("fedavg", ("federation.learning_rate=0.02",)),
    ("fedavg", ("federation.learning_rate=0.005",)),
    ("fedavg", ("privacy.max_grad_norm=0.3",)),
    ("fedavg", ("privacy.max_grad_norm=3.0",)),
    ("fedavg", ("privacy.clipping=automatic",)),
    ("fedavg", ("adapter.aggregation=freeze_a",)),
    ("fedavg", ("adapter.aggregation=factor_average",)),
    ("fedavg", ("adapter.r=4",)),
    ("fedcollm", ("distillation.warm_start_steps=15",)),
    ("fedcollm", ("distillation.steps=19",)),  # as many steps on public text, none of them first
)
# What lifted most, together: eight times the work at every site, for the same epsilon.
TOGETHER = ("federation.rounds=8", "federation.batch_size=256", "privacy.expected_batch_size=256")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is studied.

    Attributes:
        page: name of its page in docs/.
        title: of the page.
        told: what the records are.
        settings: whether single settings are studied too.
    """

    page: str
    title: str
    told: str
    settings: bool


SUBJECTS = {
    "medquad": Subject(
        page="results",
        title="MedQuAD by institute",
        told="Four institutes are the sites, at most 1000 records each, 64 tokens a record; D_a is the public half of "
        "the same institutes. MedQuAD is public; it stands in for private text",
        settings=True,
    ),
    "e2e": Subject(
        page="results_e2e",
        title="E2E by restaurant type",
        told="Descriptions of coffee shops, pubs, restaurants and places of no named type are the four sites, at most "
        "1000 records each, 128 tokens a record (dev and test set of the E2E challenge, CC BY-SA 4.0); D_a has other "
        "places, of all types. E2E is public; it stands in for private text",
        settings=False,
    ),
}


def e2e_files(folder: Path, into: Path) -> list[str]:
    """Rows with their type as a column; the last bit of the SHA-1 of the meaning representation makes half public."""
    into.mkdir(parents=True, exist_ok=True)
    halves: dict[str, list[str]] = {"private": [], "public": []}
    for name in ("devset.csv", "testset_w_refs.csv"):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                digest = hashlib.sha1(row["mr"].encode(), usedforsecurity=False).hexdigest()
                kind = re.search(r"eatType\[([^]]*)\]", row["mr"])
                made = {"mr": row["mr"], "ref": row["ref"], "type": kind[1].replace(" ", "_") if kind else "unnamed"}
                halves["private" if int(digest, 16) % 2 else "public"].append(json.dumps(made) + "\n")
    for half, lines in halves.items():
        (into / f"{half}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [f"data.path={(into / 'private.jsonl').resolve()}", f"data.public_path={(into / 'public.jsonl').resolve()}"]


def grids(seeds: str, quick: bool, settings: bool) -> list[list[str]]:
    """Words of `fedcollm sweep`, grid by grid."""
    if quick:
        small = ["federation.rounds=1", "distillation.steps=5", "evaluation.max_records=50"]
        return [["method=fedcollm,fedavg_public", "privacy.epsilon=null,8", "seed=0,1", *small]]
    first, second = "method=fedcollm,fedavg_public,fedavg", "method=llm_to_slm,standalone"
    return [
        [first, "privacy.epsilon=null,3", seeds],
        [second, "privacy.epsilon=null,3", seeds],
        [f"method={','.join(UNFEDERATED)}", "privacy.epsilon=null", seeds],
        *([*lift, f"method={method}", "privacy.epsilon=3", seeds] for method, lift in LIFTS if settings),
        *([[*TOGETHER, "method=fedavg", "privacy.epsilon=null,8,3", seeds]] if settings else []),
        [first, "privacy.epsilon=8,1", seeds],
        [second, "privacy.epsilon=8,1", seeds],
        *([*change, "method=fedcollm", "privacy.epsilon=null", seeds] for change in CHANGES if settings),
    ]


def run(arguments: argparse.Namespace) -> list[Setting]:
    """Run what is missing; gives all settings with at least one finished seed."""
    e2e = arguments.subject == "e2e"
    fixed = [
        f"experiment={arguments.subject}_study",
        *(e2e_files(arguments.data, arguments.work / "data") if e2e else [f"data.path={arguments.data.resolve()}"]),
        f"model.slm={arguments.slm.resolve()}",
        f"model.llm={arguments.llm.resolve()}",
        f"sweep_dir={arguments.work}",
    ]
    # Few seeds of everything come before many of anything: a study that is cut can be read.
    for upto in range(2 if arguments.quick else 3, arguments.seeds + 1):
        seeds = "seed=" + ",".join(str(seed) for seed in range(upto))
        for grid in grids(seeds, arguments.quick, SUBJECTS[arguments.subject].settings):
            try:
                sweep([*grid, *fixed], jobs=arguments.jobs)
            except typer.Exit:  # a cell failed: the table names it
                continue
    return settings_of(rows_of(kept_cells(arguments.work)))


class Study:
    """Settings by method, budget and what was changed."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = settings
        fields = {
            word.partition("=")[0] for change in (*CHANGES, *(lift for _, lift in LIFTS), TOGETHER) for word in change
        }
        own = [s for s in settings if s.values["method"] == "fedcollm"]
        known = {field: [s.values.get(field, "") for s in own] for field in fields}
        # The base is what most of FedCoLLM's settings have; other methods set some of these fields themselves.
        self.base = {field: max(set(texts), key=texts.count) for field, texts in known.items() if any(texts)}

    def find(self, method: str, level: str, change: Sequence[str] = ()) -> Setting | None:
        """The setting, or None if no seed of it is finished."""
        wanted = {"method": method, "privacy.epsilon": level}
        if method in ("fedcollm", "fedavg"):  # the others were not changed
            tuned = ("steps", "kd_weight", "warm_start_steps")
            own = {f"distillation.{field}" for field in tuned} if method == "fedavg" else set()
            if level == "null":  # what only DP needs is not set without it
                own |= {field for field in self.base if field.startswith("privacy.")}
            wanted |= {f: text for f, text in self.base.items() if f not in own}
            said = dict(word.split("=", 1) for word in change)
            wanted |= {f: text for f, text in said.items() if level != "null" or not f.startswith("privacy.")}
        found = (s for s in self.settings if all(s.values.get(field, "") == text for field, text in wanted.items()))
        return next(found, None)


def by_seed(setting: Setting, column: str) -> dict[str, float]:
    """Seed to value, where the run has one."""
    numbers = {row.values["seed"]: row.numbers.get(column) for row in setting.rows}
    return {seed: value for seed, value in numbers.items() if value is not None}


def paired(one: Setting | None, other: Setting | None, column: str) -> Estimate | None:
    """Mean difference over the seeds that both have (same split, same first adapters), and its interval."""
    if one is None or other is None:
        return None
    first, second = by_seed(one, column), by_seed(other, column)
    common = sorted(first.keys() & second.keys())
    return estimate([first[seed] - second[seed] for seed in common]) if common else None


def kept(one: Setting | None, yardstick: Setting | None) -> Estimate | None:
    """Share of the gain without DP that a budget leaves, seed by seed."""
    if one is None or yardstick is None:
        return None
    first, second = by_seed(one, "slm_gain"), by_seed(yardstick, "slm_gain")
    common = sorted(seed for seed in first.keys() & second.keys() if second[seed] > 0)
    return estimate([first[seed] / second[seed] for seed in common]) if common else None


def text(value: Estimate | None, *, signed: bool = True, percent: bool = False) -> str:
    """Mean ± half the 95 % interval."""
    if value is None:
        return "-"
    scale, digits = (100, 0) if percent else (1, 3)
    mean = f"{value.mean * scale:{'+' if signed and not percent else ''}.{digits}f}{'%' if percent else ''}"
    half = "" if value.half is None else f" ± {value.half * scale:.{digits}f}"
    return (mean + half).replace("-", "−")


def shown(value: Estimate | None) -> str:
    """What the seeds show of a difference."""
    if value is None or value.half is None:
        return "not shown"
    return "helps" if value.low > 0 else "hurts" if value.mean + value.half < 0 else "not shown"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * (lines[0].count("|") - 1) + "|", *lines[1:]])


def name(level: str) -> str:
    """A column's head."""
    return "no DP" if level == "null" else f"ε = {level}"


def tables(study: Study) -> dict[str, str]:
    """Every table, by its title."""
    levels = [level for level in LEVELS if any(study.find(m, level) for m in FEDERATED)]
    methods = [m for m in (*UNFEDERATED, *FEDERATED) if any(study.find(m, level) for level in LEVELS)]

    def every(column: str, *, signed: bool = True) -> str:
        def cell(method: str, level: str) -> str:
            setting = study.find(method, level)
            return text(None if setting is None else setting.of(column), signed=signed)

        return table(("method", *map(name, levels)), ((m, *(cell(m, level) for level in levels)) for m in methods))

    found = {f"What the {model.upper()} gained": every(f"{model}_gain") for model in ("slm", "llm")}
    for model in ("slm", "llm"):
        rows = []
        for one, other, what in PAIRS:
            values = [paired(study.find(one, lv), study.find(other, lv), f"{model}_gain") for lv in levels]
            if any(values):
                cells = (f"{text(v)} {shown(v)}" if v else "-" for v in values)
                rows.append((f"{what}: {one} − {other}", *cells))
        found[f"What makes the difference, {model.upper()}"] = table(("", *map(name, levels)), rows)
    private = [level for level in levels if level != "null"]
    shares = {m: [kept(study.find(m, lv), study.find(m, "null")) for lv in private] for m in FEDERATED}
    rows = [(m, *(text(v, percent=True) for v in values)) for m, values in shares.items() if any(values)]
    found["What privacy costs"] = table(("method", *map(name, private)), rows)
    found["Who pays: the site that gained least"] = every("worst_site_gain")
    found["And the one that gained most"] = every("best_site_gain")
    rows = []
    for change in CHANGES:
        ends = study.find("fedcollm", "null", change), study.find("fedcollm", "null")
        values = [paired(*ends, f"{model}_gain") for model in ("slm", "llm")]
        if any(values):
            rows.append((" ".join(change), *(f"{text(v)} {shown(v)}" for v in values)))
    found["One setting at a time, FedCoLLM without DP"] = table(("instead of the experiment's", "SLM", "LLM"), rows)
    rows = []
    for method, lift in LIFTS:
        value = paired(study.find(method, "3", lift), study.find(method, "3"), "slm_gain")
        if value is not None:
            rows.append((method, " ".join(lift), f"{text(value)} {shown(value)}"))
    found["What lifts learning at ε = 3"] = table(("method", "instead of the experiment's", "SLM"), rows)
    rows = []
    for change in ((), TOGETHER):
        gains = [study.find("fedavg", level, change) for level in ("null", "8", "3")]
        if any(gains):
            left = [text(kept(gain, gains[0]), percent=True) for gain in gains[1:]]
            cells = [text(None if gain is None else gain.of("slm_gain")) for gain in gains]
            rows.append((" ".join(change) or "the experiment's", *cells, *left))
    if len(rows) > 1:
        head = ("FedAvg with", "no DP", "ε = 8", "ε = 3", "kept at 8", "kept at 3")
        found["The lifts together"] = table(head, rows)
    return found


INTRO: Mapping[str, str] = {
    "What the SLM gained": "Fall of cross-entropy on held-out records of all sites, nats per token; mean over seeds ± "
    "half the 95 % t-interval. `standalone` is the mean over the sites' own models. In `centralised_llm` the sites' "
    "model is the LLM, so its gain stands in the next table. The centralised ones take as many steps as one site, so "
    "they are no ceiling here.",
    "What makes the difference, SLM": "Differences seed by seed (same split, same first adapters). *Helps* and *hurts* "
    "mean that the 95 % interval leaves out 0, one comparison at a time: of twenty, one is expected to do so by "
    "chance.",
    "What privacy costs": "Share of the method's own gain without DP that is left, SLM, seed by seed. A method that "
    "learns much from public text keeps much, because that part costs no privacy.",
    "Who pays: the site that gained least": "Gain on a site's own held-out records, of the model it ends up with.",
}


def reading(study: Study) -> list[str]:
    """What the intervals show, in sentences."""
    lines = []
    for one, other, what in PAIRS:
        for model in ("slm", "llm"):
            values = {lv: paired(study.find(one, lv), study.find(other, lv), f"{model}_gain") for lv in LEVELS}
            seen = {level: shown(value) for level, value in values.items() if value is not None}
            if not seen or all(v is None or v.mean == 0 for v in values.values()):
                continue
            told = [
                f"{word} at {', '.join(name(lv) for lv in seen if seen[lv] == word)}"
                for word in dict.fromkeys(seen.values())
            ]
            lines.append(f"{what[0].upper()}{what[1:]} ({one} − {other}), {model.upper()}: {'; '.join(told)}.")
    lifts = {
        f"{' '.join(lift)} ({method})": paired(study.find(method, "3", lift), study.find(method, "3"), "slm_gain")
        for method, lift in LIFTS
    }
    singles = {
        " ".join(change): paired(study.find("fedcollm", "null", change), study.find("fedcollm", "null"), "slm_gain")
        for change in CHANGES
    }
    for where, values in (("at ε = 3", lifts), ("FedCoLLM without DP", singles)):
        found = {what: shown(value) for what, value in values.items() if value is not None}
        for word in ("helps", "hurts"):
            if word in found.values():
                named = ", ".join(f"`{what}`" for what, seen in found.items() if seen == word)
                lines.append(f"A single setting that {word} the SLM, {where} ({len(found)} were tried): {named}.")
    for level, aim in AIMS.items():
        shares = {m: kept(study.find(m, level), study.find(m, "null")) for m in FEDERATED}
        told = [f"{m} {text(v, percent=True)}" for m, v in shares.items() if v is not None]
        if told:
            lines.append(f"Of the gain without DP, {name(level)} keeps (aim: {aim} %): {', '.join(told)}.")
        together = kept(study.find("fedavg", level, TOGETHER), study.find("fedavg", "null", TOGETHER))
        if together is not None:
            lines.append(f"FedAvg with the lifts together keeps {text(together, percent=True)} at {name(level)}.")
    return lines


def picture(study: Study, folder: Path, stem: str) -> None:
    """The methods at the experiment's own settings, gain of the SLM against epsilon, as SVG."""
    found = [
        replace(setting, values={"method": method, "privacy.epsilon": level})
        for method in FEDERATED
        for level in LEVELS
        if (setting := study.find(method, level)) is not None
    ]
    chart = charts(found, ["slm"], "nats per token")[0]
    scatter_files(
        folder, stem, chart.points, chart.series, x_label=chart.x_label, y_label=chart.y_label, x_form=chart.x_form
    )
    (folder / f"{stem}.pdf").unlink()


def page(study: Study, arguments: argparse.Namespace) -> str:
    """The whole document."""
    subject = SUBJECTS[arguments.subject]
    seeds = sorted({row.values["seed"] for s in study.settings for row in s.rows})
    cells = sum(len(s.rows) for s in study.settings)
    hours = sum(row.numbers.get("seconds") or 0 for s in study.settings for row in s.rows) / 3600 / arguments.jobs
    parts = [
        f"""# Results: {subject.title}

Made by `python benchmarks/study.py` from {cells} runs, {len(seeds)} seeds, about {hours:.1f} hours with
{arguments.jobs} runs side by side. Settings: `experiment={arguments.subject}_study`. {subject.told}.

SLM `{arguments.slm.name}`, LLM `{arguments.llm.name}`. δ = 1e-5 per record, add or remove one, Poisson sampling, local
noise. Every run is the whole system: DP-SGD by per-sample gradients, CKKS, masks, ledger.

What this is not: these models are tiny (0.2 and 1.2 million parameters), and the LLM was pre-trained on text of its
own{" that is like D_a" if arguments.subject == "medquad" else ""}. Nothing here says what larger models do.

![gain against epsilon]({subject.page}.svg)
"""
    ]
    parts.append("## In short\n\n" + "\n".join(f"- {line}" for line in reading(study)) + "\n")
    for title, body in tables(study).items():
        if body.count("\n") < 2:  # nothing of it was run yet
            continue
        parts.append(f"## {title}\n\n{INTRO[title]}\n\n{body}\n" if title in INTRO else f"## {title}\n\n{body}\n")
    return "\n".join(parts)


def main() -> None:
    """Run the cells that are missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for path in ("--data", "--slm", "--llm"):
        parser.add_argument(path, type=Path, required=True)
    parser.add_argument("--subject", choices=tuple(SUBJECTS), default="medquad")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="eight small runs: does it work?")
    parser.add_argument("--report-only", action="store_true", help="write the page from the runs there are")
    arguments = parser.parse_args()
    for option in ("data", "slm", "llm"):
        if not getattr(arguments, option).exists():
            parser.error(f"--{option} {getattr(arguments, option)}: no such file or folder")
    arguments.work = arguments.work or Path("outputs") / (
        f"{arguments.subject}-study-quick" if arguments.quick else f"{arguments.subject}-study"
    )
    if arguments.quick:
        arguments.seeds = 2
    settings = settings_of(rows_of(kept_cells(arguments.work))) if arguments.report_only else run(arguments)
    if not settings:  # a page of results that is there is not replaced by one without any
        parser.exit(1, f"no run in {arguments.work} is finished; the lines above say why\n")
    written = page(Study(settings), arguments)
    if arguments.quick:
        (arguments.work / "results.md").write_text(written)
    else:
        page_name = SUBJECTS[arguments.subject].page
        (DOCS / f"{page_name}.md").write_text(written)
        picture(Study(settings), DOCS, page_name)
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
