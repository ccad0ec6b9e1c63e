"""Explains any networks in pictures: attention, landscapes, attacks, one page.

  python -m atat_jax.explain runs/standard runs/atat --out explained

explains the networks of finished runs on their test images, and

  python -m atat_jax.explain --model resnet50 --weights resnet50.pth \\
    --images cat.jpg cup.jpg --labels 281 504 --out explained

networks with weights from PyTorch on photographs, or with --data cifar10 on the
test images of a data set; --model can be left out, as the files show it. Arrays
that are there already for the same networks, images and numbers are not computed
again.
"""

from atat_jax.process import commands

if __name__ == "__main__":
  commands.begin("stopped; the same command goes on from here")

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from atat_jax import (
  analyses,
  checkpoints,
  checks,
  data,
  evaluation,
  interop,
  models,
  runtime,
  sharding,
)
from atat_jax.data.base import first_images, in_memory
from atat_jax.data.photographs import read_photograph
from atat_jax.errors import UserError
from atat_jax.evaluation.networks import Networks
from atat_jax.process import arguments, flag_values
from atat_jax.report import page
from atat_jax.runs import (
  configuration,
  files,
  locations,
  lock,
  provenance,
  roles,
)
from atat_jax.untrusted import regular

# Photographs are few: nothing is averaged over them unless it is asked for.
_OF_FEW = "attention,rounds,landscape"
# For photographs; Fig. 3 of the paper has epsilon 16/255.
_PHOTOGRAPHS = {"epsilon": 16 / 255, "step_size": 2 / 255, "norm": "linf"}
_DATA = {"epsilon": 8 / 255, "step_size": 2 / 255, "norm": "linf"}
_ATTACK = tuple(_PHOTOGRAPHS)
_LARGE = 100  # photographs this small are resized and not cropped

# As a command this module is called __main__.
_log = logging.getLogger("atat_jax.explain")


@dataclasses.dataclass(frozen=True)
class Subject:
  """Networks and the images on which they are explained.

  Attributes:
    what: The images in words, e.g. "digits test images".
    networks: Name to (module, variables).
    images: [N, H, W, C], uint8 or float32 in [0, 1].
    labels: int32 [N].
    class_names: Names of the classes.
    rows: Rows of the networks' own `results.json`, `model` being the name.
  """

  what: str
  networks: Networks
  images: np.ndarray
  labels: np.ndarray
  class_names: Sequence[str]
  rows: list[dict[str, Any]]


# --- Finished runs -----------------------------------------------------------


def run_names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """Returns the names of the networks of some runs.

  A run is named by as much of its path's end as tells it from the others: "at",
  "seed0-at". Its teacher is "atat (teacher)", and where both are there it is
  "atat (student)".

  Args:
    workdirs: Directories of runs, or `<workdir>/teacher`.

  Raises:
    UserError: A directory is given twice.
  """
  checks.sequence("runs", workdirs, "directories")
  paths = [locations.find("runs", path) for path in workdirs]
  paths = [locations.resolved(path) for path in paths]
  if len(set(paths)) < len(paths):
    raise UserError(
      f"runs: {' '.join(map(str, workdirs))}; allowed: each directory once"
    )
  runs = [_run_of(path) for path in paths]
  short = _short_names(list(dict.fromkeys(runs)))
  names = []
  for path, run in zip(paths, runs, strict=True):
    if path != run:
      names.append(f"{short[run]} ({roles.TEACHER})")
    elif runs.count(run) > 1:
      names.append(f"{short[run]} ({roles.STUDENT})")
    else:
      names.append(short[run])
  return names


def _run_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the run whose teacher is in a directory; otherwise the directory."""
  has_run = path.name == roles.TEACHER and not (path / files.CONFIG).exists()
  return path.parent if has_run else path


def _short_names(runs: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
  """Returns as much of each path's end as tells it from the others."""
  for length in range(1, max(len(run.parts) for run in runs) + 1):
    names = ["-".join(run.parts[-length:]) for run in runs]
    if len(set(names)) == len(names):
      break
  return dict(zip(runs, names, strict=True))


def _agreed(
  workdirs: Sequence[pathlib.Path], values: Sequence[Any], field: str
) -> Any:
  if any(value != values[0] for value in values):
    found = ", ".join(
      f"{value!r} in {path}"
      for path, value in zip(workdirs, values, strict=True)
    )
    raise UserError(f"{field}: {found}; allowed: the same for all runs")
  return values[0]


