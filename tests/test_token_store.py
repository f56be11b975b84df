import json
import os

import numpy as np
import pytest

from trialgpt_jax import UserError
from trialgpt_jax.data import shard_writer, token_store
from trialgpt_jax.data.vocabulary import TokenizerId
from trialgpt_jax.storage import json_files


def write_store(folder, shards=((10, 7, 13), (9,)), vocab=300, seed=0):
    """Writes a store with the given shard lengths for train and val; returns the ids of both."""
    rng, records, ids = np.random.default_rng(seed), [], {}
    for split, lengths in zip(token_store.SPLITS, shards, strict=True):
        ids[split] = []
        for number, length in enumerate(lengths):
            writer = shard_writer.ShardWriter(str(folder), f"{split}_{number:05d}.bin", split, np.uint16)
            data = rng.integers(0, vocab - 1, length)
            data[-1] = vocab - 1
            writer.append(data, 1, 4 * length)
            records.append(writer.finish())
            ids[split] += data.tolist()
    manifest = {"format_version": 1, "tokenizer": {"name": "bpe:300", "hash": "0" * 64}, "vocab_size": vocab}
    manifest |= {"eot_id": vocab - 1, "dtype": "uint16", "shards": records}
    json_files.write(str(folder / "manifest.json"), manifest)
    return ids


def change(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_reading_across_shards_equals_the_concatenation(tmp_path):
    ids = write_store(tmp_path)
    split = token_store.open_store(str(tmp_path)).split("train")
    assert (split.n_tokens, split.n_bytes, split.max_id) == (30, 120, 299)
    for start in range(30):
        for count in range(31 - start):
            read = split.read(start, count)
            assert read.dtype == np.int32 and read.tolist() == ids["train"][start : start + count]
    for start, count in ((-1, 2), (25, 6), (31, 0)):
        with pytest.raises(IndexError):
            split.read(start, count)
    assert [split.n_windows(t) for t in (1, 5, 10, 29, 30)] == [29, 5, 2, 1, 0]


def test_verify_accepts_a_good_store_and_names_the_shard_with_a_flipped_bit(tmp_path):
    write_store(tmp_path)
    assert [record["tokens"] for record in token_store.verify(str(tmp_path))] == [10, 7, 13, 9]
    data = bytearray((tmp_path / "train_00001.bin").read_bytes())
    data[4] ^= 1
    (tmp_path / "train_00001.bin").write_bytes(data)
    token_store.open_store(str(tmp_path))  # opening reads no tokens
    with pytest.raises(UserError, match=r"train_00001.bin is damaged: its sha256 is"):
        token_store.verify(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_id", 298, "its largest id is 299, but should be 298"),
        ("documents", 2, "its number of documents is 1, but should be 2"),
    ],
)
def test_verify_checks_counts(tmp_path, field, value, message):
    write_store(tmp_path)
    change(tmp_path, lambda manifest: manifest["shards"][0].update({field: value}))
    with pytest.raises(UserError, match=message):
        token_store.verify(str(tmp_path))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=9), "has format version 9, but this program reads 1"),
        (lambda m: m.pop("eot_id"), "is not a valid manifest"),
        (lambda m: m.update(dtype="float32"), "is not a valid manifest"),
        (lambda m: m["shards"][0].update(tokens=-1), "is not a valid manifest"),
        (lambda m: m["shards"][0].update(file="../train_00000.bin"), "is not a plain file name inside the folder"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "is not a plain file name inside the folder"),
        (lambda m: m["shards"][0].update(max_id=300), "largest id 300, but the vocabulary has 300 ids"),
        (lambda m: m["shards"][0].update(tokens=11), r"has 20 bytes, but its 11 tokens take 22: it is truncated"),
        (lambda m: m["shards"][0].update(file="train_00009.bin"), "train_00009.bin is missing, though the store names"),
        (lambda m: m.update(shards=[]), "is empty: its training split has no tokens"),
    ],
)
def test_an_invalid_manifest_is_refused_with_one_line(tmp_path, edit, message):
    write_store(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(UserError, match=message) as error:
        token_store.open_store(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_unfinished_and_unrelated_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; run `trialgpt preprocess`"):
        token_store.open_store(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no token store"):
        token_store.open_store(str(tmp_path))
    (tmp_path / "progress_0_of_1.json").write_text("{}")
    with pytest.raises(UserError, match="is an unfinished token store"):
        token_store.open_store(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not a valid manifest"):
        token_store.open_store(str(tmp_path))


def test_nanogpts_files_open(tmp_path):
    for name, length in (("train", 100), ("val", 10)):
        np.arange(length, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    store = token_store.open_store(str(tmp_path))
    assert (store.tokenizer_id, store.vocab_size, store.eot_id) == (TokenizerId("gpt2", None), 50257, 50256)
    assert store.manifest is None
    assert store.split("train").read(40, 3).tolist() == [40, 41, 42] and store.split("val").n_tokens == 10
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="val.bin has 3 bytes, an odd number"):
        token_store.open_store(str(tmp_path))
    (tmp_path / "val.bin").unlink()
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        token_store.open_store(str(tmp_path))


def test_llm_c_shards_open(tmp_path):
    for name, first in (("fineweb_train_000001", 0), ("fineweb_train_000002", 50), ("fineweb_val_000000", 7)):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 50
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(np.arange(first, first + 50, dtype=np.uint16).tobytes())
    store = token_store.open_store(str(tmp_path))
    assert store.split("train").read(0, 100).tolist() == list(range(100))
    assert store.split("val").read(0, 2).tolist() == [7, 8]
    with open(tmp_path / "fineweb_train_000002.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match="fineweb_train_000002.bin has 1126 bytes, but its 50 tokens take 1124"):
        token_store.open_store(str(tmp_path))
    np.zeros(600, np.int32).tofile(tmp_path / "fineweb_train_000002.bin")
    with pytest.raises(UserError, match="is neither in a manifest nor an llm.c shard"):
        token_store.open_store(str(tmp_path))


def llmc(path, ids, magic=20240520, version=1):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


SMALL = np.arange(600, dtype=np.uint16)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p: np.full(9, 50257, np.uint16).tofile(p),
            "the training split has the token id 50257, but gpt2, the",
        ),
        (
            lambda p: np.full(9, 65535, np.uint16).tofile(p),
            "token id 65535, but gpt2, the tokenizer of such files, has",
        ),
        (lambda p: SMALL.astype(np.uint32).tofile(p), "holds uint32 ids, but nanoGPT's files hold uint16"),
        (lambda p: SMALL.astype(np.int64).tofile(p), "holds uint32 ids, but nanoGPT's files hold uint16"),
        (lambda p: np.save(p.open("wb"), SMALL), "train.bin is a .npy file of numpy"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "train.bin is a Git LFS pointer"),
        (lambda p: llmc(p, SMALL.astype(np.uint32), 20240801, 7), "uint32 ids of Llama 3's tokenizer .magic 20240801"),
        (lambda p: llmc(p, SMALL, 20240522), "an llm.c file of multiple-choice questions"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"abc"), "has 3 bytes, an odd number"),
    ],
)
def test_foreign_files_that_contradict_their_tokenizer_or_format_are_refused_when_opened(tmp_path, write, message):
    write(tmp_path / "train.bin")
    SMALL.tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=message) as error:
        token_store.open_store(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("magic", "version", "message"),
    [
        (20240801, 7, "uint32 ids of Llama 3's tokenizer"),
        (20240520, 2, "is neither in a manifest nor an llm.c shard .*; it begins with 20240520, 2, 600"),
        (7, 7, "it begins with 7, 7, 600"),
    ],
)
def test_llm_c_shards_of_another_kind_are_refused_by_what_they_are(tmp_path, magic, version, message):
    llmc(tmp_path / "x_train_000001.bin", SMALL, magic, version)
    with pytest.raises(UserError, match=message):
        token_store.open_store(str(tmp_path))


