"""Checkpoints: restored bit for bit, checked byte by byte, and never removed by mistake."""

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from trialgpt_jax import UserError
from trialgpt_jax.storage import integrity, lock
from trialgpt_jax.training.checkpoint import Checkpoints, SaveError, report_libraries
from trialgpt_jax.training.start import load_params


def state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "params": {"a": jax.random.normal(keys[0], (64, 32)), "b": jax.random.normal(keys[1], (7,))},
        "opt_state": (jax.random.normal(keys[2], (64, 32)),),
        "step": jnp.int32(seed),
    }


def layout(tree):
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, their folder, and the lines logged."""
    logged = []
    checkpoints = Checkpoints(str(tmp_path), keep_last=3, say=logged.append)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    return checkpoints, tmp_path / "checkpoints", logged


def biggest_file(folder):
    return max((os.path.join(r, f) for r, _, fs in os.walk(folder) for f in fs), key=os.path.getsize)


def test_round_trip_is_exact_and_params_load_alone(saved):
    checkpoints, _, _ = saved
    assert checkpoints.newest_whole() == 3
    assert_equal(checkpoints.restore(3, layout(state())), state(3))
    assert_equal(checkpoints.restore(2, {"params": layout(state())["params"]}), {"params": state(2)["params"]})


def flip(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def zero(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(bytes(64))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


def extend(path):
    os.truncate(path, os.path.getsize(path) + 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "checksum"),
        (zero, "checksum"),
        (truncate, "bytes instead"),
        (extend, "bytes instead"),
        (os.remove, "missing"),
    ],
)
def test_damage_is_found_named_and_the_checkpoint_before_is_used(saved, damage, words):
    checkpoints, folder, logged = saved
    path = biggest_file(folder / "3")
    damage(path)
    assert checkpoints.newest_whole() == 2
    assert len(logged) == 1 and path in logged[0] and words in logged[0] and "checkpoint 3" in logged[0]
    with pytest.raises(UserError, match="checkpoint 3 is damaged"):
        checkpoints.check(3)
    checkpoints.check(2)


def test_a_flipped_bit_is_found_in_every_file(saved):
    checkpoints, folder, _ = saved
    paths = [path for path in (folder / "3").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(paths) > 8
    for path in paths:
        flip(path)
        assert str(path) in checkpoints.problem(3)
        flip(path)
    assert checkpoints.problem(3) is None


def test_a_missing_list_of_checksums_is_damage_too(saved):
    checkpoints, folder, logged = saved
    os.remove(folder / "3" / "checksums.json")
    assert checkpoints.newest_whole() == 2 and "checksums.json" in logged[0]


def test_none_whole_stops_rather_than_starting_over(saved):
    # follows: restore one from a backup, or train into another workdir
    checkpoints, folder, _ = saved
    shutil.copytree(folder / "2", folder.parent / "backup")
    for step in "123":
        flip(biggest_file(folder / step))
    with pytest.raises(UserError, match="none of the checkpoints .* restore one from a backup"):
        checkpoints.newest_whole()
    shutil.rmtree(folder / "2")
    shutil.copytree(folder.parent / "backup", folder / "2")
    assert checkpoints.newest_whole() == 2


def test_no_checkpoints_is_step_zero(tmp_path):
    assert Checkpoints(str(tmp_path)).newest_whole() is None


def test_an_interrupted_save_is_discarded_with_a_word(saved, tmp_path):
    checkpoints, folder, logged = saved
    os.remove(folder / "3" / "checksums.json")  # the state that a killed save leaves
    (tmp_path / "saving").write_text("3")
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "1.removed").touch()  # the state that a killed removal leaves
    os.remove(biggest_file(folder / "1"))
    assert checkpoints.steps() == [2]  # neither counts as damaged, even before they are discarded
    checkpoints.discard_interrupted()
    assert os.listdir(folder) == ["2"] and "step 3 was interrupted" in logged[0]
    assert not (tmp_path / "saving").exists()
    assert checkpoints.newest_whole() == 2


def test_another_model_is_refused_by_the_name_of_the_array(saved):
    checkpoints, _, _ = saved
    other = layout(state())
    other["params"]["b"] = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=other["params"]["b"].sharding)
    with pytest.raises(UserError, match=r"another model.*params/b.*\[7\].*\[8\]"):
        checkpoints.restore(3, other)
    other = layout(state())
    other["params"]["b"] = jax.ShapeDtypeStruct((7,), jnp.bfloat16, sharding=other["params"]["b"].sharding)
    with pytest.raises(UserError, match="params/b.*float32.*bfloat16"):  # orbax would cast without an error
        checkpoints.restore(3, other)
    with pytest.raises(UserError, match="no checkpoint of step 9; it has 1, 2, 3"):
        checkpoints.check(9)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep_last=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        checkpoints.save(step, state(step), loss)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert json.loads((tmp_path / "checkpoints" / "2" / "checksums.json").read_text())["val_loss"] == 1.0


def test_periodic_checkpoints_are_kept_and_a_damaged_one_does_not_count_as_one_of_the_newest(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep_last=1, keep_period=3)
    for step in range(1, 8):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 7]
    os.remove(tmp_path / "checkpoints" / "7" / "checksums.json")
    checkpoints.save(8, state(8))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 7, 8] and checkpoints.newest_whole() == 8


def test_after_a_damaged_one_the_same_step_is_saved_again(saved):
    checkpoints, folder, logged = saved
    flip(biggest_file(folder / "3"))
    step = checkpoints.newest_whole()
    checkpoints.set_aside_after(step)
    assert step == 2 and sorted(os.listdir(folder)) == ["1", "2", "3.damaged"] and "3.damaged" in logged[1]
    again = Checkpoints(str(folder.parent), keep_last=3)
    again.save(3, state(3))
    again.wait()
    assert again.newest_whole() == 3 and sorted(os.listdir(folder)) == ["1", "2", "3"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved_unless_it_is_allowed(saved, value):
    checkpoints, folder, _ = saved
    bad = state(4)
    bad["opt_state"] = (bad["opt_state"][0].at[1, 2].set(value),)
    with pytest.raises(FloatingPointError, match=r"step 4 is not saved.* 1 values that are not finite, in opt_state/0"):
        checkpoints.save(4, bad)
    assert checkpoints.newest_whole() == 3 and sorted(os.listdir(folder)) == ["1", "2", "3"]
    checkpoints.save(4, bad, allow_nonfinite=True)
    checkpoints.wait()
    assert_equal(checkpoints.restore(4, layout(bad)), bad)


def test_a_step_that_orbax_does_not_save_is_an_error(saved):
    checkpoints, _, _ = saved
    with pytest.raises(RuntimeError, match="step 3"):
        checkpoints.save(3, state())


@pytest.mark.parametrize("where", ["orbax", "checksums", "mkdir"])
def test_a_failed_save_raises_once_and_leaves_the_other_checkpoints_unchanged(where, saved, monkeypatch):
    """A full disk is simulated where orbax writes arrays, where checksums are written, where a folder is created."""
    checkpoints, folder, _ = saved
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = OSError(errno.ENOSPC, "No space left on device")
    if where == "orbax":  # TensorStore's message; test_faults fills a real disk
        error = ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 6 [os_error_code='28']")
        target = "orbax.checkpoint.CheckpointManager.wait_until_finished"
    else:
        target = f"trialgpt_jax.storage.{'json_files.write' if where == 'checksums' else 'files.make_folder'}"

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(SaveError) as failure:
            checkpoints.save(4, state(4))
            while not checkpoints.idle():
                checkpoints.poll()
            checkpoints.poll()
    message = str(failure.value)
    assert "step 4" in message and str(folder) in message and "last good checkpoint is 3" in message
    assert "the disk is full: the checkpoint's arrays take 16.4 kB, and " in message and "\n" not in message
    checkpoints.wait()  # the error is raised once
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert os.listdir(folder.parent) == ["checkpoints"] and sorted(os.listdir(folder)) == ["1", "2", "3"]
    checkpoints.save(4, state(4))  # with free space again, the next save works
    checkpoints.wait()
    assert checkpoints.newest_whole() == 4


def test_an_error_in_the_program_is_not_reported_as_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path))
    monkeypatch.setattr("trialgpt_jax.storage.files.sha256", lambda path: 1 / 0)
    checkpoints.save(1, state())
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()


def test_space_is_asked_for_before_the_first_save(saved, monkeypatch):
    checkpoints, _, _ = saved
    monkeypatch.setattr("trialgpt_jax.storage.files.free_bytes", lambda path: 10_000_000)
    checkpoints.check_before_saving(10_000_000)  # keep_last=3: only the one being written needs space
    with pytest.raises(
        UserError, match=r"takes 10.0 MB, and .* \+ 1 = 4 of them need 10.0 MB more, but 10.0 MB are free"
    ):
        checkpoints.check_before_saving(10_000_001)
    with pytest.raises(UserError, match="= 4 of them need 10.4 MB more"):
        Checkpoints("/nowhere", keep_last=3).check_before_saving(2_600_000)
    many = Checkpoints("/nowhere", keep_last=10**9)  # "keep all": the run saves 3
    many.check_before_saving(3_000_000, 3)
    with pytest.raises(UserError, match="and all 3 of them need 12.0 MB more"):
        many.check_before_saving(4_000_000, 3)


# ---- whole means that it was opened


async def no_merge(*args, **kwargs):
    pass


def test_a_checkpoint_that_cannot_be_opened_is_not_whole_and_the_one_before_stays(saved, monkeypatch):
    """Orbax skips the merge of its files, with a warning only, where its glob pattern does not match the path."""
    checkpoints, folder, _ = saved
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files", no_merge)
        checkpoints.save(4, state(4))
        with pytest.raises(SaveError, match="step 4 .* cannot be read back: `.*the last good checkpoint is 3"):
            checkpoints.wait()
    assert checkpoints.newest_whole() == 3
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    checkpoints.save(4, state(4))
    checkpoints.wait()
    assert checkpoints.newest_whole() == 4


def test_arrays_that_are_not_those_of_the_run_are_not_whole(saved):
    checkpoints, _, _ = saved
    arrays = checkpoints._record(3)["arrays"]
    checkpoints._open(3, arrays)
    for wrong in ({"params/a": [[64], "float32"]}, {"params/b": [[7], "bfloat16"]}, {"params/c": [[1], "int32"]}):
        with pytest.raises(SaveError, match=f"step 3 .* cannot be read back: `{next(iter(wrong))}` is "):
            checkpoints._open(3, arrays | wrong)


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "]"])
def test_paths_that_orbax_takes_for_patterns_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be saved below a path with"):
        Checkpoints(str(tmp_path / name / "run")).check_before_saving(1)
    assert not os.listdir(tmp_path)


def test_a_checkpoint_in_a_renamed_folder_is_readable(saved, tmp_path):
    tmp_path.joinpath("checkpoints").rename(tmp_path / "checkpoints_")
    (tmp_path / "moved [1]").mkdir()
    (tmp_path / "checkpoints_").rename(tmp_path / "moved [1]" / "checkpoints")
    params, step = load_params(str(tmp_path / "moved [1]"), layout(state())["params"])
    assert step == 3
    assert_equal(params, state(3)["params"])


def test_a_warning_of_a_library_is_a_line_of_the_log(capsys):
    report_libraries()
    logging.getLogger("absl").info("not shown")
    logging.getLogger("absl").warning("Skipping merge of\nOCDBT checkpoints")
    assert capsys.readouterr().err == "warning of test_checkpoint: Skipping merge of OCDBT checkpoints\n"


# ---- removal, and readers beside a run


def test_an_interrupted_removal_is_not_damage(saved, monkeypatch):
    checkpoints, folder, logged = saved

    def killed(path):
        os.remove(biggest_file(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints._remove("3")
    monkeypatch.undo()
    assert checkpoints.steps() == [1, 2] and checkpoints.newest_whole() == 2 and not logged
    checkpoints.discard_interrupted()
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    logged = []
    checkpoints = Checkpoints(str(tmp_path), keep_last=1, say=logged.append)
    checkpoints.save(1, state(1))
    checkpoints.wait()

    def refused(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refused)
        checkpoints.save(2, state(2))
        checkpoints.wait()
    assert len(logged) == 1 and "warning" in logged[0] and str(tmp_path / "checkpoints" / "1") in logged[0]
    assert checkpoints.newest_whole() == 2
    checkpoints.save(3, state(3))
    checkpoints.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["3"]


def test_a_checkpoint_is_not_removed_while_it_is_read(tmp_path):
    run, reader = (Checkpoints(str(tmp_path), keep_last=1) for _ in range(2))
    run.save(1, state(1))
    run.wait()
    with reader.reading() as step:
        run.save(2, state(2))
        run.wait()
        assert step == 1 and run.steps() == [1, 2]
        assert_equal(reader.restore(1, layout(state())), state(1))
    run.save(3, state(3))
    run.wait()
    assert run.steps() == [3]
    with pytest.raises(UserError, match="no checkpoint of step 1; it has 3"), reader.reading(1):
        pass


def test_a_reader_never_takes_a_checkpoint_that_is_being_removed(saved):
    checkpoints, folder, logged = saved
    found = []
    with lock.unshared(integrity.record_path(str(folder / "3"))) as free:
        assert free
        reader = threading.Thread(target=lambda: found.append(checkpoints.newest_whole()))
        reader.start()
        with pytest.raises(UserError, match="no checkpoint of step 3; it has 1, 2"):
            checkpoints.check(3)
        time.sleep(0.1)
        assert not found
        (folder / "3.removed").touch()
        shutil.rmtree(folder / "3")
    reader.join(10)
    assert found == [2] and not logged


def test_a_checkpoint_that_vanishes_before_it_is_read_is_not_damage(saved, monkeypatch):
    """In an object store nothing holds it."""
    checkpoints, folder, logged = saved
    problem = checkpoints.problem

    def vanishing(step):
        if step == 3:
            shutil.rmtree(folder / "3")
        return problem(step)

    monkeypatch.setattr(checkpoints, "problem", vanishing)
    monkeypatch.setattr(lock, "shared", lambda path: contextlib.nullcontext(True))
    assert checkpoints.newest_whole() == 2 and not logged

    restore = Checkpoints.restore

    def vanishing_restore(self, step, layout):
        if step == 2:
            shutil.rmtree(folder / "2")
        return restore(self, step, layout)

    monkeypatch.setattr(Checkpoints, "restore", vanishing_restore)
    params, step = load_params(str(folder.parent), layout(state())["params"])
    assert step == 1
    assert_equal(params, state(1)["params"])


def test_readers_beside_a_run_that_saves_all_the_time(tmp_path):
    """With keep_last=1 the one that is read is the next to be removed."""
    run = Checkpoints(str(tmp_path), keep_last=1)
    run.save(1, state(1))
    run.wait()
    done, answers, errors = threading.Event(), [], []

    def read():
        while not done.is_set():
            try:
                params, step = load_params(str(tmp_path), layout(state())["params"])
                assert_equal(params, state(step)["params"])
                answers.append(step)
            except BaseException as error:  # noqa: BLE001 - reported below
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    end, step = time.monotonic() + 6, 1
    while time.monotonic() < end:
        step += 1
        run.save(step, state(step))
        run.wait()
    done.set()
    for reader in readers:
        reader.join()
    assert not errors, errors[0]
    assert len(answers) > 5 and len(set(answers)) > 2
    run.save(step + 1, state(0))
    run.wait()
    assert run.steps() == [step + 1]
