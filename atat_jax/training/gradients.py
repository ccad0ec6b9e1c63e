"""Gradients of a step: that of the loss, and the share that each term has in it.

Both make the batch of the step, its augmentation and its attack from the same
draws, in the same parts. With weight perturbation both are taken at w + d
(`awp`), where d is that of the whole loss: there the terms' gradients, weights
applied, sum to the gradient of the step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from atat_jax import compilation, rng, sharding
from atat_jax.data.base import Split
from atat_jax.objectives import Batch, Objective, Outcome, attack_is_finite
from atat_jax.state import TrainState
from atat_jax.training import accumulation, awp
from atat_jax.training.batch import assemble, gather
from atat_jax.training.options import OFF, Options
from atat_jax.typing import Array, PyTree, Variables

REFERENCE = "cross_entropy"
"""Term that the others' gradients are compared with."""

TermRatios = Callable[..., dict[str, Array]]
"""(state, teacher or None, data, indices, extra=None) to name and ratio."""


def differentiate(
  state: TrainState,
  teacher: Variables | None,
  data: Split | None,
  indices: Array,
  extra: Split | None = None,
  *,
  model: nn.Module,
  objective: Objective,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options = OFF,
) -> tuple[Batch, PyTree, Outcome]:
  """Makes the batch of a step and differentiates its loss; for use inside jit.

  Args:
    state: State before the step.
    teacher: The teacher's variables, or None.
    data: Training split, on the device.
    indices: Examples of the batch in the split, int32 [M].
    extra: Further images [E] of the batch, or None; M + E = B.
    model: Network of the student.
    objective: Loss that is minimised.
    mesh: Devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Options that the objective is combined with.

  Returns:
    The batch, the gradient, and the loss with its terms.
  """
  part = functools.partial(
    _differentiate, state, teacher, model, objective, options
  )
  return _in_parts(
    part,
    state.params,
    state,
    data,
    indices,
    extra,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )


def _in_parts(
  part: accumulation.Part,
  structure: PyTree,
  state: TrainState,
  data: Split | None,
  indices: Array,
  extra: Split | None,
  *,
  mesh: jax.sharding.Mesh,
  options: Options,
  **augmentation: Any,
) -> tuple[Batch, PyTree, Outcome]:
  """Makes the batch of a step and averages a gradient over its parts."""
  with jax.named_scope("augmentation"):
    batch = assemble(
      state.rng,
      state.step,
      *gather(data, indices, extra, mesh),
      options=options,
      **augmentation,
    )
  gradient, outcome = accumulation.accumulate(
    part,
    state.batch_stats,
    rng.stream(state.rng, "attack", state.step),
    batch,
    parts=options.accumulate_steps,
    params=structure,
  )
  return batch, gradient, outcome


def _differentiate(
  state: TrainState,
  teacher: Variables | None,
  model: nn.Module,
  objective: Objective,
  options: Options,
  batch_stats: PyTree,
  key: Array,
  batch: Batch,
) -> tuple[PyTree, Outcome]:
  """Gradient of the mean loss over a batch, or over one part of it."""
  mean_loss = _reduced_loss(
    lambda outcome: outcome.total.mean(),
    {"params": state.params, "batch_stats": batch_stats},
    teacher,
    model,
    objective,
    options,
    key,
    batch,
  )
  gradient_fn = jax.grad(mean_loss, has_aux=True)
  params = _weights(
    lambda weights: gradient_fn(weights)[0], state.params, state.step, options
  )
  with jax.named_scope("student"):
    return gradient_fn(params)


def _reduced_loss(
  reduce: Callable[[Outcome], Array],
  student: Variables,
  teacher: Variables | None,
  model: nn.Module,
  objective: Objective,
  options: Options,
  key: Array,
  batch: Batch,
) -> Callable[[PyTree], tuple[Array, Outcome]]:
  """Weights to what is differentiated, under the attack on `student`."""
  with jax.named_scope("prepare"):
    prepared = objective.prepare(key, model, student, teacher, batch)

  def loss(params: PyTree) -> tuple[Array, Outcome]:
    outcome = objective.loss(
      model, {**student, "params": params}, prepared, batch
    )
    finite = attack_is_finite(prepared)
    return reduce(outcome), outcome._replace(attack_finite=finite)

  if options.remat:
    return jax.checkpoint(loss, policy=_is_product)
  return loss


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
  """Whether a result is costly rather than large: it is not recomputed."""
  return primitive.name in ("conv_general_dilated", "dot_general")


