"""Checkpoints by Orbax; no other module knows Orbax.

A checkpoint has separate items: `params`, `batch_stats`, `opt_state`, `run`
(step, key, metrics since the last log line), `ema` where weights are averaged,
and `model`, the network's name and fields as JSON. A model is therefore rebuilt
from disk alone, and evaluation reads only the averaged weights where there are
any, while training resumes from the others. The best checkpoint by validation
accuracy and the last two are kept.

An inventory of all files is written with a checkpoint, before it gets its name,
and compared before it is used. A damaged checkpoint is never used: the one
before takes its place, and both are named in the log. docs/files.md has the
whole rule.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from atat_jax import checks, models, sharding
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.process import commands, stops
from atat_jax.runs import copies, files, inventory, locations
from atat_jax.state import TrainState
from atat_jax.typing import PyTree, Variables

METRIC = "accuracy"
"""Metric of a checkpoint that chooses the best one."""

MAX_SIDE, MAX_CHANNELS = 4096, 64
"""Largest image of a network that is read from disk."""
MAX_FIELD, MAX_DEPTH = 100_000, 1_300
"""Largest integer among its fields, and the largest number of layers."""
MAX_SIZE = 2**31
"""Most numbers in its variables."""

_RUN_FIELDS = ("step", "rng", "sums", "nonfinite")
_AVERAGE = "ema"
_MODEL, _METRICS = "model/metadata", "metrics/metrics"
_EVALUATED = ("model", "metrics", "params", "batch_stats", _AVERAGE)
# Entry of a network's description by which a checkpoint without an inventory
# is told from one of an earlier version.
_CHECKED = "checksums"
# Another one, where the run's key is stored as its numbers.
_PLAIN_KEY = "plain_key"
# Orbax moves what is no longer kept here, so that a kill leaves no half of it.
_DELETED = ".deleted"
# Orbax writes it last on an object store, and so do copies.
_MARK = ocp.path.atomicity.COMMIT_SUCCESS_FILE

_log = logging.getLogger(__name__)

# Numbers of the questions of this process whether all stop.
_questions = itertools.count(1)


def model_spec(
  name: str, model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """Describes a model as JSON.

  Args:
    name: Name in `models.MODELS`.
    model: The network.
    image_shape: Shape of an image, [H, W, C].

  Returns:
    "name", "fields" and "image_shape"; `restore_model` rebuilds the network
    from them.
  """
  checks.instance("name", name, str, "a name in models.MODELS")
  checks.module(model)
  shape = checks.numbers("image_shape", image_shape, 1, integers=True)
  if len(shape) != 3:
    raise UserError(f"image_shape: {shape}; allowed: (H, W, C)")
  fields = {
    f.name: getattr(model, f.name)
    for f in dataclasses.fields(model)
    if f.name not in ("parent", "name")
  }
  if "dtype" in fields:
    fields["dtype"] = str(jnp.dtype(fields["dtype"]))
  return {"name": name, "fields": fields, "image_shape": list(image_shape)}


def _items(state: TrainState) -> dict[str, Any]:
  """Splits a state into the items that Orbax stores, by name."""
  items = {
    "params": state.params,
    "batch_stats": state.batch_stats,
    "opt_state": state.opt_state,
    "run": {name: getattr(state, name) for name in _RUN_FIELDS},
    _AVERAGE: state.ema,
  }
  # Orbax stores no empty item: statistics of a network without BatchNorm, or
  # the average of a run that averages no weights.
  return {name: tree for name, tree in items.items() if tree}


def _directory(workdir: pathlib.Path | str) -> pathlib.Path:
  directory = locations.find("workdir", workdir)
  if not locations.is_remote(directory):
    directory = directory.absolute()
  return directory / files.CHECKPOINTS


class _CheckedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Folder of a save; it gets its inventory before it gets its name."""

  async def finalize(self, *args: Any, **kwargs: Any) -> None:
    """Commits an item or, after all items, the checkpoint."""
    name = self.get_final().name
    if _is_step(name):
      inventory.write(pathlib.Path(self.get()), {"step": int(name)})
    await super().finalize(*args, **kwargs)


