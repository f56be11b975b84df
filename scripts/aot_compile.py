#!/usr/bin/env python3
"""Compiles the real train step for chips that are not attached, and says what they would execute.

    python scripts/aot_compile.py --config=configs/gpt2_124m.py --target=v5e:2x2 --config.train.batch_size=64
    python scripts/aot_compile.py --config=configs/gpt2_124m.py --target=v5e:1x1 --find_batch   # the largest that fits
    python scripts/aot_compile.py --config=configs/gpt2_124m.py --target=v5e:1x1 --decode=8     # a token of 8 samples

Targets: v5e:4x4, v5p:2x2x1, v6e:4x4, v4:2x2x1, TPU7x:2x2x1 (needs `libtpu`, from the extras `test` and `tpu`), h200 or h200:8
(needs the extra `cuda`). It is the real compiler: whether the step fits, its memory, its collectives and kernels are facts.
A speed is not to be had this way. The batch of one optimizer step is --config.train.batch_size, over all chips. Bytes and
collectives are those of one run on one chip, read off the program's text by hlo.py.
"""

import collections
import json
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what runs here; the target is another matter
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the metadata server of a TPU VM
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it locks the chips, of which none is used

import hlo
import jax
from jax.experimental import topologies

from trialgpt_jax import UserError
from trialgpt_jax import config as config_lib
from trialgpt_jax.model.generate import CHUNK, compile_decode
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.training.metrics import flops_per_token, parameter_count
from trialgpt_jax.training.optimizer import make_optimizer, schedule
from trialgpt_jax.training.train_step import compile_train_step, params_layout

