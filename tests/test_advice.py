"""Advice in messages works when it is followed literally.

A message that proposes a command, a flag or a config value has a test that takes the message and does what it says.
Such a test has the comment `# follows: <part of the message>`. The first test walks the source for messages without
one.
"""

import ast
import importlib.util
import os
import re
import shutil
import sys

import jax
import pytest
from conftest import ROOT, small_config

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config, validate
from trialgpt_jax.data import batches, token_store, tokenizer
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.accelerators import attention_kernel
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.storage import files, lock
from trialgpt_jax.training import metrics
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program, gpt_config, resolve

# What a message proposes: a flag, a package, or an imperative with its object.
_VERBS = (
    "set|run|give|pass|raise|lower|use|write|choose|remove|restore|repair|call|train|make|keep|free|stop|replace|copy"
)
PROPOSAL = re.compile(
    rf"(?:^|[;,:(.] ?|\b(?:or|and|then|to) )(?:{_VERBS}) (?!and\b|of\b)\S"
    r"|pip install|git lfs|\b(?:or|use|with|give|continue|write|set) (?:another )?`?--[a-z]|--allow"
)
FOLLOWS = re.compile(r"^ +# follows: (.+)$", re.MULTILINE)


def text_of(node: ast.AST) -> str | None:
    """A string literal, with {} for what is inserted; None if the node is not one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (text_of(node.left) or text_of(node.right)):
        return (text_of(node.left) or "{}") + (text_of(node.right) or "{}")
    return None


def messages(source: str):
    """Line number and text of the string literals in the functions of a source, without docstrings and flags' help."""

    def visit(node: ast.AST, inside: bool):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        text = text_of(node)
        if text is None:
            inside = inside or isinstance(node, ast.FunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)
        elif inside:
            yield node.lineno, text

    yield from visit(ast.parse(source), False)


def proposals() -> dict[str, str]:
    """Place -> text of every message that proposes something."""
    found = {}
    for path in sorted((ROOT / "trialgpt_jax").rglob("*.py")):
        for line, text in messages(path.read_text()):
            if " " in text.strip() and PROPOSAL.search(text):
                found[f"{path.relative_to(ROOT)}:{line}"] = text
    return found


def followed() -> list[str]:
    """The parts of messages that tests follow."""
    sources = [path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))]
    return [part.strip() for source in sources for part in FOLLOWS.findall(source)]


def test_every_proposal_in_a_message_is_followed_by_a_test():
    parts = followed()
    missing = [f"{where}: {text}" for where, text in proposals().items() if not any(part in text for part in parts)]
    assert not missing, "\n".join(missing)


def test_every_mark_names_a_message():
    texts = list(proposals().values())
    assert not [part for part in followed() if not any(part in text for text in texts)]


# ---- proposals that need no command


