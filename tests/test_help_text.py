"""--help lists the flags of a command, --help=config the fields, their values, defaults and meanings."""

import re

import pytest
from conftest import call, refused

from trialgpt_jax import cli, help_text
from trialgpt_jax.__main__ import COMMANDS
from trialgpt_jax.config import Config, default_config, fields
from trialgpt_jax.schema import specs

ENTRY = re.compile(r"^--config\.(\S+?)=(.*?)(?:  \(default (.*)\))?\n    (\S.*)", re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_listed_with_its_default_and_no_line_is_cut(name, columns, monkeypatch):
    module = __import__(f"trialgpt_jax.{name}", fromlist=["main"])
    options = getattr(module, "FLAGS", None) or module.OPTIONS
    monkeypatch.setenv("COLUMNS", str(columns))
    result = call(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.rstrip("\n").split("\n")
    flags = lines[lines.index("flags, with their defaults:") :]
    assert ("--config=NAME" in result.stdout) == (name != "plot")
    assert max(map(len, flags)) <= min(columns, 100) and "" not in flags and "\n\n\n" not in result.stdout
    text = " ".join(result.stdout.split())
    for flag, (default, meaning) in options.items():
        assert f"--{flag}" in text and " ".join(meaning.split()) in text
        assert isinstance(default, bool) or default in (None, "") or f"--{flag}={default} " in text


def test_every_config_field_is_listed_with_its_default_range_and_meaning():
    printed = call("train", "--help=config").stdout
    found = {name: (value, changed) for name, value, changed, _ in ENTRY.findall(printed)}
    default = {name: help_text._text(value) for name, value in fields(default_config()).items()}
    assert {name: value for name, (value, _) in found.items()} == default
    assert not any(changed for _, changed in found.values())
    text = " ".join(printed.split())
    for spec in (spec for _, spec in specs(Config).values()):
        assert " ".join(spec.doc.split()) in text
    assert "--config.optim.b1=0.9 AdamW's decay of the first moment; at least 0, below 1 " in text
    assert "of matmuls; auto = bfloat16, on CPU float32; one of auto, float32, bfloat16, float64 " in text
    # What is printed is what the command line takes.
    flags = [f"--config.{name}={value}" for name, (value, _) in found.items()]
    assert fields(cli.parse(["train", *flags], "", {})[1]) == fields(default_config())


def test_fields_of_a_config_show_its_values_beside_the_defaults(tmp_path, config):
    from trialgpt_jax.training.workdir import save_snapshot

    def values(*given):
        printed = call("evaluate", "--help=config", *given).stdout
        return {name: (value, changed) for name, value, changed, _ in ENTRY.findall(printed)}

    found = values("--config=gpt2:350m", "--config.seed=3", "--config.eval.sample_prompts=a|b")
    assert found["model.n_layer"] == ("24", "12") and found["model.vocab_size"] == ("50257", "")
    assert found["seed"] == ("3", "1337") and found["eval.sample_prompts"] == ("a|b", "empty")
    save_snapshot(config, str(tmp_path))
    assert values(f"--workdir={tmp_path}")["model.n_embd"] == ("32", "768")


@pytest.mark.parametrize("flag", ["--help=flag", "--help=", "-h=model"])
def test_another_value_of_help_is_refused(flag):
    refused(call("train", flag), f"{flag} is neither --help nor --help=config")
