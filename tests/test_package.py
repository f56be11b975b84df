"""What is installed: the wheel that docker/ builds, and what the scripts do about pip."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT, call

import trialgpt_jax
from trialgpt_jax.__main__ import COMMANDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def copied(dockerfile):
    """The files and folders that the stage of a Dockerfile which builds the wheel copies."""
    stage = dockerfile.read_text().split("AS wheel")[1].split("\nFROM ")[0]
    return [name for words in re.findall(r"^COPY (.*) \S+$", stage, re.MULTILINE) for name in words.split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from what a Dockerfile copies; and the folder in which it is unpacked."""
    setuptools = pytest.importorskip("setuptools", "77", reason="pyproject.toml needs setuptools 77 to build")
    assert setuptools
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in copied(DOCKERFILES[0]):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(out / "unpacked")
    return path, out / "unpacked"


def test_the_wheel_has_every_module_the_configs_and_the_mark_of_types(wheel):
    path, unpacked = wheel
    tracked = {str(each.relative_to(ROOT)) for each in (ROOT / "trialgpt_jax").rglob("*.py")}
    tracked |= {f"trialgpt_jax/configs/{each.name}" for each in (ROOT / "configs").glob("*.py")}
    found = {str(each.relative_to(unpacked)) for each in unpacked.rglob("*") if each.is_file()}
    assert found - {name for name in found if ".dist-info/" in name} == tracked | {"trialgpt_jax/py.typed"}
    for each in (ROOT / "configs").glob("*.py"):
        assert (unpacked / "trialgpt_jax/configs" / each.name).read_bytes() == each.read_bytes()
    assert f"-{trialgpt_jax.__version__}-" in path.name


def test_the_wheel_has_the_program_and_the_requirements_of_each_extra(wheel):
    (info,) = wheel[1].glob("*.dist-info")
    assert "trialgpt = trialgpt_jax.__main__:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Dist: jax<0.13,>=0.10.2" in metadata
    for extra, jax in {"cuda": "cuda13", "cuda12": "cuda12", "tpu": "tpu"}.items():  # cuda12: drivers before 580
        assert f'Requires-Dist: jax[{jax}]; extra == "{extra}"' in metadata


