import bz2
import errno
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, call
from corpus_files import lines, options, packed, peak_memory, read, tar, zst

from trialgpt_jax import UserError
from trialgpt_jax.data import corpora, formats, streams
from trialgpt_jax.data.documents import is_readable, read_documents
from trialgpt_jax.storage import json_files

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
        ("a.ndjson.xz", lzma.compress(LINES[:30]) + bytes(4) + lzma.compress(LINES[30:])),
        ("a.jsonl.bz2", bz2.compress(LINES[:30]) + bz2.compress(LINES[30:])),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", LINES.decode().encode("utf-16")),
        ("a.jsonl", LINES.decode().encode("utf-32")),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in read(tmp_path)] == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.txt", bytes),
        ("A.MD", bytes),
        ("a.txt.gz", gzip.compress),
        ("a.md.zst", zst),
        ("a.txt.xz", lzma.compress),
        ("a.txt.bz2", bz2.compress),
    ],
)
def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + DOCUMENTS[0].encode()))
    assert [document.text for document in read(tmp_path / name)] == [DOCUMENTS[0]]


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
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def xz_of_1_gib():
    """An .xz whose header claims a dictionary of 1 GiB."""
    data = bytearray(lzma.compress(GOOD))
    data[16] = 0x26  # 2^30 in https://tukaani.org/xz/xz-file-format.txt, 5.3.1
    data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
    return bytes(data)


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
        ("a.json.gz", b"no gzip!", "wrong format", "a.json.gz is not gzip data, though its name ends in .gz"),
        ("a.txt.zst", gzip.compress(GOOD), "wrong format", "a.txt.zst is not zstd data, though its name ends in .zst"),
        ("a.txt.xz", b"plain text", "wrong format", "a.txt.xz is not xz data, though its name ends in .xz"),
        ("a.tar.bz2", tar([("b.txt", GOOD)]), "wrong format", "a.tar.bz2 is not bzip2 data, though its name ends in"),
        ("a.jsonl.gz", gzip.compress(GOOD) + b"junk", "damaged file", "a.jsonl.gz, line 2: the file is damaged"),
        (
            "a.tar",
            gzip.compress(tar([("b.txt", GOOD)])),
            "wrong format",
            "a.tar is gzip data, not tar; its name should",
        ),
        ("a.txt", bytes(1000), "wrong format", "a.txt begins with NUL bytes alone, as a damaged file does"),
        ("a.jsonl", bytes(1000), "wrong format", "a.jsonl begins with NUL bytes alone"),
        ("a.txt", b"SQLite format 3\0" + bytes(84), "wrong format", "a.txt is SQLite data, not text"),
        ("a.txt", b"\xff\xd8\xff\xe0\0\x10JFIF\0", "wrong format", "a.txt is JPEG data, not text"),
        ("a.txt", LFS.replace(b"git-lfs", b"hawser"), "Git LFS pointer", "a.txt is a Git LFS pointer"),
        ("a.txt.gz", gzip.compress(GOOD)[:-9], "damaged file", "a.txt.gz: damaged or truncated"),
        ("a.jsonl.zst", zst(GOOD * 1000)[:-9], "damaged file", "a.jsonl.zst, line .*: the file is damaged"),
        ("a.jsonl.xz", lzma.compress(GOOD * 1000)[:-40], "damaged file", "a.jsonl.xz, line .*: the file is damaged"),
        ("a.txt.xz", lzma.compress(GOOD)[:-9], "damaged file", "it ends before the end of the compressed data"),
        ("a.txt.bz2", bz2.compress(GOOD)[:-9], "damaged file", "it ends before the end of the compressed data"),
        ("a.txt.bz2", bz2.compress(GOOD) + b"junk", "damaged file", "a.txt.bz2: damaged or truncated"),
        ("a.txt.xz", xz_of_1_gib(), "damaged file", "a.txt.xz: damaged or truncated .Memory usage limit"),
        ("a.parquet", b"PAR1 and no more", "damaged file", "a.parquet: damaged parquet"),
        ("a.txt", "Grüße".encode("latin-1"), "invalid UTF-8", "byte 2 .0xfc.; text in latin-1 or another"),
        ("a.txt", "much text".encode("utf-16-le"), "wrong format", "a.txt looks like UTF-16 without a byte order mark"),
        ("a.txt", "Grüße".encode("utf-16")[:-1], "damaged file", "a.txt: damaged or truncated .invalid UTF-16"),
        ("a.txt", gzip.compress(GOOD), "wrong format", "a.txt is gzip data, not text; its name should end in .gz"),
        ("a.txt", bz2.compress(GOOD), "wrong format", "a.txt is bzip2 data, not text; its name should end in .bz2"),
        ("a.jsonl", zst(GOOD), "wrong format", "a.jsonl is zstd data, not json; its name should end in .zst"),
        ("a.txt.gz", gzip.compress(tar([("b.txt", GOOD)])), "wrong format", "a.txt.gz is a tar archive, not text"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "wrong format", "a.jsonl is an HTML or XML page, not JSON"),
        ("a.txt", LFS, "Git LFS pointer", "a.txt is a Git LFS pointer and not the file; `git lfs pull`"),
        ("a.jsonl.gz", LFS, "Git LFS pointer", "a.jsonl.gz is a Git LFS pointer"),
        ("a.parquet", LFS, "Git LFS pointer", "a.parquet is a Git LFS pointer"),
        ("a.tar.xz", LFS, "Git LFS pointer", "a.tar.xz is a Git LFS pointer"),
    ],
)
def test_an_unusable_record_names_its_place_and_problem(tmp_path, name, data, problem, where):
    (tmp_path / name).write_bytes(data)
    *good, bad = read(tmp_path)
    assert all(document.text == "good" for document in good)
    assert bad.text is None and bad.problem == problem and re.search(where, bad.where)
    assert "\n" not in bad.where and bad.number == len(good)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", LFS[:42] + b" is the first line of a pointer of Git LFS\n"),
        ("a.txt", b"a\0b"),
        ("a.txt.xz", lzma.compress(b"text", format=lzma.FORMAT_ALONE)),
        ("a.txt.zst", b"\x50\x2a\x4d\x18\4\0\0\0skip" + zst(b"text")),
    ],
)
def test_unusual_text_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (only,) = read(tmp_path)
    assert only.text == ("text" if name != "a.txt" else data.decode())


