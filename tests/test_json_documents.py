import json

import pytest
from corpus_files import options, read

from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import read_documents

RECORDS = [{"text": "one é 🎉", "n": [1, {"a": "]}"}]}, {"text": '"two" \\ \n', "source": "s"}, {"text": "three"}]
TEXTS = [record["text"] for record in RECORDS]
PRETTY = [json.dumps(record, indent=2, ensure_ascii=False) for record in RECORDS]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=1, ensure_ascii=False),
        "\n\n [" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]\n",
        "[\n" + "\n,".join(json.dumps(record) for record in RECORDS) + ",\n]",
        "\n".join(PRETTY),
        "".join(PRETTY),
        "".join(json.dumps(record) for record in RECORDS),
        json.dumps(TEXTS),
        json.dumps(TEXTS[:1]) + "\n" + json.dumps(RECORDS[1:]),
    ],
)
def test_an_array_and_pretty_printed_objects_are_read(tmp_path, data):
    (tmp_path / "a.json").write_text(data, encoding="utf-8", newline="")
    assert [(d.number, d.text) for d in read(tmp_path)] == list(enumerate(TEXTS))
    assert [d.text for d in read(tmp_path, start=1)] == TEXTS[1:]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(RECORDS, indent=1),
        "\n".join(PRETTY),
        json.dumps(RECORDS),
        json.dumps(RECORDS) + "\n",
        " [ " + json.dumps(RECORDS[0]) + "]\n" + json.dumps(RECORDS[1:]) + "\n",
        "".join(f"\ufeff{json.dumps(record)}\n" for record in RECORDS),
        "".join(f"\ufeff{pretty}\n" for pretty in PRETTY),
    ],
)
def test_they_are_read_from_a_jsonl_too(tmp_path, data):
    (tmp_path / "a.jsonl").write_text(data, encoding="utf-8", newline="")
    assert [d.text for d in read(tmp_path)] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_objects_one_after_another_on_a_long_line_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("trialgpt_jax.data.json_documents._CHUNK", 300)
    (tmp_path / name).write_text("".join(json.dumps({"text": f"{i} é"}) for i in range(100)))
    assert [d.text for d in read(tmp_path)] == [f"{i} é" for i in range(100)]
    (tmp_path / name).write_text(json.dumps({"text": "long " * 100}) + "\n" + json.dumps({"text": "b"}))
    assert [d.text for d in read(tmp_path)] == ["long " * 100, "b"]


@pytest.mark.parametrize("wrap", ["%s\n", "%s", "[%s]", '[{"text": "a", "n": 1}, %s]'])
@pytest.mark.parametrize("digits", [20, 5000])
def test_an_integer_of_any_length_in_another_field_is_no_error(tmp_path, wrap, digits):
    (tmp_path / "a.json").write_text(wrap % ('{"n": %s, "text": "a"}' % ("7" * digits)))
    assert {d.text for d in read(tmp_path)} == {"a"}


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_elements_are_found_whatever_the_size_of_a_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr("trialgpt_jax.data.json_documents._CHUNK", size)
    records = [{"text": f'{i} é\\"\n🎉', "n": [True, None, -1.5e-7, {"é": "[{"}]} for i in range(50)]
    for i, data in enumerate([json.dumps(records, ensure_ascii=False), json.dumps(records, indent=3)]):
        (tmp_path / f"{i}.json").write_text(data, encoding="utf-8")
    assert [d.text for d in read(tmp_path)] == [record["text"] for record in records] * 2


@pytest.mark.parametrize("size", [1, 5, 20])
def test_an_element_that_is_too_long_is_skipped_whatever_it_holds(tmp_path, monkeypatch, size):
    monkeypatch.setattr("trialgpt_jax.data.json_documents._CHUNK", size)
    monkeypatch.setattr("trialgpt_jax.data.json_documents._ROOM", 10)
    long = [{"text": '"]}\\' * 20}, [["\\", {"a": []}]] * 20, '\\"' * 100, {"x": {"y": "ü\\u00fc" * 20}}]
    for i, value in enumerate(long):
        (tmp_path / f"{i}.json").write_text(json.dumps([value, {"text": "good"}], indent=i % 2))
    found = read(tmp_path, max_document_bytes=10)
    assert [(d.text, d.problem) for d in found] == [(None, "too large"), ("good", "")] * len(long)


