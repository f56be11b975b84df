"""The compiled step: golden numbers, accumulation, remat, dropout, steps that are not finite, and meshes."""

import functools
import json
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, command, every_option, small_config
from model_options import random_params, reference_logits

from trialgpt_jax import UserError, cli
from trialgpt_jax.config import set_precision
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.train_step import eval_step, nonfinite, train_step


def build(config, devices=1):
    """The program on the first CPU devices, its initial state, and a function that puts a batch on its mesh."""
    program = Program(config, devices=jax.devices()[:devices])
    return program, program.init_state(), lambda rows: put_batch(rows, batch_sharding(program.mesh))


def batch(k=0):
    return np.random.default_rng(k).integers(0, 512, (8, 33)).astype(np.int32)


def recipe(name):
    """`small_config` with an optimizer by name, with every option, or with the model and optimizer of a preset."""
    config = small_config("unused")
    if name == "every option":
        return every_option(config)
    if name == "modern.py":
        _, preset = cli.parse(["train", f"--config={ROOT}/configs/modern.py:124m"], "", {})
        preset.model.update({size: config.model[size] for size in ("vocab_size", "block_size", "n_layer", "n_embd")})
        preset.model.n_head = 2
        config.update({"model": preset.model, "optim": preset.optim})
        return config
    config.optim.name = name
    return config


@pytest.fixture(scope="module")
def every_option_program():
    """A program that is compiled once, and a function that puts a batch on its mesh."""
    program, _, put = build(recipe("every option"))
    return program, put


def copied(state):
    return jax.tree.map(np.array, state)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("adamw", {"loss": 6.2424936, "grad_norm": 0.7734795, "update_norm": 0.10339455}),
        ("muon", {"loss": 6.2424936, "grad_norm": 0.7734795, "update_norm": 0.10384761}),
        ("modern.py", {"loss": 6.2383265, "grad_norm": 0.35108015, "update_norm": 0.5120059}),
        ("every option", {"loss": 6.240873, "grad_norm": 0.49935722, "update_norm": 0.1884222}),
    ],
)
def test_golden_numbers_of_one_step(name, golden):
    """May change only with the initialisation or the definition of the model or optimizer; the commit must say so."""
    program, state, put = build(recipe(name))
    before = copied(state.params)
    state, metrics = program.train_step(state, put(batch()))
    update_norm = optax.global_norm(jax.tree.map(jnp.subtract, state.params, before))
    got = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "update_norm": update_norm}
    for key, value in golden.items():
        np.testing.assert_allclose(got[key], value, rtol=2e-5, err_msg=f"{key}: {dict(got)}")


def test_accumulation_changes_nothing_but_rounding():
    results = []
    for n in (1, 4):
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
    for unroll, remat in ((1, "none"), (2, "dots"), (1, "block")):
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


def test_with_every_option_a_restored_state_continues_with_the_same_bits(every_option_program, tmp_path):
    program, put = every_option_program
    state = program.init_state()
    for k in range(2):
        state, _ = program.train_step(state, put(batch(k)))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(2, state)
    checkpoints.wait()
    ends = []
    for start in (state, checkpoints.restore(2, program.layout)):
        for k in (2, 3):
            start, _ = program.train_step(start, put(batch(k)))
        ends.append([leaf.tobytes() for leaf in jax.tree.leaves(copied(start))])
    assert ends[0] == ends[1] and len(ends[0]) == 34


