"""What depends on the chip: peak FLOP/s, memory, attention kernel, compiler options.

A program can be compiled for a chip that is not attached, so the platform ("cpu", "gpu" or "tpu") and the device kind
are arguments.
"""

import contextlib
import os
import resource
from typing import NamedTuple

import jax

from trialgpt_jax import UserError


class Chip(NamedTuple):
    """Published figures of an accelerator: dense bf16 FLOP/s and bytes of device memory."""

    peak_flops: float
    memory_bytes: float


# The whole `device_kind` -> figures: "NVIDIA GH200 480GB" is no H200, "TPU v4 lite" no v4, and a MIG slice ("... MIG
# 1g.10gb") is a seventh of its GPU. Peaks are the vendors' dense bf16 figures, without sparsity: NVIDIA's datasheets,
# for GeForce the whitepapers with float32 accumulation; Google's Cloud TPU pages. TPU memory is what the compiler lets
# a program use. A kind that is not listed has no MFU.
_CHIPS = {
    "NVIDIA GB200": Chip(2500e12, 186e9),
    "NVIDIA B200": Chip(2250e12, 180e9),
    "NVIDIA GH200 480GB": Chip(989e12, 96e9),  # 480 GB are the CPU's
    "NVIDIA H200": Chip(989e12, 150e9),
    "NVIDIA H200 NVL": Chip(835e12, 150e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9),  # SXM
    "NVIDIA H100 NVL": Chip(835e12, 94e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9),
    "NVIDIA L4": Chip(121e12, 24e9),
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24e9),
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24e9),
    "TPU v4": Chip(275e12, 30.75 * 2**30),
    "TPU v5 lite": Chip(197e12, 15.75 * 2**30),
    "TPU v5e": Chip(197e12, 15.75 * 2**30),
    "TPU v5": Chip(459e12, 95.74 * 2**30),
    "TPU v5p": Chip(459e12, 95.74 * 2**30),
    "TPU v6 lite": Chip(918e12, 31.25 * 2**30),
    "TPU v6e": Chip(918e12, 31.25 * 2**30),
    # a device is one of the two cores of a chip, which has 2,307 TFLOP/s
    "TPU7x": Chip(1153.5e12, 94.75 * 2**30),
}


def chip(device_kind: str) -> Chip | None:
    """Figures for `device.device_kind`; None for a chip that is not listed."""
    return _CHIPS.get(device_kind)


def memory_bytes(device: jax.Device) -> float | None:
    """Bytes that a program may use on `device`: the allocator's limit, the figure of `chip`, or of a CPU its share of
    the host's memory."""
    if device.platform == "cpu":
        return host_bytes() / len(jax.local_devices(backend="cpu"))
    try:
        return float(device.memory_stats()["bytes_limit"])
    except (KeyError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError):
        known = chip(device.device_kind)
        return known.memory_bytes if known else None


def host_bytes() -> int:
    """Bytes that this process may use: the RAM, or a lower limit of its cgroup or of `ulimit -v`."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits + _cgroup_limits())


def _cgroup_limits(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """Limits of memory of this process's cgroup and those above it, versions 1 and 2."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        with open(proc, encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        for _, controllers, path in lines:
            if controllers not in ("", "memory"):  # version 2 has one line without controllers
                continue
            base, name = (root, "memory.max") if not controllers else (f"{root}/memory", "memory.limit_in_bytes")
            parts = path.strip("/").split("/")
            for depth in range(len(parts) + 1):  # a container often sees its own cgroup at the root
                with contextlib.suppress(OSError, ValueError), open(os.path.join(base, *parts[:depth], name)) as file:
                    found.append(int(file.read()))  # ValueError: `max`
    return found


def compute_dtype(name: str, platform: str) -> str:
    """The dtype of the matmuls. "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return name


def check_dtype(dtype: str, device: jax.Device) -> None:
    """Checks that a device has matmuls of a dtype.

    Raises:
      UserError: bfloat16 on a GPU older than compute capability 8.0 (V100, T4), which has none.
    """
    capability = getattr(device, "compute_capability", "")  # "7.5"; of an AMD GPU "gfx942"
    major = capability.partition(".")[0]
    if dtype == "bfloat16" and major.isdigit() and int(major) < 8:
        raise UserError(
            f"train.dtype=bfloat16 needs a GPU of compute capability 8.0 or newer, and {device.device_kind} has "
            f"{capability}; set train.dtype=float32 and train.attention=xla"
        )


def attention_kernel(
    requested: str, platform: str, *, dtype: str, head_dim: int, block_size: int, dropout: float
) -> str:
    """The attention kernel for a platform.

    Args:
      requested: "auto", "cudnn", "splash" or "xla".
      platform: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      head_dim: width of a head.
      block_size: tokens per sequence.
      dropout: rate of the attention weights' dropout.

    Returns:
      "cudnn", "splash" or "xla". "auto" is cuDNN on GPU, Splash on TPU and XLA on CPU; it never falls back to another.

    Raises:
      UserError: the kernel does not support these values; names the option to change.
    """
    kernel = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}[platform] if requested == "auto" else requested
    home = {"cudnn": "gpu", "splash": "tpu"}.get(kernel)
    why = None
    if home and home != platform:
        why = f"runs on {home}, not on {platform}"
    elif kernel == "cudnn" and dtype not in ("bfloat16", "float16"):
        why = f"needs bfloat16, not {dtype}; set train.dtype=bfloat16"
    elif kernel == "cudnn" and (head_dim % 8 or head_dim > 256):
        why = f"needs a head width that is a multiple of 8 up to 256, not {head_dim}; set model.head_dim"
    elif kernel == "splash" and block_size % 128:
        why = f"needs a block_size that is a multiple of 128, not {block_size}; set model.block_size"
    elif kernel in ("cudnn", "splash") and dropout > 0:
        why = f"has no dropout of attention weights, and model.dropout={dropout}; set model.dropout=0"
    if why:
        raise UserError(f"attention kernel `{kernel}` {why}, or choose the slower train.attention=xla")
    return kernel


# Every matmul goes to cuBLASLt, which fuses biases, GELU and residuals: 2.81 instead of 3.16 MB of traffic a token
# (GPT-2 124M on H200, static) and 3.5% faster on an H100 (docs/performance.md#cublaslt).
_COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}


def compiler_options(platform: str) -> dict[str, bool | int]:
    """XLA options for training and evaluation steps, besides the defaults and XLA_FLAGS."""
    return _COMPILER_OPTIONS.get(platform, {})


def dispatches_ahead(platform: str) -> bool:
    """Whether a compiled program returns before it has run. `cli.start` turns that off on CPU."""
    return platform != "cpu" or jax.config.read("jax_cpu_enable_async_dispatch")
