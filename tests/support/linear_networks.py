"""Small networks for tests of analyses that take (module, variables)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class Linear(nn.Module):
  """Logits that are linear in the pixels; `seen` is called with each batch size."""

  num_classes: int = 3
  seen: Any = None
  blind: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    if self.seen is not None:
      jax.debug.callback(self.seen, len(x), ordered=False)
    if self.blind:
      x = jnp.round(x * 4) / 4  # its gradient is zero
    return nn.Dense(self.num_classes, name="head")(x.reshape(len(x), -1))


def linear(num_classes=3, num_pixels=16, seed=0, scale=1.0, **fields):
  """Returns a `Linear`, its variables, and its weights and biases as float64."""
  generator = np.random.default_rng(seed)
  weights = scale * generator.normal(size=(num_pixels, num_classes))
  biases = -0.5 * weights.sum(0)  # so that grey is undecided
  head = {
    "kernel": jnp.asarray(weights, jnp.float32),
    "bias": jnp.asarray(biases, jnp.float32),
  }
  module = Linear(num_classes, **fields)
  return (module, {"params": {"head": head}}), weights, biases


def softmax(logits):
  """Returns the softmax over the last axis, in float64."""
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  return shares / shares.sum(-1, keepdims=True)