def test_the_kind_of_a_file_comes_from_its_name(tmp_path):
    (tmp_path / "x_data.xz").write_bytes(lzma.compress(tar([("a.txt", b"text")])))
    (tmp_path / "y_data.xz").write_bytes(lzma.compress(b"something else"))
    assert all(is_readable(name) for name in ("a.txt", "b/a.JSONL.gz", "a.tar.zst", "a.TGZ", "a.zip", "a.parquet"))
    assert not any(is_readable(name) for name in ("a", "a.csv", "a.parquet.gz", "a.zip.xz", "txt", "a.txt.gz.gz"))
    names = ("LICENSE", "a/LICENSE.gz", "a.py", "a.PY.xz")
    assert all(is_readable(name, formats.extensions(" .py, LICENSE ")) for name in names)
    assert not any(is_readable(name) for name in names) and not is_readable("MYLICENSE", ("LICENSE",))
    assert is_readable("x_data.xz", path=str(tmp_path / "x_data.xz"))
    assert not is_readable("y_data.xz", path=str(tmp_path / "y_data.xz"))


def test_other_text_is_read_by_its_ending(tmp_path):
    for name in ("a.py", "LICENSE", "b.rst"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.tar").write_bytes(tar([("x/a.py", b"in tar"), ("x/b.rst", b"rst"), ("x/LICENSE", b"licence")]))
    texts = [d.text for d in read(tmp_path, extensions=".py LICENSE")]
    assert texts == ["LICENSE", "a.py", "in tar", None, "licence"]


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("wiki", "wiki"),
        (None, ""),
        (7, "7"),
        (2.5, "2.5"),
        (True, "true"),
        (["a", {"b": 1}], '["a", {"b": 1}]'),
        ("\ud800x", "\ufffdx"),
        ({"\ud800": "\udc00"}, '{"\ufffd": "\ufffd"}'),
        ("é" * 300, "é" * 200),
        (1e999, "Infinity"),
    ],
)
def test_a_source_of_any_type_is_text_that_the_manifest_can_hold(tmp_path, value, source):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x", "source": value}))
    (document,) = read(tmp_path)
    assert document.source == source
    json_files.write(str(tmp_path / "manifest.json"), {document.source: 1})
    if source and "," not in source:
        assert [d.text for d in read(tmp_path / "a.jsonl", subset=f"other, {source}")] == ["x"]