def attack_of_runs(
  workdirs: Sequence[pathlib.Path], given: dict[str, Any]
) -> dict[str, Any]:
  """Returns the attack with which all runs are evaluated.

  Args:
    workdirs: Directories of the runs.
    given: epsilon, step_size and norm; None where the runs are to say it.

  Returns:
    The same without None.

  Raises:
    UserError: No run, runs of different data sets or attacks.
  """
  checks.sequence("runs", workdirs, "directories")
  checks.instance("given", given, dict, "numbers of the attack by name")
  configs = [configuration.read(path) for path in workdirs]
  _agreed(workdirs, [config.data["name"] for config in configs], "data.name")
  return {
    field: value
    if value is not None
    else _agreed(
      workdirs,
      [config.attack[field] for config in configs],
      f"evaluation.{field}",
    )
    for field, value in given.items()
  }


def load_runs(
  workdirs: Sequence[pathlib.Path], data_dir: str | None = None
) -> Subject:
  """Returns the best networks of finished runs, and their test images.

  Args:
    workdirs: Directories of the runs, or `<workdir>/teacher`.
    data_dir: Directory of the data; None: the first run's.

  Returns:
    The networks by the names of `run_names`.

  Raises:
    UserError: A run without checkpoints, data that are not there.
  """
  names = run_names(workdirs)
  for path in workdirs:
    checkpoints.checkpoint_step(path)  # before data are loaded
  run = configuration.read(workdirs[0])
  arguments = run.data
  if data_dir is not None:
    arguments["data_dir"] = data_dir
  # A data set that stays on the disk shows its first images.
  streaming = data.Streaming() if run.streams else None
  dataset = data.load(**arguments, streaming=streaming)
  test = first_images(dataset.test, data.Streaming.shard_size)
  rows = []
  for name, path in zip(names, workdirs, strict=True):
    own = (files.read_results(path) or {"rows": []})["rows"]
    rows += [
      {**row, "model": name} for row in own if row["model"] != roles.TEACHER
    ]
  return Subject(
    what=f"{dataset.spec.name} test images",
    networks={
      name: checkpoints.restore_model(path)
      for name, path in zip(names, workdirs, strict=True)
    },
    images=test.images,
    labels=test.labels,
    class_names=dataset.spec.class_names,
    rows=rows,
  )


# --- Weights from PyTorch, photographs ---------------------------------------


def load_photographs(
  names: Sequence[str],
  weights: Sequence[str],
  photographs: Sequence[str],
  labels: Sequence[int],
  *,
  num_classes: int | None = None,
  class_names: str | None = None,
  entry: str | None = None,
  fields: Mapping[str, Any] | None = None,
) -> Subject:
  """Returns networks with weights from PyTorch, and photographs for them.

  What was recognised in each file is written to the log.

  Args:
    names: Names of `models.MODELS`, each once; empty: those of the files.
    weights: A file for each, see `interop.load`.
    photographs: Files that Pillow can read.
    labels: The true class of each.
    num_classes: Number of classes of all the networks; None: the files'.
    class_names: A text file with a class name a line; None: numbers.
    entry: Entry of the files to take; None: see `interop.read_state_dict`.
    fields: Fields of the networks that the files do not show.

  Returns:
    The networks by their names.

  Raises:
    UserError: Names, files or labels that do not fit, by name.
  """
  checks.sequence("photographs", photographs, "files")
  paths = [locations.expand("images", path) for path in photographs]
  given = _named(names, weights)
  _check_labels(labels, len(photographs))
  classes = None if class_names is None else _read_class_names(class_names)
  known = _fields(fields)
  if num_classes is not None:
    checks.positive("num_classes", num_classes, integer=True)
    known["num_classes"] = num_classes
    _check_classes(labels, num_classes)
    _check_class_names(classes, num_classes)
  loaded = {
    name: _recognized(name, path, entry=entry, **known)
    for name, path in given.items()
  }
  models_: list[Any] = [network.model for network in loaded.values()]
  (count,) = _only("num_classes", {model.num_classes for model in models_})
  (side,) = _only("images", {x.image_side for x in loaded.values()})
  _check_classes(labels, count)
  _check_class_names(classes, count)
  return Subject(
    what="photographs",
    networks=_networks(loaded),
    images=_photographs(paths, side),
    labels=np.array(labels, np.int32),
    class_names=classes or [f"class {number}" for number in range(count)],
    rows=[],
  )


