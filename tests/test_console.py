"""The log never ends the work, results that cannot be written end the command quietly, and Ctrl-C leaves one line."""

import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, command, metrics, overrides, refused, run, small_config

from trialgpt_jax import cli, console
from trialgpt_jax.data import prepare, token_store
from trialgpt_jax.training.stop import StopRequest

# ---- streams, in a process that imports no JAX

_LOGS = """
import logging, os, sys, warnings
from tqdm import tqdm
from trialgpt_jax import console
console.guard()
console.say("ä line")
print("of a library", file=sys.stderr, flush=True)
warnings.warn("of a library", stacklevel=1)
logging.getLogger().error("of a library")
with tqdm(total=2, mininterval=0, file=sys.stderr) as bar:
    bar.update()
file = open(sys.argv[1], "w")
assert file.fileno() > 2, "C++ libraries would log to this file"
file.write("alive")
"""


def python(script, *arguments, stderr="", stdout=""):
    """Runs a script with redirections as a shell writes them; returns the CompletedProcess with text output."""
    line = shlex.join([sys.executable, "-c", script, *map(str, arguments)])
    line = f"{line} {stderr or '2>&2'} {stdout}; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "stderr", ["2>/dev/full", "2>&-", "2>&- >&- <&-", "2>&1 | true", "2> >(true)", "a closed terminal"]
)
def test_a_log_that_cannot_be_written_is_dropped(tmp_path, stderr):
    if stderr == "a closed terminal":
        terminal, end = os.openpty()
        os.close(terminal)
        argv = [sys.executable, "-c", _LOGS, tmp_path / "file"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        result = subprocess.run(argv, env=env, stderr=end, timeout=60, check=False)
        os.close(end)
    else:
        result = python(_LOGS, tmp_path / "file", stderr=stderr)
    assert result.returncode == 0, result  # Python's own flush at exit would make it 120
    assert (tmp_path / "file").read_text() == "alive"


def test_say_survives_what_a_caller_has_done_to_stderr(monkeypatch, capsys):
    closed, ascii_only = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")
    closed.close()
    for stream in (None, closed, ascii_only):
        monkeypatch.setattr(sys, "stderr", stream)
        console.say("ä line")
    assert ascii_only.buffer.getvalue() == b"\\xe4 line\n"
    assert capsys.readouterr().out == ""  # where `print(file=None)` writes


_RESULTS = """
from trialgpt_jax import cli
def main(argv):
    for _ in range(50_000):
        print("ä result")
cli.run(main)
"""


def test_results_to_a_closed_pipe_end_the_command_quietly():
    result = python(_RESULTS, stdout="| head -n 1")
    assert (result.returncode, result.stdout, result.stderr) == (141, "ä result\n", "")
    result = run("evaluate", "--help")  # all of it is flushed at the end
    assert result.returncode == 0 and "--workdir" in result.stdout


def test_results_that_cannot_be_written_are_one_line():
    result = python(_RESULTS, stdout=">/dev/full")
    refused(result, "stdout cannot be written: No space left on device")
    assert python(_RESULTS, stdout=">&-").returncode == 0  # nobody has asked for them


def test_a_mistake_is_reported_although_results_before_it_cannot_be_written():
    script = _RESULTS.replace("50_000):", "1):").replace("cli.run", "    raise UserError('of the user')\ncli.run")
    result = python(f"from trialgpt_jax import UserError{script}", stdout=">/dev/full")
    assert (result.returncode, result.stderr) == (2, "error: of the user\n")


def test_a_command_is_guarded_before_it_imports_anything():
    """Where `python -m` looks for the module of a command, argv[0] is -m."""
    script = """
import sys
sys.argv = ["-m"]
import trialgpt_jax, os, signal
os.fstat(2), sys.stderr.fileno()
signal.raise_signal(signal.SIGINT)
"""
    result = python(script, stderr="2>&-")
    assert (result.returncode, result.stdout) == (130, "")


def test_results_on_an_ascii_terminal_are_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = python(_RESULTS.replace("50_000", "1"))
    assert (result.returncode, result.stdout) == (0, "\\xe4 result\n")


@pytest.mark.parametrize(
    ("variables", "written"),
    [
        ({"PYTHONIOENCODING": "ascii:strict"}, b"\\xe4 \xff\n"),
        ({"PYTHONIOENCODING": "utf-8:strict"}, b"\xc3\xa4 \xff\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\\xe4 \xff\n"),
    ],
)
def test_no_encoding_of_stdout_loses_text_or_ends_the_command(variables, written):
    """A character that the encoding lacks is escaped; a byte of an argument that is not UTF-8 is written as it was."""
    script = "from trialgpt_jax import console; console.guard(); print('\\xe4 \\udcff')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    env |= {"PYTHONPATH": str(ROOT)} | variables
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, written), result.stderr


