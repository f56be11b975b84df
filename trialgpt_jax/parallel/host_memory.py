"""On CPU with glibc, lets the process reuse the memory that a step frees for the next step.

XLA allocates its buffers at every step, and glibc returns large freed blocks to the kernel at once, so that every step
faults in and zeroes all of its pages again (docs/performance.md#cpu-memory).
"""

import ctypes
import os

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of <malloc.h>
_HOLE = 2**26  # bytes


class HostMemory:
    """The heap of this process, as glibc's malloc manages it. Without `reuse` the other methods do nothing."""

    def __init__(self):
        self._libc, self._limit = None, None

    def reuse(self) -> None:
        """Keeps freed memory in the process. Call before JAX starts its threads, which have their own heaps."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            self._libc = libc
            for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
                libc.mallopt(parameter, value)

    def reserve(self, compiled: jax.stages.Compiled, slack: float = 2**30) -> None:
        """Call before the first step, when the state exists: plans the memory of the process.

        Arrays that outlive a step must not take the place of a step's temporaries, because the next temporaries would
        then need another place. The heap serves small requests from the smallest free block, so a free block of 64 MiB
        is left for them. Its pages take no memory before they are touched.

        Args:
          compiled: the step.
          slack: bytes.
        """
        if not self._libc:
            return
        self._libc.malloc_trim(ctypes.c_size_t(0))  # what compilation and evaluation have freed
        self._libc.malloc.restype = self._libc.realloc.restype = ctypes.c_void_p
        hole = ctypes.c_void_p(self._libc.malloc(ctypes.c_size_t(_HOLE)))
        # A second block of that size comes after the hole and shrinks in place, so the hole cannot merge with the rest.
        wall = ctypes.c_void_p(self._libc.malloc(ctypes.c_size_t(_HOLE)))
        self._libc.realloc(wall, ctypes.c_size_t(4096))
        self._libc.free(hole)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        self._limit = _resident_bytes() + temporaries + max(temporaries / 2, slack)

    def trim(self) -> None:
        """Call after every step: returns free memory to the kernel if the process exceeds its plan.

        That happens while a checkpoint is written, and when a block that moved left its old place free.
        """
        if self._limit is not None and _resident_bytes() > self._limit:
            self._libc.malloc_trim(ctypes.c_size_t(0))


MEMORY = HostMemory()  # of this process


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
