"""Choices of the recipe `fast`, compared at small size.

  python -m benchmarks.recipes attacks --data_dir=/data/tfds --out=attacks.json
  python -m benchmarks.recipes training --data_dir=/data/tfds --out=training.json

Trains a WRN-10-1 on CIFAR-10 images of half the height and width, a sixth of
them, under `configs/cifar10.py:at,fast` with one thing changed at a time,
and attacks the last network with running statistics. The group `attacks` compares
attacks of the training, for as many epochs and for as much computation; `training`
everything else. Both the averaged and the last weights are attacked; the reference
keeps averages with other warm-ups, too.

Cost is counted in forward passes an image (`benchmarks.support.flops.passes`) and
measured as processor time of the steps, without compilation.
"""

import argparse
import ast
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atat_jax.runs import tables
from benchmarks import controls
from benchmarks.support import machine, networks
from benchmarks.support.machine import whole

Row = dict[str, Any]
Fields = Mapping[str, Any]

EPSILON = 8 / 255
PROTOCOLS = ("nominal", "pgd20", "pgd10-margin")
MARGIN = "pgd10-margin"
"""Protocol by which variants are compared: close to AutoAttack, and cheap."""

REFERENCE = "reference"
WARM_UPS = (4, 20, 40)
"""Other values of the 10 in the share of an average, 9 / (10 + t)."""

SMALL: Fields = {
  "model.name": "wide_resnet",
  "model.depth": 10,
  "model.width": 1,
  "model.activation": "relu",
  "model.shortcut": "conv",
  "model.dtype": "float32",
  "train.num_epochs": 5,
  "train.batch_size": 64,
  "train.learning_rate": 0.1,
  "train.steps_per_dispatch": 1,
  "objective.num_steps": 3,
  "objective.step_size": 4 / 255,
}
"""Fields of the reference that differ from the recipe's."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """One training.

  Attributes:
    name: Name in the table.
    fields: Fields that differ from the reference's.
    early: Fields of the first steps that differ from those of the others.
    share: Share of the steps that are first ones.
    halved: Whether the first steps see images of half the size.
  """

  name: str
  fields: Fields = dataclasses.field(default_factory=dict)
  early: Fields = dataclasses.field(default_factory=dict)
  share: float = 0.0
  halved: bool = False


def _attack(steps: int, step: float, epochs: float = 5) -> Fields:
  return {
    "objective.num_steps": steps,
    "objective.step_size": step / 255,
    "train.num_epochs": epochs,
  }


def _single(method: str, epochs: int = 5) -> Fields:
  return {"objective.attack_method": method, "train.num_epochs": epochs}


ATTACKS = (
  Variant(REFERENCE),  # PGD-3: 9 forward passes an image
  Variant("fgsm_rs", _single("fgsm_rs")),
  Variant("n_fgsm", _single("n_fgsm")),
  Variant("pgd2", _attack(2, 5)),
  Variant("pgd5", _attack(5, 2.5)),
  Variant("pgd10", _attack(10, 2)),
  Variant("n_fgsm, equal cost", _single("n_fgsm", 9)),
  Variant("pgd2, equal cost", _attack(2, 5, 6)),
  Variant("pgd5, equal cost", _attack(5, 2.5, 3)),
  Variant("pgd10, equal cost", _attack(10, 2, 2)),
  Variant(
    "pgd1 for 4 epochs, then pgd5 for 2",
    _attack(5, 2.5, 6),
    {"objective.num_steps": 1, "objective.step_size": EPSILON},
    4 / 6,
  ),
  Variant(
    "half the image for 6 epochs, then the whole for 4",
    {"train.num_epochs": 10},
    share=0.6,
    halved=True,
  ),
)
"""Attacks of the training, for as many epochs and for as much computation."""

TRAINING = (
  Variant(REFERENCE),
  Variant("no label smoothing", {"train.label_smoothing": 0.0}),
  Variant("label smoothing 0.2", {"train.label_smoothing": 0.2}),
  Variant("learning rate 0.05", {"train.learning_rate": 0.05}),
  Variant("learning rate 0.2", {"train.learning_rate": 0.2}),
  Variant("rise in a tenth", {"train.warmup_fraction": 0.1}),
  Variant("triangular", {"train.schedule": "triangular"}),
  Variant("epsilon grows in 0.3", {"train.epsilon_warmup": 0.3}),
  Variant(
    "batch 128, rate 0.2", {"train.batch_size": 128, "train.learning_rate": 0.2}
  ),
  Variant(
    "attack on batch statistics", {"objective.attack_batch_norm": "batch"}
  ),
  Variant("attack on the margin", {"objective.attack_loss": "margin"}),
  Variant("AWP 0.005", {"train.awp_gamma": 0.005}),
  Variant("SiLU", {"model.activation": "silu"}),
  Variant("CutMix", {"data.mix": "cutmix"}),
)
"""Everything but the attack of the training."""

GROUPS = {"attacks": ATTACKS, "training": TRAINING}


def pooled(split: Any, size: int | None = None) -> Any:
  """Halves height and width of the first images, as means of 2 x 2 pixels.

  Args:
    split: Images uint8 [N, H, W, C], H and W even, and labels [N].
    size: Number of images to keep; None: all.

  Returns:
    uint8 [size, H / 2, W / 2, C] and labels [size].
  """
  images = split.images[:size].astype(np.float32)
  n, height, width, channels = images.shape
  blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
  return type(split)(
    np.rint(blocks.mean((2, 4))).astype(np.uint8), split.labels[:size]
  )


def _config(args: argparse.Namespace, fields: Fields, seed: int) -> Any:
  module = networks.load_config(machine.ROOT / "configs" / "cifar10.py")
  config = module.get_config("at,fast")
  config.seed = seed
  config.data.dir = args.data_dir
  given = dict(text.split("=", 1) for text in args.set)
  literals = {name: ast.literal_eval(text) for name, text in given.items()}
  config.update_from_flattened_dict({**SMALL, **fields, **literals})
  return config


class _Phase:
  """Programs of the steps of one part of a training."""

  def __init__(self, plan: Any, total: int, dataset: Any):
    """Prepares a training of `total` steps, of which a part is taken."""
    from atat_jax import sharding, train

    (stage,) = plan.stages
    with tempfile.TemporaryDirectory() as folder:
      outline = train.make_outline(
        plan, stage, pathlib.Path(folder), len(dataset.train.labels)
      )
    outline = dataclasses.replace(outline, total=total, per_dispatch=1)
    self.prepared = train.prepare(
      plan, stage, None, dataset, sharding.make_mesh(), None, outline
    )
    self.stage = stage

  def cost(self) -> int:
    """Forward passes of a step."""
    from benchmarks.support import flops

    objective = self.stage.objective
    steps = 1 if objective.takes_single_step else objective.num_steps
    awp = 3 if self.stage.awp_gamma else 0
    return self.stage.batch_size * (flops.passes(objective, steps) + awp)


def _other_averages(averages: dict[int, Any], new: Any, step: int) -> None:
  """Moves averages whose share has another constant than 10, in place."""
  import optax

  for constant in WARM_UPS:
    share = (constant - 1) / (constant + step)
    old = averages.get(constant, new)
    averages[constant] = optax.incremental_update(new, old, share)


def _run(
  phases: Sequence[tuple[_Phase, range]], *, others: bool
) -> tuple[dict[str, Any], float, int]:
  """Trains; returns variables by name, seconds a step, and all steps' cost."""
  import jax

  current = phases[0][0].prepared.start([])
  averages: dict[int, Any] = {}
  seconds = []
  for phase, numbers in phases:
    for step in numbers:
      began = time.process_time()
      current = jax.block_until_ready(
        phase.prepared.programs.take_steps(current, range(step, step + 1), None)
      )
      if step > numbers.start:  # the first one compiles
        seconds.append(time.process_time() - began)
      if others:
        new = {"params": current.params, "batch_stats": current.batch_stats}
        _other_averages(averages, jax.tree.map(np.asarray, new), step)
  found = {
    "last": {"params": current.params, "batch_stats": current.batch_stats},
    "averaged": current.ema,
    **{f"averaged, {constant}": one for constant, one in averages.items()},
  }
  cost = sum(phase.cost() * len(numbers) for phase, numbers in phases)
  return found, float(np.mean(seconds)), cost


