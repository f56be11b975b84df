"""Loss spikes: the rule against a plain float64 model of it, inside the compiled step, and the window it remembers."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call, metrics, overrides, refused, small_config
from test_train import assert_same_bits, final_state
from test_train_step import batch, copied

from trialgpt_jax.config import gpt_config
from trialgpt_jax.parallel.sharding import batch_sharding, make_mesh, put_batch
from trialgpt_jax.training import spikes
from trialgpt_jax.training import train_step as steps_lib
from trialgpt_jax.training.optimizer import make_optimizer


def decide(pairs, sigmas, window=128):
    """The rule: True for each (loss, grad_norm) that is to be skipped."""
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
def test_the_rule_is_the_plain_one(seed):
    rng = np.random.default_rng(seed)
    pairs = np.abs(rng.normal(3.0, 0.2, (500, 2))).astype(np.float32)
    pairs[rng.integers(0, 500, 40), rng.integers(0, 2, 40)] *= rng.uniform(1.1, 5, 40)
    pairs[rng.integers(0, 500, 20), rng.integers(0, 2, 20)] = rng.choice([np.nan, np.inf, -np.inf], 20)
    sigmas = 2.0 + seed

    @jax.jit
    def step(window, pair):
        good = jnp.isfinite(pair).all() & ~spikes.stands_out(window, *pair, sigmas)
        return spikes.push(window, *pair, good), ~good

    window, skips = jax.lax.scan(step, spikes.Window.empty(), pairs)
    expected = decide(pairs, sigmas)
    assert skips.tolist() == expected
    assert not any(expected[i] for i in range(100) if np.isfinite(pairs[i]).all()), "before the window is full"
    kept = pairs[~np.array(expected)][-128:]
    assert sorted(window.values[0].tolist()) == sorted(kept[:, 0].tolist()) and np.isfinite(window.values).all()
    assert int(window.good_steps) == 500 - sum(expected)


def test_the_compiled_step_leaves_out_a_spike_and_nothing_else():
    config = small_config("unused")
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"})
    gpt, optimizer = gpt_config(config, "cpu"), make_optimizer(config.optim, config.train.steps)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    state = steps_lib.create_state(gpt, optimizer, 0, mesh, 6.0)
    step = steps_lib.compile_train_step(
        gpt, optimizer, mesh, batch_size=8, accumulate_steps=1, seed=0, skip_spikes=6.0
    )  # fmt: skip
    pairs, skips = [], []
    for k in range(290):
        rows = batch(k) % 64
        if k in (40, 250, 270):  # another language; at 40 the window is not full
            rows = batch(k) % 64 + 400
        healthy = np.array(state.params["ln_f"]["scale"])
        if k == 260:
            state.params["ln_f"]["scale"] = jnp.full_like(healthy, jnp.nan)
        before = copied(state)
        state, values = step(state, put_batch(rows, batch_sharding(mesh)))
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


def test_off_it_leaves_no_trace_in_state_or_program():
    config = small_config("unused")
    config.model.n_layer = 3  # so that nothing else is [2, 128]
    gpt, optimizer = gpt_config(config, "cpu"), make_optimizer(config.optim, config.train.steps)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    layouts = [steps_lib.state_layout(gpt, optimizer, mesh, sigmas) for sigmas in (0.0, 6.0)]
    assert len(jax.tree.leaves(layouts[1])) == len(jax.tree.leaves(layouts[0])) + 2
    for sigmas in (0.0, 6.0):
        step = steps_lib.compile_train_step(
            gpt, optimizer, mesh, batch_size=8, accumulate_steps=1, seed=0, skip_spikes=sigmas
        )  # fmt: skip
        assert (f"f32[2,{spikes.WINDOW}]" in step.as_text()) == bool(sigmas)


def test_resume_in_the_middle_of_a_window_is_exact(config, tmp_path, default_file):
    config.train.update({"steps": 200, "skip_spikes": 1.5})
    config.optim.learning_rate = 1e-5  # so that the loss varies with the batch alone, and often beyond 1.5 sigma
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
    told = [line for line in whole.stderr.splitlines() if "are a spike (train.skip_spikes=1.5)" in line]
    steps = [int(line.split(":")[0].split()[1]) for line in told]
    assert 128 < min(steps) < 160 and max(steps) > 165
    assert [int(line.split(" of batch ")[1].split()[0]) + 1 for line in told] == steps
    assert metrics(tmp_path / "whole")[-1]["skipped"] == len(told)
    assert train(tmp_path / "parts", on_line=stop).returncode == 75
    rest = train(tmp_path / "parts")
    assert rest.returncode == 0 and "resumed from checkpoint 16" in rest.stderr, rest.stderr
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))

    # switched on or off, it makes another run, which has to be asked for; then the window begins anew, or ends
    config.train.steps = 202
    for sigmas in (0.0, 6.0):
        config.train.skip_spikes = sigmas
        refused(train(tmp_path / "parts", "--allow_config_change=train.steps"), "train.skip_spikes")
        result = train(tmp_path / "parts", "--allow_config_change=train.steps,train.skip_spikes")
        assert result.returncode == 0, result.stderr
        config.train.steps += 2
