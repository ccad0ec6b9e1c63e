"""Averages of the weights along a run: EMA and SWA.

Both move the average by a share of the way to the new weights, the EMA
(Polyak and Juditsky, 1992) by

  1 - min(decay, (1 + t) / (10 + t)),   t updates made before this one,

so that the first steps are soon forgotten, and SWA (Izmailov et al., 2018) by
1 / n for the n-th weights since its start, an equal average of all of them.
Before its start SWA's average is the weights themselves.

BatchNorm's statistics are not a function of the weights alone. Either they are
averaged as the weights are, good where these have hardly changed over the
average's memory; or they are estimated with the averaged weights: passes of the
objective over training batches, attack and all, move them as they would move
in training if the weights stood still.
"""

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
  """How far the average moves to the weights after update `step`, from 0."""
  if options.ema_decay:
    return 1 - jnp.minimum(options.ema_decay, (1 + step) / (10 + step))
  return 1 / jnp.maximum(1, step - options.swa_start + 1)


def update(
  average: Variables | None,
  new: Variables,
  step: Array,
  options: Options,
) -> Variables | None:
  """The average after update `step`.

  Args:
    average: {"params", "batch_stats"}; None: nothing is averaged.
    new: The same of the weights just made.
    step: int32 scalar, from 0.
    options: Which average.

  Returns:
    The average. Where statistics are to be estimated it holds those of the
    weights, so that no state depends on when they were estimated.
  """
  if average is None:
    return None
  moved: Variables = optax.incremental_update(
    new, average, share(step, options)
  )
  if options.estimates:
    return {**moved, "batch_stats": new["batch_stats"]}
  return moved


Pass = Callable[..., tuple[PyTree, PyTree]]


def make_statistics_pass(
  model: nn.Module,
  objective: Objective,
  *,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options,
) -> Pass:
  """Builds the pass that estimates statistics of the averaged weights.

  Args:
    model: The network.
    objective: Whose passes move the statistics.
    mesh: The devices.
    num_classes: K.
    padding: Of the augmentation.
    flip: Of the augmentation.
    options: Those of the step.

  Returns:
    (state, teacher, data, indices, extra, statistics, their mean, i) to the
    statistics after pass i, from 0, and the mean of those of the second half
    of all passes. Nothing is donated.
  """
  burn_in = options.statistics_batches // 2

  def statistics_pass(
    state: TrainState,
    teacher: Variables | None,
    data: Split,
    indices: Array,
    extra: Split | None,
    statistics: PyTree,
    mean: PyTree,
    index: Array,
  ) -> tuple[PyTree, PyTree]:
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

    def part(
      stats: PyTree, part_key: Array, part_batch: Batch
    ) -> tuple[None, Outcome]:
      variables = {"params": state.ema["params"], "batch_stats": stats}
      prepared = objective.prepare(
        part_key, model, variables, teacher, part_batch
      )
      return None, objective.loss(model, variables, prepared, part_batch)

    _, outcome = accumulation.accumulate(
      part,
      statistics,
      rng.stream(key, "attack", state.step),
      batch,
      parts=options.accumulate_steps,
      params=None,
    )
    statistics = outcome.batch_stats
    weight = 1 / jnp.maximum(1, index - burn_in + 1)
    return statistics, optax.incremental_update(statistics, mean, weight)

  return compilation.jit(
    statistics_pass, out_shardings=sharding.replicated(mesh)
  )


def estimate_statistics(
  state: TrainState,
  statistics_pass: Pass,
  teacher: Variables | None,
  data: Split,
  draw: Callable[[int], tuple[Array, Split | None]],
  options: Options,
) -> TrainState:
  """The state with estimated statistics of its averaged weights.

  Args:
    state: The state; a function of it, and of nothing estimated before.
    statistics_pass: As `make_statistics_pass` makes it.
    teacher: Variables, or None.
    data: The training split, on the device.
    draw: Number of a batch to its indices and extra images, on the device.
    options: Those of the step.

  Returns:
    The state; itself where nothing is to be estimated.
  """
  if not options.estimates or int(state.step) <= options.swa_start:
    return state
  statistics = mean = state.batch_stats
  for i in range(options.statistics_batches):
    statistics, mean = statistics_pass(
      state, teacher, data, *draw(i), statistics, mean, jnp.int32(i)
    )
  return state.replace(ema={**state.ema, "batch_stats": mean})