def load_weights(
  names: Sequence[str],
  weights: Sequence[str],
  dataset: str,
  *,
  data_dir: str | None = None,
  entry: str | None = None,
  fields: Mapping[str, Any] | None = None,
) -> Subject:
  """Returns networks with weights from PyTorch, and test images of a data set.

  Their clean accuracy is measured on some of the images (`interop.sanity`) and
  written to the log.

  Args:
    names: Names of `models.MODELS`, each once; empty: those of the files.
    weights: A file for each, see `interop.load`.
    dataset: Name in `data.DATASETS`.
    data_dir: Directory of the data; None: see `data.load`.
    entry: Entry of the files to take; None: see `interop.read_state_dict`.
    fields: Fields of the networks that the files do not show.

  Returns:
    The networks by their names.

  Raises:
    UserError: Names or files that do not fit, data that are not there, weights
      that classify at chance.
  """
  given = _named(names, weights)
  known = _fields(fields)
  if entry is not None:
    checks.instance("entry", entry, str, "the name of an entry of the files")
  found = data.load(dataset, data_dir=data_dir, validation_size=1)
  images, labels = in_memory(found.test)
  known["num_classes"] = found.spec.num_classes
  loaded = {
    name: _recognized(
      name, path, entry=entry, images=images, labels=labels, **known
    )
    for name, path in given.items()
  }
  return Subject(
    what=f"{found.spec.name} test images",
    networks=_networks(loaded),
    images=images,
    labels=labels,
    class_names=found.spec.class_names,
    rows=[],
  )


def _fields(fields: Mapping[str, Any] | None) -> dict[str, Any]:
  if fields is not None:
    checks.instance("fields", fields, Mapping, "values of fields by name")
  return dict(fields or {})


def _named(names: Sequence[str], weights: Sequence[str]) -> dict[str, str]:
  """Returns the file of each network; a file without a name has its own."""
  names = checks.names("model", names, empty=True)
  for name in names:
    checks.choice("model", name, models.MODELS)
  if len(set(names)) < len(names):
    raise UserError(f"model: {' '.join(names)!r}; allowed: each network once")
  checks.sequence("weights", weights, "files", empty=bool(names))
  if names and len(weights) != len(names):
    raise UserError(
      f"weights: {len(weights)}; allowed: {len(names)}, one for each network"
    )
  paths = [locations.expand("weights", path) for path in weights]
  given = dict(zip(names or map(str, paths), paths, strict=True))
  if len(given) < len(paths):
    raise UserError(
      f"weights: {' '.join(map(str, paths))}; allowed: each file once"
    )
  return {name: str(path) for name, path in given.items()}


def _recognized(name: str, path: str, **arguments: Any) -> interop.Loaded:
  """Loads weights, says what they are, and checks the name if one was given."""
  loaded = interop.load(path, **arguments)
  if name != path and name != loaded.name:
    raise UserError(
      f"model: {name!r}; allowed: {loaded.name!r}, as {loaded.told}"
    )
  _log.info("%s", loaded.told)
  return loaded


def _networks(loaded: Mapping[str, interop.Loaded]) -> Networks:
  """Returns networks by short names: their own, or those of the files."""
  own = [network.name for network in loaded.values()]
  if len(set(own)) < len(own):
    paths = list(map(pathlib.Path, loaded))
    short = _short_names(paths)
    own = [short[path] for path in paths]
  return {
    name: (network.model, network.variables)
    for name, network in zip(own, loaded.values(), strict=True)
  }


def _only(field: str, found: set[int]) -> set[int]:
  """Checks that all networks of a command agree in a number."""
  if len(found) > 1:
    numbers = ", ".join(map(str, sorted(found)))
    raise UserError(
      f"{field}: {numbers} in the files; allowed: networks that agree"
    )
  return found


def _photographs(paths: Sequence[pathlib.Path], side: int) -> np.ndarray:
  """Reads photographs as squares of so many pixels a side."""
  resize = side if side < _LARGE else round(side * 8 / 7)
  return np.stack(
    [read_photograph(path, resize=resize, crop=side) for path in paths]
  )


def _check_labels(labels: Sequence[int], number: int) -> None:
  """Checks that there is a label, an integer >= 0, for each photograph."""
  if len(checks.sequence("labels", labels, empty=True)) != number:
    raise UserError(
      f"labels: {len(labels)}; allowed: {number}, one for each photograph"
    )
  for label in labels:
    checks.integer("labels", label, 0)


