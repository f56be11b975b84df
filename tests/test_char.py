"""nanoGPT's character data, `train.bin`, `val.bin` and `meta.pkl`, in every command; and what is refused."""

import collections
import json
import math
import os
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import call, metrics, overrides, refused, small_config, train_step_compiled_once
from hypothesis import given
from hypothesis import strategies as st

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, token_store, tokenizer_source
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.char_tokenizer import CharTokenizer, from_texts, read_meta
from trialgpt_jax.data.shard_writer import ShardWriter
from trialgpt_jax.data.tokenizer import StreamingDecoder
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.storage import json_files

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler é 世 in the mind\n" * 60


def characters(text=TEXT):
    return sorted(set(text))


def meta(chars):
    """What nanoGPT's data/shakespeare_char/prepare.py pickles."""
    itos = dict(enumerate(chars))
    return {"vocab_size": len(chars), "itos": itos, "stoi": {char: i for i, char in itos.items()}}


def write_nanogpt(folder, text=TEXT):
    """A character store as nanoGPT's prepare.py writes it; 90% of the text are the training split."""
    folder.mkdir()
    contents = meta(characters(text))
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([contents["stoi"][char] for char in part], np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps(contents))
    return text[cut:]


def write_native(folder, source):
    """The ids of a nanoGPT store as a store with a manifest."""
    folder.mkdir()
    tokenizer, records = read_meta(str(source / "meta.pkl")), []
    for split in token_store.SPLITS:
        ids = np.fromfile(source / f"{split}.bin", np.uint16)
        writer = ShardWriter(str(folder), f"{split}_00000.bin", split, "uint16")
        writer.append(ids, 1, len(tokenizer.decode(ids).encode()))
        records.append(writer.finish())
    tokenizer.save(str(folder))
    manifest = {"format_version": 1, "tokenizer": tokenizer.id._asdict(), "vocab_size": tokenizer.vocab_size}
    manifest |= {"eot_id": None, "dtype": "uint16", "shards": records}
    json_files.write(str(folder / "manifest.json"), manifest)


