"""Prompts and targets of the published formats."""

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.config import DataConfig
from secure_fedcollm.records import BadRow
from secure_fedcollm.tasks import medquad_public, parser, published, template_fields

CONFIG = DataConfig(
    task="text",
    policy_dir=None,
    declared="public",
    path="unused",
    public_path=None,
    public_fraction=0.0,
    split="train",
    prompt_field=None,
    target_field="t",
    prompt_template=None,
    site_field=None,
    unit_field=None,
    partition="iid",
    dirichlet_alpha=0.5,
    dirichlet_field=None,
    site_names=(),
    max_records_per_site=None,
    held_out_fraction=0.1,
    max_length=64,
)


def record(values, **changes):
    return parser(dataclasses.replace(CONFIG, **changes)).record(values)


def ai2(stem, texts, labels, key):
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": "x", "question": {"stem": stem, "choices": choices}, "answerKey": key}


def test_choice_prompts_are_the_papers():
    row = ai2("What is hot?", ["ice", "the sun"], "AB", "B")
    arc, obqa, cqa = (record(row, task=task) for task in ("arc", "openbookqa", "commonsense_qa"))
    assert arc.prompt == "Question: What is hot?\nAnswer:"
    assert obqa.prompt == cqa.prompt == "What is hot?"
    for made in (arc, obqa, cqa):
        assert made.target == " the sun"
        assert made.choices == (" ice", " the sun")
        assert made.answer == 1


@pytest.mark.parametrize(("labels", "key"), [("1234", "3"), ("ABC", "C"), ("ABCDE", "C"), ("12345", " 3 ")])
def test_arc_labels_may_be_letters_or_digits_and_any_number(labels, key):
    made = record(ai2("q", [f"c{i}" for i in range(len(labels))], labels, key), task="arc")
    assert (made.answer, made.target, len(made.choices)) == (2, " c2", len(labels))


def test_the_hubs_columns_give_the_same_record_as_ai2s_json():
    one = ai2("Why?", ["a", "b", "c"], "ABC", "C")
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    hub = {"question": "Why?", "choices": choices, "answerKey": "C"}
    assert record(one, task="arc") == record(hub, task="arc")
    assert record(one, task="commonsense_qa") == record(hub, task="commonsense_qa")
    stem = {"question_stem": "Why?", "choices": choices, "answerKey": "C"}
    assert record(one, task="openbookqa") == record(stem, task="openbookqa")


@pytest.mark.parametrize(
    "row",
    [
        ai2("q", ["a", "b"], "AB", "C"),
        ai2("q", ["a", "b"], "AB", ""),
        ai2("q", ["a", "b"], "AA", "A"),
        ai2("q", ["a", " "], "AB", "A"),
        ai2(" ", ["a", "b"], "AB", "A"),
        ai2("q", ["a"], "A", "A"),
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
        {"question": "q", "choices": ["a", "b"], "answerKey": "A"},
        {"question": {"stem": "q"}, "answerKey": "A"},
        {"answerKey": "A"},
        {},
    ],
)
def test_unusable_choice_rows_are_bad_rows(row):
    for task in ("arc", "openbookqa", "commonsense_qa"):
        with pytest.raises(BadRow):
            record(row, task=task)


@pytest.mark.parametrize(
    ("folder", "task", "counts"),
    [
        ("commonsense_qa", "commonsense_qa", (9741, 1221)),
        ("openbookqa", "openbookqa", (4957, 500)),
        ("arc_easy", "arc", (2251, 2376)),
        ("arc_challenge", "arc", (1119, 1172)),
    ],
)
def test_published_files_parse_whole_with_the_published_counts(shared_data, folder, task, counts):
    config = dataclasses.replace(CONFIG, task=task)
    place = published(config, str(shared_data(folder)))
    for path, count in zip((place.train, place.test), counts, strict=True):
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        made = [parser(config).record(row) for row in rows]
        assert len(made) == count
        for row, one in zip(rows, made, strict=True):
            right = [c["text"] for c in row["question"]["choices"] if c["label"] == row["answerKey"]]
            assert [one.target] == [" " + text for text in right]
            assert row["question"]["stem"] in one.prompt
            assert one.choices[one.answer] == one.target