def _weights(
  gradient_fn: Callable[[PyTree], PyTree],
  params: PyTree,
  step: Array,
  options: Options,
) -> PyTree:
  """Weights at which the gradient of a step is taken."""
  if not options.awp_gamma:
    return params
  with jax.named_scope("awp"):
    return awp.ascend(
      params,
      gradient_fn,
      gamma=options.awp_gamma,
      step=step,
      start=options.awp_start,
    )


def compares_terms(objective: Objective) -> bool:
  """Whether an objective has terms to compare with its cross-entropy."""
  names = objective.term_names
  return len(names) > 1 and REFERENCE in names


def make_term_ratios(
  model: nn.Module,
  objective: Objective,
  *,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options,
) -> TermRatios:
  """Compiles `term_ratios`, at its first call; nothing is donated.

  Args:
    model: Network of the student.
    objective: Loss whose terms are compared.
    mesh: Devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Options of the step.

  Returns:
    The compiled program.
  """
  function = functools.partial(
    term_ratios,
    model=model,
    objective=objective,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  return compilation.jit(function, out_shardings=sharding.replicated(mesh))


def term_ratios(
  state: TrainState,
  teacher: Variables | None,
  data: Split | None,
  indices: Array,
  extra: Split | None = None,
  *,
  model: nn.Module,
  objective: Objective,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options = OFF,
) -> dict[str, Array]:
  """Compares the terms' gradients in the step after a state.

  A term's gradient is that of weight * mean over the batch, with respect to the
  student's parameters: what the term adds to the gradient of the step.

  Args:
    state: State before the step.
    teacher: The teacher's variables, or None.
    data: Training split, on the device.
    indices: Examples of the batch in the split, int32 [M].
    extra: Further images [E] of the batch, or None.
    model, objective, mesh, num_classes, padding, flip, options: See
      `make_term_ratios`.

  Returns:
    Name of each term but the cross-entropy to the norm of its gradient, divided
    by the norm of the cross-entropy's, float32.
  """
  names = objective.term_names
  stacked = jax.tree.map(
    lambda leaf: jnp.zeros((len(names), *leaf.shape), leaf.dtype), state.params
  )
  part = functools.partial(
    _differentiate_terms, state, teacher, model, objective, options
  )
  _, gradients, _ = _in_parts(
    part,
    stacked,
    state,
    data,
    indices,
    extra,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  norms = dict(zip(names, jax.vmap(optax.tree.norm)(gradients), strict=True))
  reference = norms.pop(REFERENCE)
  return {name: norm / reference for name, norm in norms.items()}


def _differentiate_terms(
  state: TrainState,
  teacher: Variables | None,
  model: nn.Module,
  objective: Objective,
  options: Options,
  batch_stats: PyTree,
  key: Array,
  batch: Batch,
) -> tuple[PyTree, Outcome]:
  """Gradients [number of terms, ...] of the weighted terms of a batch or part."""
  names, weights = objective.term_names, objective.term_weights

  def reduce(outcome: Outcome) -> Array:
    terms = [weights[name] * outcome.terms[name].mean() for name in names]
    return jnp.stack([*terms, outcome.total.mean()])

  losses = _reduced_loss(
    reduce,
    {"params": state.params, "batch_stats": batch_stats},
    teacher,
    model,
    objective,
    options,
    key,
    batch,
  )
  params = _weights(
    jax.grad(lambda weights: losses(weights)[0][-1]),
    state.params,
    state.step,
    options,
  )
  values, pull, outcome = jax.vjp(losses, params, has_aux=True)
  # In turn, as the step has memory for one backward pass.
  each = jnp.eye(len(names), len(values), dtype=values.dtype)
  return jax.lax.map(lambda row: pull(row)[0], each), outcome