@pytest.mark.parametrize("name", ["adamw", "every option"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name, every_option_program):
    if name == "adamw":
        program, state, put = build(recipe(name))
    else:
        program, put = every_option_program
        state = program.init_state()
    state, _ = program.train_step(state, put(batch()))
    poisoned = jax.tree.map(jnp.array, state)
    head = poisoned.params["lm_head" if "lm_head" in poisoned.params else "wte"]
    head["embedding"] = head["embedding"].at[3, 3].set(jnp.nan)
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


def test_finite_gradients_with_an_update_that_is_not_finite_change_nothing_and_are_counted():
    """NaN or infinite updates, a finite update whose sum with the parameter overflows, and a moment that overflows."""
    config = small_config("unused")
    config.model.vocab_size = 500  # row 505 is padding, so the loss does not depend on it
    config.optim.learning_rate = 2.0  # beyond what `always_finite` has a bound for
    program = Program(config, devices=jax.devices()[:1])

    def update(updates, state, params):
        zeros = jax.tree.map(jnp.zeros_like, updates)
        zeros["wte"]["embedding"] = zeros["wte"]["embedding"].at[505, 3].set(state["update"])
        return zeros, state | {"moment": state["moment"].at[1].multiply(100)}

    program.optimizer = optax.GradientTransformation(lambda params: {"update": 0.0, "moment": jnp.zeros(3)}, update)
    state = program.init_state()
    embedding = np.array(state.params["wte"]["embedding"])
    embedding[505, 3] = 3e38
    for value, moment in ((np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (1e38, 1.0), (0.0, 1e37), (0.0, np.nan)):
        opt_state = {"update": jnp.float32(value), "moment": jnp.full(3, moment, jnp.float32)}
        params = state.params | {"wte": {"embedding": jnp.asarray(embedding)}}
        before = copied(state.replace(params=params, opt_state=opt_state))
        rows = put_batch(batch() % 500, batch_sharding(program.mesh))
        state, metrics = program.train_step(jax.tree.map(jnp.asarray, before), rows)
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and not metrics["update_finite"]
        jax.tree.map(np.testing.assert_array_equal, before.params, copied(state.params))
        jax.tree.map(np.testing.assert_array_equal, before.opt_state, copied(state.opt_state))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (6, 6, 6)
    fine = {"update": jnp.float32(1.0), "moment": jnp.ones(3)}
    state, metrics = program.train_step(state.replace(opt_state=fine), rows)
    assert metrics["update_finite"] and int(metrics["skipped_in_a_row"]) == 0 and state.opt_state["moment"][1] == 100


@pytest.mark.parametrize(
    ("name", "changes"), [("every option", {"eps": 0.0}), ("adamw", {"learning_rate": 1e30})], ids=["eps", "rate"]
)
def test_extreme_settings_keep_every_value_finite(name, changes):
    config = recipe(name)
    config.model.update({"vocab_size": 300, "tie_embeddings": False})  # 84 padding rows, and ids that no batch has
    config.optim.update({"warmup_steps": 0, "clip_norm": 0.0} | changes)
    program, state, put = build(config)
    for k in range(4):
        state, metrics = program.train_step(state, put(batch(k) % 200))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(copied(state))), f"step {k}"
    assert (int(metrics["skipped"]) == 0) == (name != "adamw")
    assert not np.asarray(state.params["wte"]["embedding"][300:]).any()


def test_nonfinite_names_each_array_and_counts_its_values():
    state = copied(build(small_config("unused"))[1])
    assert nonfinite(state) == {}
    rng = np.random.default_rng(0)
    for value in (np.nan, np.inf, -np.inf):
        for size in (1, 7, 1000, 100_000):  # one value anywhere, because a vectorised reduction treats the ends apart
            array = np.zeros(size, np.float32)
            array[rng.integers(size)] = value
            assert nonfinite({"a": np.arange(5), "b": array, "c": np.ones((2, 0))}) == {"b": 1}
    state.params["ln_f"]["scale"][[0, 31]] = np.nan
    state.params["wte"]["embedding"][7, 3] = -np.inf
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan) if x.ndim else x, state.opt_state)
    found = nonfinite(state.replace(opt_state=bad))
    assert (found.pop("params/ln_f/scale"), found.pop("params/wte/embedding")) == (2, 1)
    assert len(found) == 2 * len(jax.tree.leaves(state.params)) and all(n.startswith("opt_state/") for n in found)
    assert sum(found.values()) == 2 * sum(x.size for x in jax.tree.leaves(state.params))


def test_every_microbatch_has_its_own_dropout():
    losses = []
    for n_equal in (1, 2):
        config = small_config("unused")
        config.model.update({"n_layer": 1, "dropout": 0.5})
        config.train.update({"batch_size": 4 * n_equal, "accumulate_steps": n_equal})
        program, state, put = build(config)
        rows = put(np.tile(batch()[:1], (4 * n_equal, 1)))  # equal sequences: microbatches differ in dropout only
        losses.append(float(program.train_step(state, rows)[1]["loss"]))
    assert abs(losses[1] - losses[0]) > 1e-4


