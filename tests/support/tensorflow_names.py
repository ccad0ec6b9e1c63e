"""Checkpoints of the paper's code, and a module that reads them for TensorFlow."""

import importlib.machinery
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

UNITS, WIDTH, STEM, CLASSES = 2, 2, 4, 5


def variables(scope: str = "") -> dict[str, np.ndarray]:
  """Variables as the paper's code makes them, with random numbers."""
  rng = np.random.default_rng(0)
  found = {}

  def put(name, *shape, positive=False):
    x = rng.uniform(0.5, 1.5, shape) if positive else rng.normal(size=shape) / 3
    found[f"{scope}{name}"] = x.astype(np.float32)

  def norm(name, channels):
    for part in ("gamma", "moving_variance"):
      put(f"{name}/BatchNorm/{part}", channels, positive=True)
    for part in ("beta", "moving_mean"):
      put(f"{name}/BatchNorm/{part}", channels)

  put("input/init_conv/DW", 3, 3, 3, STEM)
  inputs = STEM
  for group in (1, 2, 3):
    outputs = STEM * WIDTH * 2 ** (group - 1)
    for unit in range(UNITS):
      name = f"unit_{group}_{unit}"
      first = "shared" if (group, unit) == (1, 0) else "residual_only"
      norm(f"{name}/{first}_activation", inputs)
      put(f"{name}/sub1/conv1/DW", 3, 3, inputs, outputs)
      norm(f"{name}/sub2", outputs)
      put(f"{name}/sub2/conv2/DW", 3, 3, outputs, outputs)
      inputs = outputs
  norm("unit_last", inputs)
  put("logit/DW", inputs, CLASSES)
  put("logit/biases", CLASSES)
  return found


Contents = dict[str, dict[str, Any]]


def stand_in(patch: pytest.MonkeyPatch, asked: list[str]) -> Contents:
  """Puts a module in TensorFlow's place that reads what `store` has stored.

  Args:
    patch: Undoes it.
    asked: List that gets each prefix that is read.

  Returns:
    The arrays by prefix, which `store` fills.
  """
  contents: Contents = {}

  class Reader:
    def __init__(self, prefix: str):
      asked.append(prefix)
      self._arrays = contents[str(pathlib.Path(prefix).absolute())]

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
      return {name: list(np.shape(x)) for name, x in self._arrays.items()}

    def get_tensor(self, name: str) -> Any:
      return self._arrays[name]

  module: Any = types.ModuleType("tensorflow")
  module.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
  module.train = types.SimpleNamespace(load_checkpoint=Reader)
  patch.setitem(sys.modules, "tensorflow", module)
  return contents


def store(
  contents: Contents, prefix: pathlib.Path, arrays: Mapping[str, Any]
) -> pathlib.Path:
  """Stores arrays as a checkpoint and returns its prefix."""
  contents[str(prefix.absolute())] = dict(arrays)
  prefix.parent.mkdir(exist_ok=True)
  for suffix in (".index", ".data-00000-of-00001", ".meta"):
    prefix.with_name(prefix.name + suffix).write_bytes(b"")
  return prefix
