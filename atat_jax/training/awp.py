"""Adversarial weight perturbation (AWP; Wu et al., 2020).

  min_w max_{d in V} L(w + d),   V: ||d_l|| <= gamma ||w_l|| for each tensor l

One step of ascent solves the inner problem: d_l = gamma ||w_l|| g_l / ||g_l||
with g the gradient of the objective's own loss (Eq. 8 and Algorithm 1 of the
paper, K2 = 1, A = 1). The training gradient is taken at w + d, the update is
made at w.

As in the authors' code (github.com/csdongxian/AWP at a7acf5d), only tensors of
more than one axis are perturbed: no bias, and no scale of BatchNorm. The loss
has no weight decay in it; its adversarial images are those of the attack on w,
for both passes; BatchNorm normalises by the batch; the pass that gives d leaves
the running statistics alone (there it is that of a second network). These
differ:

- Weight decay. There the optimizer steps while the weights are w + d, and so
  decays w + d and every parameter. Here it decays w, and kernels only, as
  everywhere in this package. The decay of d adds rate * decay * d to an update,
  along the gradient of the ascent: as if the gradient of a tensor were longer by
  a share of decay * gamma * ||w|| / ||g||, 0.05 % where ||w|| = 100 ||g||,
  gamma = 0.01 and decay = 5e-4.
- Running statistics. TRADES-AWP attacks with running statistics, which then move
  in the passes at w + d: in one of adversarial, then two of clean images there,
  in one of each here. AT-AWP moves them in 13 passes a step: in 11 of the
  attack at w (10 steps, and a last look at its images), one at w + d, and one of
  clean images after the update, made for a log line; at momentum 0.1 these are
  75, 12 and 13 % of them. Here the attack's passes move them where
  `attack_moves_statistics` says so, as `at` does by default; there is no last
  look and no pass of clean images. Where the attack does not move them, all of
  them stem from w + d, while w is evaluated.
- Rounding. There d is the difference that a step of SGD at rate 0.01 (TRADES:
  the first learning rate, 0.1) makes to w in float32, so that entries of g below
  the rounding of w are lost. Here it is g itself.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from atat_jax.typing import Array, PyTree


def ascend(
  params: PyTree,
  gradient_fn: Callable[[PyTree], PyTree],
  *,
  gamma: float,
  step: Array,
  start: int,
) -> PyTree:
  """Returns w + d from step `start` on, and w before it.

  Args:
    params: w.
    gradient_fn: Gradient of the loss at given weights.
    gamma: Length of d relative to w, > 0.
    step: Number of the step, int32 scalar.
    start: First step with a perturbation.

  Returns:
    Weights of the same structure.
  """
  perturbed = functools.partial(
    _perturb_by, gradient_fn=gradient_fn, gamma=gamma
  )
  if not start:
    return perturbed(params)
  return jax.lax.cond(step >= start, perturbed, lambda w: w, params)


def _perturb_by(
  params: PyTree, *, gradient_fn: Callable[[PyTree], PyTree], gamma: float
) -> PyTree:
  return perturb(params, gradient_fn(params), gamma)


def perturb(params: PyTree, gradient: PyTree, gamma: float) -> PyTree:
  """Returns w + d.

  Args:
    params: w.
    gradient: g, of the same structure.
    gamma: Length of d relative to w, > 0.

  Returns:
    The same structure; a tensor whose gradient is 0 stays as it is.
  """
  return jax.tree.map(
    functools.partial(_perturb_tensor, gamma=gamma), params, gradient
  )


def _perturb_tensor(weight: Array, gradient: Array, *, gamma: float) -> Array:
  if weight.ndim < 2:
    return weight
  length = jnp.sqrt(jnp.square(gradient).sum())
  radius = gamma * jnp.sqrt(jnp.square(weight).sum())
  zero = length == 0  # not "<= 0": a NaN must stay one
  factor = jnp.where(zero, 0.0, radius / jnp.where(zero, 1.0, length))
  return weight + factor * gradient
