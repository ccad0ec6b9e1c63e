"""Forward pass with running or batch statistics of BatchNorm.

"running" is the mode of a deployed classifier: every image is classified by
itself. "batch" normalises by the statistics of the current batch, so that the
logits of an image depend on the other images; the paper's released code
evaluates in this mode, in which cross-entropy attacks can fail, so it is never
a default outside training.

`apply_fixed` is the mode "batch" for an attack whose gradients do not pass
through the statistics.
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables

_AGREEMENT = 0.1
"""Largest difference between training and evaluation pass, root mean square,
as a share of the logits' deviation; that of 16-bit rounding is a tenth of it."""


def apply(
  model: nn.Module,
  variables: Variables,
  images: Array,
  *,
  batch_norm: BatchNormMode = "running",
) -> tuple[Array, PyTree]:
  """Makes one forward pass.

  Args:
    model: A linen module whose `__call__` takes images and, if it has BatchNorm
      or dropout, `train` (or `training`, `is_training`, `deterministic`,
      `use_running_average`, `inference`).
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].
    batch_norm: "running" or "batch".

  Returns:
    Logits [B, K] and the collection `batch_stats` after the pass: unchanged in
    the mode "running", moved by this batch in the mode "batch".

  Raises:
    UserError: Unknown mode; a result that is not one array.
  """
  checks.choice("batch_norm", batch_norm, get_args(BatchNormMode))
  images = _check(model, variables, images)
  stats = variables.get("batch_stats", {})
  kwargs: dict[str, Any] = checks.mode_arguments(model, batch_norm == "batch")
  if batch_norm == "running" or not stats:
    return _one_array(model, model.apply(variables, images, **kwargs)), stats
  logits, updated = model.apply(
    variables, images, mutable=["batch_stats"], **kwargs
  )
  return _one_array(model, logits), updated["batch_stats"]


def _one_array(model: nn.Module, logits: Any) -> Array:
  """Checks that a network returns logits and nothing beside them."""
  if not isinstance(logits, jax.Array | np.ndarray):
    raise UserError(
      f"model: {type(model).__name__} returns a {type(logits).__name__}; allowed:"
      " one array of logits [B, K]; models.adapt(model, variables,"
      " call=lambda network, images: network(images)[0]) takes the first"
    )
  return logits  # type: ignore[return-value]


def _check(model: nn.Module, variables: Variables, images: Array) -> Array:
  checks.module(model)
  checks.instance(
    "variables", variables, Mapping, "the network's collections by name"
  )
  return checks.batch(images, "images")


def statistics(model: nn.Module, variables: Variables, images: Array) -> PyTree:
  """Computes the statistics by which the mode "batch" normalises a batch.

  For any network whose `batch_stats` are exponential averages. A training pass
  makes new = decay * old + (1 - decay) * batch of each, so that with old = 0,
  and the decay as the derivative with respect to old, batch = new /
  (1 - decay): no layer is intercepted, and no layer need tell its momentum.

  Args:
    model: A linen module whose `__call__` takes images and `train`.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].

  Returns:
    The batch's statistics, at least float32, in the form of `batch_stats`; a
    leaf that no batch moves, and one of integers, is as it was. No gradient
    passes through them.

  Raises:
    UserError: A training pass does not move the statistics linearly, so that
      they are no exponential averages.
  """
  images = _check(model, variables, images)
  variables, images = lax.stop_gradient((dict(variables), images))
  stats = variables.get("batch_stats", {})

  def moved(old: PyTree) -> PyTree:
    given = {**variables, "batch_stats": old}
    return apply(model, given, images, batch_norm="batch")[1]

  def decayed(old: PyTree) -> tuple[PyTree, PyTree]:
    new, decay = jax.jvp(moved, (old,), (ones,))
    return jax.tree.map(_linear, decay), new

  zeros = jax.tree.map(_zeros, stats)
  ones = jax.tree.map(_ones, zeros)
  decay, _, new = jax.jvp(decayed, (zeros,), (ones,), has_aux=True)
  return jax.tree.map(_of_batch, stats, new, decay)


def apply_fixed(model: nn.Module, variables: Variables, images: Array) -> Array:
  """Computes the logits of the mode "batch" with the statistics as constants.

  Values are those of a training pass, derivatives those of an evaluation pass
  with the `statistics` of these images. They are the derivatives of the
  training pass with its statistics held fixed if the two passes differ in
  nothing but where the statistics come from. Where their logits differ by more
  than rounding, since a layer does something else in training, derivatives are
  NaN: an attack counts and reports them.

  Args:
    model: A linen module whose `__call__` takes images and, if it has
      BatchNorm, `train`.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].

  Returns:
    Logits [B, K].

  Raises:
    UserError: The network has statistics but takes no `train`, or its
      statistics are no exponential averages.
  """
  images = _check(model, variables, images)
  if not variables.get("batch_stats", {}):
    return apply(model, variables, images, batch_norm="batch")[0]
  if not checks.mode_arguments(model, train=False):
    raise UserError(
      f"model: a {type(model).__name__} whose __call__ takes no `train`;"
      " allowed: a network that can be evaluated with given statistics"
    )
  given = {**variables, "batch_stats": statistics(model, variables, images)}
  # The same computation as for the statistics, which XLA makes once.
  logits, _ = apply(
    model, *lax.stop_gradient((dict(variables), images)), batch_norm="batch"
  )
  return _with_derivatives(logits, apply(model, given, images)[0])


def _is_float(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _zeros(leaf: Any) -> Any:
  """A statistic before any batch, in digits enough for 1 - decay."""
  if not _is_float(leaf):
    return leaf
  dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
  return jnp.zeros(jnp.shape(leaf), dtype)


def _ones(leaf: Any) -> Any:
  if _is_float(leaf):
    return jnp.ones_like(leaf)
  return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def _of_batch(stat: Any, new: Any, decay: Any) -> Any:
  """A batch's own share in a statistic that was 0 before."""
  if not _is_float(stat):
    return stat
  still = decay == 1
  return jnp.where(still, stat, new / jnp.where(still, 1, 1 - decay))


@jax.custom_jvp
def _constant(decay: Array) -> Array:
  """Returns the decay of a statistic; refuses one that the statistics change.

  Whether they do is known when it is differentiated: JAX tells derivatives that
  are zero whatever the numbers are.
  """
  return decay


def _check_constant(
  primals: tuple[Array], tangents: tuple[Any]
) -> tuple[Array, Any]:
  if not isinstance(tangents[0], SymbolicZero):
    raise UserError(
      "batch_stats: a batch does not move them linearly; allowed: exponential"
      " averages, as those of flax.linen.BatchNorm"
    )
  return primals[0], tangents[0]


_constant.defjvp(_check_constant, symbolic_zeros=True)


def _linear(decay: Any) -> Any:
  return decay if decay.dtype == jax.dtypes.float0 else _constant(decay)


@jax.custom_jvp
def _with_derivatives(logits: Array, others: Array) -> Array:
  """Returns logits exactly, which have the derivatives of others."""
  del others
  return logits


@_with_derivatives.defjvp
def _derivatives(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
  logits, others = primals
  error = jnp.sqrt(jnp.square(logits - others).mean())
  # Not finite logits say nothing; who evaluates counts them.
  other = error > _AGREEMENT * logits.std()
  return logits, tangents[1] * jnp.where(other, jnp.nan, 1.0)
