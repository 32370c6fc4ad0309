"""What released models tell about the data: membership inference, and planted secrets, private run against control.

Attacks on what a run releases (the SLM's adapter, the co-tuned LLM's), by somebody who has records and wants to know
which of them were trained on. The loss attack calls those members that the model finds likely (Yeom et al. 2018); the
calibrated one subtracts what the base model thought of them already (Carlini et al. 2021, section 5.2; Watson et al.
2022). Members are a site's training units; controls are held-out units of the same site, dealt out at random. Planted
secrets are ranked by `secure_fedcollm.exposure`.

A number of an attack bounds nothing: a better attack may find more. Nothing found in the private run means something
only where the same attack finds something in a control, the same run without DP. `compare` says which it was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats

from fedcollm_audits.confidence import rate_upper_bound
from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm import models
from secure_fedcollm.data import FederationData
from secure_fedcollm.evaluation import log_likelihoods
from secure_fedcollm.exposure import Exposure, exposure
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import tokenize

__all__ = [
    "Comparison",
    "Interval",
    "Leakage",
    "MembershipInference",
    "auc_interval",
    "compare",
    "infer_membership",
    "load_released",
    "measure",
    "secrets_p_value",
    "tpr_interval",
]

Float64 = NDArray[np.float64]
Look = Literal["loss", "calibrated", "secrets"]
Verdict = Literal["private run leaks", "only the control leaks", "neither leaks: nothing is shown"]
LOOKS: Final[tuple[Look, ...]] = ("loss", "calibrated", "secrets")
BATCH_TOKENS: Final = 16_384
_SHARES_DIFFER: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and where the truth lies with the stated confidence, both ends together."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipInference:
    """How well an attack's scores tell members from controls.

    Attributes:
        auc: probability that a member scores above a control, ties half; 0.5 is a coin.
        tpr: share of members above the threshold that a share ``fpr`` of controls exceeds.
        fpr: of ``tpr``.
        p_value: of so large an AUC where members and controls do not differ (Mann and Whitney 1947, one-sided).
        confidence: of both intervals, each on its own.
        member_scores, control_scores: one for a unit, larger is more like a member; for who wants to compute it again.
    """

    auc: Interval
    tpr: Interval
    fpr: float
    p_value: float
    confidence: float
    member_scores: tuple[float, ...] = field(repr=False)
    control_scores: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """What attacks got out of one released model.

    Attributes:
        model: ``slm`` or ``llm``.
        private: whether it was trained with DP.
        loss: membership by the loss under the released model.
        calibrated: membership by how much lower that is than under the base model.
        secrets: of every planted secret its rank under the released model.
        secrets_before: the same under the base model, which never saw them.
        secrets_p_value: of ranks so high where nothing was learnt of any secret.
    """

    model: str
    private: bool
    loss: MembershipInference
    calibrated: MembershipInference
    secrets: tuple[Exposure, ...]
    secrets_before: tuple[Exposure, ...]
    secrets_p_value: float

    @property
    def exposed(self) -> int:
        """Secrets that the model finds likelier than all other candidates."""
        return sum(secret.rank == 1 for secret in self.secrets)

    @property
    def bits(self) -> float:
        """Mean exposure; 1.44 is expected of a model that knows nothing. 0.0 without secrets."""
        return float(np.mean([secret.exposure for secret in self.secrets])) if self.secrets else 0.0

    def found(self, look: Look, significance: float) -> bool:
        """Whether this look found leakage; ``significance`` is shared by the three looks."""
        p_values = (self.loss.p_value, self.calibrated.p_value, self.secrets_p_value)
        return dict(zip(LOOKS, p_values, strict=True))[look] * len(LOOKS) < significance


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model, trained with DP and without.

    Attributes:
        verdicts: of every look. That the private run leaks is no breach of its epsilon: the guarantee limits a leak,
            it does not exclude one.
    """

    private: Leakage
    control: Leakage
    verdicts: Mapping[Look, Verdict]


def auc_interval(members: Sequence[float], controls: Sequence[float], confidence: float) -> Interval:
    """AUC with DeLong's variance (DeLong et al. 1988; by midranks, Sun and Xu 2014), on the logit scale.

    Where no score contradicts the others that variance is zero. Then the interval is Clopper and Pearson's: how many
    members, and how many controls, could behave otherwise.
    """
    placed_m, placed_n = _placements(members, controls)
    m, n, auc = placed_m.size, placed_n.size, float(placed_m.mean())
    deviation = math.sqrt(placed_m.var(ddof=1) / m + placed_n.var(ddof=1) / n)
    if deviation == 0 or auc in (0.0, 1.0):
        significance = (1 - confidence) / 4
        agree = (1 - rate_upper_bound(0, m, significance)) * (1 - rate_upper_bound(0, n, significance))
        return Interval(estimate=auc, low=auc * agree, high=1 - (1 - auc) * agree)
    margin = float(stats.norm.isf((1 - confidence) / 2)) * deviation / (auc * (1 - auc))
    logit = math.log(auc / (1 - auc))
    return Interval(estimate=auc, low=_expit(logit - margin), high=_expit(logit + margin))