def message(function, *arguments, **options) -> str:
    """The message with which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    return str(error.value)


FUSED = {"dtype": "bfloat16", "head_dim": 64, "block_size": 1024, "dropout": 0.0}


@pytest.mark.parametrize(
    ("platform", "wrong", "right"),
    [
        ("gpu", {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ("gpu", {"head_dim": 20}, {"head_dim": 24}),
        ("gpu", {"dropout": 0.1}, {"dropout": 0.0}),
        ("tpu", {"block_size": 100}, {"block_size": 128}),
    ],
)
def test_an_attention_kernel_runs_with_the_value_that_is_named_or_as_xla(platform, wrong, right):
    # follows: set train.dtype=bfloat16
    # follows: set model.head_dim
    # follows: set model.block_size
    # follows: set model.dropout=0
    # follows: or choose the slower train.attention=xla
    refusal = message(attention_kernel, "auto", platform, **(FUSED | wrong))
    (name, value), group = next(iter(right.items())), "train" if "dtype" in right else "model"
    assert f"set {group}.{name}" in refusal and "train.attention=xla" in refusal
    assert attention_kernel("auto", platform, **(FUSED | {name: value})) != "xla"
    assert attention_kernel("xla", platform, **(FUSED | wrong)) == "xla"


def test_an_odd_head_width_for_rotary_positions():
    # follows: needs an even head width; set model.head_dim
    assert "set model.head_dim" in message(GPTConfig, position="rope", n_embd=36, n_head=12)
    GPTConfig(position="rope", n_embd=36, n_head=12, head_dim=4)


def test_offloading_on_a_cpu():
    # follows: where a CPU has them already; use block
    c = default_config()
    c.train.remat = "offload"
    assert message(gpt_config, c, "cpu").endswith("use block")
    c.train.remat = "block"
    gpt_config(c, "cpu")


def test_a_warmup_longer_than_the_run_and_a_batch_that_cannot_be_split():
    # follows: make it smaller than the number of steps
    c = default_config()
    c.train.steps, c.optim.warmup_steps = 10, 10
    assert "make it smaller than the number of steps" in message(validate, c)
    c.optim.warmup_steps = 9
    validate(c)
    c.train.batch_size, c.train.accumulate_steps = 10, 4
    assert "is not divisible by train.accumulate_steps=4" in message(validate, c)
    c.train.batch_size = 12
    validate(c)


def test_a_vocabulary_smaller_than_the_stores(store):
    # follows: set model.vocab_size={}, or 0 for the store's
    config, opened = small_config(store), open_store(str(store))
    config.model.vocab_size = 300
    (size,) = re.findall(r"set model.vocab_size=(\d+), or 0", message(resolve, config, opened))
    for value in (int(size), 0):
        config.model.vocab_size = value
        assert resolve(config, opened).model.vocab_size == 512


def test_a_split_without_a_window(store):
    # follows: run preprocess into a new folder, or lower model.block_size
    split = open_store(str(store)).split("val")
    refusal = message(next, batches.eval_batches(split, block_size=split.n_tokens, batch_size=1))
    assert "or lower model.block_size" in refusal
    next(batches.eval_batches(split, block_size=split.n_tokens - 1, batch_size=1))


def test_a_lock_that_is_in_use_or_no_file(tmp_path):
    # follows: is in use by {}; stop it or choose another folder
    # follows: but the lock must be a regular file; remove it
    # follows: allow to read and write it, or choose another folder
    folder, other = str(tmp_path / "a"), str(tmp_path / "b")
    with lock.hold(folder):
        assert "stop it or choose another folder" in message(lock.probe, folder)
        lock.probe(other)
    lock.probe(folder)
    os.remove(tmp_path / "a" / "lock")
    os.mkdir(tmp_path / "a" / "lock")
    assert message(lock.probe, folder).endswith("remove it")
    os.rmdir(tmp_path / "a" / "lock")
    lock.probe(folder)


def test_a_path_in_which_orbax_cannot_save_and_a_disk_that_is_too_small(tmp_path, monkeypatch):
    # follows: choose another --workdir
    # follows: free some, keep fewer, or choose another --workdir
    assert message(Checkpoints(str(tmp_path / "a[1]")).check_before_saving, 1).endswith("choose another --workdir")
    Checkpoints(str(tmp_path / "a")).check_before_saving(1)
    monkeypatch.setattr(files, "free_bytes", lambda path: 25)
    refusal = message(Checkpoints(str(tmp_path), keep_last=2).check_before_saving, 10)
    assert "free some, keep fewer" in refusal
    Checkpoints(str(tmp_path), keep_last=1, keep_best=0).check_before_saving(10)


def test_processes_that_find_no_others(monkeypatch):
    # follows: give --coordinator_address, --num_processes and --process_id
    # follows: go together; give all three
    class Flags:
        coordinator_address, num_processes, process_id = None, 2, -1
        peer_timeout_seconds = start_timeout_seconds = 60

    assert "give --coordinator_address, --num_processes and --process_id" in message(
        processes.detected, {"OMPI_COMM_WORLD_SIZE": "2"}
    )
    assert "give all three" in message(processes._given, Flags)
    Flags.coordinator_address, Flags.process_id = "host:1234", 1
    assert processes._given(Flags) == ("host:1234", 2, 1)


def test_an_object_store_without_its_package(monkeypatch):
    # follows: needs `pip install {}`
    files._store.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        (package,) = re.findall("`pip install (.*)`", message(files.resolve, "gs://bucket/run"))
    files._store.cache_clear()
    assert importlib.util.find_spec(package) and files.resolve("gs://bucket/run") == "gs://bucket/run"


def test_a_token_store_that_is_damaged(store, tmp_path):
    # follows: remove the folder and {} again
    # follows: but should be {}; remove {} and {} again
    def damage(name, *words):
        shutil.copytree(store, folder, dirs_exist_ok=True)
        path = folder / name
        path.write_bytes(path.read_bytes()[:-2] if name.endswith("json") or "truncated" in words else b"\1" * 9)
        return message(token_store.verify, str(folder))

    folder = tmp_path / "tokens"
    config = small_config(folder)
    config.data.update({"source": "files", "tokenizer": "bpe:512", "val_fraction": 0.3})
    config.data.source_options.path = str(store.parent / "texts")
    for name, *words in (("manifest.json", "manifest"), ("train_00000.bin", "truncated")):
        assert f"remove the folder and {token_store._RUN} again" in damage(name, *words)
        shutil.rmtree(folder)
        preprocess(config)
        token_store.verify(str(folder))
    os.remove(folder / "val_00000.bin")
    assert f"remove the folder and {token_store._RUN} again" in message(token_store.verify, str(folder))
    shutil.copy(store / "val_00000.bin", folder)
    with open(folder / "train_00000.bin", "r+b") as file:
        file.write(b"\1\0")
    assert f"remove {folder} and {token_store._RUN} again" in message(token_store.verify, str(folder))
    shutil.rmtree(folder)
    preprocess(config)
    token_store.verify(str(folder))


def test_a_log_of_metrics_that_is_damaged(tmp_path):
    # follows: repair or remove the file
    path = tmp_path / "metrics.jsonl"
    for damaged, repaired in (('{"step": 1}\n{"st\n', '{"step": 1}\n'), ('{"step": 1}\n' * 2, '{"step": 1}\n')):
        path.write_text(damaged)
        assert "repair or remove the file" in message(metrics._lines_up_to, str(path), 1)
        path.write_text(repaired)
        assert metrics._lines_up_to(str(path), 1) == [{"step": 1}]
        path.unlink()
        assert metrics._lines_up_to(str(path), 1) == []


def test_text_that_yields_too_few_merges():
    # follows: so at most bpe:{}; choose a smaller one or gpt2
    texts = ["the same words, the same words, again and again"] * 3
    (size,) = re.findall("so at most (bpe:.*);", message(tokenizer.train, "bpe:4096", texts))
    assert tokenizer.train(size, texts).name == size


def test_a_library_caller_with_float64():
    # follows: call config.enable_x64(config) first, or set JAX_ENABLE_X64=1
    c = default_config()
    c.model.update({"n_layer": 1, "n_embd": 24, "vocab_size": 300})
    c.train.update({"dtype": "float64", "param_dtype": "float64", "batch_size": 1})
    assert "set JAX_ENABLE_X64=1" in message(Program, c)
    with jax.enable_x64(True):
        Program(c)
