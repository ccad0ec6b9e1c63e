"""Checkpoints by Orbax; no other module knows Orbax.

A checkpoint has separate items: `params`, `batch_stats`, `opt_state`, `run`
(step, key, metrics since the last log line), `ema` where weights are averaged,
and `model`, the network's name and fields as JSON. A model is therefore rebuilt
from disk alone, and evaluation reads only the averaged weights where there are
any, while training resumes from the others. The best checkpoint by validation
accuracy and the last one are kept.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import linen as nn
from orbax.checkpoint import checkpoint_managers as policies

from atat_jax import checks, models
from atat_jax.errors import UserError
from atat_jax.process import stops
from atat_jax.runs import files, locations
from atat_jax.state import TrainState
from atat_jax.typing import Variables

METRIC = "accuracy"
"""Metric of a checkpoint that chooses the best one."""

_RUN_FIELDS = ("step", "rng", "sums", "nonfinite")
_AVERAGE = "ema"


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
  fields = {
    f.name: getattr(model, f.name)
    for f in dataclasses.fields(model)
    if f.name not in ("parent", "name")
  }
  if "dtype" in fields:
    fields["dtype"] = str(jnp.dtype(fields["dtype"]))
  return {"name": name, "fields": fields, "image_shape": list(image_shape)}


def _create(spec: dict[str, Any]) -> nn.Module:
  # JSON turns tuples into lists, and a module's fields must be hashable.
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec["fields"].items()
  }
  return models.create(spec["name"], **fields)


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
  directory = locations.expand("workdir", workdir)
  return directory.absolute() / files.CHECKPOINTS


def _manager(directory: pathlib.Path, *, write: bool) -> ocp.CheckpointManager:
  def metric(metrics: dict[str, float]) -> float:
    return metrics[METRIC]

  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      # BestN alone would delete the last checkpoint, and a resumed run would
      # start from its best one.
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(1),
          policies.BestN(
            get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False
          ),
        ]
      ),
      best_fn=metric,
      best_mode="max",
      # A reader leaves a running training alone; a writer cleans up after a
      # killed save. (Orbax's own read_only warns at every start.)
      create=write,
      cleanup_tmp_directories=write,
    ),
  )


class Checkpointer(contextlib.AbstractContextManager[Any]):
  """Saves and restores a training run in `<workdir>/checkpoints`.

  A context manager: leaving it waits until everything is written.

  Args:
    workdir: Working directory of the run.
    spec: Description of the network (`model_spec`).
  """

  def __init__(self, workdir: pathlib.Path | str, spec: dict[str, Any]):
    self._spec = spec
    self._manager = _manager(_directory(workdir), write=True)

  def __exit__(self, *error: object) -> None:
    """Waits until everything is written, and closes."""
    with stops.hold():
      self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the step of the last checkpoint; None where there is none."""
    return self._manager.latest_step()

  def should_stop(self, step: int, signum: int) -> bool:
    """Decides whether every process stops after this step.

    A single process stops when it got a signal; several agree on a step through
    JAX's preemption service.

    Args:
      step: Step just made.
      signum: Signal that this process got, or 0.

    Returns:
      The same answer in every process.
    """
    if jax.process_count() == 1:
      return bool(signum)
    return self._manager.reached_preemption(step)

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
    """
    items = {
      name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(**items, model=ocp.args.JsonSave(self._spec)),
      metrics=None
      if accuracy is None
      else {METRIC: accuracy, **(details or {})},
      force=True,
    )

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
    """
    found = self._manager.restore(
      step, args=ocp.args.Composite(model=ocp.args.JsonRestore())
    )["model"]
    _check_same_model(found, self._spec, self._manager.directory)
    if _has_average(self._manager, step) != (state.ema is not None):
      has, wants = ("no ", "") if state.ema is not None else ("", "no ")
      raise UserError(
        f"ema_decay, swa_start: the run keeps {wants}averaged weights, but the"
        f" checkpoint in {self._manager.directory} has {has}such; use its"
        " configuration or another --workdir"
      )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          name: ocp.args.StandardRestore(tree)
          for name, tree in _items(abstract).items()
        }
      ),
    )
    fields = {name: items[name] for name in _items(abstract)}
    return state.replace(**fields.pop("run"), **fields)


def _has_average(manager: ocp.CheckpointManager, step: int) -> bool:
  return (pathlib.Path(manager.directory) / str(step) / _AVERAGE).is_dir()


def _check_same_model(
  found: dict[str, Any], wanted: dict[str, Any], where: object
) -> None:
  if found["name"] != wanted["name"]:
    raise UserError(
      f"model: {wanted['name']!r}, but the checkpoint in {where} is a"
      f" {found['name']!r}; use its configuration or another --workdir"
    )
  for field, value in wanted["fields"].items():
    saved = found["fields"].get(field)
    saved = tuple(saved) if isinstance(saved, list) else saved
    if saved != value:
      raise UserError(
        f"model.{field}: {value!r}, but the checkpoint in {where} has"
        f" {saved!r}; use its configuration or another --workdir"
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
    Step of an existing checkpoint.

  Raises:
    UserError: There is no checkpoint, or none at that step.
  """
  checks.choice("which", which, ("best", "last"))
  directory = _directory(workdir)
  if not directory.is_dir():
    raise UserError(
      f"workdir: {workdir} has no checkpoints; train first:"
      " python main.py --mode=train --config=... --workdir=..."
    )
  with contextlib.closing(_manager(directory, write=False)) as manager:
    steps = manager.all_steps()
    if not steps:
      raise UserError(f"workdir: no complete checkpoint in {directory}")
    if step is not None:
      if step not in steps:
        raise UserError(
          f"step: {step}; allowed: {', '.join(map(str, sorted(steps)))}"
          f" (in {directory})"
        )
      return step
    best = manager.best_step() if which == "best" else None
    # A run stopped before its first validation has no best.
    return manager.latest_step() if best is None else best


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
  """
  step = checkpoint_step(workdir, step=step, which=which)
  manager = _manager(_directory(workdir), write=False)
  with contextlib.closing(manager):
    spec = manager.restore(
      step, args=ocp.args.Composite(model=ocp.args.JsonRestore())
    )["model"]
    if expected is not None:
      _check_same_model(spec, expected, manager.directory)
    model = _create(spec)
    image = jnp.zeros((1, *spec["image_shape"]))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=device
      ),
      jax.eval_shape(model.init, jax.random.key(0), image),
    )
    average = averaged and _has_average(manager, step)
    wanted = abstract
    if average:  # a single item, whose part without BatchNorm is empty
      wanted = {_AVERAGE: {"batch_stats": {}, **abstract}}
    items = manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()
        }
      ),
    )
  found = items[_AVERAGE] if average else items
  return model, {name: found[name] for name in abstract}
