"""The Python API: what `import trialgpt_jax` offers, in a process where its modules are imported in any order."""

import importlib
import json
import types

import pytest

import trialgpt_jax
from trialgpt_jax import UserError


@pytest.fixture
def api(monkeypatch):
    """The package as it is before anything else of it is imported: `train` is the function."""
    importlib.import_module("trialgpt_jax.train")
    monkeypatch.setattr(trialgpt_jax, "train", trialgpt_jax.CallableModule.__call__)
    return trialgpt_jax


def test_train_is_a_function_before_and_after_its_module_is_imported(api, config, tmp_path):
    changes = {"train.steps": 2, "optim.warmup_steps": 0, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    assert isinstance(api.train, types.FunctionType)
    assert api.train(config, str(tmp_path / "run"), changes) == 0
    assert config.train.steps != 2, "the caller's config has changed"
    trialgpt_jax.train = importlib.import_module("trialgpt_jax.train")  # as Python's import does
    assert trialgpt_jax.train(config, str(tmp_path / "run"), changes) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
    assert trialgpt_jax.load(str(tmp_path / "run")).evaluate("The people").tokens > 0


def test_train_takes_the_names_of_configs_and_refuses_what_the_command_refuses(api, tmp_path):
    for changes, message in (
        ({"train.stepz": 3}, "config field `train.stepz` does not exist; did you mean `train.steps`"),
        ({"train.steps": "x"}, "config field `train.steps` is 'x', but should be like 360"),
        ({"train.tokens": 1.0, "train.steps": 2}, "train.steps=2 and train.tokens=1 exclude each other"),
        ({"train.tokens": 1e6, "data.dir": str(tmp_path / "none")}, "none"),  # replaces train.steps=360
    ):
        with pytest.raises(UserError, match=message):
            api.train("quickstart", str(tmp_path / "run"), changes)
    with pytest.raises(UserError, match="--config=nanogpt: no such file; the package has the configs"):
        api.train("nanogpt", str(tmp_path / "run"))
