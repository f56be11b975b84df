"""The convert command: export to transformers, import, use of a converted workdir, verification of checkpoints."""

import json
import os
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, call, metrics, refused, run, small_config, tree
from safetensors.numpy import load_file, save_file

from trialgpt_jax import UserError, convert
from trialgpt_jax.config import load_snapshot
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.batches import eval_batches
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.evaluate import evaluate, format_result
from trialgpt_jax.generation.samples import Options
from trialgpt_jax.infer import infer, load
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.storage import lock
from trialgpt_jax.train import train
from trialgpt_jax.training import start
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.start import load_params, load_weights


@pytest.fixture(scope="module")
def world(store, tmp_path_factory):
    """A folder with a trained workdir `run`, its export `hf`, and the workdir `back` imported from the export."""
    root = tmp_path_factory.mktemp("convert")
    config = small_config(store)
    config.train.steps = 10
    config.eval.every_steps = 0
    assert train(config, str(root / "run")) == 0
    convert.to_hf(config, str(root / "run"), str(root / "hf"))
    convert.from_hf(config, str(root / "hf"), str(root / "back"))
    return root


def params_of(workdir, step=-1):
    program = Program(load_snapshot(str(workdir)), mesh=single_device())
    return load_params(str(workdir), program.params_layout, step)[0]


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for mine, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(mine, want)


@pytest.mark.slow
def test_transformers_evaluates_the_export_to_the_same_loss(world, store):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.GPT2LMHeadModel.from_pretrained(world / "hf", output_loading_info=True)
    assert not any(report.values()), report
    ours = evaluate(load_snapshot(str(world / "run")), str(world / "run"))
    total, count = 0.0, 0
    for rows, valid in eval_batches(open_store(str(store)).split("val"), block_size=32, batch_size=64):
        ids = torch.from_numpy(rows[valid].astype(np.int64))
        with torch.no_grad():
            logits = model.eval()(ids[:, :-1]).logits.double()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    assert count == ours["tokens"] > 10_000
    assert abs(total / count - ours["loss"]) < 1e-5


