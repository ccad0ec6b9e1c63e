"""Numbers gone wrong in a step: found inside the compiled step, by policy.

A step is sound if its inner attack, its terms, its gradient, and what it leaves
behind (updated parameters, statistics, optimizer state, averages) are finite,
and so are the norm of the gradient and the sum of the sizes of each of the
others. Weights that are finite but absurd are found by the logits of the
validation images, before a checkpoint is written of them (`incidents`).

- `stop`: the first bad step of each kind is noted in the state; the host sees
  it when a log line is due, and stops.
- `skip`: a step that is not sound leaves everything but the count of steps as
  it was, and is noted.
- `rollback`: as `stop`, but the host goes back to the last checkpoint and has
  the step left out.

No policy makes the device wait for the host.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import state
from atat_jax.objectives import Outcome
from atat_jax.state import TrainState
from atat_jax.training.options import Options
from atat_jax.typing import Array, PyTree

_KEPT = ("params", "batch_stats", "opt_state", "ema", "sums")


def _is_finite(tree: PyTree) -> Array:
  """Whether all numbers of a tree are finite; one reduction of each array."""
  sums = [
    jnp.abs(leaf).sum()
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return jnp.isfinite(sum(sums, start=jnp.zeros(())))


def examine(
  outcome: Outcome, gradient_norm: Array, after: TrainState
) -> dict[str, Array]:
  """Finds what is finite in a step, in the order in which it is computed.

  Args:
    outcome: Loss of the batch, with its terms.
    gradient_norm: Norm of the gradient.
    after: State after the update.

  Returns:
    Name to a Boolean scalar: the terms, "gradient", the inner attack, and
    `state.LEFT_BEHIND`.
  """
  finite = {
    name: jnp.isfinite(term).all() for name, term in outcome.terms.items()
  }
  finite["gradient"] = jnp.isfinite(gradient_norm)
  left = (
    _is_finite(after.params),
    _is_finite(after.batch_stats),
    _is_finite(after.opt_state),
    _is_finite(after.ema),
  )
  found = dict(zip(state.LEFT_BEHIND, left, strict=True))
  attack = outcome.attack_finite
  found[state.ATTACK] = jnp.asarray(True) if attack is None else attack.all()
  return finite | {name: found[name] for name in after.unsound}


def decide(
  before: TrainState,
  after: TrainState,
  finite: dict[str, Array],
  options: Options,
) -> TrainState:
  """Decides what becomes of a step.

  Args:
    before: State before the step.
    after: State after it.
    finite: Result of `examine`.
    options: Options, with the policy.

  Returns:
    The state to go on from.
  """
  guard, step = before.guard, before.step
  left_out: Array | bool = False
  if guard is not None:
    left_out = (guard.left_out == step).any()
  if not options.skips_nonfinite:
    after = after.replace(
      **{
        field: _first(getattr(before, field), finite, step, left_out)
        for field in ("nonfinite", "unsound")
      }
    )
  if guard is None:
    return after
  leaves = left_out
  if options.skips_nonfinite:
    sound = jnp.stack([finite[name] for name in sorted(finite)])
    bad = ~sound.all() & ~left_out
    leaves |= bad
    after = after.replace(guard=_note(guard, step, ~sound, bad))
  old, new = (
    {field: getattr(one, field) for field in _KEPT} for one in (before, after)
  )
  # A choice and not a product, which would let a NaN through.
  kept = jax.tree.map(lambda a, b: jnp.where(leaves, a, b), old, new)
  return after.replace(**kept)


def _first(
  firsts: dict[str, Array],
  finite: dict[str, Array],
  step: Array,
  left_out: Array | bool,
) -> dict[str, Array]:
  """First step at which each name was not finite."""
  return {
    name: jnp.minimum(
      first, jnp.where(finite[name] | left_out, state.NEVER, step)
    )
    for name, first in firsts.items()
  }


def _note(
  guard: state.Guard, step: Array, wrong: Array, bad: Array
) -> state.Guard:
  """Notes a skipped step, with what was wrong as bits."""
  bits = (wrong * 2 ** jnp.arange(len(wrong))).sum().astype(jnp.int32)
  # Beyond the last place nothing is written: the count alone goes on.
  place = jnp.where(bad, guard.count, state.MOST_NOTED)
  return guard.replace(
    steps=guard.steps.at[place].set(step, mode="drop"),
    terms=guard.terms.at[place].set(bits, mode="drop"),
    count=guard.count + bad,
  )


def _in_order(names: Iterable[str]) -> list[str]:
  """Names in the order in which a step computes what they stand for."""
  names_in_order = ("gradient", state.ATTACK, *state.LEFT_BEHIND)
  later = {name: i for i, name in enumerate(names_in_order)}
  return sorted(names, key=lambda name: (later.get(name, -1), name))


def skipped(current: TrainState) -> tuple[list[tuple[int, list[str]]], int]:
  """Reads the skipped steps that a state has noted, on the host.

  Args:
    current: A state with a guard.

  Returns:
    (number of the step from 0, names of what was not finite) of each, in
    order; and how many there were, which may be more.
  """
  guard = jax.device_get(current.guard)
  # A pytree sorts its names, so that their order says nothing.
  count = int(guard.count)
  known = sorted((*current.nonfinite, *current.unsound))
  found = []
  for step, bits in list(zip(guard.steps, guard.terms, strict=True))[:count]:
    wrong = [name for i, name in enumerate(known) if int(bits) >> i & 1]
    found.append((int(step), _in_order(wrong)))
  return found, count


def forget(current: TrainState) -> TrainState:
  """Forgets the skipped steps that a state has noted, once they are read."""
  if current.guard is None:
    return current
  count = 0 * current.guard.count  # stays where it is on the devices
  return current.replace(guard=current.guard.replace(count=count))


def first_wrong(current: TrainState) -> tuple[int, list[str]] | None:
  """Reads the first step that was not finite, on the host.

  Returns:
    Its number from 0 and the names of what was not finite at it; None if there
    was none.
  """
  found = jax.device_get((current.nonfinite, current.unsound))
  firsts = {name: int(step) for part in found for name, step in part.items()}
  step = min(firsts.values())
  if step == state.NEVER:
    return None
  return step, _in_order(name for name in firsts if firsts[name] == step)


def fresh_guard(steps: Sequence[int]) -> state.Guard:
  """Makes a guard that leaves steps out.

  Args:
    steps: Numbers of the steps, from 0; at most `state.MOST_LEFT_OUT`.
  """
  left_out = np.full(state.MOST_LEFT_OUT, -1, np.int32)
  left_out[: len(steps)] = steps
  return state.make_guard().replace(left_out=left_out)
