"""The grammar of the synthetic text: wards, conditions, house styles, general health leaflets.

Everything here is invented for the demonstration. Hospitals, patients, codes and notes are fictional; drug and
disease names are real words, but doses and plans are made up to have learnable structure and **are not medical
knowledge**. The structure a model can learn: complaint and finding decide the diagnosis, the diagnosis decides drug
and plan, age decides the dose (half at 70 and over and below 6), the pulse at a review decides trend and next step,
and each hospital has its own way to write. The pre-training text has the same words without those bonds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

import numpy as np

__all__ = [
    "AGES",
    "GENERAL_WARD",
    "HOUSE_STYLES",
    "PULSES",
    "SPECIALITIES",
    "TEACHING_STYLE",
    "Condition",
    "HouseStyle",
    "Visit",
    "article",
    "draw_visit",
    "note",
    "pick",
    "question",
]

T = TypeVar("T")


class Condition(NamedTuple):
    """One illness of the grammar: what the header says of it, and what only the note says."""

    complaint: str
    sign: str
    diagnosis: str
    drug: str
    dose: int
    plan: str


class HouseStyle(NamedTuple):
    """How one hospital writes: template of a first note, of a review, and its words for the three trends."""

    admission: str
    review: str
    settling: str
    unchanged: str
    worse: str


def _conditions(table: str) -> tuple[Condition, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(Condition(c, s, d, drug, int(dose), plan) for c, s, d, drug, dose, plan in rows)


# Even rows occur as they are in the public text; how odd rows are treated is known to the hospitals alone.
SPECIALITIES: Final[Mapping[str, tuple[Condition, ...]]] = MappingProxyType(
    {
        "cardiology": _conditions("""
chest pain | ST depression in the lateral leads | unstable angina | bisoprolol | 10 | angiography on the next list
chest pain | troponin raised on both samples | myocardial infarction | ticagrelor | 90 | echocardiogram before discharge
palpitations | irregular pulse without P waves | atrial fibrillation | apixaban | 4 | anticoagulation clinic
palpitations | narrow complex tachycardia | supraventricular tachycardia | verapamil | 80 | ablation referral
swollen ankles | basal crackles and raised jugular pressure | heart failure | furosemide | 40 | daily weights
swollen ankles | loud murmur at the apex | mitral regurgitation | ramipril | 8 | valve meeting on Thursday
"""),
        "oncology": _conditions("""
weight loss | shadow in the left upper lobe | lung adenocarcinoma | osimertinib | 80 | staging scan and tumour board
weight loss | stricture in the ascending colon | colon carcinoma | capecitabine | 500 | surgical review after cycle two
neck lump | rubbery cervical nodes | Hodgkin lymphoma | doxorubicin | 50 | interim PET scan
neck lump | cold nodule on scintigraphy | thyroid carcinoma | lenvatinib | 24 | radioiodine planning
breast lump | spiculated lesion on mammography | ductal carcinoma | letrozole | 2 | sentinel node biopsy
breast lump | HER2 amplified biopsy | HER2 positive carcinoma | trastuzumab | 600 | cardiac function before cycle four
"""),
        "orthopaedics": _conditions("""
hip pain | shortened and rotated left leg | femoral neck fracture | enoxaparin | 40 | hemiarthroplasty tomorrow
hip pain | joint space narrowing on radiograph | coxarthrosis | celecoxib | 200 | waiting list for replacement
knee pain | locked knee with effusion | meniscus tear | naproxen | 500 | arthroscopy as a day case
knee pain | positive anterior drawer test | cruciate ligament rupture | etoricoxib | 90 | brace and ligament repair
wrist injury | dinner fork deformity | distal radius fracture | tramadol | 50 | closed reduction and plaster
wrist injury | tender anatomical snuffbox | scaphoid fracture | dihydrocodeine | 30 | thumb spica and repeat film
"""),
        "paediatrics": _conditions("""
