"""Adversarial weight perturbation (AWP; Wu et al., 2020).

  min_w max_{d in V} L(w + d),   V: ||d_l|| <= gamma ||w_l|| for each tensor l

One step of ascent solves the inner problem: d_l = gamma ||w_l|| g_l / ||g_l||
with g the gradient of the objective's own loss (Eq. 8 and Algorithm 1 of the
paper, K2 = 1, A = 1). The training gradient is that at w + d, the update is
made at w. As in the authors' code only tensors of more than one axis are
perturbed: no bias, no scale of BatchNorm.
"""

import jax
import jax.numpy as jnp

from atat_jax.typing import Array, PyTree


def perturb(params: PyTree, gradient: PyTree, gamma: float) -> PyTree:
  """w + d.

  Args:
    params: w.
    gradient: g, of the same structure.
    gamma: > 0.

  Returns:
    The same structure; a tensor whose gradient is 0 stays.
  """

  def one(weight: Array, ascent: Array) -> Array:
    if weight.ndim < 2:
      return weight
    length = jnp.sqrt(jnp.square(ascent).sum())
    radius = gamma * jnp.sqrt(jnp.square(weight).sum())
    zero = length == 0  # not "<= 0": a NaN must stay one
    factor = jnp.where(zero, 0.0, radius / jnp.where(zero, 1.0, length))
    return weight + factor * ascent

  return jax.tree.map(one, params, gradient)
