"""A whole run: measure, round after round with a checkpoint each, measure again, write everything down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.errors import ConfigError, FedCollmError, ModelError
from secure_fedcollm import outputs, report
from secure_fedcollm.assembly import Assembly, assemble
from secure_fedcollm.config import Config
from secure_fedcollm.evaluation import evaluate, generate_samples, rouge_l
from secure_fedcollm.exposure import exposure
from secure_fedcollm.fairness import per_site
from secure_fedcollm.folder import Checkpoint, RunFolder
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.rounds import (
    RoundOutcome,
    State,
    adapter_digests,
    conclude_round,
    run_round,
    run_round_alone,
)

__all__ = ["Watcher", "run", "run_embedded"]

Float32 = NDArray[np.float32]
Metrics = dict[str, float]
Measured = tuple[Metrics | None, Metrics | None, dict[str, Metrics]]
_PAUSE_S = 10  # between two offers to sites that have not joined


class Watcher(Protocol):
    """Is told where a run stands, while it runs."""

    def round(self, server_round: int, attempt: int) -> None:
        """A round begins."""
        ...

    def round_done(self, outcome: RoundOutcome) -> None:
        """A round has ended, and is on disk."""
        ...


def run_embedded(config: Config, folder: RunFolder, progress: RunProgress) -> dict[str, Any]:
    """Assemble a federation in this process tree and run what is left of its run; gives ``summary.json``.

    Raises:
        FedCollmError: the run is finished, cannot start, or no round gave a sum.
    """
    _require_unfinished(folder)
    parts = assemble(config, folder, progress)
    try:
        run(parts, folder, progress)
    finally:
        parts.federation.secure_sum.close()
    return outputs.read_summary(folder)


def run(
    parts: Assembly,
    folder: RunFolder,
    progress: RunProgress,
    *,
    stop: Callable[[], bool] = lambda: False,
    watch: Watcher | None = None,
) -> dict[str, Any] | None:
    """Run what is left of the run in ``folder`` and write all its outputs.

    Every round ends with a checkpoint, so a run that is killed goes on with the round that was cut; that round's budget
    was reserved and stays spent, and it is reserved anew before it is trained again.

    Args:
        parts: of one process tree, or of a server whose sites are elsewhere; the caller closes the secure sum.
        folder: the run's.
        progress: where a person sees it.
        stop: asked before every round; once it says yes the run ends there, and can be resumed.
        watch: is told of rounds.

    Returns:
        The content of ``summary.json``; None if the run was stopped before its end.

    Raises:
        FedCollmError: the run is finished, cannot start, no round gave a sum, or no site of a private run says at its
            end what it spent.
    """
    _require_unfinished(folder)
    state = _rounds(parts, folder, progress, stop, watch)
    if state is None:
        return None
    outputs.write(parts, folder, state, _closing(parts, state, progress), progress.seconds)
    with progress.stage("report", "write the report"):
        report.render(folder.path)
    return outputs.read_summary(folder)


def _require_unfinished(folder: RunFolder) -> None:
    if folder.finished:
        raise ConfigError("resume", str(folder.path), "a run that is not finished; this one has its summary")


def _rounds(
    parts: Assembly, folder: RunFolder, progress: RunProgress, stop: Callable[[], bool], watch: Watcher | None
) -> State | None:
    """The state after the last round; None if the run was stopped before one."""
    config, federation = parts.config, parts.federation
    last = folder.load_checkpoint(parts.slm.spec.digest)
    if last is None:
        folder.drop_metrics_after(-1)
        before = RoundOutcome(outcome="before", state=parts.start)
        folder.append_metrics(_row(0, 1, before, _measure(parts, parts.start, progress), parts, progress))
        state = parts.start
        if config.distillation.warm_start_steps > 0:
            tuned = federation.server.co_tune(state.slm, state.llm, server_round=0)
            state = replace(state, slm=tuned.slm, llm=tuned.llm)
        last = Checkpoint(server_round=0, state=state)
        folder.save_checkpoint(last, parts.slm.spec.digest)
    else:
        folder.drop_metrics_after(last.server_round)
        progress.say(f"resumed after round {last.server_round}")
    state = last.state
    if not _enlisted(parts, stop, progress):  # a site that has not joined has no ledger of this run to show
        return None
    _begin(parts, folder, state, progress)
    for server_round in range(last.server_round + 1, config.federation.rounds + 1):
        if stop():
            progress.say(f"stopped before round {server_round}, as was asked; resume the run to go on")
            return None
        attempt = federation.transcript.attempts(server_round) + 1
        if watch is not None:
            watch.round(server_round, attempt)
        if not _enlisted(parts, stop, progress):
            return None
        if config.federation.exchange == "secure_sum":
            opened = folder.kept_opened(server_round)
            if opened is not None:
                progress.say(f"round {server_round}: its sum was open when the run was cut; going on from there")
                result = conclude_round(federation, state, opened)
            else:
                result = run_round(federation, state, server_round, attempt, config.secure_sum.value_bits)
        else:
            result = run_round_alone(federation, state, server_round)
        measured: Measured = (None, None, {})
        if server_round % config.evaluation.every == 0 or server_round == config.federation.rounds:
            try:
                measured = _measure(parts, result.state, progress)
            except ModelError as error:  # a model diverged without a NaN in its adapter: the round is lost
                result = replace(result, outcome="lost", state=state, reason=str(error))
                federation.transcript.record("rolled_back", server_round=server_round, **adapter_digests(state))
                measured = _measure(parts, state, progress)
        state = result.state
        row = _row(server_round, attempt, result, measured, parts, progress)
        folder.append_metrics(row)
        folder.save_checkpoint(Checkpoint(server_round=server_round, state=state), parts.slm.spec.digest)
        folder.drop_opened()
        if watch is not None:
            watch.round_done(result)
        progress.say(_line(row, result))
    rows = folder.metrics()
    if config.federation.rounds > 0 and all(row["outcome"] in ("before", "lost") for row in rows):
        raise FedCollmError(
            f"all {config.federation.rounds} rounds were lost; the adapters are as they were. The lines above name the "
            "sites and the reasons. Budget that sites reserved stays spent."
        )
    return state


def _enlisted(parts: Assembly, stop: Callable[[], bool], progress: RunProgress) -> bool:
    """Offer the run until enough sites have joined to open a sum; False if it is to stop before.

    A round with fewer would be lost for certain, and a site's administrator may take days to say yes.
    """
    federation, least, told = parts.federation, parts.config.federation.min_contributors, ""
    while federation.offers is not None:
        standings = federation.offers.enlist(federation.transport)
        joined = sum(standing == "joined" for standing in standings.values())
        if joined >= least:
            break
        others = ", ".join(f"{site} ({code})" for site, code in sorted(standings.items()) if code != "joined")
        text = f"waiting for sites: {joined} take part, {least} are needed; not yet: {others}"
        if text != told:
            progress.say(text)
            told = text
        for _ in range(_PAUSE_S):
            if stop():
                progress.say("stopped while waiting for sites, as was asked; resume the run to go on")
                return False
            time.sleep(1.0)
    return True


def _begin(parts: Assembly, folder: RunFolder, state: State, progress: RunProgress) -> None:
    """Note in the transcript where this start begins, and have every site's ledger agree with what the server knows.

    A site on a machine of its own may be away, or its administrator undecided: it is left out until it joins.
    """
    federation = parts.federation
    specs = {
        "slm": parts.slm.spec,
        "llm": parts.llm.spec,
        "shared": parts.slm.shared_spec(parts.config.adapter.aggregation),
    }
    federation.transcript.record(
        "start",
        run_id=folder.run_id,
        roster=parts.roster.digest,
        spec={name: asdict(spec) for name, spec in specs.items()},
        **adapter_digests(state),
    )
    if federation.heads is None:
        return
    refused = federation.heads.exchange(
        federation.transport, federation.transcript, run_id=folder.run_id, server_round=0
    )
    if parts.deployed:
        away = sorted(site for site, reason in refused.items() if reason != "contradicts")
        if away:
            progress.say(f"not here yet, and left out until they join: {', '.join(away)}")
        refused = {site: reason for site, reason in refused.items() if reason == "contradicts"}
    if refused:
        raise FedCollmError(
            "nothing is trained: these ledgers contradict what the server has counter-signed, or cannot be read: "
            + ", ".join(f"{site} ({reason})" for site, reason in sorted(refused.items()))
            + ". Restore the newest copy of each ledger; the sites' own logs say more"
        )


def _row(
    server_round: int, attempt: int, result: RoundOutcome, measured: Measured, parts: Assembly, progress: RunProgress
) -> dict[str, Any]:
    slm, llm, sites = measured
    spent = sum(progress.seconds.values())
    return {
        "server_round": server_round,
        "attempt": attempt,
        "outcome": result.outcome,
        "cohort": list(result.cohort),
        "left_out": dict(result.left_out),
        "slm": slm,
        "llm": llm,
        "sites": sites,
        "distillation": None if result.co_tuning is None else asdict(result.co_tuning),
        "epsilon": {s.site: s.epsilon for s in result.settlements if s.private} or _nothing_spent(parts, result),
        "bytes_up": result.bytes_up,
        "sum_norm": result.sum_norm,
        "clipped_fraction": max((s.clipped_fraction for s in result.settlements), default=None),
        "observed": _observed(parts),
        "seconds": {"since_start": spent},
    }


def _nothing_spent(parts: Assembly, result: RoundOutcome) -> dict[str, float]:
    """Zeros before the first round of a private run; no number where no site told one."""
    trains = parts.config.guaranteed and parts.config.federation.rounds > 0
    return dict.fromkeys(parts.federation.transport.sites, 0.0) if result.outcome == "before" and trains else {}


def _observed(parts: Assembly) -> dict[str, dict[str, float]]:
    """Per site, clipping and signal-to-noise over the round's steps; nothing where the records are private."""
    return {
        site.name: {
            "clipped_units": float(np.mean([o.clipped_fraction for o in site.observations])),
            "signal_to_noise": float(np.mean([o.signal_to_noise for o in site.observations])),
        }
        for site in parts.federation.sites
        if site.observations
    }


