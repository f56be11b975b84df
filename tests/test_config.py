"""A wrong config is refused in one line that names the field and what would be right."""

import errno
import glob
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, call, refused, run

from trialgpt_jax import UserError, aliases, cli, faults
from trialgpt_jax.config import (
    Config,
    check_resumable,
    default_config,
    fields,
    load_snapshot,
    validate,
)
from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.schema import check, specs
from trialgpt_jax.training.workdir import save_snapshot

INFER = {"workdir": (None, ""), "prompt": (None, ""), "max_new_tokens": (200, ""), "batches": (0, "")}
OPTIONS = {"workdir": (None, "folder"), "count": (3, "a number")}


def parse(*arguments):
    return cli.parse(["program", *arguments], "doc", OPTIONS)


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


def test_every_field_has_a_meaning_and_a_valid_default():
    assert set(specs(Config)) == set(fields(default_config()))
    for name, (default, spec) in specs(Config).items():
        assert spec.doc, name
        check(name, default, spec)


def test_choices_are_the_keys_of_the_registries():
    """A name added to a registry and not to the config, or the reverse, could not be selected or would fail late."""
    from trialgpt_jax.model.attention import ATTENTION
    from trialgpt_jax.model.layers import ACTIVATIONS, POSITIONS, REMAT
    from trialgpt_jax.model.norms import NORMS
    from trialgpt_jax.training.optimizer import OPTIMIZERS, SCHEDULES

    for name, registry in (
        ("model.activation", ACTIVATIONS),
        ("model.norm", NORMS),
        ("model.position", POSITIONS),
        ("optim.name", OPTIMIZERS),
        ("optim.schedule", SCHEDULES),
        ("train.remat", REMAT),
        ("train.attention", {"auto": None, **ATTENTION}),
    ):
        assert set(specs(Config)[name][1].choices) == set(registry), name


def test_config_and_cli_import_no_jax():
    """`preprocess` and the refusal of a wrong config start without JAX, which takes about a second to import."""
    code = (
        "import sys, trialgpt_jax.cli, trialgpt_jax.config, trialgpt_jax.model.config; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SIZES = {"gpt2.py": ("124m", "350m", "774m", "1558m"), "gpt.py": ("7b", "13b"), "modern.py": ("124m", "350m")}
SHIPPED = [
    f"{path}:{size}" if size else path
    for path in sorted(glob.glob(str(ROOT / "configs" / "*.py")))
    for size in SIZES.get(path.rsplit("/", 1)[-1], [""])
]


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_configs_load_and_are_valid(path):
    _, config = parse(f"--config={path}")
    validate(config)


@pytest.mark.parametrize(
    ("file", "shape", "learning_rate", "millions"),
    [
        ("gpt2.py", (12, 12, 768), 6e-4, 124),
        ("gpt2.py:124m", (12, 12, 768), 6e-4, 124),
        ("gpt2.py:350m", (24, 16, 1024), 3e-4, 355),
        ("gpt2.py:774m", (36, 20, 1280), 2.5e-4, 774),
        ("gpt2.py:1558m", (48, 25, 1600), 2e-4, 1558),
        ("modern.py", (12, 6, 768), 4e-3, 162),
        ("modern.py:350m", (24, 8, 1024), 4e-3, 405),
        ("gpt.py:7b", (32, 32, 4096), 1.2e-4, 6_888),
        ("gpt.py:13b", (40, 40, 5120), 1e-4, 13_124),
    ],
)
def test_a_size_after_the_colon_selects_the_model(file, shape, learning_rate, millions):
    _, config = parse(f"--config={ROOT}/configs/{file}", "--config.seed=3")
    m = config.model
    assert (m.n_layer, m.n_head, m.n_embd) == shape
    assert config.optim.learning_rate == learning_rate and config.seed == 3
    assert config.mesh.fsdp == (1 if shape[2] == 768 else -1)
    tables = m.vocab_size * (1 if m.tie_embeddings else 2) + (m.block_size if m.position == "learned" else 0)
    of_norms = m.norm_scale + m.bias  # vectors of one norm
    vectors = m.n_layer * (2 * of_norms + 9 * m.bias) + of_norms  # 9 of the linear layers
    width = GPTConfig(**{name: m[name] for name in ("n_embd", "n_head", "activation")}).mlp_width
    matrices = 4 * m.n_embd + (3 if m.activation == "swiglu" else 2) * width
    parameters = (tables + m.n_layer * matrices + vectors) * m.n_embd
    assert round(parameters / 1e6) == millions


@pytest.mark.parametrize(
    ("file", "architecture"),
    [("gpt2.py", "GPT2LMHeadModel"), ("modern.py", "NanoChatForCausalLM"), ("gpt.py", "LlamaForCausalLM")],
)
def test_each_size_is_a_class_of_transformers(file, architecture):
    for size in SIZES[file]:
        _, config = parse(f"--config={ROOT}/configs/{file}:{size}")
        assert hf.family_of(GPTConfig(**config.model)).architecture == architecture


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("gpt2.py:125m", ("gpt2:125m", "124m, 350m, 774m, 1558m")),
        ("gpt2.py:", ("124m, 350m, 774m, 1558m",)),
        ("gpt.py:1b", ("gpt:1b", "7b, 13b")),
        ("modern.py:1b", ("modern:1b", "124m, 350m")),
        ("gpt.py", ("gpt", "no size", "7b, 13b", "gpt:7b")),
        ("quickstart.py:big", ("quickstart.py:big",)),
        ("gpt3.py:1b", ("gpt3.py:1b", "finetune, gpt, gpt2, modern, quickstart")),
    ],
)
def test_an_unknown_or_missing_size_is_refused(file, words):
    message = refusal(parse, f"--config={ROOT}/configs/{file}")
    for word in words:
        assert word in message


