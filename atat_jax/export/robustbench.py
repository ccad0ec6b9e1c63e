"""RobustBench's description of a network, filled from `results.json`.

The names of the fields are those of RobustBench's `model_info/*.json` and of
its form for new models (https://github.com/RobustBench/robustbench). A field is
filled only by what the rows show under the leaderboard's own protocol; of every
other it is said why it is not known.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.models.convnext import ConvNeXt
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18
from atat_jax.models.vgg import VGG16
from atat_jax.models.vit import ViT
from atat_jax.models.wide_resnet import WideResNet
from atat_jax.models.xcit import XCiT
from atat_jax.runs import wording

PAPER = ("name", "link", "authors", "venue", "footnote")
"""Fields of `model_info` that only the authors know."""

_FIELDS = (
  *("link", "name", "authors", "additional_data", "number_forward_passes"),
  *("dataset", "venue", "architecture", "eps", "clean_acc", "reported"),
  *("autoattack_acc", "footnote", "unreliable"),
)
_NORMS = {"linf": "Linf", "l2": "L2"}
_DATASETS = ("cifar10", "cifar100", "imagenet")
# Radius of each leaderboard on all 10,000 images of CIFAR; that of ImageNet takes
# 5,000 images, and results.json does not say which its rows have.
_LEADERBOARDS = {
  ("cifar10", "linf"): 8 / 255,
  ("cifar10", "l2"): 0.5,
  ("cifar100", "linf"): 8 / 255,
}
_NUM_IMAGES = 10_000
_CONVNEXTS = {(9, 96): "-T", (27, 96): "-S", (27, 128): "-B", (27, 192): "-L"}
_VITS = {192: "-T", 384: "-S", 768: "-B", 1024: "-L"}
_XCITS = {384: "-S", 512: "-M", 768: "-L"}
_Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """Description of a network for RobustBench.

  Attributes:
    info: Field of `model_info` to value; None: not known.
    unknown: Field to the reason that it is not known.
    threat_model: "Linf" or "L2"; "": not known.
    evaluation: The protocol of the numbers, in words; "": there are none.
  """

  info: dict[str, Any]
  unknown: dict[str, str]
  threat_model: str
  evaluation: str

  @property
  def folder(self) -> str:
    """Folder of the JSON file in RobustBench's repository."""
    parts = "model_info", self.info["dataset"], self.threat_model
    return "/".join(part for part in parts if part)


def architecture(model: nn.Module) -> str:
  """Names a network as the leaderboard does.

  Args:
    model: The network.

  Returns:
    For example "WideResNet-28-10"; of networks without a usual name, that of
    the class.
  """
  match model:
    case WideResNet():
      return f"WideResNet-{model.depth}-{model.width}"
    case PreActResNet18():
      return f"PreActResNet-{2 * sum(model.stage_sizes) + 2}"
    case ResNet18():
      layers = (3 if model.bottleneck else 2) * sum(model.stage_sizes) + 2
      if model.bottleneck and model.inner_width > 1:
        return f"WideResNet-{layers}-{model.inner_width}"
      return f"ResNet-{layers}"
    case VGG16():
      return f"VGG-{sum(model.stage_sizes) + 3}"
    case DenseNet121():
      stages = model.stage_sizes
      return f"DenseNet-{2 * sum(stages) + len(stages) + 1}"
    case ConvNeXt():
      size = max(model.stage_sizes), model.stage_channels[0]
      letter = _CONVNEXTS.get(size, "")
      return f"ConvNeXt{letter}{'-ConvStem' if model.conv_stem else ''}"
    case ViT():
      letter = _VITS.get(model.channels, "")
      return f"ViT{letter}{'-ConvStem' if model.conv_stem else ''}"
    case XCiT():
      letter = _XCITS.get(model.channels, "")
      return f"XCiT{letter}{model.num_blocks if letter else ''}"
  return type(model).__name__


