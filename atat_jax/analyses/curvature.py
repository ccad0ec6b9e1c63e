"""How strongly the loss bends at an image: the Hessian's largest eigenvalue."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.data import batches
from atat_jax.evaluation.networks import Networks, classifiers
from atat_jax.typing import Array, Classifier

_NORMAL_95 = 1.96  # standard errors to either side


class _Iterate(NamedTuple):
  """The state of a power iteration on B matrices."""

  number: Array  # int32
  vectors: Array  # [B, H, W, C], of length 1
  eigenvalues: Array  # [B], Rayleigh quotients
  residuals: Array  # [B], |H v - lambda v| / |lambda|


def _dot(a: Array, b: Array) -> Array:
  return (a * b).reshape(len(a), -1).sum(-1)


def _of_length_one(x: Array) -> Array:
  """Each example scaled to an l2 norm of 1, however small it is; or 0."""
  shape = (-1, 1, 1, 1)
  largest = jnp.abs(x).reshape(len(x), -1).max(-1).reshape(shape)
  x = x / jnp.where(largest == 0, 1.0, largest)  # the squares do not vanish
  length = jnp.sqrt(_dot(x, x)).reshape(shape)
  return x / jnp.where(length == 0, 1.0, length)


def _power_iteration(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  tolerance: Array,
  num_iterations: Array,
) -> tuple[Array, Array]:
  """Eigenvalues and residuals [B]."""

  def total_loss(x: Array) -> Array:
    return losses.cross_entropy(classifier(x), labels).sum()

  # Reverse over reverse: the convolutions' own derivative on CPU has no forward
  # mode. As the Hessian is symmetric, pulling v back through the gradient is
  # H v; what the pull needs is computed once, before the loop. The examples do
  # not meet (running statistics), so one product serves all of them.
  _, pull = jax.vjp(jax.grad(total_loss), images)

  def measure(number: Array, vectors: Array) -> tuple[Array, _Iterate]:
    (product,) = pull(vectors)
    eigenvalues = _dot(vectors, product)
    rest = product - eigenvalues.reshape(-1, 1, 1, 1) * vectors
    residuals = jnp.sqrt(_dot(rest, rest)) / jnp.abs(eigenvalues)
    # Without any curvature there is nothing left to find.
    flat = jnp.abs(product).reshape(len(product), -1).max(-1) == 0
    residuals = jnp.where(flat, 0.0, residuals)
    return product, _Iterate(number, vectors, eigenvalues, residuals)

  def body(carry: tuple[Array, _Iterate]) -> tuple[Array, _Iterate]:
    product, last = carry
    return measure(last.number + 1, _of_length_one(product))

  def unfinished(carry: tuple[Array, _Iterate]) -> Array:
    _, last = carry
    # A residual that is not a number is not a small one.
    open_ = ~(last.residuals <= tolerance)
    return (last.number < num_iterations) & open_.any()

  start = jax.random.normal(key, images.shape, images.dtype)
  first = measure(jnp.ones((), jnp.int32), _of_length_one(start))
  _, last = lax.while_loop(unfinished, body, first)
  return last.eigenvalues, last.residuals


_jitted = compilation.jit(_power_iteration)


def curvature(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  num_iterations: int = 100,
  tolerance: float = 0.05,
  batch_size: int = 64,
) -> dict[str, np.ndarray]:
  """The eigenvalue of largest magnitude of the loss's Hessian in the pixels.

  By power iteration with Hessian-vector products, all in one compiled loop that
  ends when every image of a batch has converged. The eigenvalue keeps its sign
  (it is the Rayleigh quotient). A residual |H v - lambda v| / |lambda| of r
  says that an eigenvalue lies within r |lambda| of lambda.

  Mind what this sees. A network of (leaky) ReLUs is linear in its normalised
  input between kinks: within a linear region only the softmax bends the loss
  (the Gauss-Newton part, J^T (diag(p) - p p^T) J, which is never negative) and
  the normalisation of the input, where it is per image. The kinks themselves,
  where such a loss surface turns, add nothing. And where the softmax is
  saturated, p near one class, the curvature vanishes: a network that is sure of
  itself on clean images looks flat there, and need not be a step away. Attacked
  images show that; the landscape shows the kinks.

  Args:
    key: Random key of the first vectors.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], a few hundred; clean or attacked.
    labels: Integers [n]: the true classes.
    num_iterations: The most products of Hessian and vector.
    tolerance: The residual at which an image has converged.
    batch_size: Images at a time.

  Returns:
    `networks` [m], `num_examples`, `protocol`, `tolerance`, and for each
    network
    `<name>_eigenvalue` float32 [n], in nats per squared unit of the pixels,
    `<name>_residual` float32 [n],
    `<name>_mean`, the mean eigenvalue, and
    `<name>_interval` float64 [2], its 95 % confidence interval by the normal
    approximation (NaN for one image).

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  for name, value in (
    ("num_iterations", num_iterations),
    ("batch_size", batch_size),
  ):
    checks.positive(name, value, integer=True)
  checks.positive("tolerance", tolerance)
  named, images, labels, _ = classifiers(networks, images, labels)
  count = len(labels)
  indices, _ = batches.eval_batches(count, min(batch_size, count))
  found = {
    "networks": np.array(list(named)),
    "num_examples": np.array(count),
    "protocol": np.array(
      f"power iteration to a residual of {tolerance:g}, at most"
      f" {num_iterations} Hessian-vector products; running statistics"
    ),
    "tolerance": np.array(tolerance),
  }
  for name, classifier in named.items():
    parts = [
      _jitted(
        rng.stream(key, "curvature", number),
        classifier,
        images[rows],
        labels[rows],
        jnp.asarray(tolerance, images.dtype),
        jnp.asarray(num_iterations, jnp.int32),
      )
      for number, rows in enumerate(indices)
    ]
    eigenvalues, residuals = (
      np.concatenate(part)[:count] for part in zip(*parts, strict=True)
    )
    found[f"{name}_eigenvalue"] = eigenvalues
    found[f"{name}_residual"] = residuals
    mean, interval = _mean_interval(eigenvalues)
    found[f"{name}_mean"], found[f"{name}_interval"] = mean, interval
  return found


def _mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean of [n] values and its 95 % interval [2], by normal approximation."""
  values = np.asarray(values, np.float64)
  with np.errstate(invalid="ignore"):  # 0 / 0 for one value
    error = values.std() / np.sqrt(np.float64(len(values) - 1))
  mean = values.mean()
  return np.array(mean), mean + _NORMAL_95 * error * np.array([-1.0, 1.0])
