"""The compiled step: golden numbers, accumulation, remat, dropout, steps that are not finite, and meshes."""

import json
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import command, small_config

from trialgpt_jax import UserError
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.training.program import Program


@pytest.fixture(autouse=True)
def compile_quickly(request, monkeypatch):
    """Turns LLVM's optimisations off, which are half of the compile time; XLA's passes are the same."""
    quick = "golden" not in request.node.name
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))  # for child processes
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build(config, devices=1):
    """The program on the first CPU devices, its initial state, and a function that puts a batch on its mesh."""
    program = Program(config, devices=jax.devices()[:devices])
    return program, program.init_state(), lambda rows: put_batch(rows, batch_sharding(program.mesh))


def batch(k=0):
    return np.random.default_rng(k).integers(0, 512, (8, 33)).astype(np.int32)


def copied(state):
    return jax.tree.map(np.array, state)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("adamw", {"loss": 6.2424936, "grad_norm": 0.7734795, "update_norm": 0.10339455}),
        ("muon", {"loss": 6.2424936, "grad_norm": 0.7734795, "update_norm": 0.09748404}),
    ],
)
def test_golden_numbers_of_one_step(name, golden):
    """May change only with the initialisation or the definition of the model or optimizer; the commit must say so."""
    config = small_config("unused")
    config.optim.name = name
    program, state, put = build(config)
    before = copied(state.params)
    state, metrics = program.train_step(state, put(batch()))
    update_norm = optax.global_norm(jax.tree.map(jnp.subtract, state.params, before))
    got = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "update_norm": update_norm}
    for key, value in golden.items():
        np.testing.assert_allclose(got[key], value, rtol=2e-5, err_msg=f"{key}: {dict(got)}")


def test_accumulation_changes_nothing_but_rounding():
    results = []
    for n in (1, 2, 4):
        config = small_config("unused")
        config.train.accumulate_steps = n
        program, state, put = build(config)
        losses = []
        for k in range(5):
            state, metrics = program.train_step(state, put(batch(k)))
            losses.append(float(metrics["loss"]))
        results.append((losses, copied(state.params)))
    for losses, params in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(results[0][1])):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_scan_unroll_and_remat_change_nothing_but_rounding():
    results = []
    for unroll, remat in ((1, "none"), (2, "none"), (1, "dots"), (1, "block")):
        config = small_config("unused")
        config.train.scan_unroll, config.train.remat = unroll, remat
        config.model.dropout = 0.1  # recomputation must draw the same numbers
        program, state, put = build(config)
        shapes = jax.tree.map(lambda x: x.shape, state.params)
        for k in range(3):
            state, metrics = program.train_step(state, put(batch(k)))
        results.append((shapes, float(metrics["loss"]), float(metrics["grad_norm"])))
    for other in results[1:]:
        assert other[0] == results[0][0]
        np.testing.assert_allclose(other[1:], results[0][1:], rtol=1e-5)