def tpr_interval(members: Sequence[float], controls: Sequence[float], fpr: float, confidence: float) -> Interval:
    """True positives at a false positive rate, with an interval that is exact for continuous scores, if wide.

    What share of controls in general exceeds the i-th largest of n is Beta(i, n + 1 - i) distributed. So there is a
    control that surely fewer than ``fpr`` exceed, and one that surely more do; Clopper and Pearson's bounds of the
    members above them are the ends. Fewer than ln((1 - confidence) / 4) / ln(1 - fpr) controls (436 at 1 % and 95 %
    confidence) have no such control at the lower end: it is 0.
    """
    above, below = np.asarray(members, dtype=np.float64), -np.sort(-np.asarray(controls, dtype=np.float64))
    m, n, significance = above.size, below.size, (1 - confidence) / 4

    def hits(place: int) -> int:
        return int((above > below[place]).sum())

    places = np.arange(1, n + 1)
    surely_fewer = int((stats.beta.sf(fpr, places, n + 1 - places) <= significance).sum())
    surely_more = int((stats.beta.cdf(fpr, places, n + 1 - places) > significance).sum())
    low = 1 - rate_upper_bound(m - hits(surely_fewer - 1), m, significance) if surely_fewer else 0.0
    high = rate_upper_bound(hits(surely_more), m, significance) if surely_more < n else 1.0
    # What lies `fpr * n` controls from the top, rounded down so that no more exceed it.
    estimate = hits(min(n - 1, math.floor(fpr * n + 1e-9))) / m
    return Interval(estimate=estimate, low=low, high=high)


def infer_membership(
    members: Sequence[float], controls: Sequence[float], *, fpr: float = 0.01, confidence: float = 0.95
) -> MembershipInference:
    """Judge an attack by its scores.

    Args:
        members: scores of units that were trained on, at least two; independent of each other.
        controls: scores of units that were not, at least two, otherwise alike.
        fpr: false positive rate at which true positives are counted.
        confidence: of the intervals.

    Raises:
        InvalidValue: too few scores, one that is not finite, or a rate or confidence outside (0, 1).
    """
    for name, scores in (("members", members), ("controls", controls)):
        if len(scores) < 2 or not np.isfinite(scores).all():
            raise InvalidValue(name, f"<{len(scores)} scores>", "at least two finite scores")
    for name, value in (("fpr", fpr), ("confidence", confidence)):
        _validate.positive(**{name: value})
        if not value < 1:
            raise InvalidValue(name, value, "a number in (0, 1)")
    return MembershipInference(
        auc=auc_interval(members, controls, confidence),
        tpr=tpr_interval(members, controls, fpr, confidence),
        fpr=fpr,
        p_value=float(stats.mannwhitneyu(members, controls, alternative="greater").pvalue),
        confidence=confidence,
        member_scores=tuple(members),
        control_scores=tuple(controls),
    )


def secrets_p_value(secrets: Sequence[Exposure]) -> float:
    """How probable ranks so high are where nothing was learnt of any secret (Fisher 1925); 1.0 without secrets.

    Each secret was drawn uniformly from its candidates, so rank over candidates is at least uniform, and Fisher's
    statistic, twice the sum of -ln of it, is twice the sum of exposures in nats.
    """
    nats = math.fsum(secret.exposure for secret in secrets) * math.log(2)
    return float(stats.chi2.sf(2 * nats, 2 * len(secrets))) if secrets else 1.0