@pytest.mark.parametrize("path", SHIPPED)
def test_a_name_is_the_packages_config_in_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # such as a folder of Hugging Face's files
    name = os.path.basename(path).replace(".py", "")
    assert fields(parse(f"--config={name}")[1]) == fields(parse(f"--config={path}")[1])


def test_a_file_goes_before_the_packages_config_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(CONFIG_FILE.format("c.model.n_layer = 3"))
    assert parse("--config=quickstart")[1].model.n_layer == 3
    assert parse("--config", "gpt2:350m")[1].model.n_layer == 24


def test_a_config_that_is_not_there_is_named_as_the_packages(tmp_path, monkeypatch):
    # follows: write --config={}{} for that of the package
    monkeypatch.chdir(tmp_path)
    for given in ("configs/gpt2.py:350m", "gpt2.py:350m", "./gpt2:350m"):
        message = refusal(parse, f"--config={given}")
        (proposed,) = re.findall(r"write (--config=\S+) for that of the package", message)
        assert parse(proposed)[1].model.n_layer == 24
    assert "has the configs finetune, gpt, gpt2, modern, quickstart" in refusal(parse, "--config=gpt3:1b")
    assert refusal(parse, "quickstart").endswith("flags start with --, as in --config=quickstart")
    assert refusal(parse, "gpt2:350m").endswith("as in --config=gpt2:350m")


def test_command_line_overrides_have_the_fields_types(default_file):
    flags, c = parse(
        f"--config={default_file}",
        "--config.train.steps=7",
        "--config.optim.learning_rate=1",
        "--config.data.shuffle=False",
        "--config.data.dir=some/where",
        "--count=5",
    )
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


CONFIG_FILE = """from trialgpt_jax.config import default_config

def get_config():
    c = default_config()
    {}
    return c
"""

