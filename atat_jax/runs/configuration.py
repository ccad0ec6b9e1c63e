"""`config.json` of a working directory: writing, reading and comparing it."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, locations, results_format, roles

# Fields that the trained weights do not depend on.
_FREE = (
  "evaluation",
  "figures",
  "data.dir",
  "data.cache_dir",
  "data.source",
  "data.workers",
  "data.prefetch",
  "data.shard_size",
  "profile_steps",
  "model_axis",
  "train.steps_per_dispatch",
  "teacher.steps_per_dispatch",
  "train.nonfinite",
  "teacher.nonfinite",
  "train.term_gradients",
  "teacher.term_gradients",
  "train.overfitting_alarm",
  "teacher.overfitting_alarm",
)
# Exceptions among them: they choose the checkpoint.
_BOUND = (
  "evaluation.validation_attack",
  "evaluation.norm",
  "evaluation.epsilon",
  "evaluation.step_size",
)

# Fields that the first version did not have, with the value that means what it
# did: a file without them counts as one with these. Each section has them where
# it has the field in front. A field of the training that is added needs a line.
_TRAINING = {
  "clip_norm": 0.0,
  "accumulate_steps": 1,
  "remat": False,
  "label_smoothing": 0.0,
  "epsilon_warmup": 0.0,
  "awp_gamma": 0.0,
  "awp_start": 0.0,
  "ema_decay": 0.0,
  "swa_start": 0.0,
  "statistics_batches": 0,
  "optimizer": "sgd",
  "second_momentum": 0.999,
}
_LATER: dict[str, tuple[str, dict[str, Any]]] = {
  "data": (
    "padding",
    {
      "size": 0,
      "mix": "none",
      "mix_alpha": 1.0,
      "extra": None,
      "extra_fraction": 0.7,
      "stream": False,
      "smallest_crop": 0.08,
      "rand_augment": 0.0,
    },
  ),
  "model": ("batch_norm_epsilon", {"batch_norm_group_size": 0}),
  "objective": (
    "num_steps",
    {
      "attack_method": "pgd",
      "single_step_size": 0.0,
      "single_step_noise": 2.0,
      "starts_from_teacher": False,
    },
  ),
  "train": ("num_epochs", _TRAINING),
  "teacher": ("num_epochs", _TRAINING),
}

# Fields that a run's teacher does not depend on.
_STUDENTS = ("train.", "objective.", "recipe")


@dataclasses.dataclass(frozen=True)
class Configuration:
  """Configuration of a finished run, as far as others need it.

  Attributes:
    method: Name of the training method.
    seed: Seed of the training.
    batch_size: Number of images in a training batch; None: not recorded.
    training: Dotted name of every field that the training depends on to its
      value.
    data: Arguments of `atat_jax.data.load`, its `name` included.
    attack: epsilon, step_size and norm of the run's evaluation.
    streams: Whether its pictures stay on the disk.
  """

  method: str
  seed: int
  batch_size: int | None
  training: dict[str, Any]
  data: dict[str, Any]
  attack: dict[str, Any]
  streams: bool = False


def parse(tree: Mapping[str, Any], where: pathlib.Path) -> Configuration:
  """Reads the configuration of a run.

  Args:
    tree: Content of `config.json`, or the copy in `results.json`.
    where: Working directory, for the message.

  Returns:
    The configuration. Fields that an older version did not write are left out,
    but for those of the training whose meaning then is known.

  Raises:
    UserError: The tree is not the configuration of a run.
  """
  if "method" not in tree:
    raise UserError(f"workdir: {where} has no configuration of a run")
  if found := results_format.configuration_fault(tree):
    raise UserError(f"workdir: configuration of {where}: {found}")
  data, evaluation = tree.get("data", {}), tree.get("evaluation", {})
  arguments = {
    "name": "name",
    "dir": "data_dir",
    "cache_dir": "cache_dir",
    "validation_size": "validation_size",
    "source": "source",
    "size": "size",
  }
  return Configuration(
    method=tree["method"],
    seed=tree.get("seed", 0),
    batch_size=tree.get("train", {}).get("batch_size"),
    training=training_fields(tree),
    data={arguments[k]: v for k, v in data.items() if k in arguments},
    attack={
      field: evaluation[field]
      for field in ("epsilon", "step_size", "norm")
      if field in evaluation
    },
    streams=data.get("stream", False) is True,
  )


def read(workdir: pathlib.Path) -> Configuration:
  """Reads `config.json` of a run, or of the run whose teacher this is.

  Args:
    workdir: Working directory of a run, or its folder `teacher`.

  Raises:
    UserError: There is no such file, or it is damaged.
  """
  workdir = locations.find("workdir", workdir)
  for directory in (workdir, workdir.parent):
    tree = files.read_json(directory / files.CONFIG)
    if tree is not None:
      _compare_with_results(tree, directory)
      return parse(tree, directory)
  raise UserError(
    f"{workdir}: no run, it has no config.json; allowed: the --workdir of a run"
  )


def _compare_with_results(
  tree: Mapping[str, Any], workdir: pathlib.Path
) -> None:
  """Compares `config.json`, which has no checksum, with the copy that has one.

  Raises:
    DamagedFileError: A field that results depend on is not that of the copy.
  """
  results = files.read_results(workdir) or {}
  copy = training_fields(results.get("run", {}).get("config", {}))
  for field, value in training_fields(tree).items():
    if copy.get(field, value) != value:
      raise DamagedFileError(
        f"{workdir / files.CONFIG}: {field} is {value!r}, but"
        f" {copy.get(field)!r} in {files.RESULTS}; allowed: the same"
      )


def training_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Fields that make two trainings the same.

  Args:
    tree: Content of `config.json`.

  Returns:
    Dotted name of each field to its value. A field that came with a later
    version than the file has the value that means what the file's version did.
  """
  found = {
    path: value
    for path, value in _leaves(tree)
    if path in _BOUND
    or not any(path == f or path.startswith(f + ".") for f in _FREE)
  }
  for section, (companion, later) in _LATER.items():
    if f"{section}.{companion}" in found:
      for field, value in later.items():
        found.setdefault(f"{section}.{field}", value)
  return found


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from _leaves(value, f"{path}.{key}" if path else key)
  else:
    yield path, tree


