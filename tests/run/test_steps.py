"""The fused train step: its results, its devices, its compilations."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from atat_jax import (
  compilation,
  metrics,
  objectives,
  optim,
  rng,
  sharding,
  state,
  steps,
)
from atat_jax.data import augment
from atat_jax.data.base import Split
from atat_jax.state import NEVER
from atat_jax.training.options import Options

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 0.2
BATCH = 16


class Run(NamedTuple):
  """A compiled step and what it is called with."""

  step: steps.TrainStep
  create: Any
  """A key and variables to the state before the first step."""
  start: Any
  """Makes a fresh state, replicated; its arrays may be donated."""
  teacher: Any
  data: Split
  put: Any
  """Indices to the device."""
  mesh: jax.sharding.Mesh
  traces: list[int]
  """Grows with each tracing of the loss."""


def _make_run(
  example: Any,
  devices: list[jax.Device],
  *,
  teacher: Any = None,
  objective: Any = None,
  **options: Any,
) -> Run:
  model, variables, images, _ = example
  objective = objective or objectives.create(
    "atat",
    lambda1=0.7,
    lambda2=0.3,
    epsilon=0.1,
    step_size=0.04,
    num_steps=3,
  )
  traces = []

  class Counted(type(objective)):
    def loss(self, *args: Any) -> Any:
      traces.append(1)
      return super().loss(*args)

  object.__setattr__(objective, "__class__", Counted)
  mesh = sharding.make_mesh(devices)
  optimizer = optim.make_optimizer(
    optim.make_schedule(
      "piecewise", learning_rate=RATE, total_steps=9, boundaries=(1,)
    ),
    weight_decay=0.01,
  )

  def create(key: jax.Array, initial: Any) -> state.TrainState:
    return state.create(
      model,
      optimizer,
      key,
      images[:1],
      metric_names=steps.metric_names(objective),
      term_names=steps.term_names(objective),
      initial=initial,
    )

  # Created, and so compiled, once.
  fresh = jax.tree.map(
    lambda leaf: (
      leaf
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else np.asarray(leaf)
    ),
    create(jax.random.key(4), variables),
  )

  def start() -> state.TrainState:
    return sharding.put_replicated(mesh, jax.tree.map(jnp.copy, fresh))

  generator = np.random.default_rng(6)
  shape = (40, *images.shape[1:])
  num_classes = variables["params"]["head"]["bias"].size
  data = Split(
    generator.integers(0, 256, shape, dtype=np.uint8),
    generator.integers(0, num_classes, 40).astype(np.int32),
  )
  if teacher is None and objective.needs_teacher:
    teacher = jax.tree.map(lambda x: 0.9 * x, variables)
  return Run(
    steps.make_train_step(
      model,
      objective,
      optimizer,
      mesh=mesh,
      num_classes=num_classes,
      **options,
    ),
    create,
    start,
    sharding.put_replicated(mesh, teacher),
    sharding.put_replicated(mesh, data),
    lambda indices: sharding.put_batch(mesh, np.asarray(indices, np.int32)),
    mesh,
    traces,
  )


INDICES = [np.arange(16), np.arange(16, 32), np.arange(32, 48) % 40]


def _train(run: Run, num_steps: int = 3) -> state.TrainState:
  current = run.start()
  for indices in INDICES[:num_steps]:
    current = run.step(current, run.teacher, run.data, run.put(indices))
  return current


@pytest.fixture(scope="module")
def run(small) -> Run:
  """On one device, with augmentation."""
  return _make_run(small, jax.devices()[:1], padding=1, flip=True)


def _assert_close(actual: Any, expected: Any, **tolerance: Any) -> None:
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(
      a, b, err_msg=jax.tree_util.keystr(path), **tolerance
    )


def test_fused_step_equals_its_parts_one_after_another(run, small):
  """Objective as it stands, then SGD with momentum and decay by hand."""
  model, variables, _, _ = small
  key = jax.random.key(4)
  objective = objectives.create(
    "atat", lambda1=0.7, lambda2=0.3, epsilon=0.1, step_size=0.04, num_steps=3
  )

  @quick.jit
  def gradient_and_outcome(variables, images, labels, step):
    batch = objectives.make_batch(images, labels, 3)
    prepared = objective.prepare(
      rng.stream(key, "attack", step),
      model,
      variables,
      run.teacher,
      batch,
    )

    def mean_total(params):
      outcome = objective.loss(
        model, {**variables, "params": params}, prepared, batch
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(variables["params"])

  augmentation = quick.jit(
    functools.partial(augment.pad_crop_flip, padding=1, flip=True)
  )
  velocity = jax.tree.map(lambda x: np.zeros(x.shape), variables["params"])
  totals = {name: [] for name in metrics.compute(run.start().sums)}
  for step, indices in enumerate(INDICES[:2]):
    pixels = np.asarray(run.data.images)[indices]
    labels = np.asarray(run.data.labels)[indices]
    augmented = augmentation(rng.stream(key, "augmentation", step), pixels)
    assert (np.asarray(augmented) != pixels).any()
    images = np.asarray(augmented).astype(np.float32) / 255
    gradient, outcome = gradient_and_outcome(variables, images, labels, step)
    rate = RATE if step < 1 else RATE / 10
    params = {}
    for layer, weights in variables["params"].items():
      params[layer] = {}
      for name, weight in weights.items():
        g = np.asarray(gradient[layer][name], np.float64)
        if name == "kernel":
          g = g + 0.01 * np.asarray(weight, np.float64)
        velocity[layer][name] = 0.9 * velocity[layer][name] + g
        params[layer][name] = weight - rate * velocity[layer][name]
    variables = {
      "params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params),
      "batch_stats": outcome.batch_stats,
    }
    totals["loss"].append(outcome.total)
    for name, term in outcome.terms.items():
      totals[name].append(term)
    for name, logits in (
      ("accuracy_clean", outcome.logits_clean),
      ("accuracy_adversarial", outcome.logits_adversarial),
    ):
      totals[name].append(np.asarray(logits).argmax(-1) == labels)
    squares = [
      np.square(np.asarray(g, np.float64)).sum()
      for g in jax.tree.leaves(gradient)
    ]
    totals["gradient_norm"].append([np.sqrt(sum(squares))])

  actual = _train(run, 2)
  assert int(actual.step) == 2
  _assert_close(actual.params, variables["params"], rtol=1e-4, atol=1e-5)
  _assert_close(
    actual.batch_stats, variables["batch_stats"], rtol=1e-4, atol=1e-5
  )
  assert set(actual.sums) == set(totals)
  for name, values in totals.items():
    values = np.concatenate(values).astype(np.float64)
    total, count = np.asarray(actual.sums[name])
    assert count == len(values), name
    np.testing.assert_allclose(total, values.sum(), rtol=1e-4, err_msg=name)
  assert all(first == NEVER for first in actual.nonfinite.values())


def test_several_steps_of_one_program_equal_steps_one_by_one(run, compilations):
  rows = np.stack(INDICES).astype(np.int32)
  rows = sharding.put_batch(run.mesh, rows, axis=1)
  before = None
  for count in (3, 2):
    arguments = run.start(), run.teacher, run.data, rows, None, np.int32(count)
    if before is None:
      expected = _train(run, count)
    else:
      expected, before = _train(run, count), compilations()
    actual = run.step(*arguments)
    if before is not None:
      assert compilations() == before  # the count is no part of the program
    before = compilations()
    assert int(actual.step) == count
    _assert_close(actual.params, expected.params, rtol=1e-4, atol=1e-5)
    _assert_close(actual.batch_stats, expected.batch_stats, rtol=1e-4)
    _assert_close(actual.sums, expected.sums, rtol=1e-4)


def test_rematerialisation_changes_no_result(run, small):
  remat = _make_run(
    small,
    jax.devices()[:1],
    padding=1,
    flip=True,
    options=Options(remat=True),
  )
  arguments = remat.start(), remat.teacher, remat.data, remat.put(INDICES[0])
  barrier = "optimization_barrier"  # how jax keeps XLA from merging the two
  assert barrier in remat.step.lower(*arguments).as_text()
  assert barrier not in run.step.lower(*arguments).as_text()
  actual, expected = _train(remat, 2), _train(run, 2)
  _assert_close(actual.params, expected.params, rtol=1e-4, atol=1e-5)


def test_a_profile_tells_the_parts_of_a_step(run):
  text = run.step.lower(
    run.start(), run.teacher, run.data, run.put(INDICES[0])
  ).as_text(debug_info=True)
  for scope in ("augmentation", "attack", "teacher", "student", "update"):
    assert f"/{scope}/" in text or f"({scope})/" in text, scope


def test_options_that_are_off_change_no_bit_of_a_step(small, monkeypatch):
  """Equal to a step without options, bit for bit."""
  # Without XLA's fusion emitters the two programs round differently.
  settings = dict(compilation.compiler_options())
  settings["xla_cpu_use_fusion_emitters"] = True
  monkeypatch.setattr(compilation, "compiler_options", lambda **_: settings)
  run = _make_run(small, jax.devices()[:1], padding=1, flip=True)
  model, _, _, _ = small
  objective = objectives.create(
    "atat", lambda1=0.7, lambda2=0.3, epsilon=0.1, step_size=0.04, num_steps=3
  )
  optimizer = optim.make_optimizer(
    optim.make_schedule(
      "piecewise", learning_rate=RATE, total_steps=9, boundaries=(1,)
    ),
    weight_decay=0.01,
  )

  def plain(current, teacher, data, indices):
    images = augment.pad_crop_flip(
      rng.stream(current.rng, "augmentation", current.step),
      data.images[indices],
      padding=1,
      flip=True,
    )
    batch = objectives.make_batch(
      augment.to_float(images), data.labels[indices], 3
    )
    prepared = objective.prepare(
      rng.stream(current.rng, "attack", current.step),
      model,
      state.variables(current),
      teacher,
      batch,
    )

    def mean_loss(params):
      outcome = objective.loss(
        model,
        {"params": params, "batch_stats": current.batch_stats},
        prepared,
        batch,
      )
      return outcome.total.mean(), outcome

    gradient, outcome = jax.grad(mean_loss, has_aux=True)(current.params)
    updates, opt_state = optimizer.update(
      gradient, current.opt_state, current.params
    )
    norm = optax.tree.norm(gradient)
    finite = {k: jnp.isfinite(v).all() for k, v in outcome.terms.items()}
    finite["gradient"] = jnp.isfinite(norm)
    values = {
      "loss": outcome.total,
      **outcome.terms,
      "accuracy_clean": outcome.logits_clean.argmax(-1) == batch.labels,
      "gradient_norm": norm[None],
      "accuracy_adversarial": outcome.logits_adversarial.argmax(-1)
      == batch.labels,
    }
    return current.replace(
      step=current.step + 1,
      params=optax.apply_updates(current.params, updates),
      batch_stats=outcome.batch_stats,
      opt_state=opt_state,
      sums=metrics.merge(current.sums, metrics.from_examples(values)),
      nonfinite={
        name: jnp.minimum(first, jnp.where(finite[name], NEVER, current.step))
        for name, first in current.nonfinite.items()
      },
    )

  compiled = compilation.jit(plain, out_shardings=sharding.replicated(run.mesh))
  expected = run.start()
  for indices in INDICES:
    expected = compiled(expected, run.teacher, run.data, run.put(indices))
  found = _train(run)
  assert found.ema is None
  for name in ("params", "batch_stats", "opt_state", "sums"):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(found, name),
      getattr(expected, name),
    )


def test_eight_devices_equal_one_and_trace_once(
  run, small, eight_devices, compilations
):
  eight = _make_run(small, eight_devices, padding=1, flip=True)
  inputs = [eight.put(indices) for indices in INDICES]
  assert len(inputs[0].sharding.device_set) == 8
  current = eight.step(eight.start(), eight.teacher, eight.data, inputs[0])
  traced, before = len(eight.traces), compilations()
  for indices in inputs[1:]:
    current = eight.step(current, eight.teacher, eight.data, indices)
  assert compilations() == before and len(eight.traces) == traced == 1
  for leaf in jax.tree.leaves(current):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8
  one = _train(run)
  tolerance = dict(rtol=1e-3, atol=1e-4)  # order of summation, three steps
  _assert_close(current.params, one.params, **tolerance)
  _assert_close(current.batch_stats, one.batch_stats, **tolerance)
  for name, sums in one.sums.items():
    np.testing.assert_allclose(
      current.sums[name], sums, rtol=1e-3, err_msg=name
    )


def test_state_is_donated_and_nothing_else(run, small):
  # The student starts as the teacher.
  teacher = jax.tree.map(jnp.copy, small.variables)
  key = jax.random.key(4)
  fresh = run.create(key, teacher)
  before = sharding.put_replicated(run.mesh, fresh)
  # Donating the state takes neither the caller's key nor its teacher away.
  after = run.step(before, teacher, run.data, run.put(INDICES[0]))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state))
  for leaf in jax.tree.leaves((teacher, run.data, after)):
    assert not leaf.is_deleted()
  assert np.isfinite(teacher["params"]["head"]["bias"]).all()
  np.testing.assert_array_equal(
    jax.random.key_data(key), jax.random.key_data(jax.random.key(4))
  )


def test_the_same_key_survives_a_run(run):
  after = _train(run, 1)
  key = jax.random.key_data(after.rng)
  np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(4)))


def test_resident_data_stay_uint8(run):
  current = run.start()
  compiled = run.step.__wrapped__  # the pure function
  inputs = current, run.teacher, run.data, run.put(INDICES[0])
  jaxpr = jax.make_jaxpr(compiled)(*inputs)
  whole = tuple(run.data.images.shape)
  floats = [
    str(equation)
    for equation in jaxpr.eqns
    for variable in equation.outvars
    if variable.aval.shape == whole and variable.aval.dtype != np.uint8
  ]
  assert run.data.images.dtype == np.uint8 and not floats


def test_a_step_is_a_function_of_its_state(run):
  """Twice the same from the same state: bit for bit on the CPU."""
  first, second = _train(run), _train(run)
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  jax.tree.map(np.testing.assert_array_equal, first.sums, second.sums)


def test_no_transfer_between_host_and_device(run):
  inputs = [run.put(indices) for indices in INDICES]
  current = run.step(run.start(), run.teacher, run.data, inputs[0])
  jax.block_until_ready(current)
  function = jax.jit(lambda x: x + 1)
  function(np.ones(3, np.float32))
  with jax.transfer_guard("disallow"):
    with pytest.raises(Exception, match="Disallowed host-to-device"):
      function(np.ones(3, np.float32))  # the guard does watch
    for indices in inputs[1:]:
      current = run.step(current, run.teacher, run.data, indices)
    jax.block_until_ready(current)
  assert int(current.step) == 3


def test_first_nonfinite_step_and_term_are_kept(run):
  """A teacher that is not finite for one step spoils what depends on it."""
  broken = jax.tree.map(jnp.copy, run.teacher)
  bias = broken["params"]["bn2"]["bias"]
  broken["params"]["bn2"]["bias"] = bias.at[0].set(np.inf)
  current = run.start()
  for teacher in (run.teacher, broken, run.teacher):
    current = run.step(current, teacher, run.data, run.put(INDICES[0]))
  # Step 1: the maps and their gradient. Step 2: the weights, so everything.
  assert jax.tree.map(int, current.nonfinite) == {
    "cross_entropy": 2,
    "attention": 1,
    "logit_pairing": 2,
    "gradient": 1,
  }
  assert not any(np.isfinite(x).all() for x in jax.tree.leaves(current.params))


def test_a_poisoned_weight_shows_at_once(run):
  current = run.start()
  kernel = current.params["conv1"]["kernel"]
  current.params["conv1"]["kernel"] = kernel.at[0, 0, 0, 0].set(np.nan)
  current = run.step(current, run.teacher, run.data, run.put(INDICES[0]))
  assert set(jax.tree.map(int, current.nonfinite).values()) == {0}


def test_standard_step_needs_no_teacher(small):
  run = _make_run(
    small, jax.devices()[:1], objective=objectives.create("standard")
  )
  losses = []
  current = run.start()
  indices = run.put(np.arange(16))
  for _ in range(30):
    previous = np.asarray(current.sums["loss"])
    current = run.step(current, None, run.data, indices)
    losses.append((np.asarray(current.sums["loss"]) - previous)[0] / BATCH)
  assert losses[-1] < 0.9 * losses[0]  # it learns
  assert run.traces == [1]
  assert "accuracy_adversarial" not in current.sums


def test_a_fresh_state_counts_nothing(small):
  model, variables, images, _ = small
  optimizer = optim.make_optimizer(lambda step: 0.1)

  def create(initial):
    return state.create(
      model,
      optimizer,
      jax.random.key(0),
      images[:1],
      metric_names=("loss",),
      term_names=("gradient",),
      initial=initial,
    )

  fresh = create(variables)
  assert int(fresh.step) == 0 and fresh.step.dtype == np.int32
  assert fresh.sums["loss"].tolist() == [0, 0]
  assert int(fresh.nonfinite["gradient"]) == NEVER
  jax.tree.map(
    np.testing.assert_array_equal, state.variables(fresh), dict(variables)
  )
  # Fresh variables make the same kind of state.
  other = jax.eval_shape(lambda: create(None))
  chex.assert_trees_all_equal_shapes_and_dtypes(other, fresh)
