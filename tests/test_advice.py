"""Advice in messages works when it is followed literally.

A message that proposes a command, a flag or a config value has a test that takes the message and does what it says.
Such a test has the comment `# follows: <part of the message>`. The first test walks the source for messages without
one.
"""

import ast
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types

import fsspec
import jax
import numpy as np
import pytest
from conftest import ROOT, small_config

from trialgpt_jax import UserError, arguments
from trialgpt_jax.config import default_config, validate
from trialgpt_jax.data import batches, hub, token_store, tokenizer
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.model import generate
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import clusters, processes
from trialgpt_jax.parallel.accelerators import attention_kernel, check_dtype
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.storage import files, json_files, lease, lock
from trialgpt_jax.training import metrics
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program, gpt_config, resolve

# What a message proposes: a flag, a package, or an imperative with its object.
_VERBS = (
    "set|run|give|pass|raise|lower|use|write|choose|remove|restore|repair|call|train|make|keep|free|stop|replace|copy"
)
PROPOSAL = re.compile(
    rf"(?:^|[;,:(.] ?|\b(?:or|and|then|to) )(?:{_VERBS}) (?!and\b|of\b)\S"
    r"|\b(?:or|use|with|give|continue|write|set) (?:another )?`?--[a-z]|--allow"
    r"|\.on_error=skip (?!in)|\.extensions=|pip install"
)
FOLLOWS = re.compile(r"^ .*# follows: (.+)$", re.MULTILINE)


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
    """Line number and text of the string literals of a source, without docstrings and the help of flags and fields."""

    def visit(node: ast.AST):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Assign) and _is_help(node.targets[0]):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
            return
        text = text_of(node)
        if text is not None:
            yield node.lineno, text
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def _is_help(target: ast.AST) -> bool:
    return isinstance(target, ast.Name) and target.id in ("FLAGS", "OPTIONS")


def all_messages() -> list[tuple[str, str]]:
    """Place and text of every string literal of the package."""
    paths = sorted((ROOT / "trialgpt_jax").rglob("*.py"))
    return [(f"{path.relative_to(ROOT)}:{n}", text) for path in paths for n, text in messages(path.read_text())]


def followed() -> list[str]:
    """The parts of messages that tests follow."""
    sources = [path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))]
    return [part.strip() for source in sources for part in FOLLOWS.findall(source)]


def test_every_proposal_in_a_message_is_followed_by_a_test():
    parts, made = followed(), [(place, text) for place, text in all_messages() if PROPOSAL.search(text)]
    missing = [f"{place}: {text}" for place, text in made if not any(part in text for part in parts)]
    assert not missing, "\n".join(missing)


def test_every_mark_names_a_message():
    texts = [text for _, text in all_messages()]
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
    # follows: is in use by {}; stop it or choose another {}
    # follows: but the lock must be a regular file; remove it
    # follows: allow to read and write it, or choose another folder
    folder, other = str(tmp_path / "a"), str(tmp_path / "b")
    with lock.hold(folder):
        assert "stop it or choose another --workdir" in message(lock.probe, folder)
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
    # follows: below a path that is not UTF-8; choose another --workdir
    assert "not UTF-8" in message(Checkpoints(str(tmp_path / os.fsdecode(b"n\xff"))).check_before_saving, 1)
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
        clusters.detected, {"OMPI_COMM_WORLD_SIZE": "2"}
    )
    assert "give all three" in message(processes._given, Flags)
    Flags.coordinator_address, Flags.process_id = "host:1234", 1
    assert processes._given(Flags) == ("host:1234", 2, 1, None)
    Flags.coordinator_address = "host"
    assert "--coordinator_address=host is not host:port" in message(processes._given, Flags)


def test_an_object_store_without_its_package(monkeypatch):
    # follows: needs `pip install {}`
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    files._store.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "filesystem", missing)
        (package,) = re.findall("`pip install (.*)`", message(files.resolve, "gs://bucket/run"))
    files._store.cache_clear()
    assert importlib.util.find_spec(package) and files.resolve("gs://bucket/run") == "gs://bucket/run"


