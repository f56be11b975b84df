import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, small_config
from corpus_files import lines, packed, read, tar, zst

MEMBERS = [("d/a.txt", "eins é".encode()), ("d/b.jsonl", lines({"text": "zwei"}, {"text": "drei"})), ("c.md", b"vier")]
TEXTS = ["eins é", "zwei", "drei", "vier"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tar", tar(MEMBERS)),
        ("a.tar", tar(MEMBERS, format=tarfile.USTAR_FORMAT)),
        ("a.tar.gz", gzip.compress(tar(MEMBERS))),
        ("a.tgz", gzip.compress(tar(MEMBERS))),
        ("a.tar.xz", lzma.compress(tar(MEMBERS))),
        ("a.txz", lzma.compress(tar(MEMBERS))),
        ("a.tar.bz2", bz2.compress(tar(MEMBERS))),
        ("a.tbz2", bz2.compress(tar(MEMBERS))),
        ("a.TAR.ZST", zst(tar(MEMBERS))),
        ("a.tzst", zst(tar(MEMBERS))),
        ("part_data.xz", lzma.compress(tar(MEMBERS))),
        ("part_data.gz", gzip.compress(tar(MEMBERS))),
        ("a.zip", packed(MEMBERS)),
        ("a.zip", packed(MEMBERS, zipfile.ZIP_STORED)),
        ("a.zip", packed(MEMBERS, zipfile.ZIP_BZIP2)),
        ("a.zip", packed(MEMBERS, zipfile.ZIP_LZMA)),
        ("a.zip", packed([("inner.tar.xz", lzma.compress(tar(MEMBERS)))])),
        ("a.tar", tar([("b_data.bz2", bz2.compress(tar(MEMBERS[:2]))), ("c.md.zst", zst(b"vier"))])),
    ],
)
def test_members_are_read_by_the_rules_of_files_and_numbered_through(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert [(d.number, d.text) for d in read(tmp_path)] == list(enumerate(TEXTS))
    for start in range(5):
        assert [d.text for d in read(tmp_path, start)] == TEXTS[start:]


def openwebtext(parts=3, texts=5):
    """An archive as OpenWebText's: tars in xz without `.tar` in their names, in a tar in xz."""
    inner = [
        lzma.compress(tar([(f"{i:07d}-{j:032x}.txt", f"text {i}.{j}\n".encode() * 50) for j in range(texts)]))
        for i in range(parts)
    ]
    named = [(f"openwebtext/urlsf_subset{i:02d}-1_data.xz", data) for i, data in enumerate(inner)]
    return lzma.compress(tar([(".", b""), *named]))


def test_the_archives_of_openwebtext_are_read(tmp_path):
    (tmp_path / "openwebtext.tar.xz").write_bytes(openwebtext())
    texts = [f"text {i}.{j}\n" * 50 for i in range(3) for j in range(5)]
    assert [d.text for d in read(tmp_path) if not d.left_out] == texts


def test_members_that_are_no_documents_are_left_out_with_the_reason(tmp_path):
    link, device, folder = (tarfile.TarInfo(name) for name in ("link.txt", "null.txt", "folder.txt"))
    link.type, link.linkname, device.type, folder.type = (
        tarfile.SYMTYPE,
        "/etc/passwd",
        tarfile.CHRTYPE,
        tarfile.DIRTYPE,
    )
    files = [("../../up.txt", b"up"), ("x.png", b"\x89PNG"), ("./.git/a.txt", b"x"), ("__MACOSX/._a.txt", b"x")]
    (tmp_path / "a.tar").write_bytes(tar([link, *files, device, folder, ("data.gz", gzip.compress(b"no tar"))]))
    (tmp_path / "b.zip").write_bytes(packed([*files, ("/abs/last.txt", b"last"), ("folder.txt/", b"")]))
    found = read(tmp_path)
    assert [d.problem or d.text for d in found] == [
        *("link or device in an archive", "up", "other ending in an archive"),
        *["hidden file in an archive"] * 2,
        *("link or device in an archive", "other ending in an archive"),
        *("up", "other ending in an archive", *["hidden file in an archive"] * 2, "last"),
    ]
    assert all(d.left_out == (d.text is None) for d in found)
    assert not list(tmp_path.parent.glob("up.txt"))


def test_what_cannot_be_read_as_a_stream_is_refused(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["x"]}), table)
    inside = [("a.parquet", table.getvalue()), ("b.zip", packed(MEMBERS)), ("c.txt", b"good"), ("d.txt", b"")]
    (tmp_path / "a.tar").write_bytes(tar(inside))
    found = read(tmp_path)
    problems = ["parquet in an archive", "zip in an archive", "", "empty file"]
    assert [d.problem for d in found] == problems and not any(d.left_out for d in found)
    assert (
        found[0].where == "a.tar, a.parquet: parquet is not read within an archive, because its directory is at its end"
    )


