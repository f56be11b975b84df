"""Loss spikes: the rule against a float64 reference, the rule in the compiled step, and the window in a checkpoint."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call, metrics, overrides, refused, small_config
from test_train import assert_same_bits, final_state
from test_train_step import batch, copied

from trialgpt_jax.parallel.sharding import batch_sharding, put_batch, single_device
from trialgpt_jax.training import spikes
from trialgpt_jax.training.program import Program


def decide(pairs, sigmas, window=128):
    """The rule in plain numpy: for each (loss, grad_norm) whether the step is skipped."""
    good, skips = [], []
    for pair in np.asarray(pairs, np.float64):
        last = np.array(good[-window:])
        skip = not np.isfinite(pair).all()
        if not skip and len(good) >= window:
            skip = bool((pair > last.mean(0) + sigmas * last.std(0)).any())
        skips.append(skip)
        if not skip:
            good.append(pair)
    return skips


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_equals_a_float64_reference(seed):
    rng = np.random.default_rng(seed)
    pairs = np.abs(rng.normal(3.0, 0.2, (500, 2))).astype(np.float32)
    pairs[rng.integers(0, 500, 40), rng.integers(0, 2, 40)] *= rng.uniform(1.1, 5, 40)
    pairs[rng.integers(0, 500, 20), rng.integers(0, 2, 20)] = rng.choice([np.nan, np.inf, -np.inf], 20)
    sigmas = 2.0 + seed

    @jax.jit
    def step(window, pair):
        good = jnp.isfinite(pair).all() & ~spikes.is_spike(window, *pair, sigmas)
        return spikes.push(window, *pair, good), ~good

    window, skips = jax.lax.scan(step, spikes.Window.empty(), pairs)
    expected = decide(pairs, sigmas)
    assert skips.tolist() == expected
    assert not any(expected[i] for i in range(100) if np.isfinite(pairs[i]).all()), (
        "a step is skipped before the window is full"
    )
    kept = pairs[~np.array(expected)][-128:]
    assert sorted(window.values[0].tolist()) == sorted(kept[:, 0].tolist()) and np.isfinite(window.values).all()
    assert int(window.good_steps) == 500 - sum(expected)


@pytest.mark.parametrize("row", [0, 1], ids=["loss", "gradient norm"])
def test_the_limit_is_the_mean_plus_population_standard_deviations_of_a_full_window(row):
    """128 values of mean 2 and population standard deviation 1; with n - 1 in the denominator it would be 1.004."""
    values = np.zeros((2, 128), np.float32)
    values[row] = [1.0, 3.0] * 64
    window = spikes.Window(jnp.asarray(values), jnp.int32(128))
    for sigmas in (2.0, 6.0):
        for value, expected in ((2 + sigmas - 0.001, False), (2 + sigmas + 0.005, True), (-9.0, False)):
            pair = [0.0, 0.0]
            pair[row] = value
            assert bool(spikes.is_spike(window, *map(jnp.float32, pair), sigmas)) == expected, (sigmas, value)
            assert not spikes.is_spike(spikes.Window(window.values, jnp.int32(127)), *map(jnp.float32, pair), sigmas)


def test_the_compiled_step_skips_spikes_and_no_other_step():
    config = small_config("unused")
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"})
    config.seed, config.train.skip_spikes = 0, 6.0
    program = Program(config, mesh=single_device())
    state = program.init_state()
    pairs, skips = [], []
    for k in range(290):
        rows = batch(k) % 64
        if k in (40, 250, 270):  # ids of another distribution; at step 40 the window is not full
            rows = batch(k) % 64 + 400
        healthy = np.array(state.params["ln_f"]["scale"])
        if k == 260:
            state.params["ln_f"]["scale"] = jnp.full_like(healthy, jnp.nan)
        before = copied(state)
        state, values = program.train_step(state, put_batch(rows, batch_sharding(program.mesh)))
        pairs.append([float(values["loss"]), float(values["grad_norm"])])
        skips.append(int(state.skipped) > before.skipped)
        if skips[-1]:
            jax.tree.map(np.testing.assert_array_equal, before.params, copied(state.params))
            jax.tree.map(np.testing.assert_array_equal, before.opt_state, copied(state.opt_state))
            jax.tree.map(np.testing.assert_array_equal, before.window, copied(state.window))
            assert int(state.skipped_in_a_row) == before.skipped_in_a_row + 1
        if k == 260:
            state.params["ln_f"]["scale"] = jnp.asarray(healthy)
    assert skips == decide(pairs, 6.0)
    assert [k for k, skipped in enumerate(skips) if skipped] == [250, 260, 270]


def test_without_skip_spikes_neither_state_nor_program_has_a_window():
    config = small_config("unused")
    config.model.n_layer = 3  # otherwise the norms have the window's shape too, [2, 128]
    programs = {}
    for sigmas in (0.0, 6.0):
        config.train.skip_spikes = sigmas
        programs[sigmas] = Program(config.copy_and_resolve_references(), mesh=single_device())
    off, on = (len(jax.tree.leaves(program.layout)) for program in programs.values())
    assert on == off + 2
    for sigmas, program in programs.items():
        assert (f"f32[2,{spikes.WINDOW}]" in program.train_step.as_text()) == bool(sigmas)


@pytest.mark.slow
def test_resume_in_the_middle_of_a_window_is_exact(config, tmp_path, default_file):
    config.train.update({"steps": 200, "skip_spikes": 1.5})
    config.optim.learning_rate = 1e-5  # then the loss varies with the batch only, and often exceeds 1.5 sigma
    config.checkpoint.update({"every_steps": 0})
    config.eval.every_steps = 0

    def train(workdir, *arguments, **options):
        return call(
            "train", f"--config={default_file}", *overrides(config), f"--workdir={workdir}", *arguments, **options
        )

    def stop(line):
        if line.startswith("step 160/"):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    reported = [line for line in whole.stderr.splitlines() if "are a spike (train.skip_spikes=1.5)" in line]
    steps = [int(line.split(":")[0].split()[1]) for line in reported]
    assert 128 < min(steps) < 160 and max(steps) > 165
    assert [int(line.split(" of batch ")[1].split()[0]) + 1 for line in reported] == steps
    assert metrics(tmp_path / "whole")[-1]["skipped"] == len(reported)
    assert train(tmp_path / "parts", on_line=stop).returncode == 75
    rest = train(tmp_path / "parts")
    assert rest.returncode == 0 and "resumed from checkpoint 16" in rest.stderr, rest.stderr
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))

    # turning it on or off needs --allow_config_change; turned on, it starts with an empty window
    config.train.steps = 202
    for sigmas in (0.0, 6.0):
        config.train.skip_spikes = sigmas
        refused(train(tmp_path / "parts", "--allow_config_change=train.steps"), "train.skip_spikes")
        result = train(tmp_path / "parts", "--allow_config_change=train.steps,train.skip_spikes")
        assert result.returncode == 0, result.stderr
        config.train.steps += 2
