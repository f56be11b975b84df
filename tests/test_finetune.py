"""train.init_from: weights of a workdir or a Hugging Face folder, a fresh optimizer, cropped positions, refusals."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, call, metrics, overrides, refused, small_config
from model_options import random_params

from trialgpt_jax import UserError, convert
from trialgpt_jax import train as train_module
from trialgpt_jax.config import default_config
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.evaluate import evaluate
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.train import train
from trialgpt_jax.training import start
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program, gpt_config, params_layout
from trialgpt_jax.training.workdir import keep_tokenizer, save_snapshot


def make_workdir(config, folder):
    """Creates a workdir whose checkpoint 10 has random parameters and nothing else; returns the parameters."""
    folder.mkdir()
    save_snapshot(config, str(folder))
    keep_tokenizer(open_store(config.data.dir), str(folder))
    checkpoints = Checkpoints(str(folder))
    params = random_params(gpt_config(config, "cpu"), scale=0.1)
    params["wte"]["embedding"][config.model.vocab_size :] = 0
    checkpoints.save(10, {"params": jax.tree.map(jnp.asarray, params)})
    checkpoints.wait()
    return params


@pytest.fixture(scope="module")
def sources(store, tmp_path_factory):
    """Kind -> folder: a workdir, and its export to Hugging Face files."""
    root = tmp_path_factory.mktemp("sources")
    make_workdir(small_config(store), root / "run")
    convert.to_hf(small_config(store), str(root / "run"), str(root / "hf"))
    return {"workdir": str(root / "run"), "hf": str(root / "hf")}


def load_params(config, workdir):
    return start.load_params(workdir, params_layout(gpt_config(config, "cpu"), single_device()))[0]


@pytest.mark.parametrize("kind", ["workdir", "hf"])
def test_training_starts_from_the_weights_with_a_fresh_optimizer(sources, config, tmp_path, kind):
    config.train.update({"steps": 2, "init_from": sources[kind]})
    config.optim.update({"learning_rate": 0.0, "warmup_steps": 0})
    config.seed = 99
    assert train(config, str(tmp_path)) == 0
    lines = metrics(tmp_path)
    before = evaluate(config, sources["workdir"], batches=config.eval.batches)["loss"]
    assert lines[0]["step"] == 0 and abs(lines[0]["val_loss"] - before) < 1e-6
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    trained, source = (load_params(config, workdir) for workdir in (str(tmp_path), sources["workdir"]))
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(source), strict=True):  # the learning rate is 0
        np.testing.assert_array_equal(ours, theirs)


def test_the_weights_are_those_of_the_checkpoint_that_is_asked_for(config, tmp_path, capsys):
    first = make_workdir(config, tmp_path / "run")
    checkpoints = Checkpoints(str(tmp_path / "run"), keep_last=3)
    for step, val_loss in ((20, 3.0), (30, 4.0)):
        checkpoints.save(step, {"params": jax.tree.map(lambda x: jnp.asarray(x * step), first)}, val_loss)  # noqa: B023
        checkpoints.wait()
    config.train.init_from = str(tmp_path / "run")
    for asked, found, factor in (("10", 10, 1), ("20", 20, 20), ("best", 20, 20), ("-1", 30, 30)):
        config.train.init_from_step = asked
        program = Program(config, mesh=single_device())
        state = start.create_state(start.Start(None, config.train.init_from), program, checkpoints)
        np.testing.assert_array_equal(state.params["wte"]["embedding"], first["wte"]["embedding"] * factor)
        assert f"starting from the weights of checkpoint {found} of {tmp_path / 'run'}" in capsys.readouterr().err


def test_it_resumes_from_its_own_checkpoints_afterwards(sources, config, tmp_path, capsys):
    config.train.update({"steps": 10, "init_from": sources["workdir"], "max_seconds": 1e-9})
    config.eval.every_steps = 0
    assert train(config, str(tmp_path)) == 75
    config.train.max_seconds = 0.0
    config.train.init_from = "moved/away"  # no longer read
    assert train(config, str(tmp_path)) == 0
    output = capsys.readouterr()
    assert "resumed from checkpoint 1" in output.out + output.err
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == list(range(1, 11))


@pytest.mark.parametrize("kind", ["workdir", "hf"])
def test_a_shorter_block_size_crops_the_positions(sources, config, kind):
    config.model.block_size = 20
    start.check_weights(sources[kind], config, open_store(config.data.dir))
    params = start.load_weights(sources[kind], gpt_config(config, "cpu"), single_device())
    config.model.block_size = 32
    whole = load_params(config, sources["workdir"])
    assert params["wpe"]["embedding"].shape == (20, 32)
    np.testing.assert_array_equal(params["wpe"]["embedding"], whole["wpe"]["embedding"][:20])
    np.testing.assert_array_equal(params["wte"]["embedding"], whole["wte"]["embedding"])


def test_with_rotary_positions_any_block_size_is_accepted(config, tmp_path):
    config.model.position = "rope"
    source = str(tmp_path / "run")
    expected = make_workdir(config, tmp_path / "run")
    config.model.block_size = 48
    start.check_weights(source, config, open_store(config.data.dir))
    params = start.load_weights(source, gpt_config(config, "cpu"), single_device())
    assert "wpe" not in params
    np.testing.assert_array_equal(params["wte"]["embedding"], expected["wte"]["embedding"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "block_size",
            64,
            r"has learned 32 positions, fewer than model.block_size=64; set model.block_size=32 or less",
        ),
        ("n_layer", 3, "model.n_layer is 2 there and 3 here"),
        ("vocab_size", 600, "model.vocab_size is 512 there and 600 here"),
        ("activation", "relu2", "model.activation is gelu there and relu2 here"),  # the shapes are equal
        ("tie_embeddings", False, "model.tie_embeddings is True there and False here"),
        ("n_kv_head", 2, "model.n_kv_head is 4 there and 2 here"),
    ],
)
@pytest.mark.parametrize("kind", ["workdir", "hf"])
def test_another_model_is_refused_before_anything_is_compiled(sources, config, tmp_path, kind, field, value, message):
    config.model[field] = value
    config.train.init_from = sources[kind]
    with pytest.raises(UserError, match=message):
        train(config, str(tmp_path))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("kind", ["workdir", "hf"])
def test_a_token_store_of_another_tokenizer_is_refused(sources, config, tmp_path, kind):
    shutil.copytree(config.data.dir, tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    manifest["tokenizer"]["hash"] = 64 * "0"  # another bpe:512 with the same number of ids
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    config.data.dir = str(tmp_path / "store")
    config.train.init_from = sources[kind]
    with pytest.raises(
        UserError,
        match=r"data.dir=\S+ was made with tokenizer bpe:512 .* preprocess the text with --config.data.tokenizer=",
    ):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize("model", [{"nlayer": 2}, {"n_layer": "2"}])
def test_a_workdir_with_an_unreadable_model_is_refused_by_its_file(config, tmp_path, model):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model": model}))
    config.train.init_from = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"other/config.json: the group `model` is not a GPT of this version"):
        train(config, str(tmp_path / "run"))


def test_a_source_that_does_not_exist_is_refused(config, tmp_path):
    config.train.init_from = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no such folder"):
        train(config, str(tmp_path / "run"))


def test_a_converted_workdir_whose_later_checkpoints_are_damaged_goes_on(sources, config, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    convert.from_hf(config, sources["hf"], workdir)
    config.train.update({"steps": 7, "max_seconds": 1e-9})
    config.checkpoint.update({"every_steps": 1, "keep_last": 9})
    assert train(config, workdir) == 75
    (tmp_path / "run/checkpoints/1/checksums.json").unlink()
    capsys.readouterr()
    config.train.max_seconds = 0.0
    assert train(config, workdir) == 0
    log = capsys.readouterr().err
    assert "checkpoint 1 is damaged" in log and "starting from the weights of checkpoint 0" in log, log
    assert Checkpoints(workdir).steps() == list(range(8))
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 8))


# ---- the model comes from the weights


@pytest.fixture
def started(monkeypatch, store, tmp_path, default_file):
    """Calls `train` with these flags; returns the config with which a run would start."""
    seen = []
    monkeypatch.setattr(train_module, "train", lambda config, *_, **__: seen.append(config))

    def start_with(*arguments, config=default_file):
        result = call(
            "train", f"--config={config}", f"--workdir={tmp_path / 'new'}", f"--config.data.dir={store}", *arguments
        )
        assert result.returncode == 0, result.stderr
        return seen[-1]

    return start_with


def model_of(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text())["model"]


@pytest.mark.parametrize("kind", ["workdir", "hf"])
@pytest.mark.parametrize("file", ["default", "finetune"])
def test_fields_that_are_not_set_come_from_the_weights(sources, started, default_file, kind, file):
    file = ROOT / "configs/finetune.py" if file == "finetune" else default_file
    found = started(f"--config.train.init_from={sources[kind]}", config=file).model
    assert found.to_dict() == model_of(sources["workdir"])
    assert (found.n_layer, found.n_embd, found.vocab_size, found.block_size) == (2, 32, 512, 32)


def test_every_option_of_a_workdirs_model_is_taken(started, config, tmp_path):
    options = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "n_kv_head": 2}
    options |= {"bias": False, "embed_norm": True, "logit_softcap": 30.0, "tie_embeddings": False, "dropout": 0.1}
    config.model.update(options)
    (tmp_path / "source").mkdir()
    save_snapshot(config, str(tmp_path / "source"))
    source = f"--config.train.init_from={tmp_path / 'source'}"
    assert started(source).model == config.model
    found = started(source, "--config.model.dropout=0.0", "--config.model.block_size=4096").model
    assert (found.dropout, found.block_size, found.position) == (0.0, 4096, "rope")


@pytest.mark.parametrize("kind", ["workdir", "hf"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("n_layer=3", ["model.n_layer is 2 there and 3 here"]),
        ("n_layer=12", ["model.n_layer is 2 there and 12 here"]),  # the default, but given
        ("n_head=5", ["model.n_head is 4 there and 5 here"]),  # does not divide the default n_embd either
        ("vocab_size=50257", ["model.vocab_size is 512 there and 50257 here"]),
        ("bias=False", ["model.bias is True there and False here"]),
        ("n_kv_head=2", ["model.n_kv_head is 4 there and 2 here"]),
        ("position=rope", ["model.position is learned there and rope here"]),
    ],
)
def test_what_the_user_sets_against_the_weights_is_refused_with_both_values(
    sources, store, tmp_path, default_file, kind, flag, words
):
    given = f"--config={default_file}", f"--config.train.init_from={sources[kind]}", f"--workdir={tmp_path / 'new'}"
    refused(
        call("train", *given, f"--config.model.{flag}"), f"train.init_from={sources[kind]} has another model", *words
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["workdir", "hf"])
def test_what_agrees_with_the_weights_or_is_free_may_be_set(sources, started, kind):
    source = f"--config.train.init_from={sources[kind]}"
    found = started(
        source,
        "--config.model.n_layer=2",
        "--config.model.n_kv_head=0",
        "--config.model.head_dim=8",
        "--config.model.vocab_size=0",
        "--config.model.dropout=0.25",
        "--config.model.block_size=20",
    ).model
    assert (found.dropout, found.block_size, found.vocab_size, found.n_layer) == (0.25, 20, 512, 2)


def test_a_longer_block_size_is_refused_and_the_one_in_the_message_is_taken(sources, started, tmp_path, default_file):
    # follows: positions, fewer than
    given = f"--config={default_file}", f"--config.train.init_from={sources['hf']}", f"--workdir={tmp_path / 'new'}"
    result = call("train", *given, "--config.model.block_size=1024")  # the default, but given
    refused(result, "has learned 32 positions, fewer than model.block_size=1024")
    proposed = re.search(r"set (model.block_size=\d+) or less", result.stderr)[1]
    assert started(given[1], f"--config.{proposed}").model.block_size == 32


def test_a_resumed_run_does_not_need_the_folder_of_its_first_weights(sources, config, tmp_path):
    gone = tmp_path / "source"
    shutil.copytree(sources["hf"], gone)
    fields = default_config()
    fields.data.dir = config.data.dir
    fields.optim.update({"warmup_steps": 0, "schedule": "constant"})
    fields.eval.every_steps = 0
    fields.log.tensorboard = False
    fields.train.update({"steps": 3, "batch_size": 8, "init_from": str(gone)})
    file = tmp_path / "config.py"
    file.write_text("from trialgpt_jax.config import default_config as get_config\n")
    command = [f"--config={file}", f"--workdir={tmp_path / 'run'}", *overrides(fields)]
    result = call("train", *command, "--config.train.max_seconds=1e-9")
    assert result.returncode == 75, result.stderr
    assert "starting from the weights of" in result.stderr
    shutil.rmtree(gone)
    result = call("train", *command)
    assert result.returncode == 0 and "resumed from checkpoint 1" in result.stderr, result.stderr
    assert model_of(tmp_path / "run") == model_of(sources["workdir"])
    refused(call("train", *command, "--config.model.n_layer=3"), "`model.n_layer` is 3", "started with 2")


def texts_of(store):
    return f"--config.data.source=files --config.data.source_options.path={store.parent / 'texts'}".split()


@pytest.mark.parametrize("kind", ["workdir", "hf"])
@pytest.mark.parametrize("other", ["gpt2", "bpe:300"])
def test_text_of_another_tokenizer_is_preprocessed_as_the_message_says(
    sources, started, store, tmp_path, default_file, kind, other
):
    # follows: preprocess the text with --config.data.tokenizer=
    # does as the message says: preprocess the text with that of train.init_from
    made = call(
        "preprocess", *texts_of(store), f"--config.data.dir={tmp_path / other}", f"--config.data.tokenizer={other}"
    )
    assert made.returncode == 0, made.stderr
    given = f"--config={default_file}", f"--config.train.init_from={sources[kind]}", f"--workdir={tmp_path / 'new'}"
    config = started(given[1])
    config.data.dir = str(tmp_path / other)
    with pytest.raises(UserError) as error:
        train(config, str(tmp_path / "new"))
    proposed = re.search(r"preprocess the text with.* (--config.data.tokenizer=\S+)$", str(error.value))[1]
    made = call("preprocess", *texts_of(store), f"--config.data.dir={tmp_path / 'again'}", proposed)
    assert made.returncode == 0, made.stderr
    start.check_weights(sources[kind], config, open_store(str(tmp_path / "again")))


def test_weights_without_a_tokenizer_are_compared_by_their_number_of_ids(sources, store, tmp_path, capsys):
    """50,257 ids are GPT-2's; other numbers say nothing."""
    folder = tmp_path / "hf"
    shutil.copytree(sources["hf"], folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    config = small_config(store)
    config.train.init_from = str(folder)
    start.check_weights(str(folder), config, open_store(str(store)))
    assert "has no tokenizer to compare with" in capsys.readouterr().err
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 50257}))
    config.model.vocab_size = 50257
    with pytest.raises(UserError, match="was made with tokenizer bpe:512 .* has gpt2 .*--config.data.tokenizer=gpt2$"):
        start.check_weights(str(folder), config, open_store(str(store)))