def _line(row: Mapping[str, Any], result: RoundOutcome) -> str:
    text = f"round {row['server_round']}: {row['outcome']}"
    for name in ("slm", "llm"):
        if row[name]:
            text += f" · {name.upper()} perplexity {row[name]['perplexity']:.3f}"
    if row["epsilon"]:
        text += f" · ε so far {max(row['epsilon'].values()):.2f}"
    if row["left_out"]:
        text += " · left out: " + ", ".join(f"{site} ({code})" for site, code in sorted(row["left_out"].items()))
    if result.distrusted:
        told = ", ".join(f"{site} ({reason})" for site, reason in sorted(result.distrusted.items()))
        text += f" · ledger not counter-signed, ask its administrator: {told}"
    return text + (f" · {result.reason}" if result.reason else "")


def _measure(parts: Assembly, state: State, progress: RunProgress) -> Measured:
    """Metrics of SLM and LLM on the test records; without exchange, the mean over the sites' own adapters."""
    with progress.stage("evaluate", f"evaluate on {len(parts.test)} test records"):
        if not state.alone:
            return _evaluate(parts, parts.slm, state.slm), _evaluate(parts, parts.llm, state.llm), {}
        trains_slm = parts.config.federation.site_model == "slm"
        trained = parts.slm if trains_slm else parts.llm
        sites = {name: _evaluate(parts, trained, adapter) for name, adapter in state.alone.items()}
        mean = {key: float(np.mean([m[key] for m in sites.values()])) for key in next(iter(sites.values()))}
        if trains_slm:
            return mean, _evaluate(parts, parts.llm, state.llm), sites
        return _evaluate(parts, parts.slm, state.slm), mean, sites


