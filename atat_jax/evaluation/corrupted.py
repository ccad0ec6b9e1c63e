"""Accuracy on corrupted test images, published or generated.

The images are judged batch by batch by the program that judges clean ones, so
that nothing is compiled for a corruption but, where it is generated, itself.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, compilation
from atat_jax.data import augment, batches, corruptions
from atat_jax.data.base import Split
from atat_jax.data.corruptions import published
from atat_jax.errors import UserError
from atat_jax.evaluation import accuracies, measuring
from atat_jax.process import stops
from atat_jax.typing import Array, BatchNormMode, Classifier

GENERATED = "generated"
"""Name of the corruptions that this package makes itself."""

_log = logging.getLogger(__name__)
_to_float = compilation.jit(augment.to_float)


@dataclasses.dataclass(frozen=True)
class Corrupted:
  """Test images, and where their corruptions come from.

  Attributes:
    test: Clean images, uint8 or float32 in [0, 1], and labels, on the host.
    dataset: Name of the data.
    seed: Seed of generated corruptions.
    source: Corrupted images on the disk; None: they are generated.
  """

  test: Split
  dataset: str
  seed: int
  source: published.Published | None = None

  @property
  def benchmark(self) -> str:
    """Name of the corrupted images in results."""
    return self.source.name if self.source else corruptions.GENERATED

  def row(self, kind: str, severity: int) -> measuring.Row:
    """Returns the fields of a row that name its images."""
    count = len(self.test.labels)
    found = {
      "benchmark": self.benchmark,
      "dataset": self.dataset,
      "split": "test",
      "corruption": kind,
      "severity": severity,
      "num_examples": count,
    }
    if self.source is None:
      return {**found, "seed": self.seed}
    return {**found, "images": self.source.mark(kind, severity, count)}

  def images(
    self, kind: str, severity: int
  ) -> tuple[np.ndarray, Callable[[Array, Array], Array]]:
    """Returns images on the host, and what makes the corrupted ones of them.

    The latter maps images and their numbers, a batch on the devices, to float32
    images in [0, 1].
    """
    if self.source is not None:
      block = self.source.block(kind, severity, len(self.test.labels))
      return block, lambda images, numbers: _to_float(images)
    key, number = jax.random.key(self.seed), jnp.int32(severity)

    def corrupted(images: Array, numbers: Array) -> Array:
      return corruptions.apply(key, images, numbers, number, kind=kind)

    return self.test.images, corrupted


def check_name(name: object) -> None:
  """Checks what can be checked of `open_source`'s name without any data.

  Raises:
    UserError: No text, or a folder that lacks a file.
  """
  checks.instance("corruptions", name, str, "'', 'generated', or a folder")
  if name not in ("", GENERATED):
    published.find(name)  # type: ignore[arg-type]


def open_source(
  name: str, *, dataset: str, image_shape: Sequence[int], num_classes: int
) -> published.Published | None:
  """Opens the corrupted images that a name stands for.

  Args:
    name: "generated", the path of a folder, see `published.read`, or "": none.
    dataset: Name of the data set whose test images are corrupted.
    image_shape: Shape [H, W, C] of its images.
    num_classes: Number of its classes, K.

  Returns:
    The images; None where they are generated, or there are none.

  Raises:
    UserError: The folder cannot be used, or the images not be corrupted.
  """
  if name not in ("", GENERATED):
    return published.read(
      name, dataset=dataset, image_shape=image_shape, num_classes=num_classes
    )
  channels = image_shape[-1]
  if name and channels > corruptions.MOST_CHANNELS:
    raise UserError(
      f"corruptions: {name!r} with images of {channels} channels; allowed: 1 to"
      f" {corruptions.MOST_CHANNELS}"
    )
  return None


def complete(
  table: measuring.ResultsTable,
  classifiers: Mapping[tuple[str, BatchNormMode], Classifier],
  images: Corrupted,
  *,
  batch_sizes: Mapping[BatchNormMode, int],
  mesh: Mesh,
) -> None:
  """Measures the rows of corrupted images that a table lacks, one by one.

  Args:
    table: The table; it is written after each row.
    classifiers: (name of the network, BatchNorm mode) to classifier.
    images: The images.
    batch_sizes: BatchNorm mode to number of images at a time.
    mesh: The devices.
  """
  pending = [
    ({**fields, **images.row(kind, severity)}, classifier)
    for (model, mode), classifier in classifiers.items()
    for kind in corruptions.CORRUPTIONS
    for severity in corruptions.SEVERITIES
    for fields in [
      {
        "model": model,
        "batch_norm": mode,
        "batch_size": batch_sizes[mode],
        "checkpoint_step": table.steps[model],
      }
    ]
  ]
  if all(row in table for row, _ in pending):
    _log.info(
      "evaluate: %s has all %d rows of %s",
      table.path,
      len(pending),
      images.benchmark,
    )
  count = len(images.test.labels)
  with tqdm(
    total=len(pending) * count,
    # Rows that are there say nothing of the speed.
    initial=sum(row in table for row, _ in pending) * count,
    unit="img",
    desc=images.benchmark,
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for row, classifier in pending:
      stops.check()
      if row in table:
        continue
      bar.set_postfix_str(
        f"{row['model']} {row['batch_norm']} {row['corruption']}"
        f" {row['severity']}"
      )
      table.add({**row, **_measure(row, classifier, images, mesh, bar.update)})


def _measure(
  row: measuring.Row,
  classifier: Classifier,
  images: Corrupted,
  mesh: Mesh,
  on_batch: Callable[[int], object],
) -> measuring.Row:
  """Measures the accuracy of a row."""
  began = time.perf_counter()
  shown, corrupt = images.images(row["corruption"], row["severity"])
  count, size = row["num_examples"], row["batch_size"]

  def judge(
    number: int, pixels: Array, labels: Array, numbers: Array
  ) -> tuple[Array, Array]:
    found: tuple[Array, Array] = accuracies.score(
      classifier, corrupt(pixels, numbers), labels
    )
    on_batch(min(size, count - number * size))
    stops.check()
    return found

  correct, finite = batches.map_batches(
    judge,
    shown,
    images.test.labels,
    np.arange(count, dtype=np.int32),
    batch_size=size,
    mesh=mesh,
  )
  return {
    "accuracy": float(correct.mean()),
    "nonfinite": int((~finite).sum()),
    "seconds": round(time.perf_counter() - began, 3),
  }
