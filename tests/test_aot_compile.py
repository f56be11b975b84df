"""The train step compiled for chips that are not attached: its kernels, collectives and memory; scripts/hlo.py."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, command, refused

from trialgpt_jax.config import default_config

SMALL = [
    "--config.model.n_layer=2",
    "--config.model.n_embd=256",
    "--config.model.n_head=4",
    "--config.model.block_size=256",
    "--config.model.vocab_size=2000",
    "--config.train.accumulate_steps=2",
    "--config.train.batch_size=16",
]


def aot_compile(*arguments):
    argv = [sys.executable, f"{ROOT}/scripts/aot_compile.py", f"--config={ROOT}/configs/gpt2.py:124m", *arguments]
    _, env = command("train")
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param((4, 1, 1), marks=pytest.mark.slow), pytest.param((1, 4, 1), marks=pytest.mark.slow), (1, 2, 2)],
)
def test_the_step_compiles_for_v5e(mesh, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    result = aot_compile(*SMALL, *axes, "--target=v5e:2x2", "--json", f"--hlo={tmp_path}/step.txt")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["fits"] and report["chips"] == 4 and report["attention"] == "splash"
    assert report["custom_calls"]["tpu_custom_call"] >= 2
    assert "all-to-all" not in report["collectives"]
    # float32 parameters and two moments, split over fsdp x tensor
    whole = 12 * report["parameters"]
    assert whole / (mesh[1] * mesh[2]) <= report["argument_bytes"] < 1.1 * whole / (mesh[1] * mesh[2]) + 2**16
    assert "tpu_custom_call" in (tmp_path / "step.txt").read_text()


def test_the_step_for_an_h200_fuses_bias_gelu_residual_softcap_and_norms(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="the GPU compiler comes with the extra `cuda`")
    size = ["--config.model.n_layer=2", "--config.train.batch_size=32", "--config.train.accumulate_steps=1"]
    size += ["--config.model.logit_softcap=15"]
    result = aot_compile(*size, "--target=h200", "--json", f"--hlo={tmp_path}/step.txt")
    assert result.returncode == 0, result.stderr[-2000:]
    report, text = json.loads(result.stdout), (tmp_path / "step.txt").read_text()
    assert report["custom_calls"]["__cudnn$fmhaSoftmax"] == report["custom_calls"]["__cudnn$fmhaSoftmaxBackward"] == 2
    # per layer: queries, keys, values and both output projections, the projections with the residual; then c_fc
    assert text.count('"epilogue":"BIAS"') == 2 * 5 and text.count('"epilogue":"BIAS_GELU_AUX"') == 2
    assert len(re.findall(r'"beta":1[,.].*"epilogue":"BIAS"', text)) == 2 * 2
    assert not re.search(r"copy\(.*bf16", text)
    # arrays of a chunk's logits: the matmul's result, and the exponentials, whose sum is the same kernel's other result
    line = r"^  %\S+ = \(?.*\[16384,50304\]\S* .*(fusion|custom-call)\(.*(?:kind|custom_call_target)"
    made = re.findall(line, text, re.MULTILINE)
    assert sorted(made) == ["custom-call", "fusion"]
    assert text.count("__triton") == 2 * 2 + 1, "a norm is one kernel"


@pytest.mark.parametrize(("target", "accumulate"), [("rtx4090", 15), ("l4", 15), ("rtx4080", 30)])
def test_gpt2_fits_gpus_of_24_and_16_gb(target, accumulate):
    pytest.importorskip("jax_cuda13_plugin", reason="the GPU compiler comes with the extra `cuda`")
    result = aot_compile(f"--target={target}", f"--config.train.accumulate_steps={accumulate}", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["fits"] and report["bytes_needed"] < report["bytes_of_chip"] < 18 * 2**30
    assert report["parameters"] > 124e6 and report["custom_calls"]["__cudnn$fmhaSoftmaxBackward"] == 12


@pytest.mark.slow
def test_fsdp_gathers_every_kernel_twice_and_reduce_scatters_its_gradient_once():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    larger = [
        "--config.model.n_embd=1024",
        "--config.model.n_head=8",
        "--config.model.block_size=512",
        "--config.model.bias=False",
        "--config.model.tie_embeddings=False",
        "--config.train.batch_size=64",
        "--config.train.remat=block",
    ]
    result = aot_compile(*SMALL, *larger, "--target=v5e:4x4", "--config.mesh.data=2", "--config.mesh.fsdp=8", "--json")
    report = json.loads(result.stdout)
    found = report["collectives"]
    # For each of two microbatches: bfloat16 parameters twice and their gradients once, 7/8 of which come from other
    # chips; then an all-reduce of a chip's eighth of the gradients between two chips.
    theory = 2 * 2 * report["parameters"] * (3 * 7 / 8 + 2 * (1 / 2) / 8)
    assert 0.95 < sum(kind["bytes"] for kind in found.values()) / theory < 1.05, found
    # six kernels in each of two layers and the head, twice per step; an all-reduce would move twice the bytes
    assert found["reduce-scatter"]["count"] == 2 * (2 * 6 + 1)
    # all-reduces: the eighth between two chips, and the gradient of the embedding's 2,048 rows, for which the TPU
    # compiler chooses an all-reduce
    assert found["all-reduce"]["bytes"] < 1.2 * 2 * 2 * (report["parameters"] / 8 + 2 * 7 / 8 * 2048 * 1024)
    assert "all-to-all" not in found


def test_a_step_that_does_not_fit_says_so_and_an_unknown_target_is_refused():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    too_large = ["--config.model.n_layer=2", "--config.train.batch_size=4096", "--config.train.accumulate_steps=1"]
    result = aot_compile("--target=v5e:2x2", *too_large)
    assert result.returncode == 1 and "DOES NOT FIT" in result.stdout, result.stdout + result.stderr[-500:]
    refused(aot_compile("--target=v5e:3x5x7"), "--target=v5e:3x5x7")
    refused(aot_compile(), "--target")


def test_the_decode_loop_compiles_and_reads_each_weight_at_most_once_per_token():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    decode = json.loads(aot_compile(*SMALL, "--target=v5e:1x1", "--decode=2", "--json").stdout)
    assert decode["program"] == "decode" and decode["tokens_per_step"] == 2
    # weights have 2 bytes each; the rest is the cache
    assert decode["fits"] and 0 < decode["bytes_moved"] < 2 * 2 * decode["parameters"]


@pytest.mark.slow
def test_the_scoring_of_tasks_compiles_for_a_tpu_with_split_heads_and_vocabulary():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    score = json.loads(aot_compile(*SMALL, "--target=v5e:2x2", "--score=256", *mesh, "--json").stdout)
    assert score["program"] == "score" and score["tokens_per_step"] == 2 * 16384 and score["fits"]
    # log-probabilities of all rows go to all devices; no array with an axis of the vocabulary does
    assert score["collectives"]["all-gather"]["bytes"] < 2**21


@pytest.mark.parametrize(("largest", "found"), [(0, 1), (1, 1), (7, 7), (29, 28), (100, 96)])
def test_find_batch_ends_within_an_eighth_of_the_largest_microbatch_that_fits(monkeypatch, largest, found):
    sys.path.insert(0, str(ROOT / "scripts"))
    import aot_compile as tool

    def compile_for(config, target):
        return {"fits": config.train.batch_size <= 4 * largest, "batch": config.train.batch_size}, ""

    monkeypatch.setattr(tool, "target_devices", lambda target: [None] * 4)
    monkeypatch.setattr(tool, "compile_for", compile_for)
    config = default_config()
    config.mesh.fsdp, config.mesh.data = -1, 1
    report, _ = tool.find_batch(config, "v5e:2x2")
    assert report == {"fits": largest > 0, "batch": 4 * found}


HLO = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %mine = f32[16,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,8}
}

%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %scattered = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = f32[64,8]{1,0} all-gather(%scattered), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %next = (s32[], f32[64,8]{1,0}) tuple(%i, %gathered)
}

%condition (state: (s32[], f32[64,8])) -> pred[] {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %last = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %last), direction=LT
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[64,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[64,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_bytes_and_collectives_of_a_loop_body_are_multiplied_by_its_trip_count():
    sys.path.insert(0, str(ROOT / "scripts"))
    import hlo

    whole, part = 4 * 64 * 8, 4 * 16 * 8
    once = {"count": 7, "bytes": 7 * whole * 3 / 4}  # each of four chips already holds a quarter
    assert hlo.collectives(HLO) == {"reduce-scatter": once, "all-gather": once}
    assert hlo.traffic(HLO) == {"fusion": 7 * (whole + part), "all-gather": 7 * (whole + part)}

    def compiled(times):  # iteration i reads slice i of the stacked array
        scan = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: (jnp.sin(x) + w, None), x, ws)[0])
        x = jax.ShapeDtypeStruct((4096,), jnp.float32)
        return scan.lower(x, jax.ShapeDtypeStruct((times, 4096), jnp.float32)).compile().as_text()

    moved = {times: sum(hlo.traffic(compiled(times)).values()) for times in (70, 140)}
    per_iteration = (moved[140] - moved[70]) / 70
    assert 3 * 4 * 4096 <= per_iteration < 6 * 4 * 4096, "x and a slice read, x written"


def test_a_slice_into_fast_memory_counts_its_own_bytes_and_workspace_counts_none():
    sys.path.insert(0, str(ROOT / "scripts"))
    import hlo

    text = """HloModule step

ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %start = ((bf16[8,64]{1,0}), bf16[2,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:64]}
  %part = bf16[2,64]{1,0:T(8,128)S(1)} slice-done(%start)
  %call = (bf16[8,64]{1,0}, s8[4096]{0}) custom-call(%x, %part), custom_call_target="__cublas$lt$matmul"
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%call), index=0
}
"""
    assert hlo.traffic(text) == {"slice": 2 * 2 * 64, "__cublas$lt$matmul": 2 * (2 * 8 * 64)}


def test_a_scatter_counts_the_rows_that_it_changes():
    sys.path.insert(0, str(ROOT / "scripts"))
    import hlo

    text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inside (table: f32[100,64], rows: s32[3,1], new: bf16[3,64]) -> f32[100,64] {
  %table = f32[100,64]{1,0} parameter(0)
  %rows = s32[3,1]{1,0} parameter(1)
  %new = bf16[3,64]{1,0} parameter(2)
  %wide = f32[3,64]{1,0} convert(%new)
  ROOT %out = f32[100,64]{1,0} scatter(%table, %rows, %wide), to_apply=%add
}

ENTRY %main (table: f32[100,64], rows: s32[3,1], new: bf16[3,64], wide: f32[3,64]) -> f32[100,64] {
  %table = f32[100,64]{1,0} parameter(0)
  %rows = s32[3,1]{1,0} parameter(1)
  %new = bf16[3,64]{1,0} parameter(2)
  %wide = f32[3,64]{1,0} parameter(3)
  %fused = f32[100,64]{1,0} fusion(%table, %rows, %new), kind=kInput, calls=%inside
  ROOT %out = f32[100,64]{1,0} scatter(%fused, %rows, %wide), to_apply=%add
}
"""
    row = 4 * 64  # each is read and written; the new ones are read in bfloat16 or float32
    assert hlo.traffic(text) == {"fusion": 3 * (2 * row + row // 2) + 12, "scatter": 3 * (2 * row + row) + 12}
