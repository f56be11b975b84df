"""`data.tokenizer=from:FOLDER` and `file:tokenizer.json`, and the identity of a tokenizer in stores and workdirs."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import call, overrides, refused, small_config, train_step_compiled_once
from hypothesis import given, settings
from hypothesis import strategies as st

from trialgpt_jax import UserError
from trialgpt_jax.config import validate
from trialgpt_jax.convert import from_hf
from trialgpt_jax.data import hf_tokenizer, prepare, token_store, tokenizer, tokenizer_source
from trialgpt_jax.data.encoders import batch_encoder, check_encoder
from trialgpt_jax.data.tokenizer import StreamingDecoder
from trialgpt_jax.data.units import Job
from trialgpt_jax.data.vocabulary import TokenizerId
from trialgpt_jax.preprocess import preprocess, show
from trialgpt_jax.training import workdir as workdir_lib

tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")

TEXTS = [
    "the cat sat on the mat, and the dog sat on the cat\n" * 20,
    "Grüße, 世界 🎉 and naïve café 12345",
    "don't\r\n\n x",
]
# As Llama 3 and Qwen split words
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def library(kind):
    """A small tokenizer of the library, built as those of well-known models are."""
    pre, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    split = pre.Split(tokenizers.Regex(SPLIT), "isolated")
    after = {
        "gpt2": byte_level(add_prefix_space=False),
        "llama3": pre.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)]),
        "qwen": pre.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)]),
        "starcoder": pre.Sequence([pre.Digits(individual_digits=True), byte_level(add_prefix_space=False)]),
    }
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = after[kind], tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=byte_level.alphabet(), special_tokens=[], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    if kind == "qwen":
        made.normalizer = tokenizers.normalizers.NFC()
        made.add_tokens(["<tool_call>", "    "])
    made.add_special_tokens(["<|begin|>", "<|im_end|>" if kind == "qwen" else "<|end_of_text|>"])
    return made


@pytest.fixture(scope="module", params=["gpt2", "llama3", "qwen", "starcoder"])
def pair(request, tmp_path_factory):
    """A tokenizer of the library, and ours of its file."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    theirs = library(request.param)
    theirs.save(str(path))
    theirs.encode_special_tokens = True
    return theirs, tokenizer_source.resolve(f"file:{path}"), path


@pytest.fixture
def llama3(tmp_path):
    """The path of a tokenizer.json."""
    (tmp_path / "llama3").mkdir()
    library("llama3").save(str(tmp_path / "llama3" / "tokenizer.json"))
    return tmp_path / "llama3" / "tokenizer.json"