def load_released(run: Path, model: Literal["slm", "llm"]) -> AdaptedModel:
    """A finished run's model with the adapter in its PEFT folder: what whoever gets the release has.

    Raises:
        InvalidValue: the folder holds another adapter than the run's configuration says.
        ModelError: the base model cannot be loaded.
    """
    config = yaml.safe_load((run / "config.yaml").read_text())
    copied = run / "base_models" / model
    adapted = models.load(
        str(copied if copied.exists() else config["model"][model]),
        dtype=config["model"]["dtype"],
        device="cpu",
        seed=0,
        **{name: config["adapter"][name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules")},
    )
    tensors = load_file(run / f"{model}_adapter" / "adapter_model.safetensors")
    names = [name.replace(".default.", ".") for name in adapted.spec.names]  # as PEFT saves them
    if sorted(names) != sorted(tensors):
        raise InvalidValue("adapter", f"<{len(tensors)} tensors>", f"the {len(names)} of the run's configuration")
    adapted.write(np.concatenate([tensors[name].reshape(-1) for name in names]).astype(np.float32))
    return adapted


def measure(
    adapted: AdaptedModel,
    data: FederationData,
    *,
    model: str,
    private: bool,
    max_length: int,
    fpr: float = 0.01,
    confidence: float = 0.95,
) -> Leakage:
    """Attack a released model.

    Scores are taken of units, as the mean over the unit's records: records of a person are not independent. Records
    that hold a planted secret have no like among the controls and are left out.

    Args:
        adapted: the released adapter in its base model; the base is what it is with the adapter switched off.
        data: sites with members (``train``) and controls (``held_out``), and the planted secrets.
        model: ``slm`` or ``llm``, for the result.
        private: whether it was trained with DP, for the result.
        max_length: tokens per record, as in training.
        fpr: see `infer_membership`.
        confidence: see `infer_membership`.

    Raises:
        InvalidValue: sites bring members and controls in different proportions, so that a site's style would pass for
            membership; or see `infer_membership`.
    """
    planted = {(secret.prompt, secret.secret) for secret in data.secrets}
    members = [[r for r in site.train if (r.prompt, r.target) not in planted] for site in data.sites]
    controls = [list(site.held_out) for site in data.sites]
    _check_shares([len({r.unit for r in part}) for part in members], [len({r.unit for r in part}) for part in controls])
    of_units = [[r for part in parts for r in part] for parts in (members, controls)]
    released = [_unit_losses(adapted, records, max_length) for records in of_units]
    secrets = exposure(adapted.model, adapted.tokenizer, data.secrets, max_length=max_length)
    with adapted.model.disable_adapter():
        base = [_unit_losses(adapted, records, max_length) for records in of_units]
        before = exposure(adapted.model, adapted.tokenizer, data.secrets, max_length=max_length)
    by_loss = [(-losses).tolist() for losses in released]
    by_fall = [(old - new).tolist() for old, new in zip(base, released, strict=True)]
    return Leakage(
        model=model,
        private=private,
        loss=infer_membership(*by_loss, fpr=fpr, confidence=confidence),
        calibrated=infer_membership(*by_fall, fpr=fpr, confidence=confidence),
        secrets=secrets,
        secrets_before=before,
        secrets_p_value=secrets_p_value(secrets),
    )


def compare(private: Leakage, control: Leakage, *, confidence: float = 0.95) -> Comparison:
    """Lay the private run beside the same run without DP.

    Args:
        private: of the run with DP.
        control: of the run without, on the same records.
        confidence: a run that leaks nothing is said to leak with probability ``1 - confidence`` at most.

    Raises:
        InvalidValue: the two are not of one model and as many units, or not one with and one without DP.
    """
    sizes = [(len(of.loss.member_scores), len(of.loss.control_scores)) for of in (private, control)]
    if not private.private or control.private or private.model != control.model or sizes[0] != sizes[1]:
        said = f"{private.model} private={private.private}, {control.model} private={control.private}"
        raise InvalidValue("private, control", said, "one model on the same units, trained with DP and without")

    def verdict(look: Look) -> Verdict:
        if private.found(look, 1 - confidence):
            return "private run leaks"
        return "only the control leaks" if control.found(look, 1 - confidence) else "neither leaks: nothing is shown"

    return Comparison(
        private=private,
        control=control,
        verdicts={look: verdict(look) for look in LOOKS},
    )


def _placements(members: Sequence[float], controls: Sequence[float]) -> tuple[Float64, Float64]:
    """For every member the share of controls below it, for every control that of members above it; ties half."""
    m, n = len(members), len(controls)
    ranks = stats.rankdata(np.concatenate([members, controls]))
    over = (ranks[:m] - stats.rankdata(members)) / n
    under = 1 - (ranks[m:] - stats.rankdata(controls)) / m
    return over, under


def _expit(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))


def _check_shares(members: Sequence[int], controls: Sequence[int]) -> None:
    shares = [np.array(counts) / max(1, sum(counts)) for counts in (members, controls)]
    if np.abs(shares[0] - shares[1]).max(initial=0.0) > _SHARES_DIFFER:
        allowed = "every site with like shares of all members and of all controls; attack the others one by one"
        raise InvalidValue("data.sites", "<members and controls in different proportions>", allowed)


def _unit_losses(adapted: AdaptedModel, records: Sequence[Record], max_length: int) -> Float64:
    """Mean cross-entropy per target token of every record, averaged over each unit's records, [units]."""
    pairs = [(record.prompt, record.target) for record in records]
    told = log_likelihoods(adapted.model, adapted.tokenizer, pairs, max_length=max_length, batch_tokens=BATCH_TOKENS)
    examples = tokenize(records, adapted.tokenizer, max_length=max_length, append_eos=False).examples
    units: dict[tuple[str | None, str], list[float]] = defaultdict(list)
    for record, example, log_likelihood in zip(records, examples, told, strict=True):
        loss = -log_likelihood / (len(example.input_ids) - example.target_start)
        units[record.site, record.unit].append(loss)
    return np.array([float(np.mean(losses)) for losses in units.values()])
