"""The numbers of a run against hand computations: FLOPs, rates, bits per byte; and the files they are written to."""

import errno
import io
import json
import math
import os
import re
import sys
import types

import pytest

from trialgpt_jax import UserError, cli
from trialgpt_jax.config import default_config
from trialgpt_jax.console import say
from trialgpt_jax.live_line import time_left
from trialgpt_jax.parallel.accelerators import chip
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.storage import json_lines
from trialgpt_jax.training import wandb_run
from trialgpt_jax.training.metrics import MetricsLog, bits_per_byte, flops_per_token, parameter_count
from trialgpt_jax.training.program import gpt_config, params_layout
from trialgpt_jax.training.tensorboard import EventFile


def test_flops_per_token_of_gpt2_124m():
    """The published convention gives 8.55e8 at T=1024 and vocabulary 50,304."""
    gpt = gpt_config(default_config(), "cpu")
    params = params_layout(gpt, single_device())
    by_hand = 6 * (12 * 12 * 768 * 768 + 50304 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(params, gpt) == by_hand == pytest.approx(8.55e8, rel=1e-3)
    # GPT-2 has 124,439,808; 47 rows of the embedding are padding
    assert parameter_count(params) == 124_439_808 + 47 * 768


def test_a_uniform_byte_model_has_eight_bits_per_byte():
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8.0)
    assert bits_per_byte(1.0, 1000, None) is None


@pytest.mark.parametrize(
    ("kind", "peak", "gigabytes"),
    [
        ("NVIDIA H200", 989e12, 150),
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA GH200 480GB", 989e12, 96),
        ("NVIDIA H200 NVL", 835e12, 150),
        ("NVIDIA H100 NVL", 835e12, 94),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40),
        ("NVIDIA B200", 2250e12, 180),
        ("NVIDIA GB200", 2500e12, 186),
        ("NVIDIA L4", 121e12, 24),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 24),
        ("TPU v4", 275e12, 33),
        ("TPU v5 lite", 197e12, 17),
        ("TPU v5", 459e12, 103),
        ("TPU v5p", 459e12, 103),
        ("TPU v6 lite", 918e12, 34),
        ("TPU7x", 1153.5e12, 102),
    ],
)
def test_peaks_of_known_chips(kind, peak, gigabytes):
    known = chip(kind)
    assert known.peak_flops == peak and round(known.memory_bytes / 1e9) == gigabytes


@pytest.mark.parametrize(
    "kind",
    ["cpu", "TPU v4 lite", "TPU v3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20", "NVIDIA L40S", "NVIDIA A100X"],
)
def test_chips_whose_names_only_resemble_known_ones_have_no_peak(kind):
    """A MIG slice is a part of its GPU, and v4 lite is v4i."""
    assert chip(kind) is None


def test_time_left_is_in_two_units():
    assert [time_left(s) for s in (7, 65, 3 * 3600 + 60, 100 * 3600)] == ["7s", "1m05s", "3h01m", "4d04h"]


def open_log(folder, resume_step):
    c = default_config()
    c.log.tensorboard = False
    return MetricsLog(str(folder), c.log, resume_step, c)


def test_a_log_line_is_a_single_write_so_that_threads_do_not_interleave(monkeypatch):
    writes = []

    class Stderr(io.StringIO):
        def write(self, text):
            writes.append(text)

    monkeypatch.setattr("sys.stderr", Stderr())
    say("a line\nand another")
    assert [text for text in writes if text] == ["a line\nand another\n"]


def test_lines_after_the_restored_step_and_an_incomplete_last_line_are_dropped(tmp_path):
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


def test_a_run_that_starts_over_at_step_0_drops_all_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 5.0, "seconds": 0.0}\n{"step": 1, "seconds": 0.1}\n'
    )
    again = open_log(tmp_path, 0)
    assert again.last == {} and (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_reads_the_curves_and_drops_points_that_a_resumed_run_repeats(tmp_path):
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


_BAD_STEPS = ("-1", "true", "2.0", "null", '"2"', "4294967296")
_BAD_SECONDS = ("NaN", "Infinity", "1e400", "-1", "true", "1e11", "null", '"1"')
_BAD_NUMBERS = ("NaN", "-Infinity", "true", "[]", "1" * 25, "1" * 5000)


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", "3", "{}", '{"seconds": 1.0}', "[" * 100_000, "\0" * 30]
    + [f'{{"step": {value}}}' for value in _BAD_STEPS]
    + [f'{{"step": 2, "seconds": {value}}}' for value in _BAD_SECONDS]
    + [f'{{"step": 2, "loss": {value}}}' for value in _BAD_NUMBERS]
    + ['{"step": 1}', '{"step": 0, "val_loss": 3.0}'],
    ids=lambda line: repr(line[:40]),
)
def test_a_line_that_was_not_written_so_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2\b.*repair or remove the file"):
        open_log(tmp_path, 3)
    assert path.read_bytes() == before


def test_a_line_of_a_step_and_of_its_evaluation_are_no_duplicates(tmp_path):
    text = '{"step": 0, "val_loss": 6.0}\n{"step": 1, "loss": 5}\n{"step": 1, "val_loss": 5.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert open_log(tmp_path, 1).last == {"step": 1, "val_loss": 5.0}
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 1, "val_loss": 5.0}\n')
    with pytest.raises(UserError, match=r"line 4: step 1 again"):
        open_log(tmp_path, 1)


