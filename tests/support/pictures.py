"""Looking at pictures in tests: their pixels, or the figures before rendering.

Test modules that use the fixture name this module in `pytest_plugins`.
PYTEST_DONT_REWRITE, as pytest complains of plugins that are imported before.
"""

import numpy as np
import pytest
from PIL import Image

from atat_jax.drawing import style


def pixels(path):
  """Returns an RGB picture as int [H, W, 3], a PNG that is not empty."""
  with Image.open(path) as image:
    assert image.format == "PNG"
    array = np.asarray(image.convert("RGB")).astype(int)
  assert min(array.shape[:2]) > 200 and array.std() > 10
  return array


def is_color(array, color):
  """Returns which pixels have a colour, "#rrggbb", bool [H, W]."""
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return (abs(array - rgb) <= 3).all(axis=-1)


@pytest.fixture
def figures_drawn(monkeypatch):
  """Name of a picture to its figure; nothing is rendered or written."""
  found = {}

  def keep(fig, path):
    found[path.stem] = fig
    return path

  monkeypatch.setattr(style, "save", keep)
  return found
