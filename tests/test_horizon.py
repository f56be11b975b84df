"""The length of a run and its warmup, given as tokens, tokens per parameter or a share of the steps."""

import functools
import json
import re

import pytest
from conftest import call, metrics, overrides, refused, small_config, train_step_compiled_once

from trialgpt_jax import UserError, cli
from trialgpt_jax.config import check_resumable, default_config, fields, load_snapshot, validate
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training import horizon, plan
from trialgpt_jax.training.program import Program, resolve

STEP = 8 * 32  # tokens of a step of `small_config`


def with_length(config, **length):
    """`config` with `train.steps=0` and `length` in its place."""
    config.train.update({"steps": 0} | length)
    return config


def resolved(config, parameters=0):
    """Steps and steps of warmup; the fields they came from are 0."""
    found = horizon.resolve(config, lambda: parameters)
    horizon.check(found)
    assert found.train.tokens == found.train.tokens_per_parameter == found.optim.warmup_fraction == 0
    return found.train.steps, found.optim.warmup_steps


def refusal(function, *arguments, **named):
    with pytest.raises(UserError) as error:
        function(*arguments, **named)
    return str(error.value)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"tokens": 100 * STEP}, 100),
        ({"tokens": 100 * STEP + 1}, 101),
        ({"tokens": 100 * STEP - 1}, 100),
        ({"tokens": 20e9}, 78_125_000),  # beyond an int32
        ({"tokens": 20e9 + 1}, 78_125_001),
        ({"tokens_per_parameter": 20}, 8),  # 2,000 tokens
        ({"tokens_per_parameter": 20.48}, 8),
        ({"tokens_per_parameter": 20.49}, 9),
        ({"tokens_per_parameter": 0.001}, 1),
    ],
)
def test_tokens_become_steps_rounded_up(length, steps):
    config = with_length(small_config("x"), **length)
    config.optim.warmup_steps = 0
    assert resolved(config, 100) == (steps, 0)
    assert config.train.steps == 0  # the config that was given is unchanged


def test_products_are_exact():
    """In floating point 0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996."""
    config = with_length(small_config("x"), tokens_per_parameter=0.07)
    config.train.batch_size, config.model.block_size, config.optim.warmup_steps = 1, 1, 0
    assert resolved(config, 100) == (7, 0)
    config = small_config("x")
    config.train.steps = 100
    config.optim.update({"warmup_steps": 0, "warmup_fraction": 0.29})
    assert resolved(config) == (100, 29)


def test_a_share_of_the_steps_leaves_at_least_one_after_the_warmup():
    config = small_config("x")
    for steps, share, warmup in ((20, 0.25, 5), (20, 0.24, 4), (20, 0.9999, 19), (1, 0.9999, 0), (20, 1e-9, 0)):
        config.train.steps = steps
        config.optim.update({"warmup_steps": 0, "warmup_fraction": share})
        validate(config)
        assert resolved(config) == (steps, warmup)
    with_length(config, tokens=40 * STEP)
    config.optim.warmup_fraction = 0.1
    assert resolved(config) == (40, 4)
    assert (
        horizon.resolve(default_config(), lambda: pytest.fail("the parameters are not needed")).train.steps == 600_000
    )


