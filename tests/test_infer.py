"""The commands evaluate and infer: their output, reproducible samples, and the requests that they refuse."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from conftest import call, overrides, refused, run, small_config

from trialgpt_jax.config import load_snapshot
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.model.gpt import GPT, logits
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training.program import Program, gpt_config
from trialgpt_jax.training.start import load_params


@pytest.fixture(scope="module")
def workdir(store, tmp_path_factory):
    """The workdir of a trained run."""
    folder = tmp_path_factory.mktemp("infer")
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    flags = overrides(small_config(store))
    result = run("train", f"--config={folder}/default.py", *flags, f"--workdir={folder}/run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def infer(workdir, *arguments):
    return call("infer", f"--workdir={workdir}", *arguments)


def test_a_fault_of_the_disk_while_a_model_is_read(workdir, monkeypatch):
    # follows: run the same command again
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(workdir / "tokenizer.json"))

    with monkeypatch.context() as patch:
        patch.setattr("trialgpt_jax.language_model.load_params", broken)
        refused(
            infer(workdir, "--max_new_tokens=1"), "tokenizer.json: Input/output error", "run the same command again"
        )
    assert infer(workdir, "--max_new_tokens=1").returncode == 0


def test_evaluate_covers_every_window_once_and_agrees_with_numpy(workdir, store):
    """Loss and bits per byte against a float64 forward pass over the same windows."""
    result = run("evaluate", f"--workdir={workdir}", "--json")
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)

    config = load_snapshot(str(workdir))
    params, step = load_params(str(workdir), Program(config, mesh=single_device()).params_layout)
    assert got["step"] == step == 20
    split = open_store(str(store)).split("val")
    tokens = split.read(0, split.n_tokens)
    n = (len(tokens) - 1) // 32
    with jax.enable_x64(True):
        config.train.update({"dtype": "float64", "param_dtype": "float64"})
        gpt = gpt_config(config, "cpu")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        rows = np.stack([tokens[i * 32 : i * 32 + 33] for i in range(n)])
        out = np.asarray(logits(wide, gpt, GPT(gpt).apply({"params": wide}, rows[:, :-1])))
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, rows[:, 1:, None], -1).mean()
    assert got["tokens"] == n * 32
    np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(got["bits_per_byte"], loss * split.n_tokens / split.n_bytes / np.log(2), rtol=1e-5)
    part = json.loads(call("evaluate", f"--workdir={workdir}", "--json", "--batches=2").stdout)
    assert part["tokens"] == 2 * 8 * 32
    human = call("evaluate", f"--workdir={workdir}", "--config.eval.batches=1").stdout
    assert "loss" in human and "bits per byte" in human


def test_infer_prints_the_prompt_and_its_continuation_and_a_seed_reproduces_it(workdir):
    request = ("--prompt=The people", "--max_new_tokens=50", "--seed=3")  # more than the window's 32 tokens
    text = run("infer", f"--workdir={workdir}", *request)
    assert text.returncode == 0 and text.stdout.startswith("The people"), text.stderr
    one = infer(workdir, *request, "--json")
    result = json.loads(one.stdout)
    assert text.stdout == "The people" + result["samples"][0]["text"] + "\n"
    assert result["step"] == 20 and len(result["samples"][0]["tokens"]) == 50
    three = json.loads(infer(workdir, *request, "--num_samples=3", "--json").stdout)["samples"]
    assert three[0] == result["samples"][0] and three[0] != three[1] != three[2]


def test_prompt_from_a_file_and_checkpoint_by_step(workdir, tmp_path):
    (tmp_path / "prompt.txt").write_text("The people")
    options = ("--max_new_tokens=5", "--temperature=0", "--json")
    a = infer(workdir, f"--prompt=FILE:{tmp_path}/prompt.txt", "--checkpoint_step=20", *options)
    b = infer(workdir, "--prompt=The people", *options)
    assert json.loads(a.stdout) == json.loads(b.stdout)
    assert infer(workdir, "--max_new_tokens=5").returncode == 0  # no prompt: a new document


def test_wrong_requests_are_refused(workdir, tmp_path):
    # follows: leave it out to start a new document, or give some text
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(1 << 40)  # sparse
    for arguments, words in (
        (("--prompt=",), ("prompt", "empty")),
        (("--prompt=" + "word " * 100,), ("prompt", "block_size=32")),
        (("--prompt=" + "\udcff" * 100,), ("prompt", "block_size=32")),
        (("--prompt=FILE:",), ("--prompt='FILE:'",)),
        (("--prompt=FILE:a\0b",), ("--prompt='FILE:a\\x00b'", "cannot be read")),
        (("--prompt=FILE:" + "a" * 5000,), ("cannot be read: File name too long",)),
        ((f"--prompt=FILE:{tmp_path}",), ("cannot be read: Is a directory",)),
        ((f"--prompt=FILE:{tmp_path}/empty.txt",), ("prompt", "empty")),
        ((f"--prompt=FILE:{tmp_path}/huge.txt",), ("huge.txt", "more than 16 MiB")),
        ((f"--prompt=FILE:{tmp_path}/none.txt",), ("none.txt",)),
        ((f"--prompt=FILE:{tmp_path}/latin1.txt",), ("latin1.txt", "byte 3")),
        (("--temperature=-1",), ("temperature",)),
        (("--temperature=nan",), ("temperature",)),
        (("--top_k=-1",), ("top_k",)),
        (("--top_p=0",), ("top_p",)),
        (("--top_p=1.5",), ("top_p",)),
        (("--num_samples=0",), ("num_samples",)),
        (("--max_new_tokens=0",), ("max_new_tokens",)),
        (("--checkpoint_step=7",), ("no checkpoint of step 7",)),
    ):
        refused(infer(workdir, *arguments), *words)
    refused(infer(tmp_path), "config.json", "--workdir")
    assert infer(workdir, "--max_new_tokens=5", "--prompt=a\udcff\0b").stdout.startswith("a")
    refused(call("evaluate", f"--workdir={workdir}", "--config.data.dir=nowhere"), "nowhere", "preprocess")
