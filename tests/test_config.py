"""The config refuses what is wrong, in one line that names the field and what would be right."""

import glob
import json

import pytest
from conftest import ROOT, refused, run

from trialgpt_jax import UserError
from trialgpt_jax.config import (
    check_resumable,
    default_config,
    fields,
    gpt_config,
    load_snapshot,
    mesh_sizes,
    parse_command_line,
    save_snapshot,
    validate,
)

OPTIONS = {"workdir": (None, "folder"), "count": (3, "a number")}


def parse(*arguments):
    return parse_command_line(["program", *arguments], "doc", OPTIONS)


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_gpt2_and_valid():
    c = default_config()
    validate(c, 1)
    m = c.model
    assert (m.vocab_size, m.block_size, m.n_layer, m.n_head, m.n_embd) == (50257, 1024, 12, 12, 768)
    assert m.bias and m.tie_embeddings and (m.position, m.norm, m.activation) == ("learned", "layernorm", "gelu")


@pytest.mark.parametrize("path", sorted(glob.glob(str(ROOT / "configs" / "*.py"))))
def test_shipped_configs_load_and_are_valid(path):
    _, config = parse(f"--config={path}")
    validate(config)


def test_command_line_overrides_have_the_fields_types(default_file):
    flags, c = parse(
        f"--config={default_file}", "--config.train.steps=7", "--config.optim.learning_rate=1",
        "--config.data.shuffle=False", "--config.data.dir=some/where", "--count=5",
    )  # fmt: skip
    assert (c.train.steps, c.optim.learning_rate, c.data.shuffle, c.data.dir) == (7, 1.0, False, "some/where")
    assert flags.count == 5 and flags.workdir is None


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.stesp=7", ("train.stesp", "train.steps")),
        ("--config.learning_rate=7", ("learning_rate", "optim.learning_rate")),
        ("--config.optim.lr=7", ("optim.lr", "optim.learning_rate")),
        ("--config.train.gradient_accumulation_steps=7", ("train.accumulate_steps",)),
        ("--config.train.steps=seven", ("train.steps", "seven")),
        ("--config.data.shuffle=maybe", ("data.shuffle", "maybe")),
        ("--config.optim=7", ("optim",)),
        ("--config.train.steps", ("train.steps", "value")),
        ("--wrokdir=x", ("wrokdir", "workdir")),
        ("--count=many", ("count", "many")),
        ("loose", ("loose",)),
    ],
)
def test_wrong_arguments_are_refused_by_name(default_file, argument, words):
    message = refusal(parse, f"--config={default_file}", argument)
    for word in words:
        assert word in message


def test_config_files_that_are_wrong_are_refused(tmp_path):
    assert "configs/" in refusal(parse)
    assert "missing.py" in refusal(parse, "--config=missing.py")
    path = tmp_path / "typo.py"
    path.write_text("from trialgpt_jax.config import default_config\ndef get_config():\n"
                    "    c = default_config()\n    c.model.n_layers = 3\n    return c\n")  # fmt: skip
    message = refusal(parse, f"--config={path}")
    assert "typo.py:4" in message and "n_layers" in message and "n_layer" in message
    path.write_text("from trialgpt_jax.config import default_config\ndef get_config():\n"
                    "    c = default_config()\n    c.model.n_layer = 'three'\n    return c\n")  # fmt: skip
    assert "n_layer" in refusal(parse, f"--config={path}")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.n_head", 5, ("model.n_embd=768", "model.n_head=5")),
        ("model.n_kv_head", 5, ("model.n_head=12", "model.n_kv_head=5")),
        ("model.norm", "layrnorm", ("model.norm", "layernorm")),
        ("model.dropout", 1.0, ("model.dropout", "[0, 1)")),
        ("model.block_size", 0, ("model.block_size", "at least 1")),
        ("optim.learning_rate", float("nan"), ("optim.learning_rate", "finite")),
        ("optim.b2", 1.0, ("optim.b2",)),
        ("optim.name", "adam", ("optim.name", "adamw")),
        ("optim.warmup_steps", 600_000, ("optim.warmup_steps", "train.steps")),
        ("train.accumulate_steps", 7, ("train.batch_size=480", "train.accumulate_steps=7")),
        ("train.remat", "blocks", ("train.remat", "block")),
        ("train.dtype", "float16", ("train.dtype", "bfloat16")),
        ("data.tokenizer", "bpe", ("data.tokenizer", "bpe:N")),
        ("data.val_fraction", -0.1, ("data.val_fraction",)),
    ],
)
def test_wrong_values_are_refused_by_name(field, value, words):
    c = default_config()
    section, name = field.split(".")
    c[section][name] = value
    message = refusal(validate, c)
    for word in words:
        assert word in message


