"""Trains and evaluates every method with several seeds, and compares them.

  python benchmarks/methods.py --workdir=runs/methods --seeds=0,1,2

One process, so that a program is compiled once for all seeds. Killed or
stopped, the same command goes on where it was; what is finished is skipped.
The runs are in <workdir>/seed<seed>/<method>, each as `main.py` would leave it
(`main.py --mode=figures` makes its own report), the comparison is
<workdir>/comparison.{html,md,json}.

The `standard` network of a seed is the teacher of the methods that need one.
AutoAttack runs with running statistics only: it fills its batches anew as
images fall, so that "the statistics of the batch" would mean nothing. By
default it is its first two attacks on the first 240 test images, so that all
ends within 45 minutes on two cores; the same command with
`--running_attacks=autoattack --running_examples=0` adds the whole.
"""

import argparse
import ast
import importlib.util
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from atat_jax import objectives, pipeline, report, runtime
from atat_jax.config import make_plan
from atat_jax.errors import UserError
from atat_jax.report.comparison import METHODS
from atat_jax.runs import files
from atat_jax.runs.files import write_json

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEACHER = "standard"


class Run(NamedTuple):
  """One network to train and evaluate.

  Attributes:
    method: Of `objectives.OBJECTIVES`.
    seed: Of its training.
    workdir: Holds all that it writes.
    configs: Its configuration, once for each evaluation; they differ in
      `evaluation` only.
  """

  method: str
  seed: int
  workdir: pathlib.Path
  configs: tuple[ConfigDict, ...]


def methods_in_order() -> list[str]:
  """All registered methods: the paper's and its peers, then any others."""
  known = [name for name in METHODS if name in objectives.OBJECTIVES]
  return list(dict.fromkeys([*known, *objectives.OBJECTIVES]))


def add_config_flags(flags: argparse.ArgumentParser) -> None:
  """The flags that say what is trained."""
  flags.add_argument(
    "--config", type=pathlib.Path, default=ROOT / "configs/digits.py"
  )
  flags.add_argument(
    "--methods",
    type=lambda text: text.split(","),
    default=methods_in_order(),
    help="standard is always among them; default: all",
  )
  flags.add_argument(
    "--recipe", help="what follows the comma, as in cifar10.py:at,modern"
  )
  flags.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="FIELD=VALUE",
    help="another value of a field of the configuration, for all methods that"
    " have it, e.g. train.num_epochs=1",
  )


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--workdir", type=pathlib.Path, required=True)
  flags.add_argument("--seeds", type=_integers, default=[0, 1, 2])
  add_config_flags(flags)
  flags.add_argument(
    "--attacks",
    default="nominal,fgsm,ifgsm20,pgd20",
    help="with running and with batch statistics",
  )
  flags.add_argument(
    "--running_attacks",
    default="autoattack-fast",
    help="with running statistics only",
  )
  flags.add_argument(
    "--running_examples",
    type=int,
    default=240,
    help="first so many test images for those; 0: all",
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


def load(path: pathlib.Path) -> Any:
  """A configuration file as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.exists():
    raise UserError(f"config: {path}; allowed: a configuration file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _override(config: ConfigDict, assignment: str) -> bool:
  """Sets one field; False where the configuration does not have it."""
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


def make_runs(args: argparse.Namespace) -> list[Run]:
  """The runs, a seed after the other, the teacher of each seed first.

  Raises:
    UserError: An unknown method or field, or a value out of range.
  """
  module = load(args.config)
  methods = list(dict.fromkeys([TEACHER, *args.methods]))
  recipe = [args.recipe] if args.recipe else []
  runs, used = [], set()
  for seed in args.seeds:
    directory = args.workdir / f"seed{seed}"
    for method in methods:
      try:
        config = module.get_config(",".join([method, *recipe]))
      except ValueError as error:
        raise UserError(str(error)) from None
      used |= {text for text in args.set if _override(config, text)}
      config.seed = seed
      config.evaluation.batch_norm = ("running", "batch")
      config.evaluation.attacks = args.attacks
      # The others cost minutes for all runs: `python -m atat_jax.explain`.
      config.figures.analyses = "attention"
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
      runs.append(Run(method, seed, directory / method, tuple(configs)))
  for text in args.set:
    if text not in used:
      raise UserError(
        f"set: {text!r}; allowed: <field of {args.config}>=<value>"
      )
  return runs


def _marker(run: Run) -> pathlib.Path:
  """The file that says with which configurations a run has ended."""
  return run.workdir / "finished.json"


def _as_json(run: Run) -> dict[str, Any]:
  return {"configs": [make_plan(config).record for config in run.configs]}


def is_finished(run: Run) -> bool:
  """Whether the run has ended with the very same configurations."""
  results = run.workdir / "results.json"
  return results.exists() and files.read_json(_marker(run)) == _as_json(run)


def execute(run: Run) -> None:
  """Trains and evaluates what is not done yet."""
  pipeline.run("train", run.configs[0], run.workdir)
  for config in run.configs:
    pipeline.run("evaluate", config, run.workdir)
  write_json(_marker(run), _as_json(run))


def remaining(
  todo: Sequence[Run], seconds: dict[str, list[float]]
) -> float | None:
  """How long the runs will take, in s; None before the first has ended.

  A method that has not run yet is taken for the mean of those that have.
  """
  measured = {name: sum(s) / len(s) for name, s in seconds.items()}
  if not measured:
    return None
  typical = sum(measured.values()) / len(measured)
  return sum(measured.get(run.method, typical) for run in todo)


def _minutes(seconds: float) -> str:
  return f"{seconds / 60:.1f} min"


def main(argv: Sequence[str] | None = None) -> None:
  """Runs everything that is not finished, then writes the comparison."""
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
    execute(run)
    seconds.setdefault(run.method, []).append(time.perf_counter() - start)
  paths = report.write_comparison(
    [run.workdir for run in runs], args.workdir / "comparison"
  )
  total = time.perf_counter() - began
  sys.stderr.write(f"\ndone in {_minutes(total)}\n")
  for path in paths:
    sys.stdout.write(f"comparison: {path}\n")


if __name__ == "__main__":
  runtime.set_up(distributed=False)
  with runtime.plain_exits():
    main()