class _CheckedObjects(ocp.path.atomicity.CommitFileTemporaryPath):
  """Save on an object store, where an object of its own marks what is complete.

  The inventory is written before it.
  """

  async def finalize(self, *args: Any, **kwargs: Any) -> None:
    """Commits an item or, after all items, the checkpoint."""
    name = self.get_final().name
    if _is_step(name):
      inventory.write(self.get(), {"step": int(name)})
    await super().finalize(*args, **kwargs)


class _Manager(ocp.CheckpointManager):
  """Manager of Orbax that writes in this process alone."""

  def reached_preemption(self, step: int) -> bool:
    """Asks nobody: the processes count their questions."""
    del step
    return False


def _manager(
  directory: pathlib.Path, *, alone: bool = False
) -> ocp.CheckpointManager:
  """Makes a manager, of all processes or of the first alone."""
  remote = locations.is_remote(directory)
  parts: dict[str, Any] = {}
  if alone:
    parts = {
      "multiprocessing_options": ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone"
      )
    }

  def metric(metrics: dict[str, float]) -> float:
    return metrics[METRIC]

  return (_Manager if alone else ocp.CheckpointManager)(
    directory,
    options=ocp.CheckpointManagerOptions(
      # BestN alone would delete the last checkpoint, and a resumed run would
      # start from its best one. The one before takes the place of a damaged
      # last one.
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(2),
          policies.BestN(
            get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
          ),
        ]
      ),
      best_fn=metric,
      best_mode="max",
      create=not alone,
      cleanup_tmp_directories=True,
      # Nothing can be renamed on an object store. What a kill leaves of a
      # deletion lacks files of its inventory, so that it is never used.
      todelete_subdir=None if remote else _DELETED,
      temporary_path_class=_CheckedObjects if remote else _CheckedPath,
      **parts,
    ),
  )


class _Copies:
  """Stands for Orbax's manager where checkpoints are copies of local ones.

  Process 0 saves to a folder of its own, has the whole checkpoint sent, and
  keeps as many as Orbax would. The others wait for it.

  Args:
    directory: Folder of the checkpoints, on an object store.
  """

  def __init__(self, directory: pathlib.Path) -> None:
    self._directory = directory
    self._accuracies: dict[int, float | None] = {}
    if jax.process_index() == 0:
      self._begin()
    self._meet()

  def _begin(self) -> None:
    """Removes what a kill has left, and reads the accuracies."""
    if not self._directory.is_dir():
      return
    for folder in self._directory.iterdir():
      if _is_step(folder.name) and not _is_complete(folder):
        copies.remove(folder, _MARK)
    for step in _steps(self._directory):
      self._accuracies[step] = _read_accuracy(self._directory / str(step))

  def _meet(self) -> None:
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("atat_jax: checkpoints are copied")

  def latest_step(self) -> int | None:
    """Returns the step of the last checkpoint; None where there is none."""
    found = _steps(self._directory) if self._directory.is_dir() else []
    return found[0] if found else None

  def reached_preemption(self, step: int) -> bool:
    """Decides as Orbax's manager."""
    return ocp.utils.reached_preemption(step)

  def save(
    self,
    step: int,
    args: ocp.args.Composite,
    metrics: dict[str, float] | None,
    force: bool,
  ) -> None:
    """Saves a checkpoint, and returns when it is on the store."""
    if jax.process_index() == 0:
      with tempfile.TemporaryDirectory() as name:
        with _manager(pathlib.Path(name), alone=True) as manager:
          manager.save(step, args=args, metrics=metrics, force=force)
        folder = self._directory / str(step)
        copies.send(pathlib.Path(name, str(step)), folder, _MARK)
      self._accuracies[step] = None if metrics is None else metrics[METRIC]
      for other in self._accuracies.keys() - _kept(self._accuracies):
        copies.remove(self._directory / str(other), _MARK)
        del self._accuracies[other]
    self._meet()

  def wait_until_finished(self) -> None:
    """Returns at once: a save returns when it has finished."""

  def close(self) -> None:
    """Does nothing: nothing is open."""