def _evaluate(parts: Assembly, adapted: AdaptedModel, adapter: Float32) -> Metrics:
    adapted.write(adapter)
    return evaluate(
        adapted.model,
        adapted.tokenizer,
        parts.test,
        max_length=parts.config.data.max_length,
        append_eos=parts.data.append_eos,
        batch_tokens=4 * parts.config.federation.batch_tokens,
    )


def _closing(parts: Assembly, state: State, progress: RunProgress) -> outputs.Closing:
    """What is looked at once, before and after: written samples, planted secrets, every site's own records."""
    config = parts.config
    count = config.evaluation.generations if not parts.test[0].choices else 0
    rouge: dict[str, dict[str, float]] = {"slm": {}, "llm": {}}
    samples: list[dict[str, str]] = []
    with progress.stage("evaluate", "write samples"):
        for name, adapted, first, final in (
            ("slm", parts.slm, parts.start.slm, outputs.released(state, parts, "slm")),
            ("llm", parts.llm, parts.start.llm, outputs.released(state, parts, "llm")),
        ):
            if count == 0:
                continue
            written = {}
            for when, adapter in (("before", first), ("after", final)):
                adapted.write(adapter)
                written[when] = generate_samples(
                    adapted.model,
                    adapted.tokenizer,
                    parts.test,
                    count=count,
                    max_new_tokens=config.evaluation.max_new_tokens,
                )
                rouge[name][when] = rouge_l(written[when])
            samples += [
                {"model": name, "prompt": b.prompt, "target": b.target, "before": b.text, "after": a.text}
                for b, a in zip(written["before"], written["after"], strict=True)
            ]
    secrets: list[dict[str, Any]] = []
    if parts.data.secrets:
        with progress.stage("evaluate", "rank planted secrets"):
            ranks = []
            for adapter in (parts.start.slm, outputs.released(state, parts, "slm")):
                parts.slm.write(adapter)
                ranks.append(
                    exposure(
                        parts.slm.model, parts.slm.tokenizer, parts.data.secrets, max_length=config.data.max_length
                    )
                )
            secrets = [
                {
                    "site": after.site,
                    "prompt": after.prompt,
                    "secret": after.secret,
                    "repetitions": after.repetitions,
                    "candidates": after.candidates,
                    "rank_before": before.rank,
                    "rank_after": after.rank,
                    "exposure_before": before.exposure,
                    "exposure_after": after.exposure,
                }
                for before, after in zip(*ranks, strict=True)
            ]
    sites = per_site(parts, state, progress)
    return outputs.Closing(samples=samples, rouge_l=rouge, secrets=secrets, per_site=sites)
