"""The state of a training run: data only, no behaviour."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from atat_jax import compilation, metrics
from atat_jax.typing import Array, PyTree, Variables

NEVER = jnp.iinfo(jnp.int32).max
"""In `nonfinite`: this term has always been finite."""


class TrainState(struct.PyTreeNode):
  """Everything that a step changes, and the key that it draws from.

  Attributes:
    step: int32, the number of updates made.
    params: The network's parameters.
    batch_stats: Its running statistics.
    opt_state: The optimizer's state.
    rng: The run's key; constant, each step derives its own from it.
    sums: Metrics since the last log line, as sums and counts.
    nonfinite: Term to the first step at which it was not finite.
    ema: Averaged {"params", "batch_stats"} (`averaging`); None: no average.
  """

  step: Array
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rng: Array
  sums: metrics.Sums
  nonfinite: dict[str, Array]
  ema: PyTree = None


def variables(state: TrainState) -> Variables:
  """The network's collections, as they are trained."""
  return {"params": state.params, "batch_stats": state.batch_stats}


def evaluated(state: TrainState) -> Variables:
  """What is validated and evaluated: the averaged ones where there are any."""
  return variables(state) if state.ema is None else state.ema


def create(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  rng: Array,
  images: Array,
  *,
  metric_names: tuple[str, ...],
  term_names: tuple[str, ...],
  initial: Variables | None = None,
  averages: bool = False,
) -> TrainState:
  """The state before the first step.

  Args:
    model: The network.
    optimizer: Its optimizer.
    rng: The run's key.
    images: Of the right shape, [1, H, W, C].
    metric_names: What the step accumulates.
    term_names: Terms that must stay finite.
    initial: Variables to start from (the teacher's); None: fresh ones.
    averages: Whether averaged variables are kept beside them.

  Returns:
    A state.
  """

  def build(rng: Array, images: Array, initial: Variables | None) -> TrainState:
    if initial is None:
      initial = model.init(jax.random.fold_in(rng, 0), images)
    # The step donates the state: what belongs to the caller is copied.
    initial, rng = jax.tree.map(jnp.copy, (initial, rng))
    found = {
      "params": initial["params"],
      "batch_stats": initial.get("batch_stats", {}),
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      **found,
      opt_state=optimizer.init(initial["params"]),
      rng=rng,
      sums=metrics.zeros(metric_names),
      nonfinite={name: jnp.asarray(NEVER, jnp.int32) for name in term_names},
      ema=jax.tree.map(jnp.copy, found) if averages else None,
    )

  # One program: operation by operation, a network's layers are hundreds.
  return compilation.jit(build, once=True)(rng, images, initial)
