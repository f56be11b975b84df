#!/usr/bin/env python3
"""Compiles the train step for chips that are not attached, and reports its memory, collectives and kernels.

    python scripts/aot_compile.py --config=configs/gpt2.py:124m --target=v5e:2x2 --config.train.batch_size=64
    python scripts/aot_compile.py --config=configs/gpt2.py:124m --target=v5e:1x1 --find_batch   # the largest that fits
    python scripts/aot_compile.py --config=configs/gpt2.py:124m --target=v5e:1x1 --decode=8     # decode 8 samples
    python scripts/aot_compile.py --config=configs/gpt2.py:124m --target=v5e:1x1 --score=1024   # score rows of 1,024

Targets: v5e:4x4, v5p:2x2x1, v6e:4x4, v4:2x2x1, TPU7x:2x2x1 (require `libtpu`, from the extras `test` and `tpu`);
h200, rtx4090, rtx4080, l4, or h200:8 for eight of one host (require the extra `cuda`). The compiler is the one that a
job on the chip uses, so whether the step fits, its memory, collectives and kernels are exact; speed is not measured.
--config.train.batch_size is the batch of one optimizer step over all chips. Bytes and collectives are those of one step
on one chip, counted in the program's text by hlo.py.
"""

import collections
import json
import os
import re
import sys
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process; independent of the target
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would query the metadata server of a TPU VM
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu would lock the chips, although none is used

import hlo
import jax
from jax.experimental import topologies

from trialgpt_jax import UserError, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.model.decode import compile_decode
from trialgpt_jax.model.scoring import Scorer
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.training.metrics import flops_per_token, parameter_count
from trialgpt_jax.training.program import Program


class Gpu(NamedTuple):
    """The device properties of a GPU that XLA reads: NVIDIA's datasheets and CUDA's tables by compute capability."""

    name: str
    compute_capability: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    bandwidth: float  # bytes/s
    memory_bytes: float
    l2_bytes: int
    shared_bytes: int  # per core; a block can have 1 KiB less
    threads: int  # per core


GPUS = {
    "h200": Gpu("NVIDIA H200", "9.0", 132, 1.98, 4.8e12, 150e9, 50 * 2**20, 228 * 2**10, 2048),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 1.008e12, 24564 * 2**20, 72 * 2**20, 100 * 2**10, 1536),
    "rtx4080": Gpu("NVIDIA GeForce RTX 4080", "8.9", 76, 2.505, 716.8e9, 16376 * 2**20, 64 * 2**20, 100 * 2**10, 1536),
    "l4": Gpu("NVIDIA L4", "8.9", 58, 2.04, 300e9, 23034 * 2**20, 48 * 2**20, 100 * 2**10, 1536),
}


def gpu_description(gpu: Gpu) -> str:
    """XLA's `GpuTargetConfigProto` in text form."""
    major, minor = gpu.compute_capability.split(".")
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: {48 * 2**10}
      shared_memory_per_core: {gpu.shared_bytes} threads_per_core_limit: {gpu.threads} core_count: {gpu.cores}
      fpus_per_core: 128 block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {int(gpu.memory_bytes)} shared_memory_per_block_optin: {gpu.shared_bytes - 2**10}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
    device_description_str: "{gpu.name}"
    """


def target_devices(target: str) -> list[jax.Device]:
    """The devices of a target.

    Raises:
      UserError: no such target, or its compiler is not installed.
    """
    try:
        name, _, n = target.partition(":")
        if name in GPUS:
            described = {"topology": f"1x1x{int(n or 1)}", "target_config": gpu_description(GPUS[name])}
            topology = topologies.get_topology_desc(platform="cuda", topology_name=name, **described)
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
        return list(topology.devices)
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--target={target} cannot be compiled for here: {reason}; see the top of this file") from None


def usable_bytes(target: str, device: jax.Device) -> float | None:
    """Bytes that a program may use on a device of the target; None = unknown."""
    if gpu := GPUS.get(target.partition(":")[0]):
        return 0.75 * gpu.memory_bytes  # what JAX's allocator takes; XLA_PYTHON_CLIENT_MEM_FRACTION sets another share
    known = accelerators.chip(device.device_kind)
    return known and known.memory_bytes


def compile_for(config, target: str, decode: int = 0, score: int = 0) -> tuple[dict, str]:
    """Compiles the train step, the decode loop or the scoring of tasks.

    Args:
      config: the config, for all chips of the target.
      target: see the top of this file.
      decode: number of samples that the decode loop generates at a time; 0 = no decode loop.
      score: length of the rows in which requests are scored; 0 = no scoring.

    Returns:
      The report that `--json` prints, and the text of the program; "" if there is none.

    Raises:
      UserError: see `target_devices`; or a config that the target does not support.
    """
    devices = target_devices(target)
    if not (decode or score):
        config_lib.validate(config, len(devices))
    program = Program(config, devices=devices)
    gpt, params = program.gpt, program.params_layout
    rows = score and Scorer(gpt, program.mesh).batch_rows(score)
    n_tokens = decode or rows * score or config.train.batch_size * gpt.block_size
    flops = 2 * parameter_count(params) if decode or score else flops_per_token(params, gpt)
    available = usable_bytes(target, devices[0])
    report = {
        "target": target,
        "device_kind": devices[0].device_kind,
        "chips": len(devices),
        "mesh": dict(program.mesh.shape),
        "parameters": parameter_count(params),
        "program": "decode" if decode else "score" if score else "train_step",
        "tokens_per_step": n_tokens,
        "flops_per_step": flops * n_tokens,
        "attention": gpt.attention,
        "remat": gpt.remat,
        "jax": jax.__version__,
        "bytes_of_chip": available,
    }
    try:
        if decode:
            compiled = _compile_decode(program, decode)
        elif score:
            compiled = Scorer(gpt, program.mesh).compile(params, rows, score)
        else:
            compiled = program.train_step
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | {"fits": False, "why": str(error).strip().splitlines()[0]}, ""
    plan = compiled.memory_analysis()
    needed = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    )
    text = _text(compiled)
    report |= {
        "fits": available is None or needed <= available,
        "bytes_needed": needed,
        "argument_bytes": plan.argument_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "bytes_moved": sum(hlo.traffic(text).values()) if text else None,
        "collectives": hlo.collectives(text) if text else None,
        "custom_calls": dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
    }
    return report, text


def _compile_decode(program: Program, num_samples: int) -> jax.stages.Compiled:
    """The decode loop for prompts of half a block, which generate the other half."""
    prompt = program.gpt.block_size // 2
    return compile_decode(
        program.gpt,
        program.mesh,
        program.params_layout,
        num_samples=num_samples,
        prompt_length=prompt,
        max_new_tokens=program.gpt.block_size - prompt,
    )


def _text(compiled: jax.stages.Compiled) -> str:
    """The optimised program; "" where jax 0.10 cannot parse it, for some of chips with sparse cores (v5p, v6e)."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return ""


