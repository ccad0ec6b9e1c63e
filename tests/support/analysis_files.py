"""Made-up arrays such as the analyses return, for tests of what is shown."""

import numpy as np

from atat_jax.analyses.shift import summarize
from atat_jax.evaluation.map_distances import DISTANCES

NETWORKS = ("standard", "atat")


def steps_arrays():
  steps = np.arange(101)
  return {
    "networks": np.array(NETWORKS),
    "protocol": np.array("PGD, linf"),
    "num_examples": np.array(360),
    "chance": np.array(0.1),
    "steps": steps,
    "standard_accuracy": 0.9 * 0.5**steps,
    "atat_accuracy": np.full(101, 0.6),
    "standard_clean": np.array(0.95),
    "atat_clean": np.array(0.85),
    "epsilon": np.array(8 / 255),
    "norm": np.array("linf"),
  }


def epsilons_arrays(epsilons=(0.0, 8 / 255, 16 / 255, 1.0)):
  return {
    "networks": np.array(NETWORKS),
    "protocol": np.array("PGD, linf"),
    "norm": np.array("linf"),
    "num_examples": np.array(360),
    "chance": np.array(0.1),
    "epsilons": np.array(epsilons),
    "standard_accuracy": np.array([0.9, 0.1, 0.0, 0.0]),
    "standard_worst_case": np.array([0.9, 0.1, 0.0, 0.0]),
    "atat_accuracy": np.array([0.8, 0.5, 0.2, 0.1]),
    "atat_worst_case": np.array([0.8, 0.5, 0.2, 0.1]),
  }


def curvature_arrays():
  generator = np.random.default_rng(0)
  arrays = {
    "networks": np.array(NETWORKS),
    "protocol": np.array("power iteration"),
    "num_examples": np.array(200),
    "tolerance": np.array(0.05),
  }
  for name, scale in zip(NETWORKS, (10.0, 0.1), strict=True):
    values = scale * generator.lognormal(size=200)
    values[:5], values[5:8] = -values[:5], 0.0
    arrays |= {
      f"{name}_eigenvalue": values,
      f"{name}_residual": np.full(200, 0.01),
      f"{name}_mean": values.mean(),
      f"{name}_interval": values.mean() * np.array([0.8, 1.2]),
    }
  return arrays


def landscape_arrays(networks=NETWORKS):
  coefficients = np.linspace(-0.2, 0.2, 9, dtype=np.float32)
  a, _ = np.meshgrid(coefficients, coefficients, indexing="ij")
  arrays = {
    "networks": np.array(networks),
    "protocol": np.array("cross-entropy at x + a sign(gradient)"),
    "labels": np.array([3, 5]),
    "indices": np.array([1450, 7558]),
    "coefficients": coefficients,
  }
  for name in networks:
    steep = 20 if name == "standard" else 0.1
    arrays[f"{name}_loss"] = np.stack([steep * (a + 0.2)] * 2)
    arrays[f"{name}_margin"] = np.stack([a - 0.1, a - 1])
  return arrays


def maps(networks, kinds, n=2, size=8, channels=3):
  generator = np.random.default_rng(0)
  images = generator.uniform(size=(n, size, size, channels))
  arrays = {
    "networks": np.array(networks),
    "kinds": np.array(kinds),
    "images": images.astype(np.float32),
    "labels": np.arange(n, dtype=np.int32),
    "layer": "features",
    "protocol": "PGD",
  }
  for network in networks:
    for kind in kinds:
      arrays[f"{network}_{kind}"] = arrays["images"]
      arrays[f"{network}_{kind}_map"] = generator.uniform(size=(n, 4, 4))
      arrays[f"{network}_{kind}_prediction"] = arrays["labels"]
      arrays[f"{network}_{kind}_probability"] = np.full(n, 0.75)
  return arrays


def shifts(fooled_share, num_classes=3, n=60, rounds=(0, 2, 8)):
  """Statistics of made-up distances: larger for images that are fooled."""
  generator = np.random.default_rng(1)
  labels = np.arange(n) % num_classes
  arrays = {
    "networks": np.array(list(fooled_share)),
    "distances": np.array(list(DISTANCES)),
    "rounds": np.array(rounds),
    "labels": labels,
    "layer": "features",
    "protocol": "PGD, 8 steps",
    "confidence": "95 %",
  }
  for name, share in fooled_share.items():
    fooled = np.zeros((len(rounds) + 1, n), bool)
    for k in range(1, len(rounds)):
      fooled[k + 1, : int(share * n * k / (len(rounds) - 1))] = True
    noise = generator.uniform(0, 0.1, fooled.shape)
    looks = {d: (noise + 0.2 * fooled).astype(np.float32) for d in DISTANCES}
    looks["prediction"] = np.where(fooled, labels + 1, labels)
    for what, value in summarize(looks, labels, num_classes).items():
      arrays[f"{name}_{what}"] = value
  return arrays
