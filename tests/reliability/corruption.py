"""Damages every file that a run reads back, one at a time, and looks.

  python tests/reliability/corruption.py [--seed=0] [--each=1]

Prints how many damages were harmless, made good, refused in one line, silent or
a traceback, for each kind of file and damage. The last two must be zero: the
exit status says so.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checkpoints, models, state
from atat_jax.attacks.autoattack import progress, slots
from atat_jax.data import base
from atat_jax.data.cifar import CIFAR10
from atat_jax.errors import UserError
from atat_jax.optim import make_optimizer
from atat_jax.runs import files

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import run_files

HARMLESS, GOOD, REFUSED = "harmless", "made good", "refused"
SILENT, TRACEBACK = "SILENT", "TRACEBACK"
"""Outcomes: the same result; another one that is said, or the same computed
again; one line; a wrong result; an error that is no line."""

STEPS = (4, 8)
_SHAPE = (8, 8, 1)
_TIMES = 12  # a single file, where a checkpoint has sixty


# --- Damages -----------------------------------------------------------------


def _flip(content: bytes, draw: random.Random) -> bytes:
  where = draw.randrange(len(content))
  bit = 1 << draw.randrange(8)
  return content[:where] + bytes([content[where] ^ bit]) + content[where + 1 :]


def _digit(content: bytes, draw: random.Random) -> bytes:
  """Changes a digit, which leaves JSON valid; a bit where there is none."""
  places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
  if not places:
    return _flip(content, draw)
  where = draw.choice(places)
  other = draw.choice([c for c in b"123456789" if c != content[where]])
  return content[:where] + bytes([other]) + content[where + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
  "deleted": lambda content, draw: None,
  "emptied": lambda content, draw: b"",
  "truncated": lambda content, draw: content[: draw.randrange(len(content))],
  "one byte less": lambda content, draw: content[:-1],
  "one byte more": lambda content, draw: content + b"\0",
  "flipped bit": _flip,
  "other digit": _digit,
  "zeros": lambda content, draw: bytes(len(content)),
}


# --- What is damaged ---------------------------------------------------------


class Target(NamedTuple):
  """Files that are read back in one way.

  Attributes:
    name: Name of the kind of files.
    files: (workdir) to the files.
    use: (workdir) to the result, as text.
    others: Results that are right as well, if they are said.
    missing: Result where the file is not there, which needs no words.
    times: How often each damage is tried, at other places.
  """

  name: str
  files: Callable[[pathlib.Path], list[pathlib.Path]]
  use: Callable[[pathlib.Path], str]
  others: tuple[str, ...] = ()
  missing: str | None = None
  times: int = 1


def digest(tree: object) -> str:
  """Returns a digest of all numbers of a tree, as text."""
  mark = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    mark.update(np.ascontiguousarray(leaf).tobytes())
  return mark.hexdigest()


def _model():
  return models.create("wide_resnet", depth=8, width=1, strides=(1, 1, 2))


def _spec():
  return checkpoints.model_spec("wide_resnet", _model(), _SHAPE)


@functools.cache
def make_state(seed: int) -> state.TrainState:
  """Makes a train state with averaged weights, none at its initial value."""
  made = state.create(
    _model(),
    make_optimizer(lambda count: 0.1),
    jax.random.key(seed),
    jnp.zeros((1, *_SHAPE)),
    metric_names=("loss",),
    term_names=("cross_entropy", "gradient"),
    averages=True,
  )
  generator = np.random.default_rng(seed)

  def fill(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)

  return jax.tree.map(fill, made).replace(step=jnp.int32(seed))


def _images(seed: int, count: int) -> base.Split:
  generator = np.random.default_rng(seed)
  return base.Split(
    generator.integers(0, 256, (count, 32, 32, 3), np.uint8),
    generator.integers(0, 10, count, np.int32),
  )


_ORIGIN = {"kind": "archive", "path": "/data", "files": []}


def _fresh() -> progress.EnsembleProgress:
  generator = np.random.default_rng(0)
  jobs = [
    slots.Job("apgd-ce", None, 100),
    slots.Job("square", None, 5000, num_restarts=2),
  ]
  return progress.EnsembleProgress.fresh(
    generator.uniform(size=(8, 4, 4, 1)).astype(np.float32),
    generator.normal(size=(8, 3)).astype(np.float32),
    generator.integers(0, 3, 8),
    jobs,
  )


def build(workdir: pathlib.Path) -> None:
  """Writes every kind of file that is damaged."""
  with checkpoints.Checkpointer(workdir, _spec()) as keeper:
    for step, accuracy in zip(STEPS, (0.4, 0.5), strict=True):
      keeper.save(make_state(step), step, accuracy)
  rows = [
    run_files.result_row("student", "nominal", "running", 0.9132),
    run_files.result_row("student", "pgd20", "running", 0.5317),
  ]
  files.write_json(
    workdir / files.RESULTS,
    {"format": 1, "run": {"commit": "0123abcd"}, "rows": rows},
    sealed=True,
  )
  train, test = _images(1, 6), _images(2, 3)
  base.write_cache(workdir / "cache.npz", CIFAR10, train, test, origin=_ORIGIN)
  files.write_arrays(
    workdir / "attention.npz",
    {"maps": np.arange(24.0).reshape(2, 3, 4), "identity": np.array("x")},
  )
  made = _fresh()
  made.done["apgd-ce"][:] = True
  made.accuracies["apgd-ce"], made.seconds["apgd-ce"] = 0.25, 1.5
  in_flight = slots.InFlight(
    np.arange(2),
    np.zeros(2, np.int64),
    np.full(2, 7),
    [np.arange(6.0), np.arange(4.0)],
  )
  store = progress.Store(workdir / "state.npz", "identity of a test")
  store.save(made, in_flight)


# --- Reading it back ---------------------------------------------------------


def _restored(which: str) -> Callable[[pathlib.Path], str]:
  return lambda workdir: digest(
    checkpoints.restore_model(workdir, which=which)[1]
  )


def _resumed(workdir: pathlib.Path) -> str:
  with checkpoints.Checkpointer(workdir, _spec()) as keeper:
    step = keeper.latest_step()
    return digest(keeper.restore(make_state(0), step)) if step else "anew"


def _results(workdir: pathlib.Path) -> str:
  return json.dumps(files.read_results(workdir), sort_keys=True)


def _cache(workdir: pathlib.Path) -> str:
  return digest(base.read_cache(workdir / "cache.npz", CIFAR10))


def _arrays(workdir: pathlib.Path) -> str:
  found = files.read_arrays(workdir / "attention.npz")
  return str(found and {k: v.tolist() for k, v in found.items()})


def _state(workdir: pathlib.Path) -> str:
  store = progress.Store(workdir / "state.npz", "identity of a test")
  return repr(store.restore(_fresh()))


def _checkpoint(step: int) -> Callable[[pathlib.Path], list[pathlib.Path]]:
  return lambda workdir: sorted(
    path
    for path in (workdir / files.CHECKPOINTS / str(step)).rglob("*")
    if path.is_file()
  )


def _file(name: str) -> Callable[[pathlib.Path], list[pathlib.Path]]:
  return lambda workdir: [workdir / name]


def targets() -> list[Target]:
  """Returns everything that is damaged, and how it is read back."""
  found = []
  states = {step: make_state(step) for step in STEPS}
  evaluated = tuple(digest(states[step].ema) for step in STEPS)
  whole = tuple(digest(states[step]) for step in STEPS)
  for step in STEPS:
    name = "newest and best" if step == STEPS[-1] else "one before"
    for use, read, others in (
      ("best", _restored("best"), evaluated),
      ("last", _restored("last"), evaluated),
      ("resumed", _resumed, whole),
    ):
      label = f"checkpoint, {name}: {use}"
      found.append(Target(label, _checkpoint(step), read, others))
  for name, file, use, missing in (
    ("results.json", files.RESULTS, _results, "null"),
    ("decoded copy", "cache.npz", _cache, None),
    ("arrays of an analysis", "attention.npz", _arrays, "None"),
    ("state of AutoAttack", "state.npz", _state, repr(_fresh())),
  ):
    found.append(Target(name, _file(file), use, missing=missing, times=_TIMES))
  return found


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
  """Collects what the package logs as a warning."""
  lines: list[str] = []

  class Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      lines.append(record.getMessage())

  handler, logger = Handler(logging.WARNING), logging.getLogger("atat_jax")
  logger.addHandler(handler)
  try:
    yield lines
  finally:
    logger.removeHandler(handler)


def outcome(target: Target, workdir: pathlib.Path, expected: str) -> str:
  """Reads a damaged file back and says what came of it."""
  checkpoints._say.cache_clear()  # every trial is a process of its own
  with _said() as lines:
    try:
      found = target.use(workdir)
    except UserError as error:
      return REFUSED if "\n" not in str(error) else TRACEBACK
    except Exception:
      return TRACEBACK
  if any("\n" in line for line in lines):
    return TRACEBACK
  if found == expected:
    return GOOD if lines else HARMLESS
  if found in target.others and any("damaged" in line for line in lines):
    return GOOD
  return GOOD if found == target.missing else SILENT


def trials(
  source: pathlib.Path, draw: random.Random, each: int, share: float = 1.0
) -> Iterator[tuple[Target, pathlib.Path, str, str]]:
  """Damages files of copies of a working directory, one at a time.

  Args:
    source: Directory that `build` filled.
    draw: Source of the places and bits.
    each: Number of damages of each kind to each file.
    share: Share of them that is tried, chosen at random.

  Yields:
    Target, file relative to the directory, name of the damage, outcome.
  """
  with tempfile.TemporaryDirectory() as scratch:
    for target in targets():
      whole = pathlib.Path(shutil.copytree(source, f"{scratch}/whole"))
      expected = target.use(whole)
      shutil.rmtree(whole)
      for path in target.files(source):
        for name, damage in DAMAGES.items():
          for _ in range(each * target.times):
            if draw.random() >= share:
              continue
            copy = pathlib.Path(
              shutil.copytree(source, f"{scratch}/run", copy_function=os.link)
            )
            place = path.relative_to(source)
            content = damage(path.read_bytes(), draw)
            (copy / place).unlink()
            if content is not None:
              (copy / place).write_bytes(content)
            yield target, place, name, outcome(target, copy, expected)
            shutil.rmtree(copy)


def table(found: Counter[tuple[str, str]]) -> str:
  """Lays out the number of each outcome for each row, as text."""
  outcomes = [HARMLESS, GOOD, REFUSED, SILENT, TRACEBACK]
  rows = list(dict.fromkeys(row for row, _ in found))
  width = max(map(len, rows))
  lines = [" " * width + "".join(f"{name:>11}" for name in outcomes)]
  for row in rows:
    numbers = "".join(f"{found[row, name]:11d}" for name in outcomes)
    lines.append(f"{row:<{width}}{numbers}")
  return "\n".join(lines)


def main() -> int:
  """Tries everything and prints the tables; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--each", type=int, default=1)
  parser.add_argument("--share", type=float, default=1.0)
  args = parser.parse_args()
  kinds: Counter[tuple[str, str]] = Counter()
  damages: Counter[tuple[str, str]] = Counter()
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "run"
    build(source)
    draw = random.Random(args.seed)
    for target, place, damage, what in trials(
      source, draw, args.each, args.share
    ):
      kinds[target.name, what] += 1
      damages[damage, what] += 1
      if what in (SILENT, TRACEBACK):
        sys.stdout.write(f"{what}: {target.name}: {place} {damage}\n")
  total = sum(kinds.values())
  sys.stdout.write(f"\n{total} damages, seed {args.seed}\n\n")
  sys.stdout.write(f"{table(kinds)}\n\n{table(damages)}\n")
  return int(any(what in (SILENT, TRACEBACK) for _, what in kinds))


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
