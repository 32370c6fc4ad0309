"""``fedcollm policy``: write and check what a site never exceeds, and see what it refused."""

from __future__ import annotations

import os
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fedcollm_privacy import _validate
from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import PolicyRefused
from fedcollm_privacy.identity import load_public
from fedcollm_privacy.policy_file import load_policy, policy_text, read_policy
from fedcollm_privacy.refusals import read_refusals
from fedcollm_privacy.site_policy import EMBEDDED, HUB, DataSetRule, PlanRules, SitePolicy
from secure_fedcollm.home import home, identity_of

__all__ = ["policy_app"]

policy_app = typer.Typer(no_args_is_help=True, help="Write and check what a site never exceeds; see what it refused.")


DtypeName = Literal["float32", "bfloat16"]
Dtype = Annotated[DtypeName, typer.Option(help="Number format that runs load the model in; it changes the digest.")]


@policy_app.command("new")
def new(
    site: Annotated[str, typer.Option(help="This site's public name, as in the roster")],
    data: Annotated[str, typer.Option(help="The data: a file, a folder, hub:<id>, or embedded")],
    name: Annotated[str, typer.Option(help="The ledger's name for the data, for ever; it never leaves the site")],
    model: Annotated[list[str], typer.Option(help="A base model that may be trained: digest, hub id or folder")],
    server: Annotated[
        list[Path] | None,
        typer.Option(
            help="The .pub file of a server whose plans are followed; without it, that of runs on this machine"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it, where runs on this machine look for it")
    ] = None,
    unit: Annotated[
        Literal["person", "record"],
        typer.Option(help="What is protected and counted: all of a person's records, or each"),
    ] = "person",
    valid_days: Annotated[int, typer.Option(min=0, help="Days from today until the policy expires")] = 365,
    dtype: Dtype = "float32",
) -> None:
    """Write a strict policy to begin with; its limits are to be edited. Never overwrites a file."""
    if out is None:
        _validate.public_name(site=site)
        out = home() / "policies" / f"{site}.yaml"
        out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.path.lexists(out):
        raise PolicyRefused("file", f"{out} exists and is never overwritten: choose another --out, or move it away")
    caps = (Cap(epsilon=10.0, delta=1e-4), Cap(epsilon=4.0, delta=5e-5, days=365))
    located = data if data == EMBEDDED or data.startswith(HUB) else str(Path(data).expanduser().absolute())
    text = policy_text(
        site=site,
        valid_until=_today() + timedelta(days=valid_days),
        servers=tuple(load_public(path) for path in server) if server else (identity_of("server").public,),
        base_models=tuple(_digest(given, dtype) for given in model),
        data_sets=(DataSetRule(name=name, location=located, unit=unit, caps=caps),),
        plans=PlanRules(max_epsilon=3.0, max_delta=1e-5, noise=("local",)),
        opening=SumPolicy(min_contributors=3, max_colluding=1),
    )
    _write_new(out, text.encode())
    _say(f"{out.absolute()}  policy of {site}, valid until {load_policy(out, site).valid_until}")
    _say("Next: edit the limits under data_sets, plans and opening, then: fedcollm policy check " + str(out))


@policy_app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A site-policy.yaml")],
    site: Annotated[str | None, typer.Option(help="Refuse it unless it is this site's.")] = None,
) -> None:
    """Print in plain words what a policy allows; exit 2 with the reason if it would refuse everything."""
    policy = read_policy(path) if site is None else load_policy(path, site)
    policy.require_valid(_today())
    _table(policy)
    _say(f"digest  {policy.digest}")
    for rule in policy.data_sets:
        if not any(cap.days is None for cap in rule.caps):
            _say(f"Note: {rule.name} has no cap for ever; what its runs spend may grow year by year.")
        least = min(cap.epsilon for cap in rule.caps)
        if policy.plans.max_epsilon > least:
            _say(f"Note: {rule.name} has a cap of epsilon {least:g}; no run can spend plans.max_epsilon.")
        if not (rule.location == EMBEDDED or rule.location.startswith(HUB) or Path(rule.location).exists()):
            _say(f"Note: nothing lies at {rule.location} now.")
    if policy.exceptions:
        _say(f"NOTE: the exceptions {', '.join(policy.exceptions)} allow runs that protect nobody.")