def check(tree: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Checks that a working directory is new, or holds the same training.

  Args:
    tree: Configuration of the run, as plain JSON.
    workdir: Working directory; nothing in it is changed.

  Raises:
    UserError: The directory holds a run with another training.
  """
  stored = files.read_json(workdir / files.CONFIG)
  if stored is None:
    return
  found = training_fields(stored)
  # A student that diverged before its first checkpoint leaves a teacher that
  # does not depend on the student's numbers.
  teacher_only = _has_state(workdir / roles.TEACHER) and not _has_state(workdir)
  for field, value in training_fields(tree).items():
    if teacher_only and field.startswith(_STUDENTS):
      continue
    if field not in found:
      raise UserError(
        f"config.{field}: {value!r}, but {workdir} holds a run of a version"
        " without this field; use another --workdir"
      )
    if found[field] != value:
      raise UserError(
        f"config.{field}: {value!r}, but {workdir} holds a run with"
        f" {found[field]!r}; use that or another --workdir"
      )


def _has_state(directory: pathlib.Path) -> bool:
  """Whether a training has a checkpoint there."""
  place = directory / files.CHECKPOINTS
  return place.is_dir() and any(x.name.isdigit() for x in place.iterdir())


def write(tree: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Writes `config.json`.

  Args:
    tree: Configuration of the run, as plain JSON.
    workdir: Working directory; it is made if needed.

  Raises:
    UserError: The directory cannot be written.
  """
  files.write_json(workdir / files.CONFIG, tree)