def _check_classes(labels: Sequence[int], num_classes: int) -> None:
  for label in labels:
    if label >= num_classes:
      raise UserError(f"labels: {label}; allowed: 0 to {num_classes - 1}")


def _read_class_names(path: str) -> list[str]:
  try:
    return regular.read_text(locations.expand("class_names", path)).splitlines()
  except OSError as error:
    raise UserError(f"class_names: {path}: {error}") from None


def _check_class_names(names: list[str] | None, num_classes: int) -> None:
  if names is not None and len(names) != num_classes:
    raise UserError(
      f"class_names: {len(names)} lines; allowed: {num_classes}, one for each"
      " class"
    )


# --- The page ----------------------------------------------------------------


def explain(
  subject: Subject,
  settings: analyses.FigureSettings,
  out: pathlib.Path,
  *,
  command: str = "",
) -> pathlib.Path:
  """Computes, draws and writes the page.

  Args:
    subject: Networks and images.
    settings: Which analyses, with which numbers.
    out: Directory for everything.
    command: Command line that the page shows.

  Returns:
    Path of `explain.html`.

  Raises:
    UserError: An index beyond the images, an argument that an analysis refuses.
  """
  checks.instance("subject", subject, Subject, "see load_runs")
  checks.instance(
    "settings", settings, analyses.FigureSettings, "FigureSettings"
  )
  checks.instance("command", command, str, "a text")
  out = locations.expand("out", out)
  mesh = sharding.make_mesh()
  # Where the figures look for AutoAttack's accuracies.
  results = {"format": 1, "rows": subject.rows}
  files.write_json(out / files.RESULTS, results, sealed=True)
  paths = analyses.write(
    out,
    {
      name: (model, sharding.put_replicated(mesh, variables))
      for name, (model, variables) in subject.networks.items()
    },
    subject.images,
    subject.labels,
    settings=settings,
    class_names=subject.class_names,
    mesh=mesh,
  )
  # Files of earlier commands may be in the directory, too.
  sections = analyses.sections(out, out / files.FIGURES, only=settings.analyses)
  names = ", ".join(subject.networks)
  text = page.render(
    "explain.html.j2",
    title=f"{names} explained",
    subject=subject.what,
    sections=sections,
    command=command,
    facts={
      **provenance.facts(
        provenance.record([device.device_kind for device in jax.devices()])
      ),
      "Files": ", ".join(path.name for path in paths),
    },
  )
  return files.write_text(out / files.EXPLANATION, text)


# --- The command -------------------------------------------------------------


PROGRAM = "python -m atat_jax.explain"


def _parse(argv: Sequence[str] | None, program: str) -> argparse.Namespace:
  flags = arguments.Parser(
    program,
    "[RUN ...] [--weights FILE ...] [flags]",
    description="Pictures of any networks: attention under attack, its shift,"
    " loss landscapes,\ncurvature, accuracy against steps and epsilon.",
    example="runs/digits/teacher runs/digits --out=explained",
  )
  _add_subject(flags)
  _add_numbers(flags)
  args = flags.parse_args(argv)
  if bool(args.runs) == bool(args.model or args.weights):
    flags.error("name runs, or networks by --weights")
  args.runs = [locations.find("runs", path) for path in args.runs]
  args.out = locations.expand("out", args.out)
  return args


def _add_subject(flags: argparse.ArgumentParser) -> None:
  add = flags.add_argument
  add("runs", nargs="*", help="directories of finished runs")
  add(
    "--out",
    default="explained",
    help="directory for arrays, figures and page (%(default)s)",
  )
  add("--data-dir", help="directory of the data; default: the first run's")
  add("--weights", nargs="+", default=[], help="files of PyTorch weights")
  add(
    "--model",
    nargs="+",
    default=[],
    help="networks that the files must be of; default: as they show",
  )
  add("--entry", help="entry of the files to take, such as model_ema")
  add(
    "--field",
    nargs="+",
    default=[],
    type=flag_values.assignment,
    metavar="NAME=VALUE",
    help="fields of the network that a file does not show",
  )
  add(
    "--data",
    help=f"its test images are explained: {', '.join(data.DATASETS)}",
  )
  add("--images", nargs="+", default=[], help="photographs")
  add(
    "--labels",
    nargs="+",
    type=int,
    default=[],
    help="the true class of each photograph",
  )
  add(
    "--num-classes",
    type=int,
    help="number of classes; default: as the weights have",
  )
  add("--class-names", help="text file with one class name a line")
  add(
    "--figures",
    help=f"{','.join(analyses.ANALYSES)}; default: all, for photographs"
    f" {_OF_FEW}",
  )


