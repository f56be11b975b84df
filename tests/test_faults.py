"""Full disks and other faults of the storage, checkpoints by the clock and dry runs, in one process."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, call, metrics, overrides, refused, small_config, tree
from test_train import assert_same_bits, final_state

from trialgpt_jax import UserError
from trialgpt_jax.storage import files
from trialgpt_jax.storage.json_lines import JsonLines
from trialgpt_jax.training import metrics as metrics_lib
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def reference(store, tmp_path_factory):
    """The workdir of an undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    result = train(small_config(store), folder / "run", str(folder / "default.py"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def train(config, workdir, file, *arguments, **options):
    flags = [f"--config={file}", *overrides(config), f"--workdir={workdir}", *arguments]
    return call("train", *flags, **options)


def folders(workdir):
    return sorted(os.listdir(workdir / "checkpoints"), key=lambda name: (len(name), name))


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; a checkpoint of the small model takes up to 0.9 MB while it is written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here ({mounted.stderr.strip()}); test_checkpoint injects it")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Fills the file system."""
    with open(folder / "hog", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # printed as a traceback
def test_a_full_disk_stops_the_run_with_one_line_and_when_there_is_room_it_goes_on(
    reference, config, small_disk, default_file
):
    # follows: run the same command to go on from the newest checkpoint
    # follows: because the disk is full; free some space, and {}
    workdir = small_disk / "run"
    config.checkpoint.update({"every_steps": 1, "keep_period": 1})  # keeps all checkpoints until the disk is full
    result = train(config, workdir, default_file)
    refused(
        result,
        str(workdir / "checkpoints"),
        "the disk is full: the checkpoint's arrays take",
        "last good checkpoint",
    )
    last = int(folders(workdir)[-1])
    for words in (f"the last good checkpoint is {last}", f"the checkpoint of step {last + 1}"):
        assert words in result.stderr
    assert f"step {last + 4:2}/20" not in result.stderr, "reported late"
    assert folders(workdir) == [str(step) for step in range(1, last + 1)]  # no temporary folders
    others = ["config.json", "data.json", "lock", "log.txt", "metrics.jsonl", "processes.json"]
    others += ["tokenizer.json", "tokenizer.tiktoken"]
    assert sorted(os.listdir(workdir)) == ["checkpoints", *others]
    assert call("convert", f"--workdir={workdir}", "--verify").returncode == 0

    fill(small_disk)  # how much a failed save has left free varies
    os.truncate(small_disk / "hog", max(0, (small_disk / "hog").stat().st_size - 256 * 1024))
    refused(train(config, workdir, default_file), "checkpoint.keep_last + checkpoint.keep_best + 1", "are free")
    os.remove(small_disk / "hog")
    config.checkpoint.update({"every_steps": 5, "keep_period": 0})
    for step in range(1, last - 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    result = train(config, workdir, default_file)
    assert result.returncode == 0 and f"resumed from checkpoint {last}" in result.stderr, result.stderr
    assert_same_bits(final_state(workdir), final_state(reference))


def test_training_goes_on_over_a_full_disk_where_the_config_says_so(reference, config, small_disk, default_file):
    workdir = small_disk / "run"
    config.checkpoint.on_error = "continue"
    config.log.tensorboard = True

    def disturb(line):
        if line.startswith("step  7/20"):
            while (workdir / "saving").exists():
                pass
            fill(small_disk)
        if "training goes on" in line:
            os.remove(small_disk / "hog")

    result = train(config, workdir, default_file, on_line=disturb)
    assert result.returncode == 0, result.stderr
    reports = [line for line in result.stderr.splitlines() if "could not be saved" in line or "No space" in line]
    assert len(reports) == 1 and "Traceback" not in result.stderr, result.stderr
    assert "step 10" in reports[0] or "metrics.jsonl" in reports[0]
    assert set(folders(workdir)) <= {"5", "15", "20"} and folders(workdir)[-1] == "20"
    assert metrics(workdir) == metrics(reference)
    assert_same_bits(final_state(workdir), final_state(reference))


def test_a_run_never_ends_unsaved_in_silence(config, small_disk, default_file):
    config.checkpoint.update({"on_error": "continue", "every_steps": 0})

    def disturb(line):
        if line.startswith("step 12/20"):
            fill(small_disk)

    result = train(config, small_disk / "run", default_file, on_line=disturb)
    refused(result, "disk is full")
    assert "done: step 20" not in result.stderr


def test_a_disk_too_small_for_what_is_to_be_kept_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch, default_file
):
    monkeypatch.setattr("trialgpt_jax.storage.files.free_bytes", lambda path: 1_000_000)
    result = train(config, tmp_path / "run", default_file)
    refused(result, str(tmp_path / "run" / "checkpoints"), "1 = 4 of them need", "MB", "1.0 MB are free", "keep fewer")
    assert "compiled" not in result.stderr


# ---- other faults of the storage


def failing(number, path):
    """Raises what the kernel reports; `write` and `fsync` do not name the file, `path` = "" likewise."""
    raise OSError(number, os.strerror(number), *([path] if path else []))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.ENOTCONN, errno.EDQUOT])
@pytest.mark.parametrize("path", ["", "runs/x/config.json"])
def test_a_fault_of_the_storage_names_file_reason_and_what_to_do(number, path):
    with pytest.raises(UserError) as refused, files.storage_faults("runs/x"):
        failing(number, path)
    reason = "the disk is full" if number == errno.EDQUOT else os.strerror(number)
    assert str(refused.value).startswith(path or "runs/x") and reason in str(refused.value)
    assert str(refused.value).endswith("run the same command to go on from the newest checkpoint")


def test_a_mistake_of_the_program_is_no_fault_of_the_storage(tmp_path):
    """A file that is missing in the workdir was removed; elsewhere, the program should not have asked for it."""
    with pytest.raises(UserError, match=r"metrics.jsonl: No such file"), files.storage_faults(str(tmp_path)):
        open(tmp_path / "metrics.jsonl", "r+b")  # noqa: SIM115
    for error in (FileNotFoundError(errno.ENOENT, "", "/elsewhere"), FileNotFoundError(), OSError(errno.EBADF, "")):
        with pytest.raises(OSError) as raised, files.storage_faults(str(tmp_path)):
            raise error
        assert raised.value is error
    with pytest.raises(ZeroDivisionError), files.storage_faults("gs://bucket/run"):
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match=r"gs://bucket/run: OSError: Forbidden"),
        files.storage_faults("gs://bucket/run"),
    ):
        raise OSError("Forbidden")  # as the store's client raises it, without a number


