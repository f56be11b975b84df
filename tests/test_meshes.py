"""Equal losses on every mesh, checkpoints restored on another mesh, and the placement of axes on slices and hosts."""

import collections
import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import command, small_config
from flax import linen as nn
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from trialgpt_jax import UserError
from trialgpt_jax.parallel.sharding import batch_sharding, local_blocks, make_mesh, shard_shapes
from trialgpt_jax.training.metrics import parameter_count
from trialgpt_jax.training.program import Program

# Each mesh runs 50 steps, the last 25 of them from the checkpoint that the previous mesh of the list saved at step 25.
_FIFTY_STEPS = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from test_train_step import batch, build, copied, recipe
from trialgpt_jax.training.checkpoint import Checkpoints

def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

folder, results, before = sys.argv[1], {}, None
for data, fsdp, tensor in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
    config = recipe(sys.argv[2])
    config.model.update({"n_head": 8, "n_kv_head": 0})
    config.train.update({"steps": 50, "dtype": "float32"})
    if config.optim.name == "muon":  # at 0.03 the rounding of float32 grows to 7e-5 of the loss in 46 steps
        config.optim.groups.matrices.learning_rate = 0.01
    config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    program, state, put = build(config, data * fsdp * tensor)
    name, losses = f"{data}x{fsdp}x{tensor}", []
    checkpoints = Checkpoints(f"{folder}/{name}", say=print)
    for k in range(50):
        if k == 25:
            checkpoints.save(25, state)
            checkpoints.wait()
            own = copied(state)
            layout = program.layout
            if before:
                source, saved = before
                state = source.restore(25, layout)
                assert same_bits(copied(state), saved), f"the state that {name} restored is not the one saved"
                params = source.restore(25, {"params": layout.params})["params"]
                assert same_bits(copied(params), saved.params)
                placed = zip(jax.tree.leaves(params), jax.tree.leaves(layout.params), strict=True)
                assert all(a.sharding == b.sharding for a, b in placed)
            before = checkpoints, own
        state, metrics = program.train_step(state, put(batch(k % 7)))
        losses.append(float(metrics["loss"]))
    results[name] = losses
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adamw", "every option"])
def test_fifty_steps_are_equal_on_every_mesh_and_each_continues_what_another_saved(recipe, tmp_path):
    _, env = command("train", devices=8)
    argv = [sys.executable, "-c", _FIFTY_STEPS, str(tmp_path), recipe]
    script = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert script.returncode == 0, script.stderr[-2000:]
    results = json.loads(script.stdout.splitlines()[-1])
    one = results.pop("1x1x1")
    assert one[0] - one[-1] > 0.5, "the model must learn, otherwise equal losses prove nothing"
    for mesh, losses in results.items():
        np.testing.assert_allclose(losses, one, rtol=5e-5, err_msg=mesh)


def topology(name, **options):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def test_only_data_runs_between_slices():
    devices = topology("v5e:4x4", num_slices=2)
    mesh = make_mesh({"data": 4, "fsdp": 4, "tensor": 2}, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
    with pytest.raises(UserError, match="mesh.data=1 is not divisible by the 2 slices.*16 chips for mesh.fsdp"):
        make_mesh({"data": 1, "fsdp": 32, "tensor": 1}, devices)
    with pytest.raises(UserError, match="mesh.data=3 is not divisible by the 2 slices"):
        make_mesh({"data": 3, "fsdp": 4, "tensor": 2}, devices)


@pytest.mark.parametrize("sizes", [(16, 1, 1), (4, 4, 1), (2, 2, 4), (1, 1, 16)])
def test_the_hosts_of_a_slice_feed_the_whole_batch(sizes):
    """On a torus the four chips of a host need not be adjacent in the mesh, so their rows need not be either."""
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), topology("v5e:4x4"))
    fed = [local_blocks(batch_sharding(mesh), host) for host in range(4)]
    assert {count for _, count in fed} == {sizes[0] * sizes[1]}
    held = collections.Counter(block for blocks, _ in fed for block in blocks)
    assert sorted(held) == list(range(sizes[0] * sizes[1]))
    for host, (blocks, _) in enumerate(fed):
        rows = mesh.devices.reshape(sizes[0] * sizes[1], sizes[2])
        needs = {i for i, row in enumerate(rows) if any(device.process_index == host for device in row)}
        assert set(blocks) == needs


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    platform: str = "gpu"


def hosts(count, each):
    """Devices of GPU hosts, in an arbitrary order."""
    devices = [Device(id=i, process_index=i // each) for i in range(count * each)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("sizes", [(2, 4, 2), (4, 2, 2), (1, 16, 1), (2, 1, 8), (16, 1, 1)])
def test_tensor_and_if_possible_fsdp_stay_inside_a_host(sizes):
    array = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), hosts(2, 8)).devices
    where = np.vectorize(lambda device: device.process_index)(array)
    assert (where == where[:, :, :1]).all(), "a tensor group has devices of two hosts"
    if sizes[1] * sizes[2] <= 8:
        assert (where == where[:, :1, :1]).all(), "an fsdp group has devices of two hosts"


def test_an_axis_of_length_one_is_not_split():
    """An optimizer may keep one value for each column of a kernel."""
    names = ("layers", "embed", "heads")
    boxed = {
        shape: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, float), names) for shape in ((3, 8, 16), (3, 1, 16))
    }
    placed = shard_shapes(boxed, AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor")))
    assert placed[3, 8, 16].sharding.spec == P(None, "fsdp", "tensor")
    assert placed[3, 1, 16].sharding.spec == P(None, None, "tensor")


def test_axes_that_do_not_fit_the_devices_of_a_host_are_refused():
    with pytest.raises(UserError, match="mesh.tensor=4 does not fit the 6 devices of a process"):
        make_mesh({"data": 3, "fsdp": 1, "tensor": 4}, hosts(2, 6))
    with pytest.raises(UserError, match="mesh.fsdp x mesh.tensor=4 does not fit the 6 devices"):
        make_mesh({"data": 3, "fsdp": 2, "tensor": 2}, hosts(2, 6))


@pytest.mark.slow
def test_the_fsdp_step_on_16_chips_splits_the_state_and_no_activation_spans_the_batch():
    devices = topology("v5e:4x4")
    config = small_config("unused")
    config.model.update({"n_layer": 3, "n_embd": 512, "n_head": 4, "block_size": 384, "vocab_size": 4000})
    config.mesh.update({"data": 1, "fsdp": 16})
    config.train.batch_size = 48
    program = Program(config, devices=devices)
    whole = 12 * parameter_count(program.params_layout)  # float32 parameters and two moments
    assert whole / 16 <= program.train_step.memory_analysis().argument_size_in_bytes < 1.1 * whole / 16
    text = program.train_step.as_text()
    assert "all-gather" in text and "all-to-all" not in text
    # 48 sequences of 384 tokens over 16 chips: each chip has activations of its 3 sequences, and no array of all 48
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)}
    of_batch = {shape for shape in shapes if {48, 384, 385} & set(shape) or 48 * 384 in shape}
    assert any(shape[:2] == (3, 384) for shape in of_batch)
    assert not {shape for shape in of_batch if (48 in shape and (384 in shape or 385 in shape)) or 48 * 384 in shape}