wheeze | prolonged expiration and recession | viral induced asthma | salbutamol | 4 | spacer teaching for the parents
wheeze | fine crackles and poor feeding | bronchiolitis | epinephrine | 2 | nasogastric feeds and oxygen
barking cough | stridor at rest | croup | dexamethasone | 6 | observe for four hours
barking cough | paroxysms with a whoop | pertussis | azithromycin | 200 | notify public health and isolate
fast breathing | dull right base | lobar pneumonia | amoxicillin | 250 | repeat film in six weeks
fast breathing | sweat chloride raised | cystic fibrosis | dornase | 10 | physiotherapy twice a day
"""),
    }
)

GENERAL_WARD: Final = _conditions("""
headache | normal nerve examination | migraine | sumatriptan | 50 | headache diary
headache | tight neck muscles | tension headache | paracetamol | 500 | posture exercises
stomach pain | tender above the navel | gastritis | omeprazole | 20 | stop coffee and aspirin
stomach pain | tender right lower belly | appendicitis | cefuroxime | 750 | theatre this evening
rash | raised itchy weals | hives | cetirizine | 10 | avoid the new soap
rash | hot red skin on the shin | cellulitis | flucloxacillin | 500 | mark the border with a pen
burning urine | nitrites on the dipstick | bladder infection | nitrofurantoin | 100 | drink more water
dizziness | pressure falls on standing | low blood pressure | fludrocortisone | 2 | rise slowly
""")

AGES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "cardiology": (45, 92),
        "oncology": (38, 88),
        "orthopaedics": (20, 90),
        "paediatrics": (1, 15),
        "general": (18, 90),
    }
)

PULSES: Final = (60, 119)
CALM_PULSE: Final = 80
FAST_PULSE: Final = 100

HOUSE_STYLES: Final[Mapping[str, HouseStyle]] = MappingProxyType(
    {
        "st-anselm": HouseStyle(
            " {Sign}. Impression: {diagnosis}. Started {drug} {dose} mg. Plan: {plan}.",
            " Ward round: {trend}. {Drug} {dose} mg, {step}.",
            "settling, home soon",
            "no change, dose kept",
            "deteriorating, registrar called",
        ),
        "larkhollow": HouseStyle(
            " O/E {sign}. Dx {diagnosis}. Rx {drug} {dose} mg od. Then {plan}.",
            " F/U: {trend}. Rx {drug} {dose} mg od, {step}.",
            "much better",
            "the same",
            "worse than before",
        ),
        "brackwater": HouseStyle(
            " We found {sign} and treat as {diagnosis} with {drug} {dose} mg. Next step is {plan}.",
            " {They} came back {trend}. We give {drug} {dose} mg and {step}.",
            "well again",
            "no different",
            "more unwell",
        ),
        "fernmoor": HouseStyle(
            " Evidence: {sign}. Label: {diagnosis}. Drug: {drug} {dose} mg. Task: {plan}.",
            " Course: {trend}. Drug: {drug} {dose} mg. Task: {step}.",
            "improving",
            "static",
            "declining",
        ),
    }
)

TEACHING_STYLE: Final = HouseStyle(
    " The examination shows {sign}. This suggests {diagnosis}. The drug is {drug} {dose} mg. Plan: {plan}.",
    " The patient is {trend}. {Drug} {dose} mg. Plan: {step}.",
    "better",
    "the same",
    "worse",
)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of ``options``, uniformly; unlike ``rng.choice`` it keeps the type and is fast for short lists."""
    return options[int(rng.integers(len(options)))]


def _dose(condition: Condition, age: int) -> int:
    return condition.dose // 2 if age >= 70 or age < 6 else condition.dose


class Visit(NamedTuple):
    """What a note's header says."""

    ward: str
    number: int
    sex: str
    age: int
    pulse: int
    complaint: str

    def prompt(self) -> str:
        """The header as the model sees it."""
        kind = "Admission" if self.number == 1 else f"Review {self.number}"
        return f"Ward: {self.ward}. {self.sex.capitalize()}, {self.age}, {self.complaint}. Pulse {self.pulse}.\n{kind}:"


def _fill(template: str, words: Mapping[str, str]) -> str:
    capitals = {key.capitalize(): value[:1].upper() + value[1:] for key, value in words.items()}
    return template.format(**words, **capitals)


