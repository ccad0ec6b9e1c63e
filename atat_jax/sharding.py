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


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns the places in a batch that the devices of this process hold.

  Args:
    mesh: Devices over which the batch is split.
    batch_size: Number of examples in the batch, B.

  Returns:
    int64 [M], rising; all of them where the batch does not divide.
  """
  found = batch_sharding(mesh, batch_size).addressable_devices_indices_map(
    (batch_size,)
  )
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in found.values()]))


def put_rows(
  mesh: Mesh, array: np.ndarray, batch_size: int, *, axis: int = 0
) -> jax.Array:
  """Puts a batch on the devices, of which each process has its rows alone.

  Args:
    mesh: Devices over which the batch is split.
    array: The rows of `local_rows`, [M, ...], or [S, M, ...] with axis=1.
    batch_size: Number of examples in the batch, B.
    axis: Axis of the examples.

  Returns:
    The global array, [B, ...] or [S, B, ...], as `put_batch` returns it.
  """
  place = np.empty(batch_size, np.int64)
  rows = local_rows(mesh, batch_size)
  place[rows] = np.arange(len(rows))
  shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # noqa: S101 - narrows the type
    wanted = place[index[axis]]
    first = int(wanted[0])
    contiguous = slice(first, first + len(wanted))
    return array[(*index[:axis], contiguous, *index[axis + 1 :])]

  return jax.make_array_from_callback(
    shape, batch_sharding(mesh, batch_size, axis=axis), part
  )


def to_host(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns global arrays as whole numpy arrays in every process."""
  check_mesh(mesh)
  if jax.process_count() > 1:
    tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return jax.tree.map(np.asarray, tree)
