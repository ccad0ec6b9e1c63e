"""Why cross-entropy through the statistics of a batch is a weak attack.

  python -m benchmarks.methods --workdir=runs/methods --seeds=0,1,2
  python -m benchmarks.mechanism --runs=runs/methods --out=mechanism.json

In the protocol of the paper's released code every network normalises by the
batch of 100 images that it is evaluated on, and the attack differentiates
through the batch's statistics. The gradient of an image then has parts (see
`support.cross_terms`), which are measured here image by image, against the
margin by which the image is classified. Then the same network is attacked along
one part at a time, with losses that differ in one respect.

The parts "own" and "cross" take a backward pass for each image and step, hence
`--num_rows`, the number of images that those attacks see, and `--row_methods` and
`--row_seeds`, the networks that are attacked so.
"""

import argparse
import base64
import functools
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.runs import tables
from benchmarks.support import machine
from benchmarks.support.machine import whole

Row = dict[str, Any]

ATTACKS = (
  ("cross_entropy", "through"),
  ("cross_entropy", "fixed"),
  ("cross_entropy", "own"),
  ("cross_entropy", "cross"),
  ("unit", "through"),
  ("unfooled", "through"),
  ("margin", "through"),
  ("margin", "fixed"),
)
"""Loss and part of the gradient of each attack."""

BY_ROWS = ("own", "cross")
EDGES = (-math.inf, 0.0, 2.0, 4.0, 6.0, 8.0, math.inf)
"""Edges of the bins of margins, true logit less the largest other one."""
POINTS = (0, 10)
"""Steps of the published attack after which gradients are taken apart."""

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
    key: Any, network: Any, images: Any, labels: Any, numbers: Any, **kind: Any
  ) -> Any:
    found = cross_terms.attack(key, network, images, labels, **numbers, **kind)
    return found, network.through(found).argmax(-1) == labels

  def measured(network: Any, images: Any, labels: Any) -> dict[str, Any]:
    logits = network.through(images)
    pull = cross_terms.pull("cross_entropy", logits, labels)
    parts = cross_terms.terms(network, images, pull)
    total = sum(parts)

    def flat(x: Any) -> Any:
      return x.reshape(len(x), -1)

    def cosine(a: Any, b: Any) -> Any:
      return (flat(balls.unit("l2", a)) * flat(balls.unit("l2", b))).sum(-1)

    lengths = {
      name: balls.length("l2", part) for name, part in parts._asdict().items()
    }
    return {
      "margin": -losses.margin(logits, labels),
      "pull": jnp.linalg.norm(pull, axis=-1),
      **lengths,
      "cosine": cosine(total, parts.direct),
      "agreement": (jnp.sign(flat(total)) == jnp.sign(flat(parts.direct))).mean(
        -1
      ),
    }

  return (
    compilation.jit(attacked, static_argnames=("loss", "route")),
    compilation.jit(measured),
  )


def _pack(correct: np.ndarray) -> str:
  return base64.b64encode(np.packbits(correct).tobytes()).decode()


def _unpack(text: str, count: int) -> np.ndarray:
  bits = np.frombuffer(base64.b64decode(text), np.uint8)
  return np.unpackbits(bits, count=count).astype(bool)


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

    attacked, _ = _programs()
    epsilon = self.numbers["epsilon"]
    key = jax.random.key(self.numbers["seed"])
    numbers = {
      "epsilon": epsilon,
      "step_size": epsilon if name == "fgsm" else self.numbers["step_size"],
      "num_steps": 1 if name == "fgsm" else num_steps,
      "random_start": name != "fgsm",
    }

    def run(number: int, images: Any, labels: Any) -> Any:
      start = rng.stream(rng.stream(key, "evaluation", number), "start", 0)
      return attacked(
        start, self.network, images, labels, numbers, loss=loss, route=route
      )

    found: tuple[np.ndarray, np.ndarray] = batches.map_batches(
      run,
      self.images[:num_examples],
      self.labels[:num_examples],
      batch_size=self.numbers["batch_size"],
      mesh=sharding.make_mesh(),
    )
    return found

  def parts(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Measures the parts of the gradients at given images, [N] each."""
    from atat_jax import sharding
    from atat_jax.data import batches

    _, measured = _programs()
    found: dict[str, np.ndarray] = batches.map_batches(
      lambda _, *batch: measured(self.network, *batch),
      images,
      self.labels,
      batch_size=self.numbers["batch_size"],
      mesh=sharding.make_mesh(),
    )
    return found


def binned(
  found: dict[str, np.ndarray], rescued: np.ndarray
) -> list[dict[str, Any]]:
  """Summarises images by the margin of their classification.

  Args:
    found: Result of `Setting.parts`, [N] each.
    rescued: Images that the attack along the direct part fools and the one
      along everything does not, bool [N].

  Returns:
    For each bin of `EDGES` its count and, where it has images, medians of the
    length of the gradient at the logits ("pull") and of the ratios of lengths,
    means of cosine and agreement with the direct part, and the share rescued.
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
        "rescued": float(rescued[inside].mean()),
      }
    rows.append(row)
  return rows


