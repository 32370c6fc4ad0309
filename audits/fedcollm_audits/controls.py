"""Which of an audit's checks are evidence for which control of law and standards, and what no check can answer.

A help for whoever writes the assessment: it claims no compliance. A control is supported only where every check that is
named for it was made and passed. Titles are short forms; the texts of the sources bind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fedcollm_audits.audit import Audit

__all__ = ["CONTROLS", "NO_SOFTWARE_ANSWERS", "Control", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One requirement.

    Attributes:
        source: law or standard.
        reference: article, section or control number.
        title: what it is about, in short.
        evidence: what the named checks show for it, when all of them pass.
        checks: their names.
        cannot_answer: what it asks and no software can answer.
    """

    source: str
    reference: str
    title: str
    evidence: str
    checks: tuple[str, ...]
    cannot_answer: str


GDPR: Final = "GDPR, Regulation (EU) 2016/679"
HIPAA: Final = "HIPAA, 45 CFR Part 164"
ISO: Final = "ISO/IEC 27001:2022, Annex A"
_OF_PRIVACY: Final = ("plan", "empirical", "leakage")
AI_ACT: Final = "EU AI Act, Regulation (EU) 2024/1689"

CONTROLS: Final = (
    Control(
        source=GDPR,
        reference="Art. 5(1)(c)",
        title="Data minimisation",
        evidence="Only sums of several sites' updates were opened, nothing of one site alone lies in the folder, and "
        "what each unit adds was bounded as planned.",
        checks=("openings", "no-single-update", "plan-is-what-ran"),
        cannot_answer="Whether the records, and these fields of them, were needed for the purpose at all.",
    ),
    Control(
        source=GDPR,
        reference="Art. 5(1)(f)",
        title="Integrity and confidentiality",
        evidence="Records of the run are chained and signed, the released files are those that were recorded, and no "
        "key or single update lies about.",
        checks=(
            "ledger-chain",
            "ledger-signatures",
            "ledger-heads",
            "transcript-chain",
            "adapters-linked",
            "no-key-at-rest",
            "no-single-update",
            "statement-bound",
        ),
        cannot_answer="How the sites keep the records themselves: access, backups, premises, staff.",
    ),
    Control(
        source=GDPR,
        reference="Art. 5(2)",
        title="Accountability",
        evidence="Every site's spend stands in its own signed ledger, and this audit recomputed it and compared it "
        "with the signed statement.",
        checks=(
            "ledger-chain",
            "ledger-signatures",
            "ledger-heads",
            "ledger-complete",
            "epsilon-recomputed",
            "statement-signed",
            "statement-true",
        ),
        cannot_answer="Whether the processing was lawful, who the controllers are, and what they agreed (Art. 6, 26, "
        "28).",
    ),
    Control(
        source=GDPR,
        reference="Art. 25",
        title="Data protection by design and by default",
        evidence="A plan was committed before training, the budget held at every moment, and noise, clipping, "
        "sampling and the secure sum were those of the plan.",
        checks=("ledger-order", "budget-prefix", "plan-is-what-ran", "delta-rule", "poisson-sampling", "openings"),
        cannot_answer="Whether these settings are appropriate to the risk: whether ε is low enough for these people "
        "is a judgement; published tiers are advice.",
    ),
    Control(
        source=GDPR,
        reference="Art. 32",
        title="Security of processing",
        evidence="Only agreed sums were opened, no key or single update was left behind, and attacks on the private "
        "training found no more than is claimed.",
        checks=("openings", "no-key-at-rest", "no-single-update", "step-audit", "one-run-audit", "one-run-sum"),
        cannot_answer="Security of the machines, networks and key stores, availability, and organisational measures.",
    ),
    Control(
        source=GDPR,
        reference="Art. 35",
        title="Data protection impact assessment",
        evidence="Numbers to quote in the assessment: claimed ε and δ, what attacks found at least, and what is not "
        "covered.",
        checks=(
            "epsilon-recomputed",
            "statement-true",
            "step-audit",
            "one-run-audit",
            "one-run-sum",
            "membership",
            "planted-secrets",
        ),
        cannot_answer="The assessment itself: necessity, proportionality, risks to people, their views, prior "
        "consultation.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.312(a)",
        title="Access control",
        evidence="Nobody but its site saw a single update: what was opened were sums of an agreed set of sites.",
        checks=("openings", "no-single-update", "no-key-at-rest"),
        cannot_answer="Users' access to systems with health information: identification, emergency access, log-off.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.312(b)",
        title="Audit controls",
        evidence="Ledgers and transcript record what was done, in chains that show a later change.",
        checks=("ledger-chain", "ledger-complete", "transcript-chain"),
        cannot_answer="Activity outside the run, and whether anybody reviews the records.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.312(c)",
        title="Integrity",
        evidence="Files of the run have the digests that were signed for them.",
        checks=("ledger-heads", "adapters-linked", "statement-bound"),
        cannot_answer="Integrity of the health records before training.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.312(d)",
        title="Person or entity authentication",
        evidence="Ledgers, agreements to a sum and the statement carry signatures by the keys of the roster.",
        checks=("ledger-signatures", "openings", "statement-signed"),
        cannot_answer="Who held a key, and whether the name in the roster is who it says; that is the governance's "
        "part.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.312(e)",
        title="Transmission security",
        evidence="What the sites agreed to and what was opened are bound to each other by digests and signatures.",
        checks=("openings", "transcript-chain"),
        cannot_answer="Encryption of the network's links and of other transmissions; the transcript holds no traffic.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.514(a)",
        title="De-identification: the standard",
        evidence="A bound on what the released models tell about one unit, and attacks that tried to find more.",
        checks=("epsilon-recomputed", "statement-true", "one-run-audit", "membership", "planted-secrets"),
        cannot_answer="Whether there is a reasonable basis to believe that the release can identify somebody.",
    ),
    Control(
        source=HIPAA,
        reference="§ 164.514(b)",
        title="De-identification: expert determination",
        evidence="Methods and results for the expert's file under (b)(1): mechanism, accounting, bounds, attacks.",
        checks=(
            "epsilon-recomputed",
            "delta-rule",
            "plan-is-what-ran",
            "statement-true",
            "step-audit",
            "one-run-audit",
            "one-run-sum",
            "membership",
            "planted-secrets",
        ),
        cannot_answer="The expert's determination that the risk is very small. Removal of identifiers under (b)(2) "
        "was not looked at.",
    ),
    Control(
        source=ISO,
        reference="A.5.8",
        title="Information security in project management",
        evidence="Every run was planned before it spent, with a delta that fits the data's size.",
        checks=("ledger-order", "delta-rule"),
        cannot_answer="How the project was managed, and which risks were weighed.",
    ),
    Control(
        source=ISO,
        reference="A.5.28",
        title="Collection of evidence",
        evidence="Ledgers, transcript and statement are signed and can be checked by others again.",
        checks=("ledger-signatures", "ledger-heads", "transcript-chain", "statement-signed", "statement-bound"),
        cannot_answer="Custody of the evidence: who kept which file since.",
    ),
    Control(
        source=ISO,
        reference="A.5.33",
        title="Protection of records",
        evidence="A ledger or transcript that was altered, cut or forked shows it.",
        checks=("ledger-chain", "ledger-heads", "transcript-chain"),
        cannot_answer="Retention, backup and destruction of records.",
    ),
    Control(
        source=ISO,
        reference="A.5.34",
        title="Privacy and protection of personal data",
        evidence="The privacy loss of each unit is accounted for, within the owner's caps, and truly stated.",
        checks=("epsilon-recomputed", "budget-prefix", "ledger-complete", "statement-true"),
        cannot_answer="Which laws apply, and whether their duties towards people are met.",
    ),
    Control(
        source=ISO,
        reference="A.8.11",
        title="Data masking",
        evidence="Calibrated noise hides one unit's part in the models; masks hide one site's part in a sum.",
        checks=("plan-is-what-ran", "poisson-sampling", "openings"),
        cannot_answer="Masking of the records at the sites.",
    ),
    Control(
        source=ISO,
        reference="A.8.12",
        title="Data leakage prevention",
        evidence="No single update or key lies in the folder, and attacks on the released models found nothing "
        "beyond what is allowed.",
        checks=("no-single-update", "no-key-at-rest", "membership", "planted-secrets"),
        cannot_answer="Leaks by other ways than the run's outputs.",
    ),
    Control(
        source=ISO,
        reference="A.8.15",
        title="Logging",
        evidence="Every plan, reservation, settlement and opening is logged in order.",
        checks=("ledger-order", "ledger-complete", "transcript-chain"),
        cannot_answer="Logs of systems and users, and whether anybody analyses them.",
    ),
    Control(
        source=ISO,
        reference="A.8.24",
        title="Use of cryptography",
        evidence="Signatures hold, only agreed sums were opened, and no key lies in the folder.",
        checks=("ledger-signatures", "openings", "statement-signed", "no-key-at-rest"),
        cannot_answer="Rules for cryptography in the organisation, and how keys are kept and replaced.",
    ),
    Control(
        source=ISO,
        reference="A.8.29",
        title="Security testing in development and acceptance",
        evidence="The private training and the released models were attacked, and the results stand beside the claim.",
        checks=(
            "step-audit",
            "one-run-audit",
            "one-run-sum",
            "poisson-sampling",
            "code-is-what-ran",
            "planted-secrets",
            "membership",
        ),
        cannot_answer="Tests of everything else that is put into use.",
    ),
    Control(
        source=AI_ACT,
        reference="Art. 10",
        title="Data and data governance",
        evidence="What was declared about the data, and the caps under which each site let it be used, is signed.",
        checks=("ledger-signatures", "budget-prefix", "statement-signed"),
        cannot_answer="Whether the data is relevant, representative, free of errors and bias; whether the system is "
        "high-risk at all.",
    ),
    Control(
        source=AI_ACT,
        reference="Art. 12",
        title="Record-keeping",
        evidence="Training was logged automatically, and the log shows later changes.",
        checks=("ledger-chain", "ledger-complete", "transcript-chain", "adapters-linked"),
        cannot_answer="Logs of the system in use: this audit ends with training.",
    ),
    Control(
        source=AI_ACT,
        reference="Art. 15",
        title="Accuracy, robustness and cybersecurity",
        evidence="The released models are those that were trained, and attacks on their confidentiality are reported.",
        checks=("adapters-linked", "step-audit", "one-run-audit", "membership", "planted-secrets"),
        cannot_answer="Accuracy for the intended purpose, robustness in use, poisoned training data.",
    ),
)