@pytest.mark.parametrize("depth", [4, 5])
def test_archives_are_read_four_deep(tmp_path, depth):
    data = ("a.txt", b"text")
    for i in range(depth):
        data = (f"{i}.tar", tar([data, ("end.txt", b"end")]))
    (tmp_path / "a.tar").write_bytes(data[1])
    found = read(tmp_path)
    if depth == 4:
        assert [d.text for d in found] == ["text"] + ["end"] * 4
    else:
        assert found[0].where.endswith("0.tar: archives within archives are read 4 deep")
        assert [d.text for d in found[1:]] == ["end"] * 4


def broken_header():
    data = bytearray(tar([("a.txt", b"good"), ("b.txt", b"b" * 600), ("c.txt", b"c")]))
    data[1024 : 1024 + 100] = b"\xff" * 100
    return bytes(data)


def long_header():
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    return tar([("a.txt", b"good")])[:1024] + info.tobuf(tarfile.GNU_FORMAT)


def encrypted():
    data = bytearray(packed([("a.txt", b"good"), ("b.txt", b"secret")]))
    second = data.rindex(b"PK\x03\x04", 0, data.index(b"PK\x01\x02"))
    last = data.rindex(b"PK\x01\x02")
    data[second + 6] |= 1
    data[last + 8] |= 1
    return bytes(data)


def wrong_checksum():
    data = bytearray(packed([("a.txt", b"good"), ("b.txt", b"wrong")], zipfile.ZIP_STORED))
    data[data.index(b"wrong")] ^= 1
    return bytes(data)


TWO = tar([("a.txt", b"good"), ("b.txt", b"b" * 600)])
BIG = tar([("a.txt", b"good"), ("b.txt", np.random.default_rng(0).bytes(10**6))])


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("a.tar", TWO[:1800], "a.tar, b.txt: damaged or truncated (unexpected end of data)"),
        ("a.tar", TWO[:1300], "a.tar, after 1 records: the file is damaged or truncated here (truncated header)"),
        ("a.tar", TWO[:1024], "a.tar, after 1 records: the file is damaged or truncated here (empty header)"),
        ("a.tar.gz", gzip.compress(BIG)[:-20], "a.tar.gz, b.txt: damaged or truncated (Compressed file ended"),
        ("a.tar.xz", lzma.compress(TWO + bytes(10**6))[:-60], "a.tar.xz, after 2 records: the file is damaged"),
        ("a.tar.gz", gzip.compress(TWO)[:-1], "a.tar.gz, after 2 records: the file is damaged"),
        ("a.tar", TWO + TWO, "a.tar, after 2 records: the file is damaged or truncated here (there is something after"),
        ("a.tar", broken_header(), "a.tar, after 1 records: the file is damaged or truncated here (bad checksum)"),
        (
            "a.tar",
            long_header(),
            "a.tar, after 1 records: the file is damaged or truncated here (a header of 1099511627776",
        ),
        ("a.zip", encrypted(), "a.zip, b.txt is encrypted"),
        ("a.zip", wrong_checksum(), "a.zip, b.txt: damaged or truncated (Bad CRC-32 for file 'b.txt')"),
    ],
)
def test_damage_is_counted_and_what_is_before_it_is_read(tmp_path, name, data, where):
    (tmp_path / name).write_bytes(data)
    good, *bad = read(tmp_path)
    bad = [d for d in bad if d.text is None]
    assert good.text == "good"
    assert (
        1 <= len(bad) <= 2 and bad[-1].problem in ("damaged file", "encrypted file") and bad[0].where.startswith(where)
    )
    assert all("\n" not in d.where for d in bad)