def test_a_token_store_that_is_damaged(store, tmp_path):
    # follows: run `trialgpt preprocess`
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
        assert "repair or remove the file" in message(metrics.read_metrics, str(tmp_path), 1)
        path.write_text(repaired)
        assert metrics.read_metrics(str(tmp_path), 1) == [{"step": 1}]
        path.unlink()
        assert metrics.read_metrics(str(tmp_path), 1) == []


def test_text_that_yields_too_few_merges():
    # follows: so at most bpe:{}; choose a smaller one or gpt2
    texts = ["the same words, the same words, again and again"] * 3
    (size,) = re.findall("so at most (bpe:.*);", message(tokenizer.train, "bpe:4096", texts))
    assert tokenizer.train(size, texts).name == size


def test_a_library_caller_with_float64():
    # follows: call config.set_precision(config) first, or set JAX_ENABLE_X64=1
    c = default_config()
    c.model.update({"n_layer": 1, "n_embd": 24, "vocab_size": 300})
    c.train.update({"dtype": "float64", "param_dtype": "float64", "batch_size": 1})
    assert "set JAX_ENABLE_X64=1" in message(Program, c)
    with jax.enable_x64(True):
        Program(c)


def test_a_disk_that_is_full_or_broken(tmp_path):
    # follows: free some space, or
    def write(error):
        with lease.writable(str(tmp_path), "--workdir"):
            raise error

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert message(write, full).endswith("free some space, or choose another folder")
    with lease.writable(str(tmp_path), "--workdir"):
        pass


def test_a_folder_with_the_shards_of_others(store, tmp_path):
    # follows: which is not of this job; choose another data.dir
    # follows: remove the folder and {} with a corpus that has documents
    config = small_config(tmp_path / "other")
    config.data.update({"source": "files", "tokenizer": "gpt2", "val_fraction": 0.0})
    config.data.source_options.path = str(store.parent / "texts")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train_00000.bin").write_bytes(bytes(8))
    assert message(preprocess, config).endswith("choose another data.dir")
    config.data.dir = str(tmp_path / "tokens")
    preprocess(config)
    manifest = json_files.read(str(tmp_path / "tokens" / "manifest.json"))
    json_files.write(str(tmp_path / "tokens" / "manifest.json"), manifest | {"shards": []})
    assert "remove the folder and run" in message(open_store, config.data.dir)
    shutil.rmtree(config.data.dir)
    preprocess(config)
    open_store(config.data.dir)


def test_a_split_by_rows_of_what_has_no_rows(store, tmp_path):
    # follows: so it needs .parquet files, not {}; use hash
    config = small_config(tmp_path)
    config.data.update({"source": "files", "tokenizer": "gpt2", "split": "nanogpt", "val_fraction": 0.1})
    config.data.source_options.path = str(store.parent / "texts")
    assert message(preprocess, config).endswith("use hash")
    config.data.split = "hash"
    preprocess(config)


def test_a_dataset_whose_data_are_outside_the_hub(store, tmp_path, monkeypatch):
    # follows: download it and use data.source=files
    monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
    monkeypatch.setattr(hub, "_data_files", lambda *_: ["https://example.com/a.txt"])
    config = small_config(tmp_path)
    config.data.update({"source": "hf:owner/name", "tokenizer": "gpt2", "val_fraction": 0.1})
    assert message(preprocess, config).endswith("download it and use data.source=files")
    config.data.source = "files"
    config.data.source_options.path = str(store.parent / "texts")
    preprocess(config)


def test_a_prompt_without_tokens():
    # follows: the prompt is empty; give at least one token
    gpt = GPTConfig(n_layer=1)
    assert message(generate._check_prompt, np.zeros(0, int), gpt).endswith("give at least one token")
    generate._check_prompt(np.zeros(1, int), gpt)