def _kept(accuracies: Mapping[int, float | None]) -> set[int]:
  """Chooses as the policies of `_manager`: the last two steps and the best."""
  best = [
    (value, step) for step, value in accuracies.items() if value is not None
  ]
  return {*sorted(accuracies)[-2:], *(step for _, step in sorted(best)[-1:])}


class Checkpointer(contextlib.AbstractContextManager[Any]):
  """Saves and restores a training run in `<workdir>/checkpoints`.

  A context manager: leaving it waits until everything is written.

  Args:
    workdir: Working directory of the run.
    spec: Description of the network (`model_spec`).
  """

  def __init__(self, workdir: pathlib.Path | str, spec: dict[str, Any]):
    self._spec = {**spec, _CHECKED: 1}
    self.directory = _directory(workdir)
    if jax.process_index() == 0:
      _set_damaged_aside(self.directory)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("atat_jax: checkpoints are compared")
    with _plain(self.directory, "opened"):
      copied = locations.is_copied(self.directory)
      self._manager = (_Copies if copied else _manager)(self.directory)
    self._clear()

  def __exit__(self, *error: object) -> None:
    """Waits until everything is written, and closes."""
    with stops.hold(), _plain(self.directory, "written"):
      self._manager.close()
    self._clear()

  def _clear(self) -> None:
    """Deletes what is no longer kept."""
    if jax.process_index() == 0 and not locations.is_remote(self.directory):
      # The folder stays: a save that is going on moves another one there.
      for path in (self.directory / _DELETED).glob("*"):
        shutil.rmtree(path, ignore_errors=True)

  def latest_step(self) -> int | None:
    """Returns the step of the last checkpoint; None where there is none."""
    return self._manager.latest_step()

  def should_stop(self, step: int, signum: int) -> bool:
    """Decides whether every process stops after this step.

    A single process stops when it got a signal; several agree on a step through
    JAX's preemption service, and so ask equally often.

    Args:
      step: Step just made.
      signum: Signal that this process got, or 0.

    Returns:
      The same answer in every process.
    """
    if jax.process_count() == 1:
      return bool(signum)
    # They agree on the number after the largest, which the steps would jump
    # over where one program makes several.
    del step
    return self._manager.reached_preemption(next(_questions))

  def save(
    self,
    state: TrainState,
    step: int,
    accuracy: float | None,
    details: dict[str, float] | None = None,
  ) -> None:
    """Saves a state; returns while it is being written.

    Args:
      state: State after `step` updates.
      step: Number of updates, which names the checkpoint.
      accuracy: Accuracy on the validation split; None: not measured, so that
        this checkpoint is never the best.
      details: Further metrics, kept with the checkpoint.

    Raises:
      UserError: This checkpoint or the one before could not be written.
    """
    spec = self._spec
    if locations.is_copied(self.directory) and jax.process_count() > 1:
      # The first process writes all, and Orbax lets none write arrays of JAX
      # without the others.
      state, spec = sharding.as_numpy(state), {**spec, _PLAIN_KEY: 1}
    items = {
      name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()
    }
    with _plain(self.directory, "written"):
      self._manager.save(
        step,
        args=ocp.args.Composite(**items, model=ocp.args.JsonSave(spec)),
        metrics=None
        if accuracy is None
        else {METRIC: accuracy, **(details or {})},
        force=True,
      )
    self._clear()

  def restore(self, state: TrainState, step: int) -> TrainState:
    """Restores the state saved at a step.

    Args:
      state: State of the same structure, which gives shapes, dtypes and
        shardings.
      step: Step of the checkpoint.

    Returns:
      The restored state.

    Raises:
      UserError: The checkpoint is of another network, or only one of the
        checkpoint and `state` has averaged weights.
      DamagedFileError: It cannot be read.
    """
    folder = self.directory / str(step)
    with _plain(self.directory, "written"):
      self._manager.wait_until_finished()
    found = _read_spec(folder)
    _check_same_model(found, self._spec, self.directory)
    if _has_average(folder) != (state.ema is not None):
      has, wants = ("no ", "") if state.ema is not None else ("", "no ")
      raise UserError(
        f"ema_decay, swa_start: the run keeps {wants}averaged weights, but the"
        f" checkpoint in {self.directory} has {has}such; use its"
        " configuration or another --workdir"
      )
    return _read_state(folder, state)