@pytest.mark.parametrize(
    ("name", "data"), [("a.zip", packed(MEMBERS)[:-30]), ("a.tar", b"x" * 2000), ("a.tgz", gzip.compress(TWO)[:-99])]
)
def test_a_file_that_is_no_archive_is_one_damaged_record(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (bad,) = read(tmp_path)
    assert bad.problem == "damaged file" and bad.where.startswith(name)


def test_the_card_of_a_dataset_within_an_archive_is_left_out(tmp_path):
    card = b"---\nlicense: mit\n---\n# Card"
    members = [("README.md", card), ("d/Readme.md", card), ("e/README.md", b"# Notes"), ("f/post.md", card)]
    for name, data in (("a.tar", tar(members)), ("b.zip", packed(members))):
        (tmp_path / name).write_bytes(data)
    found = read(tmp_path)
    assert [d.text for d in found] == [None, None, "# Notes", card.decode()] * 2
    assert all(d.left_out and d.problem == "dataset card in an archive" for d in found if d.text is None)


def test_a_member_of_a_zip_with_an_unknown_compression_says_so(tmp_path):
    data = bytearray(packed([("a.txt", b"a"), ("b.txt", b"b")]))
    data[data.index(b"PK\1\2") + 10] = 9  # deflate64
    (tmp_path / "a.zip").write_bytes(data)
    bad, good = read(tmp_path)
    assert good.text == "b" and bad.problem == "unknown compression"
    assert bad.where.startswith("a.zip, a.txt is compressed with method 9, which cannot be read")


def test_a_pointer_of_git_lfs_within_an_archive_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.zip").write_bytes(packed([("repo/data.jsonl.gz", pointer), ("b.txt", b"good")]))
    bad, good = read(tmp_path)
    assert bad.problem == "Git LFS pointer" and good.text == "good"


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_archive_ends_in_records_and_never_in_a_traceback(tmp_path, seed):
    rng = random.Random(seed)
    name, data = rng.choice([("a.tar", tar(MEMBERS)), ("a.zip", packed(MEMBERS)), ("a.tar.xz", openwebtext(2, 2))])
    data = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / name).write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.4 else data)
    found = read(tmp_path)
    assert [d.number for d in found] == list(range(len(found)))
    assert all("\n" not in d.where for d in found)


def store_of(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}


def test_a_job_that_is_killed_within_an_archive_continues_there(tmp_path, monkeypatch):
    """The bytes of the store are those of an uninterrupted run, with records left out and damaged on the way."""
    from trialgpt_jax.data import units
    from trialgpt_jax.preprocess import preprocess

    (tmp_path / "in").mkdir()
    inner = [(f"{i}.txt", f"document {i} ".encode() * 30) for i in range(40)]
    inner[7:7] = [("x.png", b""), ("bad.txt", b"\xff"), ("l.jsonl", lines({"text": "line"}, {"body": 1}))]
    archive = tar([("part_data.xz", lzma.compress(tar(inner[:20]))), ("rest.tar.bz2", bz2.compress(tar(inner[20:])))])
    (tmp_path / "in" / "a.tar.xz").write_bytes(lzma.compress(archive))

    def config(name):
        c = small_config(tmp_path / name)
        c.data.update(
            {"source": "files", "tokenizer": "gpt2", "val_fraction": 0.3, "shard_tokens": 200, "num_workers": 1}
        )
        c.data.source_options.update({"path": str(tmp_path / "in"), "on_error": "skip"})
        return c

    preprocess(config("whole"))
    finish, finished = units._Unit.finish, []

    def dies(unit, following):
        if len(finished) % 3 == 2 and following:
            finished.append("killed")
            raise KeyboardInterrupt
        finished.append(following)
        return finish(unit, following)

    monkeypatch.setattr(units._Unit, "finish", dies)
    for _ in range(20):
        try:
            preprocess(config("parts"))
            break
        except KeyboardInterrupt:
            continue
    assert finished.count("killed") > 2
    whole, parts = store_of(tmp_path / "whole"), store_of(tmp_path / "parts")
    assert whole == parts and len(whole) > 8


def test_a_command_reads_an_archive_and_says_what_it_left_out(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar([*MEMBERS, ("x.png", b"x")])))
    flags = ["--config.data.source=files", f"--config.data.source_options.path={tmp_path}/a.tar.gz"]
    flags += [
        f"--config.data.dir={tmp_path}/store",
        "--config.data.tokenizer=gpt2",
        "--config.data.val_fraction=0.5",
    ]
    done = call("preprocess", "--config=configs/quickstart.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "other ending in an archive" in (tmp_path / "store" / "manifest.json").read_text()