# What is given -> what the message proposes. The proposal is followed: it is accepted, and sets the field or flag.
PROPOSALS = {
    "--max_iters=100": "--config.train.steps=100",
    "--max_iters": "--config.train.steps=VALUE",
    "-max_iters=100": "--config.train.steps=100",
    "max_iters=100": "--config.train.steps=100",
    "--learning_rate=1e-3": "--config.optim.learning_rate=1e-3",
    "--learning-rate=1e-3": "--config.optim.learning_rate=1e-3",
    "--batch_size=4": "--config.train.batch_size=4",
    "--gradient_accumulation_steps=4": "--config.train.accumulate_steps=4",
    "--beta2=0.9": "--config.optim.b2=0.9",
    "--grad_clip=1": "--config.optim.clip_norm=1",
    "--eval_interval=5": "--config.eval.every_steps=5",
    "--min_lr=1e-5": "--config.optim.min_lr_ratio=0.1",
    "--out_dir=out": "--workdir=out",
    "--train.steps=5": "--config.train.steps=5",
    "train.steps=5": "--config.train.steps=5",
    "--wandb_log=True": "--config.log.wandb=VALUE",
    "--dataset=shakespeare": "--config.data.dir=VALUE",
    "--init_from=gpt2-xl": "--config.train.init_from=FOLDER",
    "--wrokdir=x": "--workdir=x",
    "--cuont=3": "--count=3",
    "count=3": "--count=3",
    "--bf16=True": "--config.train.dtype=VALUE",
    "--torch_dtype=bfloat16": "--config.train.dtype=VALUE",
    "--gradient_checkpointing": "--config.train.remat=VALUE",
    "--warmup_ratio=0.1": "--config.optim.warmup_fraction=0.1",
    "--warmdown-ratio=0.65": "--config.optim.decay_fraction=0.65",
    "--total_tokens=1e9": "--config.train.tokens=1e9",
    "--max_tokens=1e9": "--config.train.tokens=1e9",
    "--config.train.max_tokens=1e9": "train.tokens",
    "--target-param-data-ratio=12": "--config.train.tokens_per_parameter=VALUE",
    "--target_flops=1e18": "--config.train.tokens=VALUE",
    "--total-batch-size=524288": "--config.train.batch_size=VALUE",
    "--num_train_epochs=3": "--config.train.tokens=VALUE",
    "--device-batch-size=32": "--config.train.batch_size=32",
    "--batch_size=many": "--config.train.batch_size=VALUE",
    "--train.steps=1.5": "--config.train.steps=VALUE",
    "run_name=x": "--workdir=x",
    "/": "--workdir=/",
    "--workdir": "--workdir=VALUE",
    "--config.train.steps": "--config.train.steps=VALUE",
    "--config.out_dir=x": "--workdir=VALUE",
    "--config.log.wandb=None": "--config.log.wandb=",
}


@pytest.mark.parametrize("given", PROPOSALS)
def test_the_flag_that_a_message_proposes_is_accepted(default_file, given):
    # follows: is given without a value; write --
    # follows: ; write --config.
    # follows: give tokens, --config.
    # follows: give sequences instead of tokens, --config.
    # follows: is the text 'None'; for none write --config.
    proposal = PROPOSALS[given]
    message = refusal(parse, f"--config={default_file}", given)
    assert proposal in message, message
    if proposal.startswith("--"):
        config = parse(f"--config={default_file}", proposal.replace("VALUE", "3"))[1]
        if "tokens" in proposal or "fraction" in proposal:
            validate(config)


def test_a_name_that_only_resembles_one_of_ours_is_not_taken_for_it(default_file):
    for given in ("--embedding_lr=0.2", "--rows=3", "--core_metric_every=1"):
        assert "--help lists the flags" in refusal(parse, f"--config={default_file}", given)


def test_a_prompt_of_several_words_needs_quotes(default_file):
    # follows: a prompt with spaces needs quotes
    start = ["program", f"--config={default_file}"]
    assert "needs quotes" in refusal(cli.parse, [*start, "--prompt", "two", "words"], "doc", INFER)
    assert cli.parse([*start, "--prompt", "two words"], "doc", INFER)[0].prompt == "two words"


def test_every_name_of_another_trainer_leads_to_a_field_or_flag_of_ours(default_file):
    known = fields(default_config())
    for name in (*aliases._FIELDS, *aliases._FLAGS, *aliases._ADVICE):
        message = refusal(cli.parse, ["program", f"--config={default_file}", f"--{name}=x"], "doc", INFER)
        written = re.search(r"--([\w.]+)=", message)
        assert written is None or written[1].removeprefix("config.") in known or written[1] in INFER, message
        assert written or name in aliases._ADVICE, message
    assert set(aliases._FIELDS.values()) <= set(known)