def test_a_split_without_documents(store, tmp_path):
    # follows: raise data.val_fraction
    config = small_config(tmp_path / "0")
    config.data.update({"source": "files", "tokenizer": "gpt2", "val_fraction": 0.0})
    config.data.source_options.path = str(store.parent / "texts")
    preprocess(config)
    split = open_store(config.data.dir).split("val")
    refusal = message(next, batches.eval_batches(split, block_size=8, batch_size=1))
    assert "raise data.val_fraction and run preprocess into a new folder" in refusal
    config.data.update({"val_fraction": 0.3, "dir": str(tmp_path / "1")})
    preprocess(config)
    next(batches.eval_batches(open_store(config.data.dir).split("val"), block_size=8, batch_size=1))


def test_flags_of_nanogpt_that_mean_something_else(store):
    # follows: give the ratio to the peak: --config.optim.min_lr_ratio=0.1
    # follows: run `trialgpt evaluate` with --workdir=FOLDER
    # follows: for other weights write --config.train.init_from=FOLDER
    def sort(*given):
        return arguments.sort(given, {"workdir": None})

    assert "--config.optim.min_lr_ratio=0.1" in message(sort, "--min_lr=6e-5")
    assert sort("--config.optim.min_lr_ratio=0.1").values == {"optim.min_lr_ratio": 0.1}
    assert "run `trialgpt evaluate` with --workdir=FOLDER" in message(sort, "--eval_only")
    assert importlib.import_module("trialgpt_jax.evaluate").FLAGS["workdir"]
    assert "write --config.train.init_from=FOLDER" in message(sort, "--init_from=gpt2-xl")
    assert sort("--config.train.init_from=FOLDER").values == {"train.init_from": "FOLDER"}


def test_limits_of_the_process():
    # follows: raise the limit of open files (ulimit -n)
    # follows: raise the limit of memory (ulimit -v, or that of the container)
    code = (
        "import resource, sys; from trialgpt_jax import faults\n"
        "kind = getattr(resource, sys.argv[1])\n"
        "resource.setrlimit(kind, (int(sys.argv[2]), resource.getrlimit(kind)[1]))\n"
        "try: print([open('/dev/null') for _ in range(50)], len(bytearray(1 << 30)))\n"
        "except (OSError, MemoryError) as error: print(faults.explain(error))\n"
    )
    for kind, low, high, words in (
        ("RLIMIT_NOFILE", 40, 100, "raise the limit of open files (ulimit -n)"),
        ("RLIMIT_AS", 1 << 29, 1 << 33, "raise the limit of memory (ulimit -v"),
    ):
        for limit in (low, high):
            command = [sys.executable, "-c", code, kind, str(limit)]
            output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            assert (words in output) == (limit == low), output


@pytest.mark.slow
@pytest.mark.parametrize("lever", [{"accumulate_steps": 8}, {"remat": "block"}])
def test_what_lowers_the_memory_of_a_step(store, lever):
    # follows: raise train.accumulate_steps, set train.remat=block, or split the state
    def temporaries(**train):
        config = small_config(store)
        config.model.update({"n_layer": 8, "block_size": 256})
        config.train.update({"batch_size": 32, **train})
        return Program(config).train_step.memory_analysis().temp_size_in_bytes

    assert temporaries(**lever) < 0.8 * temporaries()


def test_bfloat16_on_a_gpu_without_it_is_refused_and_what_is_proposed_runs():
    # follows: set train.dtype=float32 and train.attention=xla
    card = types.SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")
    assert "Tesla T4 has 7.5" in message(check_dtype, "bfloat16", card)
    check_dtype("float32", card)
    assert attention_kernel("xla", "gpu", **(FUSED | {"dtype": "float32"})) == "xla"
    for capability in ("8.0", "8.9", "10.0", "gfx942"):
        check_dtype("bfloat16", types.SimpleNamespace(device_kind="", compute_capability=capability))
    check_dtype("bfloat16", jax.devices()[0])
