import datetime
import decimal

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import options, read

from trialgpt_jax import UserError
from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import count_rows, read_documents

TEXTS = ["one", None, "zwei é 🎉", ""]
PROBLEMS = ["", "no text field", "", "empty document"]


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


STRINGS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of binary": pa.dictionary(pa.int8(), pa.large_binary()),
}


@pytest.mark.parametrize("kind", STRINGS.values(), ids=STRINGS)
@pytest.mark.parametrize("limit", [64 << 20, 4])
def test_text_of_every_type_is_read(tmp_path, kind, limit):
    values = [text.encode() if text and "binary" in str(kind) else text for text in TEXTS]
    if pa.types.is_dictionary(kind):
        column = pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    else:
        column = pa.array(values, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read(tmp_path, max_document_bytes=limit)
    assert [d.text or "" for d in found] == ["one", "", "zwei é 🎉" if limit > 4 else "", ""]
    assert [d.problem for d in found] == PROBLEMS[:2] + ["" if limit > 4 else "too large"] + PROBLEMS[3:]
    assert found[1].where.startswith("a.parquet, row 1: the text field `text` is null")


def test_text_of_fixed_size_and_of_categories_and_of_nothing(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"abc", None], pa.binary(3))}), tmp_path / "a.parquet")
    pandas.DataFrame({"text": pandas.Categorical(["x", "y", "x"])}).to_parquet(tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\xef\xbb\xbfmark"])}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert [d.text for d in read(tmp_path)] == ["abc", None, "x", "y", "x", None, None, "mark"]


SOURCES = {
    "integer": (pa.array([1, None]), ["1", ""]),
    "list": (pa.array([["a", "b"], None]), ['["a", "b"]', ""]),
    "struct": (pa.array([{"a": 1}, None]), ['{"a": 1}', ""]),
    "null": (pa.nulls(2), ["", ""]),
    "dictionary": (pa.array(["wiki", None]).dictionary_encode(), ["wiki", ""]),
    "binary": (pa.array([b"wiki", b"\xff"]), ["wiki", "\ufffd"]),
    "boolean": (pa.array([True, None]), ["true", ""]),
    "date": (pa.array([datetime.date(2020, 1, 2), None]), ["2020-01-02", ""]),
    "late": (pa.array([10**15, None], pa.timestamp("s")), ["<value out of range: 1000000000000000000>", ""]),
    "late in a list": (pa.array([[10**15], None], pa.list_(pa.timestamp("s"))), ["list<element: timestamp[ms]>", ""]),
    "unknown zone": (pa.array([5, None], pa.timestamp("ms", "Nowhere/X")), ["timestamp[ms, tz=Nowhere/X]", ""]),
    "decimal": (pa.array([decimal.Decimal("1.50"), None]), ["1.50", ""]),
    "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())), ['[["a", 1]]', ""]),
}


@pytest.mark.parametrize(("column", "sources"), SOURCES.values(), ids=SOURCES)
def test_a_source_column_of_any_type_is_text(tmp_path, column, sources):
    pq.write_table(pa.table({"source": column, "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [(d.text, d.source) for d in read(tmp_path)] == list(zip("ab", sources, strict=True))


@pytest.mark.parametrize("start", range(7))
def test_empty_row_groups_count_no_rows(tmp_path, start):
    table = pa.table({"text": list("abcdef")})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for rows in (0, 2, 0, 0, 3, 1, 0):
            writer.write_table(table.slice(0, rows))
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)
    assert [d.text for d in read_documents(file, file.path, given, start)] == list("ababca")[start:]
    assert count_rows(file) == 6


def test_the_text_may_be_in_a_struct(tmp_path):
    inner = pa.array([{"b": {"c": "x"}, "n": 1}, {"b": None, "n": 2}, None])
    pq.write_table(pa.table({"a": inner, "source": ["s"] * 3}), tmp_path / "a.parquet")
    found = read(tmp_path, text_field="a.b.c")
    assert [(d.text, d.source) for d in found] == [("x", "s"), (None, "s"), (None, "s")]
    with pytest.raises(UserError, match=r"the column `a` .* is struct.*, not text; its fields are named as a.b"):
        read(tmp_path, text_field="a")
    with pytest.raises(UserError, match=r"a.parquet has no column `a.x` .*, but a, source, a.b, a.n"):
        read(tmp_path, text_field="a.x")


def test_a_column_whose_name_has_a_dot_is_found(tmp_path):
    pq.write_table(pa.table({"a.b": ["x"], "a": [{"b": "y"}]}), tmp_path / "a.parquet")
    assert [d.text for d in read(tmp_path, text_field="a.b")] == ["x"]


def test_columns_of_one_name_or_another_type_are_refused(tmp_path):
    schema = pa.schema([("text", pa.string()), ("text", pa.string()), ("n", pa.int64()), ("l", pa.list_(pa.string()))])
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1]), pa.array([["a"]])], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has 2 columns `text` .data.source_options.text_field.; rename"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a.parquet: the column `n` .* is int64, not text$"):
        read(tmp_path, text_field="n")
    with pytest.raises(UserError, match=r"a.parquet: the column `l` .* is list<.*string>, not text$"):
        read(tmp_path, text_field="l")


def test_two_source_columns_are_no_source(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["x"]), pa.array(["y"])], names=["text", "source", "source"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert [(d.text, d.source) for d in read(tmp_path)] == [("a", "")]


@pytest.mark.parametrize("change", ["cut", "other", "page", "encrypted", "empty"])
def test_a_damaged_file_is_one_line(tmp_path, change):
    pq.write_table(pa.table({"text": [f"row {i}" * 20 for i in range(1000)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    if change == "page":
        data[100:200] = bytes(100)
    changed = {"cut": data[:-20], "other": b"no parquet", "page": data, "encrypted": data[:-4] + b"PARE", "empty": b""}
    (tmp_path / "a.parquet").write_bytes(changed[change])
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)
    *good, bad = read_documents(file, file.path, given)
    assert bad.problem == ("empty file" if change == "empty" else "damaged file") and "\n" not in bad.where
    assert all(d.text for d in good) and len(bad.where) < 300
    if change != "page":
        with pytest.raises(UserError, match=r"^a.parquet: its rows cannot be counted, because the file is damaged"):
            count_rows(file)


def test_rows_of_what_is_no_parquet_file_are_not_counted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (file,) = corpora.list_files("files", options(tmp_path))
    with pytest.raises(UserError, match="^a.parquet is a Git LFS pointer and not the file; `git lfs pull`"):
        count_rows(file)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match="^a.parquet cannot be read: No such file or directory"):
        count_rows(file)


def test_rows_that_are_too_large_do_not_hide_the_others(tmp_path):
    texts = ["a", "b" * 2000, "c", "d" * 1000]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert [d.text for d in read(tmp_path, max_document_bytes=1000)] == ["a", None, "c", "d" * 1000]
    # A row group of longer rows is not decoded
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        for rows in (["a"], ["b" * 3_000_000, "c"], ["d"]):
            writer.write_table(pa.table({"text": rows}))
    found = read(tmp_path, max_document_bytes=1000)
    assert [d.text for d in found] == ["a", None, None, "d"] and {d.problem for d in found} == {"", "too large"}
    assert found[1].where.startswith("a.parquet, row 1: longer than")
