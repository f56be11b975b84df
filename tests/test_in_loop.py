"""Tasks and samples during training: their lines, exact resume, stop requests, and refusals before compilation."""

import json
import os
import pathlib
import random
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import task_files
from conftest import overrides, programs_compiled_once, small_config, train_step_compiled_once, tree
from test_distributed import job
from test_train import assert_same_bits, final_state

from trialgpt_jax import UserError, cli, config_file
from trialgpt_jax import config as config_lib
from trialgpt_jax.config import default_config
from trialgpt_jax.evaluation import suite
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.train import train
from trialgpt_jax.training import metric_lines
from trialgpt_jax.training import metrics as metrics_lib
from trialgpt_jax.training.metrics import MetricsLog
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.reporter import Reporter
from trialgpt_jax.training.stop import StopRequest
from trialgpt_jax.training.workdir import save_snapshot

PROMPTS = ("The people", "Congress, has | a pipe\nand a line")
CLOCKS = {"seconds", "tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def config(store, tmp_path_factory):
    """Saves at 4, 8 and 12, tasks at 0, 4, 8 and 12, samples at 0, 6 and 12."""
    path = tmp_path_factory.mktemp("tasks") / "hellaswag.jsonl"
    task_files.write(path, task_files.rows("hellaswag", 12))
    c = small_config(store)
    c.model.dropout = 0.1
    c.train.steps = 12
    c.checkpoint.update({"every_steps": 4, "keep_last": 3})
    c.eval.update({"every_steps": 0, "tasks": "hellaswag_llmc:10", "tasks_every_steps": 4})
    c.eval.update({"task_data": f"hellaswag_llmc={path}"})
    c.eval.update({"sample_prompts": PROMPTS, "sample_every_steps": 6, "sample_tokens": 8})
    return c.lock()


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every run has the same model, so that one compilation of each program serves all."""
    first, real = [], Program.init_state

    def init_state(program):
        first[:] = first or [jax.device_get(real(program))]
        return jax.device_put(first[0], jax.tree.map(lambda leaf: leaf.sharding, program.layout))

    with programs_compiled_once(), train_step_compiled_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "init_state", init_state)
        yield


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    with_log = config.copy_and_resolve_references()
    with_log.log.tensorboard = True
    assert train(with_log, str(workdir)) == 0
    return workdir


def lines(workdir):
    """The lines of metrics.jsonl without clocks."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in text.splitlines()]


def assert_same_run(workdir, reference):
    assert lines(workdir) == lines(reference)
    assert (workdir / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    assert_same_bits(final_state(workdir), final_state(reference))


def task_lines(workdir):
    return [line for line in lines(workdir) if metric_lines.has_tasks(line)]


def samples(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def test_the_lines_of_tasks_and_samples_are_those_of_the_checkpoints(reference, config):
    assert [line["step"] for line in task_lines(reference)] == [0, 4, 8, 12]
    assert [(line["step"], line["index"]) for line in samples(reference)] == [
        (s, i) for s in (0, 6, 12) for i in (0, 1)
    ]
    assert tuple(line["prompt"] for line in samples(reference)[:2]) == PROMPTS
    seconds = [json.loads(line)["seconds"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[-1] == seconds[-2]  # of step 12: evaluation is no training time
    (task,) = suite.load(suite.parse(config.eval.tasks), task_data=suite.parse_task_data(config.eval.task_data))
    for step in (4, 12):
        model = LanguageModel.load(str(reference), step)
        line = next(line for line in task_lines(reference) if line["step"] == step)
        (result,) = task.run(model).values()
        assert line == {"step": step, "tokens": step * 8 * 32} | {
            f"task/hellaswag_llmc/{name}": value for name, value in result.metrics.items()
        }
        assert 0 <= line["task/hellaswag_llmc/acc_norm"] <= 1
    texts = model.generate(PROMPTS, max_new_tokens=8, sampling=Sampling(0.8), seed=config.seed)
    assert texts == [line["text"] for line in samples(reference) if line["step"] == 12] and all(texts)


def test_tensorboard_shows_scores_as_curves_and_samples_as_texts(reference):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `test`")
    read = accumulator.EventAccumulator(str(reference / "tensorboard")).Reload()
    points = {point.step: point.value for point in read.Scalars("task/hellaswag_llmc/acc_norm")}
    expected = {line["step"]: line["task/hellaswag_llmc/acc_norm"] for line in task_lines(reference)}
    assert points == pytest.approx(expected)
    assert read.PluginTagToContent("text").keys() == {"sample/0", "sample/1"}
    for i, prompt in enumerate(PROMPTS):
        shown = {e.step: e.tensor_proto.string_val[0].decode() for e in read.Tensors(f"sample/{i}")}
        written = {line["step"]: line["prompt"] + line["text"] for line in samples(reference) if line["index"] == i}
        assert shown == written and all(text.startswith(prompt) for text in shown.values())


def test_training_is_the_same_without_tasks_whatever_they_do_to_the_random_numbers(
    reference, config, tmp_path, monkeypatch, capsys
):
    """lm-eval seeds the process-wide generators."""

    def load(*args, real=suite.load, **options):
        random.seed(1)
        return [t._replace(run=lambda m, run=t.run: np.random.seed(1234) or run(m)) for t in real(*args, **options)]

    monkeypatch.setattr(suite, "load", load)
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist()
    c = config.copy_and_resolve_references()
    c.eval.sample_prompts = ()
    assert train(c, str(tmp_path / "tasks")) == 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    c.eval.tasks = ""
    assert train(c, str(tmp_path / "none")) == 0
    assert "warning: eval.tasks_every_steps has no effect, because eval.tasks is empty" in capsys.readouterr().err
    assert not (tmp_path / "none" / "samples.jsonl").exists()
    assert lines(tmp_path / "none") == [line for line in lines(reference) if not metric_lines.has_tasks(line)]
    assert lines(tmp_path / "tasks") == lines(reference)
    assert_same_bits(final_state(tmp_path / "none"), final_state(reference))


# ---- killed and stopped


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch, step, moment):
    """Makes the run end at `step`, before or after the line of the tasks or the samples is written."""
    kind, when = moment.split()[1], moment.split()[0]
    real = getattr(Reporter, kind)

    def fatal(self, at, *args):
        if at != step or when != "before":
            real(self, at, *args)
        if at == step:
            raise Killed

    monkeypatch.setattr(Reporter, kind, fatal)


@pytest.mark.parametrize(
    ("step", "moment", "resumes"),
    [
        (0, "before tasks", None),
        (4, "before tasks", 4),  # during an evaluation after a save: only the evaluation is done again
        (6, "after samples", 4),  # not saved: the line is dropped
        (8, "after tasks", 8),
        (12, "before samples", 12),
    ],
)
def test_a_run_that_is_killed_while_it_evaluates_ends_with_the_same_files(
    reference, config, tmp_path, monkeypatch, capsys, step, moment, resumes
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, step, moment)
        with pytest.raises(Killed):
            train(config, str(workdir))
    assert lines(workdir) != lines(reference) or step == 12
    assert train(config, str(workdir)) == 0
    said = capsys.readouterr().err
    assert (f"resumed from checkpoint {resumes}\n" in said) == (resumes is not None), said
    assert_same_run(workdir, reference)


def test_a_line_that_was_cut_in_the_middle_is_written_again(reference, config, tmp_path):
    """As after a loss of power: the lines of the restored step itself are not durable, those before are."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (workdir / name).read_bytes()
        (workdir / name).write_bytes(text[:-20])
    assert [line["index"] for line in samples_of(workdir, 12)] == [0]  # of two
    assert train(config, str(workdir)) == 0
    assert_same_run(workdir, reference)


def samples_of(workdir, step):
    *whole, _ = (workdir / "samples.jsonl").read_text().split("\n")
    return [line for line in map(json.loads, whole) if line["step"] == step]


def fake_tasks(monkeypatch, on_run):
    """Two tasks; `on_run` is called with the number of the task and the step of the model. Returns the list of what has
    run to its end."""
    finished = []

    def task(number):
        def run(model):
            on_run(number, model.step)
            scores = model.score_tokens([([1], [2, 3])])
            finished.append((number, model.step))
            return {f"task{number}": Result({"score": scores[0].log_prob, "bad": float("nan")}, 1)}

        return Task(f"task{number}", "fake", "", "", 0, run)

    monkeypatch.setattr(suite, "load", lambda specs, **_: [task(0), task(1)])
    return finished


@pytest.fixture(scope="module")
def two_tasks(config, tmp_path_factory):
    """A config with the fake tasks, and the workdir of an uninterrupted run."""
    c, workdir = config.copy_and_resolve_references(), tmp_path_factory.mktemp("two_tasks") / "run"
    c.eval.update({"sample_prompts": (), "tasks_every_steps": 2, "tasks": "hellaswag_llmc", "task_data": ""})
    with pytest.MonkeyPatch.context() as patch:
        fake_tasks(patch, lambda number, step: None)
        assert train(c, str(workdir)) == 0
    return c, workdir


@pytest.mark.parametrize(("step", "saved"), [(0, None), (6, 6), (12, 12)])
def test_a_stop_request_during_an_evaluation_is_honoured_within_it_and_the_run_continues_exactly(
    two_tasks, tmp_path, monkeypatch, capsys, step, saved
):
    # follows: stopped {}; run the same command to continue
    (c, whole), workdir, ran = two_tasks, tmp_path / "run", []

    def terminate(number, at):
        ran.append((number, at))
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    finished = fake_tasks(monkeypatch, terminate)
    assert train(c, str(workdir)) == 75
    assert ran[-1] == (0, step) and (0, step) not in finished  # the batch after the signal ended the first task
    assert step not in [line["step"] for line in task_lines(workdir)]
    said = capsys.readouterr().err
    where = f"after step {step}, which is saved" if saved else "before step 1"
    assert f"stopped {where}; run the same command to continue\n" in said, said
    fake_tasks(monkeypatch, lambda number, at: None)
    assert train(c, str(workdir)) == 0
    assert (f"resumed from checkpoint {saved}\n" in capsys.readouterr().err) == (saved is not None)
    assert lines(workdir) == lines(whole)
    assert [line["step"] for line in task_lines(workdir)] == [0, 2, 4, 6, 8, 10, 12]
    assert task_lines(workdir)[-1]["task/task1/bad"] is None and task_lines(workdir)[-1]["task/task0/score"] < 0


def test_a_time_limit_holds_during_an_evaluation_too(config, tmp_path, monkeypatch):
    c = config.copy_and_resolve_references()
    c.eval.update({"sample_prompts": (), "tasks": "hellaswag_llmc", "task_data": ""})
    c.train.max_seconds = 30.0
    fake_tasks(
        monkeypatch, lambda number, step: step == 4 and monkeypatch.setattr(StopRequest, "_late", lambda _: True)
    )
    assert train(c, str(tmp_path / "run")) == 75
    assert lines(tmp_path / "run")[-1]["step"] == 4 and [line["step"] for line in task_lines(tmp_path / "run")] == [0]


def test_a_finished_run_is_evaluated_when_tasks_are_added_and_only_once(reference, config, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "samples.jsonl").unlink()
    kept = [line for line in lines(reference) if not metric_lines.has_tasks(line)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line | {"seconds": 1.0}) + "\n" for line in kept))
    assert train(config, str(workdir)) == 0
    assert lines(workdir) == kept + task_lines(reference)[-1:]
    assert samples(workdir) == samples(reference)[-2:]
    before = tree(workdir)
    assert train(config, str(workdir)) == 0
    assert "nothing to do" in capsys.readouterr().err
    after = tree(workdir)
    assert {name for name in before if before[name] != after[name]} <= {str(workdir), str(workdir / "lock")}


def test_tasks_of_lm_eval_run_with_a_local_file(reference, config, tmp_path, monkeypatch):
    """Only the last step's line is missing, so nothing is trained. Offline: the data are those of the file."""
    pytest.importorskip("lm_eval", reason="extra `eval`")
    workdir, data = tmp_path / "run", tmp_path / "lambada.jsonl"
    shutil.copytree(reference, workdir)
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text("\n".join(text.splitlines()[:-1]) + "\n")
    c = config.copy_and_resolve_references()
    c.eval.tasks = "lambada_openai:5"
    c.eval.task_data = f"lambada_openai={task_files.write(data, task_files.rows('lambada_openai', 8))}"
    assert train(c, str(workdir)) == 0
    line = lines(workdir)[-1]
    assert len(lines(workdir)) == len(lines(reference)) and line["step"] == 12
    model, total, right = LanguageModel.load(str(workdir), 12), 0.0, 0
    for item in task_files.rows("lambada_openai", 5):  # the last word after the rest of the text
        context, _, word = item["text"].rpartition(" ")
        (score,) = model.score([(context, f" {word}")])
        total, right = total + score.log_prob, right + score.is_greedy
    assert line["task/lambada_openai/perplexity"] == pytest.approx(np.exp(-total / 5), rel=1e-5)
    assert line["task/lambada_openai/acc"] == right / 5


# ---- refusals


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(self):
        raise AssertionError("compiled")

    monkeypatch.setattr(Program, "train_step", property(fail))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": "hellaswag_llmc:0"}, ("eval.tasks", "'hellaswag_llmc:0'", "at least 1")),
        ({"tasks": "a,,b"}, ("eval.tasks", "''")),
        ({"tasks": "a b"}, ("eval.tasks", "'a b'")),
        ({"tasks": "piqa:1,piqa:2"}, ("eval.tasks", "piqa is named twice")),
        ({"tasks": "core", "task_data": ""}, ("core", "eval.core_bundle")),
        ({"task_data": "hellaswag_llmc"}, ("eval.task_data", "NAME=FILE")),
        ({"task_data": "hellaswag_llmc=none.jsonl"}, ("none.jsonl",)),
        ({"task_data": "piqa=none.jsonl"}, ("eval.task_data", "piqa")),
        ({"sample_prompts": ("a", "")}, ("eval.sample_prompts", "''", "not empty")),
        ({"sample_prompts": [3]}, ("eval.sample_prompts", "3")),
        ({"sample_prompts": ("\ud800",)}, ("eval.sample_prompts", "UTF-8")),
        (
            {"sample_prompts": "The people " * 20},
            ("eval.sample_prompts", "model.block_size=32", "eval.sample_tokens=8"),
        ),
        ({"sample_tokens": 32}, ("eval.sample_tokens", "model.block_size=32")),
        ({"sample_tokens": 0}, ("eval.sample_tokens",)),
        ({"tasks_every_steps": -1}, ("eval.tasks_every_steps",)),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_compiled(
    config, tmp_path, nothing_compiles, fields, words
):
    c = config.copy_and_resolve_references()
    c.eval.update(fields)
    for dry_run in (True, False):
        with pytest.raises(UserError) as error:
            train(c, str(tmp_path / "run"), dry_run=dry_run)
        for word in words:
            assert word in str(error.value), (word, error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_prompt_with_characters_that_the_tokenizer_lacks_is_refused(config, tmp_path, nothing_compiles):
    texts = tmp_path / "text.txt"
    texts.write_text("abcdef abc " * 300 + "\n")
    c = config.copy_and_resolve_references()
    c.data.update({"source": "files", "tokenizer": "char", "dir": str(tmp_path / "chars"), "val_fraction": 0.0})
    c.data.source_options.path = str(texts)
    preprocess(c)
    c.model.vocab_size = 0
    c.eval.update({"tasks": "", "sample_prompts": ("abc", "Zoo")})
    with pytest.raises(UserError, match=r"eval\.sample_prompts: 'Zoo': .*Z"):
        train(c, str(tmp_path / "run"))


def test_the_plan_of_a_dry_run_names_the_evaluations(config, tmp_path, capsys):
    c = config.copy_and_resolve_references()
    c.eval.sample_every_steps = 0
    assert train(c, str(tmp_path / "run"), dry_run=True) == 0
    said = capsys.readouterr().err
    assert "\ntasks hellaswag_llmc: every 4 steps\n2 sample(s): after the last step\n" in said
    assert not (tmp_path / "run").exists()


# ---- the pieces


def test_prompts_are_a_tuple_a_list_or_texts_between_bars(config, tmp_path):
    c = default_config()
    for value, expected in (
        ("a|b c", ("a", "b c")),
        (["a", "b|c"], ("a", "b|c")),
        (("a",), ("a",)),
        ("", ()),
    ):
        c.eval.sample_prompts = value
        assert c.eval.sample_prompts == expected
    _, parsed = cli.parse(
        ["train", "--config.eval.sample_prompts=a b|c"], "", {"workdir": (None, "")}, new_workdir=True
    )
    assert parsed.eval.sample_prompts == ("a b", "c")
    save_snapshot(parsed, str(tmp_path))
    assert config_lib.load_snapshot(str(tmp_path)).eval.sample_prompts == ("a b", "c")
    file = tmp_path / "own.py"
    text = "from trialgpt_jax.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"
    file.write_text(text + "    c.eval.sample_prompts = ('x | y', 'z')\n    return c\n")
    assert config_file.load(str(file)).eval.sample_prompts == ("x | y", "z")
    changed = default_config()
    changed.eval.update({"tasks": "core", "sample_prompts": ("a",)})
    assert len(config_lib.check_resumable(changed, default_config())) == 2  # harmless on resume


def test_paths_of_the_home_folder_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = ("core_bundle", "include_path")
    _, c = cli.parse(
        ["train", *(f"--config.eval.{name}=~/x" for name in fields)], "", {"workdir": (None, "")}, new_workdir=True
    )
    assert [c.eval[name] for name in fields] == [f"{tmp_path}/x"] * 2


TASK = '{"step": 2, "task/a/acc": 0.5}\n'


def test_lines_of_tasks_come_after_those_of_the_step_and_its_validation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 3.0}\n' + TASK + '{"step": 3}\n'
    path.write_text(text)
    assert len(metrics_lib.read_metrics(str(tmp_path), 2)) == 4 and len(metrics_lib.read_metrics(str(tmp_path), 1)) == 1
    for wrong in (
        text + TASK,
        TASK + '{"step": 2}\n',
        TASK + '{"step": 2, "val_loss": 3.0}\n',
        TASK.replace("0.5", "NaN"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"metrics.jsonl, line \d.*repair or remove the file"):
            metrics_lib.read_metrics(str(tmp_path), 3)


def sample(step, index, prompt="a"):
    return json.dumps({"step": step, "index": index, "prompt": prompt, "text": "t"}) + "\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", 0),
        (sample(1, 0) + sample(1, 1, "b") + sample(2, 0), 2),
        (sample(2, 0) + sample(2, 1, "b"), 2),
        (sample(2, 0) + sample(2, 1, "b") + sample(3, 0) + '{"st', 2),
        (sample(1, 0) + sample(2, 0), 1),  # the first of two prompts: written again
        (sample(1, 0) + sample(2, 0, "another prompt"), 2),
        (sample(1, 0) + "\0" * 30, 1),
    ],
)
def test_samples_up_to_the_restored_step_are_kept(tmp_path, text, kept):
    (tmp_path / "samples.jsonl").write_text(text)
    assert len(metrics_lib.read_samples(str(tmp_path), 2, ("a", "b"))) == kept
    c = default_config()
    c.log.tensorboard = False
    MetricsLog(str(tmp_path), c.log, 2, c).close()  # also without prompts: lines of later steps go
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) >= kept
    assert '"step": 3' not in (tmp_path / "samples.jsonl").read_text()


@pytest.mark.parametrize("line", ["x", "[1]", '{"step": 1}', sample(-1, 0), sample(1, 0, 3), sample(1, 0) * 2])
def test_a_damaged_line_of_samples_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "samples.jsonl").write_text(f"{line}\n{sample(2, 0)}")
    with pytest.raises(UserError, match=r"samples.jsonl, line [12]\b.*repair or remove the file"):
        metrics_lib.read_samples(str(tmp_path), 2, ())