@pytest.mark.parametrize("end", [b"\0" * 40, b"\0" * 40 + b'3}\n{"step": 4}\n', b'{"step": 3, "seconds": N', b"\0\n"])
def test_what_a_loss_of_power_leaves_after_the_lines_of_the_checkpoint_is_dropped(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    assert open_log(tmp_path, 2).last == {"step": 2}
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_every_line_is_strict_json(tmp_path):
    log = open_log(tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "lr": -math.inf, "tokens": 3, "mfu": None, "seconds": 0.5})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "lr": None, "tokens": 3, "mfu": None, "seconds": 0.5}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN, errno.EACCES])
@pytest.mark.parametrize("function", ["open", "fsync"])
def test_lines_that_cannot_be_written_stay_in_memory_until_the_next_save(tmp_path, monkeypatch, number, function):
    """A kernel drops what an fsync has failed to write, and reports that only once."""
    log = open_log(tmp_path, 0)
    path = tmp_path / "metrics.jsonl"
    log.write({"step": 1})
    log.sync()
    log.write({"step": 2})  # in the file, not durable

    def fail(*_):
        path.write_text('{"step": 1}\n')
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if function == "fsync" else (json_lines, "open", fail, False)))
        log.write({"step": 3})
        with pytest.raises(OSError, match="metrics.jsonl"):
            log.sync()
    log.write({"step": 4})
    log.sync()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    log.close()


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    class Wandb(types.ModuleType):
        def init(self, **_):
            raise RuntimeError("api_key not configured\n(no-tty)")

    # follows: set WANDB_MODE=offline, or give
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    c = default_config()
    c.log.update({"wandb": "project", "tensorboard": False})
    with pytest.raises(UserError, match=r"log\.wandb=project cannot be started: RuntimeError.*--config\.log\.wandb= "):
        MetricsLog(str(tmp_path), c.log, 0, c)
    _, none = cli.parse(
        ["train", "--config.log.wandb=", "--config.log.tensorboard=false"],
        "",
        {"workdir": (None, "")},
        new_workdir=True,
    )
    MetricsLog(str(tmp_path), none.log, 0, none).close()


def test_a_workdir_keeps_the_id_of_its_wandb_run_and_another_of_the_same_name_has_its_own(tmp_path):
    folders = [str(tmp_path / parent / "run") for parent in ("a", "b")]
    for folder in folders:
        os.makedirs(folder)
    ids = [wandb_run.run_id(folder) for folder in folders]
    assert ids[0] != ids[1] and ids == [wandb_run.run_id(folder) for folder in folders]
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", each) for each in ids)
    (tmp_path / "a" / "run" / "wandb_id").write_text("a b")
    # follows: remove it
    with pytest.raises(UserError, match="wandb_id should hold the id.*remove it"):
        wandb_run.run_id(folders[0])
    (tmp_path / "a" / "run" / "wandb_id").unlink()
    assert wandb_run.run_id(folders[0]) not in ids


@pytest.mark.slow
def test_offline_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    """With the real package, which starts a service: seconds."""
    wandb = pytest.importorskip("wandb", reason="optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    c = default_config()
    c.log.update({"wandb": "project", "tensorboard": False})
    ids = []
    for step in (0, 1):
        log = MetricsLog(str(tmp_path), c.log, step, c)
        ids.append(wandb.run.id)
        log.write({"step": step + 1, "loss": 2.0})
        log.close()
    assert ids == [(tmp_path / "wandb_id").read_text()] * 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_tensorboard_shows_the_settings_of_a_run_and_curves_in_groups(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `test`")
    from tensorboard.plugins.hparams import plugin_data_pb2

    c = default_config()
    log = MetricsLog(str(tmp_path), c.log, 0, c)
    log.write({"step": 1, "loss": 2.0, "lr": 1e-3, "lr/matrices": 2e-3, "task/piqa/acc": 0.5})
    log.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(read.Tags()["scalars"]) == [
        "learning_rate/all",
        "learning_rate/matrices",
        "task/piqa/acc",
        "train/loss",
    ]
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.n_layer"].number_value == 12 and found["log.tensorboard"].bool_value is True
    assert found["optim.name"].string_value == "adamw"


def test_copies_of_the_log_that_fail_are_turned_off_with_a_line(tmp_path, monkeypatch, capsys):
    class Wandb(types.ModuleType):
        def init(self, **_):
            return self

        def log(self, numbers, step):
            raise ConnectionError("no route to host")

        def finish(self):
            raise AssertionError("it is off")

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    c = default_config()
    c.log.update({"wandb": "project", "tensorboard": True})
    log = MetricsLog(str(tmp_path), c.log, 0, c)
    log.write({"step": 1, "loss": 1e300})  # beyond float32
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(EventFile, "write", lambda *_: (_ for _ in ()).throw(error))
    log.write({"step": 2, "loss": 2.0})
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 2 and "wandb is off from step 1 on" in said[0] and "tensorboard is off from step 2 on" in said[1]
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