def test_a_file_is_run_by_the_library_itself_without_special_tokens(pair):
    theirs, ours, _ = pair
    assert ours.name == f"hf:{ours.hash[:8]}" and ours.vocab_size == theirs.get_vocab_size() and ours.dtype == "uint16"
    assert ours.token_bytes(ours.eot_id) in (b"<|end_of_text|>", b"<|im_end|>")

    @settings(max_examples=100)
    @given(st.text() | st.sampled_from([*TEXTS, "a<|end_of_text|>b<|begin|>", "<tool_call>x     y<|im_end|>", "\0"]))
    def same(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids == ours.encode_to_numpy(text).tolist()
        assert ours.eot_id not in ids
        normal = theirs.normalizer.normalize_str(text) if theirs.normalizer else text
        decoder = StreamingDecoder(ours)
        assert ours.decode(ids) == "".join(map(decoder.push, ids)) + decoder.finish() == normal

    same()
    assert ours.encode("a\ud800") == ours.encode("a\ufffd")


def test_a_tokenizer_from_a_file_is_kept_with_store_and_workdir_and_exported(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, ours, _ = pair
    ours.save(str(tmp_path))
    again = tokenizer.load(ours.name, str(tmp_path))
    assert again.id == ours.id and again.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    with pytest.raises(UserError, match=f"holds the tokenizer {ours.name}, not hf:00000000"):
        tokenizer.load("hf:00000000", str(tmp_path))
    (tmp_path / "hf").mkdir()
    hf_tokenizer.write(ours, str(tmp_path / "hf"), 64)
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert loaded.encode(TEXTS[0], add_special_tokens=False) == ours.encode(TEXTS[0])
    assert loaded.eos_token_id == ours.eot_id
    loaded.save_pretrained(str(tmp_path / "again"))
    assert hf_tokenizer.read(str(tmp_path / "hf")).id == hf_tokenizer.read(str(tmp_path / "again")).id == ours.id


def test_an_exported_tokenizer_adds_no_token_that_training_and_infer_do_not(llama3, tmp_path):
    begins = tokenizers.Tokenizer.from_file(str(llama3))
    special = [("<|begin|>", begins.token_to_id("<|begin|>"))]
    begins.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", special_tokens=special)
    begins.save(str(llama3))
    ours = tokenizer_source.resolve(f"file:{llama3}")
    (tmp_path / "hf").mkdir()
    hf_tokenizer.write(ours, str(tmp_path / "hf"), 64)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert exported.encode(TEXTS[0]).ids == ours.encode(TEXTS[0]) == begins.encode(TEXTS[0]).ids[1:]
    assert hf_tokenizer.read(str(tmp_path / "hf")).id == ours.id
    about = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert {about[f"{name}_token"] for name in ("bos", "eos", "pad")} == {"<|end_of_text|>"}


def test_encoders_work_with_every_kind(pair):
    _, ours, _ = pair
    check_encoder(ours, "gigatoken", TEXTS)
    for encoder in ("tiktoken", "gigatoken"):
        ids = batch_encoder(ours, encoder)(TEXTS)
        assert [row.tolist() for row in ids] == [ours.encode(text) for text in TEXTS] and ids[0].dtype == np.uint32


def test_a_file_of_one_of_ours_becomes_that(store, tmp_path):
    name = "bpe:512"  # gpt2 is read in test_hf
    hf_tokenizer.write(tokenizer.load(name, str(store)), str(tmp_path), 64)
    for value in (f"file:{tmp_path}/tokenizer.json", f"file:{tmp_path}", f"from:{tmp_path}"):
        assert tokenizer_source.resolve(value).id == tokenizer.load(name, str(store)).id


def edited(path, edit, config=None):
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))
    if config is not None:
        (path.parent / "tokenizer_config.json").write_text(config)
    return tokenizer_source.resolve(f"file:{path}")


@pytest.mark.parametrize(
    ("edit", "config", "end"),
    [
        (lambda t: None, '{"eos_token": "<|begin|>"}', b"<|begin|>"),
        (lambda t: None, '{"eos_token": {"content": "<|begin|>", "special": true}}', b"<|begin|>"),
        (lambda t: None, '{"eos_token": null}', b"<|end_of_text|>"),
        (lambda t: t.pop("added_tokens"), '{"eos_token": "a"}', b"a"),
        (lambda t: t["model"]["vocab"].update({"zz": 5000}) or t["added_tokens"].clear(), '{"eos_token": "a"}', b"a"),
    ],
)
def test_end_of_text_is_that_of_the_config_beside_it(llama3, edit, config, end):
    found = edited(llama3, edit, config)
    assert found.token_bytes(found.eot_id) == end


def test_whatever_decides_the_ids_changes_the_identity(llama3):
    original, found = llama3.read_text(), [tokenizer_source.resolve(f"file:{llama3}").hash]
    for edit, config in (
        (lambda t: t.update(normalizer={"type": "NFC"}), None),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+"), None),
        (lambda t: t["model"].update(ignore_merges=True), None),
        (lambda t: t["model"]["merges"].pop(), None),
        (lambda t: t["added_tokens"][0].update(special=False), None),
        (lambda t: None, '{"eos_token": "<|begin|>"}'),
    ):
        llama3.write_text(original)
        found.append(edited(llama3, edit, config).hash)
    assert len(set(found)) == len(found)