def char_config(folder):
    config = small_config(folder)
    config.data.tokenizer = "gpt2"  # the default
    config.model.update({"vocab_size": 0, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16})
    config.train.update({"steps": 60, "batch_size": 4})
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 0
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A nanoGPT store, the same ids as a native store, and a run of 60 steps on each."""
    folder = tmp_path_factory.mktemp("char")
    write_nanogpt(folder / "nanogpt")
    write_native(folder / "native", folder / "nanogpt")
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    with train_step_compiled_once():
        for name in ("nanogpt", "native"):
            flags = overrides(char_config(folder / name))
            result = call("train", f"--config={folder}/default.py", *flags, f"--workdir={folder}/run_{name}")
            assert result.returncode == 0, result.stderr
            assert ("its ids are taken for those of the tokenizer char" in result.stderr) == (name == "nanogpt")
    return folder


def test_a_run_on_nanogpts_characters_equals_one_on_the_same_ids_with_a_manifest(world):
    losses = [[line["loss"] for line in metrics(world / f"run_{name}")] for name in ("nanogpt", "native")]
    assert len(losses[0]) == 60 and losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.3
    identities = [json.loads((world / f"run_{name}" / "tokenizer.json").read_text()) for name in ("nanogpt", "native")]
    assert identities[0] == identities[1] and identities[0]["name"] == "char"
    assert json.loads((world / "run_nanogpt" / "config.json").read_text())["data"]["tokenizer"] == "char"


def test_evaluate_counts_the_bytes_of_the_characters(world):
    results = [
        json.loads(call("evaluate", f"--workdir={world}/run_{n}", "--json").stdout) for n in ("nanogpt", "native")
    ]
    assert results[0] == results[1]
    val = TEXT[int(0.9 * len(TEXT)) :]
    expected = results[0]["loss"] * len(val) / len(val.encode()) / math.log(2)
    assert len(val.encode()) > len(val) and results[0]["bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_infer_decodes_the_characters_of_the_workdir_alone(world):
    workdir = f"--workdir={world}/run_nanogpt"
    result = call("infer", workdir, "--max_new_tokens=40", "--json")
    sample = json.loads(result.stdout)["samples"][0]
    assert len(sample["tokens"]) == 40  # there is no end-of-text
    assert sample["text"] == "".join(characters()[i] for i in sample["tokens"])
    refused(call("infer", workdir, "--prompt=To bЖ"), "--prompt", "'Ж' (U+0416) at position 4", "characters")
    refused(call("infer", workdir, "--prompt=a\udcffb"), "'\ufffd' (U+FFFD) at position 1")


def test_preprocess_shows_the_text(world):
    result = call("preprocess", f"--config.data.dir={world}/nanogpt", "--show=1")
    assert result.returncode == 0 and TEXT[:1000] in result.stdout
    result = call("preprocess", f"--config.data.dir={world}/native", "--show=1", "--verify")
    assert "all match the manifest" in result.stdout and TEXT[:1000] in result.stdout


def test_conversion_there_and_back_keeps_the_characters(world):
    transformers = pytest.importorskip("transformers")
    result = call("convert", f"--workdir={world}/run_nanogpt", f"--to_hf={world}/hf")
    assert result.returncode == 0, result.stderr
    ours, theirs = tokenizer_lib.load("char", str(world / "run_nanogpt")), None
    for load in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = load.from_pretrained(str(world / "hf"))
        assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
        assert theirs.decode(ours.encode(TEXT)) == TEXT
    with pytest.raises(Exception, match="Missing"):
        theirs("Ж")
    result = call("convert", f"--from_hf={world}/hf", f"--workdir={world}/back")
    assert result.returncode == 0, result.stderr
    assert tokenizer_lib.from_workdir(str(world / "back"), "").id == ours.id
    assert json.loads((world / "back" / "config.json").read_text())["model"]["vocab_size"] == len(characters())
    theirs.save_pretrained(str(world / "again"))
    assert hf_tokenizer.read(str(world / "again")).id == ours.id


def test_a_store_of_other_characters_or_tokenizers_is_refused(world, store, tmp_path):
    write_nanogpt(tmp_path / "other", TEXT.replace("q", "Q"))
    for folder in (tmp_path / "other", store):
        result = call("evaluate", f"--workdir={world}/run_nanogpt", f"--config.data.dir={folder}")
        refused(result, str(folder), "was made with", "was trained with char (", f"from:{world}/run_nanogpt")


# ---- own text with the characters of a run


def own_text(tmp_path, text, **data):
    (tmp_path / "own.txt").write_text(text)
    config = small_config(tmp_path / "own")
    config.data.update({"source": "files", "val_fraction": 0.3} | data)
    config.data.source_options.path = str(tmp_path / "own.txt")
    return config


def test_own_text_is_preprocessed_with_the_characters_of_a_run(world, tmp_path):
    config = own_text(tmp_path, TEXT[:500], tokenizer=f"from:{world}/run_nanogpt")
    manifest = preprocess(config)
    assert manifest["tokenizer"]["name"] == "char" and manifest["eot_id"] is None
    opened = token_store.open_store(str(tmp_path / "own"))
    assert opened.tokenizer_id == token_store.open_store(str(world / "nanogpt")).tokenizer_id
    tokenizer = tokenizer_lib.from_store(str(tmp_path / "own"))
    ids = [opened.split(name).read(0, opened.split(name).n_tokens) for name in ("train", "val")]
    assert "".join(map(tokenizer.decode, ids)) == TEXT[:500]
    token_store.verify(str(tmp_path / "own"))

    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in (("a", TEXT[:300]), ("b", "Жук"), ("c", TEXT[:300])):
        (texts / f"{name}.txt").write_text(text)
    config.data.dir, config.data.source_options.path = str(tmp_path / "three"), str(texts)
    with pytest.raises(UserError, match=r"b.txt, document 0: character 'Ж' .*position 0 .*on_error=skip skips"):
        preprocess(config)
    config.data.source_options.on_error = "skip"
    manifest = preprocess(config)
    assert manifest["skipped"] == {"unknown character": 1} and sum(s["tokens"] for s in manifest["shards"]) == 600


def test_a_corpus_is_preprocessed_with_its_own_characters(tmp_path):
    manifest = preprocess(own_text(tmp_path, "abcab\n" * 50 + "Zz", tokenizer="char"))
    assert json.loads((tmp_path / "own" / "characters.json").read_text()) == ["\n", "Z", "a", "b", "c", "z"]
    assert manifest["vocab_size"] == 6  # `Z` and `z` occur in the validation split alone


# ---- the tokenizer


@given(st.text(alphabet="abé世🎉 \n\t"))
def test_encoding_and_streaming_restore_the_text(text):
    tokenizer = CharTokenizer(list("abé世🎉 \n\t"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode_to_numpy(text).tolist() and len(ids) == len(text)
    decoder = StreamingDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_the_identity_follows_the_characters_and_their_order(tmp_path):
    ids = {CharTokenizer(list(chars)).id for chars in ("abc", "acb", "ab")}
    assert len(ids) == 3 and CharTokenizer(list("abc")).eot_id is None
    CharTokenizer(list("ab\n")).save(str(tmp_path))
    assert tokenizer_lib.load("char", str(tmp_path)).id == CharTokenizer(list("ab\n")).id
    assert from_texts(["ab", "\n"]).characters == ["\n", "a", "b"]


@pytest.mark.parametrize("text", ["{", "[]", '["ab"]', '["a", "a"]', '{"a": 1}', "[1]", '["\\ud800"]', None])
def test_a_damaged_list_of_characters_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "characters.json").write_text(text)
    with pytest.raises(UserError, match="characters.json"):
        tokenizer_lib.load("char", str(tmp_path))


# ---- meta.pkl


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta(characters()), protocol))
    assert read_meta(str(tmp_path / "meta.pkl")).characters == characters()


class Harmful:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (collections.OrderedDict(meta("ab")), "it refers to collections.OrderedDict"),
        (meta("ab") | {"itos": np.arange(2)}, "it refers to numpy"),
        (meta("ab") | {"more": (1, 2)}, "it has the opcode TUPLE2"),
        (meta("ab") | {"more": b"a"}, "it has the opcode SHORT_BINBYTES"),
        ({"vocab_size": 50257}, r"it holds the keys \['vocab_size'\]"),
        ({"stoi": {}, "itos": {}, "vocab_size": 0}, "there are no characters"),
        (meta(["a", "the"]), "id 1 is 'the', not one character"),
        (meta("ab") | {"vocab_size": 3}, "vocab_size is 3, but itos has 2 entries"),
        (meta("ab") | {"stoi": {"a": 1, "b": 0}}, "stoi is not the inverse of itos"),
        (meta("ab") | {"itos": {0: "a", 5: "b"}}, "ids that are not 0 ... 1"),
        (meta("ab") | {"itos": {0: "a", 1: 7}}, "Expected str, got int"),
        (["a", "b"], "it holds a list"),
        (b"\x80\x04 damaged", "it is not a whole pickle"),
        (b"", "it is not a whole pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_another_meta_pkl_is_refused_with_one_line(tmp_path, contents, message):
    write_nanogpt(tmp_path / "store")
    path = tmp_path / "store" / "meta.pkl"
    path.write_bytes(contents if isinstance(contents, bytes) else pickle.dumps(contents))
    with pytest.raises(UserError, match=message) as error:
        token_store.open_store(str(tmp_path / "store"))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_no_code_in_a_meta_pkl_runs(tmp_path):
    harmful = Harmful()
    harmful.path = str(tmp_path / "made")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta("ab") | {"more": harmful}))
    with pytest.raises(UserError, match="it refers to posix.mkdir"):
        read_meta(str(tmp_path / "meta.pkl"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96", b"T", b"X", b"r"])
def test_a_size_that_a_damaged_meta_pkl_claims_is_not_allocated(tmp_path, opcode):
    claimed = 300_000_000
    size = claimed.to_bytes(4 if opcode in b"TXr" else 8, "little")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x05N" + opcode + size + b"ab.")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="it is not a whole pickle|it holds a"):
            read_meta(str(tmp_path / "meta.pkl"))
        assert tracemalloc.get_traced_memory()[1] < claimed / 10
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=40), st.integers(0, 400), st.integers(0, 4))
def test_a_damaged_meta_pkl_never_raises_anything_else(tmp_path_factory, data, place, protocol):
    whole = bytearray(pickle.dumps(meta(characters()), protocol))
    whole[place : place + len(data)] = data
    path = pathlib.Path(tmp_path_factory.getbasetemp()) / "damaged.pkl"
    path.write_bytes(whole)
    try:
        assert read_meta(str(path)).vocab_size > 0
    except UserError as error:
        assert "\n" not in str(error)


def test_ids_beyond_the_characters_are_refused_when_the_store_opens(tmp_path):
    write_nanogpt(tmp_path / "store")
    ids = np.fromfile(tmp_path / "store" / "val.bin", np.uint16)
    ids[17] = 200
    ids.tofile(tmp_path / "store" / "val.bin")
    with pytest.raises(
        UserError, match=r"validation split has the token id 200, but the tokenizer char of meta.pkl has"
    ):
        token_store.open_store(str(tmp_path / "store"))


@pytest.mark.parametrize("kind", [np.uint32, np.int64])
def test_ids_of_another_size_are_refused_though_their_halves_are_ids_too(tmp_path, kind):
    write_nanogpt(tmp_path / "store")
    np.fromfile(tmp_path / "store" / "train.bin", np.uint16).astype(kind).tofile(tmp_path / "store" / "train.bin")
    with pytest.raises(UserError, match="the training split holds uint32 ids, but nanoGPT's files hold uint16"):
        token_store.open_store(str(tmp_path / "store"))


def test_a_meta_pkl_that_is_a_dangling_link_is_not_passed_over(tmp_path):
    write_nanogpt(tmp_path / "store")
    (tmp_path / "store" / "meta.pkl").unlink()
    (tmp_path / "store" / "meta.pkl").symlink_to("gone")
    for open_ in (token_store.open_store, tokenizer_lib.from_store):
        with pytest.raises(UserError, match="meta.pkl cannot be used as the tokenizer .*: No such file or directory"):
            open_(str(tmp_path / "store"))


def test_from_takes_the_tokenizer_of_a_nanogpt_folder(tmp_path):
    write_nanogpt(tmp_path / "store")
    assert tokenizer_source.resolve(f"from:{tmp_path}/store").characters == characters()
