"""The clock of a run: training time, rates, and a device that blocks the host while it runs."""

import json
import threading
import time

import numpy as np
import pytest
from conftest import call, overrides

from trialgpt_jax.parallel import accelerators
from trialgpt_jax.training import meter as meter_lib
from trialgpt_jax.training.meter import Completions, Meter
from trialgpt_jax.training.program import Program


class Clock:
    """Replaces the module `time` of meter.py."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter_lib, "time", clock)
    return clock


def test_the_meter_excludes_the_time_between_a_complete_step_and_a_restart(clock):
    meter = Meter(tokens_per_step=100, flops_per_token=1.0, peak_flops=None, seconds=7.0)
    clock.now += 50  # compilation
    meter.restart(10)
    clock.now += 2
    meter.complete(11, clock.now)
    clock.now += 30  # evaluation
    meter.restart(11)
    clock.now += 4
    meter.complete(12, clock.now)
    assert meter.seconds == 7.0 + 2 + 4
    assert meter.rates() == {"step_seconds": 3.0, "tokens_per_second": 100 / 3}


def test_the_meter_gives_rates_since_the_last_call(clock):
    meter = Meter(tokens_per_step=100, flops_per_token=1.0, peak_flops=None)
    meter.restart(0)
    for step, seconds in ((1, 1.0), (2, 3.0)):
        clock.now += seconds
        meter.complete(step, clock.now)
    assert meter.rates()["step_seconds"] == 2.0
    clock.now += 0.5
    meter.complete(3, clock.now)
    assert meter.rates()["tokens_per_second"] == 200
    clock.now += 8.0
    meter.complete(5, clock.now)  # two steps at once
    assert meter.rates()["step_seconds"] == 4.0
    assert meter.seconds == 12.5


def test_the_meter_gives_mfu_only_if_the_peak_is_known(clock):
    for peak, expected in ((8000.0, {"mfu": 0.25}), (None, {})):
        meter = Meter(tokens_per_step=100, flops_per_token=40.0, peak_flops=peak)
        meter.restart(0)
        clock.now += 2.0
        meter.complete(1, clock.now)
        assert meter.rates() == {"step_seconds": 2.0, "tokens_per_second": 50.0} | expected


class FakeDevice:
    """Runs steps one after another in `SECONDS` each; a dispatch returns when four fifths of its step have run.

    Attributes:
      completed: when each step was complete.
    """

    SECONDS = 0.06

    def __init__(self):
        self.completed = []

    def step(self, state, batch):
        begin = max([time.monotonic(), *self.completed[-1:]])
        self.completed.append(begin + self.SECONDS)
        time.sleep(max(0, begin + 0.8 * self.SECONDS - time.monotonic()))
        scalars = {"loss": 3.0, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0, "skipped_in_a_row": 0}
        return state, {name: Output(value, self.completed[-1]) for name, value in scalars.items()}


class Output:
    """A scalar of a step that is complete at a moment."""

    def __init__(self, value, moment):
        self.value, self.moment = value, moment

    def block_until_ready(self):
        time.sleep(max(0, self.moment - time.monotonic()))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(self.value, dtype)


def test_no_line_says_more_than_the_device_did(config, tmp_path, default_file, monkeypatch):
    device, every = FakeDevice(), 5
    monkeypatch.setattr(accelerators, "dispatches_ahead", lambda platform: True)
    monkeypatch.setattr(Program, "step", device.step)
    config.train.steps, config.log.every_steps, config.eval.every_steps = 40, every, 20
    config.checkpoint.every_steps = 10
    result = call("train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_second" in line]
    tokens = config.train.batch_size * config.model.block_size
    found = [tokens / line["tokens_per_second"] for line in lines]
    assert [line["step"] for line in lines] == list(range(every, 41, every))
    # A line that is late makes the next one's interval shorter, so what holds exactly is the time up to each line.
    true = device.SECONDS * np.arange(1, len(found) + 1)
    assert (np.cumsum(found) > true * (1 - 1e-6)).all() and np.median(found) < 1.2 * device.SECONDS
    # Lines before a save, where the loop waits for the device, said a fifth too much. One late line is left out.
    assert np.median(found[1::2]) > 0.95 * device.SECONDS
    assert lines[-1]["seconds"] == pytest.approx(sum(found) * every)


def test_a_step_that_fails_is_complete_and_the_thread_ends():
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    before = set(threading.enumerate())
    completions = Completions()
    (thread,) = set(threading.enumerate()) - before
    completions.add({"loss": Failed()})
    assert completions.next() <= time.monotonic()
    completions.close()
    thread.join(10)
    assert not thread.is_alive()