# --- Rows ---------------------------------------------------------------------


def network_of(rows: Iterable[_Row], network: str | None) -> str:
  """Returns the network whose rows count.

  Args:
    rows: Rows of `results.json`.
    network: Name in the column `model`; None: the only one, or the student.

  Raises:
    UserError: No such rows, or rows of several networks.
  """
  found = list(dict.fromkeys(row["model"] for row in rows))
  if network is not None:
    if network not in found:
      raise UserError(
        f"network: {network!r}; allowed: {', '.join(found) or 'none'}"
      )
    return network
  if "student" in found:
    return "student"
  if len(found) != 1:
    raise UserError(
      f"network: missing; allowed: one of {', '.join(found) or 'no rows'}"
    )
  return found[0]


def _faults(row: _Row, step: int | None) -> list[str]:
  """Returns what keeps a row from the leaderboard, in words."""
  found = []
  if row["batch_norm"] != "running":
    found.append("statistics of the batch, which are no fixed classifier")
  if row["split"] != "test":
    found.append(f"images of the split {row['split']}")
  if row["num_examples"] != _NUM_IMAGES:
    found.append(f"{row['num_examples']:,} images, not all 10,000")
  taken = row.get("checkpoint_step")
  if step is not None and taken is not None and taken != step:
    found.append(f"weights of step {taken}, not {step}, which is exported")
  if row.get("nonfinite") or row.get("nonfinite_gradients"):
    found.append("logits or gradients that were not finite")
  for check in (row.get("diagnostics") or {}).values():
    if check.get("flag"):
      found.append(f"a diagnostic is flagged: {check.get('message')}")
  return found


def _autoattack_faults(row: _Row, step: int | None) -> list[str]:
  found = []
  version = (row.get("options") or {}).get("version", "?")
  if row["attack"] != "autoattack" or version != "standard":
    found.append(f"{row['attack']} is not AutoAttack's standard version")
  elif set(row["options"]) - {"version"}:
    found.append("AutoAttack with other numbers than the standard version's")
  radius = _LEADERBOARDS.get((row["dataset"], row["norm"]))
  if radius is None:
    found.append(
      f"no leaderboard of {row['dataset']} under {row['norm']} whose images are"
      " known to be these"
    )
  elif abs(row["epsilon"] - radius) > 1e-6:
    found.append(
      f"epsilon {wording.pixels(row['epsilon'])}, the leaderboard's is"
      f" {wording.pixels(radius)}"
    )
  return found + _faults(row, step)


def _best(
  rows: Sequence[_Row], faults: Callable[[_Row], list[str]], missing: str
) -> tuple[_Row | None, str]:
  """Returns the row without a fault that is lowest, or why there is none."""
  if not rows:
    return None, missing
  found = [(len(faults(row)), row["accuracy"], row) for row in rows]
  number, _, row = min(found, key=lambda item: item[:2])
  return (None, "; ".join(faults(row))) if number else (row, "")


def _percent(row: _Row) -> str:
  return f"{100 * row['accuracy']:.2f}"


def _numbers(clean: _Row | None, row: _Row | None) -> dict[str, Any]:
  """Returns the fields that rows show; None where there is no row."""
  return {
    "clean_acc": clean and _percent(clean),
    "eps": row and wording.pixels(row["epsilon"]),
    "reported": row and _percent(row),
    "autoattack_acc": row and _percent(row),
    "unreliable": None if row is None else False,
  }