def _read_state(folder: pathlib.Path, state: TrainState) -> TrainState:
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  with _readable(folder) as here:
    plain = _PLAIN_KEY in _read_spec(here)
    if plain:
      numbers = jax.eval_shape(jax.random.key_data, state.rng)
      numbers = numbers.update(sharding=state.rng.sharding)
      abstract = abstract.replace(rng=numbers)
    fields = _read_items(here, _items(abstract))
  run = fields.pop("run")
  if plain:
    run["rng"] = jax.random.wrap_key_data(run["rng"])
  return state.replace(**run, **fields)


def restore_before(
  workdir: pathlib.Path | str, state: TrainState, step: int
) -> tuple[TrainState, int]:
  """Restores the state of the last intact checkpoint before a step.

  Nothing in the directory is changed, unlike by a `Checkpointer`.

  Args:
    workdir: Working directory of the run.
    state: State before the first step, of the same structure.
    step: Number of the step, from 1.

  Returns:
    The state and the number of steps made; `state` and 0 where there is no such
    checkpoint.
  """
  directory = _directory(workdir)
  for saved in _steps(directory) if directory.is_dir() else []:
    if saved >= step:
      continue
    folder = directory / str(saved)
    try:
      _check(folder)
      return _read_state(folder, state), saved
    except DamagedFileError as error:
      _say(f"step {saved} is damaged and left out ({error})")
  return state, 0


def _has_average(folder: pathlib.Path) -> bool:
  return (folder / _AVERAGE).is_dir()


def _check_same_model(
  found: dict[str, Any], wanted: dict[str, Any], where: object
) -> None:
  if found["name"] != wanted["name"]:
    raise UserError(
      f"model: {wanted['name']!r}, but the checkpoint in {where} is a"
      f" {found['name']!r}; use its configuration or another --workdir"
    )
  # A field that came with a later version has the default that means what the
  # file's version did.
  network = models.MODELS.get(found["name"])
  defaults = {
    field.name: field.default
    for field in (dataclasses.fields(network) if network else ())
  }
  for field, value in wanted["fields"].items():
    saved = found["fields"].get(field, defaults.get(field))
    saved = tuple(saved) if isinstance(saved, list) else saved
    if saved != value:
      raise UserError(
        f"model.{field}: {value!r}, but the checkpoint in {where} has"
        f" {saved!r}; use its configuration or another --workdir"
      )


# --- Reading -----------------------------------------------------------------