def test_hub_tests_are_the_splits_with_answers():
    for task, split in (("commonsense_qa", "validation"), ("openbookqa", "test"), ("arc", "test")):
        place = published(dataclasses.replace(CONFIG, task=task), "hub:x/y")
        assert (place.train_split, place.test_split) == ("train", split)


def test_folder_without_the_published_files_is_refused(tmp_path):
    for task in ("arc", "openbookqa", "commonsense_qa"):
        with pytest.raises(ConfigError, match=r"data\.path"):
            published(dataclasses.replace(CONFIG, task=task), str(tmp_path))


def test_medquad_is_a_question_and_its_answer():
    row = {"source": "s", "focus": "f", "qtype": "t", "question": "What is f ?", "answer": " It is f. "}
    made = record(row, task="medquad")
    assert (made.prompt, made.target) == ("Question: What is f ?\nAnswer:", " It is f.")
    assert record({**row, "answer": ""}, task="medquad") is None
    for name in ("focus", "question", "answer"):
        with pytest.raises(BadRow, match=name):
            record({key: value for key, value in row.items() if key != name}, task="medquad")


@given(st.text(st.characters(codec="utf-8")))
def test_medquads_halves_follow_the_documented_rule(focus):
    documented = int(hashlib.sha1(focus.encode()).hexdigest(), 16) % 2 == 0
    assert medquad_public({"focus": focus}) is documented


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("Q:", "yes", "Q: yes"),
        ("Q: ", "yes", "Q: yes"),
        ("Q:\n", "yes", "Q:\nyes"),
        ("Q:", "\nyes", "Q:\nyes"),
        ("", "yes", "yes"),
    ],
)
def test_one_white_space_parts_prompt_and_target(prompt, target, joined):
    made = record({"p": prompt, "t": target}, prompt_field="p")
    assert made.prompt == prompt
    assert made.prompt + made.target == joined


@pytest.mark.parametrize("target", ["", " \n", None, 3, ["x"], "\udcff"])
def test_blank_or_non_text_targets_are_bad_rows(target):
    with pytest.raises(BadRow):
        record({"t": target})


NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_ -]{0,8}", fullmatch=True)


@given(st.lists(st.tuples(st.text(max_size=6), st.none() | NAME), max_size=5), st.data())
def test_template_renders_as_str_format(parts, data):
    template = "".join(
        text.replace("{", "{{").replace("}", "}}") + (f"{{{name}}}" if name else "") for text, name in parts
    )
    names = {name for _, name in parts if name}
    text = st.text(st.characters(codec="utf-8"))
    values = {name: data.draw(text | st.integers()) for name in names}
    expected = template.format(**values)
    made = [text + (str(values[name]) if name else "") for text, name in template_fields(template)]
    assert "".join(made) == expected


def test_template_fills_prompts():
    made = record({"age": 54, "sex": "F", "t": "fever"}, prompt_template="{sex}, {age} {{years}}: ")
    assert (made.prompt, made.target) == ("F, 54 {years}: ", "fever")
    with pytest.raises(BadRow, match="sex"):
        record({"age": 54, "t": "x"}, prompt_template="{sex}")


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "{a:{b}}", "{a", "a}", "{a.b.c[x]}"],
)
def test_templates_reach_nothing_but_fields(template):
    with pytest.raises(ConfigError, match=r"data\.prompt_template"):
        record({"a": "x", "t": "y"}, prompt_template=template)


def test_contradicting_or_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"data\.target_field"):
        record({}, target_field=None)
    with pytest.raises(ConfigError, match=r"data\.prompt_template"):
        record({}, prompt_field="p", prompt_template="x")


def test_chat_learns_the_last_assistant_message():
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "See you"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = record({"messages": messages}, task="chat")
    assert made.prompt == "system: Be kind.\nuser: Hi\nassistant: Hello\nuser: Bye\nassistant:"
    assert made.target == " See you"
    assert record({"messages": [*messages, {"role": "user", "content": "?"}]}, task="chat") == made


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        ["x"],
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": " "}],
        [{"role": "assistant", "content": None}],
        [{"content": "x"}],
    ],
)
def test_unusable_chats_are_bad_rows(messages):
    with pytest.raises(BadRow):
        record({"messages": messages}, task="chat")