def entry(
  results: Mapping[str, Any],
  *,
  network: str,
  model: nn.Module,
  step: int | None = None,
  paper: Mapping[str, str | None] | None = None,
) -> ModelInfo:
  """Describes a network for RobustBench.

  Args:
    results: Content of `results.json`.
    network: Name of the network in the column `model`.
    model: The network.
    step: Step of the weights; rows of other steps do not count. None: not known.
    paper: Fields of `PAPER`, as far as the user gives them.

  Returns:
    The description. Accuracies are from rows with running statistics, on all
    test images, under AutoAttack's standard version at the leaderboard's radius
    and without a flagged diagnostic, of these weights; or not known.
  """
  rows = [row for row in results["rows"] if row["model"] == network]
  nominal = [x for x in rows if x["attack"] == "nominal"]
  attacked = [x for x in rows if x["attack"].startswith("autoattack")]
  clean, no_clean = _best(
    nominal, lambda x: _faults(x, step), "no row without an attack"
  )
  row, no_row = _best(
    attacked, lambda x: _autoattack_faults(x, step), "no row under AutoAttack"
  )
  dataset = rows[0]["dataset"] if rows else None
  data = (results["run"].get("config") or {}).get("data")
  info = {field: (paper or {}).get(field) for field in PAPER} | {
    "dataset": dataset if dataset in _DATASETS else None,
    "additional_data": bool(data.get("extra")) if data else None,
    "architecture": architecture(model),
    "number_forward_passes": 1,
    **_numbers(clean, row),
  }
  reasons = {
    "dataset": f"RobustBench has no leaderboard of {dataset}",
    "additional_data": "the results are not those of a training",
    "clean_acc": no_clean,
    **dict.fromkeys(
      ("eps", "reported", "autoattack_acc", "unreliable"), no_row
    ),
  }
  return ModelInfo(
    {field: info[field] for field in _FIELDS},
    {
      field: reasons.get(field, "the authors know it")
      for field in _FIELDS
      if info[field] is None and field != "footnote"
    },
    _NORMS[row["norm"]] if row else "",
    _evaluation(results, row) if row else "",
  )


def _evaluation(results: Mapping[str, Any], row: _Row) -> str:
  """Returns the protocol of a row, in words."""
  commit = results["run"].get("commit") or "unknown"
  return (
    f"AutoAttack, standard version, as atat_jax implements it (commit {commit}),"
    f" {row['norm']}, epsilon {wording.pixels(row['epsilon'])}, all"
    f" {row['num_examples']:,} test images, running statistics of BatchNorm,"
    f" seed {row['seed']}"
  )


def form(found: ModelInfo, checkpoint: str | None = None) -> str:
  """Fills RobustBench's form for a new model.

  Args:
    found: The description.
    checkpoint: Address of the checkpoint and the code; None: not known.

  Returns:
    Markdown, the text of an issue.
  """
  info, unknown = found.info, found.unknown

  def known(field: str, unit: str = "") -> str:
    value = info[field]
    if value is None:
      return f"(not known: {unknown[field]})"
    return f"{str(value).lower() if isinstance(value, bool) else value}{unit}"

  threat = found.threat_model or f"(not known: {unknown.get('eps', '')})"
  lines = [
    "# Paper Information",
    "",
    f"- **Paper Title**: {known('name')}",
    f"- **Paper URL**: {known('link')}",
    f"- **Paper authors**: {known('authors')}",
    "",
    "# Leaderboard Claim(s)",
    "",
    "## Model 1",
    "",
    f"- **Architecture**: {known('architecture')}",
    f"- **Threat Model**: {threat}",
    f"- **eps**: {known('eps')}",
    f"- **Clean accuracy**: {known('clean_acc', '%')}",
    f"- **Robust accuracy**: {known('autoattack_acc', '%')}",
    f"- **Additional data**: {known('additional_data')}",
    "- **Evaluation method**: "
    + (found.evaluation or f"(not known: {unknown.get('autoattack_acc', '')})"),
    "- **Checkpoint and code**: "
    + (checkpoint or "(not known: the authors know it)"),
    "",
    "# Model Zoo:",
    "",
    "- [ ] I want to add my models to the Model Zoo",
    "- [ ] I use an architecture that is **not** included there",
    "- [ ] I agree to release my model(s) under MIT license",
  ]
  return "\n".join([*lines, ""])
