"""The fused train step: one compiled function.

The step is augmentation -> attack -> teacher maps -> student forward and
backward -> update -> metrics, from uint8 images that live on the device. The
state is donated and replicated, the batch is split over the mesh. Nothing in
it waits for the host: metrics and the first non-finite term accumulate in the
state and are fetched at log points.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from atat_jax import compilation, metrics, rng, sharding
from atat_jax.data.base import Split
from atat_jax.objectives import Batch, Objective, Outcome
from atat_jax.state import NEVER, TrainState
from atat_jax.training import accumulation, averaging, awp
from atat_jax.training.batch import assemble, gather
from atat_jax.training.options import OFF, Options
from atat_jax.typing import Array, PyTree, Variables

TrainStep = Callable[..., TrainState]
"""(state, teacher or None, data, indices, extra=None, count=None) to the state
after the step, or the steps."""


def metric_names(objective: Objective) -> tuple[str, ...]:
  """What a step with this objective accumulates."""
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
  """What must stay finite."""
  return (*objective.term_names, "gradient")


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
  """What is kept for the backward pass: the costly part, not the large one."""
  return primitive.name in ("conv_general_dilated", "dot_general")


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
  """Builds the fused step.

  Args:
    model: The network.
    objective: What is minimised.
    optimizer: How.
    mesh: The devices.
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether to flip at random.
    options: What the objective is combined with.

  Returns:
    (state, teacher variables or None, resident split, indices int32 [M], extra
    images [E] or None) to the next state; M + E = B. With indices [S, M], extra
    images [S, E] and a count, int32, as many steps as the count says, at most S,
    in one program. The state passed in is donated: it cannot be used again.
  """

  def step_fn(
    state: TrainState,
    teacher: Variables | None,
    data: Split,
    indices: Array,
    extra: Split | None = None,
  ) -> TrainState:
    with jax.named_scope("augmentation"):
      whole = assemble(
        state.rng,
        state.step,
        *gather(data, indices, extra, mesh),
        num_classes=num_classes,
        padding=padding,
        flip=flip,
        options=options,
      )

    def differentiate(
      batch_stats: PyTree, key: Array, batch: Batch
    ) -> tuple[PyTree, Outcome]:
      with jax.named_scope("prepare"):
        prepared = objective.prepare(
          key,
          model,
          {"params": state.params, "batch_stats": batch_stats},
          teacher,
          batch,
        )

      def mean_loss(params: PyTree) -> tuple[Array, Outcome]:
        outcome = objective.loss(
          model, {"params": params, "batch_stats": batch_stats}, prepared, batch
        )
        return outcome.total.mean(), outcome

      if options.remat:
        mean_loss = jax.checkpoint(mean_loss, policy=_is_product)
      gradient_and_outcome = jax.grad(mean_loss, has_aux=True)

      def perturbed(params: PyTree) -> PyTree:
        gradient, _ = gradient_and_outcome(params)
        return awp.perturb(params, gradient, options.awp_gamma)

      params = state.params
      if options.awp_gamma:
        with jax.named_scope("awp"):
          params = (
            jax.lax.cond(
              state.step >= options.awp_start, perturbed, lambda w: w, params
            )
            if options.awp_start
            else perturbed(params)
          )
      with jax.named_scope("student"):
        return gradient_and_outcome(params)

    gradient, outcome = accumulation.accumulate(
      differentiate,
      state.batch_stats,
      rng.stream(state.rng, "attack", state.step),
      whole,
      parts=options.accumulate_steps,
      params=state.params,
    )
    with jax.named_scope("update"):
      updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)

    gradient_norm = optax.tree.norm(gradient)
    finite = {
      name: jnp.isfinite(term).all() for name, term in outcome.terms.items()
    } | {"gradient": jnp.isfinite(gradient_norm)}
    values = {
      "loss": outcome.total,
      **outcome.terms,
      "gradient_norm": gradient_norm[None],
    }
    if outcome.logits_clean is not None:
      values["accuracy_clean"] = outcome.logits_clean.argmax(-1) == whole.labels
    if outcome.logits_adversarial is not None:
      values["accuracy_adversarial"] = (
        outcome.logits_adversarial.argmax(-1) == whole.labels
      )
    return state.replace(
      step=state.step + 1,
      params=params,
      batch_stats=outcome.batch_stats,
      opt_state=opt_state,
      sums=metrics.merge(state.sums, metrics.from_examples(values)),
      nonfinite={
        name: jnp.minimum(first, jnp.where(finite[name], NEVER, state.step))
        for name, first in state.nonfinite.items()
      },
      ema=averaging.update(
        state.ema,
        {"params": params, "batch_stats": outcome.batch_stats},
        state.step,
        options,
      ),
    )

  def dispatch(
    state: TrainState,
    teacher: Variables | None,
    data: Split,
    indices: Array,
    extra: Split | None = None,
    count: Array | int | None = None,
  ) -> TrainState:
    if indices.ndim == 1:
      return step_fn(state, teacher, data, indices, extra)

    def body(i: Array, state: TrainState) -> TrainState:
      rows = jax.tree.map(lambda rows: rows[i], (indices, extra))
      return step_fn(state, teacher, data, *rows)

    # How many is no part of the program: the last ones before a log line or a
    # checkpoint compile nothing.
    return jax.lax.fori_loop(0, count, body, state)

  return compilation.jit(
    dispatch,
    donate_argnums=0,
    out_shardings=sharding.replicated(mesh),
  )