@pytest.mark.parametrize(
    ("data", "problem", "where"),
    [
        (
            '[{"text": "good"}, {"text": "cut',
            "malformed JSON",
            "a.json, element 2: malformed JSON (Unterminated string",
        ),
        ('[{"text": "good"}, ', "malformed JSON", "element 2: malformed JSON (the file ends within the array)"),
        (
            '[{"text": "good"} {"text": "b"}]',
            "malformed JSON",
            "element 2: malformed JSON (`,` or `]` is missing before",
        ),
        ('[{"text": "good"}, {text: 1}]', "malformed JSON", "element 2: malformed JSON (Expecting property name"),
        ('[{"text": "good"}, ' + "[" * 100_000, "malformed JSON", "element 2: malformed JSON (nested too deeply)"),
        (
            '[{"text": "good"}, 12]',
            "no text field",
            "element 2: the text field `text` is missing, because this is a num",
        ),
        ('[{"text": "good"}, {"text": null}]', "no text field", "element 2: the text field `text` is null"),
        ('[{"text": "good"}, {"text": "\\ud800"}]', "invalid UTF-8", "element 2: the text has half a surrogate pair"),
        (
            '{"text": "good"}\n["a"]\n',
            "no text field",
            "line 2: the text field `text` is missing, because this is an arr",
        ),
        (
            '{"text": "good"}\n"a"\n',
            "no text field",
            "because this is a string; one JSON object a line, or an array of",
        ),
        ('{"text": "good"}\n' + "[" * 100_000, "malformed JSON", "a.json, line 2: malformed JSON (nested too deeply)"),
        (
            '{"text": "good"}\n{"id": 1, "body": "x"}',
            "no text field",
            "the record has 'id', 'body'; see data.source_opt",
        ),
        (
            '{"text": "good"}\n{"data": [{"text": 1}]}',
            "no text field",
            "'data'; one JSON object a line, or an array of",
        ),
    ],
)
def test_an_unusable_record_of_a_json_file_says_why(tmp_path, data, problem, where):
    (tmp_path / "a.json").write_text(data)
    good, bad = read(tmp_path)
    assert good.text == "good" and bad.text is None and bad.problem == problem and where in bad.where
    assert "\n" not in bad.where


def test_an_object_around_the_records_is_no_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"text": "a"}]}, indent=1))
    (bad,) = read(tmp_path)
    assert "has 'version', 'data'; one JSON object a line, or an array of objects, is wanted" in bad.where


def test_a_line_of_jsonl_that_is_an_array_is_not_read_as_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a", "b"]\n{"text": "good"}\n')
    bad, good = read(tmp_path)
    assert "line 1: the text field `text` is missing, because this is an array" in bad.where and good.text == "good"


def test_bytes_that_are_not_utf8_spoil_their_record_alone(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a\xff"}, {"text": "good"}]')
    bad, good = read(tmp_path)
    assert bad.problem == "invalid UTF-8" and "or a byte that is not UTF-8" in bad.where and good.text == "good"


def test_the_text_may_be_a_field_of_an_inner_object(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"a": {"b": "inner"}}\n{"a.b": "outer", "a": {"b": "x"}}\n{"a": "x"}\n{"a": {}}\n'
    )
    found = read(tmp_path, text_field="a.b")
    assert [d.text for d in found] == ["inner", "outer", None, None]
    assert "the text field `a.b` is missing" in found[2].where


def test_of_two_fields_of_one_name_the_last_counts_and_unusual_numbers_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b", "n": 1e999, "m": NaN}\r\n')
    assert [d.text for d in read(tmp_path)] == ["b"]


def test_lines_are_numbered_with_blank_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n \n{"text": "a"}\n\n{"text": "b"}\n')
    assert [(d.number, d.text) for d in read(tmp_path)] == [(2, "a"), (4, "b")]
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)
    assert [d.number for d in read_documents(file, file.path, given, 3)] == [4]