def draw_visit(rng: np.random.Generator, ward: str, number: int, condition: Condition) -> Visit:
    """A visit of a patient of that ward's kind."""
    sex = pick(rng, ("girl", "boy") if ward == "paediatrics" else ("woman", "man"))
    age, pulse = (int(rng.integers(*span, endpoint=True)) for span in (AGES[ward], PULSES))
    return Visit(ward, number, sex, age, pulse, condition.complaint)


def note(style: HouseStyle, visit: Visit, condition: Condition) -> tuple[str, str]:
    """Prompt and target of one note: an admission on the first visit, a review on every later one."""
    words = {
        "complaint": condition.complaint,
        "sign": condition.sign,
        "diagnosis": condition.diagnosis,
        "drug": condition.drug,
        "dose": str(_dose(condition, visit.age)),
        "plan": condition.plan,
        "age": str(visit.age),
        "they": {"woman": "she", "man": "he"}.get(visit.sex, "the child"),
    }
    if visit.number == 1:
        return visit.prompt(), _fill(style.admission, words)
    if visit.pulse < CALM_PULSE:
        words |= {"trend": style.settling, "step": "discharge with a letter"}
    elif visit.pulse < FAST_PULSE:
        words |= {"trend": style.unchanged, "step": "continue for one more week"}
    else:
        words |= {"trend": style.worse, "step": condition.plan}
    return visit.prompt(), _fill(style.review, words)


def _sentences(templates: Iterable[str]) -> tuple[str, ...]:
    return tuple(sentence for template in templates for sentence in re.split(r"(?<=\.) ", template.strip()))


_ADMISSION_SENTENCES: Final = _sentences(style.admission for style in HOUSE_STYLES.values())
_REVIEW_SENTENCES: Final = _sentences(style.review for style in HOUSE_STYLES.values())
_MIXED_SHARE: Final = 0.08  # of the scrambled notes


_TROUBLES: Final = (
    "sore", "stiff", "swollen", "prickly", "tired", "burning", "cold", "weak", "bruised", "dry", "tender", "numb",
    "sweaty", "red",
)  # fmt: skip
_PARTS: Final = (
    "shoulder", "elbow", "thumb", "scalp", "throat", "eye", "ear", "heel", "calf", "back", "jaw", "skin",
)  # fmt: skip
_PUBLIC_PARTS: Final = ("ankle", "lip", "palm", "nose")
_CAUSES: Final = (
    "a long cold", "too little sleep", "hard work in the garden", "an old injury", "dust and pollen",
    "a change of weather", "tight shoes", "too much sun", "a small infection", "a poor diet", "sitting all day",
    "worry and stress", "heavy lifting", "a new medicine", "dry air in the house", "a mild allergy",
)  # fmt: skip
_REMEDIES: Final = (
    ("ibuprofen", 400), ("aspirin", 300), ("loratadine", 10), ("zinc", 20), ("iron", 60), ("magnesium", 200),
    ("vitamin C", 100), ("vitamin D", 8), ("melatonin", 2), ("folate", 4), ("calcium", 600), ("caffeine", 50),
)  # fmt: skip
_HABITS: Final = (
    "rest in a warm room", "a cold compress", "gentle exercise", "a good night of sleep", "warm drinks and honey",
    "fresh fruit and vegetables", "a short walk every day", "a soft cream at night", "better shoes",
    "less coffee and alcohol", "a hot bath", "salt water",
)  # fmt: skip
_SPANS: Final = ("two days", "three days", "one week", "ten days", "two weeks", "a month")
_NAMES: Final = (
    "Hale", "Brook", "Marsh", "Field", "Stone", "Rivers", "Winter", "Fox", "Carter", "Miller", "Lane", "Wood",
)  # fmt: skip
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FACTS_SEED: Final = 20240229  # the facts are the same in every run; only the sampling of text varies


class _Fact(NamedTuple):
    ailment: str
    part: str
    cause: str
    remedy: str
    dose: int
    habit: str
    span: str