def test_the_tokenizer_of_foreign_files_is_said(tmp_path, capsys):
    llmc(tmp_path / "train.bin", SMALL)  # a shard of llm.c under nanoGPT's name
    assert token_store.open_store(str(tmp_path)).split("train").read(0, 3).tolist() == [0, 1, 2]
    said = capsys.readouterr().err
    assert said == f"{tmp_path} has no manifest.json; its ids are taken for those of the tokenizer gpt2\n"


@pytest.mark.parametrize(("largest", "warned"), [(64, True), (255, True), (256, False)])
def test_ids_of_characters_without_their_meta_pkl_are_a_warning(tmp_path, capsys, largest, warned):
    (np.arange(20_000) % (largest + 1)).astype(np.uint16).tofile(tmp_path / "train.bin")
    token_store.open_store(str(tmp_path))
    assert ("hardly GPT-2's" in capsys.readouterr().err) == warned


def test_an_id_beyond_the_vocabulary_is_found_in_a_large_file_without_reading_all_of_it(tmp_path):
    ids = np.zeros(1 << 25, np.uint16)
    ids[-5] = 50257
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="token id 50257"):
        token_store.open_store(str(tmp_path))


def read_and_mapped() -> np.ndarray:
    """Bytes that this process has read from files, and bytes of its resident memory, mapped files included."""
    with open("/proc/self/io") as io, open("/proc/self/statm") as statm:
        read = int(io.readline().split()[1])
        return np.array([read, int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts what Linux's /proc counts")
def test_ten_billion_tokens_are_opened_without_reading_them(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * 10**10)  # sparse: uses no disk space
    before = read_and_mapped()
    split = token_store.open_store(str(tmp_path)).split("train")
    assert split.read(9_999_999_000, 1000).sum() == 0
    assert split.n_tokens == 10**10 and max(read_and_mapped() - before) < 50e6


def test_an_aborted_shard_leaves_no_file(tmp_path):
    writer = shard_writer.ShardWriter(str(tmp_path), "train_00000.bin", "train", np.uint16)
    writer.append(np.array([1, 2]), 1, 5)
    assert not (tmp_path / "train_00000.bin").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
