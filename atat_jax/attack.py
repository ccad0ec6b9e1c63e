"""Attacks a network that is there already, and says how robust it is.

  python -m atat_jax.attack weights.pth --data cifar10 --epsilon 8/255 --out runs/mine

takes PyTorch weights (docs/networks.md lists the layouts), the directory of a
finished run, or `module:function`, a Python function without arguments that
returns a classifier. An interrupted command goes on; another one adds rows.
"""

from atat_jax.process import commands

if __name__ == "__main__":
  commands.begin("stopped; the same command goes on from here")

import argparse
import dataclasses
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from atat_jax import (
  checkpoints,
  checks,
  data,
  evaluation,
  interop,
  models,
  report,
  runtime,
)
from atat_jax.data import npz
from atat_jax.data.base import Split, in_memory
from atat_jax.errors import UserError
from atat_jax.evaluation import corrupted
from atat_jax.process import arguments, flag_values
from atat_jax.runs import configuration, files, locations, lock
from atat_jax.typing import Classifier

_ATTACKS = "pgd20,pgd20-margin,autoattack-fast"

_log = logging.getLogger("atat_jax.attack")  # also as a program


@dataclasses.dataclass(frozen=True)
class Images:
  """Images that a network is attacked on.

  Attributes:
    name: Name of the data.
    test: Images uint8 [N, H, W, C] and labels int32 [N].
  """

  name: str
  test: Split


# --- What is attacked ---------------------------------------------------------


def load_images(
  name: str,
  *,
  data_dir: str | None = None,
  size: int = 0,
  num_examples: int = 0,
) -> Images:
  """Loads the test images of a data set.

  Args:
    name: Name in `data.DATASETS`; the path of a `.npz`, of which test_images
      and test_labels are enough; or a folder with test/<class>/* in it.
    data_dir: Place of the data, see `data.load`.
    size: Side of pictures in a folder, see `data.load`.
    num_examples: Number of images, from the first on; 0: all.

  Returns:
    The images.

  Raises:
    UserError: No such data, or damaged ones.
  """
  checks.instance("data", name, str, "a data set, an .npz, or a folder")
  checks.integer("num_examples", num_examples, 0)
  path = pathlib.Path(name)
  if data_dir is None and path.suffix == ".npz":
    found, test = f"npz:{path.stem}", npz.read_test(name)
  else:
    if data_dir is None and path.is_dir():
      name, data_dir = "folder", name
    loaded = data.load(name, data_dir=data_dir, validation_size=1, size=size)
    found, test = loaded.spec.name, in_memory(loaded.test)
  count = num_examples or len(test.labels)
  if count > len(test.labels):
    raise UserError(
      f"num_examples: {count}; allowed: at most {len(test.labels)}, the images"
      f" of {found}"
    )
  return Images(found, test.first(count))


def load_classifier(
  source: str,
  images: Images,
  *,
  entry: str | None = None,
  fields: dict[str, Any] | None = None,
) -> Classifier:
  """Loads the network that a command names.

  What it is goes to the log: layout, normalisation and clean accuracy of
  weights, the checkpoint of a run.

  Args:
    source: File of PyTorch weights, directory of a run, or `module:function`.
    images: Images of the attack, on which weights are checked.
    entry: Entry of the file to take, see `interop.read_state_dict`.
    fields: Fields of the network that the file does not show.

  Returns:
    The classifier, with running statistics.

  Raises:
    UserError: Nothing of these, or weights that classify at chance.
  """
  checks.instance("source", source, str, "a file, a directory, module:function")
  path = locations.expand("source", source)
  if path.is_dir():
    model, variables = checkpoints.restore_model(path)
    step = checkpoints.checkpoint_step(path)
    _log.info("%s: %s, step %d", path, type(model).__name__, step)
    return models.classifier(model, variables)
  module, colon, name = source.partition(":")
  if not path.exists() and colon and name.isidentifier():
    return _call(module, name)
  loaded = interop.load(
    path,
    images=images.test.images,
    labels=images.test.labels,
    entry=entry,
    **(fields or {}),
  )
  _log.info("%s", loaded.told)
  return loaded.classifier


def _call(module: str, name: str) -> Classifier:
  """Calls a user's function that makes a classifier."""
  where = f"source: '{module}:{name}'"
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # as python -m has it
  try:
    make = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise UserError(f"{where}; {error}") from None
  if not callable(make):
    raise UserError(f"{where} is no function")
  classifier = make()
  if not callable(classifier):
    raise UserError(
      f"{where} returned {type(classifier).__name__}; allowed: a classifier,"
      " images [B, H, W, C] to logits [B, K]"
    )
  return classifier