# ---- several devices and processes

_FAKE = """
import os, signal, sys, time
import jax
from trialgpt_jax import cli, train
from trialgpt_jax.evaluation import suite
from trialgpt_jax.evaluation.task import Result, Task
stop_at = int(sys.argv.pop(1))
def task(number):
    def run(model):
        print(f"running {number} at {model.step}", file=sys.stderr, flush=True)
        if model.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(4)  # JAX polls for the notice once a second
        return {f"task{number}": Result({"score": model.score_tokens([([1], [2, 3])])[0].log_prob}, 1)}
    return Task(f"task{number}", "fake", "", "", 0, run)
suite.load = lambda specs, **_: [task(0), task(1)] if jax.process_index() == 0 else []
cli.run(train.main)
"""


@pytest.fixture
def flags(config, default_file):
    """Flags of a run with two tasks and two prompts on a mesh of four devices."""
    c = config.copy_and_resolve_references()
    c.train.steps = 6
    c.mesh.update({"data": 1, "fsdp": 2, "tensor": 2})
    c.eval.sample_prompts = ("The people", "Congress")
    return [f"--config={default_file}", *overrides(c)]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(flags, tmp_path):
    for n in (1, 2):
        results = job(n, "train", *flags, f"--workdir={tmp_path / str(n)}")
        assert [result.returncode for result in results] == [0] * n, results
    one, two = (task_lines(tmp_path / str(n)) for n in (1, 2))
    assert one == two and [line["step"] for line in one] == [0, 4, 6]
    assert samples(tmp_path / "1") == samples(tmp_path / "2") and len(samples(tmp_path / "1")) == 4


@pytest.mark.slow
def test_sigterm_during_an_evaluation_stops_all_processes_before_the_next_task(flags, tmp_path):
    for stop_at, status, ran in ((4, 75, [(0, 0), (1, 0), (0, 4)]), (-1, 0, [(0, 4), (1, 4), (0, 6), (1, 6)])):
        arguments = [*flags, "--config.eval.sample_prompts=", f"--workdir={tmp_path}/run"]
        results = job(2, "train", *arguments, script=lambda i, stop_at=stop_at: ["-c", _FAKE, str(stop_at)])
        assert [result.returncode for result in results] == [status] * 2, results
        found = re.findall(r"running (\d) at (\d)", results[0].stderr)
        assert [(int(a), int(b)) for a, b in found] == ran and "running" not in results[1].stderr
        if status == 75:
            assert "stopped after step 4, which is saved" in results[0].stderr, results[0].stderr
            assert lines(tmp_path / "run")[-1]["step"] == 4 and len(task_lines(tmp_path / "run")) == 1
    assert [line["step"] for line in task_lines(tmp_path / "run")] == [0, 4, 6]