def test_flags_and_fields_may_be_followed_by_their_value(default_file):
    for dashes in ("--", "-"):
        given = [f"{dashes}config", default_file, f"{dashes}workdir", "w", f"{dashes}config.train.steps", "7"]
        flags, c = parse(*given, f"{dashes}config.mesh.fsdp", "-1", f"{dashes}count", "4")
        assert (flags.workdir, flags.count, c.train.steps, c.mesh.fsdp) == ("w", 4, 7, -1)
    message = refusal(parse, f"--config={default_file}", "--config=other.py")
    assert "twice" in message and "other.py" in message
    # follows: --config is given without a file; write --config=FILE
    assert "write --config=FILE" in refusal(parse, "--config")
    given = ["program", "--config", default_file, "--config.seed=1337", "--config.data.dir=x", "--count=3"]
    assert cli.given_fields(given, OPTIONS) == {"seed", "data.dir"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000), ("1_000", 1000), ("1000.0", 1000), ("1e-1", None), ("None", None), ("", None), ("true", None)]
    + [("nan", None), ("inf", None), ("9" * 5000, None)],
)
def test_an_integer_on_the_command_line_may_be_written_as_a_float(default_file, text, value):
    arguments = f"--config={default_file}", f"--config.train.steps={text}"
    if value is None:
        message = refusal(parse, *arguments)
        assert "`train.steps`" in message and "an integer" in message and len(message) < 200
    else:
        assert parse(*arguments)[1].train.steps == value


def test_booleans_take_no_value_or_true_or_false(default_file):
    for arguments, value in (
        (["--config.data.shuffle"], True),
        (["--config.data.shuffle", "false"], False),
        (["--config.data.shuffle=FALSE"], False),
        (["--config.data.shuffle", "--count=3"], True),
    ):
        assert parse(f"--config={default_file}", *arguments)[1].data.shuffle is value


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.py").write_text(CONFIG_FILE.format("c.data.dir = '~/a:0.7, ~/b:0.3'; c.train.init_from = '~/i'"))
    options = {"workdir": (None, ""), "to_hf": (None, ""), "from_hf": (None, ""), "prompt": (None, "")}
    given = ["p", "--config", "~/x.py", "--workdir=~/w", "--to_hf=~/t", "--from_hf", "~/f", "--prompt=FILE:~/p"]
    given += ["--config.data.source_options.path=~/*.txt", "--config.data.tokenizer=from:~/r"]
    flags, c = cli.parse(given, "doc", options)
    home = str(tmp_path)
    assert (flags.workdir, flags.to_hf, flags.from_hf) == (f"{home}/w", f"{home}/t", f"{home}/f")
    assert flags.prompt == f"FILE:{home}/p" and c.data.tokenizer == f"from:{home}/r"
    assert (c.data.source_options.path, c.train.init_from) == (f"{home}/*.txt", f"{home}/i")
    assert [member.strip() for member in c.data.dir.split(",")] == [f"{home}/a:0.7", f"{home}/b:0.3"]
    assert cli.parse([*given, "--prompt=~ is a tilde"], "doc", options)[0].prompt == "~ is a tilde"
    monkeypatch.setenv("HOME", "")
    assert "HOME" in refusal(parse, "--config=~/x.py") and not (ROOT / "~").exists()
    assert "HOME" not in refusal(parse, "--config=~no_such_user/x.py")


