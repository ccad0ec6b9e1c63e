"""Folders in the format of CIFAR-10-C, small, for tests."""

import pathlib

import numpy as np

from atat_jax.runs import corrupted


def write(
  folder: pathlib.Path,
  shape: tuple[int, ...],
  labels: np.ndarray,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Writes noise for every corruption; returns the arrays, [5, N, H, W, C]."""
  generator = np.random.default_rng(seed)
  folder.mkdir(exist_ok=True)
  np.save(folder / "labels.npy", np.tile(labels, 5))
  found = {}
  for kind in corrupted.KINDS:
    images = generator.integers(0, 256, (5 * len(labels), *shape), np.uint8)
    np.save(folder / f"{kind}.npy", images)
    found[kind] = images.reshape(5, len(labels), *shape)
  return found


def rows(**changes: object) -> list[dict[str, object]]:
  """Rows "corruptions" of a `results.json`: all kinds, all severities."""
  return [
    {
      "model": "student",
      "batch_norm": "running",
      "batch_size": 100,
      "benchmark": "CIFAR-10-C",
      "dataset": "digits",
      "split": "test",
      "corruption": kind,
      "severity": severity,
      "num_examples": 297,
      "accuracy": round(0.9 - 0.1 * severity - 0.01 * number, 4),
      "nonfinite": 0,
      "seconds": 1.0,
    }
    | changes
    for number, kind in enumerate(corrupted.KINDS)
    for severity in corrupted.SEVERITIES
  ]