def _is_step(name: str) -> bool:
  return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a checkpoint, newest first."""
  with files.plain_errors(directory):
    return sorted(
      (
        int(path.name)
        for path in directory.iterdir()
        if _is_step(path.name) and path.is_dir() and _is_complete(path)
      ),
      reverse=True,
    )


def _is_complete(folder: pathlib.Path) -> bool:
  """Whether a save has ended; on a disk, none has its name before."""
  return not locations.is_remote(folder) or (folder / _MARK).exists()


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a checkpoint where Orbax can read it.

  Args:
    folder: Folder of the checkpoint.

  Yields:
    The folder, or a local copy that is removed when the block ends.
  """
  if not locations.is_copied(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as name:
    here = pathlib.Path(name, folder.name)
    copies.fetch(folder, here)
    try:
      yield here
    except DamagedFileError as error:
      text = str(error).replace(str(here), str(folder))
      raise DamagedFileError(text) from error


@contextlib.contextmanager
def _plain(path: pathlib.Path, done: str) -> Iterator[None]:
  """Puts errors of Orbax, often many lines, into one."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{path}: cannot be {done} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  # Tensorstore says last, after long names, what the system said.
  if reason := commands.system_reason(text):
    return reason
  return text if len(text) <= 200 else f"{text[:200]} ..."


@functools.cache
def _say(message: str) -> None:
  """Says something once, however often a checkpoint is looked at."""
  if jax.process_index() == 0:
    _log.warning("%s", message)


def _check(folder: pathlib.Path, items: Collection[str] | None = None) -> None:
  """Compares a checkpoint with what was written.

  Args:
    folder: Folder of the checkpoint.
    items: Names of the items that matter; None: all.

  Raises:
    DamagedFileError: A file is not what was written.
  """
  if (folder / inventory.NAME).exists():
    inventory.check(folder, {"step": int(folder.name)}, items)
    return
  spec = _read_spec(folder)
  if _CHECKED in spec:
    raise DamagedFileError(f"{folder / inventory.NAME}: missing")
  _say(f"{folder}: not verified, an earlier version wrote it without checksums")
  _read_accuracy(folder)
  with _readable(folder) as here:
    for path in sorted(here.iterdir()):
      if path.name in ("model", "metrics") or not path.is_dir():
        continue
      if items is None or path.name in items:
        _read_item(path, None)  # it can be read, at least


def _read_accuracy(folder: pathlib.Path) -> float | None:
  """Reads the metric of a checkpoint; None if it was not measured."""
  path = folder / _METRICS
  content = files.read_json(path)
  if content is None and path.parent.exists():
    raise DamagedFileError(f"{path}: missing")
  if content is None:
    return None
  value = content.get(METRIC)
  if type(value) not in (int, float):
    raise DamagedFileError(f"{path}: has no {METRIC}")
  return value


def _read_item(path: pathlib.Path, target: PyTree | None) -> PyTree:
  """Reads an item; None: as it is stored."""
  try:
    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      return reader.restore(path, args=ocp.args.StandardRestore(target))
  # A damaged file can raise anything in Orbax and below it.
  except Exception as error:
    raise DamagedFileError(
      f"{path}: cannot be read ({_reason(error)})"
    ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps the reads that a failed one leaves behind from printing tracebacks.

  Orbax closes its event loop at the first error, while other arrays are still
  being read; each of them then finds the loop closed.
  """
  hook = sys.unraisablehook

  def filtered(found: Any) -> None:
    if "Event loop is closed" not in str(found.exc_value):
      hook(found)

  sys.unraisablehook = filtered
  try:
    yield
  except Exception:
    time.sleep(0.2)  # until they have ended
    raise
  finally:
    sys.unraisablehook = hook


def _check_shapes(path: pathlib.Path, target: PyTree) -> None:
  """Compares shapes before anything is read or allocated."""

  def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
      jax.tree_util.keystr(where): tuple(leaf.shape)
      for where, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  try:
    stored = ocp.StandardCheckpointHandler().metadata(epath.Path(path))
    found = shapes(getattr(stored, "tree", stored))
  except Exception as error:
    raise DamagedFileError(
      f"{path}: cannot be read ({_reason(error)})"
    ) from error
  wanted = shapes(target)
  for name in sorted(found.keys() | wanted.keys()):
    if found.get(name) != wanted.get(name):
      raise DamagedFileError(
        f"{path}: {name} has shape {found.get(name)}, but the network of"
        f" {path.parent / _MODEL} has {wanted.get(name)}"
      )


def _read_items(
  folder: pathlib.Path, targets: dict[str, PyTree]
) -> dict[str, PyTree]:
  return {
    name: _read_item(folder / name, target) for name, target in targets.items()
  }


def _read_spec(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the description of a network, within the limits of this module."""
  path = folder / _MODEL
  spec = files.read_json(path)
  if spec is None:
    raise DamagedFileError(f"{path}: missing")
  shape, fields = spec.get("image_shape"), spec.get("fields")
  if not isinstance(spec.get("name"), str) or not isinstance(fields, dict):
    raise DamagedFileError(f"{path}: not the description of a network")
  largest = (MAX_SIDE, MAX_SIDE, MAX_CHANNELS)
  if (
    not isinstance(shape, list)
    or len(shape) != 3
    or not all(type(n) is int for n in shape)
    or not all(1 <= n <= most for n, most in zip(shape, largest, strict=True))
  ):
    raise DamagedFileError(
      f"{path}: image_shape {str(shape)[:40]}; allowed: up to {list(largest)}"
    )
  for name, value in fields.items():
    layers = name in ("depth", "stage_sizes")
    for number in value if isinstance(value, list) else [value]:
      most = MAX_DEPTH if layers else MAX_FIELD
      if isinstance(number, int) and abs(number) > most:
        raise DamagedFileError(f"{path}: {name} above {most:,}")
  return spec


def _create(
  folder: pathlib.Path, spec: dict[str, Any]
) -> tuple[nn.Module, Variables]:
  """Makes a network and the shapes of its variables; allocates nothing."""
  path = folder / _MODEL
  # JSON turns tuples into lists, and a module's fields must be hashable.
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec["fields"].items()
  }
  try:
    model = models.create(spec["name"], **fields)
    abstract = jax.eval_shape(
      model.init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, *spec["image_shape"]), jnp.float32),
    )
  except Exception as error:
    raise DamagedFileError(
      f"{path}: no network can be made of it ({_reason(error)})"
    ) from error
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
  if size > MAX_SIZE:
    raise DamagedFileError(
      f"{path}: a network of {size:,} numbers; allowed: up to {MAX_SIZE:,}"
    )
  return model, abstract


# --- Choosing ----------------------------------------------------------------


class Chosen(NamedTuple):
  """Checkpoint that was chosen.

  Attributes:
    step: Its step.
    which: Reason in words: "best", "last" or "step"; with "intact" where a
      damaged checkpoint was passed over.
  """

  step: int
  which: str


def find(
  workdir: pathlib.Path | str, *, step: int | None = None, which: str = "best"
) -> Chosen:
  """Finds an intact checkpoint.

  A damaged one is passed over, which is said in the log: the best or the last
  of the intact ones takes its place. One that is named by its step is refused.

  Args:
    workdir: Working directory of the run.
    step: Step of the checkpoint; None: by `which`.
    which: "best" by validation accuracy, or "last".

  Returns:
    The checkpoint, whose files are what was written.

  Raises:
    UserError: There is no checkpoint, or none at that step.
    DamagedFileError: None is intact, or that at the step is damaged.
  """
  checks.choice("which", which, ("best", "last"))
  directory = _directory(workdir)
  if not directory.is_dir():
    raise UserError(
      f"workdir: {workdir} has no checkpoints; train first:"
      " atat-jax train --config=... --workdir=..."
    )
  steps = _steps(directory)
  if not steps:
    raise UserError(f"workdir: no complete checkpoint in {directory}")
  if step is not None:
    if step not in steps:
      raise UserError(
        f"step: {step}; allowed: {', '.join(map(str, sorted(steps)))}"
        f" (in {directory})"
      )
    try:
      _check(directory / str(step), _EVALUATED)
    except DamagedFileError as error:
      others = ", ".join(str(s) for s in sorted(steps) if s != step) or "none"
      raise DamagedFileError(
        f"step: {step} is damaged ({error}); allowed: {others}"
      ) from None
    return Chosen(step, "step")
  return _first_intact(directory, steps, which)


def _first_intact(
  directory: pathlib.Path, steps: list[int], which: str
) -> Chosen:
  damaged: dict[int, DamagedFileError] = {}
  if which == "best":
    # A run stopped before its first validation has no best: the last will do.
    accuracies: dict[int, float] = {}
    for step in steps:
      folder = directory / str(step)
      try:
        _check(folder, ("metrics",))
        value = _read_accuracy(folder)
        accuracies[step] = -math.inf if value is None else value
      except DamagedFileError as error:
        damaged[step] = error
    steps = sorted(accuracies, key=lambda s: (accuracies[s], s), reverse=True)
  for step in steps:
    try:
      _check(directory / str(step), _EVALUATED)
    except DamagedFileError as error:
      damaged[step] = error
      continue
    for bad, reason in damaged.items():
      _say(
        f"{directory}: step {bad} is damaged and left out ({reason}); the"
        f" {which} of the intact checkpoints, step {step}, is used"
      )
    return Chosen(step, f"{which} of the intact" if damaged else which)
  raise DamagedFileError(
    f"workdir: no intact checkpoint in {directory} ("
    + "; ".join(map(str, damaged.values()))
    + ")"
  )


def _set_damaged_aside(directory: pathlib.Path) -> None:
  """Moves damaged checkpoints out of the way of a training that goes on."""
  if not directory.is_dir():
    return
  for step in _steps(directory):
    folder = directory / str(step)
    try:
      _check(folder)
    except DamagedFileError as error:
      moved = files.set_aside(folder, directory.parent)
      left = _steps(directory)
      goes_on = (
        f"training goes on from step {left[0]}" if left else "none is left"
      )
      _say(
        f"step {step} is damaged ({error}) and was moved to {moved};"
        f" {goes_on}, what came after is computed again"
      )


def checkpoint_step(
  workdir: pathlib.Path | str, *, step: int | None = None, which: str = "best"
) -> int:
  """Finds the checkpoint that `restore_model` reads.

  Args:
    workdir: Working directory of the run.
    step: Step of the checkpoint; None: by `which`.
    which: "best" by validation accuracy, or "last".

  Returns:
    Step of an intact checkpoint; `find` also says whether one was passed over.

  Raises:
    UserError: There is no checkpoint, or none at that step.
    DamagedFileError: None is intact, or that at the step is damaged.
  """
  if step is not None:
    checks.integer("step", step)
  return find(workdir, step=step, which=which).step


def restore_model(
  workdir: pathlib.Path | str,
  *,
  step: int | None = None,
  which: str = "best",
  expected: dict[str, Any] | None = None,
  averaged: bool = True,
) -> tuple[nn.Module, Variables]:
  """Rebuilds a network and its variables from disk alone.

  Args:
    workdir: Working directory of the run, for example "runs/atat"; its teacher
      is in "runs/atat/teacher".
    step: Step of a checkpoint that was kept; None: by `which`.
    which: "best" by (robust) validation accuracy, or "last".
    expected: Description that the network must have (`model_spec`); None: any.
    averaged: Whether averaged weights (EMA, SWA) are read where the run has
      them, as they are the validated ones; False: the optimizer's weights.

  Returns:
    The module, and its variables {"params", "batch_stats"} on the default
    device, the latter only where the network has BatchNorm.

  Raises:
    UserError: There is no such checkpoint, or it is of another network.
    DamagedFileError: None is intact, or that at the step is damaged.
  """
  if expected is not None:
    checks.instance("expected", expected, dict, "what model_spec returns")
  checks.boolean("averaged", averaged)
  step = checkpoint_step(workdir, step=step, which=which)
  folder = _directory(workdir) / str(step)
  spec = _read_spec(folder)
  if expected is not None:
    _check_same_model(spec, expected, folder.parent)
  model, abstract = _create(folder, spec)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    abstract,
  )
  if averaged and _has_average(folder):
    # A single item, whose part without BatchNorm is empty.
    items = {_AVERAGE: {"batch_stats": {}, **abstract}}
  else:
    items = abstract
  with _readable(folder) as here:
    for name, target in items.items():
      _check_shapes(here / name, target)
    found = _read_items(here, items)
  found = found.get(_AVERAGE, found)
  return model, {name: found[name] for name in abstract}
