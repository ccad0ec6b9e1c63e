"""Why cross-entropy through the statistics of a batch is a weak attack.

  python -m benchmarks.methods --workdir=runs/methods --seeds=0,1,2
  python -m benchmarks.mechanism --runs=runs/methods --out=mechanism.json

In the protocol of the paper's released code every network normalises by the
batch of 100 images that it is evaluated on, and the attack differentiates
through the batch's statistics. The gradient of an image then has parts (see
`support.cross_terms`), which are measured here image by image, against the
margin by which the image is classified. Then the same network is attacked along
one part at a time, with losses that differ in one respect.

The part "own" takes a backward pass for each image and step: PGD along it runs
on the first `--num_rows` images, for `--row_methods` and `--row_seeds`.
"""

import argparse
import functools
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.runs import tables, worst_case
from benchmarks import controls
from benchmarks.support import machine
from benchmarks.support.machine import whole

Row = dict[str, Any]

ATTACKS = (
  ("cross_entropy", "through"),
  ("cross_entropy", "fixed"),
  ("unit", "through"),
  ("unfooled", "through"),
  ("margin", "through"),
  ("margin", "fixed"),
)
"""Loss and part of the gradient of each attack on all images."""

BY_ROWS = (("cross_entropy", "own"), ("cross_entropy", "cross"))
"""Those that take a backward pass for each image: FGSM on all images, and PGD
along the first of them on some."""

EDGES = (-math.inf, 0.0, 2.0, 4.0, 6.0, 8.0, math.inf)
"""Edges of the bins of margins, true logit less the largest other one."""
WORDS = {
  "cross_entropy through": "cross-entropy, everything (as published)",
  "cross_entropy fixed": "cross-entropy, statistics fixed",
  "cross_entropy own": "cross-entropy, own terms only",
  "cross_entropy cross": "cross-entropy, cross terms only",
  "unit through": "cross-entropy at unit length, everything",
  "unfooled through": "cross-entropy of unfooled images, everything",
  "margin through": "margin, everything",
  "margin fixed": "margin, statistics fixed",
}


@functools.cache
def _programs() -> tuple[Any, Any]:
  """Compiles the attack with its score, and the measurement of the parts."""
  import jax.numpy as jnp

  from atat_jax import compilation, losses
  from atat_jax.attacks import balls
  from benchmarks.support import cross_terms

  def attacked(
    key: Any, network: Any, images: Any, labels: Any, numbers: Any, route: str
  ) -> Any:
    found = cross_terms.attack(
      key, network, images, labels, **numbers, route=route
    )
    return found, network.through(found).argmax(-1) == labels

  def measured(
    network: Any, images: Any, labels: Any, epsilon: Any
  ) -> dict[str, Any]:
    logits = network.through(images)
    pull = cross_terms.pull("cross_entropy", logits, labels)
    parts = cross_terms.terms(network, images, pull)
    total = sum(parts)

    def flat(x: Any) -> Any:
      return x.reshape(len(x), -1)

    def cosine(a: Any, b: Any) -> Any:
      return (flat(balls.unit("l2", a)) * flat(balls.unit("l2", b))).sum(-1)

    def survives(part: Any) -> Any:
      x = jnp.clip(images + epsilon * jnp.sign(part), 0, 1)
      return network.through(x).argmax(-1) == labels

    lengths = {
      name: balls.length("l2", part) for name, part in parts._asdict().items()
    }
    return {
      "margin": -losses.margin(logits, labels),
      "pull": jnp.linalg.norm(pull, axis=-1),
      **lengths,
      "own": survives(parts.direct + parts.statistics),
      "crossed": survives(parts.cross),
      "cosine": cosine(total, parts.direct),
      "agreement": (jnp.sign(flat(total)) == jnp.sign(flat(parts.direct))).mean(
        -1
      ),
    }

  return (
    compilation.jit(attacked, static_argnames="route"),
    compilation.jit(measured),
  )


