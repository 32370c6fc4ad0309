r"""From a row to a record: own text, chats, and the published formats of the paper's tasks.

Prompts of the choice tasks are those of the paper's code and of lm-evaluation-harness's cloze form: OpenBookQA the
question's stem, CommonsenseQA the question, ARC ``"Question: {q}\nAnswer:"``. Every choice is ``" " + its text``:
lm-evaluation-harness puts its ``target_delimiter`` (one space) between context and choice. That space is part of the
target here, so that training and scoring see the same tokens.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.config import DataConfig
from secure_fedcollm.records import HUB, BadRow, Record, row_text

__all__ = ["CHOICE_TASKS", "Parser", "Published", "medquad_public", "parser", "published", "template_fields"]

CHOICE_TASKS = ("commonsense_qa", "openbookqa", "arc")
QUESTION = "Question: {}\nAnswer:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """How a task turns a row into a record.

    Attributes:
        fields: configuration field -> columns that it names; each must be a column of the data.
        record: the record without site and unit; None for a row that its publisher left without an answer.
            Raises ``BadRow`` for a row that cannot be used.
    """

    fields: Mapping[str, tuple[str, ...]]
    record: Callable[[Mapping[str, object]], Record | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a published task's rows lie: paths for ``read_rows``, and the splits for hub data sets."""

    train: str
    train_split: str
    test: str
    test_split: str


def parser(config: DataConfig) -> Parser:
    """The parser for ``config.task``.

    Raises:
        ConfigError: fields are missing, contradict each other, or the template is not plain.
    """
    match config.task:
        case "text":
            return _text_parser(config)
        case "chat":
            return Parser(fields={}, record=_chat_record)
        case "medquad":
            return Parser(fields={}, record=_medquad_record)
        case "arc":
            return Parser(fields={}, record=lambda values: _choice_record(values, QUESTION))
        case "openbookqa" | "commonsense_qa":
            return Parser(fields={}, record=lambda values: _choice_record(values, "{}"))
        case _:
            raise ConfigError("data.task", config.task, "a task that reads files")


def _text_parser(config: DataConfig) -> Parser:
    target, prompt, template = config.target_field, config.prompt_field, config.prompt_template
    if target is None:
        raise ConfigError("data.target_field", target, "the column that holds the text to learn (data.task=text)")
    if prompt is not None and template is not None:
        raise ConfigError("data.prompt_template", template, "null when data.prompt_field is given")
    if template is not None:
        parts = template_fields(template)
        fields = {"prompt_template": tuple(name for _, name in parts if name), "target_field": (target,)}
    else:
        parts = [("", prompt)] if prompt is not None else []
        fields = {"prompt_field": (prompt,) if prompt else (), "target_field": (target,)}

    def record(values: Mapping[str, object]) -> Record:
        start = "".join(text + (_rendered(values, name) if name else "") for text, name in parts)
        return _record(start, _joined(start, row_text(values, target)))

    return Parser(fields=fields, record=record)


def template_fields(template: str) -> list[tuple[str, str | None]]:
    """Take a template apart into (literal text, field that follows or None).

    >>> template_fields("Age {age}: ")
    [('Age ', 'age'), (': ', None)]

    Raises:
        ConfigError: unbalanced braces, or anything but plain ``{field}`` names.
    """
    allowed = "text with plain {field} names: no '.', '[', '!' or ':' inside the braces; '{{' for a brace"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError("data.prompt_template", template, f"{allowed} ({error})") from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name or name.isdigit() or spec or conversion or set(".[]{}") & set(name)):
            raise ConfigError("data.prompt_template", f"{{{name}}}", allowed)
    return [(text, name) for text, name, _, _ in parts]


def _rendered(values: Mapping[str, object], name: str) -> str:
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return row_text(values, name)


def _joined(prompt: str, target: str) -> str:
    """The target, with the space that parts it from its prompt, unless there is white space already."""
    if not prompt or prompt[-1].isspace() or not target or target[0].isspace():
        return target
    return " " + target


