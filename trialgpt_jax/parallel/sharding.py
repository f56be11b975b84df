"""How arrays lie on the mesh: one table from logical axis names to mesh axes, and the shardings made from it."""

import collections

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trialgpt_jax import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both: fsdp is data parallelism with the state split as well

# Parameters: the model axis "embed" is split by fsdp, what a tensor-parallel matmul makes by tensor. The second kernels of
# such pairs have fsdp on their rows, too: gradients split by columns of bfloat16 are all-reduced on a TPU, not scattered.
# Activations: only the batch is split, plus what lies between the two matmuls of a tensor-parallel pair.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("heads_in", ("tensor", "fsdp")),
    ("mlp_in", ("tensor", "fsdp")),
    ("head_dim", None),
    ("position", None),
    ("batch", BATCH),
    ("length", None),
    ("hidden", None),
)


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, neighbours along tensor closest to each other.

    The slower network goes to the outer axes: between TPU slices only data runs, and between the hosts of a GPU cluster
    data before fsdp before tensor. Within a TPU slice JAX lays the axes along the torus.

    Args:
      sizes: devices per axis, see `config.mesh_sizes`.
      devices: the devices to use; all of them by default. Given ones may be of a chip that is not attached.

    Raises:
      UserError: the axes do not divide what lies within a slice or a host.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes[axis] for axis in AXES)
    if len(slices := {getattr(device, "slice_index", 0) for device in devices}) > 1:
        array = _over_slices(shape, devices, len(slices))
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = _over_hosts(shape, devices)
    # Auto axes, stated: jax's default is Explicit ones, on which Linen's logical partitioning fails.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_slices(shape: tuple[int, ...], devices: list[jax.Device], n_slices: int) -> np.ndarray:
    """Devices of several slices: each has its own part of the data axis, all of fsdp and tensor are inside."""
    data, fsdp, tensor = shape
    if data % n_slices:
        raise UserError(
            f"mesh.data={data} is not divisible by the {n_slices} slices, between which only data may run; "
            f"a slice has {len(devices) // n_slices} chips for mesh.fsdp x mesh.tensor"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // n_slices, fsdp, tensor), (n_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _over_hosts(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices of one or several hosts that form no torus, host after host: what is inside a host is innermost."""
    per_process = collections.Counter(device.process_index for device in devices)
    _, fsdp, tensor = shape
    for name, inner in (("mesh.tensor", tensor), ("mesh.fsdp x mesh.tensor", fsdp * tensor)):
        for here in per_process.values() if len(per_process) > 1 else ():
            if inner % here and here % inner:
                raise UserError(
                    f"{name}={inner} does not go with the {here} devices of a process: neither divides the other"
                )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.asarray(ordered).reshape(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [batch, ...] array: rows over data x fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def lay_out(boxed_shapes, mesh: Mesh):
    """Where the arrays of a tree lie on `mesh`.

    Args:
      boxed_shapes: ShapeDtypeStructs, boxed with logical axis names by Linen where they have them.
      mesh: from `make_mesh`.

    Returns:
      The same tree, unboxed, of ShapeDtypeStructs that carry a NamedSharding; arrays without names are replicated.
    """

    def place(leaf):
        names = leaf.names if isinstance(leaf, nn.meta.AxisMetadata) else ()
        sharding = NamedSharding(mesh, nn.logical_to_mesh_axes(names, RULES))
        # a box may hold no array: optax masks what is inside it
        inside = leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inside)

    return jax.tree.map(place, boxed_shapes, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def local_blocks(sharding: NamedSharding, process_index: int | None = None) -> tuple[tuple[int, ...], int]:
    """Which rows of a batch a process feeds: numbers of equal blocks of rows, ascending, and how many blocks there are.

    A process has every block that one of its devices holds, so two that share a block (along the tensor axis) both read
    it, and what is fed follows from the mesh alone, whatever order the devices of a torus were put in.

    Args:
      sharding: from `batch_sharding`.
      process_index: the process; None = this one.
    """
    n_blocks = sharding.mesh.shape["data"] * sharding.mesh.shape["fsdp"]
    process_index = jax.process_index() if process_index is None else process_index
    held = sharding.devices_indices_map((n_blocks,)).items()
    return tuple(sorted({i.start or 0 for device, (i,) in held if device.process_index == process_index})), n_blocks


def put_batch(local_rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global [batch, ...] array of which this process holds `local_rows`: its `local_blocks`, one after the other."""
    blocks, n_blocks = local_blocks(sharding)
    size = len(local_rows) // len(blocks)

    def rows(index):
        place = blocks.index((index[0].start or 0) // size) * size
        return local_rows[place : place + size]

    return jax.make_array_from_callback((size * n_blocks, *local_rows.shape[1:]), sharding, rows)