def evaluate(
  model: Any, variables: Any, split: Any, names: Sequence[str]
) -> Row:
  """Attacks a network with running statistics.

  Args:
    model: A linen module.
    variables: Its variables.
    split: Images uint8 [N, H, W, C] and labels [N].
    names: Names of the protocols.

  Returns:
    Accuracy in [0, 1] by protocol.
  """
  import jax

  from atat_jax import evaluation, models, sharding

  classifier = models.classifier(model, variables)
  mesh = sharding.make_mesh()
  data = sharding.put_replicated(mesh, split)
  return {
    name: evaluation.judge(
      jax.random.key(0),
      classifier,
      data,
      protocol=evaluation.parse(name, epsilon=EPSILON, step_size=2 / 255),
      batch_size=min(250, len(split.labels)),
      mesh=mesh,
    ).accuracy
    for name in names
  }


def _phases(
  args: argparse.Namespace, variant: Variant, seed: int, dataset: Any
) -> tuple[Any, list[tuple[_Phase, range]]]:
  from atat_jax.config import make_plan

  plan = make_plan(_config(args, variant.fields, seed))
  (stage,) = plan.stages
  total = stage.num_epochs * (len(dataset.train.labels) // stage.batch_size)
  early = round(variant.share * total)
  phases = [(_Phase(plan, total, dataset), range(early, total))]
  if early:
    first = make_plan(_config(args, {**variant.fields, **variant.early}, seed))
    seen = dataset
    if variant.halved:
      seen = dataclasses.replace(dataset, train=pooled(dataset.train))
    phases.insert(0, (_Phase(first, total, seen), range(early)))
  return plan.model, phases


def _row(
  args: argparse.Namespace, variant: Variant, seed: int, dataset: Any
) -> Row:
  """Trains and evaluates one variant."""
  model, phases = _phases(args, variant, seed, dataset)
  others = variant.name == REFERENCE and args.group == "training"
  networks, seconds, cost = _run(phases, others=others)
  if variant.halved:  # a quarter of the work
    cost -= round(0.75 * phases[0][0].cost() * len(phases[0][1]))
  return {
    "name": f"{variant.name}/seed{seed}",
    "variant": variant.name,
    "seed": seed,
    "num_steps": phases[-1][1].stop,
    "passes": cost,
    "seconds_per_step": seconds,
    "num_examples": len(dataset.test.labels),
    **{
      name: evaluate(
        model,
        variables,
        dataset.test,
        PROTOCOLS if name == "averaged" else ("nominal", MARGIN),
      )
      for name, variables in networks.items()
    },
  }


def _rows(args: argparse.Namespace) -> Iterator[Row]:
  from atat_jax import checks, data
  from atat_jax.config import make_plan

  plan = make_plan(_config(args, {}, 0))
  whole_set = data.load(
    plan.data.name,
    data_dir=plan.data.dir,
    validation_size=plan.data.validation_size,
  )
  dataset = dataclasses.replace(
    whole_set,
    train=pooled(whole_set.train, args.num_training),
    test=pooled(whole_set.test, args.num_examples),
  )
  known = {variant.name: variant for variant in GROUPS[args.group]}
  for name in args.variants or ():
    checks.choice("variants", name, known)
  for seed in args.seeds:
    for name in args.variants or known:
      yield _row(args, known[name], seed, dataset)


def table(rows: Sequence[Row]) -> str:
  """Tabulates the accuracies (%) in Markdown, the mean of all seeds a row.

  Differences are those under PGD-10 on the margin, taken seed by seed, from the
  reference; cost and time are relative to its own.
  """
  lines = [
    [
      *("variant", "seeds", "steps", "cost", "CPU time", "nominal", "PGD-20"),
      *("PGD-10, margin", "difference", "the same of the last weights"),
    ]
  ]
  base = {row["seed"]: row for row in rows if row["variant"] == REFERENCE}
  first = next(iter(base.values()))
  for name in dict.fromkeys(row["variant"] for row in rows):
    found = [row for row in rows if row["variant"] == name]
    seconds = np.mean(
      [_seconds(row) / _seconds(base[row["seed"]]) for row in found]
    )
    paired = [
      row["averaged"][MARGIN] - base[row["seed"]]["averaged"][MARGIN]
      for row in found
    ]
    lines.append(
      [
        name,
        str(len(found)),
        str(found[0]["num_steps"]),
        f"{found[0]['passes'] / first['passes']:.2f}",
        f"{seconds:.2f}",
        *(
          controls.mean([row["averaged"][key] for row in found])
          for key in PROTOCOLS
        ),
        "-" if name == REFERENCE else controls.mean(paired),
        controls.mean([row["last"][MARGIN] for row in found]),
      ]
    )
  return tables.markdown(lines)


def _seconds(row: Row) -> float:
  seconds: float = row["seconds_per_step"] * row["num_steps"]
  return seconds


def averages_table(rows: Sequence[Row]) -> str:
  """Tabulates accuracies (%) of averages of the reference's weights."""
  found = [row for row in rows if row["variant"] == REFERENCE]
  lines = [["constant", "nominal", "PGD-10, margin"]]
  for name in (
    "last",
    "averaged, 40",
    "averaged, 20",
    "averaged",
    "averaged, 4",
  ):
    label = {"last": "none", "averaged": "10"}.get(name, name[10:])
    numbers = [
      controls.mean([row[name][key] for row in found])
      for key in ("nominal", MARGIN)
    ]
    lines.append([label, *numbers])
  return tables.markdown(lines)


def _line(row: Row) -> str:
  numbers = ", ".join(
    f"{name} {100 * row[name]['nominal']:.1f} / {100 * row[name][MARGIN]:.1f}"
    for name in ("last", "averaged")
  )
  return (
    f"{row['name']}: {numbers}; {1e3 * row['seconds_per_step']:.0f} ms a step"
  )


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("group", choices=GROUPS)
  add("--variants", nargs="+", metavar="NAME", help="default: all of the group")
  add("--seeds", nargs="+", type=int, default=[0, 1])
  add("--set", nargs="+", default=[], metavar="FIELD=VALUE")
  add("--data_dir", help="directory of tensorflow-datasets")
  add("--num_training", type=whole, default=8000, help="training images")
  add("--num_examples", type=whole, default=2000, help="test images")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Trains and evaluates all variants; writes each as soon as it is there."""
  args = parser().parse_args(argv)
  with machine.plain_errors():
    machine.check_out(args.out)
    # Another seed is the same program: with the cache it compiles once.
    about = machine.describe(
      machine.start(args.threads, cache=True, torch=False)
    )
    found: list[Row] = []
    for row in _rows(args):
      found.append(row)
      machine.say(_line(row))
      if args.out is not None:
        machine.write(args.out, about, found)
    print(f"\n{table(found)}")


if __name__ == "__main__":
  main()
