"""Every mesh computes the same, what one saves another continues, and the axes lie on slices and hosts as they should."""

import collections
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import command

from trialgpt_jax import UserError
from trialgpt_jax.parallel.sharding import batch_sharding, local_blocks, make_mesh

# Each mesh runs 50 steps, the last 25 of them from the checkpoint that the mesh before it in the list has left at step 25.
_FIFTY_STEPS = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from conftest import small_config
from test_train_step import batch, build, copied
from trialgpt_jax.config import gpt_config
from trialgpt_jax.training import train_step as steps
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.optimizer import make_optimizer

def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

folder, results, before = sys.argv[1], {}, None
for data, fsdp, tensor in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
    config = small_config("unused")
    config.model.n_head = 8
    config.train.update({"steps": 50, "dtype": "float32"})
    config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    state, step, put, mesh = build(config, data * fsdp * tensor)
    name, losses = f"{data}x{fsdp}x{tensor}", []
    checkpoints = Checkpoints(f"{folder}/{name}", say=print)
    for k in range(50):
        if k == 25:
            checkpoints.save(25, state)
            checkpoints.wait()
            mine = copied(state)
            gpt = gpt_config(config, "cpu")
            layout = steps.state_layout(gpt, make_optimizer(config.optim, 50), mesh)
            if before:
                source, saved = before
                state = source.restore(25, layout)
                assert same_bits(copied(state), saved), f"the state that {name} restored is not the one saved"
                params = source.restore(25, {"params": layout.params})["params"]
                assert same_bits(copied(params), saved.params)
                assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(layout.params)))
            before = checkpoints, mine
        state, metrics = step(state, put(batch(k % 7)))
        losses.append(float(metrics["loss"]))
    results[name] = losses
print(json.dumps(results))
"""


def test_fifty_steps_are_equal_on_every_mesh_and_each_continues_what_another_saved(tmp_path):
    _, env = command("train", devices=8)
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time
    argv = [sys.executable, "-c", _FIFTY_STEPS, str(tmp_path)]
    script = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert script.returncode == 0, script.stderr[-2000:]
    results = json.loads(script.stdout.splitlines()[-1])
    one = results.pop("1x1x1")
    assert one[0] - one[-1] > 0.5, "it should learn, or the losses show nothing"
    for mesh, losses in results.items():
        np.testing.assert_allclose(losses, one, rtol=5e-5, err_msg=mesh)


def topology(name, **options):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def test_between_slices_only_data_runs():
    devices = topology("v5e:4x4", num_slices=2)
    mesh = make_mesh({"data": 4, "fsdp": 4, "tensor": 2}, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
    with pytest.raises(UserError, match="mesh.data=1 is not divisible by the 2 slices.*16 chips for mesh.fsdp"):
        make_mesh({"data": 1, "fsdp": 32, "tensor": 1}, devices)
    with pytest.raises(UserError, match="mesh.data=3 is not divisible by the 2 slices"):
        make_mesh({"data": 3, "fsdp": 4, "tensor": 2}, devices)


@pytest.mark.parametrize("sizes", [(16, 1, 1), (4, 4, 1), (2, 2, 4), (1, 1, 16)])
def test_the_rows_that_the_hosts_of_a_slice_feed_are_the_whole_batch(sizes):
    """On a torus the four chips of a host need not be neighbours in the mesh, so their rows need not be adjacent."""
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
    """Devices of GPU hosts as jax lists them, in an order of their own."""
    devices = [Device(id=i, process_index=i // each) for i in range(count * each)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("sizes", [(2, 4, 2), (4, 2, 2), (1, 16, 1), (2, 1, 8), (16, 1, 1)])
def test_tensor_and_then_fsdp_stay_inside_a_host(sizes):
    array = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), hosts(2, 8)).devices
    where = np.vectorize(lambda device: device.process_index)(array)
    assert (where == where[:, :, :1]).all(), "a tensor group has devices of two hosts"
    if sizes[1] * sizes[2] <= 8:
        assert (where == where[:, :1, :1]).all(), "an fsdp group has devices of two hosts"


def test_axes_that_do_not_go_with_the_devices_of_a_host_are_refused():
    with pytest.raises(UserError, match="mesh.tensor=4 does not go with the 6 devices of a process"):
        make_mesh({"data": 3, "fsdp": 1, "tensor": 4}, hosts(2, 6))
    with pytest.raises(UserError, match="mesh.fsdp x mesh.tensor=4 does not go with the 6 devices"):
        make_mesh({"data": 3, "fsdp": 2, "tensor": 2}, hosts(2, 6))


def test_the_fsdp_step_on_16_chips_splits_the_state_and_has_no_all_to_all_and_no_whole_activation():
    from conftest import small_config

    from trialgpt_jax.config import gpt_config
    from trialgpt_jax.training.metrics import parameter_count
    from trialgpt_jax.training.optimizer import make_optimizer
    from trialgpt_jax.training.train_step import compile_train_step, params_layout

    devices = topology("v5e:4x4")
    config = small_config("unused")
    config.model.update({"n_layer": 3, "n_embd": 512, "n_head": 4, "block_size": 384, "vocab_size": 4000})
    gpt = gpt_config(config, "tpu")
    mesh = make_mesh({"data": 1, "fsdp": 16, "tensor": 1}, devices)
    compiled = compile_train_step(
        gpt, make_optimizer(config.optim, 20), mesh, batch_size=48, accumulate_steps=1, seed=0
    )
    whole = 12 * parameter_count(params_layout(gpt, mesh))  # float32 parameters and two moments
    assert whole / 16 <= compiled.memory_analysis().argument_size_in_bytes < 1.1 * whole / 16
    program = compiled.as_text()
    assert "all-gather" in program and "all-to-all" not in program
    # 48 sequences of 384 tokens over 16 chips: every chip has 3 of them, and nothing that is made from all 48
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", program)}
    of_batch = {shape for shape in shapes if {48, 384, 385} & set(shape) or 48 * 384 in shape}
    assert any(shape[:2] == (3, 384) for shape in of_batch)
    assert not {shape for shape in of_batch if (48 in shape and (384 in shape or 385 in shape)) or 48 * 384 in shape}
