"""Trains and evaluates every method with several seeds, and compares them.

  python benchmarks/methods.py --workdir=runs/methods --seeds=0,1,2

Everything runs in one process, so that a program is compiled once for all seeds.
After an interruption the same command continues; finished runs are skipped. Runs
are in <workdir>/seed<seed>/<method>, as `main.py` would leave them (`main.py
--mode=figures` makes the report of one run), the comparison is in
<workdir>/comparison.{html,md,json}.

The `standard` network of a seed is the teacher of the methods that need one. It is
trained with a seed of its own, as `main.py` trains a teacher, so that a student
that starts afresh shares neither initial weights nor batches with it.

Besides methods, `--methods` takes the named settings of `objectives.SETTINGS`:

  --methods=at,at_from_teacher,atat_mixture,atat_mixture_fresh,atat

AutoAttack runs with running statistics only: it refills its batches as images
are fooled, so that batch statistics would be ill-defined. By default only its
first two attacks run, on the first 240 test images;
`--running_attacks=autoattack --running_examples=0` makes all four attacks on all
images. Several processes may share a workdir if their seeds differ;
`--train_only` leaves the evaluation to the same command without it.
"""

import argparse
import ast
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

if __name__ == "__main__" and not __package__:  # run as a script
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from atat_jax import objectives, pipeline, report, runtime
from atat_jax.config import TEACHER_SEED, make_plan
from atat_jax.errors import UserError
from atat_jax.runs import files
from benchmarks.support import machine
from benchmarks.support.machine import ROOT
from benchmarks.support.networks import load_config

TEACHER = "standard"


class Run(NamedTuple):
  """One network to train and evaluate.

  Attributes:
    method: Name in `objectives.OBJECTIVES` or `objectives.SETTINGS`.
    seed: Seed of the group; the teacher is trained with another one.
    workdir: Directory of everything that the run writes.
    configs: Configuration of each evaluation; they differ in `evaluation` only.
  """

  method: str
  seed: int
  workdir: pathlib.Path
  configs: tuple[ConfigDict, ...]


def add_config_flags(flags: argparse.ArgumentParser) -> None:
  """Adds the flags that choose methods and configuration."""
  flags.add_argument(
    "--config", type=pathlib.Path, default=ROOT / "configs/digits.py"
  )
  flags.add_argument(
    "--methods",
    type=lambda text: text.split(","),
    default=list(objectives.OBJECTIVES),
    help="methods or named settings, separated by commas; standard is always"
    " added; default: all methods",
  )
  flags.add_argument(
    "--recipe", help="recipe after the comma, as in cifar10.py:at,modern"
  )
  flags.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="FIELD=VALUE",
    help="overrides a field of the configuration, for all methods that have it,"
    " such as train.num_epochs=1",
  )


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  flags = machine.parser(__doc__)
  flags.add_argument("--workdir", type=pathlib.Path, required=True)
  flags.add_argument("--seeds", type=_integers, default=[0, 1, 2])
  add_config_flags(flags)
  flags.add_argument(
    "--attacks",
    default="nominal,fgsm,ifgsm20,pgd20,pgd20-margin",
    help="attacks with running and with batch statistics",
  )
  flags.add_argument(
    "--running_attacks",
    default="autoattack-fast",
    help="attacks with running statistics only",
  )
  flags.add_argument(
    "--running_examples",
    type=int,
    default=240,
    help="number of test images for those, the first ones; 0: all",
  )
  flags.add_argument(
    "--train_only", action="store_true", help="train, and evaluate nothing"
  )
  return flags


def _integers(text: str) -> list[int]:
  try:
    numbers = [int(part) for part in text.split(",")]
  except ValueError:
    numbers = []
  if not numbers or len(set(numbers)) < len(numbers):
    raise argparse.ArgumentTypeError(
      f"{text!r}; allowed: different integers, separated by commas"
    )
  return numbers


def _override(config: ConfigDict, assignment: str) -> bool:
  """Sets one field; returns False if the configuration does not have it."""
  field, equals, text = assignment.partition("=")
  *sections, name = field.split(".")
  for section in sections:
    config = config.get(section, ConfigDict())
  if not equals or name not in config:
    return False
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  try:
    config[name] = value
  except TypeError as error:
    raise UserError(f"set: {assignment!r}; {error}") from None
  return True


