"""Rows: nothing lost, nothing leaked, compared with a second reader."""

import csv
import io
import json
import traceback
from pathlib import Path

import datasets
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import ConfigError, DataError
from secure_fedcollm.records import BadRow, BadRows, read_rows, row_key, row_text

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
TABLE = st.lists(st.tuples(CELL, CELL), max_size=6)
ON_DISK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def rows_of(path, **kwargs):
    bad = BadRows()
    rows = read_rows(str(path), split="train", bad=bad, **kwargs)
    bad.raise_if_any(len(rows))
    return rows


@ON_DISK
@given(table=TABLE, escape=st.booleans())
def test_jsonl_gives_back_what_json_wrote_line_by_line(tmp_path, table, escape):
    file = tmp_path / "a.jsonl"
    file.write_bytes("".join(json.dumps({"a": a, "b": b}, ensure_ascii=escape) + "\n" for a, b in table).encode())
    rows = rows_of(file)
    assert [row.values for row in rows] == [{"a": a, "b": b} for a, b in table]
    assert [row.line for row in rows] == list(range(1, len(table) + 1))


@ON_DISK
@given(table=TABLE)
def test_csv_gives_back_what_the_csv_module_wrote(tmp_path, table):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
    assert [tuple(row.values.values()) for row in rows_of(tmp_path / "a.csv")] == table


def test_csv_equals_pandas_on_a_published_file(shared_data):
    file = shared_data("e2e_nlg") / "devset.csv"
    expected = pandas.read_csv(file, dtype=str, keep_default_na=False).to_dict("records")
    assert [row.values for row in rows_of(file)] == expected
    assert len(expected) > 4000


def test_csv_line_numbers_point_at_the_first_line_of_a_row(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"two\nlines",1\nx,2\n')
    assert [row.line for row in rows_of(tmp_path / "a.csv")] == [2, 4]


def test_csv_field_longer_than_the_csv_module_allows_is_read_and_the_limit_restored(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000 + "\n")
    assert len(rows_of(tmp_path / "a.csv")[0].values["a"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark_is_no_part_of_the_first_field(tmp_path, name):
    (tmp_path / name).write_text({"a.jsonl": '{"a": "1"}\n', "a.csv": "a\n1\n"}[name], encoding="utf-8-sig")
    assert [dict(row.values) for row in rows_of(tmp_path / name)] == [{"a": "1"}]


def test_folder_is_read_in_name_order_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "b.jsonl").write_text('\n{"a": "2"}\n\n')
    (tmp_path / "a.csv").write_text("a\n\n1\n")
    (tmp_path / "notes.txt").write_text("not data")
    assert [(row.file, row.line, row.values["a"]) for row in rows_of(tmp_path)] == [
        ("a.csv", 3, "1"),
        ("b.jsonl", 2, "2"),
    ]


BAD_JSONL = [
    (b'{"a": "SECRET"', "broken JSON at column"),
    (b'"SECRET"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"a": "SECRET\xff"}', "not valid UTF-8"),
    (b'{"SECRET": ' + b"9" * 5000 + b"}", "too many digits"),
    (b"[" * 200_000, "nested too deeply"),
]
BAD_CSV = [
    (b'"SECRET"x,1', "broken CSV quoting"),
    (b"SECRET", "1 fields where the header has 2"),
    (b"SECRET,1,2", "3 fields where the header has 2"),
    (b"SECRET\xff,1", "not valid UTF-8"),
    (b'1,"SECRET', "broken CSV quoting"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_JSONL)
def test_bad_json_line_is_named_by_file_and_line_without_its_content(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "1"}\n' + line + b'\n{"a": "3"}\n')
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "a.jsonl")
    told = "".join(traceback.format_exception(caught.value))
    assert "1 of 3 rows" in told
    assert "a.jsonl:2: " in told
    assert reason in told
    assert "SECRET" not in told


@pytest.mark.parametrize(("line", "reason"), BAD_CSV)
def test_bad_csv_line_is_named_by_file_and_line_without_its_content(tmp_path, line, reason):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "a.csv")
    told = "".join(traceback.format_exception(caught.value))
    assert "a.csv:3: " in told
    assert reason in told
    assert "SECRET" not in told


def test_a_row_after_a_broken_one_is_still_read(tmp_path):
    (tmp_path / "a.csv").write_text('a\n"x"y\n2\n')
    bad = BadRows()
    assert [row.values["a"] for row in read_rows(str(tmp_path / "a.csv"), split="train", bad=bad)] == ["2"]
    assert bad.total == 1


def test_ten_bad_rows_are_shown_and_all_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("broken\n" * 25 + "{}\n")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "a.jsonl")
    assert "25 of 26 rows" in str(caught.value)
    assert str(caught.value).count("a.jsonl:") == 10
    assert "15 more" in str(caught.value)


@pytest.mark.parametrize("header", ["", "a,a\n1,2\n", '"a\n'])
def test_unusable_csv_header_is_refused(tmp_path, header):
    (tmp_path / "a.csv").write_text(header)
    with pytest.raises(DataError, match=r"a\.csv:1"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["absent.jsonl", "a.txt", ""])
def test_unreadable_path_names_the_field_that_gave_it(tmp_path, name):
    (tmp_path / "a.txt").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.public_path.*\.jsonl or \.csv"):
        rows_of(tmp_path / name, name="data.public_path")


def test_text_and_keys_refuse_what_they_are_not():
    values = {"n": 3, "t": " x ", "b": True, "f": 1.5, "e": " ", "s": "\ud800", "none": None}
    assert row_text(values, "t") == " x "
    assert (row_key(values, "t"), row_key(values, "n")) == ("x", "3")
    for name in ("n", "b", "none", "s", "absent"):
        with pytest.raises(BadRow, match=name):
            row_text(values, name)
    for name in ("b", "f", "e", "none", "s", "absent"):
        with pytest.raises(BadRow, match=name):
            row_key(values, name)


def test_hub_data_set_is_asked_for_by_id_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"a": "1"}, {"a": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("hub:owner/name:small", split="validation", bad=BadRows())
    assert asked == [(("owner/name", "small"), {"split": "validation"})]
    assert [(row.line, row.values["a"]) for row in rows] == [(1, "1"), (2, "2")]


def test_hub_failure_says_what_to_do(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/absent', split 'train'.*download"):
        read_rows("hub:owner/absent", split="train", bad=BadRows())


def test_a_file_needs_no_datasets_import(tmp_path):
    import subprocess
    import sys

    (tmp_path / "a.jsonl").write_text("{}\n")
    code = (
        "import sys; from secure_fedcollm.records import *; "
        f"read_rows({str(tmp_path)!r}, split='train', bad=BadRows()); sys.exit('datasets' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    env = {"PYTHONPATH": f"{root}:{root / 'privacy'}", "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
