"""The real train step compiles for TPUs that are not attached, with the fused kernel and the collectives it should have."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, command, refused

SMALL = ["--config.model.n_layer=2", "--config.model.n_embd=256", "--config.model.n_head=4", "--config.model.block_size=256",
         "--config.model.vocab_size=2000", "--config.train.accumulate_steps=2", "--config.train.batch_size=16"]  # fmt: skip


def aot_compile(*arguments):
    argv = [
        sys.executable,
        str(ROOT / "scripts" / "aot_compile.py"),
        f"--config={ROOT}/configs/gpt2_124m.py",
        *arguments,
    ]
    _, env = command("train")
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_the_step_compiles_for_v5e(mesh, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    result = aot_compile(*SMALL, *axes, "--target=v5e:2x2", "--json", f"--hlo={tmp_path}/step.txt")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["fits"] and report["chips"] == 4 and report["attention"] == "splash"
    assert report["custom_calls"]["tpu_custom_call"] >= 2
    assert "all-to-all" not in report["collectives"]
    # float32 parameters and two moments, split over the axes that split them
    whole = 12 * report["parameters"]
    assert whole / (mesh[1] * mesh[2]) <= report["argument_bytes"] < 1.1 * whole / (mesh[1] * mesh[2]) + 2**16
    assert "tpu_custom_call" in (tmp_path / "step.txt").read_text()


def test_a_step_that_does_not_fit_says_so_and_an_unknown_target_is_refused():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    result = aot_compile("--target=v5e:2x2", "--config.train.batch_size=512", "--config.train.accumulate_steps=1",
                         "--config.train.attention=xla", "--config.model.n_layer=2")  # fmt: skip
    assert result.returncode == 1 and "DOES NOT FIT" in result.stdout, result.stdout + result.stderr[-500:]
    refused(aot_compile("--target=v5e:3x5x7"), "--target=v5e:3x5x7")
    refused(aot_compile(), "--target")