def _make_run(
  args: argparse.Namespace, module: Any, method: str, seed: int
) -> tuple[Run, set[str]]:
  """Makes one run; also returns the overrides that its configuration has."""
  directory = args.workdir / f"seed{seed}"
  recipe = [args.recipe] if args.recipe else []
  try:
    config = module.get_config(",".join([method, *recipe]))
  except ValueError as error:
    raise UserError(str(error)) from None
  used = {text for text in args.set if _override(config, text)}
  config.seed = seed + TEACHER_SEED if method == TEACHER else seed
  config.evaluation.batch_norm = ("running", "batch")
  config.evaluation.attacks = args.attacks
  config.evaluation.teacher = False  # it is a run of its own
  # The other analyses would take minutes for all runs together.
  config.figures.analyses = "attention,shift"
  config.figures.rounds = (20,)  # the shift under PGD-20
  if make_plan(config).objective.needs_teacher:
    config.teacher_workdir = str(directory / TEACHER)
  configs = [config]
  if args.running_attacks:
    alone = ConfigDict(config.to_dict())
    alone.evaluation.attacks = args.running_attacks
    alone.evaluation.batch_norm = ("running",)
    alone.evaluation.num_examples = args.running_examples
    make_plan(alone)
    configs.insert(0, alone)
  return Run(method, seed, directory / method, tuple(configs)), used


def make_runs(args: argparse.Namespace) -> list[Run]:
  """Makes the runs, ordered by seed, the teacher of each seed first.

  Raises:
    UserError: An unknown method or field, or a value out of range.
  """
  module = load_config(args.config)
  methods = list(dict.fromkeys([TEACHER, *args.methods]))
  runs, used = [], set()
  for seed in args.seeds:
    for method in methods:
      run, fields = _make_run(args, module, method, seed)
      runs.append(run)
      used |= fields
  for text in args.set:
    if text not in used:
      raise UserError(
        f"set: {text!r}; allowed: <field of {args.config}>=<value>"
      )
  return runs


def _marker(run: Run) -> pathlib.Path:
  """Returns the file that holds the configurations of a finished run."""
  return run.workdir / "finished.json"


def _as_json(run: Run) -> dict[str, Any]:
  return {"configs": [make_plan(config).record for config in run.configs]}


def is_finished(run: Run) -> bool:
  """Whether the run has finished with exactly these configurations."""
  results = run.workdir / "results.json"
  return results.exists() and files.read_json(_marker(run)) == _as_json(run)


def execute(run: Run, *, train_only: bool = False) -> None:
  """Trains and evaluates as far as it is not done yet.

  Args:
    run: The run.
    train_only: Whether the evaluation is left out.
  """
  pipeline.run("train", run.configs[0], run.workdir)
  if train_only:
    return
  for config in run.configs:
    pipeline.run("evaluate", config, run.workdir)
  files.write_json(_marker(run), _as_json(run))


def remaining(
  todo: Sequence[Run], seconds: dict[str, list[float]]
) -> float | None:
  """Estimates the seconds that the runs will take; None before any has ended.

  A method that has not run yet counts as the mean of those that have.
  """
  measured = {name: sum(s) / len(s) for name, s in seconds.items()}
  if not measured:
    return None
  typical = sum(measured.values()) / len(measured)
  return sum(measured.get(run.method, typical) for run in todo)


def _minutes(seconds: float) -> str:
  return f"{seconds / 60:.1f} min"


def main(argv: Sequence[str] | None = None) -> None:
  """Makes all unfinished runs, then writes the comparison."""
  args = parser().parse_args(argv)
  runs = make_runs(args)
  todo = [run for run in runs if not is_finished(run)]
  began = time.perf_counter()
  seconds: dict[str, list[float]] = {}
  sys.stderr.write(
    f"{len(runs)} runs, {len(runs) - len(todo)} of them finished already\n"
  )
  for number, run in enumerate(todo):
    left = remaining(todo[number:], seconds)
    sys.stderr.write(
      f"\n=== run {len(runs) - len(todo) + number + 1} of {len(runs)}:"
      f" {run.method}, seed {run.seed};"
      f" {_minutes(time.perf_counter() - began)} so far"
      + (f", about {_minutes(left)} left" if left is not None else "")
      + "\n"
    )
    start = time.perf_counter()
    execute(run, train_only=args.train_only)
    seconds.setdefault(run.method, []).append(time.perf_counter() - start)
  total = time.perf_counter() - began
  sys.stderr.write(f"\ndone in {_minutes(total)}\n")
  if args.train_only:
    return
  paths = report.write_comparison(
    [run.workdir for run in runs], args.workdir / "comparison"
  )
  for path in paths:
    sys.stdout.write(f"comparison: {path}\n")


if __name__ == "__main__":
  runtime.set_up(distributed=False)
  with runtime.plain_exits():
    main()
