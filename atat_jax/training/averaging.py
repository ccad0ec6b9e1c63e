"""Averages of the weights along a run: EMA and SWA.

Both move the average towards the new weights by a share of the distance. The
share of EMA (Polyak and Juditsky, 1992) is

  1 - min(decay, (1 + t) / (10 + t)),   t updates made before this one,

so that the first steps are soon forgotten. The share of SWA (Izmailov et al.,
2018) is 1 / n for the n-th weights since its start, which makes an equal average
of all of them. Before its start, the average of SWA is the weights themselves.

The statistics of BatchNorm are not a function of the weights alone. Either they
are averaged like the weights, which is accurate if the weights hardly change
over the memory of the average. Or they are estimated with the averaged weights:
passes of the objective over training batches, attack included, move them as
training would if the weights did not change.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from atat_jax import compilation, rng, sharding
from atat_jax.data.base import Split
from atat_jax.objectives import Batch, Objective, Outcome
from atat_jax.state import TrainState
from atat_jax.training import accumulation
from atat_jax.training.batch import assemble, gather
from atat_jax.training.options import Options
from atat_jax.typing import Array, PyTree, Variables


def share(step: Array, options: Options) -> Array:
  """Returns the share by which the average moves after update `step`."""
  if options.ema_decay:
    return 1 - jnp.minimum(options.ema_decay, (1 + step) / (10 + step))
  return 1 / jnp.maximum(1, step - options.swa_start + 1)


def update(
  average: Variables | None,
  new: Variables,
  step: Array,
  options: Options,
) -> Variables | None:
  """Updates the average after update `step`.

  Args:
    average: {"params", "batch_stats"}; None: nothing is averaged.
    new: New weights and statistics, of the same structure.
    step: Number of the update, int32 scalar, from 0.
    options: Options that choose the average.

  Returns:
    The average. If statistics are to be estimated, it holds those of the
    current weights, so that no state depends on when they were estimated.
  """
  if average is None:
    return None
  moved: Variables = optax.incremental_update(
    new, average, share(step, options)
  )
  if options.estimates:
    return {**moved, "batch_stats": new["batch_stats"]}
  return moved


StatisticsPass = Callable[..., tuple[PyTree, PyTree]]
"""(state, teacher or None, data, indices, extra, statistics, mean, index) to
the statistics after the pass and the new mean."""


def make_statistics_pass(
  model: nn.Module,
  objective: Objective,
  *,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options,
) -> StatisticsPass:
  """Compiles `move_statistics`; nothing is donated.

  Args:
    model: Network of the student.
    objective: Objective whose passes move the statistics.
    mesh: Devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Options of the step.

  Returns:
    The compiled pass.
  """
  function = functools.partial(
    move_statistics,
    model=model,
    objective=objective,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  return compilation.jit(function, out_shardings=sharding.replicated(mesh))


def move_statistics(
  state: TrainState,
  teacher: Variables | None,
  data: Split | None,
  indices: Array,
  extra: Split | None,
  statistics: PyTree,
  mean: PyTree,
  index: Array,
  *,
  model: nn.Module,
  objective: Objective,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int,
  flip: bool,
  options: Options,
) -> tuple[PyTree, PyTree]:
  """Moves statistics by a pass of the objective with the averaged weights.

  Args:
    state: State of the run; its averaged weights are used.
    teacher: The teacher's variables, or None.
    data: Training split, on the device.
    indices: Examples of the batch in the split, int32 [M].
    extra: Further images [E] of the batch, or None.
    statistics: Running statistics before the pass.
    mean: Mean of the statistics so far.
    index: Number of the pass, from 0, int32.
    model, objective, mesh, num_classes, padding, flip, options: See
      `make_statistics_pass`.

  Returns:
    The statistics after the pass, and the mean of those after the passes of the
    second half (the first half is burn-in).
  """
  key = rng.stream(state.rng, "statistics", index)
  batch = assemble(
    key,
    state.step,
    *gather(data, indices, extra, mesh),
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  _, outcome = accumulation.accumulate(
    functools.partial(_outcome, state.ema["params"], teacher, model, objective),
    statistics,
    rng.stream(key, "attack", state.step),
    batch,
    parts=options.accumulate_steps,
    params=None,
  )
  statistics = outcome.batch_stats
  burn_in = options.statistics_batches // 2
  weight = 1 / jnp.maximum(1, index - burn_in + 1)
  return statistics, optax.incremental_update(statistics, mean, weight)


def _outcome(
  params: PyTree,
  teacher: Variables | None,
  model: nn.Module,
  objective: Objective,
  stats: PyTree,
  key: Array,
  batch: Batch,
) -> tuple[None, Outcome]:
  """An `accumulation.Part` without a gradient."""
  variables = {"params": params, "batch_stats": stats}
  prepared = objective.prepare(key, model, variables, teacher, batch)
  return None, objective.loss(model, variables, prepared, batch)


def estimate_statistics(
  state: TrainState,
  statistics_pass: StatisticsPass,
  teacher: Variables | None,
  data: Split | None,
  draw: Callable[[int], tuple[Array, Split | None]],
  options: Options,
) -> TrainState:
  """Estimates the statistics of the averaged weights.

  The estimate is a function of the state alone, not of earlier estimates.

  Args:
    state: State of the run.
    statistics_pass: Result of `make_statistics_pass`.
    teacher: The teacher's variables, or None.
    data: Training split, on the device; None: it is streamed.
    draw: Number of a batch to its indices and extra images, on the device.
    options: Options of the step.

  Returns:
    The state with the estimate; the same state if there is nothing to estimate.
  """
  if not options.estimates or int(state.step) <= options.swa_start:
    return state
  statistics = mean = state.batch_stats
  for i in range(options.statistics_batches):
    statistics, mean = statistics_pass(
      state, teacher, data, *draw(i), statistics, mean, jnp.int32(i)
    )
  return state.replace(ema={**state.ema, "batch_stats": mean})
