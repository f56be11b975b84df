"""Shardings: the mesh, one table from logical axis names to mesh axes, and every sharding derived from it."""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trialgpt_jax import UserError
from trialgpt_jax.parallel.axes import AXES

# Logical axis of a parameter or activation -> mesh axes.
# Parameters: fsdp splits "embed", tensor splits what a tensor-parallel matmul produces. The second kernel of such a
# pair has fsdp on its rows too: a TPU all-reduces gradients split by columns (docs/performance.md#fsdp-gather).
# Activations: only the batch is split. fsdp is data parallelism that splits the state as well.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("heads_in", ("tensor", "fsdp")),
    ("mlp_in", ("tensor", "fsdp")),
    ("position", None),
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("hidden", None),
    ("channel", None),
)


def mesh_axis(name: str) -> str | tuple[str, ...] | None:
    """The mesh axes over which the logical axis `name` is split, for collectives inside `shard_map`."""
    return dict(RULES)[name]


def spec(*names: str | None) -> P:
    """The PartitionSpec of an array with these logical axes."""
    return nn.logical_to_mesh_axes(names, RULES)


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; neighbours along tensor are closest to each other.

    The slower network is used by the outer axes: only data runs between TPU slices; between the hosts of a GPU cluster
    data is outside fsdp and fsdp outside tensor. Within a TPU slice JAX maps the axes to the torus.

    Args:
      sizes: devices per axis, see `axes.mesh_sizes`.
      devices: default: all devices. They may belong to a chip that is not attached.

    Raises:
      UserError: the axes do not divide the devices of a slice or a host.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes[axis] for axis in AXES)
    if len(slices := {getattr(device, "slice_index", 0) for device in devices}) > 1:
        array = _over_slices(shape, devices, len(slices))
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = _over_hosts(shape, devices)
    # Auto is explicit here because JAX's default is Explicit, on which Linen's logical partitioning fails.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device(device: jax.Device | None = None) -> Mesh:
    """The mesh of one device; default: the first local one."""
    return make_mesh(dict.fromkeys(AXES, 1), [device or jax.local_devices()[0]])


def _over_slices(shape: tuple[int, ...], devices: Sequence[jax.Device], n_slices: int) -> np.ndarray:
    """Devices of several slices: data runs over slices and inside them, fsdp and tensor only inside."""
    data, fsdp, tensor = shape
    if data % n_slices:
        raise UserError(
            f"mesh.data={data} is not divisible by the {n_slices} slices, between which only data may run; "
            f"a slice has {len(devices) // n_slices} chips for mesh.fsdp x mesh.tensor"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // n_slices, fsdp, tensor), (n_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _over_hosts(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices of hosts that form no torus, ordered by host, so that the inner axes stay inside a host."""
    per_process = collections.Counter(device.process_index for device in devices)
    _, fsdp, tensor = shape
    for name, inner in (("mesh.tensor", tensor), ("mesh.fsdp x mesh.tensor", fsdp * tensor)):
        for here in per_process.values() if len(per_process) > 1 else ():
            if inner % here and here % inner:
                raise UserError(
                    f"{name}={inner} does not fit the {here} devices of a process: neither divides the other"
                )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.asarray(ordered).reshape(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [batch, ...] array: rows over data x fsdp."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, P())


def shard_shapes(boxed_shapes, mesh: Mesh):
    """Adds shardings to a tree of shapes.

    Args:
      boxed_shapes: ShapeDtypeStructs, boxed by Linen with logical axis names where they have them.
      mesh: from `make_mesh`.

    Returns:
      The same tree, unboxed, of ShapeDtypeStructs with a NamedSharding; arrays without names are replicated.
    """

    def place(leaf):
        boxed = isinstance(leaf, nn.meta.AxisMetadata)
        axes = spec(*leaf.names) if boxed else ()

        def placed(x):  # an optimizer may keep one value per row or column: an axis of length 1, which is not split
            split = P(*(None if length == 1 else axis for length, axis in zip(x.shape, axes, strict=False)))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

        # A box may contain no array: optax masks the content of boxes.
        return jax.tree.map(placed, leaf.unbox() if boxed else leaf)

    return jax.tree.map(place, boxed_shapes, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def local_blocks(sharding: NamedSharding, process_index: int | None = None) -> tuple[tuple[int, ...], int]:
    """The rows of a batch that a process feeds, as numbers of equal blocks of rows.

    A process feeds each block that one of its devices holds; two processes that share a block (along the tensor axis)
    both read it. The result follows from the mesh alone, whatever the order of devices on a torus.

    Args:
      sharding: from `batch_sharding`.
      process_index: default: this process.

    Returns:
      The block numbers, ascending, and the number of blocks of the batch.
    """
    n_blocks = math.prod(sharding.mesh.shape[axis] for axis in mesh_axis("batch"))
    process_index = jax.process_index() if process_index is None else process_index
    held = sharding.devices_indices_map((n_blocks,)).items()
    return tuple(sorted({i.start or 0 for device, (i,) in held if device.process_index == process_index})), n_blocks


def put_batch(local_rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global [batch, ...] array of which this process has `local_rows`, the rows of its `local_blocks`."""
    blocks, n_blocks = local_blocks(sharding)
    size = len(local_rows) // len(blocks)

    def rows(index):
        place = blocks.index((index[0].start or 0) // size) * size
        return local_rows[place : place + size]

    return jax.make_array_from_callback((size * n_blocks, *local_rows.shape[1:]), sharding, rows)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global array of which every process has the whole content."""
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index])


def split_along_tensor(tree, mesh: Mesh):
    """The arrays of a tree on `mesh`, split where they were split along tensor, and whole along its other axes."""
    tensor = mesh_axis("vocab")

    def axis(axes: str | tuple[str, ...] | None) -> str | None:
        return tensor if tensor == axes or (isinstance(axes, tuple) and tensor in axes) else None

    def sharding(leaf):
        axes = getattr(leaf.sharding, "spec", ())  # no NamedSharding: the array is not split
        return NamedSharding(mesh, P(*map(axis, axes)))

    return jax.device_put(tree, jax.tree.map(sharding, tree))
