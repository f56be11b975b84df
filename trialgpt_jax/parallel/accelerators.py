"""What the chip is: its peak and memory, the attention kernel it runs, and where compiled programs are kept.

A program can be compiled for a chip that is not attached, so nothing here asks JAX which platform it runs on unless it
is told to: the platform ("cpu", "gpu" or "tpu") and the device kind are arguments.
"""

import ctypes
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trialgpt_jax import UserError


class Chip(NamedTuple):
    """Published figures of an accelerator: dense bf16 FLOP/s and bytes of device memory."""

    peak_flops: float
    memory_bytes: float


# Substring of `device_kind` -> figures, the first match wins. Peaks are the vendors' dense bf16 ones, without sparsity;
# TPU memory is what the compiler grants a program. A kind that is not here has no MFU: a wrong peak is worse than none.
_CHIPS = (
    ("H200", Chip(989e12, 150e9)),
    ("H100 80GB HBM3", Chip(989e12, 80e9)),  # the SXM form; the PCIe card is slower and has no entry
    ("A100", Chip(312e12, 80e9)),
    ("TPU v4", Chip(275e12, 30.75 * 2**30)),
    ("TPU v5 lite", Chip(197e12, 15.75 * 2**30)),
    ("TPU v5e", Chip(197e12, 15.75 * 2**30)),
    ("TPU v5", Chip(459e12, 95.74 * 2**30)),
    ("TPU v6", Chip(918e12, 31.25 * 2**30)),
)


def chip(device_kind: str) -> Chip | None:
    """Figures of `device.device_kind`, or None for a chip whose peak is not known here."""
    return next((figures for name, figures in _CHIPS if name in device_kind), None)


def memory_bytes(device: jax.Device) -> float | None:
    """Bytes that a program may use on `device`: the allocator's limit, the table's figure, or the host's RAM for a CPU."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return float(device.memory_stats()["bytes_limit"])
    except (KeyError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError):
        known = chip(device.device_kind)
        return known.memory_bytes if known else None


def compute_dtype(name: str, platform: str) -> jnp.dtype:
    """The dtype of the matmuls: `name`, with "auto" standing for bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def attention_kernel(
    requested: str, platform: str, *, dtype: jnp.dtype, head_dim: int, block_size: int, dropout: float
) -> str:
    """Chooses the attention kernel, or says why the requested one cannot be used.

    Args:
      requested: "auto", "cudnn", "splash" or "xla".
      platform: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      head_dim: width of a head.
      block_size: tokens per sequence.
      dropout: rate of the attention weights' dropout.

    Returns:
      "cudnn", "splash" or "xla". "auto" is cuDNN on GPU, Splash on TPU and XLA on CPU, never another in silence.

    Raises:
      UserError: the kernel does not run with these; names the option to change.
    """
    kernel = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}[platform] if requested == "auto" else requested
    home = {"cudnn": "gpu", "splash": "tpu"}.get(kernel)
    why = None
    if home and home != platform:
        why = f"runs on {home}, not on {platform}"
    elif kernel == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
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


# XLA's options for training and evaluation, where they were seen to help: on a GPU every matmul goes to cuBLASLt, and as it is
# written. What Triton makes of one has no epilogue, so that biases, GELU and the residual would be passes over memory of
# their own; those of q and k, which jax 0.12 merges, are sliced apart in another. GPT-2 124M on an H200: 2.81 MB of traffic a
# token, without these options 3.16 (static; scripts/bench/LOG.md).
_COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool | int]:
    """What to compile a program of large matmuls for `mesh` with, beside the defaults and XLA_FLAGS."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, in the user's cache folder unless JAX has been told where."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "trialgpt_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_freed_memory() -> None:
    """With JAX_PLATFORMS=cpu, lets this process keep the memory that a step frees for the next one (glibc alone can).

    XLA allocates its buffers anew at every step, and glibc returns large ones to the kernel as soon as they are freed,
    so that every step would fault in and zero all of its pages again (scripts/bench/LOG.md has the measurement). To be
    called before JAX starts its threads, which would have heaps of their own: so the platform has to be named.

    A step then runs in the thread that dispatches it. In another, the temporaries of step k would often be allocated
    before those of step k-1 are freed, and the room of both would be kept.
    """
    libc = _glibc()
    if libc is None:
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of <malloc.h>
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        libc.mallopt(parameter, value)


def dispatches_ahead(platform: str) -> bool:
    """Whether a call of a compiled program returns before it has run: not on CPU after `keep_freed_memory`."""
    return platform != "cpu" or jax.config.read("jax_cpu_enable_async_dispatch")


def leave_room(compiled: jax.stages.Compiled, slack: float = 2**30) -> float:
    """After `keep_freed_memory`: leaves a hole of 64 MiB in the heap, for what is allocated between two steps.

    To be called when the state is made, before the first step. Without it, arrays that outlive a step settle in the
    room that its temporaries left; these then no longer fit, and take as much room again elsewhere. The heap gives the
    smallest hole that fits, so this one to everything small. Pages that nothing touches take no memory.

    The temporaries may move all the same: glibc asks for some bytes more than it keeps of an aligned block, and a
    small allocation may take those.

    Args:
      compiled: the step.
      slack: bytes.

    Returns:
      Bytes that this process should hold at most, for `return_freed_memory`: what it holds now, the step's temporaries,
      and half of these or `slack`, if that is more. Infinity where nothing is kept.
    """
    libc = _glibc()
    if libc is None:
        return math.inf
    libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
    hole = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))
    wall = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))  # as large, so that it lies behind the hole
    libc.realloc(wall, ctypes.c_size_t(4096))  # shrinks in place, and stays: the hole cannot merge with what follows
    libc.free(hole)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return _resident_bytes() + temporaries + max(temporaries / 2, slack)


def return_freed_memory(limit: float = 0) -> None:
    """After `keep_freed_memory`: gives the kernel what is free now, if this process holds more than `limit` bytes.

    The next step fetches what it needs anew. For when the step's temporaries have moved, so that the room that they had
    would stay with the process for nothing, and for times when others than the step need memory.
    """
    libc = _glibc()
    if libc is not None and _resident_bytes() > limit:
        libc.malloc_trim(ctypes.c_size_t(0))


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and JAX_PLATFORMS=cpu."""
    if jax.config.jax_platforms != "cpu":  # first, for this is asked at every step
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
