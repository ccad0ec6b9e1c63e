"""Mesh with one axis, `data`; the only module that knows it.

Parameters, optimizer state and the resident data set are replicated, batches
are split over the axis. The same program runs on one device, on eight and on
several hosts; BatchNorm statistics are those of the global batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.typing import PyTree


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh over `devices` (default: all of them) with the axis `data`."""
  if devices is None:
    devices = jax.devices()
  devices = checks.sequence("devices", devices, "devices")
  for device in devices:
    checks.instance("devices", device, jax.Device, "devices of jax.devices()")
  # Auto, not the default Explicit axes: random starts are drawn inside jit,
  # and explicit shardings would then differ between a loop's input and output.
  return jax.make_mesh(
    (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
  )


def mesh_or_all(mesh: Mesh | None) -> Mesh:
  """Returns a mesh that an argument gives, checked; for None, of all devices.

  Raises:
    UserError: Something else than a mesh with the axis `data` alone.
  """
  if mesh is None:
    return make_mesh()
  check_mesh(mesh)
  return mesh


def check_mesh(mesh: object) -> None:
  """Checks that a value is a mesh with the axis `data` alone.

  Raises:
    UserError: Anything else.
  """
  if not isinstance(mesh, Mesh) or mesh.axis_names != ("data",):
    raise UserError(
      f"mesh: {shown(mesh)}; allowed: a mesh of sharding.make_mesh()"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding in which every device holds the whole array."""
  check_mesh(mesh)
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(
  mesh: Mesh, batch_size: int, *, axis: int = 0
) -> NamedSharding:
  """Returns the sharding of a batch: split, or replicated if not divisible.

  Evaluation by batch statistics needs batches of exactly 100 images, whatever
  the number of devices.

  Args:
    mesh: Devices over which the batch is split.
    batch_size: Number of examples in the batch.
    axis: Axis of the examples.
  """
  check_mesh(mesh)
  checks.count("batch_size", batch_size)
  checks.count("axis", axis, 0)
  if batch_size % mesh.size:
    return replicated(mesh)
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_divides(mesh: Mesh, batch_size: int, *, parts: int = 1) -> None:
  """Checks that a batch divides evenly over the devices.

  Args:
    mesh: The devices.
    batch_size: Number of examples in the batch.
    parts: Number of parts in which the batch is computed, one after another.

  Raises:
    UserError: It does not; the message names the nearest sizes.
  """
  check_mesh(mesh)
  checks.count("batch_size", batch_size)
  checks.count("parts", parts)
  multiple = mesh.size * parts
  if batch_size % multiple == 0:
    return
  below = batch_size // multiple * multiple
  nearest = [size for size in (below, below + multiple) if size]
  in_parts = f" in {parts} parts (accumulate_steps)" if parts > 1 else ""
  raise UserError(
    f"batch_size: {batch_size} on {mesh.size} devices{in_parts}; allowed:"
    f" multiples of {multiple}, the nearest {' and '.join(map(str, nearest))}"
  )


def put_replicated(mesh: Mesh, tree: PyTree) -> PyTree:
  """Copies a pytree of arrays (the same in every process) to every device."""
  sharding = replicated(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def put(leaf: jax.Array | np.ndarray) -> jax.Array:
    # device_put accepts only addressable devices, and numpy has no keys.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

  return jax.tree.map(put, tree)


def put_batch(mesh: Mesh, array: np.ndarray, *, axis: int = 0) -> jax.Array:
  """Puts a batch on the devices; each process passes all and keeps its part.

  Args:
    mesh: Devices over which the batch is split.
    array: The whole batch, [B, ...], or [S, B, ...] with axis=1.
    axis: Axis of the examples.

  Returns:
    The global array, split along that axis.
  """
  array = checks.array(array, "array")  # type: ignore[assignment]
  checks.count("axis", axis, 0)
  if axis >= array.ndim:
    raise UserError(
      f"axis: {shown(axis)}; allowed: 0 to {array.ndim - 1}, an axis of the"
      f" array of shape {array.shape}"
    )
  sharding = batch_sharding(mesh, array.shape[axis], axis=axis)
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def to_host(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns global arrays as whole numpy arrays in every process."""
  check_mesh(mesh)
  if jax.process_count() > 1:
    tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return jax.tree.map(np.asarray, tree)