NO_SOFTWARE_ANSWERS: Final = (
    "Whether the processing is lawful: purpose, legal basis, consent, contracts.",
    "Whether ε is low enough for these people and these records. Published tiers are advice; somebody has to decide.",
    "Whether organisational measures are in place: training, access, premises, response to incidents.",
    "The impact assessment (GDPR Art. 35) or the expert's determination (45 CFR 164.514(b)(1)); this audit is input.",
    "Whether the sites' programs were the published ones, and their records what they said.",
    "That nothing leaks. Attacks find faults; that they found none bounds nothing.",
)


def rows(audit: Audit) -> list[dict[str, Any]]:
    """Lay an audit over the controls.

    Returns:
        For each control its words, ``supported`` (every named check was made and passed), ``checks`` by name with their
        status, and ``open``: why it is not supported. A name that the audit does not know counts as open, and so does
        a run that claims no privacy wherever the evidence would be about privacy.
    """
    by_name = {answer.check.name: answer for answer in audit.answers}
    found = []
    for control in CONTROLS:
        statuses = {n: by_name[n].status if n in by_name else "not known" for n in control.checks}
        left = [name for name, status in statuses.items() if status != "pass"]
        of_privacy = any(n in by_name and by_name[n].check.group in _OF_PRIVACY for n in control.checks)
        if audit.subject.private is not True and of_privacy:
            left.append("the run claims no privacy")
        found.append({
            "source": control.source,
            "reference": control.reference,
            "title": control.title,
            "evidence": control.evidence,
            "checks": statuses,
            "open": left,
            "supported": not left,
            "cannot_answer": control.cannot_answer,
        })  # fmt: skip
    return found
