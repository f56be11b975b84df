"""The Python API: what `import trialgpt_jax` offers."""

import inspect
import json
import subprocess
import sys

import pytest

import trialgpt_jax
from trialgpt_jax import UserError


def test_train_is_the_module_and_a_function(config, tmp_path):
    from trialgpt_jax import train as module

    changes = {"train.steps": 2, "optim.warmup_steps": 0, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    assert trialgpt_jax.train is module is sys.modules["trialgpt_jax.train"] and callable(module.main)
    for _ in range(2):  # the second time there is nothing to do
        assert trialgpt_jax.train(config, str(tmp_path / "run"), changes) == 0
    assert config.train.steps != 2, "the caller's config has changed"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
    assert trialgpt_jax.load(str(tmp_path / "run")).evaluate("The people").tokens > 0


def test_the_package_is_imported_without_jax_and_train_on_its_first_use():
    program = "import sys, trialgpt_jax as t; print('jax' in sys.modules, callable(t.train), 'jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "True", "True"], result.stderr
    assert list(inspect.signature(trialgpt_jax.train).parameters) == ["config", "workdir", "changes"]
    with pytest.raises(AttributeError, match="has no attribute 'tran'"):
        trialgpt_jax.tran  # noqa: B018


def test_train_takes_the_names_of_configs_and_refuses_what_the_command_refuses(tmp_path):
    for changes, message in (
        ({"train.stepz": 3}, "config field `train.stepz` does not exist; did you mean `train.steps`"),
        ({"train.steps": "x"}, "config field `train.steps` is 'x', but should be like 360"),
        ({"train.tokens": 1.0, "train.steps": 2}, "train.steps=2 and train.tokens=1 exclude each other"),
        ({"train.tokens": 1e6, "data.dir": str(tmp_path / "none")}, "none"),  # replaces train.steps=360
    ):
        with pytest.raises(UserError, match=message):
            trialgpt_jax.train("quickstart", str(tmp_path / "run"), changes)
    with pytest.raises(UserError, match="--config=nanogpt: no such file; the package has the configs"):
        trialgpt_jax.train("nanogpt", str(tmp_path / "run"))
