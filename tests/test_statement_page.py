"""The statement's page says what was promised, never less than the number, and NOT PRIVATE where nothing was."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm import statement_page
from secure_fedcollm.statement_page import delta, epsilon, meaning, odds, render_statement, share, visible

SITES = ("riverside", "hillcrest", "lakeview")
DIGEST = "5d41" * 16
EVIL = "<script>alert('x')</script><img src=x onerror=y>\"'><svg onload=z>{{ 7*7 }}"
VOID = {"meta", "br", "link", "img", "hr", "input", "col"}


def a_statement() -> dict[str, Any]:
    return {
        "run_id": "run-7f3a",
        "private": True,
        "claim": "Whoever sees all models learns about any one record at most what (epsilon, delta) allows.",
        "data": {"declared": "private", "sites": list(SITES)},
        "rounds": {"planned": 6, "opened": 5, "lost": 1},
        "transcript": {"head": DIGEST, "events": 88},
        "rosters": [DIGEST],
        "adapters": {"slm": "1" * 64, "llm": "2" * 64},
        "versions": {"torch": "2.13.0"},
        "code": "3" * 64,
        "server": {"name": "coordinator", "public_key": "4" * 64},
        "unit": "record",
        "neighboring_relation": "add or remove one unit",
        "mechanism": "DP-SGD with Poisson sampling",
        "trust_model": "local to each site",
        "views": "per site",
        "accounting": {"accountant": "PLD", "assumes": "the plan was committed before training"},
        "randomness": "AES-256-CTR",
        "floating_point": "a lattice",
        "covered": "all adapters",
        "not_covered": ["the choice of settings", "that a site took part"],
        "assumptions": ["three sites are honest", "randomness is good"],
        "nist_sp_800_226": {"base": "collected for care", "middle": ["DP-SGD", "utility"], "top": "epsilon and unit"},
        "dp_fy_ml": {"accounting": "PLD", "definition": "add or remove", "setting": "local", "transparency": "public"},
        "sites": {
            site: {
                "epsilon": 7.9912 - i,
                "delta": 1.04e-5,
                "steps_reserved": 120,
                "views": {"one_update_seen": 15.301, "only_sums_and_models_seen": 7.9912 - i},
                "other_units": {"a person with 2 records": 13.777},
                "gdp_mu": 1.531,
                "privacy_profile": {"0.1": 0.51, "1": 0.3, "16": 1e-14, "8": 9.91e-6},
                "plan": {"noise_multiplier": 0.83, "sample_rate": f"16/{400 + i}"},
                "plan_digest": "6" * 64,
                "caps": [
                    {"epsilon": 20.0, "delta": 1e-4, "days": None},
                    {"epsilon": 8.5, "delta": 1e-5, "days": 365},
                ],
                "policy": "7" * 64,
                "ledger": {"ledger": "8" * 64, "head": "9" * 64, "tree_size": 41, "tree_root": "a" * 64},
            }
            for i, site in enumerate(SITES)
        },
    }


class Structure(HTMLParser):
    """What a page is made of; fails on a tag that closes what was not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parents: list[tuple[str, ...]] = []
        self.headings: list[int] = []
        self.tables: list[list[str]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parents.append(tuple(self.open))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self.tables.append([])
        elif "table" in self.open:
            self.tables[-1].append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parents.append(tuple(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    @property
    def flat(self) -> str:
        return re.sub(r"\s+", " ", self.text)

    def check(self) -> None:
        """What holds for every page: well-formed, self-contained, in order, usable without eyes or mouse."""
        assert self.open == []
        names = [tag for tag, _ in self.tags]
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        referred = {
            name
            for _, attrs in self.tags
            for key in ("aria-labelledby", "aria-describedby")
            for name in (attrs.get(key) or "").split()
        }
        links = [attrs.get("href") or "" for tag, attrs in self.tags if tag == "a"]
        assert all(link.startswith("#") for link in links)
        assert referred | {link[1:] for link in links} <= set(ids)

        assert not {"script", "link", "iframe", "img", "object", "embed", "form", "base", "video"} & set(names)
        assert not {"src", "srcset", "xlink:href"} & {key for _, attrs in self.tags for key in attrs}
        assert not any(key.startswith("on") for _, attrs in self.tags for key in attrs)

        assert self.headings[0] == 1
        assert self.headings.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(self.headings, self.headings[1:], strict=False))
        assert names[0] == "html"
        assert self.tags[0][1].get("lang") == "en"
        for landmark in ("header", "main", "footer"):
            assert names.count(landmark) == 1
            assert self.parents[names.index(landmark)] == ("html", "body")
        skip = next(attrs for tag, attrs in self.tags if tag == "a")
        assert skip["href"] == "#content"
        assert dict(self.tags[names.index("main")][1])["id"] == "content"

        for table in self.tables:
            assert table[0] == "caption"
            assert "thead" in table
        assert all(attrs.get("scope") in ("col", "row") for tag, attrs in self.tags if tag == "th")
        for tag, attrs in self.tags:
            if attrs.get("role") == "region" or tag in ("nav", "figure"):
                assert attrs.get("aria-label")
            if attrs.get("role") == "region":
                assert attrs.get("tabindex") == "0"
            if tag == "svg":
                assert attrs.get("aria-labelledby") or attrs.get("aria-hidden") == "true"


def page(statement: Any, **changes: Any) -> Structure:
    options: dict[str, Any] = {"payload_sha256": DIGEST, "signers": ["coordinator", "riverside"]}
    return Structure(render_statement(statement, **options | changes))


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_is_sound_self_contained_and_the_same_again() -> None:
    html = render_statement(a_statement(), payload_sha256=DIGEST, signers=["coordinator"])
    Structure(html).check()
    assert not re.search(r"https?:|//[a-z]|@import|data:|file:|javascript:|url\(", html)
    assert html == render_statement(a_statement(), payload_sha256=DIGEST, signers=["coordinator"])


def test_every_number_of_every_site_is_there_and_rounded_up() -> None:
    text = page(a_statement()).flat
    for site, spent in zip(SITES, ("8.00", "7.00", "6.00"), strict=True):
        row = rf"{site}\s*{spent}\s*1\.1e-5\s*one record\s*{spent}\s*15\.31\s*a person with 2 records: 13\.78"
        row += r"\s*1\.54\s*120"
        assert re.search(row, text), site
    assert re.search(r"ε = 0\.1\s*ε = 1\s*ε = 8\s*ε = 16", text)
    assert re.search(r"riverside\s*0\.51\s*0\.3\s*1e-5\s*1e-14", text)


def test_what_a_lawyer_asks_for_is_there() -> None:
    text = page(a_statement()).flat
    for words in (
        "A PROMISE WITH A NUMBER", "weakest promise in this run is ε = 8.00 with δ = 1.1e-5, at riverside",
        "not one person", "three sites are honest", "that a site took part", "add or remove one unit",
        "tier 2, reasonable protection", "fedcollm-audit RUN_DIR", DIGEST, "6" * 64, "9" * 64, "4" * 64,
        "ε 20.00, δ 1e-4 for ever; ε 8.50, δ 1e-5 in 365 days", "6 planned, 5 opened, 1 lost",
        "would let a guess be right in over 99.9 % of cases",
    ):  # fmt: skip
        assert words in text, words


def test_the_guides_are_told_from_the_top_of_the_pyramid_whatever_their_order_in_json() -> None:
    text = page(a_statement()).flat
    places = [text.index(words) for words in ("epsilon and unit", "utility", "collected for care")]
    assert places == sorted(places)
    report = text[text.index("How to DP-fy ML” (2023") :]
    headings = [report.index(word) for word in ("setting", "definition", "accounting", "transparency")]
    assert headings == sorted(headings)


def test_a_plan_that_differs_between_sites_is_told_for_each() -> None:
    text = page(a_statement()).flat
    assert re.search(r"riverside: 16/400\s*hillcrest: 16/401\s*lakeview: 16/402", text)
    assert text.count("0.83") == 1


def test_the_in_toto_statement_around_it_brings_its_files() -> None:
    wrapped = {
        "predicate": a_statement(),
        "subject": [{"name": "slm_adapter/a.safetensors", "digest": {"sha256": "b" * 64}}],
    }
    whole = page(wrapped)
    whole.check()
    assert re.search(rf"slm_adapter/a\.safetensors\s*{'b' * 64}", whole.flat)


@pytest.mark.parametrize("key", ["assumptions", "not_covered"])
def test_one_text_in_place_of_a_list_is_one_item(key: str) -> None:
    assert "<li>all in one</li>" in render_statement(
        a_statement() | {key: "all in one"}, payload_sha256=DIGEST, signers=[]
    )


def test_a_person_is_not_told_that_persons_are_less_protected() -> None:
    statement = a_statement() | {"unit": "person"}
    assert "not one person" not in page(statement).flat


@pytest.mark.parametrize("spent", [10.01, 23.4, 5e6])
def test_a_large_epsilon_is_called_weak_at_the_top(spent: float) -> None:
    statement = a_statement()
    statement["sites"]["hillcrest"]["epsilon"] = spent
    whole = page(statement)
    assert "A WEAK PROMISE" in whole.text
    assert "A PROMISE WITH A NUMBER" not in whole.text
    assert "at hillcrest: tier 3, weak or no formal protection" in whole.flat


@pytest.mark.parametrize(
    "changes",
    [{"private": False}, {"private": None}, {"private": "true"}, {"private": 1}, {"sites": {}}, {"sites": None}],
)
def test_a_run_that_promises_nothing_says_so_before_all_else(changes: dict[str, Any]) -> None:
    whole = page(a_statement() | changes)
    whole.check()
    assert whole.flat.index("NOT PRIVATE") < whole.flat.index("Whoever sees")
    assert "promises nobody anything" in whole.flat
    assert "What is promised" not in whole.flat
    assert "A PROMISE" not in whole.flat


@pytest.mark.parametrize(
    ("sound", "broken"),
    [
        ("<caption>", "<p></p><caption>"), ("</main>", ""), ('scope="col"', 'scope="cell"'), ("<h2", "<h4"),
        ('id="limits"', 'id="promise"'), ('href="#content"', 'href="#nowhere"'), ('lang="en"', ""),
        ("<footer>", "<footer><img src=x>"), ('tabindex="0"', ""), ('aria-label="Contents"', ""),
        ('<a class="skip" href="#content">', '<a class="skip" href="https://example.org">'), ("<h1>", "<h1></h1><h1>"),
    ],
)  # fmt: skip
def test_the_structural_check_sees_a_planted_break(sound: str, broken: str) -> None:
    html = render_statement(a_statement(), payload_sha256=DIGEST, signers=[])
    assert sound in html
    with pytest.raises(AssertionError):
        Structure(re.sub(re.escape(sound), broken, html, count=1)).check()


@pytest.mark.parametrize("key", [None, *a_statement()])
@pytest.mark.parametrize("private", [True, False])
def test_any_field_may_be_missing(key: str | None, private: bool) -> None:
    statement = (a_statement() | {"private": private}) if key else {}
    statement.pop(key or "", None)
    whole = page(statement, signers=[])
    whole.check()
    assert ("NOT PRIVATE" in whole.text) == (not private or key in (None, "private", "sites"))
    assert "nobody: this statement is only a text" in whole.flat


@pytest.mark.parametrize("key", [k for k in a_statement()["sites"]["lakeview"] if k not in ("epsilon", "delta")])
def test_what_only_refines_a_site_may_be_missing_or_nonsense(key: str) -> None:
    for junk in (None, 3, "x", [1], {"x": 1}, {"x": None}, float("nan")):
        statement = a_statement()
        statement["sites"]["lakeview"][key] = junk
        page(statement).check()


@pytest.mark.parametrize("key", ["epsilon", "delta"])
@pytest.mark.parametrize("junk", [None, "8", True, -1.0, math.nan, math.inf, [8.0]])
def test_a_private_site_without_its_numbers_is_refused_by_name(key: str, junk: Any) -> None:
    statement = a_statement()
    statement["sites"]["lakeview"][key] = junk
    with pytest.raises(InvalidValue, match=key):
        page(statement)


@pytest.mark.parametrize("changes", [{"sites": [1]}, {"sites": {"a": 3}}, {"predicate": "x"}])
def test_what_is_no_statement_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        page(a_statement() | changes)


def poisoned(value: Any) -> Any:
    if isinstance(value, str):
        return EVIL
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    return value


def test_hostile_texts_stay_texts() -> None:
    statement = poisoned(a_statement())
    statement["sites"] = {f"{EVIL}{i}": row for i, row in enumerate(statement["sites"].values())}
    for row in statement["sites"].values():
        for key in ("other_units", "privacy_profile", "plan", "ledger"):
            row[key] = {EVIL: 0.5, **row[key]}
    for key in ("nist_sp_800_226", "dp_fy_ml", "accounting", "versions", "rounds"):
        statement[key] = {EVIL: EVIL}
    whole = page(
        {"predicate": statement, "subject": [{"name": EVIL, "digest": {"sha256": EVIL}}]},
        payload_sha256=EVIL,
        signers=[EVIL],
    )
    whole.check()
    assert whole.text.count(EVIL) > 40
    assert "49" not in whole.text


def test_text_that_hides_or_turns_is_made_visible() -> None:
    hidden = "fine\u202eenif\u2066\u200b\x1b[2J\ud800\x00"
    html = render_statement(a_statement() | {"claim": hidden}, payload_sha256=DIGEST, signers=[])
    html.encode("utf-8")
    assert "fine\ufffdenif\ufffd\ufffd\ufffd[2J\ufffd\ufffd" in html


@given(st.text())
@settings(max_examples=100)
def test_visible_text_can_be_encoded_and_keeps_what_can_be_seen(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert len(shown) == len(text)
    assert all(b in (a, "\ufffd") for a, b in zip(text, shown, strict=True))
    assert visible("Zürich, 2 × 3\n– 健康 – ε\u202f≤\u202f1") == "Zürich, 2 × 3\n– 健康 – ε\u202f≤\u202f1"


# ---------------------------------------------------------------------------------------------- numbers


@given(st.floats(0, 1e6))
@settings(max_examples=200)
def test_a_shown_epsilon_is_never_smaller_than_it_is(spent: float) -> None:
    assert spent <= float(epsilon(spent)) <= spent + 0.01 + 1e-9


@given(st.floats(1e-300, 1))
@settings(max_examples=200)
def test_a_shown_delta_is_never_smaller_than_it_is(allowance: float) -> None:
    shown = Decimal(delta(allowance))
    assert Decimal(repr(allowance)) <= shown <= Decimal(repr(allowance)) * Decimal("1.1")


@given(st.floats(0, 1))
@settings(max_examples=200)
def test_a_shown_share_is_never_smaller_than_it_is(probability: float) -> None:
    shown = share(probability)
    if shown.startswith("over"):
        assert probability > 0.999
    else:
        percent = Decimal(shown.removesuffix("\u202f%"))
        assert Decimal(repr(100 * probability)) <= percent <= Decimal(repr(100 * probability)) + Decimal("0.1")


@pytest.mark.parametrize(
    ("text", "shown"),
    [(delta(0), "0"), (delta(1), "1"), (delta(0.1234), "0.13"), (delta(1e-5), "1e-5"), (delta(1.01e-5), "1.1e-5"),
     (delta(9.99e-6), "1e-5"), (delta(None), "none stated"), (delta(math.nan), "none stated"),
     (epsilon("8"), "none stated"), (epsilon(7.9901), "8.00"), (odds(2980.96), "2\u202f981"), (odds(2.7182), "2.72"),
     (odds(math.inf), "more than a million"), (share(0.5), "50.0\u202f%"), (share(0.50001), "50.1\u202f%")],
)  # fmt: skip
def test_numbers_are_written_as_people_read_them(text: str, shown: str) -> None:
    assert text == shown


def randomized_response(epsilon_: float, delta_: float) -> tuple[np.ndarray, np.ndarray]:
    """The worst (epsilon, delta)-DP mechanism (Kairouz, Oh, Viswanath 2015): answers without and with the unit."""
    right, wrong = np.array([math.exp(epsilon_), 1]) * (1 - delta_) / (1 + math.exp(epsilon_))
    return np.array([delta_, right, wrong, 0]), np.array([0, wrong, right, delta_])


def best_power(without: np.ndarray, with_it: np.ndarray, alarms: float) -> float:
    """Neyman and Pearson: the most powerful test of the level, by sorting likelihood ratios."""
    ratio = np.divide(with_it, without, out=np.full(4, np.inf), where=without > 0)
    power, left = 0.0, alarms
    for i in np.argsort(-ratio):
        part = 1.0 if without[i] == 0 else min(1.0, left / without[i])
        power, left = power + part * with_it[i], left - part * without[i]
    return power


@given(st.floats(0, 20), st.floats(0, 0.2))
@settings(max_examples=100)
def test_the_worst_case_is_that_of_the_worst_mechanism(epsilon_: float, delta_: float) -> None:
    without, with_it = randomized_response(epsilon_, delta_)
    found = meaning(epsilon_, delta_)
    assert found.guess == pytest.approx(0.5 * np.maximum(without, with_it).sum(), abs=1e-12)
    assert found.guess_whole == found.guess
    assert found.caught == pytest.approx(best_power(without, with_it, 0.01), abs=1e-9)
    assert found.odds == pytest.approx(math.exp(epsilon_))


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.5, 4.0])
def test_a_gaussian_mechanism_is_read_from_its_mu_and_bounded_by_its_profile(mu: float) -> None:
    profile = {e: stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
               for e in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}  # fmt: skip
    truth = stats.norm.cdf(mu / 2), stats.norm.cdf(stats.norm.ppf(0.01) + mu)
    by_mu = meaning(8.0, profile[8.0], mu=mu)
    assert (by_mu.guess_whole, by_mu.caught) == pytest.approx(truth, abs=2e-9)
    by_profile = meaning(8.0, profile[8.0], profile=profile)
    assert truth[0] - 1e-12 <= by_profile.guess_whole <= by_profile.guess
    assert truth[1] - 1e-12 <= by_profile.caught <= meaning(8.0, profile[8.0]).caught


@pytest.mark.parametrize(("value", "tier"), [(0.0, 1), (1.0, 1), (1.001, 2), (10.0, 2), (10.001, 3), (1e9, 3)])
def test_tiers_are_those_of_the_paper(value: float, tier: int) -> None:
    assert meaning(value, 1e-6).tier.startswith(f"tier {tier},")


@pytest.mark.parametrize(
    "arguments",
    [{"epsilon": math.nan, "delta": 0.0}, {"epsilon": -1.0, "delta": 0.0}, {"epsilon": 1.0, "delta": 1.5},
     {"epsilon": 1.0, "delta": 0.0, "mu": math.nan}, {"epsilon": 1.0, "delta": 0.0, "profile": {1.0: 2.0}}],
)  # fmt: skip
def test_numbers_that_are_no_guarantee_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        meaning(**arguments)


# ---------------------------------------------------------------------------------------------- the style sheet


def variables(css: str) -> list[dict[str, str]]:
    blocks = re.findall(r":root \{([^}]*--paper[^}]*)\}", css)
    return [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in blocks]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    """WCAG 2.2."""
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_every_text_colour_has_enough_contrast_in_light_and_dark() -> None:
    modes = variables(statement_page.stylesheet())
    assert len(modes) == 2
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for mode in modes:
        for text in ("ink", "muted", "slm", "good", "bad", "amber"):
            for ground in ("paper", "card"):
                assert contrast(mode[text], mode[ground]) >= 4.5, (text, ground)
        for text in ("ink", "amber"):
            assert contrast(mode[text], mode["amber-bg"]) >= 4.5
    assert contrast("#ffffff", "#b3161b") >= 4.5


def test_the_pages_are_one_family_with_the_report() -> None:
    report = Path(statement_page.__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    assert variables(statement_page.stylesheet()) == variables(report)


def test_the_sheet_serves_print_narrow_screens_and_keyboards() -> None:
    css = str(statement_page.stylesheet())
    for rule in ("@media print", "max-width: 640px", "prefers-color-scheme: dark", ":focus-visible", "size: A4"):
        assert rule in css
    assert "<" not in css
