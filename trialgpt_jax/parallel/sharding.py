"""How arrays lie on the mesh: one table from logical axis names to mesh axes, and the shardings made from it."""

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both: fsdp is data parallelism with the state split as well

# Parameters: the model axis "embed" is split by fsdp, what a tensor-parallel matmul makes by tensor.
# Activations: only the batch is split, plus what lies between the two matmuls of a tensor-parallel pair.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("position", None),
    ("batch", BATCH),
    ("length", None),
    ("hidden", None),
)


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, neighbours along tensor closest to each other.

    Args:
      sizes: devices per axis, see `config.mesh_sizes`.
      devices: the devices to use; all of them by default. Given ones may be of a chip that is not attached.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    # Auto axes, stated: jax.make_mesh defaults to Explicit ones, on which Linen's logical partitioning fails.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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


def put_batch(local_rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global [batch, ...] array of which this process holds `local_rows`, one contiguous block of rows."""
    return jax.make_array_from_process_local_data(sharding, local_rows)