def test_gradients_of_microbatches_are_added_in_float32():
    config = small_config("unused")
    config.train.update({"dtype": "bfloat16", "accumulate_steps": 4})
    program, state, _ = build(config)
    step = functools.partial(train_step, config=program.gpt, optimizer=program.optimizer, accumulate_steps=4, seed=0)
    jaxpr = jax.make_jaxpr(step)(state, batch()).jaxpr
    (loop,) = (e for e in jaxpr.eqns if e.primitive.name in ("scan", "while") and "bf16[4,33]" not in str(e.outvars))
    carried = [v.aval for v in loop.outvars if v.aval.ndim == 3]
    assert len(carried) == 6 and all(aval.dtype == jnp.float32 for aval in carried)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"dtype": "float32"}, "HIGHEST"),
        ({"dtype": "float32", "matmul_precision": "tensorfloat32"}, "HIGH"),
        ({"dtype": "float32", "matmul_precision": "bfloat16"}, "DEFAULT"),
        ({"dtype": "bfloat16"}, "DEFAULT"),
    ],
)
def test_matmuls_of_float32_have_the_precision_that_the_config_names(train, expected):
    """On a GPU they would be TF32 by default, on a TPU bfloat16."""
    config = small_config("unused")
    config.train.update(train)
    before = jax.config.jax_default_matmul_precision
    try:
        set_precision(config)
        program = Program(config, devices=jax.devices()[:1])
        step = functools.partial(train_step, config=program.gpt, optimizer=program.optimizer, seed=0)
        text = jax.jit(functools.partial(step, accumulate_steps=1)).lower(program.layout, batch()).as_text()
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in text.splitlines() if "dot_general" in line]
    assert len(found) > 10
    assert {match[1] if match else "DEFAULT" for match in found} == {expected}


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_evaluation_equals_the_numpy_model_and_leaves_out_rows_that_are_not_valid(softcap):
    config = GPTConfig(vocab_size=61, block_size=8, n_layer=1, n_head=2, n_embd=16, logit_softcap=softcap)
    params = random_params(config)
    tokens_BxU = np.random.default_rng(0).integers(0, 61, (4, 9)).astype(np.int32)
    valid_B = np.array([True, True, False, True])
    total, count = jax.jit(functools.partial(eval_step, config=config))(params, tokens_BxU, valid_B)
    logits = reference_logits(params, config, tokens_BxU[valid_B, :-1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, tokens_BxU[valid_B, 1:, None], -1).sum()
    assert int(count) == 3 * 8
    np.testing.assert_allclose(total, expected, rtol=1e-5)


_MESHES = """
import collections, json, re, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from conftest import small_config
from test_train_step import batch, build, copied
from trialgpt_jax.training.train_step import nonfinite
results = {}
for data, fsdp, tensor in [(1, 1, 1)] + json.loads(sys.argv[1]):
    config = small_config("unused")
    config.optim.name = "muon" if (data, fsdp, tensor) in ((1, 1, 1), (2, 2, 2)) else "adamw"
    for name in ({"adamw", "muon"} if data * fsdp * tensor == 1 else {config.optim.name}):
        config.optim.name = name
        config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
        program, state, put = build(config, data * fsdp * tensor)
        losses = []
        for k in range(8):
            state, metrics = program.train_step(state, put(batch(k)))
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        shard = state.params["blocks"]["mlp"]["c_fc"]["kernel"].addressable_shards[0].data.size
        kinds = collections.Counter(re.findall(r" (all-to-all|collective-permute)[.(]", program.train_step.as_text()))
        finite = nonfinite(state)
        state.params["wte"]["embedding"] = state.params["wte"]["embedding"].at[5].set(np.nan)
        counted = [finite, nonfinite(state)]
        results[f"{data}x{fsdp}x{tensor} {name}"] = [losses, shard, dict(kinds), counted]
print(json.dumps(results))
"""


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param([(1, 8, 1), (2, 2, 2)], id="two"),
        pytest.param([(8, 1, 1), (1, 4, 2), (2, 1, 4)], id="others", marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_losses_and_splits_the_state(meshes):
    _, env = command("train", devices=8)
    argv = [sys.executable, "-c", _MESHES, json.dumps(meshes)]
    script = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert script.returncode == 0, script.stderr[-2000:]
    results = json.loads(script.stdout.splitlines()[-1])
    for mesh, (losses, shard, kinds, counted) in results.items():
        sizes, name = mesh.split()
        _, fsdp, tensor = map(int, sizes.split("x"))
        whole, shard_of_one, *_ = results[f"1x1x1 {name}"]
        np.testing.assert_allclose(losses, whole, rtol=2e-5, err_msg=mesh)
        assert shard * fsdp * tensor == shard_of_one, mesh
        assert ("all-to-all" in kinds) == (mesh == "2x2x2 muon"), (mesh, kinds)  # Muon divides its matrices
        assert counted == [{}, {"params/wte/embedding": 32}], (mesh, counted)


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
