"""What a user sees of a run: curves and their table, the log in a file, the summary, one live line in a terminal."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time

import pytest
from conftest import call, overrides, refused
from conftest import run as run_in_child

from trialgpt_jax import UserError, console, live_line
from trialgpt_jax.config import default_config, differences, validate
from trialgpt_jax.training import curves, profile
from trialgpt_jax.training.log_file import LogFile
from trialgpt_jax.training.metric_lines import distinct_names, read_run
from trialgpt_jax.training.metrics import progress_line
from trialgpt_jax.training.times import Times


def write_run(folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def step_line(step, loss, **more):
    line = {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}
    return line | {"tokens_per_second": 50.0, "seconds": 2.0 * step, "skipped": 0} | more


def val_line(step, loss):
    return {"step": step, "tokens": 100 * step, "val_loss": loss, "val_bits_per_byte": loss / 3, "seconds": 2.0 * step}


@pytest.fixture
def runs(tmp_path):
    """Of different lengths: one that was killed and resumed, one that has diverged."""
    short = [val_line(0, 8.0), *(step_line(i, 8.0 - i) for i in range(1, 4)), val_line(3, 5.0)]
    first = [val_line(0, 8.0), *(step_line(i, 8.0 - i / 2) for i in range(1, 7)), val_line(6, 1.0)]
    again = [*(step_line(i, 7.5 - i / 2) for i in range(5, 9)), val_line(8, 4.5)]
    diverged = [val_line(0, 8.0), *(step_line(i, 7.0) for i in range(1, 3)), step_line(3, 1e9), step_line(4, None)]
    made = {"short": short, "resumed": first + again, "diverged": diverged}
    return {name: write_run(tmp_path / "runs" / name, lines) for name, lines in made.items()}


def test_steps_that_ran_again_replace_those_of_the_first_time(runs):
    run = read_run(str(runs["resumed"]))
    steps, losses = run.series("loss")
    assert steps == list(range(1, 9))
    assert losses == [8.0 - i / 2 for i in range(1, 5)] + [7.5 - i / 2 for i in range(5, 9)]
    assert run.series("val_loss") == ([0, 8], [8.0, 4.5])  # the evaluation of step 6 was after the checkpoint
    assert run.best().step == 8 and not run.diverged() and read_run(str(runs["diverged"])).diverged()


def test_a_line_that_is_cut_or_damaged_does_not_hide_the_others(tmp_path):
    folder = write_run(tmp_path / "run", [step_line(1, 5.0), step_line(2, 4.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": "x"}\n\0\0\n' + json.dumps(step_line(3, 3.0)) + '\n{"step": 4, "lo')
    run = read_run(str(folder))
    assert run.series("loss")[0] == [1, 2, 3] and run.damaged == 2


def test_names_are_as_long_as_they_must_be():
    assert list(distinct_names(["/a/x/run", "/a/y/run", "/b/other"])) == ["x/run", "y/run", "other"]


def test_the_table_has_the_final_values(runs):
    results = [curves.final(read_run(str(folder))) for folder in runs.values()]
    rows = [line.split() for line in curves.table(results).splitlines()]
    assert rows[1] == ["short", "3", "300", "6s", "5.0000", "5.0000", "1.6667", "3", "50"]
    assert rows[2] == ["resumed", "8", "800", "16s", "3.5000", "4.5000", "1.5000", "8", "50"]
    assert rows[3] == ["diverged", "4", "400", "8s", "NaN", "8.0000", "2.6667", "0", "50"]
    assert max(map(len, curves.table(results).splitlines())) <= 80


def test_what_cannot_be_plotted_is_one_line(runs, tmp_path, monkeypatch):
    short = str(runs["short"])
    refused(call("plot", short, f"--out={tmp_path}/a.txt"), "--out=", "should end in one of .png")
    refused(call("plot"), "name the workdirs")
    refused(call("plot", short, "--config.seed=1"), "has no config")
    monkeypatch.setattr(curves, "available", lambda: True)
    refused(call("plot", tmp_path / "none", f"--out={tmp_path}/a.png"), "metrics.jsonl does not exist")
    new = write_run(tmp_path / "new", [])
    refused(call("plot", new, f"--out={tmp_path}/a.png"), "new/metrics.jsonl has no line yet")
    refused(
        call("plot", new, write_run(tmp_path / "b", []), f"--out={tmp_path}/a.png"), "none of the 2 runs has a line"
    )
    monkeypatch.setattr(curves, "draw", lambda drawn, _: b"%d" % len(drawn))
    beside = call("plot", short, new, f"--out={tmp_path}/a.png")
    assert beside.returncode == 0 and (tmp_path / "a.png").read_bytes() == b"1", beside.stderr
    assert "new/metrics.jsonl has no line yet; it is left out" in beside.stderr
    # follows: pip install matplotlib
    monkeypatch.setattr(curves, "available", lambda: False)
    refused(call("plot", short, f"--out={tmp_path}/a.png"), "pip install matplotlib")


def test_the_picture_shows_all_runs_and_a_diverged_one_does_not_hide_the_others(runs, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="extra `plot`")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    curves.draw([read_run(str(folder), name) for name, folder in runs.items()])
    loss_axes, *_ = drawn[0].axes
    assert [axes.get_xlabel() for axes in drawn[0].axes[:3]] == ["tokens", "steps", "training time, seconds"]
    assert len(drawn[0].axes) == 9 and loss_axes.get_ylim()[1] < 10
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["short", "resumed", "diverged (diverged)"]


def test_the_command_writes_the_picture_and_prints_the_table(runs, tmp_path):
    pytest.importorskip("matplotlib", reason="extra `plot`")
    result = call("plot", *runs.values(), f"--out={tmp_path}/a.png", "--json")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [run["run"] for run in json.loads(result.stdout)["runs"]] == list(runs)


# ---- the files of a run


def test_the_log_is_kept_over_restarts_with_its_error(tmp_path):
    for number in (1, 2):
        with pytest.raises(UserError), LogFile(str(tmp_path)) as log:
            console.say(f"before {number}")
            log.open()
            console.say(f"during {number}")
            raise UserError("mistake")
    console.say("afterwards")
    with pytest.raises(UserError), LogFile(str(tmp_path)):  # refused before anything has begun
        raise UserError("early")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    said = [line[21:] for line in lines]
    assert [line for line in said if not line.startswith("---- process")] == [
        text for n in (1, 2) for text in (f"before {n}", f"during {n}", "error: mistake")
    ]
    assert len(said) == 8 and not console.copies


def test_the_time_of_a_run_adds_up_over_its_processes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Times(str(tmp_path), 0)
    with first.of("compiling"):
        now[0] += 10
    first.note(0, 0.0)
    now[0] += 30
    first.note(6, 30.0)  # killed: 20 s up to the checkpoint of step 4
    now[0] += 100
    second = Times(str(tmp_path), 4)
    second.note(4, 20.0)
    with second.of("compiling"):
        now[0] += 5
    now[0] += 25
    second.note(9, 45.0)
    account = second.account(45.0)
    assert account.processes == 2 and account.wall == 70 and account.between == 100
    assert account.training == 45 and account.again == 10 and account.seconds == {"compiling": 15}
    assert account.other == 0 and math.isclose(account.goodput, 45 / 70)


def test_a_run_that_was_stopped_goes_on_from_the_time_of_the_step_that_was_saved(config, tmp_path, default_file):
    """And not from that of the last line before it."""
    config.train.steps, config.log.every_steps = 6, 100
    flags = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}"]
    for extra in ("--config.train.max_seconds=0.001", "--config.train.max_seconds=0"):
        assert call("train", *flags, extra, "--allow_config_change=train.max_seconds").returncode in (0, 75)
    first, second = json.loads((tmp_path / "run" / "processes.json").read_text())
    assert 0 < first["last_step"] < 6 and first["training"] > 0
    assert math.isclose(second["total"], first["training"] + second["training"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isclose(lines[-1]["seconds"], second["total"])
    assert "| steps that ran again after a restart | 0s |" in (tmp_path / "run" / "summary.md").read_text()


def test_train_leaves_a_summary_a_log_and_a_trace(config, tmp_path, default_file):
    """All in one run, because it compiles; in a process of its own, because JAX's profiler has crashed beside torch."""
    config.train.steps, config.log.profile, config.checkpoint.every_steps = 6, "2-3", 0
    config.eval.every_steps = 3
    flags = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}"]
    result = run_in_child("train", *flags)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^compiling \(usually \d+ s\)$", result.stderr, re.MULTILINE)
    summary = (tmp_path / "run" / "summary.md").read_text()
    for words in ("Step 6 of 6, complete", "Best checkpoint: 6", "| train.steps | 6 | 600000 |", "Goodput", "| jax |"):
        assert words in summary, (words, summary)
    log = [line[21:] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    progress = re.compile(r"[\w ()./]+, \d+s$|evaluating, ")  # of a slow machine
    assert log[1:] == [line for line in result.stderr.splitlines() if not progress.match(line)]
    rows = profile.operations(str(tmp_path / "run" / "profile" / "2"))
    assert rows == sorted(rows, key=lambda row: -row.milliseconds) and any(
        "dot" in r.name or "f" in r.name for r in rows
    )
    printed = result.stderr.partition("trace of 2 step(s)")[2].splitlines()[1:13]
    assert printed[0].startswith("operation") and printed[1].startswith(rows[0].name[:40])
    assert max(map(len, printed)) <= 80


def test_after_sigusr1_the_next_three_steps_are_traced(tmp_path, monkeypatch, capsys):
    traces, before = [], signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(profile.jax.profiler, "start_trace", traces.append)
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(profile, "table", lambda path, steps: f"table of {steps}")
    ends = []
    with profile.Profiler(str(tmp_path), "9") as profiler:
        for step in range(1, 11):
            profiler.before(step)
            if step in (2, 4):  # the second one arrives while steps are traced, and is not forgotten
                os.kill(os.getpid(), signal.SIGUSR1)
            if profiler.ends(step, last=step == 10):
                ends.append(step)
                profiler.finish()
    assert [int(os.path.basename(path)) for path in traces] == [3, 6, 9] and ends == [5, 8, 9]
    assert capsys.readouterr().err.count("table of 3") == 2
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_range_of_steps_that_is_none_is_refused():
    c = default_config()
    for text in ("x", "0", "5-3", "1-", "99999999999"):
        c.log.profile = text
        with pytest.raises(UserError, match="log.profile` is .* such as 10-12"):
            validate(c)
    assert list(profile.parse_range("10-12")) == [10, 11, 12] and list(profile.parse_range("7")) == [7]
    assert differences(c) == {"log.profile": ("99999999999", "")}


# ---- the terminal


def screen(data, width):
    """The lines that a terminal of `width` columns has shown and that stayed; fails if one was longer."""
    lines = []
    for line in data.decode().replace("\r\n", "\n").split("\n"):
        for drawn in line.split("\r"):
            assert len(drawn.replace("\x1b[K", "")) <= width, drawn
        lines.append(line.rpartition("\r")[2].replace("\x1b[K", ""))
    return lines


END = b"\x04\r\n"  # of the output that a test looks at


@contextlib.contextmanager
def terminal(width):
    """A pseudo-terminal as stderr; yields a function that returns what it has got."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    received = bytearray()

    def receive():
        with contextlib.suppress(OSError):  # closed
            while data := os.read(master, 1 << 16):
                received.extend(data)

    reader = threading.Thread(target=receive)  # a terminal that nobody reads blocks its writer
    reader.start()

    def read():
        end = time.monotonic() + 10
        while not received.endswith(END):
            assert time.monotonic() < end, bytes(received[-300:])
            time.sleep(0.01)
        return bytes(received[: -len(END)])

    with os.fdopen(slave, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        yield read
    reader.join(10)
    os.close(master)


@pytest.mark.parametrize("width", [80, 120])
def test_in_a_terminal_no_line_wraps_and_the_live_line_goes_away(width, monkeypatch):
    monkeypatch.setattr(live_line, "_TICK", 0.02)
    monkeypatch.setattr(live_line, "_REDRAW", 0.0)
    line = {"step": 599_990, "loss": 2.85, "lr": 6e-4, "grad_norm": 0.312, "mfu": 0.44, "step_seconds": 0.962}
    line["tokens_per_second"] = 509_900.0
    long = "words that are more than the terminal is wide, and have a /path/in/them " * 3
    with terminal(width) as read:
        with console.requests_bar(10, "a task of some length", True) as advance:
            for _ in range(3):
                advance(1, 1_000_000)
            console.say(long)
            console.say(progress_line(line, 600_000), progress_line(line, 600_000, width))
        with live_line.task("compiling"):
            time.sleep(0.1)
        sys.stderr.write("\x04\n")
        sys.stderr.flush()
        data = read()
    assert (b"[####" in data) == (width == 120)  # at 80 the tokens take the place of the bar
    lines = screen(data, width)
    assert b"3/10" in data and b"left" in data and data.count(b"compiling") >= 3
    assert " ".join(" ".join(lines[:-2]).split()).strip() == long.strip()
    assert lines[-2].startswith("step 599990/600000 | loss 2.8500") and lines[-2].endswith("left") and lines[-1] == ""


def test_in_a_file_progress_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(live_line, "_FIRST", 0.0)
    with live_line.task("verifying", 4_000_000, size=True) as shown:
        shown.advance(1_000_000)
        shown.advance(1_000_000)
    err = capsys.readouterr().err
    assert err.startswith("verifying, 1.0 MB/4.0 MB, ") and err.count("\n") == 1 and "\r" not in err
