"""Numbers of the paper's Tables 1 and 2, for results of the same protocol."""

import math
from typing import Any

SOURCE = (
  "Li et al., Adversarial robustness via attention transfer, Pattern"
  " Recognition Letters 2021, Tables 1 and 2: Wide ResNet of depth 32 and width"
  " 10. The paper does not say which BatchNorm statistics were used; its"
  " released code evaluates with those of batches of 100 images."
)

_COLUMNS = {
  "cifar10": ("nominal", "fgsm", "ifgsm20", "pgd7", "pgd20"),
  "cifar100": ("nominal", "fgsm", "ifgsm20", "pgd10", "pgd20"),
}

# In percent. "at" is the paper's AT-PGD, "ifgsm20" its FGSM(20).
_TABLES = {
  "cifar10": {
    "standard": (95.01, 13.35, 0.00, 0.00, 0.00),
    "at": (87.25, 56.22, 45.82, 49.70, 45.87),
    "alp": (86.52, 60.57, 46.17, 52.32, 46.28),
    "tla": (86.21, 58.88, 51.77, 53.87, 51.59),
    "atat": (91.89, 76.74, 63.98, 70.15, 63.81),
  },
  "cifar100": {
    "standard": (78.68, 7.8, 0.00, 0.00, 0.00),
    "at": (61.14, 29.24, 24.03, 24.82, 24.09),
    "alp": (66.04, 31.83, 26.65, 27.50, 26.60),
    "atat": (76.22, 62.65, 28.84, 35.03, 28.72),
  },
}

_EPSILON = 8 / 255
_STEP_SIZE = 2 / 255
_NUM_EXAMPLES = 10_000
_BATCH_SIZE = 100  # images that share their statistics in the released code


def accuracy(method: str, row: dict[str, Any]) -> float | None:
  """Returns the published accuracy under the protocol of a row.

  Args:
    method: Name of the objective, e.g. "at".
    row: Row of `results.json`, of either BatchNorm mode.

  Returns:
    Accuracy in [0, 1]; None where the paper has no number for the method, the
    data set and the attack with all its numbers.
  """
  dataset = row["dataset"]
  numbers = _TABLES.get(dataset, {}).get(method)
  if numbers is None or row["attack"] not in _COLUMNS[dataset]:
    return None
  if not _same_protocol(row):
    return None
  return numbers[_COLUMNS[dataset].index(row["attack"])] / 100


def _same_protocol(row: dict[str, Any]) -> bool:
  if (row["split"], row["num_examples"]) != ("test", _NUM_EXAMPLES):
    return False
  if row["batch_norm"] == "batch" and row.get("batch_size") != _BATCH_SIZE:
    return False
  if row["attack"] == "nominal":
    return True
  step = _EPSILON if row["attack"] == "fgsm" else _STEP_SIZE
  return (
    row["norm"] == "linf"
    and row["loss"] == "cross_entropy"
    and row["num_restarts"] == 1
    and not row.get("options")
    and math.isclose(row["epsilon"] or 0, _EPSILON, rel_tol=1e-6)
    and math.isclose(row["step_size"] or 0, step, rel_tol=1e-6)
  )
