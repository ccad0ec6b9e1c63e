"""Recognises PyTorch weights, and makes a checkpoint of them."""

import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atat_jax import attack, checkpoints, interop, metrics, state
from atat_jax.errors import UserError
from atat_jax.process import arguments, commands
from atat_jax.runs import files, locations, lock, wording

PROGRAM = "python -m atat_jax.cli import"


def write(
  loaded: interop.Loaded,
  out: pathlib.Path,
  image_shape: tuple[int, int, int] | None = None,
) -> pathlib.Path:
  """Writes a checkpoint of a network whose weights were loaded.

  `checkpoints.restore_model` reads it as that of a run, so that the directory
  can be attacked, explained, and taken for a teacher (`teacher_workdir`).

  Args:
    loaded: The network, see `interop.load`.
    out: Directory of the checkpoint.
    image_shape: Shape of an image, [H, W, C]; None: the network's usual one.

  Returns:
    Directory of the checkpoints.

  Raises:
    UserError: The directory has checkpoints already, or cannot be written.
  """
  _check_free(out)
  place = out / files.CHECKPOINTS
  side = loaded.image_side
  shape = image_shape or (side, side, loaded.num_channels)
  made = state.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=loaded.variables["params"],
    batch_stats=loaded.variables.get("batch_stats", {}),
    opt_state={},
    rng=jax.random.key(0),
    sums=metrics.zeros(()),
    nonfinite={},
  )
  spec = checkpoints.model_spec(loaded.name, loaded.model, shape)
  with checkpoints.Checkpointer(out, spec) as checkpointer:
    checkpointer.save(made, 0, None)
  return place


def _check_free(out: pathlib.Path) -> None:
  if (out / files.CHECKPOINTS).exists():
    raise UserError(
      f"out: {out} holds checkpoints already; allowed: another directory"
    )


def describe(
  loaded: interop.Loaded, image_shape: tuple[int, int, int] | None = None
) -> str:
  """Says what a file was recognised as, a line for each fact.

  Args:
    loaded: The network, see `interop.load`.
    image_shape: Shape of an image, [H, W, C]; None: the network's usual one.
  """
  count = sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["params"]))
  side = loaded.image_side
  height, width, _ = image_shape or (side, side, loaded.num_channels)
  facts = {
    "network": f"{loaded.name}, {loaded.layout}",
    "parameters": f"{count:,}",
    "images": f"{height} x {width} pixels,"
    f" {wording.plural(loaded.num_channels, 'channel')}",
    "normalised": loaded.normalization,
    "in one line": loaded.told,
  }
  return "".join(f"{name + ':':<13}{text}\n" for name, text in facts.items())


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Recognises the file that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    UserError: A file that is not recognised, weights that classify at chance,
      or a directory that is taken; one clear line.
  """
  flags = arguments.Parser(
    program,
    "FILE [--out=DIR] [flags]",
    description="Recognises PyTorch weights by names and shapes; runs no code"
    " of the file.",
    example="exported/digits.safetensors --data=digits --out=runs/imported",
  )
  add = flags.add_argument
  add("file", metavar="FILE", help="of torch.save, or .safetensors")
  add("--out", help="directory for a checkpoint; default: only recognise")
  add("--data", help="data set, .npz or folder that accuracy is measured on")
  add("--data-dir", help="place of the data; default: the usual one")
  add("--size", type=int, default=0, help="side of pictures in a folder")
  flags.add_weights()
  args = flags.parse_args(argv)
  out = None if args.out is None else locations.expand("out", args.out)
  if out is not None:
    _check_free(out)
  if args.data is None and (args.size or args.data_dir is not None):
    raise UserError("--size, --data-dir: without --data; allowed: with it")
  images = (
    attack.load_images(args.data, data_dir=args.data_dir, size=args.size).test
    if args.data is not None
    else None
  )
  loaded = interop.load(
    args.file,
    images=images.images if images else None,
    labels=images.labels if images else None,
    entry=args.entry,
    **dict(args.field),
  )
  shape = images.images.shape[1:] if images else None
  sys.stdout.write(describe(loaded, shape))
  source, attacked = args.file, "attacked"
  if out is not None:
    with lock.directory("out", out):
      sys.stdout.write(f"{'checkpoint:':<13}{write(loaded, out, shape)}\n")
    source, attacked = out, f"{out}-attacked"
  commands.say_next(
    f"atat-jax attack {source} --data={args.data or 'NAME'} --out={attacked}"
  )
