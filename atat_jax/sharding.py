"""Mesh of the devices; the only module that knows it.

It has one axis, `data`: parameters, optimizer state and the resident data set
are replicated, batches are split. The same program runs on one device, on eight
and on several hosts; BatchNorm statistics are those of the global batch.

With a second axis, `model`, batches are split over both, and the large arrays
of parameters, optimizer state and averages over `model` alone. A step gathers
the parameters for its passes and updates each part where it is ("fully sharded
data parallel"; Rajbhandari et al., ZeRO, 2020): memory for networks whose state
fills a device.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.typing import PyTree

_BOTH = ("data", "model")

_SPLIT = ("params", "opt_state", "ema")
_SMALLEST = 4096
"""Fewest numbers of an array that is split; others are cheaper to keep whole."""


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


def split_mesh(mesh: Mesh, model_axis: int) -> Mesh:
  """Returns a mesh of the same devices with an axis `model`.

  Args:
    mesh: Mesh of `make_mesh`.
    model_axis: Number of neighbouring devices that share the large arrays of a
      training state; 1: the mesh as it is.

  Raises:
    UserError: It does not divide the number of devices.
  """
  check_mesh(mesh)
  checks.count("model_axis", model_axis)
  if model_axis == 1:
    return mesh
  if mesh.size % model_axis:
    known = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0]
    raise UserError(
      f"model_axis: {model_axis} on {mesh.size} devices; allowed:"
      f" {', '.join(map(str, known))}"
    )
  return jax.make_mesh(
    (mesh.size // model_axis, model_axis),
    _BOTH,
    axis_types=(AxisType.Auto,) * 2,
    devices=mesh.devices.ravel().tolist(),
  )


def mesh_or_all(mesh: Mesh | None) -> Mesh:
  """Returns a mesh that an argument gives, checked; for None, of all devices.

  Raises:
    UserError: Something else than a mesh of this module.
  """
  if mesh is None:
    return make_mesh()
  check_mesh(mesh)
  return mesh


def check_mesh(mesh: object) -> None:
  """Checks that a value is a mesh of this module.

  Raises:
    UserError: Anything else.
  """
  known = (("data",), _BOTH)
  if not isinstance(mesh, Mesh) or mesh.axis_names not in known:
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
  names = "data" if mesh.axis_names == ("data",) else _BOTH
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, names))


def splits_state(mesh: Mesh) -> bool:
  """Returns whether large arrays of a training state are split."""
  check_mesh(mesh)
  return mesh.axis_names == _BOTH


def state_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns the sharding of each array of a training state.

  Args:
    mesh: The devices.
    tree: Training state, with the fields `params`, `opt_state` and `ema`; arrays
      or shapes.

  Returns:
    The tree of the shardings: replicated, but for the arrays of these fields
    that have `_SMALLEST` numbers or more, along their longest side that divides.
  """
  if not splits_state(mesh):
    return jax.tree.map(lambda leaf: replicated(mesh), tree)
  size = mesh.shape["model"]

  def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    sides = [
      (side, axis) for axis, side in enumerate(leaf.shape) if side % size == 0
    ]
    field = getattr(path[0], "name", None)
    if field not in _SPLIT or leaf.size < _SMALLEST or not sides:
      return replicated(mesh)
    _, axis = max(sides)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))

  return jax.tree_util.tree_map_with_path(choose, tree)


def split_state(mesh: Mesh, tree: PyTree) -> PyTree:
  """Constrains a training state to `state_shardings`, inside jit."""
  if not splits_state(mesh):
    return tree
  return jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree))


def gather(mesh: Mesh, tree: PyTree) -> PyTree:
  """Gathers the arrays of a training state that are split, inside jit."""
  if not splits_state(mesh):
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


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
  return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def put_state(mesh: Mesh, tree: PyTree) -> PyTree:
  """Puts a training state (the same in every process) on the devices.

  Args:
    mesh: The devices.
    tree: Training state.

  Returns:
    The state with `state_shardings`.
  """
  if not splits_state(mesh):
    return put_replicated(mesh, tree)
  return jax.tree.map(_put, tree, state_shardings(mesh, tree))


def _put(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
  # device_put accepts only addressable devices, and numpy has no keys.
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


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


def as_numpy(tree: PyTree) -> PyTree:
  """Returns global arrays as whole numpy arrays, keys as their numbers.

  Args:
    tree: Arrays, whole or split as `state_shardings` says; every process passes
      them.
  """

  def whole(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    split = leaf.sharding
    if isinstance(split, NamedSharding) and not leaf.is_fully_replicated:
      everywhere = NamedSharding(split.mesh, PartitionSpec())
      leaf = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)