def test_null_characters_and_marks_within_a_text_are_kept(tmp_path):
    for i, text in enumerate(["a\0b", "\ufeff\ufeffa", "a\ufeff"]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert [d.text for d in read(tmp_path)] == ["a\0b", "\ufeffa", "a\ufeff"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_text_with_the_byte_order_mark_of_another_encoding_is_decoded(tmp_path, encoding):
    text = "Grüße 🎉\r\n" * 100_000  # more than one chunk
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert [d.text for d in read(tmp_path)] == [text]


LONG = "x" * 1001  # too long for a limit of 1000


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", LONG.encode()),
        ("a.txt", ("é" * 501).encode()),
        ("a.txt", ("é" * 501).encode("utf-16")),
        ("a.txt.gz", gzip.compress(LONG.encode())),
        ("a.jsonl", lines({"text": LONG})),
        ("a.jsonl", lines({"text": "é" * 501})),
        ("a.jsonl", lines({"text": "é" * 2_000_000})),  # longer than any line is read
        ("a.json", json.dumps([{"text": "x" * 2_000_000}, {"text": "good"}]).encode()),
        ("a.json", json.dumps([[["]", '\\\\"}', "\\\\" * 600_000], {}], "good"]).encode()),
        ("a.tar", tar([("a.txt", LONG.encode())])),
        ("a.zip", packed([("a.txt", LONG)])),
    ],
)
def test_a_document_that_is_too_large_is_refused_and_the_next_one_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data + GOOD * name.endswith("jsonl"))
    bad, *good = read(tmp_path, max_document_bytes=1000)
    assert bad.text is None and bad.problem == "too large" and bad.where.startswith(name)
    assert "longer than data.source_options.max_document_bytes=1000; a larger value reads it" in bad.where
    assert [d.text for d in good] == ["good"] * ("json" in name and "txt" not in name)


def test_a_document_of_just_the_largest_size_is_read(tmp_path):
    text = "ü€" * 200
    for i, data in enumerate([text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")]):
        (tmp_path / f"{i}.txt").write_bytes(data)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text, "other": "x" * 100_000}))
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}, text], indent=1))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "c.parquet")
    # follows: a larger value reads it
    assert [d.text for d in read(tmp_path, max_document_bytes=1000)] == [text] * 7
    assert {d.problem for d in read(tmp_path, max_document_bytes=999)} == {"too large"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.tar.gz", "a.parquet"])
def test_memory_is_bounded_whatever_a_compressed_file_holds(tmp_path, name):
    size, path = 1 << 29, tmp_path / name
    begin = {"a.jsonl.gz": b'{"text": "good"}\n{"text": "', "a.json.gz": b'[{"text": "good"}, {"text": "'}.get(
        name, b""
    )
    if name == "a.tar.gz":
        info = tarfile.TarInfo("a.txt")
        info.size = size
        begin = info.tobuf()
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(begin)
            for _ in range(size >> 20):
                file.write(bytes([120]) * (1 << 20))
            file.write({"a.jsonl.gz": b'"}\n', "a.json.gz": b'"}]'}.get(name, bytes(1024)))
    else:
        pq.write_table(pa.table({"text": ["x" * size]}), path, compression="zstd", write_statistics=False)
    code = peak_memory(path, max_document_bytes=8 << 20)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    grown, *problems = done.stdout.split(maxsplit=1)
    assert done.returncode == 0, done.stderr
    assert int(grown) < 300 and "too large" in problems[0]


@pytest.mark.parametrize("start", [0, 3])
def test_a_file_that_the_disk_cannot_read_is_an_unreadable_record(tmp_path, monkeypatch, start):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 100_000)
    given = options(tmp_path)
    (file,) = corpora.list_files("files", given)

    def broken(stream, n):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(streams, "read_up_to", broken)
    bad = list(read_documents(file, file.path, given, start))
    assert [(d.number, d.problem) for d in bad] == [(start, "unreadable")]
    assert bad[0].where == "a.jsonl, line 1 cannot be read: Input/output error"


def test_a_file_that_is_gone_is_an_unreadable_record(tmp_path):
    (tmp_path / "a.txt").write_bytes(GOOD)
    (file,) = corpora.list_files("files", options(tmp_path))
    os.remove(file.path)
    (bad,) = read_documents(file, file.path, options(tmp_path))
    assert bad.problem == "unreadable" and bad.where == "a.txt cannot be read: No such file or directory"


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_a_table_is_read_after_the_command_that_the_message_gives(tmp_path, name, separator):
    table = f'id{separator}body\n1{separator}"two\nlines{separator}"\n2{separator}x\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(table) if name.endswith("gz") else table)
    with pytest.raises(UserError, match=f"{name} is a table; convert it with python -c") as error:
        read(tmp_path / name)
    # follows: is a table; convert it with python -c
    exec(re.search(r'python -c "(.*)" and', str(error.value))[1], {})  # noqa: S102
    found = read(tmp_path / f"{name}.parquet", text_field="body")
    assert [d.text for d in found] == [f"two\nlines{separator}", "x"]


