"""train.init_from: weights of a workdir or a Hugging Face folder, a fresh optimizer, cropped positions, refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import metrics, small_config
from model_options import random_params

from trialgpt_jax import UserError, convert
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.evaluate import evaluate
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.train import train
from trialgpt_jax.training import start
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import gpt_config, params_layout
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
        UserError, match=r"data.dir=\S+ was made with tokenizer bpe:512 .* preprocess the text with that one"
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
    with pytest.raises(UserError, match="holds no config.json; it must be a workdir or a Hugging Face folder"):
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