@policy_app.command("model")
def model_digest(
    name: Annotated[str, typer.Argument(help="Hub id or folder of a base model")],
    dtype: Dtype = "float32",
) -> None:
    """Print a base model's digest, as it stands under base_models."""
    _say(_digest(name, dtype))


@policy_app.command("refusals")
def refusals(path: Annotated[Path, typer.Argument(help="A site's .refusals.jsonl")]) -> None:
    """Print what a site refused, and which of its rules said no."""
    table = Table(title=_visible(str(path)), title_justify="left")
    for column in ("time", "run", "round", "rule", "reason"):
        table.add_column(column, overflow="fold")
    entries = read_refusals(path)
    for entry in entries:
        words = (entry["time"], entry["run_id"], entry["server_round"], entry["rule"], entry["reason"])
        table.add_row(*(_visible("" if word is None else str(word)) for word in words))
    _show(table)
    _say(f"{len(entries)} refusals")


def _table(policy: SitePolicy) -> None:
    plans, opening = policy.plans, policy.opening
    table = Table(title=f"what {policy.site} allows until {policy.valid_until} (UTC)", title_justify="left")
    table.add_column("field", no_wrap=True)
    table.add_column("what it means", overflow="fold")
    for server in policy.servers:
        table.add_row("servers", f"plans of {server.name} are followed, fingerprint {server.fingerprint}")
    for digest in policy.base_models:
        table.add_row("base_models", f"the base model {digest} may be trained")
    table.add_section()
    for rule in policy.data_sets:
        whom = "all records of a person" if rule.unit == "person" else "each single record"
        table.add_row("data_sets", (f"{rule.name}: {rule.location}; protects and counts {whom}"))
        for cap in rule.caps:
            window = "for ever" if cap.days is None else f"in any {cap.days} days"
            row = f"{rule.name}: all runs together spend at most epsilon {cap.epsilon:g}, delta {cap.delta:g} {window}"
            table.add_row("  caps", (row))
    table.add_section()
    table.add_row("plans", f"one run spends at most epsilon {plans.max_epsilon:g}, delta {plans.max_delta:g}")
    noise = {"local": "this site's own noise", "distributed": "the sum of several sites' noise"}
    table.add_row("  noise", "what protects is " + ", or ".join(noise[kind] for kind in plans.noise))
    table.add_row("opening", f"no sum of fewer than {opening.min_contributors} sites is opened")
    table.add_row("", f"withstands at least {opening.max_colluding} other site(s) that work together with the server")
    table.add_row("exceptions", ", ".join(policy.exceptions) or "none: no run without protection")
    _show(table)


def _digest(given: str, dtype: DtypeName) -> str:
    if re.fullmatch("[0-9A-Fa-f]{64}", given):  # in capitals it is refused, and not looked for on the hub
        return given
    # Here, because torch takes seconds and most commands need none of it.
    from secure_fedcollm.models import base_digest_of

    return base_digest_of(given, dtype)


def _write_new(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
    except FileExistsError:
        raise PolicyRefused("file", f"{path} exists and is never overwritten: choose another --out") from None
    except OSError as error:
        raise PolicyRefused("file", f"{path} cannot be written ({error.strerror}): choose another --out") from error


def _visible(text: str) -> str:
    # A server wrote part of a reason; it must not steer the administrator's terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _show(table: Table) -> None:
    Console(markup=False, highlight=False, emoji=False).print(table)


def _say(line: str) -> None:
    # As it is: a path is no markup, and a broken line cannot be copied.
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _today() -> date:
    return datetime.now(UTC).date()