def test_a_dataset_saved_to_disk_is_read_after_the_command_that_the_message_gives(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    with pytest.raises(UserError, match="is an Arrow file; if save_to_disk") as error:
        read(path)
    # follows: is an Arrow file; if save_to_disk of `datasets` wrote it, convert it with python -c
    exec(re.search(r'python -c "(.*)"$', str(error.value))[1], {})  # noqa: S102
    assert [d.text for d in read(f"{path}.parquet")] == ["a", "b"]


@pytest.mark.parametrize("name", ["a.rst", "LICENSE", "MAKEFILE.in", "a.py.xz", "README.gz", ".bashrc"])
def test_other_text_is_read_with_the_option_that_the_message_gives(tmp_path, name):
    pack = {"xz": lzma.compress, "gz": gzip.compress}.get(name[-2:], bytes)
    (tmp_path / name).write_bytes(pack(b"some text"))
    with pytest.raises(UserError, match="has none of the known endings .txt .md") as error:
        read(tmp_path / name)
    # follows: reads it as text
    extensions = re.search(r"data.source_options.extensions=(\S+) reads it as text", str(error.value))[1]
    assert [d.text for d in read(tmp_path / name, extensions=extensions)] == ["some text"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF-1.7", "holds formatted text; extract the text, and save it as .txt"),
        ("a.html", b"<html>", "holds formatted text"),
        ("a.docx", b"PK", "holds formatted text"),
        ("a.7z", b"7z", "is packed in a format that cannot be read; unpack it"),
        ("train.bin", b"\x01\0\x02\0", "is not text; readable are .txt"),
        ("a.parquet.gz", b"x", "has none of the known endings"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {message}"):
        read(tmp_path / name)


def preprocess(tmp_path, *options, name="input"):
    """The command on a file or folder of `tmp_path`."""
    flags = [f"--config.data.source_options.{option}" for option in (f"path={tmp_path / name}", *options)]
    given = ("--config=configs/quickstart.py", f"--config.data.dir={tmp_path}/store", "--config.data.source=files")
    return call("preprocess", *given, "--config.data.tokenizer=gpt2", "--config.data.num_workers=1", *flags)


def test_the_command_on_text_that_is_not_utf8_leads_to_a_store(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "input" / "b.json").write_text(
        json.dumps([{"text": f"good {i}", "source": "\ud800"} for i in range(99)])
    )
    done = preprocess(tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "a.txt: invalid UTF-8 at byte 2 (0xfc); text in latin-1 or another encoding" in done.stderr
    # follows: on_error=skip skips such documents
    done = preprocess(tmp_path, "on_error=skip")
    assert done.returncode == 0, done.stderr
    manifest = json_files.read(str(tmp_path / "store" / "manifest.json"))
    assert manifest["skipped"] == {"invalid UTF-8": 1} and list(manifest["sources"]) == ["\ufffd"]


@pytest.mark.parametrize("name", ["input.txt.xz", "input.tar.gz", "input.zip", "input.json"])
def test_the_command_reads_a_single_file_of_any_format(tmp_path, name):
    text = "".join(f"line {i}\n" for i in range(1000)).encode()
    many = [(f"{i}.txt", text[i:]) for i in range(20)]
    data = {
        "input.txt.xz": lambda: lzma.compress(text),
        "input.tar.gz": lambda: gzip.compress(tar(many)),
        "input.zip": lambda: packed(many),
        "input.json": lambda: json.dumps([data.decode() for _, data in many]).encode(),
    }
    (tmp_path / name).write_bytes(data[name]())
    done = preprocess(tmp_path, "max_document_bytes=5000", name=name)
    assert done.returncode == 2 and "longer than data.source_options.max_document_bytes=5000" in done.stderr
    done = preprocess(tmp_path, name=name)
    assert done.returncode == 0, done.stderr
    splits = {file.name for file in (tmp_path / "store").glob("*.bin")}
    assert name != "input.txt.xz" or splits == {"train_00000.bin", "val_00000.bin"}