def test_training_whose_log_is_closed_ends_with_the_last_step_saved(config, tmp_path, default_file):
    """As real commands, both at once: piped into `head`, and without stdout and stderr."""
    started = []
    for name, redirection in (("head", "2>&1 | head -n 1"), ("closed", ">&- 2>&-")):
        argv, env = command("train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / name}")
        line = f"{shlex.join(argv)} {redirection}; exit ${{PIPESTATUS[0]}}"
        started.append((name, subprocess.Popen(["bash", "-c", line], env=env, stdout=subprocess.PIPE, text=True)))
    for name, process in started:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and output.count("\n") == (name == "head"), (name, output)
        assert (tmp_path / name / "checkpoints" / "20" / "checksums.json").exists()
        assert metrics(tmp_path / name)[-1]["step"] == 20
        assert all(line.startswith("{") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines())


# ---- Ctrl-C and SIGHUP


@pytest.fixture(scope="module")
def workdir(store, tmp_path_factory):
    """Of a short run."""
    config, folder = small_config(store), tmp_path_factory.mktemp("run")
    config.train.steps = 6
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    result = call("train", f"--config={folder}/default.py", *overrides(config), f"--workdir={folder}/run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def started(module, *arguments):
    """A command that has begun to import its libraries: in its first 0.1 s Python itself would print a traceback."""
    argv, env = command(module, *arguments)
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "site-packages" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    return process


def test_ctrl_c_at_any_moment_is_one_line_and_status_130(workdir, config, default_file, tmp_path):
    new = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/new", "--config.train.steps=1000000"]
    endless = [f"--workdir={workdir}", "--max_new_tokens=1000000", "--temperature=0"]  # samples end the text some time
    moments = [(0.05, "train", new), (0.2, "evaluate", [f"--workdir={workdir}"])]
    moments += [(0.5, "convert", [f"--workdir={workdir}", "--verify"]), (1.0, "train", new), (2.0, "infer", endless)]
    for pair in (moments[:2], moments[2:4], moments[4:]):
        begun = [(process := started(module, *arguments), time.monotonic() + at) for at, module, arguments in pair]
        assert process
        for process, moment in begun:
            time.sleep(max(0, moment - time.monotonic()))
            process.send_signal(signal.SIGINT)
        for process, _ in begun:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted"), (process.args, err)
            assert out == "" or "--temperature=0" in process.args, out
            assert "Traceback" not in err and err.count("\n") <= 2, err


@pytest.mark.parametrize(("when", "status"), [("atexit", 130), ("module teardown", 0)])
def test_ctrl_c_while_python_ends_is_one_line_or_ignored(when, status):
    code = """
import os, signal, sys
sys.argv[:] = ["-m"]
import trialgpt_jax
from trialgpt_jax import cli
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT): kill(pid, number)
"""
    late = "import atexit; atexit.register(Late().__del__)" if when == "atexit" else "late = Late()"
    argv = [sys.executable, "-c", f"{code}{late}\ncli.run(lambda argv: 0)"]
    result = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert result.stderr == ("interrupted\n" if status else "")


@pytest.mark.parametrize(("sent", "status", "line"), [("TERM", 143, ""), ("INT", 130, "interrupted\n")])
def test_the_entry_point_of_a_container_ends_on_signals(sent, status, line):
    code = f"""
import subprocess, sys, time
sys.argv[:] = ["-m"]
import trialgpt_jax
from trialgpt_jax import cli, console
def main(argv):
    with console.interrupts_end_process():
        subprocess.Popen(["sh", "-c", "kill -{sent} 1"])
        for _ in range(50):
            time.sleep(0.1)
cli.run(main)
"""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("the kernel allows no PID namespace")
    result = subprocess.run([*unshare, sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (status, line)


def test_ctrl_c_in_the_work_of_a_reader_is_status_130(workdir, monkeypatch, store):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr("trialgpt_jax.training.program.Program.evaluate", interrupted)
    monkeypatch.setattr("trialgpt_jax.language_model.LanguageModel.samples", interrupted)
    monkeypatch.setattr("trialgpt_jax.convert.load_params", interrupted)
    monkeypatch.setattr(token_store, "verify", interrupted)
    for module, *arguments in (
        ("evaluate", f"--workdir={workdir}"),
        ("infer", f"--workdir={workdir}", "--json"),
        ("convert", f"--workdir={workdir}", f"--to_hf={workdir}/out"),
        ("preprocess", f"--config.data.dir={store}", "--verify"),
    ):
        result = call(module, *arguments)
        assert (result.returncode, result.stdout) == (130, ""), (module, result)
        assert result.stderr.endswith("interrupted\n") and "Traceback" not in result.stderr


def test_an_interrupt_that_python_would_swallow_ends_the_process():
    """Raised in `__del__` or a callback of a library, an exception is printed and ignored."""
    script = """
import os, signal, sys
from trialgpt_jax import cli, console
class Callback:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
def main(argv):
    Callback()
    print("not reached", flush=True)
console.leave_on_interrupt()
cli.run(main)
"""
    result = python(script)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def train(config, workdir, file, on_line):
    return call("train", f"--config={file}", *overrides(config), f"--workdir={workdir}", on_line=on_line)


def at(words, *numbers):
    """Sends signals to this process when a line of the log begins with `words`."""

    def on_line(line):
        if line.startswith(words):
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_line


def test_ctrl_c_before_the_first_step_leaves_nothing_to_stop(config, tmp_path, default_file):
    """While the step is compiled, and during the evaluation of step 0."""
    for words in ("1 x cpu", "compiled in", "step 0: validation"):
        result = train(config, tmp_path / "run", default_file, at(words, signal.SIGINT))
        assert result.returncode == 130 and result.stderr.endswith("interrupted\n"), result
        assert "Traceback" not in result.stderr and "stopping" not in result.stderr
    assert not os.path.exists(tmp_path / "run" / "checkpoints") or not os.listdir(tmp_path / "run" / "checkpoints")


def test_sighup_saves_and_exits_75_also_when_the_terminal_sends_it_twice(config, tmp_path, default_file):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    result = train(config, tmp_path / "run", default_file, at("step  3/20", signal.SIGHUP, signal.SIGHUP))
    assert result.returncode == 75 and "is saved; run the same command" in result.stderr, result.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") in (["3"], ["4"])
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT], [signal.SIGHUP, signal.SIGTERM], [signal.SIGTERM, signal.SIGHUP], [signal.SIGINT, signal.SIGHUP]],
    ids=lambda numbers: "_".join(number.name for number in numbers),
)
def test_a_stop_is_requested_by_ctrl_c_and_by_sigterm_and_sighup_together(numbers):
    """systemd sends SIGHUP with each SIGTERM: that is no second request."""
    with StopRequest() as stop:
        stop.begin(0)
        assert not stop.requested(1)
        for number in numbers:
            os.kill(os.getpid(), number)
        assert stop.requested(2)