def test_without_an_end_of_text_token_the_error_says_how_to_name_one(llama3):
    with pytest.raises(UserError, match='name one as "eos_token" in tokenizer_config.json beside it'):
        edited(llama3, lambda t: t["added_tokens"].clear())
    assert edited(llama3, lambda t: None, '{"eos_token": "a"}').decode(
        [tokenizer_source.resolve(f"file:{llama3}").eot_id]
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "it is Unigram after Sequence; supported is BPE after ByteLevel"),
        (lambda t: t["model"].update(type="WordPiece"), "it is WordPiece"),
        (lambda t: t["model"].update(type="WordLevel"), "it is WordLevel"),
        (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "it is BPE after Metaspace"),
        (lambda t: t.update(pre_tokenizer=None), "it is BPE after no pre-tokenizer"),
        (lambda t: t["added_tokens"][0].update(id=10**9), "has id 1000000000, more than"),
        (lambda t: t["added_tokens"][0].update(id=700), "but the library tokenizers gives it 30"),
        (lambda t: t["added_tokens"][0].update(id=5), "two tokens have id 5"),
        (lambda t: t["added_tokens"][0].update(id=-1), "added_tokens.*: Expected `int` >= 0|>= 0"),
        (lambda t: t["model"]["vocab"].update({"a b": 900}), "not made of the characters that stand for bytes"),
        (lambda t: t["model"]["vocab"].pop("a"), "byte 97 has no token"),
        (lambda t: t["model"]["merges"].append(["zz", "yy"]), "the library tokenizers refuses it"),
        (lambda t: t["model"].update(merges="ab"), "model.merges: Expected array"),
        (lambda t: t["model"].update(dropout=0.1), "dropout=0.1"),
        (lambda t: t.update(model=[]), "model: Expected object"),
        (lambda t: t.clear(), "missing required field model"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_with_one_line(llama3, edit, message):
    with pytest.raises(UserError, match=message) as error:
        edited(llama3, edit)
    assert str(error.value).startswith(f"data.tokenizer=file:{llama3}: {llama3} ") and "\n" not in str(error.value)


def test_without_the_library_the_error_says_what_to_install(llama3, monkeypatch):
    # follows: needs the extra `tokenizers`: `pip install tokenizers`
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(UserError, match="`pip install tokenizers`"):
            tokenizer_source.resolve(f"file:{llama3}")
    assert tokenizer_source.resolve(f"file:{llama3}").name.startswith("hf:")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.tiktoken", "vocab.json"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name} .*is a Git LFS pointer"):
        tokenizer.load("bpe:300", str(tmp_path)) if "tiktoken" in name else hf_tokenizer.read(str(tmp_path))


# ---- from:


def from_config(store, folder, value):
    config = small_config(folder)
    config.data.update({"source": "files", "val_fraction": 0.3, "tokenizer": value})
    config.data.source_options.path = str(store.parent / "texts")
    return config


def test_a_store_made_from_another_has_its_tokenizer_and_is_complete_the_second_time(store, tmp_path, capsys):
    config = from_config(store, tmp_path / "new", f"from:{store}")
    manifest = preprocess(config)
    made = json.loads((store / "manifest.json").read_text())
    assert manifest["tokenizer"] == made["tokenizer"] | {"given": f"from:{store}"}
    assert [shard["sha256"] for shard in manifest["shards"]] == [shard["sha256"] for shard in made["shards"]]
    assert (tmp_path / "new" / "tokenizer.tiktoken").read_bytes() == (store / "tokenizer.tiktoken").read_bytes()
    capsys.readouterr()
    preprocess(config)
    assert "already complete" in capsys.readouterr().out

    other = tokenizer.train("bpe:512", [path.read_text()[::-1] for path in (store.parent / "texts").iterdir()])
    (tmp_path / "other").mkdir()
    other.save(str(tmp_path / "other"))
    identity = {"name": "bpe:512", "hash": other.hash}
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"tokenizer": identity}))
    for value, words in (
        (f"from:{tmp_path}/other", (f"bpe:512 ({manifest['tokenizer']['hash'][:8]})", f"bpe:512 ({other.hash[:8]})")),
        ("bpe:512", (f"from:{store}", "data.tokenizer=bpe:512")),
        ("gpt2", ("bpe:512", "gpt2")),
    ):
        config.data.tokenizer = value
        with pytest.raises(UserError) as error:
            preprocess(config)
        assert all(word in str(error.value) for word in words) and other.hash not in str(error.value), error.value


