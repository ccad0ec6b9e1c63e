"""Curvature of the loss at images: the largest eigenvalue of its Hessian.

By power iteration with Hessian-vector products, all in one compiled loop that
ends when every image of a batch has converged. The eigenvalue keeps its sign
(it is the Rayleigh quotient). A residual |H v - lambda v| / |lambda| of r says
that an eigenvalue lies within r |lambda| of lambda.

Mind what this sees. A network of (leaky) ReLUs is linear in its normalised
input between kinks: within a linear region only the softmax bends the loss
(the Gauss-Newton part, J^T (diag(p) - p p^T) J, which is never negative) and
the normalisation of the input, where it is per image. The kinks themselves,
where such a loss surface turns, add nothing. And where the softmax is
saturated, p near one class, the curvature vanishes: a network that is sure of
itself on clean images looks flat there, and need not be robust. Attacked images
show that; the landscape shows the kinks.

Arrays: `networks` [m], `num_examples`, `protocol`, `tolerance`, and for each
network `<name>_eigenvalue` float32 [n], in nats per squared unit of the pixels,
`<name>_residual` float32 [n], `<name>_mean`, the mean eigenvalue, and
`<name>_interval` float64 [2], its 95 % confidence interval by Student's t (NaN
for one image, and where all eigenvalues are equal).
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.analyses import base
from atat_jax.data import batches
from atat_jax.drawing import style
from atat_jax.drawing.style import Axes
from atat_jax.drawing.text import plain
from atat_jax.evaluation.networks import (
  Networks,
  classifiers,
  devices,
  refuse_nonfinite,
)
from atat_jax.runs import files, intervals, wording
from atat_jax.typing import Array, Classifier


class _Iterate(NamedTuple):
  """State of a power iteration on B matrices."""

  number: Array  # int32
  vectors: Array  # [B, H, W, C], of length 1
  eigenvalues: Array  # [B], Rayleigh quotients
  residuals: Array  # [B], |H v - lambda v| / |lambda|


def _dot(a: Array, b: Array) -> Array:
  return (a * b).reshape(len(a), -1).sum(-1)


def _normalized(x: Array) -> Array:
  """Scales each example to an l2 norm of 1, however small it is; 0 stays 0."""
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
  """Returns eigenvalues and residuals [B]."""

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
    return measure(last.number + 1, _normalized(product))

  def unfinished(carry: tuple[Array, _Iterate]) -> Array:
    _, last = carry
    # A residual that is not a number is not a small one.
    open_ = ~(last.residuals <= tolerance)
    return (last.number < num_iterations) & open_.any()

  start = jax.random.normal(key, images.shape, images.dtype)
  first = measure(jnp.ones((), jnp.int32), _normalized(start))
  _, last = lax.while_loop(unfinished, body, first)
  return last.eigenvalues, last.residuals


_jitted = compilation.jit(_power_iteration)


def _measure(
  number: int,
  images: Array,
  labels: Array,
  *,
  key: Array,
  classifier: Classifier,
  tolerance: float,
  num_iterations: int,
) -> tuple[Array, Array]:
  """Returns eigenvalues and residuals [B] of one batch."""
  return _jitted(
    rng.stream(key, "curvature", number),
    classifier,
    images,
    labels,
    jnp.asarray(tolerance, images.dtype),
    jnp.asarray(num_iterations, jnp.int32),
  )


def loss_curvature(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  num_iterations: int = 100,
  tolerance: float = 0.05,
  batch_size: int = 64,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns the eigenvalues of largest magnitude of the loss's Hessians.

  Args:
    key: Random key of the first vectors.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], a few hundred; clean or attacked.
    labels: Integers [n]: the true classes.
    num_iterations: Largest number of products of Hessian and vector.
    tolerance: Residual at which an image has converged.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Returns:
    The arrays that the module describes, by name.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.key(key)
  checks.positive("num_iterations", num_iterations, integer=True)
  checks.positive("batch_size", batch_size, integer=True)
  checks.positive("tolerance", tolerance)
  named, images, labels, _ = classifiers(networks, images, labels)
  mesh = devices(mesh)
  found = {
    "networks": np.array(list(named)),
    "num_examples": np.array(len(labels)),
    "protocol": np.array(
      f"power iteration to a residual of {tolerance:g}, at most"
      f" {num_iterations} Hessian-vector products; running statistics"
    ),
    "tolerance": np.array(tolerance),
  }
  for name, classifier in named.items():
    measure = functools.partial(
      _measure,
      key=key,
      classifier=sharding.put_replicated(mesh, classifier),
      tolerance=tolerance,
      num_iterations=num_iterations,
    )
    size = min(batch_size, len(labels))
    eigenvalues, residuals = batches.map_batches(
      measure, images, labels, batch_size=size, mesh=mesh
    )
    found |= _statistics(name, eigenvalues, residuals)
  return found


def _statistics(
  name: str, eigenvalues: np.ndarray, residuals: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns one network's arrays, its eigenvalues finite."""
  refuse_nonfinite(name, "eigenvalues", eigenvalues)
  mean, interval = intervals.mean(eigenvalues)
  return {
    f"{name}_eigenvalue": eigenvalues,
    f"{name}_residual": residuals,
    f"{name}_mean": mean,
    f"{name}_interval": interval,
  }