def _record(prompt: str, target: str, choices: tuple[str, ...] = (), answer: int | None = None) -> Record:
    if not target.strip():
        raise BadRow("the target is empty")
    return Record(prompt=prompt, target=target, site=None, unit="", choices=choices, answer=answer)


def _chat_record(values: Mapping[str, object]) -> Record:
    """The last answer of the assistant is the target, what stands before it the prompt; what follows is not used."""
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("field 'messages' is not a list of {role, content}")
    turns = [(row_text(message, "role"), row_text(message, "content")) for message in messages]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise BadRow("no message has the role 'assistant'")
    prompt = "".join(f"{role}: {content}\n" for role, content in turns[:last]) + "assistant:"
    return _record(prompt, _joined(prompt, turns[last][1]))


def _medquad_record(values: Mapping[str, object]) -> Record | None:
    """MedQuAD (Ben Abacha and Demner-Fushman 2019); three of its collections are published without answers."""
    answer = row_text(values, "answer").strip()
    row_text(values, "focus")
    prompt = QUESTION.format(row_text(values, "question").strip())
    return _record(prompt, f" {answer}") if answer else None


def medquad_public(values: Mapping[str, object]) -> bool:
    """Whether a MedQuAD row belongs to the public half, which public models may have seen.

    The last bit of the SHA-1 of the row's ``focus`` decides, so all questions on one disease share a half.
    """
    digest = hashlib.sha1(row_text(values, "focus").encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 2 == 0


def _choice_record(values: Mapping[str, object], context: str) -> Record:
    """Both published forms: AI2's ``question.stem`` with a list of choices, and the hub's flat columns."""
    question = values.get("question")
    if isinstance(question, dict):
        stem, raw = row_text(question, "stem"), question.get("choices")
    else:
        stem = row_text(values, "question_stem" if "question_stem" in values else "question")
        raw = values.get("choices")
    if isinstance(raw, dict) and isinstance(raw.get("label"), list) and isinstance(raw.get("text"), list):
        if len(raw["label"]) != len(raw["text"]):
            raise BadRow("'choices' has not as many labels as texts")
        raw = [{"label": label, "text": text} for label, text in zip(raw["label"], raw["text"], strict=True)]
    if not isinstance(raw, list) or not all(isinstance(choice, dict) for choice in raw):
        raise BadRow("'choices' is not a list of {label, text}")
    labels = [row_text(choice, "label").strip() for choice in raw]
    choices = tuple(" " + row_text(choice, "text") for choice in raw)
    key = row_text(values, "answerKey").strip()
    if not stem.strip() or len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise BadRow("the question or a choice is empty, or there are fewer than two choices")
    if labels.count(key) != 1:
        raise BadRow("'answerKey' is not the label of exactly one choice")
    answer = labels.index(key)
    return _record(context.format(stem), choices[answer], choices, answer)


# Hub split with answers that the papers report on; CommonsenseQA's test answers were never published.
HUB_TEST = {"commonsense_qa": "validation", "openbookqa": "test", "arc": "test"}
FILES = {
    "commonsense_qa": ("train_rand_split.jsonl", "dev_rand_split.jsonl"),
    "openbookqa": ("train.jsonl", "test.jsonl"),
    "arc": ("*-Train.jsonl", "*-Test.jsonl"),
}


def published(config: DataConfig, path: str) -> Published | None:
    """Train and test of a choice task whose ``path`` is the published folder or hub data set.

    Returns:
        None for other tasks, and when ``path`` is a single file.

    Raises:
        ConfigError: a folder without exactly one train and one test file under their published names.
    """
    if config.task not in CHOICE_TASKS:
        return None
    if path.startswith(HUB):
        return Published(train=path, train_split=config.split, test=path, test_split=HUB_TEST[config.task])
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    found = [sorted(folder.glob(pattern)) for pattern in FILES[config.task]]
    if any(len(files) != 1 for files in found):
        names = " and ".join(FILES[config.task])
        raise ConfigError("data.path", path, f"a folder with one {names} each (data.task={config.task})")
    train, test = (str(files[0]) for files in found)
    return Published(train=train, train_split=config.split, test=test, test_split=config.split)