def test_a_folder_begun_with_another_tokenizer_is_refused_if_it_holds_shards(store, tmp_path):
    (tmp_path / "new").mkdir()
    other = tokenizer.train("bpe:512", [path.read_text()[::-1] for path in (store.parent / "texts").iterdir()])
    other.save(str(tmp_path / "new"))
    config = from_config(store, tmp_path / "new", f"from:{store}")
    job = Job(config.data.to_dict() | {"tokenizer": "bpe:512"}, {}, False)
    given = tokenizer.from_store(str(store))
    (tmp_path / "new" / "train_00000_0000.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"was begun with the tokenizer bpe:512 \(.{8}\), but this config has bpe:512 \("
    ):
        prepare._tokenizer(job, [], given)
    (tmp_path / "new" / "train_00000_0000.bin").unlink()
    assert preprocess(config)["tokenizer"]["hash"] == given.hash


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("from:{0}/nowhere", "{0}/nowhere does not exist"),
        ("from:{0}/empty", "{0}/empty holds no tokenizer"),
        ("from:{0}/a:0.5,{0}/b:0.5", "that is a mixture"),
        ("from:{0}/file", "{0}/file is not a folder"),
        ("from:{0}/broken", "tokenizer.json cannot be read as name and hash"),
        ("from:{0}/missing", "tokenizer.tiktoken does not exist"),
        ("file:{0}/nowhere.json", "{0}/nowhere.json does not exist"),
        ("file:{0}/file", "{0}/file cannot be used as a tokenizer"),
    ],
)
def test_a_source_without_a_tokenizer_is_refused_with_one_line(tmp_path, value, message):
    for name in ("empty", "broken", "missing"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    for name, identity in (("broken", "{"), ("missing", '{"name": "bpe:300", "hash": null}')):
        (tmp_path / name / "config.json").write_text('{"data": {"tokenizer": "bpe:300"}}')
        (tmp_path / name / "tokenizer.json").write_text(identity)
    value = value.format(tmp_path)
    with pytest.raises(UserError) as error:
        tokenizer_source.resolve(value)
    text = str(error.value)
    assert text.startswith(f"data.tokenizer={value}: ") and message.format(tmp_path) in text and "\n" not in text


@pytest.mark.parametrize("value", ["bpe:256", "bpe:", "bpe:0300", "from:", "file:", "hf:x", "chars", "", "from:a\0"])
def test_a_value_that_is_not_well_formed_is_refused_by_the_config(value):
    config = small_config("x")
    config.data.tokenizer = value
    with pytest.raises(UserError, match="config field `data.tokenizer` is .*`from:FOLDER`"):
        validate(config)


# ---- identity


def hash_of(folder):
    return json.loads((folder / "manifest.json").read_text())["tokenizer"]["hash"]


@pytest.fixture
def other_store(store, tmp_path):
    """The same texts with another BPE of the same name."""
    config = from_config(store, tmp_path / "other_store", "bpe:512")
    config.data.val_fraction = 0.6
    preprocess(config)
    assert hash_of(tmp_path / "other_store") != hash_of(store)
    return tmp_path / "other_store"


@pytest.mark.parametrize("identity", ["name and hash", "name alone", "none"])
def test_a_store_of_another_tokenizer_is_refused_whatever_the_workdir_records(store, other_store, tmp_path, identity):
    # follows: preprocess the text with --config.data.tokenizer=from:
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    config = small_config(store)
    workdir_lib.save_snapshot(config, str(workdir))
    opened = token_store.open_store(str(store))
    if identity != "none":
        workdir_lib.keep_tokenizer(opened, str(workdir))
    if identity == "name alone":
        tokenizer.write_identity(TokenizerId("bpe:512", None), str(workdir))
    workdir_lib.check_tokenizer(opened, str(workdir))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("train", "val"):
        np.arange(500, dtype=np.uint16).tofile(foreign / f"{name}.bin")
    with pytest.raises(UserError, match=r"was made with tokenizer gpt2, but the model in .* was trained with bpe:512"):
        workdir_lib.check_tokenizer(token_store.open_store(str(foreign)), str(workdir))
    if identity != "name and hash":
        return
    with pytest.raises(UserError) as error:
        workdir_lib.check_tokenizer(token_store.open_store(str(other_store)), str(workdir))
    text = str(error.value)
    for folder in (store, other_store):
        assert f"bpe:512 ({hash_of(folder)[:8]})" in text and hash_of(folder) not in text
    advice = text.partition("--config.data.tokenizer=")[2]
    preprocess(from_config(store, tmp_path / "new", advice))
    workdir_lib.check_tokenizer(token_store.open_store(str(tmp_path / "new")), str(workdir))


def test_a_mixture_of_two_tokenizers_says_how_to_make_it_one(store, other_store, tmp_path):
    # follows: preprocess that text with --config.data.tokenizer=from:
    with pytest.raises(UserError, match="need the same tokenizer") as error:
        token_store.open_store(f"{store}:0.5,{other_store}:0.5")
    advice = str(error.value).partition("--config.data.tokenizer=")[2]
    preprocess(from_config(store, tmp_path / "new", advice))
    assert token_store.open_store(f"{store}:0.5,{tmp_path}/new:0.5").tokenizer_id.hash == hash_of(store)


def test_own_text_with_the_tokenizer_of_a_run_is_evaluated_mixed_and_trained_on(store, tmp_path, default_file):
    """The chain of the README: train, preprocess own text with from:, evaluate, fine-tune on a mixture."""
    with train_step_compiled_once():
        config = small_config(store)
        config.model.update({"n_layer": 1, "block_size": 16, "n_embd": 16})
        config.train.update({"steps": 2, "batch_size": 4})
        config.optim.warmup_steps = 0
        config.eval.every_steps = 0
        run = tmp_path / "run"
        result = call("train", f"--config={default_file}", *overrides(config), f"--workdir={run}")
        assert result.returncode == 0, result.stderr
        own = tmp_path / "own.txt"
        own.write_text("My fellow citizens, the state of the union is strong.\n" * 100)
        flags = [f"--config.data.dir={tmp_path}/own", "--config.data.source=files", "--config.data.val_fraction=0.2"]
        flags += [f"--config.data.source_options.path={own}", f"--config.data.tokenizer=from:{run}"]
        result = call("preprocess", *flags)
        assert result.returncode == 0, result.stderr
        assert "My fellow citizens" in next(show(str(tmp_path / "own"), 1))
        result = call("evaluate", f"--workdir={run}", f"--config.data.dir={tmp_path}/own")
        assert result.returncode == 0 and "bits per byte" in result.stdout, result.stderr
        config.train.init_from, config.data.dir = str(run), f"{store}:0.5,{tmp_path}/own:0.5"
        config.data.tokenizer = f"from:{run}"
        result = call("train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/tuned")
        assert result.returncode == 0 and f"starting from the weights of checkpoint 2 of {run}" in result.stderr, (
            result.stderr
        )
        assert json.loads((tmp_path / "tuned" / "config.json").read_text())["data"]["tokenizer"] == "bpe:512"
        assert json.loads((tmp_path / "tuned" / "tokenizer.json").read_text())["hash"] == hash_of(store)


def test_a_model_imported_without_tokenizer_files_records_what_it_is_taken_for(store, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 50257}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hf")
    config = small_config(store)
    from_hf(config, str(tmp_path / "hf"), str(tmp_path / "run"))
    assert tokenizer.read_identity(str(tmp_path / "run")) == tokenizer.load("gpt2").id
    result = call("evaluate", f"--workdir={tmp_path}/run", f"--config.data.dir={store}")
    refused(result, "was made with tokenizer bpe:512 (", "was trained with gpt2 (", f"from:{tmp_path}/run")
    shutil.rmtree(tmp_path / "hf")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": 1, "hash": null}', '{"name": "gpt2"}', '{"name": "x", "hash": 1}']
)
def test_a_damaged_identity_is_refused_by_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json cannot be read as name and hash of a tokenizer") as error:
        tokenizer.from_workdir(str(tmp_path), "gpt2")
    assert "\n" not in str(error.value)


def test_a_workdir_whose_tokenizer_file_was_replaced_is_refused(store, other_store, tmp_path):
    workdir_lib.keep_tokenizer(token_store.open_store(str(store)), str(tmp_path))
    assert tokenizer.from_workdir(str(tmp_path), "gpt2").hash == hash_of(store)
    shutil.copy(other_store / "tokenizer.tiktoken", tmp_path / "tokenizer.tiktoken")
    with pytest.raises(UserError, match=r"the model was trained with tokenizer bpe:512 \(.{8}\), but its files hold"):
        tokenizer.from_workdir(str(tmp_path), "gpt2")