def _add_numbers(flags: argparse.ArgumentParser) -> None:
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(analyses.FigureSettings)
  }
  add = flags.add_argument
  attack = "default: as the runs have it; photographs:"
  add(
    "--epsilon",
    type=flag_values.number,
    help=f"radius, as in 8/255; {attack} 16/255, --data: 8/255",
  )
  add(
    "--step-size",
    type=flag_values.number,
    help=f"length of a step; {attack} 2/255",
  )
  add("--norm", help=f"linf, l2, l1; {attack} linf")
  add(
    "--attack",
    default="pgd20",
    help="attack of the attention maps (%(default)s)",
  )
  for name, kind, text in (
    ("num_images", int, "attention: number of images"),
    ("num_followed", int, "rounds: number of images"),
    (
      "num_examples",
      int,
      "images of shift, curvature, steps, epsilons",
    ),
    ("num_points", int, "landscape: points a side"),
    ("num_steps", int, "steps: steps of the longest attack"),
    ("batch_size", int, "images at a time"),
    ("seed", int, "seed of all random numbers"),
  ):
    add(
      f"--{name.replace('_', '-')}",
      type=kind,
      default=defaults[name],
      help=f"{text} (%(default)s)",
    )
  for name, number, text in (
    ("rounds", int, "rounds, shift: rounds of the attack (2 8 16)"),
    ("indices", int, "landscape: numbers of the images (0 1)"),
    (
      "epsilons",
      flag_values.number,
      "epsilons: radii; default: around --epsilon",
    ),
  ):
    add(f"--{name}", nargs="+", type=number, help=text)


def _settings(args: argparse.Namespace) -> analyses.FigureSettings:
  attack = {field: getattr(args, field) for field in _ATTACK}
  if args.runs:
    attack = attack_of_runs(args.runs, attack)
  else:
    given = {k: v for k, v in attack.items() if v is not None}
    attack = (_DATA if args.data else _PHOTOGRAPHS) | given
  many = args.runs or args.data
  every = ",".join(analyses.ANALYSES) if many else _OF_FEW
  optional = {
    "indices": tuple(range(min(2, len(args.images) or 2))),
    "rounds": analyses.FigureSettings.rounds,
    "epsilons": (),
  }
  several: dict[str, Any] = {
    name: tuple(getattr(args, name) or default)
    for name, default in optional.items()
  }
  return analyses.FigureSettings(
    analyses=analyses.parse(args.figures or every),
    attack=evaluation.parse(args.attack, **attack),
    **attack,
    **several,
    num_images=args.num_images,
    num_followed=args.num_followed,
    num_examples=args.num_examples,
    num_points=args.num_points,
    num_steps=args.num_steps,
    batch_size=args.batch_size,
    seed=args.seed,
  )


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Explains what the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help and the page.

  Raises:
    UserError: Bad input, one clear line.
  """
  args = _parse(argv, program)
  if (args.out / files.CONFIG).exists():
    raise UserError(
      f"out: {args.out} holds a run, whose results.json would be replaced;"
      " allowed: another directory"
    )
  settings = _settings(args)
  if args.runs:
    subject = load_runs(args.runs, args.data_dir)
  elif args.data:
    subject = load_weights(
      args.model,
      args.weights,
      args.data,
      data_dir=args.data_dir,
      entry=args.entry,
      fields=dict(args.field),
    )
  else:
    subject = load_photographs(
      args.model,
      args.weights,
      args.images,
      args.labels,
      num_classes=args.num_classes,
      class_names=args.class_names,
      entry=args.entry,
      fields=dict(args.field),
    )
  analyses.check_images(settings, len(subject.labels))
  words = sys.argv[1:] if argv is None else argv
  command = provenance.join([*program.split(), *words])
  with lock.directory("out", args.out):
    path = explain(subject, settings, args.out, command=command)
  sys.stdout.write(
    f"arrays:  {args.out}\nfigures: {args.out / 'figures'}\npage:    {path}\n"
  )
  commands.say_next(f"open {path}")


if __name__ == "__main__":
  with runtime.plain_exits(
    kept="the same command goes on from what is written"
  ):
    runtime.set_up(distributed=False)
    main()