def test_config_files_that_are_wrong_are_refused(tmp_path):
    assert "--config=quickstart" in refusal(parse)
    assert "missing.py" in refusal(parse, "--config=missing.py")
    path = tmp_path / "typo.py"
    path.write_text(CONFIG_FILE.format("c.model.n_layers = 3"))
    message = refusal(parse, f"--config={path}")
    assert "typo.py:5" in message and "n_layers" in message and "n_layer" in message
    path.write_text(CONFIG_FILE.format("c.model.n_layer = 'three'"))
    message = refusal(parse, f"--config={path}")
    assert "typo.py:5" in message and "n_layer" in message and "three" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:", ("{}:1: invalid syntax",)),
        ("\nimport nosuch", ("{}:2: ModuleNotFoundError", "nosuch")),
        ("x = 1\n1 / 0", ("{}:2: ZeroDivisionError",)),
        ("raise SystemExit", ("{}:1:", "ends the program")),
        (b"x = '\xff'", ("{}:1:", "utf-8")),
        (b"x = '\0'", ("{}", "null bytes")),
        ("x = 1", ("{} defines no get_config()",)),
        ("get_config = 1", ("{} defines no get_config()",)),
        ("def get_config(size): pass", ("get_config(size)", "--config={}:VALUE")),
        ("def get_config(a, b): pass", ("(a, b)", "no argument or one")),
        ("def get_config(): pass", ("returns nothing",)),
        ("def get_config(): return {}", ("returns dict",)),
        ("def get_config():\n    return 1 / 0", ("{}:2: ZeroDivisionError: division by zero",)),
        ("def get_config():\n    return input", ("returns builtin_function",)),
        (CONFIG_FILE.format("c.train.steps = 1.5"), ("{}:5", "`steps` is 1.5 (float)", "int")),
        (CONFIG_FILE.format("c.data.dir = ['a']"), ("{}:5", "`dir` is ['a'] (list)", "str")),
        (CONFIG_FILE.format("c.train.steps = None"), ("{}", "`train.steps` is None", "600000")),
        (CONFIG_FILE.format("c.train.steps = True"), ("{}", "`train.steps` is True", "600000")),
        (CONFIG_FILE.format("c.train = 3"), ("{}:5", "`train` is 3 (int)", "a group of fields")),
        (CONFIG_FILE.format("c.trian.steps = 3"), ("{}:5: config field `trian` does not exist",)),
        (CONFIG_FILE.format("c.unlock()\n    c.data = {1: 2}"), ("{}", "`data.1` does not exist")),
        ("raise GeneratorExit", ("{}:1: GeneratorExit",)),
    ],
)
def test_what_is_wrong_with_a_config_file_is_one_line_with_its_place(tmp_path, text, words):
    path = tmp_path / "c.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(parse, f"--config={path}")
    for word in words:
        assert word.format(path) in message, message
    if "VALUE" in message:
        assert "get_config(size)" not in refusal(parse, f"--config={path}:VALUE")


def test_a_config_that_is_no_python_file_is_refused(tmp_path):
    assert "is a folder" in refusal(parse, f"--config={tmp_path}")
    (tmp_path / "c.yaml").write_text("steps: 3")
    assert "not a Python file" in refusal(parse, f"--config={tmp_path}/c.yaml")
    # follows: a workdir is read with --workdir
    save_snapshot(default_config(), str(tmp_path))
    assert "read with --workdir" in refusal(parse, f"--config={tmp_path}/config.json")
    assert fields(parse(f"--workdir={tmp_path}")[1]) == fields(default_config())


def test_a_nanogpt_config_is_met_with_our_names_for_its_assignments(tmp_path):
    # follows: write {}{}
    path = tmp_path / "train_shakespeare.py"
    path.write_text("learning_rate = 1e-3\nmax_iters = 5000\nbeta2 = 0.99\nn_layer = 6\n")
    message = refusal(parse, f"--config={path}")
    pairs = re.findall(r"c\.([\w.]+) for (\w+)", message)
    assert len(pairs) == 4, message
    lines = "; ".join(f"c.{ours} = {value}" for (ours, _), value in zip(pairs, ("1e-3", 5000, 0.99, 6), strict=True))
    path.write_text(CONFIG_FILE.format(lines))
    _, c = parse(f"--config={path}")
    assert (c.optim.learning_rate, c.train.steps, c.optim.b2, c.model.n_layer) == (1e-3, 5000, 0.99, 6)


def test_numbers_of_a_config_file_may_be_integral_floats_or_numpys(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        CONFIG_FILE.format(
            "import numpy as np; c.train.steps = 1e3; c.seed = np.int64(5); c.optim.b1 = np.float32(0.5)"
        )
    )
    _, c = parse(f"--config={path}")
    assert (c.train.steps, c.seed, c.optim.b1) == (1000, 5, 0.5)
    assert [type(x) for x in (c.train.steps, c.seed, c.optim.b1)] == [int, int, float]


