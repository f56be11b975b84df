"""`evaluate --tasks`: which tasks it takes, what it prints and writes, the same files in every job and on every mesh.

The scores themselves are compared with other implementations in test_harness, test_core and test_hellaswag.
"""

import json
import math
import os
import pathlib
import re
import shutil

import core_bundle
import pytest
import task_files
from conftest import call, overrides, refused, small_config
from test_distributed import job

from trialgpt_jax import UserError, __version__
from trialgpt_jax.config import load_snapshot
from trialgpt_jax.convert import to_hf
from trialgpt_jax.evaluation import harness, references, report, suite
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.storage import files, integrity, json_files, lock
from trialgpt_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def world(store, tmp_path_factory):
    """A folder with a trained workdir `run`, the six task files and their flags, and a CORE bundle."""
    folder = tmp_path_factory.mktemp("world")
    config = small_config(store)
    config.model.block_size = 128
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    trained = call("train", f"--config={folder}/default.py", *overrides(config), f"--workdir={folder}/run")
    assert trained.returncode == 0, trained.stderr
    task_files.write_six(folder, 12)
    core_bundle.write(folder / "bundle", 12)
    return folder


@pytest.fixture
def workdir(world, tmp_path):
    """A copy of the run, without reports."""
    shutil.copytree(world / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


REAL_LOAD = harness.load
SCORES = {
    "hellaswag": Result(
        {"acc": 0.25, "acc_stderr": 0.0123456789, "acc_norm": 1 / 3}, 10042, frozenset(["acc", "acc_norm"])
    ),
    "lambada_openai": Result({"perplexity": 40.0554321, "perplexity_stderr": 1.4787654, "acc": 0.3256}, 5153),
    "piqa": Result({"acc": 0.62890098}, 100),
    "arc_easy": Result({"acc": math.nan}, 2376),
    "winogrande": Result({"acc": 0.516}, 1267),
    "wikitext": Result({"word_perplexity": 37.3698, "bits_per_byte": 0.976912345}, 62),
    "hellaswag_llmc": Result({"acc": 0.2859, "acc_norm": 0.2955}, 10042),
}
CORE = {
    "core": Result({"core": 0.1139, "core_stderr": 0.004}, 100),
    "core/hellaswag": Result({"acc": 0.308, "centered": 0.0773}, 50),
    "core/copa": Result({"acc": 0.5, "centered": 0.0, "cropped": 3}, 50),
}


def fake(name, limit=None, num_fewshot=None, protocol="lm-eval 0.4.13", version="1.0"):
    results = CORE if name == "core" else {name: SCORES.get(name, Result({"acc": 0.5}, 10))}
    return Task(name, protocol, version, "ab" * 32, num_fewshot or 0, lambda model: results)


@pytest.fixture
def fakes(monkeypatch):
    """Tasks with known scores, without data, and a known loss."""
    calls = []
    monkeypatch.setattr(Program, "evaluate", lambda *_: (5.512345678, 43104))

    def load(names, **options):
        calls.append((names, options))
        return [fake(name, options["limit"], options["num_fewshot"]) for name in names]

    monkeypatch.setattr(harness, "load", load)
    monkeypatch.setattr("trialgpt_jax.evaluation.core.load", lambda *_: fake("core", protocol="nanochat CORE"))
    monkeypatch.setattr(
        "trialgpt_jax.evaluation.hellaswag.load", lambda *_: fake("hellaswag_llmc", protocol="llm.c", version="")
    )
    return calls


def saved(workdir, step=20):
    return json.loads((workdir / "evaluations" / f"{step}.json").read_text())


def cells(text):
    """(task, metric) -> the columns of a table of stdout."""
    lines = text.split("\n\n")[1].splitlines()
    starts = [match.start() for match in re.finditer(r"-+", lines[1])]
    rows = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {(row[0], row[2]): row for row in rows[2:]}, rows[0]


# ---- what it prints and writes


def test_the_table_has_bits_per_byte_first_and_the_scores_of_gpt2_where_they_are_known(world, workdir, fakes):
    result = call("evaluate", f"--workdir={workdir}", "--tasks=gpt2,hellaswag_llmc,core", "--core_bundle=x")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checkpoint 20, val split, ")
    rows, head = cells(result.stdout)
    assert head[:6] == ["task", "protocol", "metric", "value", "stderr", "n"]
    assert head[6:] == ["GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1558M"]
    assert list(rows)[:2] == [("val split", "bits_per_byte"), ("wikitext", "bits_per_byte")]
    assert rows["hellaswag", "acc"][1:] == [
        *("lm-eval 0.4.13, 0-shot", "acc", "0.2500", "0.0123", "10,042"),
        *("0.2892 a", "", "", "0.4004 a"),
    ]
    assert rows["hellaswag_llmc", "acc_norm"][1] == "llm.c, 0-shot"
    assert rows["hellaswag_llmc", "acc_norm"][6:] == ["0.2945 h", "0.3752 h", "0.432 h", "0.4889 h"]
    assert rows["hellaswag_llmc", "acc"][6:] == [""] * 4  # lm-eval's 0.2892 is of another protocol
    assert rows["core", "core"][1:7] == ["nanochat CORE", "core", "0.1139", "0.0040", "100", "0.1139 g"]
    assert rows["core/hellaswag", "acc"][6] == "0.308 g" and rows["core/copa", "cropped"][3] == "3"
    assert rows["arc_easy", "acc"][3] == "not finite"
    assert rows["lambada_openai", "perplexity"][3:7] == ["40.055", "1.4788", "5,153", "40.06 b"]
    assert "piqa: 100 items here, 1,838 in the figures of GPT-2." in result.stdout
    assert "winogrande: " not in result.stdout  # all of its items
    assert "32.56% here and 45.99% in OpenAI's paper" in result.stdout
    assert "Compare only within one protocol" in result.stdout and "differ by about 0.015" in result.stdout
    legend = result.stdout.split("Sources: ")[1]
    assert set(re.findall(r"\b([a-h]) = ", legend)) == set("abcdefgh")


def test_figures_of_gpt2_are_left_blank_for_other_shots(world, workdir, fakes):
    result = call("evaluate", f"--workdir={workdir}", "--tasks=piqa", "--num_fewshot=5")
    rows, _ = cells(result.stdout)
    assert rows["piqa", "acc"][1] == "lm-eval 0.4.13, 5-shot" and rows["piqa", "acc"][6:] == [""] * 4
    assert "Sources" not in result.stdout and "figures of GPT-2" not in result.stdout


def test_every_published_figure_has_a_source_and_is_in_the_document():
    """The table of docs/evaluation.md is that of references.py."""
    document = (pathlib.Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if "|" in line]
    for (family, name, metric), reference in references.GPT2.items():
        assert all(value[1] in references.SOURCES for value in reference.values if value)
        figures = [f"{value[0]:g} {value[1]}" if value else "" for value in reference.values]
        assert [family, name, metric, *figures] in lines, (name, figures)
    for letter, source in references.SOURCES.items():
        assert f"{letter}: {source}" in document, source


def test_the_json_of_stdout_and_that_of_the_file(world, workdir, fakes):
    result = call("evaluate", f"--workdir={workdir}", "--tasks=hellaswag:300,wikitext", "--limit=50", "--json")
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stderr
    line, alone = json.loads(result.stdout), json.loads(call("evaluate", f"--workdir={workdir}", "--json").stdout)
    tasks = line.pop("tasks")
    assert line == alone and list(alone) == ["step", "split", "loss", "perplexity", "bits_per_byte", "tokens"]
    # accuracies to the last bit, other numbers with five digits
    assert tasks == {
        "hellaswag": {"acc": 0.25, "acc_stderr": 0.012346, "acc_norm": 1 / 3, "n": 10042},
        "wikitext": {"word_perplexity": 37.37, "bits_per_byte": 0.97691, "n": 62},
    }
    assert [(names, options["limit"]) for names, options in fakes] == [(["hellaswag"], 300), (["wikitext"], 50)]
    whole = saved(workdir)
    assert list(whole) == ["step", "loss", "tasks", "definitions"]
    assert whole["step"] == 20 and whole["tasks"] == tasks
    assert whole["loss"]["loss"] == float(f"{alone['loss']:.5g}") and whole["loss"]["tokens"] == alone["tokens"]
    assert whole["loss"]["data"] == [json.loads((workdir / "data.json").read_text())[0][1]]
    assert whole["definitions"]["hellaswag"] == {
        "protocol": "lm-eval 0.4.13",
        "version": "1.0",
        "digest": "ab" * 32,
        "num_fewshot": 0,
        "limit": 300,
        "dtype": "float32",
        "versions": {"trialgpt_jax": __version__, **report._versions("lm-eval")},
        "results": ["hellaswag"],
    }
    assert set(whole["definitions"]["wikitext"]["versions"]) == {"trialgpt_jax", "jax", "lm_eval", "datasets"}


def test_the_markdown_is_the_table(world, workdir, fakes):
    result = call("evaluate", f"--workdir={workdir}", "--tasks=lambada_openai,wikitext")
    rows, head = cells(result.stdout)
    page = (workdir / "evaluations" / "20.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith("|")]
    assert page[0] == "# Checkpoint 20" and table[0] == head and table[2:] == list(rows.values())
    assert {len(line) for line in table} == {10}
    notes = result.stdout.split("\n\n")[2].splitlines()
    assert [line.removeprefix("- ") for line in page if line.startswith("- ")] == notes


def test_in_a_narrow_terminal_the_table_leaves_columns_out_and_says_which(world, workdir, fakes):
    call("evaluate", f"--workdir={workdir}", "--tasks=lambada_openai,wikitext")
    whole, narrow = (report.table(saved(workdir), width) for width in (None, 80))
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert "GPT-2 774M" in whole and narrow.splitlines()[0].split()[:6] == whole.splitlines()[0].split()[:6]
    assert re.search(r"The terminal is too narrow for .*GPT-2 1558M\.", " ".join(narrow.split()))


def test_scores_of_rounded_weights_say_so(world, workdir, fakes):
    result = call("evaluate", f"--workdir={workdir}", "--weights=int8")
    assert result.stdout.endswith(", weights in int8\n"), result.stderr
    result = call("evaluate", f"--workdir={workdir}", "--weights=int8", "--tasks=wikitext", "--split=val", "--json")
    assert json.loads(result.stdout)["weights"] == "int8"
    kept = saved(workdir)
    assert kept["definitions"]["wikitext"]["dtype"] == "float32, weights in int8" and kept["loss"] is None


def test_a_second_evaluation_keeps_the_other_tasks_and_replaces_its_own(world, workdir, fakes, monkeypatch):
    evaluate = "evaluate", f"--workdir={workdir}"
    call(*evaluate, "--tasks=piqa,core", "--core_bundle=x")
    first = saved(workdir)
    assert list(first["tasks"]) == ["core", "core/hellaswag", "core/copa", "piqa"]
    monkeypatch.setitem(SCORES, "piqa", Result({"acc": 0.7}, 1838))
    monkeypatch.delitem(CORE, "core/copa")
    monkeypatch.setitem(CORE, "core/boolq", Result({"acc": 0.6, "centered": -0.05}, 7))
    assert call(*evaluate, "--tasks=piqa:7,wikitext").returncode == 0
    second = saved(workdir)
    assert list(second["tasks"]) == ["core", "core/hellaswag", "core/copa", "piqa", "wikitext"]
    assert second["tasks"]["piqa"] == {"acc": 0.7, "n": 1838} and second["definitions"]["piqa"]["limit"] == 7
    assert second["tasks"]["core"] == first["tasks"]["core"] and second["loss"] == first["loss"]
    call(*evaluate, "--tasks=core", "--core_bundle=x")  # what it no longer has is gone
    assert list(saved(workdir)["tasks"]) == ["core", "core/hellaswag", "core/boolq", "piqa", "wikitext"]
    assert "core/boolq" in (workdir / "evaluations" / "20.md").read_text()
    assert os.listdir(workdir / "evaluations") and not (workdir / "evaluations" / "lock").exists()
    # another step has its own file, and the order of the tasks does not matter
    call(*evaluate, "--tasks=wikitext,piqa", "--checkpoint_step=15")
    assert saved(workdir, 15)["step"] == 15 and list(saved(workdir, 15)["tasks"]) == ["piqa", "wikitext"]


def test_a_name_that_a_group_and_a_task_have_belongs_to_the_one_that_ran_last():
    old, group = report.empty(5), Task("group", "lm-eval 0.4.13", "", "0", 0, None)
    results = {name: Result({"acc": 0.5}, 1) for name in ("group", "a", "b")}
    old = report.add(old, suite.Outcome(group, results), None, "float32")
    new = report.add(old, suite.Outcome(group._replace(name="a"), {"a": Result({"acc": 0.6}, 2)}), 9, "float32")
    assert {name: each["results"] for name, each in new["definitions"].items()} == {"a": ["a"], "group": ["group", "b"]}
    assert new["tasks"] == {"a": {"acc": 0.6, "n": 2}, "group": {"acc": 0.5, "n": 1}, "b": {"acc": 0.5, "n": 1}}
    back = report.add(new, suite.Outcome(group, results), None, "float32")
    assert list(back["definitions"]) == ["group"] and back["tasks"]["a"] == {"acc": 0.5, "n": 1}


def test_an_evaluation_without_a_loss_keeps_the_one_that_is_there():
    def with_loss(loss):
        made = {"split": "val", "loss": loss, "perplexity": 1.0, "bits_per_byte": None, "tokens": 9, "data": []}
        return report.empty(5) | {"loss": made}

    assert report.merge(with_loss(3.0), report.empty(5)) == with_loss(3.0)
    assert report.merge(with_loss(3.0), with_loss(4.0)) == with_loss(4.0)


def test_the_scores_of_finished_tasks_are_written_when_a_later_one_fails(world, workdir, fakes, monkeypatch):
    def interrupted(model):
        assert saved(workdir)["tasks"].keys() == {"piqa"}
        raise KeyboardInterrupt

    monkeypatch.setattr("trialgpt_jax.evaluation.hellaswag.load", lambda *_: fake("x")._replace(run=interrupted))
    assert call("evaluate", f"--workdir={workdir}", "--tasks=piqa,hellaswag_llmc").returncode == 130
    assert saved(workdir)["tasks"].keys() == {"piqa"} and saved(workdir)["loss"]


def test_what_a_task_cannot_score_is_one_line_with_its_name(world, workdir, fakes, monkeypatch):
    def fail(model):
        raise UserError("character 'x' (U+0078) at position 3 of the text is not among those of the tokenizer")

    task = fake("hellaswag_llmc")._replace(run=fail)
    monkeypatch.setattr("trialgpt_jax.evaluation.hellaswag.load", lambda *_: task)
    result = call("evaluate", f"--workdir={workdir}", "--tasks=piqa,hellaswag_llmc")
    refused(result, "error: task hellaswag_llmc: character 'x'")
    assert saved(workdir)["tasks"].keys() == {"piqa"}


@pytest.mark.parametrize("how", ["read-only", "busy", "a file in its place"])
def test_where_no_file_can_be_written_it_prints_and_says_why(world, workdir, fakes, monkeypatch, how):
    folder = str(workdir / "evaluations")
    evaluate = "evaluate", f"--workdir={workdir}", "--tasks=piqa"
    if how == "read-only":

        def make_folder(path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(files, "make_folder", make_folder)
        result, why = call(*evaluate), "Permission denied"
    elif how == "busy":
        with lock.hold(folder):
            result, why = call(*evaluate), f"is in use by host {os.uname().nodename}, pid {os.getpid()}"
    else:
        (workdir / "evaluations").write_text("")
        result, why = call(*evaluate), "cannot be written: "
    assert result.returncode == 0 and "piqa" in result.stdout, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "not written" in line]
    assert line.startswith(f"the scores are not written to {folder}/20.json: ") and why in line
    assert not os.path.exists(f"{folder}/20.json") and "the scores are in" not in result.stderr


def test_a_run_that_trains_in_the_workdir_does_not_keep_the_file_from_being_written(world, workdir, fakes):
    with lock.hold(str(workdir)):
        assert call("evaluate", f"--workdir={workdir}", "--tasks=piqa").returncode == 0
    assert saved(workdir)["tasks"].keys() == {"piqa"}


def test_a_file_that_is_no_report_is_kept_and_named(world, workdir, fakes, capsys):
    # follows: the file there is not a report of this version
    evaluate = "evaluate", f"--workdir={workdir}", "--tasks=piqa"
    call(*evaluate)
    path = workdir / "evaluations" / "20.json"
    good, new = path.read_bytes(), saved(workdir)
    for change in (
        lambda whole: whole["tasks"].pop("piqa"),
        lambda whole: whole.update(step=15),
        lambda whole: whole["tasks"]["piqa"].update(acc="high"),
        lambda whole: whole.pop("definitions"),
    ):
        whole = saved(workdir)
        change(whole)
        path.write_text(json.dumps(whole))
        report.save(str(workdir), new)
        assert "is not a report of this version: " in capsys.readouterr().err and saved(workdir) == whole
        path.write_bytes(good)
    path.write_text("{")
    result = call(*evaluate)
    assert result.returncode == 0 and "piqa" in result.stdout and path.read_text() == "{"
    assert "is not a report of this version: " in result.stderr and result.stderr.rstrip().endswith("; remove it")
    path.unlink()
    call(*evaluate)
    assert path.read_bytes() == good


def test_without_tasks_nothing_is_written(world, workdir):
    assert call("evaluate", f"--workdir={workdir}").returncode == 0 and not (workdir / "evaluations").exists()


def test_the_checkpoint_with_the_lowest_validation_loss(world, workdir, fakes):
    """Two are kept, 15 and 20; the loss was measured at 10 and 20."""
    found = json.loads(call("evaluate", f"--workdir={workdir}", "--checkpoint_step=best", "--json").stdout)
    assert found["step"] == 20
    checkpoint = str(workdir / "checkpoints" / "15")

    def set_loss(loss):
        record = integrity.read_record(checkpoint)
        del record["files"]
        os.remove(integrity.record_path(checkpoint))
        integrity.write_record(checkpoint, record | {"val_loss": loss})

    set_loss(0.5)
    found = call("evaluate", f"--workdir={workdir}", "--checkpoint_step=best", "--tasks=piqa")
    assert found.stdout.startswith("checkpoint 15,") and saved(workdir, 15), found.stderr
    shutil.rmtree(workdir / "checkpoints" / "20")
    set_loss(None)
    refused(call("evaluate", f"--workdir={workdir}", "--checkpoint_step=best"), "no checkpoint with a validation loss")


# ---- which tasks


def test_lists_of_tasks():
    six = ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext")
    assert suite.parse("gpt2") == [(name, None) for name in six]
    assert suite.parse("gpt2:100, core") == [*((name, 100) for name in six), ("core", None)]
    assert suite.parse("piqa,gpt2") == [(name, None) for name in ("piqa", *(n for n in six if n != "piqa"))]
    assert suite.parse("hellaswag_llmc:1000,lambada_openai:500") == [("hellaswag_llmc", 1000), ("lambada_openai", 500)]
    assert suite.parse("piqa:3,piqa:3") == [("piqa", 3)]
    assert suite.parse_task_data("piqa=a,b.jsonl,piqa:train=~/y=z,core=c") == {
        "piqa": "a,b.jsonl",
        "piqa:train": os.path.expanduser("~/y=z"),
        "core": "c",
    }
    with pytest.raises(UserError, match="eval.tasks=piqa:0: `0` of piqa is no number of items; it must be at least 1"):
        suite.parse("piqa:0", "eval.tasks")
    with pytest.raises(UserError, match="the task core needs its data: give eval.core_bundle=FOLDER"):
        suite.load(suite.parse("core"), prefix="eval.")


def test_tasks_are_loaded_in_their_order_with_their_limits_by_process_0_only(fakes, monkeypatch):
    specs = suite.parse("wikitext,core,piqa:7,hellaswag_llmc,arc_easy")
    options = {"limit": 50, "core_bundle": "x", "num_fewshot": 3}
    names = ["wikitext", "core", "piqa", "hellaswag_llmc", "arc_easy"]
    assert [task.name for task in suite.load(specs, **options)] == names
    assert [(names, each["limit"]) for names, each in fakes] == [(["wikitext", "arc_easy"], 50), (["piqa"], 7)]
    monkeypatch.setattr(suite.jax, "process_index", lambda: 1)
    assert suite.load(specs, **options) == [] and len(fakes) == 2


WRONG = [
    ("--tasks=helaswag", "`helaswag` is not a task of lm-eval, nor core, hellaswag_llmc, gpt2", "hellaswag"),
    ("--tasks=cor", "`cor` is not a task", "the nearest names are core"),
    ("--tasks=hellaswag_lmc", "hellaswag_llmc"),
    ("--tasks=zzqqzzqqzz", "`zzqqzzqqzz` is not a task"),
    ("--tasks=piqa,,wikitext", "there is an empty name between the commas"),
    ("--tasks=piqa,", "there is an empty name between the commas"),
    ("--tasks=piqa:0", "`0` of piqa is no number of items; it must be at least 1"),
    ("--tasks=gpt2:-3", "`-3` of gpt2 is no number of items"),
    ("--tasks=piqa:many", "`many` of piqa is no number of items"),
    ("--tasks=piqa:", "`` of piqa is no number of items"),
    ("--tasks=gpt2:5,piqa", "piqa is named twice, with different limits"),
    ("--tasks=piqa --limit=0", "--limit=0 is not a whole number of at least 1"),
    ("--tasks=piqa --limit=-1", "--limit=-1 is not a whole number of at least 1"),
    ("--tasks=piqa --limit=0.5", "--limit=0.5 is not a whole number of at least 1"),
    ("--tasks=piqa --limit=99999999999", "--limit=99999999999 is not a whole number"),
    ("--tasks=piqa --num_fewshot=-1", "--num_fewshot=-1 is not a whole number of at least 0"),
    ("--tasks=piqa --core_bundle=x", "--core_bundle=x is of the task core, which is not among the tasks"),
    ("--tasks=core --core_bundle={new}/none", "none", "core.yaml"),
    ("--tasks=core --core_bundle={new} --num_fewshot=0", "--num_fewshot=0 is for tasks of lm-eval, and core is none"),
    ("--tasks=hellaswag_llmc --include_path={new}", "is for tasks of lm-eval, and hellaswag_llmc is none"),
    ("--tasks=piqa --include_path={new}/none", "none is not a folder"),
    ("--tasks=piqa --task_data=piqa", "`piqa` is not NAME=FILE, as in --task_data=hellaswag=hellaswag.jsonl"),
    ("--tasks=piqa --task_data=piqa=", "`piqa=` is not NAME=FILE"),
    ("--tasks=piqa --task_data=piqa=a,piqa=b", "piqa is given twice"),
    ("--tasks=piqa --task_data=piqqa=a", "--task_data: piqqa is not among the tasks piqa; did you mean piqa?"),
    ("--tasks=piqa --task_data=wikitext=a", "--task_data: wikitext is not among the tasks piqa"),
    ("--tasks=hellaswag_llmc --task_data=hellaswag=a", "hellaswag is not among the tasks hellaswag_llmc"),
    ("--tasks=piqa --task_data=piqa:train=a", "--task_data: piqa:train has the examples", "missing: piqa=FILE"),
    ("--tasks=hellaswag_llmc --task_data=hellaswag_llmc:train=a", "hellaswag_llmc:train is for tasks of lm-eval"),
    ("--tasks=hellaswag_llmc --task_data=hellaswag_llmc={new}/none", "none"),
    ("--tasks=piqa --task_data=piqa={new}/none", "none"),
    ("--checkpoint_step=newest", "--checkpoint_step=newest is neither a step, nor -1 (the newest), nor best"),
]


@pytest.mark.parametrize(("flags", "words"), [(flags, words) for flags, *words in WRONG])
def test_a_mistake_is_one_line_before_the_model_is_loaded(world, workdir, tmp_path, flags, words):
    shutil.rmtree(workdir / "checkpoints")  # whoever looks for one finds none
    result = call("evaluate", f"--workdir={workdir}", *flags.format(new=tmp_path).split())
    refused(result, *words)
    assert result.stdout == "" and not (workdir / "evaluations").exists()


def test_flags_of_tasks_need_tasks_as_the_message_says(world, workdir, fakes):
    # follows: is an option of --tasks; give --tasks=NAMES as well
    for flag in ("--num_fewshot=0", "--limit=3", "--include_path=x", "--task_data=piqa=x", "--core_bundle=x"):
        result = call("evaluate", f"--workdir={workdir}", flag)
        refused(result, f"{flag.split('=')[0]} is an option of --tasks; give --tasks=NAMES as well")
    assert call("evaluate", f"--workdir={workdir}", "--limit=3", "--tasks=piqa").returncode == 0


def test_an_empty_list_and_what_the_message_proposes(world, workdir, fakes):
    # follows: is empty; give names of tasks, as in
    result = call("evaluate", f"--workdir={workdir}", "--tasks=")
    refused(result, "--tasks is empty")
    names = re.search(r"as in --tasks=(\S+), or (gpt2)", result.stderr).groups()
    for each in names:
        assert call("evaluate", f"--workdir={workdir}", f"--tasks={each}").returncode == 0


def test_core_needs_a_bundle_and_the_message_says_how_to_give_it(world, workdir):
    # follows: needs its data: give
    # follows: has no such file; give
    result = call("evaluate", f"--workdir={workdir}", "--tasks=core")
    refused(result, "the task core needs its data: give --core_bundle=FOLDER or the zip of it")
    result = call("evaluate", f"--workdir={workdir}", "--tasks=core", "--core_bundle=x", "--task_data=core=x")
    refused(result, "core has no such file; give --core_bundle=FOLDER or the zip of it")
    core_bundle.pack(world / "bundle", workdir / "bundle.zip")
    given = [
        suite.load(suite.parse("core"), core_bundle=str(path)) for path in (world / "bundle", workdir / "bundle.zip")
    ]
    assert [task.name for (task,) in given] == ["core", "core"] and given[0][0].digest == given[1][0].digest


def test_without_lm_eval_its_tasks_name_the_extra_and_the_others_run(world, workdir, fakes, monkeypatch):
    monkeypatch.setattr(harness, "load", REAL_LOAD)
    monkeypatch.setattr(harness, "_installed", lambda: False)
    refused(call("evaluate", f"--workdir={workdir}", "--tasks=piqa"), "pip install 'trialgpt_jax[eval]'")
    done = call("evaluate", f"--workdir={workdir}", "--tasks=hellaswag_llmc")
    assert done.returncode == 0 and "llm.c" in done.stdout, done.stderr


def test_a_file_for_a_member_of_a_group_is_used(fakes):
    suite.load(suite.parse("ai2_arc"), task_data={"arc_easy": "x", "arc_easy:train": "y"})
    assert fakes[0][1]["task_data"] == {"arc_easy": "x", "arc_easy:train": "y"}
    with pytest.raises(UserError, match="--task_data: piqa is not among the tasks ai2_arc"):
        suite.load(suite.parse("ai2_arc"), task_data={"piqa": "x"})


def test_the_task_of_the_document_can_be_loaded(tmp_path, monkeypatch):
    document = (pathlib.Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(re.search(r"```yaml\n(.*?)```", document, re.DOTALL)[1])
    line = re.search(r"lines such as `(\{.*?\})`", document)[1]
    (tmp_path / "capitals.jsonl").write_text(f"{line}\n{line}\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (task,) = suite.load(suite.parse("capitals"), include_path="tasks")
    assert (task.name, task.version, task.num_fewshot) == ("capitals", "1.0", 0)


# ---- where the token store is not on this machine


@pytest.fixture(scope="module")
def imported(world):
    """A workdir made of a Hugging Face folder; its data.dir is the default, which does not exist."""
    to_hf(load_snapshot(str(world / "run")), str(world / "run"), str(world / "hf"))
    result = call("convert", f"--from_hf={world}/hf", f"--workdir={world}/imported")
    assert result.returncode == 0, result.stderr
    return world / "imported"


def test_an_imported_model_is_scored_without_a_token_store(world, imported, fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate = "evaluate", f"--workdir={imported}", "--tasks=piqa"
    result = call(*evaluate)
    assert result.returncode == 0, result.stderr
    step = int(re.match(r"checkpoint (\d+), no loss: data.dir=data/openwebtext does not exist", result.stdout)[1])
    assert "val split" not in result.stdout and cells(result.stdout)[0]["piqa", "acc"]
    result = call(*evaluate, "--json")
    line = json.loads(result.stdout)
    assert {name: line[name] for name in ("step", "split", "loss", "perplexity", "bits_per_byte", "tokens")} == {
        **dict.fromkeys(("split", "loss", "perplexity", "bits_per_byte", "tokens")),
        "step": step,
    }
    assert line["tasks"].keys() == {"piqa"} and f"checkpoint {step}, no loss: " in result.stderr
    assert saved(imported, step)["loss"] is None
    for asked in ("--split=val", "--batches=2", "--config.data.dir=nowhere"):  # then it is an error
        refused(call(*evaluate, asked), "does not exist; make a token store")


def test_a_store_without_validation_text_leaves_only_the_loss_out(world, workdir, store, fakes, tmp_path):
    config = small_config(tmp_path / "tokens")
    config.data.update({"source": "files", "tokenizer": f"from:{workdir}", "val_fraction": 0.0})
    config.data.source_options.path = str(store.parent / "texts")
    preprocess(config)
    snapshot = json_files.read(str(workdir / "config.json"))
    snapshot["data"]["dir"] = config.data.dir
    json_files.write(str(workdir / "config.json"), snapshot)
    result = call("evaluate", f"--workdir={workdir}", "--tasks=piqa")
    assert result.returncode == 0 and "checkpoint 20, no loss: " in result.stdout, result.stderr
    assert "val_fraction" in result.stdout and saved(workdir)["tasks"].keys() == {"piqa"}


# ---- the same files everywhere


def read(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def evaluations(workdir):
    return read(workdir / "evaluations")


def flags_of(world, *names):
    """The flags that score tasks on the files of `world`."""
    files_of = {name: name.removesuffix("_llmc") for name in names if name != "core"}
    data = ",".join(f"{name}={world}/{file}.jsonl" for name, file in files_of.items())
    return [f"--tasks={','.join(names)}", f"--task_data={data}", "--batches=2"]


def test_a_mesh_of_four_devices_writes_the_same_bytes(world, workdir, tmp_path):
    """Also the loss, which is rounded because its last bits differ."""
    flags = [*flags_of(world, "hellaswag_llmc"), "--limit=6", f"--workdir={workdir}"]
    alone = call("evaluate", *flags)
    assert alone.returncode == 0, alone.stderr
    shutil.move(workdir / "evaluations", tmp_path / "expected")
    mesh = "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    (result,) = job(1, "evaluate", *flags, *mesh, devices=4)
    assert result.returncode == 0, result.stderr
    assert evaluations(workdir) == read(tmp_path / "expected")


@pytest.mark.slow
def test_processes_and_meshes_write_the_same_bytes_for_all_protocols(world, workdir, tmp_path):
    flags = [*flags_of(world, *task_files.SIX, "hellaswag_llmc", "core"), f"--core_bundle={world}/bundle"]
    flags.append(f"--workdir={workdir}")
    alone = call("evaluate", *flags)
    assert alone.returncode == 0, alone.stderr
    whole = saved(workdir)
    assert len(whole["tasks"]) == 6 + 1 + 23 and len(whole["definitions"]) == 8
    assert whole["tasks"]["hellaswag"]["n"] == whole["tasks"]["hellaswag_llmc"]["n"] == 12
    protocols = {each["protocol"].split(" ")[0] for each in whole["definitions"].values()}
    assert protocols == {"lm-eval", "llm.c", "nanochat"}
    assert all(re.fullmatch("[0-9a-f]{64}", each["digest"]) for each in whole["definitions"].values())
    shutil.move(workdir / "evaluations", tmp_path / "expected")
    expected = read(tmp_path / "expected")
    text = b"".join(expected.values()).decode()
    assert str(tmp_path) not in text and str(world) not in text and os.uname().nodename not in text
    for n, sizes in ((1, (1, 4, 2)), (1, (8, 1, 1)), (2, (4, 1, 1)), (2, (1, 2, 2))):
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
        results = job(n, "evaluate", *flags, *mesh, devices=math.prod(sizes))
        assert [result.returncode for result in results] == [0] * n, results
        assert [result.stdout for result in results[1:]] == [""] * (n - 1)
        assert evaluations(workdir) == expected, (n, sizes)
        shutil.rmtree(workdir / "evaluations")


@pytest.mark.slow
def test_an_error_in_process_0_ends_both_with_its_line(world, workdir):
    results = job(2, "evaluate", f"--workdir={workdir}", "--tasks=helaswag", devices=2)
    assert [result.returncode for result in results] == [2, 2], results
    assert all("`helaswag` is not a task of lm-eval" in result.stderr for result in results)
