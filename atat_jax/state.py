"""State of a training run: data only, no behaviour."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from atat_jax import compilation, metrics
from atat_jax.typing import Array, PyTree, Variables

NEVER = jnp.iinfo(jnp.int32).max
"""Value in `TrainState.nonfinite` of a term that has always been finite."""

LEFT_BEHIND = (
  "updated parameters",
  "statistics",
  "optimizer state",
  "averages",
)
"""What a step leaves behind, and must be finite besides terms and gradient."""

ATTACK = "inner attack"
"""Name of the inner attack, whose gradients must be finite as well."""

MOST_NOTED = 128
"""Largest number of skipped steps that a state notes between two log lines."""

MOST_LEFT_OUT = 10
"""Largest number of steps that a run leaves out after going back."""


class Guard(struct.PyTreeNode):
  """Steps that leave everything as it was (`training.soundness`).

  Attributes:
    left_out: int32 [MOST_LEFT_OUT]: steps that the host has left out; -1: none.
    steps: int32 [MOST_NOTED]: steps that were skipped since the last log line.
    terms: int32 [MOST_NOTED]: for each of them, bit i is set if the i-th name
      of what must be finite was not.
    count: Number of steps skipped since the last log line, int32.
  """

  left_out: Array
  steps: Array
  terms: Array
  count: Array


def make_guard() -> Guard:
  """Makes a guard that has nothing to leave out and has noted nothing."""
  return Guard(
    left_out=jnp.full(MOST_LEFT_OUT, -1, jnp.int32),
    steps=jnp.zeros(MOST_NOTED, jnp.int32),
    terms=jnp.zeros(MOST_NOTED, jnp.int32),
    count=jnp.zeros((), jnp.int32),
  )


class TrainState(struct.PyTreeNode):
  """State of a training run: everything that a step changes, and the run's key.

  Attributes:
    step: Number of updates made, int32.
    params: Parameters of the network.
    batch_stats: Running statistics of the network.
    opt_state: State of the optimizer.
    rng: Key of the run; constant, each step derives its own key from it.
    sums: Metrics since the last log line, as sums and counts.
    nonfinite: Term to the first step at which it was not finite.
    ema: Averaged {"params", "batch_stats"} (`averaging`); None: no average.
    unsound: The inner attack, and what a step leaves behind, to the first step
      at which it was not finite. No checkpoint has it, as none is written of such a state.
    guard: Steps that are left out, and those that were; None: the policy is to
      stop. No checkpoint has it: what it notes is written down before.
  """

  step: Array
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rng: Array
  sums: metrics.Sums
  nonfinite: dict[str, Array]
  ema: PyTree = None
  unsound: dict[str, Array] = struct.field(default_factory=dict)
  guard: Guard | None = None


def variables(state: TrainState) -> Variables:
  """Returns the trained variables of the network."""
  return {"params": state.params, "batch_stats": state.batch_stats}


def evaluated(state: TrainState) -> Variables:
  """Returns the variables to evaluate: averaged ones where they are kept."""
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
  guarded: bool = False,
) -> TrainState:
  """Creates the state before the first step.

  Args:
    model: Network.
    optimizer: Optimizer of the network's parameters.
    rng: Key of the run.
    images: Images of the right shape, [1, H, W, C].
    metric_names: Names of the metrics that the step accumulates.
    term_names: Names of the terms that must stay finite.
    initial: Variables to start from (the teacher's); None: fresh ones.
    averages: Whether averaged variables are kept beside the trained ones.
    guarded: Whether steps can be left out (policies skip and rollback).

  Returns:
    The state.
  """
  # One program: compiled one operation at a time, a network takes hundreds.
  function = functools.partial(
    build,
    model=model,
    optimizer=optimizer,
    metric_names=metric_names,
    term_names=term_names,
    averages=averages,
    guarded=guarded,
  )
  return compilation.jit(function, once=True)(rng, images, initial)


def build(
  rng: Array,
  images: Array,
  initial: Variables | None,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  metric_names: tuple[str, ...],
  term_names: tuple[str, ...],
  averages: bool,
  guarded: bool,
) -> TrainState:
  """Builds the state of `create`, which compiles this function."""
  if initial is None:
    initial = model.init(jax.random.fold_in(rng, 0), images)
  # The step donates the state, so the caller's arrays are copied.
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
    unsound={
      name: jnp.asarray(NEVER, jnp.int32)
      for name in (ATTACK, *LEFT_BEHIND)
      if averages or name != "averages"
    },
    guard=make_guard() if guarded else None,
  )
