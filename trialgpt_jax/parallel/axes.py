"""The axes of the device mesh and their sizes, in plain Python: no JAX is imported here."""

import math
from collections.abc import Mapping

from trialgpt_jax import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_sizes(mesh: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Devices per mesh axis; -1 is replaced by what the other axes leave.

    Args:
      mesh: `config.mesh`.
      n_devices: over all processes.

    Raises:
      UserError: the axes do not multiply to `n_devices`.
    """
    sizes = {axis: mesh[axis] for axis in AXES}
    requested = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{requested}: sizes must be positive, and at most one of them -1 (the rest)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest and n_devices % known == 0:
        sizes[rest[0]] = n_devices // known
    elif rest or known != n_devices:
        multiple = "a multiple of " if rest else ""
        raise UserError(f"{requested} needs {multiple}{known} devices, but there are {n_devices}")
    return sizes
