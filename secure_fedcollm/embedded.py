"""The embedded default: four fictional hospitals, a public set, and planted secrets, all synthetic.

The hospitals (``st-anselm``, ``larkhollow``, ``brackwater``, ``fernmoor``), their patients and every note are
generated; no person stands behind a record. Each hospital is strong in one speciality and weak in the others, so
the sites are non-IID in what they treat and in how they write. The public set D_a has other patients and is mostly
first visits; of every second illness of a speciality it knows the picture only and treats it at random: what helps
there can be learned from the hospitals alone. Door codes and the like are planted as canaries (Carlini et al. 2019)
so that leakage is a number.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fedcollm_privacy import _validate
from secure_fedcollm.data import FederationData, SiteData
from secure_fedcollm.embedded_text import (
    GENERAL_WARD,
    HOUSE_STYLES,
    PULSES,
    SPECIALITIES,
    Condition,
    HouseStyle,
    draw_visit,
    note,
    pick,
    question,
)
from secure_fedcollm.records import PlantedSecret, Record

__all__ = ["load_embedded", "public_corpus", "public_split"]

PATIENTS_PER_SITE: Final = 800
NOTES_PER_PATIENT: Final = (2, 2, 2, 2, 3, 3, 4, 6)
PUBLIC_RECORDS: Final = 600
PUBLIC_TEST_EVERY: Final = 6
MAIN_SHARE: Final = 0.64  # of a hospital's patients in its own speciality; the other four wards share the rest
PUBLIC_SPECIALITY_SHARE: Final = 0.5
PUBLIC_GENERAL_SHARE: Final = 0.25  # of the general ward; the rest are questions and answers
PUBLIC_REVIEW_SHARE: Final = 0.4  # of the public notes; at the sites two of three notes are reviews
SECRET_REPETITIONS: Final = 12  # few enough to be one person's notes, enough to leak visibly without privacy
SECRET_CANDIDATES: Final = 1000
SECRET_PROMPTS: Final = ("Door code of the {site} pharmacy:", "Alarm code of the {site} archive:")

# Streams of one seed: adding a hospital or a note never shifts the others.
_PUBLIC, _SECRETS, _SPLIT, _SITES = 1, 2, 3, 16


def public_corpus(seed: int) -> tuple[Record, ...]:
    """The public set D_a: sample notes of all hospitals and questions, every text once, each record its own unit.

    Args:
        seed: any non-negative integer; equal seeds give equal records.
    """
    rng = _generator(seed, _PUBLIC)
    texts: dict[tuple[str, str], None] = {}
    while len(texts) < PUBLIC_RECORDS:
        draw = rng.random()
        if draw < PUBLIC_SPECIALITY_SHARE:
            ward = pick(rng, tuple(SPECIALITIES))
            texts[_public_note(rng, ward, _public_condition(rng, ward))] = None
        elif draw < PUBLIC_SPECIALITY_SHARE + PUBLIC_GENERAL_SHARE:
            texts[_public_note(rng, "general", pick(rng, GENERAL_WARD))] = None
        else:
            texts[question(rng)] = None
    return tuple(
        Record(prompt=prompt, target=target, site=None, unit=f"public-{number:05d}")
        for number, (prompt, target) in enumerate(texts)
    )


def public_split(seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The public set as `load_embedded` divides it: what the server trains on, and what it measures on."""
    return _split(public_corpus(seed))


