"""Choices of the recipe `fast`, compared at small size.

  python -m benchmarks.recipes --data_dir=/data/tfds --out=recipes.json

Trains a WRN-10-1 on CIFAR-10 images of half the height and width, a tenth of them,
by the steps of `configs/cifar10.py:at,fast` with one thing changed at a time, and
attacks the last network with running statistics by PGD-20 on the margin. The
numbers of an attack, of the schedule and of the targets are arguments of one
program, so that a variant compiles nothing. Every training keeps averages of its
weights with several warm-ups; they and the last weights are attacked.

Cost is counted in forward passes of one image, as `benchmarks.support.flops` does,
and measured as processor time. A call that was stopped is continued by the same
command from the same commit.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks import controls
from benchmarks.support import machine
from benchmarks.support.machine import whole

Row = dict[str, Any]

EPSILON = 8 / 255
BATCH_SIZE = 64
REFERENCE = "reference"
CONSTANTS = (10, 4, 20, 40)
"""Constant c in the share of an average, (c - 1) / (c + t); the recipe's first."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """Numbers of one training; the defaults are the reference's.

  Attributes:
    name: Name in the table.
    num_steps: Number of steps of the attack.
    step_size: Their length, in pixels of 0 to 255.
    noise: Radius of the uniform start, in epsilons.
    radius: Radius of the ball that iterates are projected into, in epsilons.
    early_share: Share of the run with another attack.
    early_steps: Number of steps of that attack, of epsilon / early_steps x 1.5.
    epsilon_warmup: Share of the run in which the attack grows.
    label_smoothing: Share of every target spread over all classes.
    epochs: Number of epochs.
    schedule: Name in `optim.SCHEDULES`.
    learning_rate: Highest learning rate.
    warmup_fraction: Share of the run in which the rate rises.
    weight_decay: Weight decay of the kernels.
  """

  name: str
  num_steps: int = 3
  step_size: float = 4.0
  noise: float = 1.0
  radius: float = 1.0
  early_share: float = 0.0
  early_steps: int = 1
  epsilon_warmup: float = 0.0
  label_smoothing: float = 0.1
  epochs: int = 6
  schedule: str = "one_cycle"
  learning_rate: float = 0.1
  warmup_fraction: float = 0.25
  weight_decay: float = 5e-4

  def passes(self) -> float:
    """Forward passes of one image, all epochs together."""
    early = self.early_share * (2 * self.early_steps + 3)
    late = (1 - self.early_share) * (2 * self.num_steps + 3)
    return self.epochs * (early + late)


_N_FGSM: dict[str, Any] = {
  "num_steps": 1,
  "step_size": 8.0,
  "noise": 2.0,
  "radius": 3.0,  # which its iterates never leave
}
_FGSM_RS: dict[str, Any] = {"num_steps": 1, "step_size": 10.0}

VARIANTS = (
  Variant(REFERENCE),
  Variant("fgsm_rs", **_FGSM_RS),
  Variant("n_fgsm", **_N_FGSM),
  Variant("pgd2", num_steps=2, step_size=5.0),
  Variant("pgd5", num_steps=5, step_size=2.5),
  Variant("pgd10", num_steps=10, step_size=2.0),
  Variant("n_fgsm, 11 epochs", **_N_FGSM, epochs=11),
  Variant("pgd2, 8 epochs", num_steps=2, step_size=5.0, epochs=8),
  Variant("pgd5, 4 epochs", num_steps=5, step_size=2.5, epochs=4),
  Variant("pgd10, 2 epochs", num_steps=10, step_size=2.0, epochs=2),
  Variant(
    "1 step in the first half, then 5",
    num_steps=5,
    step_size=2.5,
    early_share=0.5,
  ),
  Variant("epsilon grows in 0.3", epsilon_warmup=0.3),
  Variant("no label smoothing", label_smoothing=0.0),
  Variant("label smoothing 0.2", label_smoothing=0.2),
  Variant("triangular", schedule="triangular"),
  Variant("cosine, no rise", schedule="cosine", warmup_fraction=0.0),
  Variant("rise in a tenth", warmup_fraction=0.1),
  Variant("learning rate 0.05", learning_rate=0.05),
  Variant("learning rate 0.2", learning_rate=0.2),
  Variant("weight decay 2e-4", weight_decay=2e-4),
  Variant("weight decay 1e-3", weight_decay=1e-3),
)


class _Numbers(NamedTuple):
  """Numbers of a step that a variant chooses; no other value compiles anew."""

  num_steps: Any
  step_size: Any
  noise: Any
  radius: Any
  scale: Any
  label_smoothing: Any
  rate: Any
  weight_decay: Any


class _Current(NamedTuple):
  """State of a training."""

  params: Any
  batch_stats: Any
  velocity: Any
  averages: Any


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


def _attack(
  model: Any,
  variables: Any,
  start: Any,
  images: Any,
  labels: Any,
  **numbers: Any,
) -> Any:
  """Attacks a network with running statistics."""
  from atat_jax import batch_norm
  from atat_jax.attacks import projected_gradient

  def logits_fn(state: Any, x: Any) -> tuple[Any, Any]:
    return batch_norm.apply(model, variables, x, batch_norm="running")[0], state

  return projected_gradient.ascend(
    logits_fn, (), start, images, labels, **numbers
  )[0]


def step(
  current: _Current,
  key: Any,
  images: Any,
  labels: Any,
  number: Any,
  numbers: _Numbers,
  *,
  model: Any,
) -> _Current:
  """Makes one step of adversarial training; for use inside jit.

  Args:
    current: State before the step.
    key: Key of augmentation and attack.
    images: uint8 [B, H, W, C].
    labels: int32 [B].
    number: Number of the step, from 0.
    numbers: Numbers of the variant.
    model: Network.

  Returns:
    The state after the step.
  """
  import jax
  import jax.numpy as jnp
  import optax

  gradient, stats = _differentiate(
    current,
    _attacked(current, key, images, labels, numbers, model),
    labels,
    numbers,
    model,
  )
  updates, velocity = optax.trace(0.9, nesterov=True).update(
    gradient, current.velocity
  )
  params = jax.tree.map(
    lambda w, u: w - numbers.rate * u, current.params, updates
  )
  new = {"params": params, "batch_stats": stats}
  averages = {
    constant: optax.incremental_update(
      new, average, jnp.float32(constant - 1) / (constant + number)
    )
    for constant, average in current.averages.items()
  }
  return _Current(params, stats, velocity, averages)


def _attacked(
  current: _Current,
  key: Any,
  images: Any,
  labels: Any,
  numbers: _Numbers,
  model: Any,
) -> Any:
  """Augments and attacks a batch; float32 [B, H, W, C]."""
  import jax

  from atat_jax.attacks import projected_gradient
  from atat_jax.data import augment

  crop_key, start_key = jax.random.split(key)
  images = augment.to_float(
    augment.pad_crop_flip(crop_key, images, padding=2, flip=True)
  )
  epsilon = numbers.scale * EPSILON
  return _attack(
    model,
    {"params": current.params, "batch_stats": current.batch_stats},
    projected_gradient.random_start(
      start_key, images, epsilon=numbers.noise * epsilon
    ),
    images,
    labels,
    epsilon=numbers.radius * epsilon,
    step_size=numbers.scale * numbers.step_size,
    num_steps=numbers.num_steps,
  )


def _differentiate(
  current: _Current, attacked: Any, labels: Any, numbers: _Numbers, model: Any
) -> tuple[Any, Any]:
  """Gradient of loss and penalty, and the statistics after the pass."""
  import jax
  import optax

  from atat_jax import batch_norm, losses, optim

  targets = optax.smooth_labels(
    jax.nn.one_hot(labels, model.num_classes), numbers.label_smoothing
  )

  def loss(params: Any) -> tuple[Any, Any]:
    variables = {"params": params, "batch_stats": current.batch_stats}
    logits, stats = batch_norm.apply(
      model, variables, attacked, batch_norm="batch"
    )
    return losses.soft_cross_entropy(logits, targets).mean(), stats

  gradient, stats = jax.grad(loss, has_aux=True)(current.params)
  gradient = jax.tree.map(
    lambda g, w, decays: g + numbers.weight_decay * w if decays else g,
    gradient,
    current.params,
    optim.decay_mask(current.params),
  )
  return gradient, stats


def _start(model: Any, shape: tuple[int, ...], seed: int) -> _Current:
  """Makes the state before the first step."""
  import jax
  import jax.numpy as jnp
  import optax

  from atat_jax import compilation

  init = compilation.jit(model.init, once=True)
  variables = init(jax.random.key(seed), jnp.zeros((1, *shape)))
  params, stats = variables["params"], variables["batch_stats"]
  velocity = optax.trace(0.9, nesterov=True).init(params)
  averages = {constant: dict(variables) for constant in CONSTANTS}
  return _Current(params, stats, velocity, averages)


def _numbers(
  variant: Variant, number: int, total: int, rate: float
) -> _Numbers:
  """Numbers of one step of a variant."""
  early = number < variant.early_share * total
  warmup = max(1, round(variant.epsilon_warmup * total))
  steps = variant.early_steps if early else variant.num_steps
  size = 1.5 * 8 / steps if early else variant.step_size
  return _Numbers(
    np.int32(steps),
    np.float32(size / 255),
    np.float32(variant.noise),
    np.float32(variant.radius),
    np.float32(min(1.0, (number + 1) / warmup)),
    np.float32(variant.label_smoothing),
    np.float32(rate),
    np.float32(variant.weight_decay),
  )


def train(
  step_fn: Any, current: _Current, split: Any, variant: Variant, seed: int
) -> tuple[_Current, float]:
  """Trains a variant.

  Args:
    step_fn: Compiled `step`.
    current: State before the first step.
    split: Training images, uint8.
    variant: The variant.
    seed: Seed of batches and attacks.

  Returns:
    The last state, and the processor time of all steps but the first, seconds.
  """
  import jax

  from atat_jax import optim
  from atat_jax.data import batches

  size = len(split.labels)
  total = variant.epochs * (size // BATCH_SIZE)
  schedule = optim.make_schedule(
    variant.schedule,
    learning_rate=variant.learning_rate,
    total_steps=total,
    warmup_fraction=variant.warmup_fraction,
  )
  rates = np.asarray(jax.vmap(schedule)(np.arange(total)))
  key = jax.random.key(seed)
  began = 0.0
  for number in range(total):
    indices = batches.train_indices(
      seed, number, num_examples=size, batch_size=BATCH_SIZE
    )
    current = step_fn(
      current,
      jax.random.fold_in(key, number),
      split.images[indices],
      split.labels[indices],
      np.int32(number),
      _numbers(variant, number, total, rates[number]),
    )
    if not number:
      jax.block_until_ready(current)
      began = time.process_time()
  jax.block_until_ready(current)
  return current, time.process_time() - began


def correct(
  variables: Any, images: Any, labels: Any, num_steps: Any, *, model: Any
) -> Any:
  """Attacks images by PGD on the margin from the clean image; inside jit.

  Args:
    variables: Variables of the network.
    images: uint8 [B, H, W, C].
    labels: int32 [B].
    num_steps: Number of steps of 2/255; 0: no attack.
    model: Network.

  Returns:
    Whether each image is classified correctly afterwards, bool [B].
  """
  from atat_jax import batch_norm
  from atat_jax.data import augment

  images = augment.to_float(images)
  attacked = _attack(
    model,
    variables,
    images,
    images,
    labels,
    epsilon=EPSILON,
    step_size=2 / 255,
    num_steps=num_steps,
    loss="margin",
  )
  logits, _ = batch_norm.apply(model, variables, attacked, batch_norm="running")
  return logits.argmax(-1) == labels


def _evaluate(correct_fn: Any, variables: Any, split: Any) -> Row:
  """Returns nominal and robust accuracy, in [0, 1]."""
  size = len(split.labels) // 250 * 250
  return {
    name: float(
      np.mean(
        [
          correct_fn(
            variables,
            split.images[i : i + 250],
            split.labels[i : i + 250],
            np.int32(steps),
          )
          for i in range(0, size, 250)
        ]
      )
    )
    for name, steps in (("nominal", 0), ("robust", 20))
  }


def _chosen(args: argparse.Namespace) -> dict[str, tuple[Variant, int]]:
  """Returns the variant and the seed of each measurement, by its name."""
  known = {variant.name: variant for variant in VARIANTS}
  chosen = args.variants or list(known)
  if unknown := [name for name in chosen if name not in known]:
    raise UserError(f"variants: {unknown[0]!r}; allowed: {', '.join(known)}")
  if REFERENCE not in chosen:
    raise UserError(
      f"variants: without {REFERENCE!r}; allowed: with it, which the others are"
      " compared with"
    )
  if args.num_examples % 250:
    raise UserError(
      f"num_examples: {args.num_examples}; allowed: a multiple of 250"
    )
  return {
    f"{name}/seed{seed}": (known[name], seed)
    for seed in args.seeds
    for name in chosen
  }


def _rows(args: argparse.Namespace, names: Sequence[str]) -> Iterator[Row]:
  from atat_jax import compilation, data, models

  chosen = _chosen(args)
  whole_set = data.load("cifar10", data_dir=args.data_dir, validation_size=1024)
  training = pooled(whole_set.train, args.num_training)
  test = pooled(whole_set.test, args.num_examples)
  model = models.create(
    "wide_resnet",
    depth=10,
    width=1,
    activation="relu",
    shortcut="conv",
    normalization="dataset",
    mean=whole_set.spec.mean,
    std=whole_set.spec.std,
    num_classes=10,
    strides=tuple(args.strides),
  )
  step_fn = compilation.jit(functools.partial(step, model=model))
  correct_fn = compilation.jit(functools.partial(correct, model=model))
  for name in names:
    variant, seed = chosen[name]
    start = _start(model, training.images.shape[1:], seed)
    current, seconds = train(step_fn, start, training, variant, seed)
    last = {"params": current.params, "batch_stats": current.batch_stats}
    yield {
      "name": name,
      "variant": variant.name,
      "seed": seed,
      "passes": variant.passes(),
      "seconds": seconds,
      "num_examples": args.num_examples,
      "last": _evaluate(correct_fn, last, test),
      "averaged": {
        str(constant): _evaluate(correct_fn, average, test)
        for constant, average in current.averages.items()
        if constant == CONSTANTS[0] or variant.name == REFERENCE
      },
    }


def _averaged(row: Row) -> Row:
  found: Row = row["averaged"][str(CONSTANTS[0])]
  return found


def table(rows: Sequence[Row]) -> str:
  """Tabulates the accuracies (%) in Markdown, the mean of all seeds a row.

  Differences are taken seed by seed, from the reference; cost and time are
  relative to its own.
  """
  lines = [
    [
      *("variant", "seeds", "cost", "CPU time", "nominal", "robust"),
      *("difference", "last weights, robust"),
    ]
  ]
  base = {row["seed"]: row for row in rows if row["variant"] == REFERENCE}
  for name in dict.fromkeys(row["variant"] for row in rows):
    found = [row for row in rows if row["variant"] == name]
    pairs = [(row, base[row["seed"]]) for row in found]
    differences = [
      _averaged(row)["robust"] - _averaged(other)["robust"]
      for row, other in pairs
    ]
    lines.append(
      [
        name,
        str(len(found)),
        *(
          f"{np.mean([row[key] / other[key] for row, other in pairs]):.2f}"
          for key in ("passes", "seconds")
        ),
        *(
          controls.mean([_averaged(row)[key] for row in found])
          for key in ("nominal", "robust")
        ),
        "-" if name == REFERENCE else controls.mean(differences),
        controls.mean([row["last"]["robust"] for row in found]),
      ]
    )
  return tables.markdown(lines)


def averages_table(rows: Sequence[Row]) -> str:
  """Tabulates accuracies (%) of the reference's averages, and without one."""
  found = [row for row in rows if row["variant"] == REFERENCE]
  lines = [["average", "nominal", "robust"]]
  kinds = {"none": [row["last"] for row in found]}
  for constant in sorted(CONSTANTS, reverse=True):
    part = f"over the last 1/{constant - 1} of the run"
    kinds[part] = [row["averaged"][str(constant)] for row in found]
  for name, measured in kinds.items():
    means = [
      controls.mean([one[key] for one in measured])
      for key in ("nominal", "robust")
    ]
    lines.append([name, *means])
  return tables.markdown(lines)


def _line(row: Row) -> str:
  numbers = ", ".join(
    f"{name} {100 * one['nominal']:.1f} / {100 * one['robust']:.1f}"
    for name, one in (("last", row["last"]), ("averaged", _averaged(row)))
  )
  return f"{row['name']}: {numbers}; {row['seconds']:.1f} s"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--variants", nargs="+", metavar="NAME", help="default: all")
  add("--seeds", nargs="+", type=int, default=[0, 1])
  add("--strides", nargs=3, type=whole, default=[2, 2, 2], help="of the stages")
  add("--data_dir", help="directory of tensorflow-datasets")
  add("--num_training", type=whole, default=5000, help="training images")
  add("--num_examples", type=whole, default=2000, help="test images")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  with machine.plain_errors():
    names = list(_chosen(args))
  machine.run(
    args, functools.partial(_rows, args), table, line=_line, names=names
  )


if __name__ == "__main__":
  main()
