"""Checkpoints: exact, checked byte by byte, and never lost by the keeping of others."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from trialgpt_jax import UserError
from trialgpt_jax.training.checkpoint import Checkpoints


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
    """Checkpoints of steps 1, 2 and 3, and what was said."""
    said = []
    checkpoints = Checkpoints(str(tmp_path), keep_last=3, say=said.append)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    return checkpoints, tmp_path / "checkpoints", said


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
    checkpoints, folder, said = saved
    path = biggest_file(folder / "3")
    damage(path)
    assert checkpoints.newest_whole() == 2
    assert len(said) == 1 and path in said[0] and words in said[0] and "checkpoint 3" in said[0]
    with pytest.raises(UserError, match="checkpoint 3 is damaged"):
        checkpoints.check(3)
    checkpoints.check(2)


def test_a_missing_list_of_checksums_is_damage_too(saved):
    checkpoints, folder, said = saved
    os.remove(folder / "3" / "checksums.json")
    assert checkpoints.newest_whole() == 2 and "checksums.json" in said[0]


def test_none_whole_stops_rather_than_starting_over(saved):
    checkpoints, folder, _ = saved
    for step in "123":
        flip(biggest_file(folder / step))
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.newest_whole()


def test_no_checkpoints_is_step_zero(tmp_path):
    assert Checkpoints(str(tmp_path)).newest_whole() is None


def test_an_interrupted_save_is_discarded_with_a_word(saved, tmp_path):
    checkpoints, folder, said = saved
    os.remove(folder / "3" / "checksums.json")  # as far as a killed save gets
    (tmp_path / "saving").write_text("3")
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "1.removed").mkdir()
    checkpoints.discard_interrupted()
    assert sorted(os.listdir(folder)) == ["1", "2"] and "step 3 was interrupted" in said[0]
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
    with pytest.raises(UserError, match="params/b.*float32.*bfloat16"):  # orbax would cast without a word
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


def test_a_step_that_orbax_does_not_save_is_an_error(saved):
    checkpoints, _, _ = saved
    with pytest.raises(RuntimeError, match="step 3"):
        checkpoints.save(3, state())


def test_what_goes_wrong_behind_is_told_at_the_next_wait(tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trialgpt_jax.training.checkpoint._sha256", full)
    checkpoints.save(1, state())
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    checkpoints.wait()  # told once