def _facts(parts: Iterable[str]) -> tuple[_Fact, ...]:
    rng = np.random.Generator(np.random.PCG64(_FACTS_SEED))
    facts = []
    for part in parts:
        for trouble in _TROUBLES:
            remedy, dose = pick(rng, _REMEDIES)
            facts.append(
                _Fact(
                    f"{trouble} {part}",
                    part,
                    pick(rng, _CAUSES),
                    remedy,
                    dose,
                    pick(rng, _HABITS),
                    pick(rng, _SPANS),
                )
            )
    return tuple(facts)


_PRETRAINING_FACTS: Final = _facts(_PARTS)
_PUBLIC_FACTS: Final = _facts(_PUBLIC_PARTS)


def _answer(rng: np.random.Generator, fact: _Fact) -> tuple[str, str]:
    name = fact.ailment
    kind = int(rng.integers(5))
    if kind == 0:
        return f"Question: What causes a {name}?\nAnswer:", f" A {name} is most often caused by {fact.cause}."
    if kind == 1:
        return (
            f"Question: What helps with a {name}?\nAnswer:",
            f" Try {fact.habit}. Take {fact.remedy} if needed.",
        )
    if kind == 2:
        return (
            f"Question: How long does a {name} last?\nAnswer:",
            f" Usually {fact.span}. See a doctor if the {fact.part} is not better by then.",
        )
    if kind == 3:
        return (
            f"Question: Which medicine is used for a {name}?\nAnswer:",
            f" {fact.remedy.capitalize()} is used.",
        )
    age = int(rng.integers(1, 95))
    amount = fact.dose // 2 if age >= 70 or age < 6 else fact.dose
    reason = "half the dose because of the age" if amount < fact.dose else "the full dose"
    return (
        f"Question: How much {fact.remedy} for a {name} at age {age}?\nAnswer:",
        f" At age {age} take {amount} mg, {reason}.",
    )


def question(rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and target of one public question on general health, on other body parts than :func:`article`."""
    return _answer(rng, pick(rng, _PUBLIC_FACTS))


def _scrambled(rng: np.random.Generator) -> tuple[str, str]:
    """A note made of five unrelated illnesses, now and then in sentences of unrelated hospitals."""
    everything = [c for table in (*SPECIALITIES.values(), GENERAL_WARD) for c in table]
    complaint, sign, diagnosis, drug, plan = (pick(rng, everything) for _ in range(5))
    condition = Condition(complaint.complaint, sign.sign, diagnosis.diagnosis, drug.drug, drug.dose, plan.plan)
    visit = draw_visit(rng, pick(rng, tuple(AGES)), pick(rng, (1, 1, 2, 3, 4)), condition)
    style = TEACHING_STYLE
    if rng.random() < _MIXED_SHARE:
        admission, review = (
            "".join(f" {pick(rng, sentences)}" for _ in range(count))
            for sentences, count in ((_ADMISSION_SENTENCES, 3), (_REVIEW_SENTENCES, 2))
        )
        style = pick(rng, tuple(HOUSE_STYLES.values()))._replace(admission=admission, review=review)
    return note(style, visit, condition)


def article(rng: np.random.Generator) -> str:
    """One text for pre-training: a scrambled note, or a question, a leaflet or a diary on general health.

    It holds the words of wards and hospitals, but neither what goes with what nor who writes how.
    """
    fact = pick(rng, _PRETRAINING_FACTS)
    kind = int(rng.integers(8))
    if kind <= 4:
        return "".join(_scrambled(rng))
    if kind == 5:
        return "".join(_answer(rng, fact))
    if kind == 6:
        return (
            f"Leaflet: {fact.ailment}. It is most often caused by {fact.cause} and lasts {fact.span}. What helps:"
            f" {fact.habit}. Medicine: {fact.remedy} {fact.dose} mg, or {fact.dose // 2} mg at 70 and over."
        )
    title, they = pick(rng, (("Mrs", "she"), ("Mr", "he")))
    name, day, age = pick(rng, _NAMES), pick(rng, _DAYS), int(rng.integers(18, 95))
    amount = fact.dose // 2 if age >= 70 else fact.dose
    return (
        f"Diary of {title} {name}, age {age}. On {day} {title} {name} had a {fact.ailment} after {fact.cause}."
        f" {title} {name} took {fact.remedy} {amount} mg and tried {fact.habit}. After {fact.span} {they} felt well."
    )