def _draw(data: files.Arrays, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a row a network: the spread of the eigenvalues and their mean."""
  names = base.network_names(data)
  colors = style.model_colors(names)
  with style.context():
    fig = style.new_figure(5.2, 2.0 + 0.38 * len(names))
    ax = fig.add_subplot()
    ax.set_title("Curvature of the loss: its Hessian in the pixels")
    ax.set_xscale("log")
    for number, name in enumerate(names):
      _draw_row(ax, data, number, name, colors[name])
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first model on top
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("largest |eigenvalue| (nats per squared unit of pixels)")
    style.caption(fig, _how_to_read(data))
    return [style.save(fig, directory / "curvature.png")]


def _draw_row(
  ax: Axes, data: files.Arrays, row: int, name: str, color: str
) -> None:
  values = np.abs(data[f"{name}_eigenvalue"])
  low, quarter, median, three_quarters, high = np.percentile(
    values[values > 0] if (values > 0).any() else [np.nan],
    [5, 25, 50, 75, 95],
  )
  ax.plot([low, high], [row, row], color=color, linewidth=1.2)
  ax.barh(
    row,
    three_quarters - quarter,
    0.5,
    left=quarter,
    facecolor="white",
    edgecolor=color,
    linewidth=1.6,
  )
  ax.plot([median, median], [row - 0.25, row + 0.25], color=color)
  mean = abs(float(data[f"{name}_mean"]))
  ends = np.sort(abs(data[f"{name}_interval"]))
  ax.plot(ends, [row, row], color=style.BLACK, linewidth=2.5)
  ax.plot(mean, row, "D", color=style.BLACK, markersize=5)


def _how_to_read(data: files.Arrays) -> str:
  names = base.network_names(data)
  negative = np.mean([(data[f"{n}_eigenvalue"] < 0).mean() for n in names])
  converged = np.mean(
    [(data[f"{n}_residual"] <= data["tolerance"]).mean() for n in names]
  )
  return (
    f"{wording.plural(int(data['num_examples']), 'image')}. Diamond: mean with"
    " its 95 % interval; box: quartiles and median; line: 5th to 95th"
    f" percentile. {wording.percent(negative)} of the eigenvalues are negative."
    f" {wording.percent(converged)} have converged ({data['protocol']})."
  )


def _find(data: files.Arrays) -> base.Finding:
  names = base.network_names(data)
  means = {name: float(data[f"{name}_mean"]) for name in names}
  parts = []
  for name in names:
    low, high = data[f"{name}_interval"]
    known = f" (95% {low:.3g} to {high:.3g})" if np.isfinite(low) else ""
    parts.append(f"{name} {means[name]:.3g}{known}")
  sentence = (
    "The largest eigenvalue of the loss's Hessian in the pixels is on average"
    f" {wording.listed(parts)}."
  )
  flattest = min(names, key=lambda name: abs(means[name]))
  steepest = max(names, key=lambda name: abs(means[name]))
  if flattest != steepest and means[flattest]:
    ratio = abs(means[steepest] / means[flattest])
    sentence += (
      f" The loss of {steepest} bends {ratio:.3g} times as much as that of"
      f" {flattest}."
    )
  caption = (
    "How strongly the loss bends at the clean images. A network that is sure of"
    " itself looks flat there and need not be robust: the landscape and the"
    " attacks say more."
    f" {wording.plural(int(data['num_examples']), 'image')}, {data['protocol']}."
  )
  return base.Finding("Curvature of the loss", sentence, caption)


ANALYSIS = base.Analysis(
  stem="curvature",
  compute=loss_curvature,
  arguments=lambda settings, _: {"batch_size": settings.batch_size},
  images=base.first("num_examples"),
  draw=_draw,
  find=_find,
  unknown=("_interval", "_residual"),
)