def test_weights_beyond_the_memory_of_the_machine_are_refused(sources, config, monkeypatch):
    monkeypatch.setattr(start.accelerators, "memory_bytes", lambda device: 1000)
    with pytest.raises(
        UserError, match="the parameters take 0.0 GiB, but the CPU of this machine has 0.0 GiB of memory"
    ):
        start.load_weights(sources["hf"], gpt_config(config, "cpu"), single_device())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has no config.json; it must be a workdir or a Hugging Face folder"),
        ("ckpt.pt", "has no config.json; it must be a workdir or a Hugging Face folder"),
        ("nanogpt", "has no config.json .ckpt.pt is a pickle and is not read"),
        ("lora", "has no config.json but adapter_config.json .a PEFT adapter"),
        ("pointer", "config.json is a pointer of Git LFS"),
    ],
)
def test_what_holds_no_weights_is_refused_as_what_it_is(config, tmp_path, name, message):
    for folder in ("empty", "nanogpt", "lora", "pointer"):
        (tmp_path / folder).mkdir()
    for file in ("ckpt.pt", "nanogpt/ckpt.pt", "lora/adapter_config.json"):
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "pointer/config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    config.train.init_from = str(tmp_path / name)
    with pytest.raises(UserError, match=message):
        start.adopt_model(config, str(tmp_path / "run"))