def test_transformers_generates_the_same_tokens_as_infer(world):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = load_snapshot(str(world / "run"))
    ours = infer(load(config, str(world / "run")), "The people", Options(12))["samples"][0]
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(world / "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(world / "hf")
    ids = tokenizer("The people", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0][ids["input_ids"].shape[1] :]
    assert isinstance(out, torch.Tensor) and out.tolist() == ours["tokens"]
    assert tokenizer.decode(out, clean_up_tokenization_spaces=False) == ours["text"]


def test_transformers_continues_prompts_of_two_lengths_in_a_batch(world):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "hf", padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "hf")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.generation_config, name) == 511, name
    prompts = ["The people of the United States", "We"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() != [batch["input_ids"].shape[1]] * 2
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for prompt, found in zip(prompts, together):
        ids = tokenizer(prompt, return_tensors="pt")
        assert found.tolist() == model.generate(**ids, max_new_tokens=8, do_sample=False)[0, -8:].tolist(), prompt


def test_penalty_stop_string_and_log_probabilities_are_those_of_transformers_on_the_exported_model(world):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(world / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(world / "hf")
    ours, prompt = load(load_snapshot(str(world / "run")), str(world / "run")), "The people"
    ids = tokenizer(prompt, return_tensors="pt")
    greedy = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.4, "pad_token_id": 0}
    extra = {"output_logits": True, "return_dict_in_generate": True}
    penalised = Options(20, sampling=Sampling(0.0, repetition_penalty=1.4), logprobs=True)
    (sample,) = infer(ours, prompt, penalised)["samples"]
    out = theirs.generate(**ids, **greedy, **extra)
    new = out.sequences[0][ids["input_ids"].shape[1] :]
    assert new.tolist() == sample["tokens"] != infer(ours, prompt, Options(20))["samples"][0]["tokens"]
    rows = torch.cat(out.logits).log_softmax(-1)
    np.testing.assert_allclose(sample["logprobs"], rows[torch.arange(20), new].numpy(), atol=1e-4)
    stop = sample["text"][7:10]
    ended = theirs.generate(**ids, **greedy, stop_strings=[stop], tokenizer=tokenizer)[0][ids["input_ids"].shape[1] :]
    text = tokenizer.decode(ended, clean_up_tokenization_spaces=False)
    (short,) = infer(ours, prompt, penalised._replace(stop=(stop,)))["samples"]
    assert short["text"] == text[: text.index(stop)] and short["tokens"] == ended.tolist()[: len(short["tokens"])]


def test_import_gives_identical_parameters_and_tokenizer(world):
    assert_equal(params_of(world / "back", 0), params_of(world / "run"))
    config = load_snapshot(str(world / "back"))
    assert (config.data.tokenizer, config.model.vocab_size, config.model.block_size) == ("bpe:512", 512, 32)
    names = "back", "run"
    identities = [json.loads((world / name / "tokenizer.json").read_text()) for name in names]
    assert identities[0] == identities[1]
    tokenizers = [tokenizer_lib.load("bpe:512", str(world / name)) for name in names]
    assert tokenizers[0].hash == tokenizers[1].hash


def test_infer_and_evaluate_use_the_converted_workdir(world):
    for result in (
        lambda name: evaluate(load_snapshot(str(world / name)), str(world / name), batches=2)["loss"],
        lambda name: infer(load(load_snapshot(str(world / name)), str(world / name)), "We", Options(5))["samples"],
    ):
        assert result("back") == result("run")


def test_an_older_step_can_be_exported(world, tmp_path):
    config = load_snapshot(str(world / "run"))
    assert convert.to_hf(config, str(world / "run"), str(tmp_path / "hf"), step=5) == 5
    convert.from_hf(config, str(tmp_path / "hf"), str(tmp_path / "back"))
    assert_equal(params_of(tmp_path / "back"), params_of(world / "run", 5))
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 5, 10"):
        convert.to_hf(config, str(world / "run"), str(tmp_path / "other"), step=7)


@pytest.mark.parametrize("n_ids", [101, 300])
def test_a_model_without_a_tokenizer_is_imported_and_says_so(tmp_path, capsys, n_ids):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": n_ids, "n_positions": 12, "n_embd": 24, "n_layer": 1, "n_head": 3}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(tmp_path / "hf")
    config = convert.from_hf(small_config("nowhere"), str(tmp_path / "hf"), str(tmp_path / "run"))
    assert config.data.tokenizer == {101: "gpt2", 300: "bpe:300"}[n_ids]
    identity = json.loads((tmp_path / "run/tokenizer.json").read_text())  # decided at import, and compared always
    assert identity["name"] == config.data.tokenizer
    captured = capsys.readouterr()
    assert "has no tokenizer" in captured.out + captured.err
    params = params_of(tmp_path / "run")
    assert params["wte"]["embedding"].shape == (-(-n_ids // 128) * 128, 24)
    assert not np.any(params["wte"]["embedding"][n_ids:]) and np.any(params["wte"]["embedding"][n_ids - 1])
    assert params["wpe"]["embedding"].shape == (12, 24)


def test_a_workdir_in_which_no_checkpoint_can_be_saved_is_refused(world, tmp_path):
    workdir = tmp_path / "lr=[1e-3]"
    with pytest.raises(UserError, match=r"checkpoints cannot be saved below a path with \[ \]"):
        convert.from_hf(load_snapshot(str(world / "run")), str(world / "hf"), str(workdir))
    assert not workdir.exists()


def test_nothing_is_overwritten(world, tmp_path):
    config = load_snapshot(str(world / "run"))
    with pytest.raises(UserError, match="--to_hf=.* already holds .*; name a new or an empty folder"):
        convert.to_hf(config, str(world / "run"), str(world / "hf"))
    with pytest.raises(UserError, match="--workdir=.* already holds"):
        convert.from_hf(config, str(world / "hf"), str(world / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--to_hf=.*file.* cannot be written"):
        convert.to_hf(config, str(world / "run"), str(tmp_path / "file" / "out"))


def test_weights_that_are_not_finite_are_refused_by_name_in_both_directions(world, tmp_path):
    """Unless --allow_nonfinite is given; it changes nothing else."""
    config = load_snapshot(str(world / "run"))
    params = jax.tree.map(np.array, params_of(world / "run"))
    for path, index, value in (
        ("wte", (3, 1), np.nan),
        ("wpe", (0, 0), np.inf),
        ("wpe", (5, 1), -np.inf),
    ):
        params[path]["embedding"][index] = value
    params["ln_f"]["bias"][2] = params["blocks"]["mlp"]["c_fc"]["kernel"][1, 2, 3] = np.nan
    shutil.copytree(world / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    checkpoints = Checkpoints(str(tmp_path / "run"))
    checkpoints.save(10, {"params": jax.tree.map(jnp.asarray, params)}, allow_nonfinite=True)
    checkpoints.wait()

    # follows: --allow_nonfinite converts them anyway
    names = r"blocks/mlp/c_fc/kernel \(1\), ln_f/bias \(1\), wpe/embedding \(2\) and 1 more arrays; --allow_nonfinite"
    with pytest.raises(UserError, match=f"checkpoint 10 of .*run has 5 values that are not finite, in {names}"):
        convert.to_hf(config, str(tmp_path / "run"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
    assert convert.to_hf(config, str(tmp_path / "run"), str(tmp_path / "hf"), allow_nonfinite=True) == 10

    with pytest.raises(
        UserError, match=r"hf has 5 values that are not finite, in transformer\..* and 1 more arrays; --"
    ):
        convert.from_hf(config, str(tmp_path / "hf"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    convert.main(["", f"--from_hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'back'}", "--allow_nonfinite"])
    layout = Program(load_snapshot(str(tmp_path / "back")), mesh=single_device()).params_layout
    assert_equal(load_params(str(tmp_path / "back"), layout, allow_nonfinite=True)[0], params)

    # nor does anything compute with them
    for workdir in (tmp_path / "run", tmp_path / "back"):
        with pytest.raises(UserError, match="checkpoint .* has 5 values that are not finite"):
            load(config, str(workdir))
        with pytest.raises(UserError, match="checkpoint .* has 5 values that are not finite"):
            evaluate(config, str(workdir), batches=1)
    program = Program(config, mesh=single_device())
    for source in (tmp_path / "run", tmp_path / "hf"):
        with pytest.raises(UserError, match=f"{source}.* has 5 values that are not finite, in blocks/mlp/c_fc/kernel"):
            load_weights(str(source), program.gpt, program.mesh)


def test_a_loss_that_is_not_finite_is_null():
    result = {"step": 5, "split": "val", "loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 1000}
    assert format_result(result) == "checkpoint 5, val split, 1,000 tokens: the loss is not finite"


@pytest.mark.parametrize(("loss", "expected"), [(np.nan, (None, None)), (np.inf, (None, None)), (800.0, (800.0, None))])
def test_evaluate_gives_no_number_that_json_lacks(world, monkeypatch, loss, expected):
    """800 nats per token is finite; the perplexity is not."""
    monkeypatch.setattr(Program, "evaluate", lambda *_: (loss, 100))
    result = evaluate(load_snapshot(str(world / "run")), str(world / "run"), batches=1)
    assert (result["loss"], result["perplexity"]) == expected
    json.dumps(result, allow_nan=False)
    assert "loss" in format_result(result)


def test_a_refused_export_leaves_no_folder(world, tmp_path):
    config = load_snapshot(str(world / "run"))
    config.model.position = "rope"
    with pytest.raises(UserError, match="model.position=rope"):
        convert.to_hf(config, str(world / "run"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_verify_names_the_damaged_checkpoint(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    assert [step for step, problem in convert.verify(str(tmp_path / "run")) if problem is None] == [5, 10]
    victim = max((tmp_path / "run/checkpoints/5").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (step, problem), (_, none) = convert.verify(str(tmp_path / "run"))
    assert step == 5 and victim.name in problem and "checksum" in problem and none is None
    result = run("convert", "--verify", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[1] == "checkpoint 10: whole"
    assert result.stdout.startswith("checkpoint 5: damaged: ")
    with pytest.raises(UserError, match="has no checkpoints"):
        convert.verify(str(tmp_path))


def test_verify_leaves_out_a_checkpoint_that_a_run_removes_meanwhile(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(world / "run", workdir)
    steps = [step for step, _ in convert.verify(str(workdir))]
    problem = Checkpoints.problem

    def vanishing(self, step):
        if step == steps[0]:
            shutil.rmtree(workdir / "checkpoints" / str(step))
        return problem(self, step)

    monkeypatch.setattr(Checkpoints, "problem", vanishing)
    assert convert.verify(str(workdir)) == [(step, None) for step in steps[1:]]


def test_the_command_line(world, store, tmp_path):
    result = run("convert", f"--workdir={world / 'run'}", f"--to_hf={tmp_path / 'hf'}", "--step=5")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    finetune = [f"--config={ROOT / 'configs/finetune.py'}", f"--config.data.dir={store}"]
    result = run("convert", f"--from_hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}", *finetune)
    assert result.returncode == 0, result.stderr
    config = load_snapshot(str(tmp_path / "run"))
    assert config.data.dir == str(store) and config.model.n_embd == 32 and config.model.block_size == 32
    assert_equal(params_of(tmp_path / "run"), params_of(world / "run", 5))


def test_mistakes_on_the_command_line(world):
    refused(run("convert", f"--workdir={world / 'run'}"), "give one of --to_hf=FOLDER, --from_hf=FOLDER and --verify")
    argv = ["convert", f"--workdir={world / 'run'}", "--to_hf=x", "--step=5", "--checkpoint_step=10"]
    with pytest.raises(UserError, match="--step=5 and --checkpoint_step=10 name two checkpoints"):
        convert.main(argv)
    with pytest.raises(UserError, match="--workdir=FOLDER is missing"):
        convert.main(["convert", "--from_hf=x"])


def test_train_starts_from_a_converted_workdir_with_any_hyperparameters(world, store, tmp_path, capsys):
    config = load_snapshot(str(world / "run"))
    convert.from_hf(config, str(world / "hf"), str(tmp_path / "run"))
    config.optim.update({"schedule": "constant", "learning_rate": 1e-3, "warmup_steps": 0})
    config.train.update({"steps": 4, "batch_size": 4})
    config.eval.every_steps = 4
    config.checkpoint.every_steps = 2
    wrong = config.copy_and_resolve_references()
    wrong.model.n_layer = 3
    with pytest.raises(UserError, match="`model.n_layer` is 3, but this workdir's run was started with 2"):
        train(wrong, str(tmp_path / "run"))
    assert train(config, str(tmp_path / "run")) == 0
    captured = capsys.readouterr()
    assert "starting from the weights of checkpoint 0" in captured.out + captured.err
    lines = metrics(tmp_path / "run")
    before = evaluate(config, str(world / "run"), batches=config.eval.batches)["loss"]
    assert lines[0]["step"] == 0 and abs(lines[0]["val_loss"] - before) < 1e-6
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    # now it is an ordinary run: it resumes, and its config is fixed
    config.optim.learning_rate = 2e-3
    with pytest.raises(UserError, match="optim.learning_rate"):
        train(config, str(tmp_path / "run"))


def test_a_new_folder_is_held_while_it_is_filled_and_what_a_kill_left_there_is_no_content(tmp_path):
    folder = tmp_path / "new"
    for keep_lock, left in ((True, ["lock"]), (False, [])):
        with convert._new_folder(str(folder), "--to_hf", keep_lock):
            assert os.listdir(folder) == ["lock"]
            for make in (convert._new_folder, lambda folder, flag: lock.hold(folder, flag=flag)):
                with pytest.raises(UserError, match=f"--to_hf={folder} is in use by host .*, pid {os.getpid()};"):
                    make(str(folder), "--to_hf").__enter__()
        assert os.listdir(folder) == left
        (folder / "model.safetensors.0123456789abcdef.part").touch()
    (folder / "config.json").touch()
    before = tree(folder)
    with pytest.raises(UserError, match=f"--to_hf={folder} already holds config.json"):
        convert._new_folder(str(folder), "--to_hf").__enter__()
    assert tree(folder) == before


# ---- mistakes, as whole commands

BOTH = "give one of --to_hf=FOLDER, --from_hf=FOLDER and --verify"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--from_hf={run} --workdir={new}", ["run is a workdir of trialgpt_jax, not a Hugging Face folder"]),
        ("--from_hf={store} --workdir={new}", ["has no config.json (it is a token store)"]),
        ("--from_hf={file} --workdir={new}", ["is not a folder; it must hold config.json and model.safetensors"]),
        ("--from_hf={new} --workdir={new}", ["new: there is no such folder"]),
        ("--from_hf=gs://bucket/model --workdir={new}", ["gs://bucket/model is not a folder"]),
        ("--from_hf={hf} --workdir={run}", ["--workdir=", "already holds", "name a new or an empty folder"]),
        ("--from_hf={hf} --workdir={file}", ["file is a file, not a folder"]),
        ("--from_hf={hf} --workdir={new} --step=5", ["--step and --checkpoint_step choose a checkpoint for --to_hf"]),
        (
            "--from_hf={hf} --workdir={new} --config.model.n_layer=2",
            ["config field `model.n_layer` comes from the folder of"],
        ),
        ("--from_hf={hf} --workdir={new} --config.data.tokenizer=from:{other}", ["has tokenizer bpe:512", "is gpt2"]),
        ("--to_hf={file} --workdir={run}", ["file is a file; name a new or an empty folder"]),
        ("--to_hf={run} --workdir={run}", ["already holds", "name a new or an empty folder"]),
        ("--to_hf=gs://bucket/model --workdir={run}", ["--to_hf=gs://bucket/model is not a folder on this machine"]),
        ("--to_hf=hf:owner/model --workdir={run}", ["--to_hf=hf:owner/model is not a folder on this machine"]),
        ("--to_hf={new} --from_hf={hf} --workdir={new}", [BOTH]),
        ("--to_hf={new} --verify --workdir={run}", [BOTH]),
        ("--to_hf={new} --workdir={run} --step=7", ["no checkpoint of step 7; it has 5, 10"]),
        ("--to_hf={new} --workdir={run} --step=-5", ["--step=-5 is neither a step, nor -1 (the newest), nor best"]),
        ("--to_hf={new} --workdir={new}", ["config.json does not exist; --workdir must be a folder that"]),
        ("--to_hf={new} --workdir={hf}", ["is a Hugging Face folder, not a workdir"]),
        ("--verify --workdir={new}", ["config.json does not exist; --workdir must be a folder that"]),
        ("--verify --workdir={hf}", ["is a Hugging Face folder, not a workdir"]),
        ("--verify --workdir={run} --step=5", ["--step and --checkpoint_step choose a checkpoint for --to_hf"]),
    ],
)
def test_mistakes_as_whole_commands(world, store, tmp_path, arguments, words):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    shutil.copy(world / "run/config.json", tmp_path / "other/config.json")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps({"name": "gpt2", "hash": None}))
    names = {"run": world / "run", "hf": world / "hf", "store": store, "new": tmp_path / "new"}
    names |= {"file": tmp_path / "file", "other": tmp_path / "other"}
    before = tree(world)
    refused(call("convert", *arguments.format(**names).split()), *words)
    assert tree(world) == before and not (tmp_path / "new").exists()


def test_a_hugging_face_folder_given_as_workdir_is_converted_as_the_message_says(world, tmp_path, monkeypatch):
    # follows: is a Hugging Face folder, not a workdir; make a workdir of it
    monkeypatch.chdir(tmp_path)
    result = call("infer", f"--workdir={world / 'hf'}", "--prompt=We")
    refused(result, "is a Hugging Face folder, not a workdir")
    proposed = shlex.split(re.search(r"trialgpt convert (.*)", result.stderr)[1])
    assert call("convert", *proposed).returncode == 0
    assert_equal(params_of(tmp_path / "NEW_FOLDER"), params_of(world / "run"))


def test_one_of_the_three_flags_is_given_as_the_message_says(world, tmp_path):
    # follows: give one of --to_hf=FOLDER, --from_hf=FOLDER and --verify
    refused(call("convert", f"--workdir={world / 'run'}"), BOTH)
    for flag, workdir in ((f"--to_hf={tmp_path / 'a'}", world / "run"), ("--verify", world / "run")):
        assert call("convert", flag, f"--workdir={workdir}").returncode == 0
    assert call("convert", f"--from_hf={world / 'hf'}", f"--workdir={tmp_path / 'b'}").returncode == 0


def test_a_new_folder_is_used_as_the_message_says(world, tmp_path):
    refused(call("convert", f"--to_hf={world / 'hf'}", f"--workdir={world / 'run'}"), "name a new or an empty folder")
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert call("convert", f"--to_hf={tmp_path / name}", f"--workdir={world / 'run'}").returncode == 0


def test_weights_that_are_not_finite_are_converted_as_the_message_says(world, tmp_path):
    shutil.copytree(world / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.ln_f.bias"][0] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    command = f"--from_hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'new'}"
    refused(call("convert", *command), "has 1 values that are not finite", "; --allow_nonfinite converts them anyway")
    assert call("convert", *command, "--allow_nonfinite").returncode == 0


def test_evaluate_without_data_says_what_to_give(world, store, tmp_path, monkeypatch):
    # follows: does not exist; make a token store with this model's tokenizer
    monkeypatch.chdir(tmp_path)
    assert call("convert", f"--from_hf={world / 'hf'}", "--workdir=imported").returncode == 0
    result = call("evaluate", "--workdir=imported")
    refused(result, "data.dir=data/openwebtext does not exist", "--config.data.tokenizer=from:imported")
    refused(
        call("evaluate", "--workdir=imported", "--config.data.dir=nowhere"), "data.dir=nowhere does not exist; make"
    )
    shutil.copytree(store.parent / "texts", "TEXTS")
    preprocess = shlex.split(re.search(r"trialgpt preprocess (.*?STORE)\.", result.stderr)[1])
    made = call("preprocess", *preprocess)
    assert made.returncode == 0, made.stderr
    proposed = re.search(r"Then add (--config\S+) to this command, and .*(--split=train)", result.stderr).groups()
    found = call("evaluate", "--workdir=imported", "--batches=1", "--config.train.batch_size=8", *proposed)
    assert found.returncode == 0 and "train split" in found.stdout, found.stderr


def test_a_store_of_another_tokenizer_is_refused_after_an_import_without_one(world, store, tmp_path):
    """An import without tokenizer files has the identity that follows from its number of ids."""
    shutil.copytree(world / "hf", tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.wte.weight"] = np.zeros((50257, 32), np.float32)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 50257}))
    result = call("convert", f"--from_hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0 and "its 50257 ids are taken for those of gpt2" in result.stderr
    result = call("evaluate", f"--workdir={tmp_path / 'run'}", f"--config.data.dir={store}")
    refused(result, "was made with tokenizer bpe:512", "was trained with gpt2")


def test_parameters_beyond_the_memory_of_the_machine_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(start.accelerators, "memory_bytes", lambda device: 1000)
    result = call("convert", f"--from_hf={world / 'hf'}", f"--workdir={tmp_path / 'new'}")
    refused(result, "the parameters take 0.0 GiB, but the CPU of this machine has 0.0 GiB of memory")
    assert not (tmp_path / "new").exists()


def test_a_model_with_added_tokens_is_imported_with_them(world, tmp_path):
    """As a fine-tuned GPT-2 with resized embeddings."""
    pytest.importorskip("tokenizers")
    shutil.copytree(world / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    old = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = np.concatenate([old, np.ones((2, 32), np.float32)])
    save_file(tensors, tmp_path / "hf/model.safetensors")
    for name, changes in (
        ("config.json", lambda value: value.update(vocab_size=514)),
        ("tokenizer.json", lambda value: value["added_tokens"].extend(added("<|user|>", 512) + added("<|pad|>", 513))),
    ):
        value = json.loads((tmp_path / "hf" / name).read_text())
        changes(value)
        (tmp_path / "hf" / name).write_text(json.dumps(value))
    config = convert.from_hf(small_config("nowhere"), str(tmp_path / "hf"), str(tmp_path / "run"))
    assert config.model.vocab_size == 514 and config.data.tokenizer.startswith("hf:")
    tokenizer = tokenizer_lib.from_workdir(str(tmp_path / "run"), config.data.tokenizer)
    assert tokenizer.decode([512]) == "<|user|>"
    assert np.all(params_of(tmp_path / "run")["wte"]["embedding"][512:514] == 1)


def added(content, i):
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": content, "special": True} | off]
