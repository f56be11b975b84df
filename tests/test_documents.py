import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import count_rows, read_documents


def options(path, **changes):
    return default_config().data.source_options.to_dict() | {"path": str(path)} | changes


def read(path, **changes):
    """All records of all files, in order."""
    given = options(path, **changes)
    return [d for file in corpora.list_files("files", given) for d in read_documents(file, file.path, given)]


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zst(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


DOCUMENTS = ["first\r\ndocument\n", "second: Grüße 🎉", "third"]
LINES = lines(*({"text": text} for text in DOCUMENTS))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\n\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.gz", b"".join(gzip.compress(lines({"text": text})) for text in DOCUMENTS)),
        ("a.jsonl.zst", zst(LINES)),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in read(tmp_path)] == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.md", bytes), ("a.txt.gz", gzip.compress), ("a.md.zst", zst)]
)
def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + DOCUMENTS[0].encode()))
    assert [document.text for document in read(tmp_path / name)] == [DOCUMENTS[0]]


@pytest.mark.parametrize("start", [0, 1, 299, 300, 700, 999, 1000])
def test_parquet_can_be_read_from_any_row(tmp_path, start):
    texts = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)
    documents = list(read_documents(file, file.path, given, start))
    assert [d.text for d in documents] == texts[start:]
    assert [d.number for d in documents] == list(range(start, 1000))
    assert count_rows(file) == 1000


def test_other_fields_may_have_different_types_in_different_files(tmp_path):
    (tmp_path / "0.json.gz").write_bytes(gzip.compress(lines({"text": "a", "id": 1, "meta": {"x": 1}})))
    (tmp_path / "1.json.gz").write_bytes(gzip.compress(lines({"text": "b", "id": "one", "meta": None})))
    assert [document.text for document in read(tmp_path)] == ["a", "b"]


def test_subset_keeps_the_named_sources(tmp_path):
    records = [{"text": str(i), "source": source} for i, source in enumerate(["wiki", "reddit", "books", None])]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    assert [(d.text, d.source) for d in read(tmp_path)] == [("0", "wiki"), ("1", "reddit"), ("2", "books"), ("3", "")]
    assert [d.text for d in read(tmp_path, subset="books, wiki")] == ["0", "2"]


GOOD = lines({"text": "good"})


@pytest.mark.parametrize(
    ("name", "data", "problem", "where"),
    [
        ("a.jsonl", GOOD + b'{"text": "cut', "malformed JSON", "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", GOOD + lines({"body": "x"}), "no text field", "line 2: the text field `text` is missing or not"),
        ("a.jsonl", GOOD + lines({"text": 7}), "no text field", "a.jsonl, line 2: the text field `text`"),
        ("a.jsonl", GOOD + lines(["text"]), "no text field", "a.jsonl, line 2: the text field `text`"),
        ("a.jsonl", GOOD + lines({"text": ""}), "empty document", "a.jsonl, line 2: the document is empty"),
        ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', "invalid UTF-8", "line 2: the text has half a surrogate pair"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "invalid UTF-8", "a.jsonl, line 2: invalid UTF-8 at byte 10"),
        ("a.jsonl", b"", "empty file", "a.jsonl is empty"),
        ("a.txt", b"good \xe9t\xe9", "invalid UTF-8", r"a.txt: invalid UTF-8 at byte 5 \(0xe9\)"),
        ("a.txt", b"", "empty file", "a.txt is empty"),
        ("a.json.gz", gzip.compress(GOOD)[:-9], "damaged file", "a.json.gz, line .: the file is damaged or truncated"),
        ("a.json.gz", b"no gzip", "damaged file", "a.json.gz, line 1: the file is damaged"),
        ("a.txt.gz", gzip.compress(GOOD)[:-9], "damaged file", "a.txt.gz: damaged or truncated"),
        ("a.jsonl.zst", zst(GOOD * 1000)[:-9], "damaged file", "a.jsonl.zst, line .*: the file is damaged"),
        ("a.parquet", b"PAR1 and no more", "damaged file", "a.parquet: damaged parquet"),
    ],
)
def test_an_unusable_record_names_its_place_and_problem(tmp_path, name, data, problem, where):
    (tmp_path / name).write_bytes(data)
    *good, bad = read(tmp_path)
    assert all(document.text == "good" for document in good)
    assert bad.text is None and bad.problem == problem and re.search(where, bad.where)
    assert "\n" not in bad.where and bad.number == len(good)


def test_parquet_strings_that_are_missing_empty_or_invalid(tmp_path):
    values = pa.array([b"good", None, b"", b"\xff"], pa.binary())
    text = pa.StringArray.from_buffers(len(values), *values.buffers()[1:], values.buffers()[0])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    documents = read(tmp_path)
    assert [d.problem for d in documents] == ["", "no text field", "empty document", "invalid UTF-8"]
    assert documents[3].where == "a.parquet, row 3: invalid UTF-8 at byte 0 (0xff)"


def test_a_parquet_file_without_the_text_column_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column `text` \(data.source_options.text_field\), but body"):
        read(tmp_path)
    assert [d.text for d in read(tmp_path, text_field="body")] == ["x"]
