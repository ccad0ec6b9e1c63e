"""Writes a trained network for PyTorch, and its numbers for RobustBench.

  atat-jax export runs/atat --out exported

takes the directory of a finished run, or a file of weights that `interop.load`
reads. It writes `<name>.safetensors`, a Python file with the `torch.nn.Module`
of these weights, and, where there is a `results.json`, RobustBench's
`model_info` and the text of its form for new models.
"""

import argparse
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from atat_jax import checkpoints, interop
from atat_jax.errors import UserError
from atat_jax.export import robustbench
from atat_jax.process import arguments, commands
from atat_jax.runs import files, locations
from atat_jax.typing import Variables

PROGRAM = "python -m atat_jax.export"
_FORM = "new_model.md"

_log = logging.getLogger("atat_jax.export")


class _Source(NamedTuple):
  """A network, and the step of its run; None: it is of a file."""

  model: nn.Module
  variables: Variables
  step: int | None


def _parse(argv: Sequence[str] | None, program: str) -> argparse.Namespace:
  flags = arguments.Parser(
    program,
    "SOURCE --out=DIR [flags]",
    description="Writes a network for PyTorch, and its numbers for RobustBench.",
    example="runs/digits --out=exported",
  )
  add = flags.add_argument
  add("source", metavar="SOURCE", help="directory of a run, or weights")
  add("--out", required=True, help="directory of the files")
  add("--name", help="name of the files; default: the source's")
  add("--which", help="checkpoint: best or last; default: best")
  add("--step", type=int, help="step of a checkpoint that was kept")
  add("--results", help="directory of a results.json; default: the run's")
  add("--network", help="network in the results; default: the student")
  flags.add_weights()
  add(
    "--paper",
    action="append",
    default=[],
    help="FIELD=TEXT that the authors know: name, link, authors, venue,"
    " footnote, checkpoint",
  )
  return flags.parse_args(argv)


def _paper(texts: Sequence[str]) -> dict[str, str]:
  """Returns the fields that the user gives for RobustBench."""
  allowed = (*robustbench.PAPER, "checkpoint")
  found = {}
  for text in texts:
    field, sign, value = text.partition("=")
    if not sign or field not in allowed or not value.strip():
      raise UserError(
        f"--paper: {text!r}; allowed: FIELD=TEXT for {', '.join(allowed)}"
      )
    found[field] = value.strip()
  return found


def _load(path: pathlib.Path, args: argparse.Namespace) -> _Source:
  """Loads the network that the command line names."""
  if (path / files.CHECKPOINTS).is_dir():
    if args.entry or args.field:
      raise UserError(
        f"--entry, --field: given for {path}, a run; allowed: for weights"
      )
    which = "best" if args.which is None else args.which
    step = checkpoints.checkpoint_step(path, step=args.step, which=which)
    model, variables = checkpoints.restore_model(path, step=step)
    _log.info("%s: %s, step %d", path, type(model).__name__, step)
    return _Source(model, variables, step)
  if args.step is not None or args.which is not None:
    raise UserError(
      f"--step, --which: given for {path}, no run; allowed: for the directory of"
      " a run"
    )
  loaded = interop.load(path, entry=args.entry, **dict(args.field))
  _log.info("%s", loaded.told)
  return _Source(loaded.model, loaded.variables, None)


def _write_robustbench(
  out: pathlib.Path,
  name: str,
  results: Mapping[str, Any],
  source: _Source,
  network: str,
  paper: Mapping[str, str],
) -> None:
  """Writes RobustBench's files, and says what is not known."""
  found = robustbench.entry(
    results,
    network=network,
    model=source.model,
    step=source.step,
    paper=paper,
  )
  info = files.write_json(out / found.folder / f"{name}.json", found.info)
  text = robustbench.form(found, paper.get("checkpoint"))
  form = files.write_text(out / _FORM, text)
  sys.stdout.write(f"model_info: {info}\nform:       {form}\n")
  reasons: dict[str, list[str]] = {}
  for field, reason in found.unknown.items():
    reasons.setdefault(reason, []).append(field)
  for reason, fields in reasons.items():
    sys.stdout.write(f"not known:  {', '.join(fields)}: {reason}\n")


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Exports the network that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    UserError: Bad input, one clear line.
  """
  args = _parse(argv, program)
  path = locations.expand("source", args.source)
  out = locations.expand("out", args.out)
  name = args.name
  if name is None:
    name = path.resolve().name if path.is_dir() else path.stem
  if pathlib.PurePath(name).name != name or name[:1] in ("", "."):
    raise UserError(f"--name: {name!r}; allowed: a name without a folder")
  # All that can be refused is read before anything is loaded.
  paper = _paper(args.paper)
  where = path if args.results is None else args.results
  where = locations.expand("results", where)
  results = files.read_results(where) if where.is_dir() else None
  if results is None and args.results is not None:
    raise UserError(f"--results: {where}; allowed: a folder with results.json")
  network = ""
  if results is None and args.network is not None:
    raise UserError(
      f"--network: {args.network!r} without results; allowed: with a results.json"
    )
  if results is not None:
    network = robustbench.network_of(results["rows"], args.network)
  source = _load(path, args)
  saved = interop.save(
    out / f"{name}.safetensors", source.model, source.variables
  )
  sys.stdout.write(f"weights:    {saved.weights}\nmodule:     {saved.module}\n")
  if results is None:
    sys.stdout.write("no results.json, and so nothing for RobustBench\n")
  else:
    _write_robustbench(out, name, results, source, network, paper)
  commands.say_next(f"{saved.module} says how PyTorch loads the weights")