def test_mesh_must_fit_the_devices_the_model_and_the_batch():
    c = default_config()
    assert mesh_sizes(c.mesh, 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    c.mesh.update({"fsdp": 3})
    message = refusal(mesh_sizes, c.mesh, 8)
    assert "mesh.fsdp=3" in message and "8" in message
    c.mesh.update({"data": 1, "fsdp": 2, "tensor": 2})
    assert "4 devices" in refusal(mesh_sizes, c.mesh, 8)
    c.mesh.update({"data": -1, "fsdp": -1})
    assert "at most one" in refusal(mesh_sizes, c.mesh, 8)
    c.mesh.update({"data": 1, "fsdp": 1, "tensor": 8})
    message = refusal(validate, c, 8)
    assert "model.n_head=12" in message and "mesh.tensor=8" in message
    c.mesh.update({"data": 1, "fsdp": 256, "tensor": 4})
    c.train.batch_size = 512 * c.train.accumulate_steps
    assert "the heads' width=768 is not divisible by mesh.fsdp x mesh.tensor=1024" in refusal(validate, c, 1024)
    c.mesh.update({"data": 8, "fsdp": 1, "tensor": 1})
    c.train.batch_size, c.train.accumulate_steps = 12, 1
    message = refusal(validate, c, 8)
    assert "12 sequences" in message and "8 devices" in message


def test_snapshot_round_trip_and_damage(tmp_path):
    c = default_config()
    c.train.steps, c.data.source_options.path = 7, "x*.txt"
    save_snapshot(c, str(tmp_path))
    assert fields(load_snapshot(str(tmp_path))) == fields(c)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for damage, words in (
        ("{", "JSON"),
        ("[1]", "object"),
        (json.dumps(saved | {"extra": 1}), "extra"),
        (json.dumps(saved | {"seed": "one"}), "seed"),
        (json.dumps(saved | {"model": 3}), "model"),
    ):
        path.write_text(damage)
        message = refusal(load_snapshot, str(tmp_path))
        assert str(path) in message and words in message
    path.unlink()
    assert "--workdir" in refusal(load_snapshot, str(tmp_path))


def test_overrides_lie_over_the_snapshot(tmp_path):
    c = default_config()
    c.train.steps = 7
    save_snapshot(c, str(tmp_path))
    _, loaded = parse(f"--workdir={tmp_path}", "--config.eval.batches=3")
    assert loaded.train.steps == 7 and loaded.eval.batches == 3


def test_resume_takes_harmless_changes_and_refuses_others_by_name():
    old, new = default_config(), default_config()
    new.log.every_steps, new.mesh.fsdp = 3, 2
    assert {change.split("`")[1] for change in check_resumable(new, old)} == {"mesh.fsdp", "log.every_steps"}
    new.optim.learning_rate = 1.0
    message = refusal(check_resumable, new, old)
    assert "optim.learning_rate" in message and "--allow_config_change=optim.learning_rate" in message
    assert len(check_resumable(new, old, ("optim.learning_rate",))) == 3


def test_commands_exit_2_with_one_line(tmp_path, default_file):
    refused(
        run("train", f"--config={default_file}", f"--workdir={tmp_path}/w", "--config.model.n_head=7"), "model.n_head"
    )
    refused(run("train", f"--config={default_file}"), "--workdir")
    assert not (tmp_path / "w").exists()
    assert "checkpoint_step" in run("evaluate", "--help").stdout


def test_layers_are_compiled_in_one_piece_where_that_is_quicker():
    config = default_config()
    assert gpt_config(config, "gpu").scan_unroll == gpt_config(config, "cpu").scan_unroll == config.model.n_layer == 12
    assert gpt_config(config, "tpu").scan_unroll == 1
    config.train.scan_unroll = 2
    assert gpt_config(config, "cpu").scan_unroll == 2
    config.train.scan_unroll, config.train.remat = 0, "block"  # asks for memory, which a loop saves
    assert gpt_config(config, "cpu").scan_unroll == 1
    config.train.remat, config.model.n_layer = "none", 24
    assert gpt_config(config, "cpu").scan_unroll == 1