def test_dropout_depends_on_seed_and_step():
    losses = []
    for seed in (1, 2):
        config = small_config("unused")
        config.model.dropout = 0.3
        config.optim.learning_rate = 0.0  # only the step changes
        config.seed = seed
        program, state, put = build(config)
        for _ in range(2):
            state, metrics = program.train_step(state, put(batch()))
            losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 4
    program, state, put = build(config)
    assert float(program.train_step(state, put(batch()))[1]["loss"]) == losses[2], "the same seed and step"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name):
    config = small_config("unused")
    config.optim.name = name
    program, state, put = build(config)
    state, _ = program.train_step(state, put(batch()))
    poisoned = jax.tree.map(jnp.array, state)
    poisoned.params["ln_f"]["scale"] = poisoned.params["ln_f"]["scale"].at[3].set(jnp.nan)
    before = copied(poisoned)
    after, metrics = program.train_step(poisoned, put(batch(1)))
    assert not np.isfinite(metrics["loss"])
    unchanged = after.params, after.opt_state
    for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves((before.params, before.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    healed = after.replace(params=jax.tree.map(jnp.nan_to_num, after.params))
    healed, metrics = program.train_step(healed, put(batch(2)))
    assert (int(healed.step), int(healed.skipped), int(healed.skipped_in_a_row)) == (3, 1, 0)
    # skipped steps do not advance the schedule: the rate of the warmup's second update, not of its third
    np.testing.assert_allclose(metrics["lr"], 3e-3 * 2 / 6, rtol=1e-6)


_MESHES = """
import collections, json, re, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from conftest import small_config
from test_train_step import batch, build, copied
results = {}
for data, fsdp, tensor in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)):
    config = small_config("unused")
    config.optim.name = "muon" if (data, fsdp, tensor) in ((1, 1, 1), (2, 2, 2)) else "adamw"
    for name in ({"adamw", "muon"} if (data, fsdp, tensor) == (1, 1, 1) else {config.optim.name}):
        config.optim.name = name
        config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
        program, state, put = build(config, data * fsdp * tensor)
        losses = []
        for k in range(8):
            state, metrics = program.train_step(state, put(batch(k)))
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        shard = state.params["blocks"]["mlp"]["c_fc"]["kernel"].addressable_shards[0].data.size
        kinds = collections.Counter(re.findall(r" (all-to-all|collective-permute)[.(]", program.train_step.as_text()))
        results[f"{data}x{fsdp}x{tensor} {name}"] = [losses, shard, dict(kinds)]
print(json.dumps(results))
"""


def test_every_mesh_gives_the_same_losses_and_splits_the_state():
    _, env = command("train", devices=8)
    argv = [sys.executable, "-c", _MESHES]
    script = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert script.returncode == 0, script.stderr[-2000:]
    results = json.loads(script.stdout.splitlines()[-1])
    for mesh, (losses, shard, kinds) in results.items():
        sizes, name = mesh.split()
        _, fsdp, tensor = map(int, sizes.split("x"))
        whole, shard_of_one, _ = results[f"1x1x1 {name}"]
        np.testing.assert_allclose(losses, whole, rtol=2e-5, err_msg=mesh)
        assert shard * fsdp * tensor == shard_of_one, mesh
        assert "all-to-all" not in kinds, (mesh, kinds)


def test_on_cpu_a_command_waits_for_each_step():
    """So that the time of a step is counted for that step."""
    script = """
import jax, jax.numpy as jnp
from trialgpt_jax import cli
from trialgpt_jax.config import default_config
from trialgpt_jax.parallel import accelerators
with cli.start({}, default_config()):
    x = jnp.ones((4096, 16))
    step = jax.jit(lambda x: jnp.sin(x @ x.T) @ x).lower(x).compile()
    for _ in range(4):
        x = step(x)
        assert x.is_ready() and not accelerators.dispatches_ahead("cpu")
"""
    _, env = command("train")
    script = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stderr[-2000:]


def test_accelerators_dispatch_ahead():
    assert accelerators.dispatches_ahead("gpu") and accelerators.dispatches_ahead("tpu")


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_float64_without_x64_is_refused(field):
    config = small_config("unused")
    config.train[field] = "float64"
    assert not jax.config.jax_enable_x64
    with pytest.raises(UserError, match=rf"(?i)train\.{field}\b.*float64.*x64"):
        Program(config, devices=jax.devices()[:1])
    with jax.enable_x64(True):
        assert jax.tree.leaves(Program(config, devices=jax.devices()[:1]).params_layout)


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


@needs_glibc
def test_on_cpu_a_process_keeps_the_memory_that_it_frees():
    script = """
import resource, sys
import numpy as np
from trialgpt_jax.parallel.host_memory import MEMORY
if sys.argv[1] == "keep":
    MEMORY.reuse()
for _ in range(3):  # the first two make the heap grow to its size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(64 * 2**20, 1, np.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    _, env = command("train")
    env.pop("GLIBC_TUNABLES", None)
    faults = {}
    for mode in ("keep", "default"):
        argv = [sys.executable, "-c", script, mode]
        faults[mode] = int(subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout)
    assert faults["default"] > 10 and faults["keep"] < 5, faults


@needs_glibc
def test_on_cpu_a_process_keeps_the_memory_of_a_step_or_two():
    script = r"""
import re
import jax, jax.numpy as jnp
from trialgpt_jax.parallel.host_memory import MEMORY
jax.config.update("jax_cpu_enable_async_dispatch", False)
MEMORY.reuse()
def megabytes(name):
    return int(re.search(name + r":\s*(\d+)", open("/proc/self/status").read())[1]) / 1e3
x = jnp.ones((8192, 16))
step = jax.jit(lambda x: jnp.sin(x @ x.T) @ x).lower(x).compile()
temporaries = step.memory_analysis().temp_size_in_bytes / 1e6
before = megabytes("VmHWM")
MEMORY.reserve(step, slack=0)
for _ in range(12):
    x = step(x)
    MEMORY.trim()
    assert x.is_ready()
peak = megabytes("VmHWM")
MEMORY._limit = 0
MEMORY.trim()
print(temporaries, peak - before, megabytes("VmRSS") - before)
"""
    _, env = command("train")
    argv = [sys.executable, "-c", script]
    out = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    temporaries, grown, left = map(float, out.split())
    assert temporaries > 250 and 0.9 * temporaries < grown < 2.6 * temporaries and left < 0.1 * temporaries, out
