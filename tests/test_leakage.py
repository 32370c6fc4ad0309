"""Membership inference and planted secrets: intervals against simulation, attacks that must succeed on a control.

The control is a tiny model that was trained on a few records until it knows them; beside it stands the same model with
the same data, trained by the shipped private steps at epsilon 1. At epsilon 8 these 28 units, half of them in every
batch, did show something: an AUC of 0.60 on average over twelve trainings, up to 0.71, where the control has 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import stats

from fedcollm_audits.leakage import Leakage, compare, load_released, measure, secrets_p_value
from fedcollm_audits.membership import Interval, auc_interval, infer_membership, tpr_interval
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import calibrate
from fedcollm_privacy.randomness import SecureRandom
from secure_fedcollm.data import FederationData, SiteData
from secure_fedcollm.evaluation import log_likelihoods
from secure_fedcollm.exposure import Exposure
from secure_fedcollm.records import PlantedSecret, Record
from secure_fedcollm.tokenization import tokenize
from secure_fedcollm.training import (
    LocalTraining,
    Paid,
    prove_records_independent,
    records_of_units,
    train_non_private,
    train_private,
)

# ---------------------------------------------------------------- statistics


def scores(rng: np.random.Generator, m: int, n: int, shift: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return rng.normal(shift, 1, m), rng.normal(0, 1, n)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_its_p_value_are_those_of_mann_and_whitney(ties: bool) -> None:
    members, controls = scores(np.random.default_rng(0), 40, 25, 0.7)
    if ties:
        members, controls = members.round(0), controls.round(0)
    found = infer_membership(members.tolist(), controls.tolist())
    expected = stats.mannwhitneyu(members, controls, alternative="greater")
    assert found.auc.estimate == pytest.approx(expected.statistic / (40 * 25), abs=1e-12)
    assert found.p_value == expected.pvalue
    pairs = [(x > y) + (x == y) / 2 for x, y in itertools.product(members, controls)]
    assert found.auc.estimate == pytest.approx(np.mean(pairs), abs=1e-12)


def test_delongs_variance_is_that_of_his_definition() -> None:
    """Section 3 of DeLong et al. 1988, pair by pair."""
    members, controls = scores(np.random.default_rng(3), 12, 9, 0.5)
    wins_MN = (members[:, None] > controls[None, :]).astype(float)
    auc = wins_MN.mean()
    by_member, by_control = wins_MN.mean(axis=1) - auc, wins_MN.mean(axis=0) - auc
    deviation = math.sqrt((by_member**2).sum() / 11 / 12 + (by_control**2).sum() / 8 / 9)
    found = auc_interval(members.tolist(), controls.tolist(), 0.9)
    logit, margin = math.log(auc / (1 - auc)), stats.norm.ppf(0.95) * deviation / (auc * (1 - auc))
    assert (found.low, found.high) == pytest.approx(tuple(1 / (1 + np.exp(-logit + np.array([margin, -margin])))))


@pytest.mark.parametrize(("m", "n", "shift"), [(30, 30, 0.0), (100, 25, 0.7), (40, 40, 1.5)])
def test_the_interval_of_the_auc_covers_the_truth_as_often_as_it_says(m: int, n: int, shift: float) -> None:
    rng, runs = np.random.default_rng(1), 1500
    truth = stats.norm.cdf(shift / math.sqrt(2))
    found = [auc_interval(*map(list, scores(rng, m, n, shift)), 0.95) for _ in range(runs)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert covered >= 0.95 - 0.015  # DeLong's interval is asymptotic


@pytest.mark.parametrize(("n", "fpr", "shift"), [(300, 0.05, 0.0), (300, 0.05, 1.5), (600, 0.01, 2.0), (50, 0.01, 2.0)])
def test_the_interval_of_the_true_positives_covers_the_truth_at_least_as_often_as_it_says(
    n: int, fpr: float, shift: float
) -> None:
    """The truth is at the false positive rate that all controls there are have, not those that were drawn."""
    rng, runs = np.random.default_rng(2), 600
    truth = stats.norm.sf(stats.norm.isf(fpr) - shift)
    found = [tpr_interval(*map(list, scores(rng, 200, n, shift)), fpr, 0.9) for _ in range(runs)]
    missed = np.mean([not one.low <= truth <= one.high for one in found])
    assert missed <= 0.1 + 4 * math.sqrt(0.09 / runs)
    assert all(one.low <= one.estimate <= one.high for one in found)
    assert (n == 50) == all(one.low == 0 for one in found)


def test_true_positives_are_counted_above_the_control_that_the_rate_allows() -> None:
    controls = [float(i) for i in range(100)]
    assert tpr_interval([98.5, 99.5, 98.0, 50.0], controls, 0.01, 0.95).estimate == 0.5  # above 98, one control
    assert tpr_interval([98.5, 99.5, 98.0, 50.0], controls, 0.009, 0.95).estimate == 0.25  # above 99, none
    assert tpr_interval([60.0, 40.0], controls, 0.5, 0.95).estimate == 0.5


def test_perfect_and_worst_separation_and_nothing_but_ties_have_intervals_too() -> None:
    high, low = [2.0] * 30, [1.0] * 20
    for members, controls, estimate in ((high, low, 1.0), (low, high, 0.0), (high, high, 0.5)):
        found = auc_interval(members, controls, 0.95)
        assert found.estimate == estimate
        assert found.low <= estimate <= found.high
        assert found.high - found.low > 0.1
    # Whoever has 30 members and 20 controls apart knows that so many of both behave so, with 1.25 % error each.
    agree = 0.0125 ** (1 / 30) * 0.0125 ** (1 / 20)
    assert auc_interval(high, low, 0.95).low == pytest.approx(agree)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("members", {"members": [1.0]}),
        ("controls", {"controls": [1.0, math.nan]}),
        ("fpr", {"fpr": 0.0}),
        ("fpr", {"fpr": 1.0}),
        ("confidence", {"confidence": 1.0}),
    ],
)
def test_impossible_scores_are_refused(field: str, arguments: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"members": [1.0, 2.0], "controls": [1.0, 2.0]} | arguments
    with pytest.raises(InvalidValue, match=field):
        infer_membership(fields.pop("members"), fields.pop("controls"), **fields)


def ranked(ranks: Sequence[int], candidates: int = 1000) -> tuple[Exposure, ...]:
    return tuple(
        Exposure(
            site="a",
            prompt="code:",
            secret=" 1",
            repetitions=1,
            candidates=candidates,
            rank=rank,
            exposure=math.log2(candidates / rank),
        )
        for rank in ranks
    )


def test_the_p_value_of_ranks_is_small_as_seldom_as_it_says_and_fishers() -> None:
    rng = np.random.default_rng(0)
    found = np.array([secrets_p_value(ranked(rng.integers(1, 1001, 4).tolist())) for _ in range(4000)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(found <= level) <= level + 4 * math.sqrt(level * (1 - level) / 4000)
    fisher = stats.combine_pvalues([0.003, 0.2, 0.5], method="fisher").pvalue
    assert secrets_p_value(ranked([3, 200, 500])) == pytest.approx(fisher)
    assert secrets_p_value(()) == 1.0


# ---------------------------------------------------------------- attacks on models


CODES = tuple(f" {code:03d}" for code in range(0, 1000, 5))
REPETITIONS = 6
LENGTH = 48


def letters(rng: np.random.Generator, count: int) -> str:
    return "".join(rng.choice(list("abcdefghijklmnop "), count))


def people(rng: np.random.Generator, count: int, name: str) -> tuple[Record, ...]:
    return tuple(
        Record(prompt=letters(rng, 6) + ":", target=" " + letters(rng, 12).strip() + ".", site="a", unit=f"{name}{i}")
        for i in range(count)
    )


@pytest.fixture(scope="module")
def data() -> FederationData:
    """One site: 24 records that are trained on, 24 alike that are not, and four secrets, each a unit of six records.

    With this seed the untrained model tells the two apart no better than a coin (AUC 0.48).
    """
    rng = np.random.default_rng(3)
    secrets = tuple(
        PlantedSecret(site="a", prompt=prompt, secret=secret, candidates=CODES, repetitions=REPETITIONS)
        for prompt, secret in zip(("Door:", "Safe:", "Gate:", "Alarm:"), CODES[31::50], strict=True)
    )
    planted = [
        Record(prompt=secret.prompt, target=secret.secret, site="a", unit=f"secret{number}")
        for number, secret in enumerate(secrets)
        for _ in range(REPETITIONS)
    ]
    site = SiteData(name="a", train=(*people(rng, 24, "in"), *planted), held_out=people(rng, 24, "out"))
    return FederationData(sites=(site,), public_train=(), public_test=(), append_eos=True, secrets=secrets)


STEPS, BATCH = 200, 12
HOW = LocalTraining(learning_rate=0.02, batch_tokens=4096)


@pytest.fixture(scope="module")
def control(load_tiny: Callable[..., Any], data: FederationData) -> Leakage:
    adapted = load_tiny("llama", r=8)
    adapted_spec = adapted.shared_spec("factor_average")
    train_non_private(
        adapted=adapted,
        spec=adapted_spec,
        tokens=tokenize(data.sites[0].train, adapted.tokenizer, max_length=LENGTH, append_eos=True),
        steps=STEPS,
        batch_size=BATCH,
        seed=0,
        how=HOW,
        on_step=lambda: None,
    )
    return measure(adapted, data, model="slm", private=False, max_length=LENGTH)


@pytest.fixture(scope="module")
def private(load_tiny: Callable[..., Any], data: FederationData, tmp_path_factory: pytest.TempPathFactory) -> Leakage:
    adapted = load_tiny("llama", r=8)
    adapted_spec = adapted.shared_spec("factor_average")
    tokens = tokenize(data.sites[0].train, adapted.tokenizer, max_length=LENGTH, append_eos=True)
    plan = calibrate(
        target_epsilon=1.0,
        delta=1e-5,
        unit="person",
        max_records_per_unit=3,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
        steps_per_round=STEPS,
        rounds=1,
        units=len(records_of_units(tokens)),
    )
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "a.sqlite", SigningKey.generate("a"))
    ledger.commit_plan(run_id="r", data_set="d", plan=plan, caps=(Cap(epsilon=1.01, delta=1e-4),))
    paid = Paid(
        plan=plan,
        reservation=ledger.reserve(run_id="r", plan=plan, server_round=1),
        independence=prove_records_independent(adapted, adapted_spec, tokens.pad_token_id),
        random=SecureRandom(),
    )
    train_private(adapted=adapted, spec=adapted_spec, tokens=tokens, paid=paid, how=HOW, on_step=lambda: None)
    return measure(adapted, data, model="slm", private=True, max_length=LENGTH)


def test_a_model_that_knows_its_records_by_heart_is_found_out_by_every_look(control: Leakage) -> None:
    for attack in (control.loss, control.calibrated):
        assert attack.auc.low > 0.6
        assert attack.p_value < 1e-6
        assert attack.tpr.estimate > 0.5
        assert (len(attack.member_scores), len(attack.control_scores)) == (24, 24)  # the secrets' units stay out
    assert [secret.rank for secret in control.secrets] == [1, 1, 1, 1]
    assert (control.exposed, control.bits) == (4, pytest.approx(math.log2(200)))
    assert control.secrets_p_value < 1e-5
    assert all(before.rank > 1 for before in control.secrets_before)


def test_the_same_training_with_dp_shows_neither_members_nor_secrets(private: Leakage) -> None:
    """The noise is fresh at every run, so the bounds are loose: each is passed by chance less than once in 10,000."""
    for attack in (private.loss, private.calibrated):
        assert attack.auc.estimate < 0.5 + 3.9 * math.sqrt(49 / (12 * 24 * 24))
    assert private.exposed < 2
    assert private.secrets_p_value > 1e-4


def test_beside_each_other_the_two_say_that_the_looks_work_and_dp_stops_them(
    control: Leakage, private: Leakage
) -> None:
    found = compare(private, control, confidence=1 - 1e-4)
    assert dict(found.verdicts) == dict.fromkeys(("loss", "calibrated", "secrets"), "only the control leaks")
    leaking = compare(replace(control, private=True), control)
    assert set(leaking.verdicts.values()) == {"private run leaks"}
    silent = compare(private, replace(private, private=False), confidence=1 - 1e-4)
    assert set(silent.verdicts.values()) == {"neither leaks: nothing is shown"}


def test_what_cannot_be_compared_is_refused(control: Leakage, private: Leakage) -> None:
    fewer = infer_membership([1.0, 2.0], [0.0, 1.0])
    for one, other in (
        (control, private),
        (private, private),
        (private, replace(control, model="llm")),
        (private, replace(control, loss=fewer)),
    ):
        with pytest.raises(InvalidValue, match="one model on the same units"):
            compare(one, other)


def test_a_units_score_is_the_mean_loss_per_token_of_its_records(
    load_tiny: Callable[..., Any], data: FederationData
) -> None:
    adapted = load_tiny("llama", trained=True)
    site = data.sites[0]
    merged = tuple(replace(record, unit=f"pair{i // 2}") for i, record in enumerate(site.train[:24]))
    changed = replace(data, sites=(replace(site, train=merged),), secrets=())
    found = measure(adapted, changed, model="slm", private=False, max_length=LENGTH)

    def loss(record: Record) -> float:
        (told,) = log_likelihoods(
            adapted.model, adapted.tokenizer, [(record.prompt, record.target)], max_length=LENGTH, batch_tokens=1
        )
        whole, prompt = (adapted.tokenizer.encode(t) for t in (record.prompt + record.target, record.prompt))
        return -told / (len(whole) - len(prompt))

    by_unit = [-(loss(merged[i]) + loss(merged[i + 1])) / 2 for i in range(0, 24, 2)]
    assert found.loss.member_scores == pytest.approx(by_unit, rel=1e-4)
    assert found.secrets == ()
    assert (found.exposed, found.bits, found.secrets_p_value) == (0, 0.0, 1.0)
    with adapted.model.disable_adapter():
        base = [-(loss(merged[i]) + loss(merged[i + 1])) / 2 for i in range(0, 24, 2)]
    assert found.calibrated.member_scores == pytest.approx(np.subtract(by_unit, base), rel=1e-3, abs=1e-4)


def test_an_untrained_adapter_shows_nothing(load_tiny: Callable[..., Any], data: FederationData) -> None:
    found = measure(load_tiny("llama"), data, model="slm", private=False, max_length=LENGTH)
    assert set(found.calibrated.member_scores) == {0.0}
    assert found.calibrated.auc.estimate == 0.5
    assert [s.rank for s in found.secrets] == [s.rank for s in found.secrets_before]


def test_sites_of_different_proportions_are_refused(load_tiny: Callable[..., Any], data: FederationData) -> None:
    """Or a site's style would pass for membership."""
    site = data.sites[0]
    other = SiteData(name="b", train=site.train[:4], held_out=site.held_out)
    with pytest.raises(InvalidValue, match="different proportions"):
        measure(load_tiny("llama"), replace(data, sites=(site, other)), model="slm", private=False, max_length=LENGTH)


def test_what_a_run_released_is_read_from_its_peft_folder(
    load_tiny: Callable[..., Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    adapted = load_tiny("llama", trained=True)
    adapted.save(tmp_path / "slm_adapter")
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "aggregation": "rebase"}
    config = {"model": {"slm": str(tiny_checkpoint("llama")), "dtype": "float32"}, "adapter": adapter}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert np.array_equal(load_released(tmp_path, "slm").read(), adapted.read())
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config | {"adapter": adapter | {"target_modules": ["q_proj"]}})
    )
    with pytest.raises(InvalidValue, match="the run's configuration"):
        load_released(tmp_path, "slm")


def test_an_interval_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Interval(estimate=0.5, low=0.4, high=0.6).low = 0.0  # type: ignore[misc]
