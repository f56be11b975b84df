"""Checkpoints: restored bit for bit, checked byte by byte, and never removed by mistake."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from trialgpt_jax import UserError
from trialgpt_jax.training.checkpoint import Checkpoints, SaveError


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


@pytest.mark.parametrize(
    ("damage", "words"), [(flip, "checksum"), (zero, "checksum"), (truncate, "bytes"), (os.remove, "missing")]
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


def test_a_missing_list_of_checksums_is_damage_too(saved):
    checkpoints, folder, logged = saved
    os.remove(folder / "3" / "checksums.json")
    assert checkpoints.newest_whole() == 2 and "checksums.json" in logged[0]


def test_none_whole_stops_rather_than_starting_over(saved):
    checkpoints, folder, _ = saved
    for step in "123":
        flip(biggest_file(folder / step))
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.newest_whole()


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
        target = f"trialgpt_jax.storage.files.{'write_json' if where == 'checksums' else 'make_folder'}"

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
    assert "step 4" in message and str(folder) in message and "last good one is 3" in message
    assert "the disk is full: the checkpoint takes 16.4 kB, and " in message and "\n" not in message
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
    checkpoints.check_space(10_000_000)  # keep_last=3: only the one being written needs space
    with pytest.raises(
        UserError, match=r"takes 10.0 MB, and .* \+ 1 = 4 of them need 10.0 MB more, but 10.0 MB are free"
    ):
        checkpoints.check_space(10_000_001)
    with pytest.raises(UserError, match="= 4 of them need 10.4 MB more"):
        Checkpoints("/nowhere", keep_last=3).check_space(2_600_000)