# ---- errors of the outside world


class JaxRuntimeError(RuntimeError):
    """As jax.errors.JaxRuntimeError, which is recognised by its name."""


OUTSIDE = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOTDIR, "Not a directory", "/x"),
    PermissionError(errno.EACCES, "Permission denied", "/x"),
    FileNotFoundError(errno.ENOENT, "No usable temporary directory found"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/train_00001.bin"),
    socket.gaierror(-2, "Name or service not known"),
    MemoryError(),
    RuntimeError("can't start new thread"),
    UnicodeEncodeError("ascii", "\xe4.txt", 0, 1, "ordinal not in range(128)"),
    JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"),
    JaxRuntimeError("INTERNAL: CUDA_ERROR_NO_DEVICE"),
    ImportError("libx.so: failed to map segment from shared object"),
]
OURS = [
    OSError(errno.EBADF, "Bad file descriptor"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", aliases.__file__ + "x"),
    JaxRuntimeError("INVALID_ARGUMENT: shapes"),
    RuntimeError("x"),
    ValueError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    KeyError("x"),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("error", OUTSIDE, ids=str)
def test_an_error_of_the_outside_world_is_one_line_with_status_2(monkeypatch, error):
    def main(argv):
        raise error

    monkeypatch.setattr("trialgpt_jax.evaluate.main", main)
    refused(call("evaluate"))


def test_what_is_proposed_against_want_of_memory_and_of_an_encoding_exists(default_file):
    # follows: out of memory: {}; {}; for `infer`, lower --num_samples
    # follows: cannot be written in {}; set PYTHONUTF8=1
    from trialgpt_jax.infer import FLAGS

    proposed = re.findall(r"(train\.\w+|mesh\.\w+)(?:=([\w-]+))?", faults.LEVERS)
    assert len(proposed) == 3 and "num_samples" in FLAGS
    _, c = parse(f"--config={default_file}", *(f"--config.{name}={value or 2}" for name, value in proposed))
    validate(c)
    code = "import sys; print('\\xe4'.encode(sys.getfilesystemencoding()))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, error):
    def main(argv):
        raise error

    monkeypatch.setattr("trialgpt_jax.evaluate.main", main)
    with pytest.raises(type(error)):
        cli.run(main)
    assert faults.explain(error) is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.n_head", 5, ("model.n_embd=768", "model.n_head=5")),
        ("model.n_kv_head", 5, ("model.n_head=12", "model.n_kv_head=5")),
        ("model.norm", "layrnorm", ("model.norm", "layernorm")),
        ("model.dropout", 1.0, ("model.dropout", "[0, 1)")),
        ("model.block_size", 0, ("model.block_size", "outside [1, ")),
        ("optim.learning_rate", float("nan"), ("optim.learning_rate", "finite")),
        ("optim.b2", 1.0, ("optim.b2",)),
        ("optim.name", "adam", ("optim.name", "adamw")),
        ("optim.warmup_steps", 600_000, ("optim.warmup_steps", "train.steps")),
        ("train.accumulate_steps", 7, ("train.batch_size=480", "train.accumulate_steps=7")),
        ("train.remat", "blocks", ("train.remat", "block")),
        ("train.dtype", "float16", ("train.dtype", "bfloat16")),
        ("data.tokenizer", "bpe", ("data.tokenizer", "bpe:N")),
        ("data.tokenizer", "bpe:256", ("data.tokenizer", "N > 256")),
        ("data.tokenizer", "bpe:" + "9" * 5000, ("data.tokenizer",)),
        ("train.steps", 2**31, ("train.steps", "at most 2147483647")),
        ("train.steps", 0, ("`train.steps` is 0", "train.tokens, train.tokens_per_parameter")),
        ("train.tokens", 1e9, ("train.steps=600000 and train.tokens=1000000000", "set train.steps=0")),
        ("train.tokens", float("inf"), ("train.tokens", "finite")),
        ("train.tokens_per_parameter", -1.0, ("train.tokens_per_parameter", "at least 0")),
        ("optim.warmup_fraction", 1.0, ("optim.warmup_fraction", "[0, 1)")),
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


def test_a_gpt_config_checks_itself():
    assert "model.n_embd=768 is not divisible by model.n_head=7" in refusal(lambda: GPTConfig(n_head=7))
    assert "model.norm" in refusal(lambda: GPTConfig(norm="batchnorm"))
    assert "model.position=rope" in refusal(lambda: GPTConfig(position="rope", head_dim=3))
    gpt = GPTConfig(n_kv_head=4, activation="swiglu")
    assert (gpt.head_dim, gpt.n_kv_head, gpt.padded_vocab_size, gpt.mlp_width) == (64, 4, 50304, 2048)


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


def test_a_removed_field_is_dropped_from_a_snapshot_where_it_had_no_effect(tmp_path):
    save_snapshot(default_config(), str(tmp_path))
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for value in (False, True):
        saved["optim"]["cautious_weight_decay"] = value
        path.write_text(json.dumps(saved))
        if value:
            assert "`optim.cautious_weight_decay` does not exist" in refusal(load_snapshot, str(tmp_path))
        else:
            assert fields(load_snapshot(str(tmp_path))) == fields(default_config())


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
        (json.dumps(saved | {"seed": {}}), "seed"),
        (json.dumps(saved | {"optim": {"eps": 10**400}}), "optim.eps"),
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
    # follows: use that, another --workdir, or --allow_config_change=
    message = refusal(check_resumable, new, old)
    assert "optim.learning_rate" in message and "--allow_config_change=optim.learning_rate" in message
    assert len(check_resumable(new, old, ("optim.learning_rate",))) == 3
    old.seed = -1
    assert "seed" in refusal(check_resumable, new, old, ("optim.learning_rate",))


def test_a_converted_workdir_takes_any_change_that_keeps_the_model():
    old, new = default_config(), default_config()
    new.optim.learning_rate, new.data.dir, new.model.dropout = 1.0, "elsewhere", 0.1
    assert check_resumable(new, old, converted=True) == []
    new.model.n_layer = 3
    assert "model.n_layer" in refusal(check_resumable, new, old, (), True)


def test_commands_exit_2_with_one_line(tmp_path, default_file):
    refused(
        run("train", f"--config={default_file}", f"--workdir={tmp_path}/w", "--config.model.n_head=7"), "model.n_head"
    )
    refused(run("train", f"--config={default_file}"), "--workdir")
    assert not (tmp_path / "w").exists()
    refused(call("train", f"--config={default_file}", "--workdir=/dev/null"), "--workdir=/dev/null is a file")
    assert "checkpoint_step" in run("evaluate", "--help").stdout


def test_a_name_with_a_newline_is_one_line(tmp_path):
    result = call("evaluate", f"--workdir={tmp_path}/no\nwhere")
    refused(result, r"/no\nwhere/config.json does not exist")
    assert len(result.stderr.splitlines()) == 1


def test_a_new_run_without_a_config_is_told_to_give_one(tmp_path, default_file):
    # follows: needs --config=FILE as well
    message = "a new run of `train` needs --config=FILE as well"
    for given in (("--workdir", tmp_path / "new"), ()):
        refused(call("train", *given), message)
    wanted = call(
        "train", f"--config={default_file}", f"--workdir={tmp_path}/new", f"--config.data.dir={tmp_path}/none"
    )
    refused(wanted, f"data.dir={tmp_path}/none does not exist")


def test_layers_are_compiled_in_one_piece_where_that_is_quicker():
    from trialgpt_jax.training.program import gpt_config

    config = default_config()
    assert gpt_config(config, "gpu").scan_unroll == gpt_config(config, "cpu").scan_unroll == config.model.n_layer == 12
    assert gpt_config(config, "tpu").scan_unroll == 1
    config.train.scan_unroll = 2
    assert gpt_config(config, "cpu").scan_unroll == 2
    config.train.scan_unroll, config.train.remat = 0, "block"  # remat asks for less memory, and a loop needs less
    assert gpt_config(config, "cpu").scan_unroll == 1
    config.train.remat, config.model.n_layer = "none", 24
    assert gpt_config(config, "cpu").scan_unroll == 1
