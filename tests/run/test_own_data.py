"""A user's own data through training, evaluation, figures and report."""

import json

import numpy as np
import pytest
import tiny

from atat_jax import pipeline


def write(path, channels, classes):
  generator = np.random.default_rng(channels)
  arrays = {}
  for split, number in (("train", 96), ("test", 32)):
    shape = (number, 9, 8, channels)
    arrays[f"{split}_images"] = generator.integers(0, 256, shape, np.uint8)
    arrays[f"{split}_labels"] = np.arange(number) % classes
  np.savez(path, **arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("channels", "classes"), [(1, 2), (2, 3), (3, 20), (4, 5)]
)
def test_own_data_go_all_the_way_to_the_report(channels, classes, tmp_path):
  path = tmp_path / "mine.npz"
  write(path, channels, classes)
  config = tiny.config(
    "at",
    data__name="npz",
    data__dir=str(path),
    data__validation_size=20,
    train__batch_size=32,
    model__shortcut="conv",  # takes sides that strides do not divide
    evaluation__num_examples=0,
    evaluation__batch_norm=("running",),
  )
  workdir = tmp_path / "run"
  pipeline.run("run", config, workdir)
  rows = json.loads((workdir / "results.json").read_text())["rows"]
  assert {row["dataset"] for row in rows} == {"npz:mine"}
  assert all(row["num_examples"] == 32 for row in rows)
  assert "npz:mine" in (workdir / "report.html").read_text()
  assert list((workdir / "figures").glob("*.png"))
