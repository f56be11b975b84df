"""The commands evaluate and infer: their output, reproducible samples, and the requests that they refuse."""

import errno
import json
import os
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import call, command, overrides, refused, run, small_config

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
        (("--strict", "--prompt=" + "word " * 100), ("prompt", "block_size=32")),
        (("--strict", "--prompt=" + "\udcff" * 100), ("prompt", "block_size=32")),
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


PROMPTS = ["The people", "", "Fellow-citizens of the Senate", "a", "We " * 40]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def test_many_prompts_give_the_lines_of_each_alone_in_their_order_on_stdout_or_in_a_file(workdir, prompts, tmp_path):
    options = ("--max_new_tokens=40", "--temperature=0", "--logprobs")
    result = infer(workdir, f"--prompts={prompts}", *options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert "1 of 5 prompts have up to" in result.stderr and "the last 32 are used" in result.stderr
    for prompt, line in list(zip(PROMPTS, lines))[::2]:
        alone = json.loads(infer(workdir, *(["--prompt", prompt] * bool(prompt)), *options, "--json").stdout)["samples"]
        assert [line["samples"][0][key] for key in ("text", "tokens")] == [alone[0][key] for key in ("text", "tokens")]
        np.testing.assert_allclose(line["samples"][0]["logprobs"], alone[0]["logprobs"], atol=1e-4)
    into = ("--out", tmp_path / "out.jsonl")
    silent = infer(workdir, f"--prompts={prompts}", *into, *options)
    assert silent.stdout == "" and (tmp_path / "out.jsonl").read_text() == result.stdout
    # follows: choose another --out or remove the file
    refused(infer(workdir, f"--prompts={prompts}", *into, "--temperature=0"), "max_new_tokens=40", "has 200")
    other = infer(workdir, f"--prompts={prompts}", *into, *options, "--config.model.logit_softcap=3.0")
    refused(other, "config.model.logit_softcap=0.0", "has 3.0")
    refused(infer(workdir, f"--prompts={prompts}", "--strict", *options), "1 of 5 prompts have up to")


def test_the_last_prompt_of_a_file_is_refused_before_the_first_one_is_continued(workdir, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [*["We"] * 20, "We " * 40]))
    refused(infer(workdir, f"--prompts={path}", "--batch_size=1", "--strict"), "1 of 21 prompts have up to")
    for empty in ("--prompts=", "--out="):
        refused(infer(workdir, empty, "--max_new_tokens=1"), f"{empty[:-1]} is empty")


def test_a_prompt_longer_than_the_context_is_cropped_to_its_end_with_a_word(workdir):
    long = infer(workdir, "--prompt=" + "The people " * 40, "--max_new_tokens=5", "--temperature=0", "--json")
    assert "more than model.block_size=32: the last 32 are used" in long.stderr
    assert len(json.loads(long.stdout)["samples"][0]["tokens"]) == 5


def test_a_stop_string_ends_the_text_and_is_not_printed(workdir):
    request = ("--prompt=The people", "--max_new_tokens=40", "--temperature=0")
    whole = infer(workdir, *request).stdout.removeprefix("The people").rstrip("\n")
    stop = whole[8:11]
    short = infer(workdir, *request, "--stop=never", f"--stop={stop}").stdout
    assert short == "The people" + whole[: whole.index(stop)] + "\n"


def test_ctrl_c_stops_the_text_of_an_interactive_prompt_and_not_the_program(workdir, monkeypatch):
    from trialgpt_jax.generation.samples import GrowingText

    answers, push, count = iter(["The people", "a" * 3, "We"]), GrowingText.push, 0

    def answer(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count == 4:  # in the text of the second prompt: each has three pieces
            raise KeyboardInterrupt
        push(self, *arguments)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(GrowingText, "push", interrupted)
    result = infer(workdir, "--interactive", "--max_new_tokens=20", "--temperature=0", "--stop=\0")
    assert result.returncode == 0, result.stderr
    first, _, last = result.stdout.partition("\nWe")
    assert first.startswith("The people") and len(last) > 10, result.stdout


def test_flags_that_exclude_each_other_are_refused_before_anything_is_printed(workdir, prompts):
    for arguments, words in (
        (("--prompt=a", f"--prompts={prompts}"), ("--prompt and --prompts exclude each other",)),
        (("--interactive", f"--prompts={prompts}"), ("--prompts and --interactive exclude each other",)),
        (("--out=x",), ("--out is of the lines of --prompts",)),
        (("--json", "--interactive"), ("--json and --interactive exclude each other",)),
        (("--logprobs",), ("--logprobs is only for --json and --prompts",)),
        (("--prompts=nowhere.jsonl",), ("--prompts='nowhere.jsonl' cannot be read: No such file",)),
        (("--weights=int4",), ("weights is 'int4', not one of auto, bfloat16, int8",)),
        (("--min_p=2",), ("min_p is 2.0, outside [0, 1]",)),
        (("--repetition_penalty=0",), ("repetition_penalty is 0.0",)),
        (("--batch_size=0",), ("batch_size is 0",)),
        (("--num_samples=2", "--max_new_tokens=0"), ("max_new_tokens is 0",)),
    ):
        result = infer(workdir, *arguments)
        refused(result, *words)
        assert result.stdout == ""


@pytest.mark.parametrize("weights", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_fewer_bytes_cost_less_than_half_a_percent_of_bits_per_byte(workdir, weights):
    """Over text that the model was not trained on; decoding with them runs."""
    from trialgpt_jax.language_model import LanguageModel

    config = load_snapshot(str(workdir))
    text = open_store(config.data.dir).split("val").read(0, 1500).tolist()
    whole, rounded = (
        LanguageModel.load(str(workdir), config=config, mesh=single_device(), weights=each).rolling([text])[0]
        for each in ("auto", weights)
    )
    assert whole != rounded and abs(rounded / whole - 1) < 0.005, rounded / whole - 1
    assert infer(workdir, f"--weights={weights}", "--max_new_tokens=3").returncode == 0


@pytest.mark.slow
def test_a_process_killed_between_blocks_is_continued_to_the_same_bytes(workdir, tmp_path):
    lines = "".join(json.dumps({"prompt": f"The people {'of ' * (i % 9)}{i}"}) + "\n" for i in range(64))
    (tmp_path / "prompts.jsonl").write_text(lines)
    arguments = (f"--workdir={workdir}", f"--prompts={tmp_path}/prompts.jsonl", "--max_new_tokens=30", "--batch_size=2")
    assert run("infer", *arguments, f"--out={tmp_path}/whole.jsonl").returncode == 0
    argv, env = command("infer", *arguments, f"--out={tmp_path}/killed.jsonl")
    process = subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL)
    killed, started = tmp_path / "killed.jsonl", time.monotonic()
    while not (killed.exists() and killed.read_bytes()) and time.monotonic() < started + 120:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < killed.read_bytes().count(b"\n") < 64
    assert run("infer", *arguments, f"--out={killed}").returncode == 0
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