# What XLA:GPU asks a device about, for an H200 SXM (NVIDIA's datasheet and CUDA's device properties).
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
device_description_str: "NVIDIA H200"
"""


def target_devices(target: str) -> tuple[list, str]:
    """The devices of a target and their platform, "tpu" or "gpu".

    Raises:
      UserError: no such target, or its compiler is not installed.
    """
    try:
        if target.startswith("h200"):
            n = int(target.partition(":")[2] or 1)
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="H200", topology=f"1x1x{n}", target_config=_H200
            )
            return list(topology.devices), "gpu"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
        return list(topology.devices), "tpu"
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--target={target} cannot be compiled for here: {reason}; see the top of this file") from None


def compile_for(config, target: str, decode: int = 0) -> tuple[dict, str]:
    """Compiles the train step, or the decode step, and describes it; returns the description and the program's text.

    Args:
      config: the config, for all chips of the target.
      target: see the top of this file.
      decode: samples to decode at a time, to compile one run of the decode loop; 0 = the train step.

    Raises:
      UserError: as `target_devices`, or a config that does not go with the target.
    """
    devices, platform = target_devices(target)
    if not decode:
        config_lib.validate(config, len(devices))
    gpt = config_lib.gpt_config(config, platform)
    mesh = make_mesh(config_lib.mesh_sizes(config.mesh, len(devices)), devices)
    params = params_layout(gpt, mesh)
    tokens = decode * CHUNK or config.train.batch_size * gpt.block_size
    known = accelerators.chip(devices[0].device_kind)
    report = {
        "target": target, "device_kind": devices[0].device_kind, "chips": len(devices), "mesh": dict(mesh.shape),
        "parameters": parameter_count(params), "program": "decode" if decode else "train_step",
        "tokens_per_step": tokens, "flops_per_step": (2 * parameter_count(params) if decode else flops_per_token(params, gpt)) * tokens,
        "attention": gpt.attention, "remat": gpt.remat, "jax": jax.__version__,
        "bytes_of_chip": known and known.memory_bytes,
    }  # fmt: skip
    try:
        if decode:
            prompt = gpt.block_size // 2
            compiled = compile_decode(
                gpt, mesh, params, num_samples=decode, prompt_length=prompt, max_new_tokens=gpt.block_size - prompt
            )
        else:
            compiled = compile_train_step(
                gpt, make_optimizer(config.optim, config.train.steps), mesh, batch_size=config.train.batch_size,
                accumulate_steps=config.train.accumulate_steps, seed=config.seed, skip_spikes=config.train.skip_spikes,
                learning_rate=schedule(config.optim, config.train.steps, config.optim.learning_rate),
            )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | {"fits": False, "why": str(error).strip().splitlines()[0]}, ""
    plan = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # of chips with sparse cores (v5p, v6e), jax 0.10 cannot read some back
        if "RET_CHECK" not in str(error):
            raise
        text = ""
    need = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return report | {
        "fits": known is None or need <= known.memory_bytes,
        "bytes_needed": need,
        "argument_bytes": plan.argument_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "bytes_moved": sum(hlo.traffic(text).values()) if text else None,
        "collectives": hlo.collectives(text) if text else None,
        "custom_calls": dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
    }, text  # fmt: skip


def find_batch(config, target: str) -> tuple[dict, str]:
    """As `compile_for` with the largest microbatch that fits, to an eighth of it; `accumulate_steps` becomes 1."""
    sizes = config_lib.mesh_sizes(config.mesh, len(target_devices(target)[0]))
    config.train.accumulate_steps, shards = 1, sizes["data"] * sizes["fsdp"]
    fits, too_large, best = 0, None, None
    size = 1
    while True:
        config.train.batch_size = size * shards
        report, text = compile_for(config, target)
        print(f"{size} sequences a chip: {'fits' if report['fits'] else 'does not fit'}", file=sys.stderr)
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


FLAGS = {
    "target": (None, "chips to compile for, e.g. v5e:4x4 or h200"),
    "json": (False, "print one JSON object on stdout"),
    "hlo": (None, "file for the optimised program"),
    "find_batch": (False, "look for the largest microbatch that fits, with as many compilations as that takes"),
    "decode": (0, "compile a run of the decode loop for so many samples instead of the train step"),
}


def main(argv: list[str]) -> int:
    flags, config = config_lib.parse_command_line(argv, __doc__, FLAGS)
    if not flags.target:
        raise UserError("--target is missing, e.g. --target=v5e:4x4 or --target=h200")
    if flags.find_batch:
        report, text = find_batch(config, flags.target)
    else:
        report, text = compile_for(config, flags.target, flags.decode)
    if flags.hlo and text:
        with open(flags.hlo, "w") as file:
            file.write(text)
    if flags.json:
        print(json.dumps(report))
        return 0 if report["fits"] else 1
    print(
        f"{report['chips']} x {report['device_kind']}, mesh {report['mesh']}, attention {report['attention']}, remat {report['remat']}"
    )
    print(
        f"{report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens and {report['flops_per_step']:.3g} FLOPs per step"
    )
    if "bytes_needed" not in report:
        print(f"DOES NOT FIT: {report['why']}")
        return 1
    gib = {
        key: (report[key] or 0) / 2**30
        for key in ("bytes_needed", "bytes_of_chip", "argument_bytes", "temporary_bytes")
    }
    print(
        f"per chip: {gib['argument_bytes']:.2f} GiB state and batch + {gib['temporary_bytes']:.2f} GiB temporaries = "
        f"{gib['bytes_needed']:.2f} of {gib['bytes_of_chip']:.2f} GiB: {'fits' if report['fits'] else 'DOES NOT FIT'}"
    )
    if report["collectives"] is None:
        print("bytes, collectives and kernels are not known, for JAX cannot print this program")
        return 0 if report["fits"] else 1
    per_token = report["bytes_moved"] * report["chips"] / report["tokens_per_step"]
    print(
        f"device memory: {report['bytes_moved'] / 1e9:.2f} GB moved per chip and step, {per_token / 1e6:.3f} MB a token"
    )
    for kind, size in sorted(report["collectives"].items()):
        print(f"{kind}: {size['count']} a step, {size['bytes'] / 2**20:.1f} MiB received by a chip")
    print(
        "kernels:", ", ".join(f"{name} x {count}" for name, count in sorted(report["custom_calls"].items())) or "none"
    )
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    config_lib.run(main)
