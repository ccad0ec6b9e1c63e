"""Accuracy against the steps of an attack (Fig. 8).

A hundred numbers of steps are one attack of a hundred steps that is watched:
the pass that yields a step's gradient also says who is still right, so every
number of steps costs the longest attack and one more forward pass.

Arrays: `networks` [m], `num_examples`, `chance` (1 / K), `protocol`, `norm`,
`epsilon`, `steps` int [s + 1] from 0, the random start, and for each network
`<name>_clean`, the accuracy without attack,
`<name>_accuracy` float64 [s + 1] at each iterate,
`<name>_worst_case` float64 [s + 1], the share of images that no iterate so far
has fooled, and `<name>_correct` bool [s + 1, n], image by image.
"""

import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atat_jax import checks
from atat_jax.analyses import base
from atat_jax.attacks import balls
from atat_jax.drawing import panels, style
from atat_jax.evaluation import rules, sweeps
from atat_jax.evaluation.networks import Networks
from atat_jax.runs import files, tables, wording
from atat_jax.typing import Array

_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def attack_steps(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int = 100,
  norm: str = "linf",
  loss: str = "cross_entropy",
  batch_size: int = 128,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns the accuracy after every step of PGD, in one pass of one attack.

  The iterate after k steps is what `attacks.pgd` with num_steps=k returns, as
  its step size does not depend on k. Batches draw from the keys from which
  `evaluation.accuracy` draws: with its key and batch size, the accuracy after
  20 steps is that of the protocol pgd20.

  Args:
    key: Random key of the starts.
    networks: Name to (module, variables); more in `sweeps.prepare`.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n].
    epsilon: Radius of the ball, in the unit of the pixels. The paper: 8/255.
    step_size: Length of a step, in the same unit. The paper: 2/255.
    num_steps: Number of steps. The paper: 100.
    norm: Norm of the ball: linf, l2 or l1.
    loss: Loss that the attack increases.
    batch_size: Images at a time.
    mesh: The devices.

  Returns:
    The arrays that the module describes, by name.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.key(key)
  checks.choice("norm", norm, balls.BALLS)
  checks.epsilon(epsilon, norm)
  checks.positive("step_size", step_size)
  sweep = sweeps.prepare(
    networks, images, labels, num_steps, loss, batch_size, mesh
  )
  found = sweep.facts() | {
    "protocol": np.array(_describe(norm, epsilon, step_size, loss)),
    "norm": np.array(norm),
    "epsilon": np.array(float(epsilon)),
    "steps": np.arange(num_steps + 1),
  }
  attack: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size}
  attack |= {"num_steps": num_steps, "norm": norm, "loss": loss}
  for name in sweep.classifiers:
    correct = sweep.correct_by_step(name, key, **attack)
    statistics = _statistics(sweep.clean_correct(name), correct)
    found |= {f"{name}_{what}": value for what, value in statistics.items()}
  return found


def _describe(norm: str, epsilon: float, step_size: float, loss: str) -> str:
  numbers = wording.attack(norm=norm, epsilon=epsilon)
  return (
    f"PGD, {numbers}, steps of {wording.pixels(step_size)}, random start,"
    f" {loss} loss; running statistics"
  )


