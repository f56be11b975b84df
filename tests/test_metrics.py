"""The numbers that are said about a run, against hand computations."""

import io
import json
import math

import jax
import pytest

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config, gpt_config
from trialgpt_jax.parallel.accelerators import chip
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.training.metrics import MetricsLog, bits_per_byte, flops_per_token, parameter_count, say, time_left
from trialgpt_jax.training.tensorboard import EventFile
from trialgpt_jax.training.train_step import params_layout

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def test_flops_per_token_of_gpt2_124m():
    """The published convention gives 8.55e8 at T=1024 and vocabulary 50,304."""
    gpt = gpt_config(default_config(), "cpu")
    params = params_layout(gpt, make_mesh(ONE, jax.devices()[:1]))
    by_hand = 6 * (12 * 12 * 768 * 768 + 50304 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(params, gpt) == by_hand == pytest.approx(8.55e8, rel=1e-3)
    # GPT-2's 124,439,808 and the 47 rows of padding
    assert parameter_count(params) == 124_439_808 + 47 * 768


def test_a_uniform_byte_model_has_eight_bits_per_byte():
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8.0)
    assert bits_per_byte(1.0, 1000, None) is None


def test_peaks_are_known_chip_by_chip_and_others_have_none():
    assert chip("NVIDIA H200").peak_flops == chip("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert [chip(f"TPU {v}").peak_flops for v in ("v4", "v5 lite", "v5", "v5p", "v6 lite")] == [
        275e12, 197e12, 459e12, 459e12, 918e12,
    ]  # fmt: skip
    assert chip("NVIDIA H100 PCIe") is None and chip("cpu") is None


def test_time_left_as_a_person_writes_it():
    assert [time_left(s) for s in (7, 65, 3 * 3600 + 60, 100 * 3600)] == ["7s", "1m05s", "3h01m", "4d04h"]


def open_log(folder, resume_step):
    c = default_config()
    c.log.tensorboard = False
    return MetricsLog(str(folder), c.log, resume_step, c)


def test_a_line_of_the_log_is_one_write_so_that_another_thread_cannot_tear_it(monkeypatch):
    writes = []

    class Stderr(io.StringIO):
        def write(self, text):
            writes.append(text)

    monkeypatch.setattr("sys.stderr", Stderr())
    say("a line\nand another")
    assert [text for text in writes if text] == ["a line\nand another\n"]


def test_lines_after_the_restored_step_and_a_torn_last_line_are_dropped(tmp_path):
    log = open_log(tmp_path, 0)
    for step in range(1, 6):
        log.write({"step": step, "seconds": step / 2})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "sec')
    log = open_log(tmp_path, 3)
    assert log.last == {"step": 3, "seconds": 1.5}
    log.write({"step": 4})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_that_begins_again_at_step_0_begins_its_log_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 5.0, "seconds": 0.0}\n{"step": 1, "seconds": 0.1}\n'
    )
    again = open_log(tmp_path, 0)
    assert again.last == {} and (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_reads_the_curves_and_forgets_what_a_resumed_run_writes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `test`")
    for resume_step, last, offset in ((0, 5, 0.0), (3, 7, 100.0)):
        events = EventFile(str(tmp_path), resume_step * 300)
        for step in range(resume_step + 1, last + 1):
            events.write(step * 300, {"loss": step + offset + 0.25, "seconds": 1e-3 * step, "näme": -step})
        events.close()
    read = accumulator.EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert read.file_version == 2.0 and sorted(read.Tags()["scalars"]) == ["loss", "näme", "seconds"]
    points = {point.step: point.value for point in read.Scalars("loss")}
    assert points == {step * 300: step + 0.25 + (100 if step > 3 else 0) for step in range(1, 8)}
    assert [point.value for point in read.Scalars("näme")] == [-1, -2, -3, -4, -5, -6, -7]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        open_log(tmp_path, 2)
