"""One process of a job that reads its part of streamed batches.

  python tests/support/streamed_process.py FOLDER OUT

FOLDER holds pictures (`picture_folders`); OUT gets one file of this process:
the places in a batch that its devices hold, and what it read for them.
"""

import pathlib
import sys

import jax
import numpy as np

from atat_jax import data, runtime, sharding
from atat_jax.data.streamed import TrainingBatches

BATCH, NUM_STEPS = 8, 5


def load(folder: pathlib.Path) -> data.Dataset:
  """Finds the pictures; they are read at 12 pixels."""
  return data.load(
    "folder",
    data_dir=str(folder),
    validation_size=3,
    size=12,
    streaming=data.Streaming(),
  )


def read(dataset: data.Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
  """Reads some rows of all batches."""
  with TrainingBatches(
    dataset.train, seed=3, batch_size=BATCH, rows=rows, num_steps=NUM_STEPS
  ) as stream:
    found = [stream.follow(step) for step in range(NUM_STEPS)]
  return {
    "rows": rows,
    "images": np.stack([split.images for split in found]),
    "labels": np.stack([split.labels for split in found]),
  }


def main(folder: pathlib.Path, out: pathlib.Path) -> None:
  runtime.set_up(distributed=True, wait_seconds=300)
  mesh = sharding.make_mesh()
  found = read(load(folder), sharding.local_rows(mesh, BATCH))
  np.savez(out / f"{jax.process_index()}.npz", **found)


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
