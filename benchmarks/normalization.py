"""Why standardising each image by itself costs robustness.

  python -m benchmarks.normalization --out=normalization.json
  python -m benchmarks.normalization --config=configs/cifar10.py:at,modern \\
    --data_dir=/data/tfds --set model.depth=10 model.width=1 train.batch_size=64 \\
    --num_steps=200 --num_examples=1000 --seeds 0 \\
    --formulas dataset per_image informed --out=normalization_cifar10.json

Trains the same network by the same steps behind normalisations that differ in
one respect (`support.normalizations.FORMULAS`), without weight averages, and
attacks the last weights with running statistics. The network of the last step
counts: there is no choice of a checkpoint.
"""

import argparse
import ast
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks import controls
from benchmarks.support import machine, networks
from benchmarks.support.machine import whole

Row = dict[str, Any]

FORMULAS = (
  "dataset",
  "per_image",
  "offset",
  "gain",
  "informed",
  "none",
  "double",
  "half",
  "constant",
)
"""Names in `normalizations.FORMULAS`, a module that imports JAX."""

PROTOCOLS = ("nominal", "pgd20", "pgd20-margin")


def _config(args: argparse.Namespace, seed: int) -> Any:
  """Loads the configuration of a training."""
  path, _, choice = args.config.partition(":")
  module = networks.load_config(pathlib.Path(path))
  config = module.get_config(choice or "at")
  config.seed = seed
  config.model.normalization = "none"
  config.train.ema_decay = 0.0
  config.data.dir = args.data_dir
  for text in args.set:
    field, _, value = text.partition("=")
    section, _, name = field.partition(".")
    if name not in config.get(section, {}):
      raise UserError(f"set: {text!r}; allowed: SECTION.FIELD=VALUE")
    config[section][name] = ast.literal_eval(value)
  return config


class Training:
  """Student of a plan, to be trained behind several normalisations."""

  def __init__(self, plan: Any, dataset: Any, num_steps: int | None):
    """Prepares the programs.

    Args:
      plan: Plan of a method without a teacher, its network not normalising.
      dataset: The data.
      num_steps: Number of steps; None: that of the plan.
    """
    from atat_jax import sharding, train
    from benchmarks.support import normalizations

    spec = plan.data.spec
    self.model = normalizations.Normalized(plan.model, spec.mean, spec.std)
    plan = dataclasses.replace(plan, model=self.model)
    (stage,) = plan.stages
    with tempfile.TemporaryDirectory() as folder:
      outline = train.make_outline(
        plan, stage, pathlib.Path(folder), len(dataset.train.labels)
      )
    self.num_steps = num_steps or outline.total
    outline = dataclasses.replace(outline, total=self.num_steps, per_dispatch=1)
    self._prepared = train.prepare(
      plan, stage, None, dataset, sharding.make_mesh(), None, outline
    )

  def run(self, formula: str) -> Any:
    """Trains from the first step; returns the variables after the last.

    Args:
      formula: Name in `FORMULAS`.
    """
    import jax
    import jax.numpy as jnp

    from atat_jax import state
    from benchmarks.support import normalizations

    current = self._prepared.start([])
    old = current.params["formula"]
    numbers = jnp.array(normalizations.FORMULAS[formula], old.dtype)
    numbers = jax.device_put(numbers, old.sharding)
    current = current.replace(params={**current.params, "formula": numbers})
    for step in range(self.num_steps):
      current = self._prepared.programs.take_steps(
        current, range(step, step + 1), None
      )
    return state.evaluated(current)


def thirds(values: np.ndarray) -> np.ndarray:
  """Numbers each value's third, 0 for the smallest; int [N]."""
  return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, "right")


def contrast(images: np.ndarray) -> np.ndarray:
  """Returns the standard deviation of each image's pixels, [N]."""
  return images.reshape(len(images), -1).std(-1)