def _points(setting: Setting, rescued: np.ndarray) -> list[Row]:
  """Takes gradients apart along the published attack."""
  from scipy import stats

  rows = []
  for steps in POINTS:
    images = setting.images
    if steps:
      images, _ = setting.attack(
        "pgd", "cross_entropy", "through", len(images), steps
      )
    found = setting.parts(images)
    ratio = found["cross"] / np.maximum(found["direct"], 1e-37)
    rows.append(
      {
        "steps": steps,
        "bins": binned(found, rescued),
        # Ranks, as margins and ratios span orders of magnitude.
        "rank_correlation": float(
          stats.spearmanr(found["margin"], ratio).statistic
        ),
        "fooled": float((found["margin"] < 0).mean()),
        "pull_of_fooled": float(
          found["pull"][found["margin"] < 0].sum() / found["pull"].sum()
        ),
      }
    )
  return rows


def measure(setting: Setting, *, num_rows: int, num_steps: int) -> Row:
  """Attacks a network along the parts of its gradients, and measures them.

  Args:
    setting: The network and its images.
    num_rows: Number of images of the attacks that take a pass for each; 0:
      these attacks do not run.
    num_steps: Number of steps of PGD.

  Returns:
    "attacks", a list of accuracies in [0, 1] with the images that were
    classified correctly, and "points", gradients by margin.
  """
  count = len(setting.labels)
  attacks, masks = [], {}
  for name in ("fgsm", "pgd"):
    for loss, route in ATTACKS:
      size = min(count, num_rows) if route in BY_ROWS else count
      if not size:
        continue
      _, correct = setting.attack(name, loss, route, size, num_steps)
      masks[name, loss, route] = correct
      attacks.append(
        {
          "attack": name if name == "fgsm" else f"pgd{num_steps}",
          "loss": loss,
          "route": route,
          "num_examples": size,
          "accuracy": float(correct.mean()),
          "correct": _pack(correct),
        }
      )
  through, fixed = (
    masks["pgd", "cross_entropy", route] for route in ("through", "fixed")
  )
  return {
    "num_examples": count,
    **setting.numbers,
    "attacks": attacks,
    "points": _points(setting, through & ~fixed),
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
        ),
      }


def _mean(values: Sequence[float], scale: float = 100) -> str:
  values = [scale * value for value in values]
  text = f"{statistics.mean(values):.1f}"
  if len(values) > 1:
    text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"
  return text


def _accuracy(attack: Row, size: int) -> float:
  """Accuracy on the first images."""
  correct = _unpack(attack["correct"], attack["num_examples"])
  return float(correct[:size].mean())


def _with_rows(rows: Sequence[Row]) -> list[Row]:
  """Chooses the networks that were attacked by a pass for each image."""
  return [
    row for row in rows if any(a["route"] in BY_ROWS for a in row["attacks"])
  ]


def attack_table(rows: Sequence[Row]) -> str:
  """Tabulates accuracies (%), means over the seeds of a network.

  Each row counts on the images that all its attacks have seen.
  """
  columns = [
    (network, name)
    for network in dict.fromkeys(row["network"] for row in rows)
    for name in dict.fromkeys(a["attack"] for a in rows[0]["attacks"])
  ]
  lines = [["followed", *(", ".join(column) for column in columns)]]
  for loss, route in ATTACKS:
    accuracies: dict[tuple[str, str], list[float]] = {}
    for row in rows:
      size = min(attack["num_examples"] for attack in row["attacks"])
      for attack in row["attacks"]:
        if (attack["loss"], attack["route"]) == (loss, route):
          column = (row["network"], attack["attack"])
          accuracies.setdefault(column, []).append(_accuracy(attack, size))
    if accuracies:
      cells = (accuracies.get(column) for column in columns)
      lines.append(
        [
          WORDS[f"{loss} {route}"],
          *(_mean(found) if found else "-" for found in cells),
        ]
      )
  return tables.markdown(lines)


def _without_rows(row: Row) -> Row:
  kept = [a for a in row["attacks"] if a["route"] not in BY_ROWS]
  return row | {"attacks": kept}


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
      "survive only as published (%)",
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

  All networks on all images; those that were also attacked along "own" and
  "cross", on the images of these attacks; the parts of the gradients by margin.
  """
  parts = [attack_table([_without_rows(row) for row in rows])]
  if _with_rows(rows):
    parts.append(attack_table(_with_rows(rows)))
  return "\n\n".join([*parts, bin_table(rows)])


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
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