def test_the_wheel_alone_finds_its_configs_in_an_empty_folder(wheel, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(wheel[1])}
    base = [sys.executable, "-m", "trialgpt_jax", "preprocess", "--help=config"]
    result = subprocess.run(
        [*base, "--config=gpt2:350m"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "--config.model.n_layer=24 " in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


def test_both_images_build_the_same_wheel_and_hadolint_finds_nothing():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda"]
    first, second = (path.read_text().split("AS wheel")[1].split("\nFROM ")[0] for path in DOCKERFILES)
    assert first == second
    for path in DOCKERFILES:
        text = path.read_text()
        for command in re.findall(r"^#   docker (?:run|build) .*? trialgpt:\w+ (\w+) ", text, re.MULTILINE):
            assert command in COMMANDS
        assert text.rstrip().endswith('ENTRYPOINT ["trialgpt"]\nCMD ["--help"]')
    assert "jax[cuda13]" in PROJECT["project"]["optional-dependencies"]["cuda"]
    assert "ARG JAX=jax[cuda13]" in DOCKERFILES[1].read_text()
    beside = pathlib.Path(sys.executable).with_name("hadolint")
    if not beside.exists():
        pytest.skip("hadolint is not installed; it is part of the `test` extra")
    result = subprocess.run([beside, *DOCKERFILES], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# ---- scripts


@pytest.fixture(scope="module")
def check_venv():
    spec = importlib.util.spec_from_file_location("check_venv", ROOT / "scripts" / "check_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_an_environment_lacks_is_named(check_venv):
    assert check_venv.lacking(["numpy>=2", "no_such_package; sys_platform == 'nowhere'"]) is None
    assert check_venv.lacking(["numpy>=2", "no_such_package"]) == "no_such_package is not installed"
    assert re.fullmatch(r"numpy [\d.]+ is not >=99", check_venv.lacking(["numpy>=99"]))
    # Of a package that is installed, an extra that is not.
    assert check_venv.lacking(["jax[no-such-extra]"]) is None and check_venv.lacking(["jax"]) is None
    assert "is not installed" in check_venv.lacking(["jax[cuda13]"])
    assert check_venv.lacking(check_venv.wanted(".")) is None


def test_what_is_wanted_is_what_pip_would_install(check_venv):
    plain, both = check_venv.wanted("."), check_venv.wanted(".[tpu, gs]")
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert len(plain) == len(lines) and "jax>=0.10.2,<0.13" in plain
    assert both == [*plain, "jax[tpu]", "gcsfs"]


FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"{folder}/calls"
case "$*" in
    *check_venv.py*) cat "{folder}/missing"; exit $(wc -l <"{folder}/missing") ;;
    *pip*) printf '%b' "{pip}"; exit {status} ;;
esac
"""
PIP = (
    "Collecting jax<0.13\\n  Downloading jax-0.12.0-py3-none-any.whl.metadata (13 kB)\\n"
    "Downloading jaxlib-0.12.0-cp312-cp312-manylinux_2_27_x86_64.whl (86.8 MB)\\nUsing cached etils-1.9.whl (2.1 MB)\\n"
    "Installing collected packages: a, b, c\\n"
)


def environment(folder, missing, pip=PIP, status=0):
    """A folder `venv` whose python says that `missing` is missing, and whose pip says `pip`."""
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "missing").write_text(missing)
    for name, text in (
        ("python", FAKE_PYTHON.format(folder=folder, pip=pip, status=status)),
        ("trialgpt", f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{folder}/commands"\n'),
    ):
        (folder / "venv/bin" / name).write_text(text)
        (folder / "venv/bin" / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name != "PYTHON"}  # it chooses what the suite runs with
    return own | {"VENV": str(folder / "venv")}


def script(name, *arguments, env, cwd=ROOT):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_pip_is_not_called_where_nothing_is_missing(tmp_path):
    result = script("setup_venv.sh", ".[test]", env=environment(tmp_path, ""))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"ready: source {tmp_path}/venv/bin/activate\n"
    assert (tmp_path / "calls").read_text() == "scripts/check_venv.py .[test]\n"


@pytest.mark.parametrize(("variables", "name"), [({}, "python3"), ({"PYTHON": "mine"}, "mine")])
@pytest.mark.parametrize("supported", [True, False])
def test_python_is_the_interpreter_that_makes_the_environment(tmp_path, variables, name, supported):
    env = environment(tmp_path, "")
    (tmp_path / "venv").rename(tmp_path / "made")
    (tmp_path / "bin").mkdir()
    for each in ("python3", "mine"):
        text = f'case $1 in -c) exit {int(not supported)} ;; --version) echo {each} 3.9 ;; -m) cp -r made "$3" ;; esac'
        (tmp_path / "bin" / each).write_text(f'#!/bin/sh\ncd "{tmp_path}"\n{text}\n')
        (tmp_path / "bin" / each).chmod(0o755)
    result = script("setup_venv.sh", ".", env=env | {"PATH": f"{tmp_path}/bin:{env['PATH']}"} | variables)
    if supported:
        assert result.returncode == 0, result.stderr
        assert result.stderr == f"creating the virtual environment {tmp_path}/venv with {name} 3.9\n"
    else:
        why = f"{name} 3.9 is not supported; set PYTHON to Python 3.11, 3.12 or 3.13"
        assert (result.returncode, result.stderr) == (2, f"error: {why}\n")
    assert (tmp_path / "venv/bin/python").exists() == supported


def test_what_pip_does_is_said_in_short_lines(tmp_path):
    result = script("setup_venv.sh", ".[test]", env=environment(tmp_path, "jax is not installed\n"))
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        f"installing .[test] into {tmp_path}/venv, because jax is not installed",
        "  downloading jaxlib-0.12.0 (86.8 MB)",
        "  installing 3 packages; this takes a minute or more",
    ]
    assert (tmp_path / "venv/pip.log").read_text() == PIP.encode().decode("unicode_escape")


def test_a_failure_of_pip_shows_its_last_lines_and_ends_the_script(tmp_path):
    env = environment(tmp_path, "jax is not installed\n", "ERROR: no route to host\\n", 1)
    result = script("quickstart.sh", env=env)
    assert result.returncode == 1 and not (tmp_path / "commands").exists()
    assert result.stderr.endswith("/pip.log ends with\nERROR: no route to host\n")


def unfolded(output):
    return output.replace(" \\\n      ", " ")


def next_commands(output):
    """The lines after `Next`, without the first, which enters the environment."""
    lines = unfolded(output).split("Next, one after the other:\n")[1].splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  trialgpt ")]


def test_the_quickstart_runs_the_four_commands_and_names_three_more(tmp_path):
    workdir, flag = tmp_path / "my run", f"--config.data.dir={tmp_path}/my store"
    result = script("quickstart.sh", str(workdir), flag, env=environment(tmp_path, ""), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "commands").read_text().splitlines() == [
        f"preprocess --config=quickstart {flag}",
        f"train --config=quickstart --workdir={workdir} {flag}",
        f"evaluate --workdir={workdir}",
        f"infer --workdir={workdir} --prompt=The people of the United States --top_p=0.9",
    ]
    assert [line for line in result.stderr.splitlines() if re.match(r"\d of 4: ", line)]
    assert f"Made in {ROOT}:\n" in result.stdout and f"  {tmp_path}/my store  the text as" in result.stdout
    assert f"  cd {ROOT} && source {tmp_path}/venv/bin/activate\n" in unfolded(result.stdout)
    commands = next_commands(result.stdout)
    assert [words[1] for words in commands] == ["infer", "train", "convert"]
    for words in commands:
        assert call(words[1], *words[2:], "--help").returncode == 0  # after the other flags, which are looked at first
    assert f"--workdir={workdir}_longer" in commands[1] and flag in commands[1]


@pytest.mark.slow
def test_the_quickstart_and_the_commands_that_it_names(tmp_path):
    """With this environment's packages: as a user types them, in the repository."""
    env = environment(tmp_path, "") | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "venv/bin/trialgpt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trialgpt_jax "$@"\n')
    tiny = {"train.steps": 2, "optim.warmup_steps": 1, "eval.batches": 1, "model.n_layer": 1, "model.n_embd": 32}
    tiny |= {"data.dir": f"{tmp_path}/store", "data.source_options.max_files": 40, "data.tokenizer": "bpe:300"}
    result = script("quickstart.sh", f"{tmp_path}/run", *(f"--config.{k}={v}" for k, v in tiny.items()), env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["steps"] == 2
    for words in next_commands(result.stdout):
        words = [word.replace("steps=1080", "steps=3").replace("=out/", f"={tmp_path}/out/") for word in words]
        done = subprocess.run(
            [str(tmp_path / "venv/bin" / words[0]), *words[1:]], env=env, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/run/model.safetensors").exists() and (tmp_path / "run_longer/checkpoints/3").exists()
