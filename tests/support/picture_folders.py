"""Folders of JPEG pictures in which a class can be learnt."""

import pathlib

import numpy as np
from PIL import Image


def write(
  root: pathlib.Path,
  *,
  classes: int,
  train: int,
  test: int,
  size: tuple[int, int] = (40, 30),
  seed: int = 0,
) -> pathlib.Path:
  """Writes pictures of stripes; their direction and colour are the class.

  Args:
    root: Folder that gets `train/<class>/*.jpg` and `val/<class>/*.jpg`.
    classes: Number of classes.
    train: Training pictures of each class.
    test: Test pictures of each class.
    size: Width and height in pixels.
    seed: Seed of phases and noise.
  """
  generator = np.random.default_rng(seed)
  width, height = size
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  for split, count in (("train", train), ("val", test)):
    for label in range(classes):
      place = root / split / f"c{label:02d}"
      place.mkdir(parents=True)
      angle = np.pi * label / classes
      colour = 0.5 + 0.5 * np.cos(
        2 * np.pi * (label / classes + np.arange(3) / 3)
      )
      for number in range(count):
        phase = generator.uniform(0, 2 * np.pi)
        wave = np.sin(0.6 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        noise = generator.normal(0, 12, (height, width, 3))
        pixels = 128 + 80 * wave[..., None] * colour + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
          place / f"{number}.jpg", quality=92
        )
  return root