def _attack(
  make: Callable[[Any], Any], split: Any, protocol: Any, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Attacks images [N, H, W, C]; `make` makes the classifier of a clean batch.

  Returns:
    Attacked images [N, H, W, C], and who is classified correctly, [N].
  """
  import jax

  from atat_jax import evaluation, rng, sharding
  from atat_jax.data import batches

  def run(number: int, images: Any, labels: Any) -> Any:
    key = rng.stream(jax.random.key(0), "evaluation", number)
    classifier = make(images)
    attacked = protocol.run(key, classifier, images, labels)
    score = evaluation.accuracies.score
    return attacked, score(classifier, attacked, labels)[0]

  found: tuple[np.ndarray, np.ndarray] = batches.map_batches(
    run,
    split.images.astype(np.float32) / 255,
    split.labels,
    batch_size=batch_size,
    mesh=sharding.make_mesh(),
  )
  return found


def evaluate(
  model: Any, variables: Any, reference: Any, split: Any, batch_size: int
) -> Row:
  """Attacks a network with running statistics.

  Args:
    model: `normalizations.Normalized`.
    variables: Its variables.
    reference: Protocol with the epsilon and the step of the evaluation.
    split: Images uint8 [N, H, W, C] and labels [N].
    batch_size: Images at a time.

  Returns:
    Accuracies in [0, 1] by protocol; that of PGD-20 by third of the images'
    contrast, and where the network normalises by the clean image in attack and
    evaluation ("pgd20_anchored"); the mean distance by which PGD-20 moves an
    image's mean, and its mean factor on the contrast.
  """
  from atat_jax import evaluation, models
  from benchmarks.support import normalizations

  classifier = models.classifier(model, variables)
  found: Row = {}
  for name in PROTOCOLS:
    protocol = evaluation.parse(
      name, epsilon=reference.epsilon, step_size=reference.step_size
    )
    attacked, correct = _attack(
      lambda _: classifier, split, protocol, batch_size
    )
    found[name] = float(correct.mean())
    if name == "pgd20":
      images = split.images.astype(np.float32) / 255
      third = thirds(contrast(images))
      shift = attacked.mean((1, 2, 3)) - images.mean((1, 2, 3))
      factor = contrast(attacked) / np.maximum(contrast(images), 1e-6)
      found |= {
        "pgd20_by_contrast": [correct[third == n].mean() for n in range(3)],
        "contrasts": [contrast(images)[third == n].mean() for n in range(3)],
        "mean_shift": np.abs(shift).mean(),
        "contrast_factor": factor.mean(),
      }
      found["pgd20_anchored"] = _attack(
        functools.partial(normalizations.anchored, model, variables),
        split,
        protocol,
        batch_size,
      )[1].mean()
  return _plain(found)


def _plain(value: Any) -> Any:
  """Turns numpy's numbers into Python's."""
  if isinstance(value, dict):
    return {name: _plain(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_plain(one) for one in value]
  return float(value)


def _rows(args: argparse.Namespace) -> Iterator[Row]:
  from atat_jax import data
  from atat_jax.config import make_plan
  from atat_jax.data import Split

  dataset: Any = None
  for seed in args.seeds:
    plan = make_plan(_config(args, seed))
    if dataset is None:
      dataset = data.load(
        plan.data.name,
        data_dir=plan.data.dir,
        validation_size=plan.data.validation_size,
      )
    size = args.num_examples or len(dataset.test.labels)
    split = Split(dataset.test.images[:size], dataset.test.labels[:size])
    training = Training(plan, dataset, args.num_steps)
    for formula in args.formulas:
      found = evaluate(
        training.model,
        training.run(formula),
        plan.evaluation.validation,
        split,
        args.batch_size,
      )
      yield {
        "name": f"{plan.data.name}/{formula}/seed{seed}",
        "data": plan.data.name,
        "formula": formula,
        "training_seed": seed,
        "num_steps": training.num_steps,
        "num_examples": size,
        "epsilon": plan.evaluation.validation.epsilon,
        **found,
      }


def table(rows: Sequence[Row]) -> str:
  """Tabulates accuracies (%) in Markdown, the mean of all seeds a row.

  Differences are taken seed by seed, from `dataset`.
  """
  lines = [
    [
      "normalisation",
      "nominal",
      "PGD-20",
      "difference",
      "PGD-20, margin",
      "PGD-20, normalised by the clean image",
      "change of an image's mean",
      "low, middle, high contrast",
    ]
  ]
  base = {
    row["training_seed"]: row["pgd20"]
    for row in rows
    if row["formula"] == "dataset"
  }
  for formula in dict.fromkeys(row["formula"] for row in rows):
    found = [row for row in rows if row["formula"] == formula]
    paired = [
      row["pgd20"] - base[row["training_seed"]]
      for row in found
      if row["training_seed"] in base
    ]
    third = np.mean([row["pgd20_by_contrast"] for row in found], 0)
    lines.append(
      [
        formula,
        controls.mean([row["nominal"] for row in found]),
        controls.mean([row["pgd20"] for row in found]),
        controls.mean(paired) if paired and formula != "dataset" else "-",
        controls.mean([row["pgd20-margin"] for row in found]),
        controls.mean([row["pgd20_anchored"] for row in found]),
        f"{np.mean([row['mean_shift'] for row in found]):.3f}",
        ", ".join(f"{100 * value:.1f}" for value in third),
      ]
    )
  return tables.markdown(lines)


def _line(row: Row) -> str:
  numbers = ", ".join(f"{name} {100 * row[name]:.1f}" for name in PROTOCOLS)
  return f"{row['name']}: {numbers}"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  default = machine.ROOT / "configs" / "digits.py"
  add("--config", default=f"{default}:at", help="PATH:METHOD,RECIPE")
  add("--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE")
  add("--formulas", nargs="+", default=list(FORMULAS), choices=FORMULAS)
  add("--seeds", nargs="+", type=int, default=[0, 1, 2])
  add("--data_dir", help="directory of tensorflow-datasets")
  add("--num_steps", type=whole, help="steps; default: the configuration's")
  add("--num_examples", type=int, default=0, help="test images; 0: all")
  add("--batch_size", type=whole, default=360, help="of the evaluation")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
