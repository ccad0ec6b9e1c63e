"""Robust accuracy of the same weights in float32 and bfloat16, image by image.

  python -m benchmarks.precision --workdir=runs/at --num_examples=1000 \\
    --out=precision.json

Each network is attacked in the precision that it is scored in, from the same
random numbers. The images are the same, so that the difference's standard error is
that of paired answers. The answers of several run directories are pooled, too. On a
CPU the compiler may leave a rounding out, which
XLA_FLAGS=--xla_allow_excess_precision=false forbids.
"""

import argparse
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from atat_jax.runs import tables
from benchmarks.support import machine
from benchmarks.support.machine import number, whole

DTYPES = ("float32", "bfloat16")
ATTACKS = ("nominal", "pgd20", "autoattack-fast")


class Subject(NamedTuple):
  """Trained network and the test images that it is judged on.

  Attributes:
    data: Name of the data set.
    model: The module.
    variables: Parameters and running statistics.
    split: Images and labels, on the devices of `mesh`.
    mesh: The devices.
  """

  data: str
  model: Any
  variables: Any
  split: Any
  mesh: Any

  def correct(
    self, args: argparse.Namespace, attack: str, dtype: str | None = None
  ) -> np.ndarray:
    """Judges the images under an attack; returns bool [N]."""
    import jax

    from atat_jax import evaluation, models

    protocol = evaluation.parse(
      attack, epsilon=args.epsilon, step_size=args.step_size
    )
    model = self.model if dtype is None else self.model.clone(dtype=dtype)
    return evaluation.judge(
      jax.random.key(args.seed),
      models.classifier(model, self.variables),
      self.split,
      protocol=protocol,
      # A batch is filled up, and what fills it is attacked, too.
      batch_size=min(args.batch_size, len(self.split.labels)),
      mesh=self.mesh,
    ).correct


def load(args: argparse.Namespace, workdir: pathlib.Path) -> Subject:
  """Restores the network of a run directory, with its test images."""
  from atat_jax import checkpoints, data, sharding
  from atat_jax.runs import configuration

  folder = workdir.resolve()
  model, variables = checkpoints.restore_model(folder)
  arguments = configuration.read(folder).data
  if args.data_dir:
    arguments["data_dir"] = args.data_dir
  test = data.load(**arguments).test
  mesh = sharding.make_mesh()
  split = sharding.put_replicated(mesh, test.first(args.num_examples))
  return Subject(arguments["name"], model, variables, split, mesh)


def _row(name: str, full: np.ndarray, half: np.ndarray) -> dict[str, Any]:
  return {
    "name": f"{name}/n{len(full)}",
    "num_examples": len(full),
    "float32": float(full.mean()),
    "bfloat16": float(half.mean()),
    "float32_only": int((full & ~half).sum()),
    "bfloat16_only": int((half & ~full).sum()),
  }


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  found: dict[str, list[tuple[np.ndarray, ...]]] = {x: [] for x in args.attacks}
  several = len(args.workdir) > 1
  for workdir in args.workdir:
    subject = load(args, workdir)
    about = {"data": subject.data, "epsilon": args.epsilon}
    network = "/".join(["", *workdir.resolve().parts[-2:]]) if several else ""
    for attack, pairs in found.items():
      pair = tuple(subject.correct(args, attack, dtype) for dtype in DTYPES)
      pairs.append(pair)
      yield _row(f"{attack}{network}", *pair) | about
  if several:
    for attack, pairs in found.items():
      name = f"{attack}/{len(pairs)} networks"
      full, half = map(np.concatenate, zip(*pairs, strict=True))
      yield _row(name, full, half) | about


def paired_error(row: dict[str, Any]) -> float:
  """Returns the standard error of the difference of two accuracies.

  The difference is the mean over the images of 1 where only bfloat16 is right,
  -1 where only float32 is, and 0 elsewhere.
  """
  count = row["num_examples"]
  apart = row["float32_only"] + row["bfloat16_only"]
  mean = (row["bfloat16_only"] - row["float32_only"]) / count
  return math.sqrt(max(apart / count - mean**2, 0.0) / count)


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates accuracies (%) and images that only one side has right."""
  head = ["attack", *DTYPES, "difference", "+-"]
  lines = [[*head, *(f"{x} only" for x in DTYPES)]]
  for row in rows:
    shares = [100 * row[dtype] for dtype in DTYPES]
    lines.append(
      [
        row["name"],
        *(f"{share:.2f}" for share in shares),
        f"{shares[1] - shares[0]:+.2f}",
        f"{100 * paired_error(row):.2f}",
        *(str(row[f"{dtype}_only"]) for dtype in DTYPES),
      ]
    )
  return tables.markdown(lines)


def _line(row: dict[str, Any]) -> str:
  return ", ".join(f"{x}: {row[x]}" for x in ("name", *DTYPES))


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  made.add_argument(
    "--workdir",
    nargs="+",
    type=pathlib.Path,
    required=True,
    help="run directories",
  )
  add_subject_flags(made)
  made.add_argument(
    "--attacks", nargs="+", default=list(ATTACKS), help="names of protocols"
  )
  return made


def add_subject_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that name the images and the attacks' sizes."""
  add = parser.add_argument
  add("--data_dir", help="directory of the data; default: the run's")
  add("--epsilon", type=number, default=8 / 255)
  add("--step_size", type=number, default=2 / 255)
  add("--num_examples", type=whole, default=1000)
  add("--batch_size", type=whole, default=500)
  add("--seed", type=int, default=0)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
