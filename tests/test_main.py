"""The program `trialgpt`: its commands, --version, and what it says of other words."""

import importlib
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, refused

import trialgpt_jax
from trialgpt_jax import __main__ as program


@pytest.fixture
def trialgpt(monkeypatch, capsys):
    """Calls the program in this process; returns (status, stdout, stderr)."""
    monkeypatch.setattr(trialgpt_jax, "begin_command", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trialgpt", *arguments])
        try:
            status = program.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def python(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_is_a_module_with_help(trialgpt, name):
    status, out, err = trialgpt(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(importlib.import_module(f"trialgpt_jax.{name}").__doc__[:20])
    assert ("--help=config" in out) == (name != "plot")


def test_help_and_version_need_no_library():
    """Importing the package and listing the commands takes no more than Python's own modules."""
    code = (
        "import sys, trialgpt_jax; light = set(sys.modules)\n"
        "sys.argv = ['trialgpt', sys.argv[1]]; from trialgpt_jax.__main__ import main; main()\n"
        "known = {*sys.stdlib_module_names, 'trialgpt_jax', '__main__'}\n"
        "found = {name.partition('.')[0] for name in sys.modules} - known\n"
        "assert not [name for name in found if not name.startswith('_')], found\n"
        "assert not any(name.startswith('trialgpt_jax.') for name in light), light"
    )
    for flag, words in (("--help", "usage: trialgpt COMMAND"), ("--version", trialgpt_jax.__version__)):
        result = python("-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", flag)
        assert result.returncode == 0 and words in result.stdout, result.stderr


def test_the_list_of_commands_is_the_help(trialgpt):
    status, out, err = trialgpt("--help")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(program.COMMANDS)
    assert max(map(len, out.splitlines())) <= 100
    assert trialgpt() == (2, "", out)  # on stderr: nothing was asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "--workdir=x"], "'trian' is not a command; did you mean `train`?"),
        (["quickstart"], "'quickstart' is not a command; the commands are preprocess, train,"),
        (["a\nb"], r"'a\\nb' is not a command"),
        (["--workdir=x", "infer"], "--workdir=x comes before the command; write `trialgpt infer --workdir=x`"),
        (["-x"], "-x comes before the command; write `trialgpt COMMAND -x`"),
    ],
)
def test_other_words_are_refused(trialgpt, arguments, words):
    # follows: comes before the command; write
    status, out, err = trialgpt(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and words in err
    if "trialgpt infer" in err:
        assert "config.json does not exist" in trialgpt("infer", "--workdir=x")[2]


def test_it_runs_as_a_module_and_refuses_as_a_command_does():
    refused(python("-m", "trialgpt_jax", "preprocess", "--nonsense"), "--nonsense is not a flag")
    result = python("-m", "trialgpt_jax", "--version")
    assert (result.returncode, result.stdout) == (0, f"trialgpt_jax {trialgpt_jax.__version__}\n")


def test_results_that_cannot_be_written_and_ctrl_c_are_those_of_a_command():
    script = f'"{sys.executable}" -m trialgpt_jax --help >/dev/full'
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    refused(result, "stdout cannot be written: No space left on device")
    entry = "import sys; sys.argv = ['trialgpt', '--help']\nfrom trialgpt_jax import __main__ as program, console\n"
    interrupt = f"program._help = lambda: console.signal.raise_signal({int(signal.SIGINT)})\nsys.exit(program.main())"
    result = python("-c", entry + interrupt)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