def test_sighup_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for context in (StopRequest(), console.terminations_interrupt()):
            with context as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not stop or not stop.requested(1)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_request_ends_the_process_at_once(number):
    """By the signal itself, also while the process waits in C++; a shell reports SIGINT as status 130."""
    script = """
import os, signal, sys
from trialgpt_jax.training.stop import StopRequest
number = int(sys.argv[1])
with StopRequest() as stop:
    stop.begin(0)
    os.kill(os.getpid(), number)
    assert stop.requested(1)
    try:
        signal.raise_signal(number)
    finally:
        print("cleaned up")  # such as waiting for a save
"""
    result = python(script, int(number))
    assert result.returncode in (-number, 128 + number), result
    assert result.stdout == "" and result.stderr.startswith("stopping after this step; once more to leave at once\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM]])
def test_preprocess_stops_at_sigterm_and_sighup(tmp_path, monkeypatch, numbers):
    def interrupted(*_):
        try:
            os.kill(os.getpid(), numbers[0])
            time.sleep(10)
        finally:  # what ends the workers is not interrupted a second time
            for number in numbers[1:]:
                os.kill(os.getpid(), number)
            workers_ended.append(True)

    workers_ended = []
    monkeypatch.setattr(prepare, "prepare", interrupted)
    result = call("preprocess", f"--config.data.dir={tmp_path}", "--config.data.source=files")
    assert result.returncode == 75 and "the same command continues" in result.stderr and workers_ended, result
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_in_a_terminal_leaves_no_traceback_of_a_worker(store, tmp_path):
    """It reaches the whole process group, the workers while they still import their libraries."""
    texts = tmp_path / "texts"
    texts.mkdir()
    text = b"".join(path.read_bytes() for path in sorted((store.parent / "texts").iterdir()))
    for i in range(4):
        (texts / f"{i}.txt").write_bytes(text * 20)
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "tokenizer.tiktoken").write_bytes((store / "tokenizer.tiktoken").read_bytes())
    options = {"source": "files", "source_options.path": texts, "dir": folder, "tokenizer": "bpe:512"}
    options |= {"num_workers": 4, "shard_tokens": 1024}
    argv, env = command("preprocess", *(f"--config.data.{name}={value}" for name, value in options.items()))
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    begin = process.stderr.readline()  # the progress bar, with which the workers start
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    log = begin + process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in log and "KeyboardInterrupt" not in log, log


def test_a_worker_never_gets_the_signals_of_its_terminal():
    """Not the first one either, with which multiprocessing starts its resource tracker and changes the signal mask."""
    script = """
import multiprocessing, re, signal, time
from trialgpt_jax.data.workers import _inherited_block
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with _inherited_block():
        process.start()
    blocked = int(re.search(r"SigBlk:\\s*(\\w+)", open(f"/proc/{process.pid}/status").read())[1], 16)
    print([number for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM) if blocked >> number - 1 & 1])
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    process.terminate()
"""
    expected = f"{[signal.SIGINT, signal.SIGHUP]}\n{set()}\n"
    assert python(script).stdout == expected


def test_an_error_that_is_a_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0)
