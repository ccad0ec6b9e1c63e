"""Noise: of a sensor, of few photons, and of broken pixels."""

import jax
import jax.numpy as jnp

from atat_jax.data.corruptions.geometry import at
from atat_jax.typing import Array


def gaussian_noise(key: Array, image: Array, severity: Array) -> Array:
  """Adds independent normal numbers; their deviations are CIFAR-10-C's."""
  sigma = at(severity, (0.04, 0.06, 0.08, 0.09, 0.10))
  return image + sigma * jax.random.normal(key, image.shape)


def shot_noise(key: Array, image: Array, severity: Array) -> Array:
  """Counts photons: Poisson numbers whose mean is the image, as CIFAR-10-C."""
  photons = at(severity, (500, 250, 100, 75, 50))
  return jax.random.poisson(key, image * photons) / photons


def impulse_noise(key: Array, image: Array, severity: Array) -> Array:
  """Sets a share of the values, CIFAR-10-C's, to 0 or 1, each as likely."""
  half = at(severity, (0.01, 0.02, 0.03, 0.05, 0.07)) / 2
  drawn = jax.random.uniform(key, image.shape)
  return jnp.where(drawn < half, 0.0, jnp.where(drawn > 1 - half, 1.0, image))
