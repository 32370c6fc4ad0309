"""The ``fedcollm`` command. The one module that imports hydra; it only composes YAML here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from fedcollm_privacy.errors import ConfigError, FedCollmError
from secure_fedcollm.config import Config
from secure_fedcollm.deploy_cli import deploy_app
from secure_fedcollm.keys_cli import keys_app
from secure_fedcollm.ledger_cli import ledger_app
from secure_fedcollm.policy_cli import policy_app
from secure_fedcollm.service_cli import server, site_app
from secure_fedcollm.status_table import status
from secure_fedcollm.strict_build import build, check
from secure_fedcollm.sweep_cli import sweep

__all__ = ["app", "compose_config", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(ledger_app, name="ledger")
app.add_typer(keys_app, name="keys")
app.add_typer(policy_app, name="policy")
app.add_typer(deploy_app, name="deploy")
app.add_typer(site_app, name="site")
app.command()(server)
app.command()(status)
app.command()(sweep)


def _config_folder() -> Path:
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def compose_config(overrides: list[str]) -> dict[str, Any]:
    """Compose ``configs/config.yaml`` with overrides, as plain containers.

    Data of the user's own replaces the embedded experiment: ``data=...`` or ``data.path=...`` without an experiment
    drops it, and ``data.path=...`` alone selects ``data=file``.

    Raises:
        ConfigError: an override is malformed, names an unknown field or group, or a required value is missing.
    """
    words = {o.split("=", 1)[0] for o in overrides}
    if words & {"data", "data.path"} and "experiment" not in words:
        chosen = ["~experiment"] if "data" in words else ["~experiment", "data=file"]
        overrides = [*chosen, *overrides]
    try:
        with initialize_config_dir(config_dir=str(_config_folder().resolve()), version_base="1.3"):
            composed = compose(config_name="config", overrides=overrides)
            plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError("overrides", " ".join(overrides), " ".join(lines[:20])) from error
    if not isinstance(plain, dict):
        raise ConfigError("config", type(plain).__name__, "a mapping")
    _require_its_method(plain)
    # A composition without a privacy group is judged by `Config`, which knows whether it was declared.
    return {"privacy": None, **{str(key): value for key, value in plain.items()}}


def _require_its_method(plain: Mapping[Any, Any]) -> None:
    """Refuse a run that says it is of a method and sets otherwise what makes it that method."""
    for path in (_config_folder() / "method").glob("*.yaml"):
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        if own.pop("method") != plain.get("method"):
            continue
        for section, fields in own.items():
            for name, value in fields.items():
                given = plain.get(section, {}).get(name)
                allowed = f"{value}: that is what makes it method={path.stem}; leave it out, or choose another method"
                check(given == value, f"{section}.{name}", given, allowed)


@app.command()
def run(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, e.g. experiment=medquad")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Run a federation in one process tree, or continue one: resume=outputs/<run>."""
    given = list(overrides or [])
    resumed = [o.removeprefix("resume=") for o in given if o.startswith("resume=")]
    if len(resumed) > 0 and len(given) > 1:
        raise ConfigError("resume", " ".join(given), "no other override: a resumed run keeps its configuration")
    plain = {} if resumed else compose_config(given)
    config = None if resumed else build(Config, plain)
    # Imported here because torch takes seconds, and errors in the configuration should not wait for it.
    from secure_fedcollm.folder import RunFolder
    from secure_fedcollm.progress import RunProgress
    from secure_fedcollm.run import run_embedded

    if config is None:
        folder, plain = RunFolder.resume(resumed[0])
        config = build(Config, plain)
    else:
        folder = RunFolder.create(config.output_dir, config.name, plain)
    with RunProgress(quiet=quiet) as progress:
        _log_to(progress.console, quiet)
        progress.say(f"run {folder.run_id} in {folder.path}")
        summary = run_embedded(config, folder, progress)
    if not quiet:
        _show(summary, folder.path)


def _log_to(console: Console, quiet: bool) -> None:
    """Log lines above the bars on a terminal, plain lines elsewhere; libraries speak only when something is wrong."""
    terminal = RichHandler(console=console, show_path=False) if console.is_terminal else logging.StreamHandler()
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING, format="%(message)s", handlers=[terminal], force=True
    )
    for ours in ("fedcollm", "secure_fedcollm"):
        logging.getLogger(ours).setLevel(logging.ERROR if quiet else logging.INFO)


def _show(summary: Mapping[str, Any], path: Path) -> None:
    console = Console()
    table = Table(title=f"{summary['name']} · {summary['method']}", title_justify="left")
    for column in ("", "metric", "before", "after"):
        table.add_column(column, justify="left" if column in ("", "metric") else "right")
    for name in ("slm", "llm"):
        for metric, before in summary[name]["before"].items():
            table.add_row(name.upper(), metric, f"{before:.4f}", f"{summary[name]['after'][metric]:.4f}")
        table.add_section()
    console.print(table)
    if summary["private"]:
        budget = Table(title="privacy spent by each site", title_justify="left")
        for column in ("site", "ε of this run", "δ", "unit", "steps", "ε on this data set", "cap"):
            budget.add_column(column, justify="left" if column in ("site", "unit") else "right")
        for site, row in summary["sites"].items():
            if "epsilon_budget" in row:  # something was trained there
                budget.add_row(
                    site,
                    f"{row['epsilon']:.3f}",
                    f"{row['delta']:.1e}",
                    row["unit"],
                    str(row["steps"]),
                    *(f"{row[key]:.3f}" if key in row else "–" for key in ("spent_on_data_set", "epsilon_cap")),
                )
        console.print(budget)
    if summary["secrets"]:
        secrets = Table(title="planted secrets: rank among the candidates under the SLM", title_justify="left")
        for column in ("site", "secret", "written", "rank before", "rank after", "of"):
            secrets.add_column(column, justify="left" if column in ("site", "secret") else "right")
        for row in summary["secrets"]:
            secrets.add_row(
                row["site"],
                f"{row['prompt']}{row['secret']}",
                f"{row['repetitions']}×",
                str(row["rank_before"]),
                str(row["rank_after"]),
                str(row["candidates"]),
            )
        console.print(secrets)
    console.print(summary["note"], style=None if summary["private"] else "bold red")
    console.print(f"report:    {path / 'report.html'}")
    console.print(f"statement: {path / 'statement.html'}")
    console.print(f"audit:     fedcollm-audit {path} --html")


def main() -> None:
    """Entry point: errors of this project become one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except FedCollmError as error:
        Console(stderr=True).print(f"fedcollm: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