class Setting:
  """A network, the images that attacks see, and their numbers."""

  def __init__(
    self, network: Any, images: np.ndarray, labels: np.ndarray, **numbers: Any
  ):
    """Keeps the arguments.

    Args:
      network: `cross_terms.Passes`.
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N].
      **numbers: "batch_size", "seed", "epsilon" and "step_size".
    """
    self.network, self.images, self.labels = network, images, labels
    self.numbers = numbers

  def attack(
    self, name: str, loss: str, route: str, num_examples: int, num_steps: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Attacks the first images, with the starts of an evaluation.

    Args:
      name: "fgsm": one step of epsilon from the clean images; or "pgd".
      loss: Name in `cross_terms.LOSSES`.
      route: Name in `cross_terms.ROUTES`.
      num_examples: Number of images, N.
      num_steps: Number of steps of PGD.

    Returns:
      Adversarial images [N, H, W, C], and who is classified correctly, [N].
    """
    import jax

    from atat_jax import rng, sharding
    from atat_jax.data import batches
    from benchmarks.support import cross_terms

    attacked, _ = _programs()
    epsilon = self.numbers["epsilon"]
    key = jax.random.key(self.numbers["seed"])
    numbers = {
      "epsilon": epsilon,
      "step_size": epsilon if name == "fgsm" else self.numbers["step_size"],
      "num_steps": 1 if name == "fgsm" else num_steps,
      "random_start": name != "fgsm",
      "loss": cross_terms.LOSSES.index(loss),
    }

    def run(number: int, images: Any, labels: Any) -> Any:
      start = rng.stream(rng.stream(key, "evaluation", number), "start", 0)
      return attacked(start, self.network, images, labels, numbers, route=route)

    found: tuple[np.ndarray, np.ndarray] = batches.map_batches(
      run,
      self.images[:num_examples],
      self.labels[:num_examples],
      batch_size=self.numbers["batch_size"],
      mesh=sharding.make_mesh(),
    )
    return found

  def parts(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Measures the parts of the gradients at given images, [N] each.

    "own" and "crossed" say who is classified correctly after a step of epsilon
    along the own terms, or the cross terms, of all images of its batch.
    """
    from atat_jax import sharding
    from atat_jax.data import batches

    _, measured = _programs()
    found: dict[str, np.ndarray] = batches.map_batches(
      lambda _, *batch: measured(self.network, *batch, self.numbers["epsilon"]),
      images,
      self.labels,
      batch_size=self.numbers["batch_size"],
      mesh=sharding.make_mesh(),
    )
    return found


def binned(
  found: dict[str, np.ndarray], through: np.ndarray, fixed: np.ndarray
) -> list[dict[str, Any]]:
  """Summarises images by the margin of their classification.

  Args:
    found: Result of `Setting.parts`, [N] each.
    through: Images that withstand the published attack, bool [N].
    fixed: Images that withstand the one with statistics fixed, bool [N].

  Returns:
    For each bin of `EDGES` its count and, where it has images, medians of the
    length of the gradient at the logits ("pull") and of the ratios of lengths,
    means of cosine and agreement with the direct part, and the share that the
    attack with statistics fixed fools and the published one does not
    ("rescued").
  """
  rows = []
  for low, high in itertools.pairwise(EDGES):
    inside = (found["margin"] >= low) & (found["margin"] < high)
    chosen = {name: values[inside] for name, values in found.items()}
    row: dict[str, Any] = {
      "margin": [None if math.isinf(x) else x for x in (low, high)],
      "count": int(inside.sum()),
    }
    if inside.any():
      direct = np.maximum(chosen["direct"], 1e-37)
      row |= {
        "pull": float(np.median(chosen["pull"])),
        "cross_over_direct": float(np.median(chosen["cross"] / direct)),
        "statistics_over_direct": float(
          np.median(chosen["statistics"] / direct)
        ),
        "cosine": float(chosen["cosine"].mean()),
        "agreement": float(chosen["agreement"].mean()),
        "rescued": float((through & ~fixed)[inside].mean()),
      }
    rows.append(row)
  return rows


def _point(
  found: dict[str, np.ndarray],
  steps: int,
  through: np.ndarray,
  fixed: np.ndarray,
) -> Row:
  """Summarises the parts of the gradients after some steps of the attack."""
  from scipy import stats

  fooled = found["margin"] < 0
  ratio = found["cross"] / np.maximum(found["direct"], 1e-37)
  return {
    "steps": steps,
    "bins": binned(found, through, fixed),
    # Ranks, as margins and ratios span orders of magnitude.
    "rank_correlation": float(
      stats.spearmanr(found["margin"], ratio).statistic
    ),
    "fooled": float(fooled.mean()),
    "pull_of_fooled": float(found["pull"][fooled].sum() / found["pull"].sum()),
  }


def _attack_row(attack: str, loss: str, route: str, correct: np.ndarray) -> Row:
  return {
    "attack": attack,
    "loss": loss,
    "route": route,
    "num_examples": len(correct),
    "accuracy": float(correct.mean()),
    "correct": worst_case.pack(correct),
  }


def measure(
  setting: Setting, *, num_rows: int, num_steps: int, points: Sequence[int]
) -> Row:
  """Attacks a network along the parts of its gradients, and measures them.

  Args:
    setting: The network and its images.
    num_rows: Number of images of PGD along own terms; 0: it does not run.
    num_steps: Number of steps of PGD.
    points: Steps of the published attack before gradients are taken apart.

  Returns:
    "attacks", a list of accuracies in [0, 1] with the images that were
    classified correctly, and "points", gradients by margin.
  """
  count = len(setting.labels)
  pgd = f"pgd{num_steps}"
  clean = setting.parts(setting.images)
  attacks = [
    _attack_row("fgsm", "cross_entropy", "own", clean["own"]),
    _attack_row("fgsm", "cross_entropy", "cross", clean["crossed"]),
  ]
  masks = {}
  for loss, route in ATTACKS:
    for name in ("fgsm", pgd):
      _, correct = setting.attack(name, loss, route, count, num_steps)
      masks[name, loss, route] = correct
      attacks.append(_attack_row(name, loss, route, correct))
  if num_rows:
    kind = "cross_entropy", "own"
    size = min(num_rows, count)
    _, correct = setting.attack(pgd, *kind, size, num_steps)
    attacks.append(_attack_row(pgd, *kind, correct))
  through, fixed = (
    masks[pgd, "cross_entropy", route] for route in ("through", "fixed")
  )
  rows = []
  for steps in points:
    found = clean
    if steps:
      images, _ = setting.attack(pgd, "cross_entropy", "through", count, steps)
      found = setting.parts(images)
    rows.append(_point(found, steps, through, fixed))
  return {
    "num_examples": count,
    **setting.numbers,
    "attacks": attacks,
    "points": rows,
  }


def _rows(args: argparse.Namespace) -> Iterator[Row]:
  from atat_jax import checkpoints, data
  from benchmarks.support import cross_terms

  split = data.load(args.data).test
  size = args.num_examples or len(split.labels)
  images = split.images[:size].astype(np.float32) / 255
  for seed in args.seeds:
    for method in args.methods:
      by_rows = method in args.row_methods and seed in args.row_seeds
      folder = args.runs / f"seed{seed}" / method
      model, variables = checkpoints.restore_model(folder)
      setting = Setting(
        cross_terms.passes(model, variables),
        images,
        split.labels[:size],
        batch_size=args.batch_size,
        seed=0,
        epsilon=args.epsilon,
        step_size=args.step_size,
      )
      yield {
        "name": f"mechanism/{method}/seed{seed}",
        "network": method,
        "training_seed": seed,
        "normalization": model.normalization,
        **measure(
          setting,
          num_rows=args.num_rows if by_rows else 0,
          num_steps=args.num_steps,
          points=args.points,
        ),
      }


def _accuracy(attack: Row, size: int) -> float:
  """Accuracy on the first images."""
  return float(worst_case.unpack(attack)[:size].mean())


def attack_table(rows: Sequence[Row]) -> str:
  """Tabulates accuracies (%), means over the seeds of a network.

  An attack on fewer images has a line of its own, and beside it the first two
  of `ATTACKS` on the same images.
  """
  columns = [
    (network, name)
    for network in dict.fromkeys(row["network"] for row in rows)
    for name in dict.fromkeys(a["attack"] for a in rows[0]["attacks"])
  ]
  lines = [["followed", *(", ".join(column) for column in columns)]]
  sizes = sorted({a["num_examples"] for row in rows for a in row["attacks"]})
  for size, kind in itertools.product(reversed(sizes), (*ATTACKS, *BY_ROWS)):
    accuracies: dict[tuple[str, str], list[float]] = {}
    for row in rows:
      shorter = {
        a["attack"] for a in row["attacks"] if a["num_examples"] == size
      }
      for attack in row["attacks"]:
        is_seen = attack["num_examples"] == size or (
          kind in ATTACKS[:2] and attack["attack"] in shorter
        )
        if (attack["loss"], attack["route"]) == kind and is_seen:
          column = (row["network"], attack["attack"])
          accuracies.setdefault(column, []).append(_accuracy(attack, size))
    if accuracies:
      words = WORDS[" ".join(kind)]
      if size < sizes[-1]:
        words += f", first {size} images"
      cells = (accuracies.get(column) for column in columns)
      lines.append(
        [words, *(controls.mean(found) if found else "-" for found in cells)]
      )
  return tables.markdown(lines)


def _range(margin: Sequence[float | None]) -> str:
  low, high = margin
  if low is None:
    return f"below {high:g}"
  return f"{low:g} to {high:g}" if high is not None else f"above {low:g}"


def bin_table(rows: Sequence[Row], steps: int = 0) -> str:
  """Tabulates gradients by margin; all seeds of a network count as one.

  Args:
    rows: Results of `measure`.
    steps: Steps of the published attack before the gradients.
  """
  lines = [
    [
      "network",
      "margin",
      "images",
      "pull at the logits",
      "cross / direct",
      "own statistics / direct",
      "cosine",
      "equal signs (%)",
      "fooled with statistics fixed only (%)",
    ]
  ]
  for network in dict.fromkeys(row["network"] for row in rows):
    points = [
      point
      for row in rows
      if row["network"] == network
      for point in row["points"]
      if point["steps"] == steps
    ]
    for bins in zip(*(point["bins"] for point in points), strict=True):
      full = [found for found in bins if found["count"]]
      if not full:
        continue
      weights = [found["count"] for found in full]

      def over(name: str, full: Any = full, weights: Any = weights) -> float:
        return float(np.average([f[name] for f in full], weights=weights))

      lines.append(
        [
          network,
          _range(full[0]["margin"]),
          str(sum(weights)),
          f"{over('pull'):.2g}",
          f"{over('cross_over_direct'):.2g}",
          f"{over('statistics_over_direct'):.2g}",
          f"{over('cosine'):.2f}",
          f"{100 * over('agreement'):.0f}",
          f"{100 * over('rescued'):.0f}",
        ]
      )
  return tables.markdown(lines)


def table(rows: Sequence[Row]) -> str:
  """Tabulates results of `measure` in Markdown.

  Accuracies, and below them the parts of the gradients by margin.
  """
  return f"{attack_table(rows)}\n\n{bin_table(rows)}"


def _line(row: Row) -> str:
  found = ", ".join(
    f"{a['attack']} {a['loss']} {a['route']} {100 * a['accuracy']:.1f}"
    for a in row["attacks"]
  )
  return f"{row['name']}: {found}"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add(
    "--runs",
    type=pathlib.Path,
    required=True,
    help="folder of benchmarks.methods, with seed<seed>/<method>",
  )
  methods = ["standard", "atat_released", "atat", "at"]
  add("--methods", nargs="+", default=methods)
  add("--seeds", nargs="+", type=int, default=[0, 1, 2])
  add("--data", default="digits")
  add("--num_examples", type=int, default=0, help="test images; 0: all")
  add("--num_rows", type=whole, default=100)
  add("--row_methods", nargs="+", default=methods[:2])
  add("--row_seeds", nargs="+", type=int, default=[0])
  add("--batch_size", type=whole, default=100)
  add("--epsilon", type=machine.number, default=0.2)
  add("--step_size", type=machine.number, default=0.05)
  add("--num_steps", type=whole, default=20)
  add(
    "--points",
    nargs="+",
    type=int,
    default=[0],
    help="steps of the published attack before gradients are taken apart",
  )
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
