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
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats

from fedcollm_audits.membership import MembershipInference, infer_membership
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
    "Leakage",
    "compare",
    "find_members",
    "load_released",
    "measure",
    "rank_secrets",
    "secrets_p_value",
]

Float64 = NDArray[np.float64]
Look = Literal["loss", "calibrated", "secrets"]
Verdict = Literal["private run leaks", "only the control leaks", "neither leaks: nothing is shown"]
LOOKS: Final[tuple[Look, ...]] = ("loss", "calibrated", "secrets")
BATCH_TOKENS: Final = 16_384
_SHARES_DIFFER: Final = 0.05


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
    loss, calibrated = find_members(adapted, data, max_length=max_length, fpr=fpr, confidence=confidence)
    secrets, before = rank_secrets(adapted, data, max_length=max_length)
    return Leakage(
        model=model,
        private=private,
        loss=loss,
        calibrated=calibrated,
        secrets=secrets,
        secrets_before=before,
        secrets_p_value=secrets_p_value(secrets),
    )


def find_members(
    adapted: AdaptedModel, data: FederationData, *, max_length: int, fpr: float = 0.01, confidence: float = 0.95
) -> tuple[MembershipInference, MembershipInference]:
    """Both membership attacks on a released model, the loss attack first; arguments and errors as in `measure`."""
    planted = {(secret.prompt, secret.secret) for secret in data.secrets}
    members = [[r for r in site.train if (r.prompt, r.target) not in planted] for site in data.sites]
    controls = [list(site.held_out) for site in data.sites]
    _check_shares([len({r.unit for r in part}) for part in members], [len({r.unit for r in part}) for part in controls])
    of_units = [[r for part in parts for r in part] for parts in (members, controls)]
    released = [_unit_losses(adapted, records, max_length) for records in of_units]
    with adapted.model.disable_adapter():
        base = [_unit_losses(adapted, records, max_length) for records in of_units]
    by_loss = [(-losses).tolist() for losses in released]
    by_fall = [(old - new).tolist() for old, new in zip(base, released, strict=True)]
    loss = infer_membership(*by_loss, fpr=fpr, confidence=confidence)
    return loss, infer_membership(*by_fall, fpr=fpr, confidence=confidence)


def rank_secrets(
    adapted: AdaptedModel, data: FederationData, *, max_length: int
) -> tuple[tuple[Exposure, ...], tuple[Exposure, ...]]:
    """Every planted secret's rank under the released model, and under its base, which never saw it."""
    after = exposure(adapted.model, adapted.tokenizer, data.secrets, max_length=max_length)
    with adapted.model.disable_adapter():
        return after, exposure(adapted.model, adapted.tokenizer, data.secrets, max_length=max_length)


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