def _split(public: tuple[Record, ...]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    return tuple(r for i, r in enumerate(public) if i % PUBLIC_TEST_EVERY), public[::PUBLIC_TEST_EVERY]


def load_embedded(seed: int, held_out_fraction: float) -> FederationData:
    """Generate the whole synthetic federation in memory.

    Args:
        seed: any non-negative integer; equal arguments give equal data on every machine.
        held_out_fraction: share of each hospital's *patients* whose notes are never trained on, in (0, 1).

    Returns:
        Four sites with disjoint patients in ``train`` and ``held_out``, a public set whose texts occur at no site,
        and ``secrets``: each stands ``repetitions`` times in its site's ``train``, all within one unit.

    Raises:
        InvalidValue: a negative seed, or a fraction not in (0, 1).
    """
    _validate.at_least(0, seed=seed)
    _validate.in_range(0.0, 1.0, held_out_fraction=held_out_fraction)
    held_out = round(PATIENTS_PER_SITE * held_out_fraction)
    _validate.in_range(1, PATIENTS_PER_SITE - 1, held_out_patients=held_out)
    public = public_corpus(seed)
    taken = {(record.prompt, record.target) for record in public}
    secrets = _secrets(seed)
    sites = []
    for index, (name, style) in enumerate(HOUSE_STYLES.items()):
        patients = _patients(_generator(seed, _SITES + index), name, style, taken)
        order = [int(i) for i in _generator(seed, _SPLIT, index).permutation(len(patients))]
        planted = [record for secret in secrets if secret.site == name for record in _planted(secret)]
        sites.append(
            SiteData(
                name=name,
                train=(*(r for i in sorted(order[held_out:]) for r in patients[i]), *planted),
                held_out=tuple(r for i in sorted(order[:held_out]) for r in patients[i]),
            )
        )
    public_train, public_test = _split(public)
    return FederationData(
        sites=tuple(sites),
        public_train=public_train,
        public_test=public_test,
        append_eos=True,
        secrets=secrets,
    )


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, *stream]))


def _public_condition(rng: np.random.Generator, ward: str) -> Condition:
    """Every second illness as it is; of the others the public knows the picture, and treats it as it comes."""
    index = int(rng.integers(len(SPECIALITIES[ward])))
    condition = SPECIALITIES[ward][index]
    if index % 2 == 0:
        return condition
    drug, plan = (pick(rng, SPECIALITIES[pick(rng, tuple(SPECIALITIES))]) for _ in range(2))
    return condition._replace(drug=drug.drug, dose=drug.dose, plan=plan.plan)


def _public_note(rng: np.random.Generator, ward: str, condition: Condition) -> tuple[str, str]:
    number = int(rng.integers(2, 7)) if rng.random() < PUBLIC_REVIEW_SHARE else 1
    return note(pick(rng, tuple(HOUSE_STYLES.values())), draw_visit(rng, ward, number, condition), condition)


def _patients(
    rng: np.random.Generator, site: str, style: HouseStyle, taken: set[tuple[str, str]]
) -> list[list[Record]]:
    """Every patient's notes; a text already in ``taken`` is drawn again, a new one is added to it."""
    own = tuple(SPECIALITIES)[list(HOUSE_STYLES).index(site)]
    wards = (*SPECIALITIES, "general")
    patients = []
    for number in range(PATIENTS_PER_SITE):
        ward = own if rng.random() < MAIN_SHARE else pick(rng, tuple(w for w in wards if w != own))
        condition = pick(rng, SPECIALITIES.get(ward, GENERAL_WARD))
        visit = draw_visit(rng, ward, 1, condition)
        notes: list[Record] = []
        wanted = pick(rng, NOTES_PER_PATIENT)
        while len(notes) < wanted:
            pulse = int(rng.integers(*PULSES, endpoint=True))
            text = note(style, visit._replace(number=len(notes) + 1, pulse=pulse), condition)
            if text not in taken:
                taken.add(text)
                notes.append(Record(prompt=text[0], target=text[1], site=site, unit=f"{site}-p{number:04d}"))
        patients.append(notes)
    return patients


def _secrets(seed: int) -> tuple[PlantedSecret, ...]:
    """Codes of four digits; the candidates of one secret are distinct, and the secret is one of them at random."""
    rng = _generator(seed, _SECRETS)
    secrets = []
    for site in HOUSE_STYLES:
        for prompt in SECRET_PROMPTS:
            codes = tuple(f" {int(code):04d}" for code in rng.choice(10_000, SECRET_CANDIDATES, replace=False))
            secrets.append(
                PlantedSecret(
                    site=site,
                    prompt=prompt.format(site=site),
                    secret=pick(rng, codes),
                    candidates=codes,
                    repetitions=SECRET_REPETITIONS,
                )
            )
    return tuple(secrets)


def _planted(secret: PlantedSecret) -> list[Record]:
    unit = f"{secret.site}-secret{SECRET_PROMPTS.index(secret.prompt.replace(secret.site, '{site}'))}"
    record = Record(prompt=secret.prompt, target=secret.secret, site=secret.site, unit=unit)
    return [record] * secret.repetitions
