"""The lines of a run, and the steps that were skipped: what their lines say, and how many in a row stop the run."""

import json

import numpy as np
import pytest
from conftest import small_config

from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.reporter import Reporter


@pytest.fixture
def reporter(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerators, "dispatches_ahead", lambda platform: False)  # as `cli.start` sets up a CPU
    config = small_config("unused")
    config.train.update({"max_skipped": 3, "steps": 20, "skip_spikes": 6.0})
    config.log.every_steps = 4
    reporter = Reporter(Program(config, mesh=single_device()), None, str(tmp_path), 0)
    reporter.restart_clock(0)
    yield reporter
    reporter.close()


def values(in_a_row=0, loss=3.0, grad_norm=1.5, update_finite=True):
    """What a compiled step returns."""
    scalars = {"loss": np.float32(loss), "grad_norm": np.float32(grad_norm), "update_finite": np.bool_(update_finite)}
    return scalars | {"lr": np.float32(1e-3), "skipped": np.int32(5), "skipped_in_a_row": np.int32(in_a_row)}


def test_a_line_is_written_every_few_steps_and_after_the_last_one(reporter, tmp_path):
    for step in range(1, 20):
        reporter.step(step, values())
    reporter._config.train.steps = 19
    reporter.step(19, values(loss=np.nan))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 19]
    assert [line["tokens"] for line in lines] == [step * 8 * 32 for step in (4, 8, 12, 16, 19)]
    assert lines[0]["skipped"] == 5 and lines[0]["loss"] == 3.0 and lines[-1]["loss"] is None


def test_the_run_stops_at_max_skipped_steps_in_a_row_and_not_before(reporter):
    reporter.step(1, values(in_a_row=1))
    reporter.step(2, values(in_a_row=2))
    reporter.step(3, values())
    reporter.step(4, values(in_a_row=2))
    with pytest.raises(FloatingPointError, match=r"^3 steps in a row were skipped \(train.max_skipped\), up to step 5"):
        reporter.step(5, values(in_a_row=3))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"loss": np.nan}, "loss nan of batch 6 is not finite"),
        ({"grad_norm": np.inf}, "gradient norm inf of batch 6 is not finite"),
        ({"loss": np.inf, "grad_norm": np.nan}, "loss inf and gradient norm nan of batch 6 are not finite"),
        ({"loss": np.nan, "update_finite": False}, "loss nan of batch 6 is not finite"),
        ({"update_finite": False}, "loss 3 and gradient norm 1.5 of batch 6 give new parameters that are not finite"),
        ({}, "loss 3 or gradient norm 1.5 of batch 6 are a spike (train.skip_spikes=6)"),
    ],
)
def test_the_line_of_a_skipped_step_says_what_was_wrong_with_it(reporter, capsys, changes, why):
    reporter.step(7, values(in_a_row=1, **changes))
    assert f"step 7: {why}; the update is skipped\n" in capsys.readouterr().err