def test_parameters_are_those_of_the_model_with_embeddings_and_padding(store):
    """GPT-2 in the shape of the quickstart: tables, 4 layers of 12 C^2 weights and 13 C biases and norms, last norm."""
    opened, C = open_store(str(store)), 256
    parameters = 4096 * C + 256 * C + 4 * (12 * C**2 + 13 * C) + 2 * C
    assert parameters == 4_273_664
    config = with_length(small_config(store), tokens_per_parameter=20)
    config.model.update({"vocab_size": 4096, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": C})
    assert resolve(config, opened).train.steps == 20 * parameters / (8 * 256) == 41_735
    config.train.tokens_per_parameter = 0.7
    assert resolve(config, opened).train.steps == 1461  # 1,460.7
    config.model.vocab_size = 3900  # padded to 3,968
    assert resolve(config, opened).train.steps == -(-0.7 * (parameters - 128 * C) // 2048) == 1450
    with_length(config, tokens_per_parameter=20)
    config.model.update({"vocab_size": 0})  # "the store's", 512
    assert resolve(config, opened).train.steps == 20 * (parameters - (4096 - 512) * C) / 2048


def test_what_is_read_before_step_0_sees_the_steps(store):
    """The plan, the optimizer's schedule and the scripts that make a `Program` from a config file."""
    opened = open_store(str(store))
    config = with_length(small_config(store), tokens=20 * STEP - 7)
    config.optim.update({"warmup_steps": 0, "warmup_fraction": 0.25})
    program, usual = Program(config, mesh=single_device()), Program(small_config(store), mesh=single_device())
    assert fields(program.config) == fields(usual.config) == fields(resolve(config, opened))
    text, per_parameter = plan.describe(program, opened), 20 * STEP / plan.parameter_count(program.params_layout)
    assert f"256 tokens per step, 5,120 in 20 steps, {per_parameter:.3g} per parameter: " in text
    assert plan.most_saves(program.config) == 4


# ---- wrong lengths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.tokens": 1e9}, "train.steps=20 and train.tokens=1000000000 exclude each other; set train.steps=0 to "),
        (
            {"train.tokens_per_parameter": 20},
            "train.steps=20 and train.tokens_per_parameter=20 exclude each other; set train.steps=0 to use train.",
        ),
        (
            {"train.steps": 0, "train.tokens": 1e5, "train.tokens_per_parameter": 0.5},
            "train.tokens=100000 and train.tokens_per_parameter=0.5 exclude each other; set train.tokens=0 to use ",
        ),
        (
            {"optim.warmup_fraction": 0.1},
            "optim.warmup_steps=5 and optim.warmup_fraction=0.1 exclude each other; set optim.warmup_steps=0 to use ",
        ),
    ],
)
def test_a_length_that_is_given_twice_is_refused_and_the_advice_leaves_one(changes, message):
    # follows: exclude each other; set {}=0 to use
    config = small_config("x")
    for name, value in changes.items():
        config[name.split(".")[0]][name.split(".")[1]] = value
    text = refusal(validate, config)
    assert text.startswith(message)
    name = re.search(r"set (\S+)=0 to use", text)[1]
    config[name.split(".")[0]][name.split(".")[1]] = 0
    validate(config)


def test_no_length_is_refused():
    # follows: is 0; set one of {} above 0
    config = with_length(small_config("x"))
    text = refusal(validate, config)
    assert text == (
        "config field `train.steps` is 0; set one of train.steps, train.tokens, train.tokens_per_parameter above 0"
    )
    for name in re.findall(r"train\.(\w+)", text.partition(";")[2]):
        config = with_length(small_config("x"), **{name: 10_000})
        validate(config)


def test_a_length_beyond_int32_or_within_the_warmup_says_where_it_comes_from(store):
    # follows: make it smaller, or raise train.batch_size
    opened, config = open_store(str(store)), with_length(small_config(store), tokens=1e12)
    assert refusal(resolve, config, opened) == (
        "train.tokens=1e+12 takes 3.91e+09 steps of 256 tokens, more than 2147483647; make it smaller, or "
        "raise train.batch_size"
    )
    config.train.batch_size = 16
    assert resolve(config, opened).train.steps == 1_953_125_000
    config.train.tokens = 4 * 16 * 32 + 1
    validate(config)
    assert refusal(resolve, config, opened) == (
        "optim.warmup_steps=5 leaves nothing of train.steps=5 (from train.tokens=2049); make it smaller than the "
        "number of steps"
    )
    config.optim.warmup_steps = 4
    assert resolve(config, opened).optim.warmup_steps == 4


# ---- on the command line


def parsed(file, *arguments):
    config = cli.parse(["program", f"--config={file}", *arguments], "doc", {"workdir": (None, "")})[1]
    train, optim = config.train, config.optim
    return train.steps, train.tokens, train.tokens_per_parameter, optim.warmup_steps, optim.warmup_fraction


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (600_000, 0, 0, 2000, 0)),
        (["--config.train.tokens=1e9"], (0, 1e9, 0, 2000, 0)),
        (["--config.train.tokens=2_000_000_000"], (0, 2e9, 0, 2000, 0)),
        (["--config.train.steps=0", "--config.train.tokens=3e9"], (0, 3e9, 0, 2000, 0)),
        (["--config.train.tokens_per_parameter=20"], (0, 0, 20, 2000, 0)),
        (["--config.train.steps=7", "--config.train.tokens=3e9"], (7, 3e9, 0, 2000, 0)),  # `validate` refuses both
        (["--config.train.tokens=0"], (600_000, 0, 0, 2000, 0)),
        (["--config.optim.warmup_fraction=0.1"], (600_000, 0, 0, 0, 0.1)),
        (["--config.optim.warmup_steps=0"], (600_000, 0, 0, 0, 0)),
    ],
)
def test_a_length_of_the_command_line_replaces_that_of_the_file(default_file, arguments, expected):
    assert parsed(default_file, *arguments) == expected