def _statistics(
  clean: np.ndarray, correct: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns one network's arrays, from who is right without attack and at steps."""
  return {
    "clean": np.array(clean.mean()),
    "accuracy": correct.mean(-1),
    "worst_case": np.logical_and.accumulate(correct).mean(-1),
    "correct": correct,
  }


def _autoattack(
  data: files.Arrays, *, same_images: bool = True
) -> dict[str, tables.Row]:
  """Returns AutoAttack's rows of the networks, where a `results.json` has them.

  Args:
    data: Arrays of the sweep.
    same_images: Whether on the images of the sweep only; elsewhere its accuracy
      cannot be compared.
  """
  rows = files.read_autoattack(
    data.path.parent,
    float(data["epsilon"]),
    str(data["norm"]),
    int(data["num_examples"]) if same_images else None,
  )
  names = base.network_names(data)
  return {name: rows[name] for name in names if name in rows}


def _left_out(data: files.Arrays) -> str:
  """Says that AutoAttack is not shown, as it ran on other images; else ""."""
  shown = _autoattack(data)
  counts = [
    row["num_examples"]
    for name, row in _autoattack(data, same_images=False).items()
    if name not in shown
  ]
  if not counts:
    return ""
  numbers = " and ".join(f"{count:,}" for count in dict.fromkeys(counts))
  return (
    f" AutoAttack is left out where it was run on {numbers} images, which are"
    " not these."
  )


def _draw(data: files.Arrays, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a line a network: accuracy at the iterate after each step.

  A thin dotted line of its colour is AutoAttack's accuracy, where a
  `results.json` beside the file has it with the same norm and epsilon, on the
  same images.
  """
  names, steps = base.network_names(data), data["steps"]
  autoattack = _autoattack(data)
  with style.context():
    fig, ax = panels.accuracy_axes(len(names), float(data["chance"]))
    accuracies = {name: 100 * data[f"{name}_accuracy"] for name in names}
    panels.lines(ax, steps, accuracies)
    colors = style.model_colors(names)
    for name, row in autoattack.items():
      ax.axhline(
        100 * row["accuracy"], color=colors[name], linestyle=":", linewidth=1.2
      )
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    ax.set_xlim(0, steps[-1])
    shown = [tick for tick in _TICKS if tick <= steps[-1]]
    panels.ticks(ax, shown, "{:g}".format)
    ax.set_xlabel("steps of PGD (0: the random start)")
    style.legend(fig, ax)
    notes = [f"{data['protocol']}.", panels.sample(int(data["num_examples"]))]
    notes.append(_left_out(data).strip())
    if autoattack:
      # By its own name: a run may have had two of its attacks only.
      attacks = dict.fromkeys(
        f"{row['attack']}, {wording.plural(row['num_examples'], 'image')}"
        for row in autoattack.values()
      )
      notes.append(f"Dotted, in a model's colour: {' / '.join(attacks)}.")
    style.caption(fig, " ".join(filter(None, notes)))
    return [style.save(fig, directory / "attack_steps.png")]


def _find(data: files.Arrays) -> base.Finding:
  names, last = base.network_names(data), int(data["steps"][-1])
  middle = 20 if last > 20 else max(1, last // 2)
  parts, gains = [], []
  for name in names:
    accuracy = data[f"{name}_accuracy"]
    gains.append(float(accuracy[middle] - accuracy[-1]))
    shares = (data[f"{name}_clean"], accuracy[middle], accuracy[-1])
    listed = wording.listed([wording.percent(float(x)) for x in shares])
    parts.append(f"{name} {listed}")
  converged = max(gains) <= rules.CONVERGED + 1e-9  # rounding error
  sentence = (
    f"Accuracy without attack, after {middle} and after"
    f" {wording.plural(last, 'step')}: {'; '.join(parts)}. From {middle} to"
    f" {last} steps it falls by {100 * max(gains):.1f} points at most: PGD had"
    f" {'' if converged else 'not '}converged after"
    f" {wording.plural(middle, 'step')}"
    f"{'' if converged else ', and fewer steps overstate robustness'}."
  )
  caption = (
    "Accuracy at the iterate after each step of one attack; step 0 is its random"
    f" start. {wording.plural(int(data['num_examples']), 'image')},"
    f" {data['protocol']}."
  )
  stronger = [
    f"{name} {wording.percent(row['accuracy'])} ({row['attack']},"
    f" {wording.plural(row['num_examples'], 'image')})"
    for name, row in _autoattack(data).items()
  ]
  if stronger:
    sentence += f" AutoAttack leaves {wording.listed(stronger)}."
    caption += " Dotted lines: AutoAttack."
  caption += _left_out(data)
  return base.Finding("Accuracy against the attack's steps", sentence, caption)


ANALYSIS = base.Analysis(
  stem="attack_steps",
  compute=attack_steps,
  arguments=lambda settings, _: {
    "batch_size": settings.batch_size,
    "num_steps": settings.num_steps,
    **settings.pgd(),
  },
  images=base.first("num_examples"),
  draw=_draw,
  find=_find,
  passes=lambda arguments: 2,  # without attack, and under it
)