@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        (JsonLines, "_append", "run/metrics.jsonl"),
        (metrics_lib, "EventFile", "run/tensorboard"),
        (workdir_lib, "save_snapshot", "run/config.json"),
    ],
)
def test_a_fault_at_a_file_of_the_workdir_is_one_line(config, tmp_path, default_file, monkeypatch, module, name, file):
    config.log.tensorboard = True
    monkeypatch.setattr(module, name, lambda *_, **__: failing(errno.EROFS, str(tmp_path / file)))
    result = train(config, tmp_path / "run", default_file)
    refused(result, str(tmp_path / file), "Read-only file system", "run the same command to go on")


def test_metrics_are_durable_before_the_checkpoint_that_needs_them(config, tmp_path, default_file, monkeypatch):
    workdir, synced = tmp_path / "run", {}
    real_fsync, real_save = os.fsync, Checkpoints.save

    def fsync(handle):
        real_fsync(handle)
        synced[os.readlink(f"/proc/self/fd/{handle}")] = os.fstat(handle).st_size

    def save(self, step, *args):
        path = workdir / "metrics.jsonl"
        assert synced[str(path)] == path.stat().st_size, step
        assert metrics(workdir)[-1]["step"] == step
        saved.append(step)
        return real_save(self, step, *args)

    saved = []
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "save", save)
    result = train(config, workdir, default_file)
    assert result.returncode == 0 and saved == [5, 10, 15, 20], result.stderr


def test_training_time_goes_on_after_a_resume(reference, config, tmp_path, default_file):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"seconds": 1000.0 + line["step"]}) + "\n" for line in lines))
    result = train(config, workdir, default_file)
    assert result.returncode == 0 and "resumed from checkpoint 15" in result.stderr, result.stderr
    seconds = {line["step"]: line["seconds"] for line in metrics(workdir, keys=("step", "seconds"))}
    assert seconds[15] == 1015.0 and 1015.0 < seconds[16] < seconds[20] < 1115.0
    assert re.search(r"done: step 20, 10[1-9]\d\.\d s of training", result.stderr), result.stderr


# ---- saving by the clock, and the dry run


def test_checkpoints_by_the_clock(config, tmp_path, default_file):
    config.train.steps = 6
    config.checkpoint.update({"every_steps": 0, "keep_last": 10})
    for minutes, expected in ((1e-9, ["1", "2", "3", "4", "5", "6"]), (1e9, ["6"])):
        config.checkpoint.every_minutes = minutes
        workdir = tmp_path / str(minutes)
        assert train(config, workdir, default_file).returncode == 0
        assert folders(workdir) == expected


def test_a_dry_run_checks_compiles_reads_and_leaves_nothing(reference, config, tmp_path, default_file):
    before = tree(tmp_path)
    result = train(config, tmp_path / "not" / "there", default_file, "--dry_run")
    assert result.returncode == 0, result.stderr
    for words in (
        "parameters",
        "tokens per step",
        "compiled in",
        "memory per device",
        "batch of (8, 33) ids",
        "step 0",
    ):
        assert words in result.stderr, (words, result.stderr)
    assert tree(tmp_path).keys() == before.keys()

    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    before = tree(workdir).keys(), {k: v for k, v in tree(workdir).items() if k != str(workdir)}
    result = train(config, workdir, default_file, "--dry_run")
    assert result.returncode == 0 and "would go on from checkpoint 15" in result.stderr, result.stderr
    assert (tree(workdir).keys(), {k: v for k, v in tree(workdir).items() if k != str(workdir)}) == before


def test_a_dry_run_refuses_what_a_run_would(reference, config, tmp_path, default_file):
    import fcntl

    refused(train(config, "/proc/nowhere", default_file, "--dry_run"), "--workdir", "cannot be written")
    with open(reference / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(train(config, reference, default_file, "--dry_run"), "in use")
    config.optim.learning_rate = 1.0
    refused(train(config, reference, default_file, "--dry_run"), "optim.learning_rate")
    config.data.dir = str(tmp_path / "nowhere")
    refused(train(config, tmp_path / "run", default_file, "--dry_run"), "data.dir")
    assert not (tmp_path / "run").exists()


def test_the_table_of_faults_names_tests_that_exist():
    text, module, names = (ROOT / "docs" / "faults.md").read_text(), None, 0
    for file, name in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", text):
        module = file or module
        if name:
            names += 1
            assert f"def {name}(" in (ROOT / "tests" / module).read_text(), (module, name)
    assert names > 25