def test_steps_of_the_command_line_replace_tokens_of_the_file(tmp_path):
    lines = "c.train.steps = 0; c.train.tokens = 1e9; c.optim.warmup_steps = 0; c.optim.warmup_fraction = 0.1"
    file = tmp_path / "c.py"
    file.write_text(
        f"from trialgpt_jax.config import default_config\n\ndef get_config():\n    c = default_config(); {lines}\n"
        "    return c\n"
    )
    assert parsed(file) == (0, 1e9, 0, 0, 0.1)
    assert parsed(file, "--config.train.steps=10", "--config.optim.warmup_steps=3") == (10, 0, 0, 3, 0)
    assert parsed(file, "--config.train.tokens_per_parameter=2") == (0, 0, 2, 0, 0.1)


# ---- resume


def test_a_run_given_by_tokens_resumes_exactly_and_a_change_of_them_is_refused_by_name(store, tmp_path, default_file):
    usual = small_config(store)
    usual.eval.every_steps = usual.checkpoint.every_steps = 0
    usual.model.n_layer = 1
    config = with_length(usual.copy_and_resolve_references(), tokens=20 * STEP - 7)
    config.optim.update({"warmup_steps": 0, "warmup_fraction": 0.25})

    def train(config, name, *arguments):
        given = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / name}", *arguments]
        return call("train", *given)

    with train_step_compiled_once():
        assert train(usual, "usual").returncode == 0
        assert train(config, "parts", "--config.train.max_seconds=1e-9").returncode == 75
        result = train(config, "parts")
        assert result.returncode == 0 and "resumed from checkpoint" in result.stderr
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "usual")
        snapshots = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("usual", "parts")]
        assert snapshots[0] == snapshots[1] and snapshots[0]["train"]["steps"] == 20
        validate(load_snapshot(str(tmp_path / "parts")))
        for same in ([], ["--config.train.tokens=5113"]):
            result = call("train", f"--workdir={tmp_path / 'parts'}", *same)
            assert result.returncode == 0 and "nothing to do" in result.stderr, result.stderr

    # follows: use that, another --workdir, or --allow_config_change=
    wrong = "config field `train.steps` is 21 (from train.tokens=5121), but this workdir's run was started with 20; "
    refused(
        train(config, "parts", f"--config.train.tokens={20 * STEP + 1}"), wrong, "--allow_config_change=train.steps"
    )

    def resume(allowed, **changes):
        given = config.copy_and_resolve_references()
        for name, value in changes.items():
            given[name.partition("__")[0]][name.partition("__")[2]] = value
        snapshot = load_snapshot(str(tmp_path / "parts"))
        return check_resumable(resolve(given, open_store(str(store))), snapshot, allowed, given=given)

    wrong = "config field `optim.warmup_steps` is 6 (from optim.warmup_fraction=0.3), but this workdir's"
    assert refusal(resume, (), optim__warmup_fraction=0.3).startswith(wrong)
    # Twice the batch is half the steps: first the field that was changed is named, then those that follow from it.
    twice, allowed = functools.partial(resume, train__batch_size=16), ()
    for wrong in (
        "`train.batch_size` is 16, but",
        "`optim.warmup_steps` is 2 (from optim.warmup_fraction=0.25), but",
        "`train.steps` is 10 (from train.tokens=5113), but",
    ):
        text = refusal(twice, allowed)
        assert wrong in text
        allowed = tuple(re.search(r"--allow_config_change=(\S+)$", text)[1].split(","))
    assert [line.split("`")[1] for line in twice(allowed)] == ["train.batch_size", *horizon.DERIVED[::-1]]