def find_batch(config, target: str) -> tuple[dict, str]:
    """Finds the largest microbatch that fits, to within an eighth of it.

    Args:
      config: its train.batch_size and train.accumulate_steps are overwritten; the second becomes 1.
      target: see the top of this file.

    Returns:
      What `compile_for` returns for that batch, or for one sequence per chip if even that does not fit.
    """
    sizes = mesh_sizes(config.mesh, len(target_devices(target)))
    config.train.accumulate_steps, shards = 1, sizes["data"] * sizes["fsdp"]
    fits, too_large, best = 0, None, None
    size = 1
    while True:
        config.train.batch_size = size * shards
        report, text = compile_for(config, target)
        print(f"{size} sequences per chip: {'fits' if report['fits'] else 'does not fit'}", file=sys.stderr)
        if report["fits"]:
            fits, best = size, (report, text)
        else:
            too_large = size
        if too_large is None:
            size *= 2
        elif too_large - fits <= max(1, fits // 8):
            return best or (report, text)
        else:
            size = (fits + too_large) // 2


def print_report(report: dict) -> None:
    """Prints a report of `compile_for` for a reader."""
    chips, n_tokens = report["chips"], report["tokens_per_step"]
    print(
        f"{chips} x {report['device_kind']}, mesh {report['mesh']}, attention {report['attention']}, "
        f"remat {report['remat']}"
    )
    print(f"{report['parameters']:,} parameters, {n_tokens:,} tokens and {report['flops_per_step']:.3g} FLOPs per step")
    if "bytes_needed" not in report:
        print(f"DOES NOT FIT: {report['why']}")
        return
    names = ("argument_bytes", "temporary_bytes", "bytes_needed", "bytes_of_chip")
    arguments, temporaries, needed, available = ((report[name] or 0) / 2**30 for name in names)
    print(
        f"per chip: {arguments:.2f} GiB state and batch + {temporaries:.2f} GiB temporaries = "
        f"{needed:.2f} of {available:.2f} GiB: {'fits' if report['fits'] else 'DOES NOT FIT'}"
    )
    if report["collectives"] is None:
        print("bytes, collectives and kernels are not known because JAX cannot print this program")
        return
    per_token = report["bytes_moved"] * chips / n_tokens
    print(f"device memory: {report['bytes_moved'] / 1e9:.2f} GB per chip and step, {per_token / 1e6:.3f} MB per token")
    for kind, size in sorted(report["collectives"].items()):
        print(f"{kind}: {size['count']} per step, {size['bytes'] / 2**20:.1f} MiB received per chip")
    kernels = ", ".join(f"{name} x {count}" for name, count in sorted(report["custom_calls"].items()))
    print(f"kernels: {kernels or 'none'}")


FLAGS = {
    "target": (None, "chips to compile for, e.g. v5e:4x4 or h200"),
    "json": (False, "print one JSON object on stdout"),
    "hlo": (None, "file for the optimised program"),
    "find_batch": (False, "find the largest microbatch that fits; compiles the step several times"),
    "decode": (0, "compile the decode loop for this many samples instead of the train step"),
    "score": (0, "compile the scoring of tasks in rows of this many tokens instead of the train step"),
}


def main(argv: list[str]) -> int:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    if not flags.target:
        raise UserError("--target is missing, e.g. --target=v5e:4x4 or --target=h200")
    config_lib.set_precision(config)
    if flags.find_batch:
        report, text = find_batch(config, flags.target)
    else:
        report, text = compile_for(config, flags.target, flags.decode, flags.score)
    if flags.hlo and text:
        with open(flags.hlo, "w") as file:
            file.write(text)
    if flags.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    cli.run(main)
