"""The fused train step: one compiled function.

The step is augmentation -> attack -> teacher maps -> student forward and
backward -> update -> metrics, from uint8 images that live on the device. The
state is donated and replicated, the batch is split over the mesh. The step
never waits for the host: metrics and the first non-finite term accumulate in
the state and are fetched when a log line is due.
"""

import functools
from collections.abc import Callable

import jax
import optax
from flax import linen as nn

from atat_jax import compilation, metrics, sharding
from atat_jax.data.base import Split
from atat_jax.objectives import Batch, Objective, Outcome
from atat_jax.state import TrainState
from atat_jax.training import averaging, gradients, soundness
from atat_jax.training.options import OFF, Options
from atat_jax.typing import Array, PyTree, Variables

TrainStep = Callable[..., TrainState]
"""(state, teacher or None, data, indices, extra=None, count=None) to the state
after the step, or after `count` steps."""


def metric_names(objective: Objective) -> tuple[str, ...]:
  """Returns the names of the metrics that a step accumulates."""
  clean = ("accuracy_clean",) if objective.sees_clean else ()
  adversarial = ("accuracy_adversarial",) if objective.attacks else ()
  return (
    "loss",
    *objective.term_names,
    *clean,
    *adversarial,
    "gradient_norm",
  )


def term_names(objective: Objective) -> tuple[str, ...]:
  """Returns the names of the values that must stay finite."""
  return (*objective.term_names, "gradient")


def make_train_step(
  model: nn.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options = OFF,
) -> TrainStep:
  """Compiles `train_step`, one step or several in one program.

  Args:
    model: Network of the student.
    objective: Loss that is minimised.
    optimizer: Optimizer of the student's parameters.
    mesh: Devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Options that the objective is combined with.

  Returns:
    (state, teacher variables or None, resident split, indices int32 [M], extra
    images [E] or None) to the next state; M + E = B. With indices [S, M], extra
    images [S, E] and a count, int32, the program makes `count` <= S steps. The
    state passed in is donated: it cannot be used again.
  """
  step = functools.partial(
    train_step,
    model=model,
    objective=objective,
    optimizer=optimizer,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  return compilation.jit(
    functools.partial(dispatch, step=step),
    donate_argnums=0,
    # A split state constrains itself: its shapes are known in the trace.
    out_shardings=None
    if sharding.splits_state(mesh)
    else sharding.replicated(mesh),
  )


def dispatch(
  state: TrainState,
  teacher: Variables | None,
  data: Split | None,
  indices: Array,
  extra: Split | None = None,
  count: Array | int | None = None,
  *,
  step: TrainStep,
) -> TrainState:
  """Makes one step, or `count` steps where the indices have a leading axis.

  The count is a traced value, so that a shorter last dispatch before a log line
  or a checkpoint compiles nothing.

  Args:
    state: State before the first step.
    teacher: The teacher's variables, or None.
    data: Training split, on the device.
    indices: int32 [M], or [S, M] for up to S steps.
    extra: Extra images [E] or [S, E], or None.
    count: Number of steps, for indices [S, M].
    step: `train_step` with its collaborators.

  Returns:
    State after the last step.
  """
  if indices.ndim == 1:
    return step(state, teacher, data, indices, extra)

  def body(i: Array, state: TrainState) -> TrainState:
    rows = jax.tree.map(lambda rows: rows[i], (indices, extra))
    return step(state, teacher, data, *rows)

  return jax.lax.fori_loop(0, count, body, state)


def train_step(
  state: TrainState,
  teacher: Variables | None,
  data: Split | None,
  indices: Array,
  extra: Split | None = None,
  *,
  model: nn.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  num_classes: int,
  padding: int = 0,
  flip: bool = False,
  options: Options = OFF,
) -> TrainState:
  """Makes one training step. A pure function, for use inside jit.

  Args:
    state: State before the step.
    teacher: The teacher's variables, or None.
    data: Training split, on the device.
    indices: Examples of the batch in the split, int32 [M].
    extra: Further images [E] of the batch, or None; M + E = B.
    model: Network of the student.
    objective: Loss that is minimised.
    optimizer: Optimizer of the student's parameters.
    mesh: Devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Options that the objective is combined with.

  Returns:
    State after the step.
  """
  state = state.replace(params=sharding.gather(mesh, state.params))
  batch, gradient, outcome = gradients.differentiate(
    state,
    teacher,
    data,
    indices,
    extra,
    model=model,
    objective=objective,
    mesh=mesh,
    num_classes=num_classes,
    padding=padding,
    flip=flip,
    options=options,
  )
  after = _updated(state, gradient, outcome, batch, optimizer, options)
  return sharding.split_state(mesh, after)


def _updated(
  state: TrainState,
  gradient: PyTree,
  outcome: Outcome,
  batch: Batch,
  optimizer: optax.GradientTransformation,
  options: Options,
) -> TrainState:
  """State after the update, its metrics included."""
  with jax.named_scope("update"):
    updates, opt_state = optimizer.update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
  gradient_norm = optax.tree.norm(gradient)
  values = _metrics(outcome, batch.labels, gradient_norm)
  new = {"params": params, "batch_stats": outcome.batch_stats}
  after = state.replace(
    step=state.step + 1,
    **new,
    opt_state=opt_state,
    sums=metrics.merge(state.sums, metrics.from_examples(values)),
    ema=averaging.update(state.ema, new, state.step, options),
  )
  finite = soundness.examine(outcome, gradient_norm, after)
  return soundness.decide(state, after, finite, options)


def _metrics(
  outcome: Outcome, labels: Array, gradient_norm: Array
) -> dict[str, Array]:
  """Values [B] (or [1]) of the metrics that `metric_names` lists."""
  values = {
    "loss": outcome.total,
    **outcome.terms,
    "gradient_norm": gradient_norm[None],
  }
  if outcome.logits_clean is not None:
    values["accuracy_clean"] = outcome.logits_clean.argmax(-1) == labels
  if outcome.logits_adversarial is not None:
    values["accuracy_adversarial"] = (
      outcome.logits_adversarial.argmax(-1) == labels
    )
  return values