# --- The command --------------------------------------------------------------


PROGRAM = "python -m atat_jax.attack"


def _parse(argv: Sequence[str] | None, program: str) -> argparse.Namespace:
  flags = arguments.Parser(
    program,
    "SOURCE --out=DIR [flags]",
    description="Accuracy of a trained network, clean and under attack.",
    example="runs/digits --out=runs/attacked --num-examples=100",
  )
  add = flags.add_argument
  add(
    "source",
    metavar="SOURCE",
    help="PyTorch weights, a run's directory, or module:function",
  )
  add("--data", help="data set, .npz or folder; default: the run's")
  add("--data-dir", help="place of the data; default: the usual one")
  add("--size", type=int, default=0, help="side of pictures in a folder")
  add("--out", required=True, help="directory of the results")
  add(
    "--attacks",
    default=_ATTACKS,
    help="names of attacks (default: %(default)s)",
  )
  add(
    "--epsilon",
    type=flag_values.number,
    help="radius; default: 8/255, or the run's",
  )
  add("--norm", default="linf", help="linf, l2 or l1 (default: %(default)s)")
  add(
    "--step-size", type=flag_values.number, help="default: a quarter of epsilon"
  )
  add("--num-restarts", type=int, default=1, help="restarts of PGD (1)")
  add("--corruptions", default="", help="generated, or CIFAR-10-C's folder")
  add("--num-examples", type=int, default=0, help="test images; 0: all")
  add("--batch-size", type=int, default=256, help="images at a time (256)")
  add("--seed", type=int, default=0, help="seed of the attacks (0)")
  add(
    "--certify",
    action="store_true",
    help="certify images by linear bounds, too (small networks, linf)",
  )
  flags.add_weights()
  return flags.parse_args(argv)


def _of_run(args: argparse.Namespace) -> tuple[str, str | None, float]:
  """Returns data, their place and epsilon, a run's own where none are given."""
  name, place, epsilon = args.data, args.data_dir, args.epsilon
  path = locations.expand("source", args.source)
  if path.is_dir() and (name is None or epsilon is None):
    found = configuration.read(path)
    if name is None:
      name, place = found.data["name"], place or found.data["data_dir"]
    if epsilon is None:
      epsilon = found.attack["epsilon"]
  if name is None:
    raise UserError(
      f"--data: missing; allowed: {', '.join(data.DATASETS)}, an .npz, a folder"
    )
  return name, place, 8 / 255 if epsilon is None else epsilon


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Attacks the network that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    UserError: Bad input, one clear line.
  """
  args = _parse(argv, program)
  out = locations.expand("out", args.out)
  if (out / files.CONFIG).exists():
    raise UserError(
      f"out: {out} holds a run, whose results would be mixed with these;"
      " allowed: another directory"
    )
  name, place, epsilon = _of_run(args)
  checks.integer("seed", args.seed, 0)
  numbers = {
    "norm": args.norm,
    "epsilon": epsilon,
    "step_size": epsilon / 4 if args.step_size is None else args.step_size,
    "num_restarts": args.num_restarts,
  }
  evaluation.parse_list(args.attacks, **numbers)  # before anything is loaded
  corrupted.check_name(args.corruptions)
  if args.certify and args.norm != "linf":
    raise UserError(f"--certify: with norm {args.norm!r}; allowed: linf")
  images = load_images(
    name, data_dir=place, size=args.size, num_examples=args.num_examples
  )
  classifier = load_classifier(
    args.source, images, entry=args.entry, fields=dict(args.field)
  )
  with lock.directory("out", out):
    rows = evaluation.benchmark(
      jax.random.key(args.seed),
      classifier,
      images.test.images,
      images.test.labels,
      **numbers,
      attacks=args.attacks,
      corruptions=args.corruptions,
      batch_size=args.batch_size,
      name=pathlib.Path(args.source).stem.rpartition(":")[2],
      dataset=images.name,
      out=out,
      certify=args.certify,
    )
    page = report.write_report(out)
  sys.stdout.write(f"\n{rows.table()}\n")
  sys.stdout.write(f"results: {out / files.RESULTS}\nreport:  {page}\n")
  commands.say_next(f"open {page}; its warnings say what to doubt")


if __name__ == "__main__":
  with runtime.plain_exits(
    kept="the same command goes on from what is written"
  ):
    runtime.set_up(distributed=False)
    main()
