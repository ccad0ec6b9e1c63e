"""Learning-rate schedules, weight decay on kernels only, SGD and AdamW."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.typing import PyTree

SCHEDULES = ("constant", "piecewise", "cosine", "one_cycle", "triangular")
OPTIMIZERS = ("sgd", "adamw")


def _check_schedule(
  name: str,
  *,
  learning_rate: float,
  total_steps: int,
  boundaries: Sequence[int],
  factor: float,
  warmup_fraction: float,
) -> None:
  """Checks the arguments of `make_schedule`."""
  checks.choice("schedule", name, SCHEDULES)
  checks.positive("learning_rate", learning_rate)
  checks.positive("total_steps", total_steps, integer=True)
  checks.fraction("warmup_fraction", warmup_fraction)
  if name == "piecewise":
    checks.positive("factor", factor)
    checks.numbers("boundaries", boundaries, 1, integers=True, increasing=True)
  # optax needs a step after the rise, and one_cycle one in each of its parts.
  rise = warmup_fraction * total_steps
  if name == "cosine" and round(rise) >= total_steps:
    raise UserError(
      f"warmup_fraction: {warmup_fraction}; allowed: less than the whole run of"
      f" {total_steps} steps for cosine"
    )
  if name in ("one_cycle", "triangular") and not warmup_fraction:
    raise UserError(
      f"warmup_fraction: {warmup_fraction}; allowed: (0, 1) for {name}"
    )


def make_schedule(
  name: str,
  *,
  learning_rate: float,
  total_steps: int,
  boundaries: Sequence[int] = (),
  factor: float = 0.1,
  warmup_fraction: float = 0.0,
) -> optax.Schedule:
  """Makes a learning-rate schedule.

  Args:
    name: One of `SCHEDULES`.
    learning_rate: Highest learning rate.
    total_steps: Number of steps of the run.
    boundaries: Steps at which a piecewise schedule multiplies the rate by
      `factor`.
    factor: Factor of a piecewise schedule.
    warmup_fraction: Share of the steps in which the rate rises, linearly
      (cosine, triangular) or as a cosine (one_cycle).

  Returns:
    An optax schedule: step to learning rate.

  Raises:
    UserError: Unknown name, or values out of range.
  """
  _check_schedule(
    name,
    learning_rate=learning_rate,
    total_steps=total_steps,
    boundaries=boundaries,
    factor=factor,
    warmup_fraction=warmup_fraction,
  )
  if name == "constant":
    return optax.constant_schedule(learning_rate)
  if name == "piecewise":
    return optax.piecewise_constant_schedule(
      learning_rate, {int(step): factor for step in boundaries}
    )
  if name == "cosine":
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if warmup_fraction else learning_rate,
      peak_value=learning_rate,
      warmup_steps=round(warmup_fraction * total_steps),
      decay_steps=total_steps,
    )
  if name == "triangular":
    return _triangular(learning_rate, total_steps, warmup_fraction)
  return optax.cosine_onecycle_schedule(
    total_steps, learning_rate, pct_start=warmup_fraction
  )


def _triangular(
  peak: float, total_steps: int, warmup_fraction: float
) -> optax.Schedule:
  """Rises linearly from 0 to the peak, then falls linearly to 0."""
  rise = warmup_fraction * total_steps

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.clip(step, 0, total_steps)
    fall = (total_steps - step) / (total_steps - rise)
    return peak * jnp.minimum(step / rise, fall)

  return schedule


def decay_mask(params: PyTree) -> PyTree:
  """Selects the kernels of convolutions and dense layers for weight decay."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) == "kernel", params
  )


def make_optimizer(
  schedule: Callable[..., float] | optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 2e-4,
  clip_norm: float = 0.0,
  name: str = "sgd",
  second_momentum: float = 0.999,
) -> optax.GradientTransformation:
  """Makes SGD with momentum and an L2 penalty on kernels, or AdamW.

  The penalty is weight_decay / 2 * ||w||^2, as the released code's
  `weight_decay * l2_loss`: its gradient is added before the momentum. AdamW
  (Loshchilov and Hutter, 2019) takes the decay out of the moments: it shrinks
  the kernels by learning rate times weight_decay, as in PyTorch.

  Args:
    schedule: Step to learning rate.
    momentum: Momentum, in [0, 1); of AdamW, the decay of the first moment.
    nesterov: Whether the momentum of SGD is Nesterov's.
    weight_decay: Weight of the L2 penalty or of the decay, >= 0.
    clip_norm: Largest global norm of the loss's gradient, which is scaled down
      to it before the penalty's gradient is added; 0: no limit.
    name: One of `OPTIMIZERS`.
    second_momentum: Decay of AdamW's second moment, in [0, 1).

  Returns:
    An optax transformation.

  Raises:
    UserError: Values out of range.
  """
  if not callable(schedule):
    raise UserError(
      f"schedule: {shown(schedule)}; allowed: a function of the step"
    )
  checks.fraction("momentum", momentum)
  checks.boolean("nesterov", nesterov)
  checks.not_negative("weight_decay", weight_decay)
  checks.not_negative("clip_norm", clip_norm)
  checks.choice("optimizer", name, OPTIMIZERS)
  checks.fraction("second_momentum", second_momentum)
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if name == "adamw":
    if nesterov:
      raise UserError("nesterov: True with adamw; allowed: False")
    decay = {"weight_decay": weight_decay, "mask": decay_mask}
    adamw = optax.adamw(schedule, b1=momentum, b2=second_momentum, **decay)
    return optax.chain(*clip, adamw)
  return optax.chain(
    *clip,
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
  )
