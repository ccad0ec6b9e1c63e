"""Accuracies on corrupted images in `results.json`, arranged in grids."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from atat_jax.runs import tables, wording
from atat_jax.runs.tables import Row

KINDS = (
  "gaussian_noise",
  "shot_noise",
  "impulse_noise",
  "defocus_blur",
  "glass_blur",
  "motion_blur",
  "zoom_blur",
  "snow",
  "frost",
  "fog",
  "brightness",
  "contrast",
  "elastic_transform",
  "pixelate",
  "jpeg_compression",
)
"""Corruptions over which means are taken, in the order of tables."""

SEVERITIES = (1, 2, 3, 4, 5)

# Images, whatever the network.
_IMAGES = ("benchmark", "dataset", "split", "num_examples", "seed")


class Grid(NamedTuple):
  """Accuracies of one classifier on one set of corrupted images.

  Attributes:
    protocol: First of its rows, for the fields that all of them share.
    accuracies: (corruption, severity) to accuracy in [0, 1].
    clean: Accuracy on the same images without corruption, None: not measured.
  """

  protocol: Row
  accuracies: dict[tuple[str, int], float]
  clean: float | None

  @property
  def name(self) -> str:
    """Network and BatchNorm mode in words."""
    mode = self.protocol["batch_norm"]
    text = f"{self.protocol['model']}, {tables.BATCH_NORM_NAMES[mode]}"
    if mode == "batch" and self.protocol.get("batch_size"):
      text += f" of {self.protocol['batch_size']} images"
    return text

  @property
  def kinds(self) -> list[str]:
    """Corruptions of the grid: the standard ones, then others."""
    found = dict.fromkeys(kind for kind, _ in self.accuracies)
    return [
      *(kind for kind in KINDS if kind in found),
      *(kind for kind in found if kind not in KINDS),
    ]

  def mean(
    self, kind: str | None = None, severity: int | None = None
  ) -> float | None:
    """Computes the mean accuracy over corruptions and severities.

    Args:
      kind: Corruption; None: all of `KINDS`.
      severity: Severity; None: all of them.

    Returns:
      The mean; None where one of the accuracies is not there.
    """
    found = [
      self.accuracies.get((one, number))
      for one in (KINDS if kind is None else (kind,))
      for number in (SEVERITIES if severity is None else (severity,))
    ]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def grids(rows: Sequence[Row], corrupted: Iterable[Row]) -> list[list[Grid]]:
  """Arranges rows of corrupted images.

  Args:
    rows: Rows of `results.json`, for the accuracy on clean images.
    corrupted: Its rows "corruptions".

  Returns:
    A list for each set of corrupted images, with a grid for each network and
    BatchNorm mode, running statistics first.
  """
  found: dict[Hashable, dict[Hashable, list[Row]]] = {}
  for row in corrupted:
    images = tuple(row.get(field) for field in _IMAGES)
    mode = row["batch_norm"]
    size = row.get("batch_size") if mode == "batch" else None
    classifier = (
      tables.BATCH_NORMS.index(mode),
      row["model"],
      row.get("checkpoint_step"),
      size,
    )
    found.setdefault(images, {}).setdefault(classifier, []).append(row)
  return [
    [
      Grid(
        group[0],
        {
          (row["corruption"], row["severity"]): row["accuracy"] for row in group
        },
        _clean(rows, group[0]),
      )
      for _, group in sorted(by_classifier.items(), key=lambda item: item[0][0])  # type: ignore[index]
    ]
    for by_classifier in found.values()
  ]


def _clean(rows: Sequence[Row], corrupted: Row) -> float | None:
  """Returns the accuracy of the same classifier on the same images, clean."""
  fields = ["model", "dataset", "split", "num_examples", "batch_norm"]
  fields.append("checkpoint_step")
  if corrupted["batch_norm"] == "batch":
    fields.append("batch_size")
  for row in rows:
    if row["attack"] == tables.NOMINAL and all(
      row.get(field) == corrupted.get(field) for field in fields
    ):
      return float(row["accuracy"])
  return None


def images(grid: Grid) -> str:
  """Describes the images of a grid in words."""
  row = grid.protocol
  text = (
    f"{row['benchmark']}: {row['num_examples']:,} {row['dataset']}"
    f" {row['split']} images at each severity of each corruption"
  )
  if row.get("seed") is None:
    return text
  return (
    f"{text}, made by this package (seed {row['seed']}), not to be compared"
    " with CIFAR-10-C"
  )


def is_unfinished(found: Sequence[Grid]) -> bool:
  """Whether a mean of any grid lacks a number."""
  return any(grid.mean() is None for grid in found)


HEAD = ("clean", "mean", *map(str, SEVERITIES))
"""Numbers of `summary`: clean images, all corruptions, each severity."""


def summary(grid: Grid) -> list[float | None]:
  """Returns the accuracies of a grid that `HEAD` names."""
  by_severity = [grid.mean(severity=severity) for severity in SEVERITIES]
  return [grid.clean, grid.mean(), *by_severity]


def markdown(rows: Sequence[Row], corrupted: Iterable[Row]) -> str:
  """Lays out mean accuracies on corrupted images for a terminal.

  Args:
    rows: Rows of `results.json`.
    corrupted: Its rows "corruptions".

  Returns:
    A Markdown table for each set of images, with its protocol; "" for none.
  """
  parts = []
  for found in grids(rows, corrupted):
    lines = [["corrupted, accuracy (%)", *HEAD]]
    lines += [
      [
        grid.name,
        *("–" if x is None else f"{100 * x:.2f}" for x in summary(grid)),
      ]
      for grid in found
    ]
    note = (
      f"{images(found[0])}. Mean over {len(KINDS)} corruptions; 1 to"
      f" {SEVERITIES[-1]}: their severity."
    )
    if is_unfinished(found):
      done = wording.plural(len(found[-1].accuracies), "accuracy")
      note += f" Unfinished: {found[-1].name} has {done}."
    parts += [
      tables.markdown(lines, "l" + "r" * len(HEAD)),
      "",
      tables.escaped(note),
    ]
  return "\n".join(parts)
