"""The attack in training, and the contract of every registered objective.

Values and gradients are in `test_objective_values.py`, default hyperparameters
and refused ones in `test_methods.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn

from atat_jax import attention, objectives, optim, sharding, state, steps
from atat_jax.attacks import projected_gradient
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.objectives import adversarial, atat, base
from atat_jax.training import options

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
ATTACK = dict(epsilon=0.1, step_size=0.03, num_steps=3)
WEIGHTS = dict(weight=0.6, beta=3.0, lambda1=0.7, lambda2=0.3)


def _atat(**fields: Any) -> objectives.Objective:
  defaults = dict(lambda1=0.7, lambda2=0.3, **ATTACK)
  return objectives.create("atat", **defaults | fields)


def _batch(example: Any) -> objectives.Batch:
  num_classes = example.variables["params"]["head"]["bias"].size
  return objectives.make_batch(example.images, example.labels, num_classes)


def _assert_trees_close(actual: Any, expected: Any, **tolerance: Any) -> None:
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(
      ours,
      np.asarray(theirs.detach()),
      err_msg=jax.tree_util.keystr(path),
      **tolerance,
    )


# The attack in training.


@pytest.mark.parametrize(
  ("method", "mode", "moves", "scale"),
  [
    ("atat", "running", False, 1.0),
    ("atat", "batch", False, 0.5),
    ("atat", "batch", True, 1.0),
    ("trades", "running", False, 0.5),
    ("trades", "batch", True, 1.0),
  ],
  ids=["running", "batch", "moving", "kl", "kl-moving"],
)
def test_attack_and_its_statistics_equal_a_pytorch_loop(
  method, mode, moves, scale, small, twin, x64
):
  example = small.astype(np.float64)
  model, variables, images, labels = example
  weights = dict(lambda1=0.7, lambda2=0.3) if method == "atat" else {}
  objective = objectives.create(
    method,
    **ATTACK,
    **weights,
    attack_batch_norm=mode,
    attack_moves_statistics=moves,
  )
  # The attack uses the labels, not the targets of the cross-entropies.
  targets = jnp.full((8, 3), 1 / 3)
  batch = _batch(example)._replace(epsilon_scale=scale, targets=targets)
  attacked = quick.jit(
    lambda variables: objective.attack(KEY, model, variables, batch)
  )(variables)

  torch = twin.torch
  params, stats = (twin.tree(variables[n]) for n in ("params", "batch_stats"))
  clean, epsilon = np.asarray(images), scale * ATTACK["epsilon"]
  kl = method == "trades"
  if kl:  # of the start: 0.001 * N(0, 1), not clipped
    x = clean + 0.001 * np.asarray(jax.random.normal(KEY, clean.shape))
  else:
    x = np.asarray(
      projected_gradient.random_start(KEY, images, epsilon=epsilon)
    )
  target = twin.small(
    model, params, stats, torch.tensor(clean), train=mode == "batch"
  ).logits.softmax(1)
  for _ in range(ATTACK["num_steps"]):
    leaf = torch.tensor(x, requires_grad=True)
    result = twin.small(model, params, stats, leaf, train=mode == "batch")
    if kl:
      loss = torch.nn.functional.kl_div(
        result.logits.log_softmax(1), target, reduction="sum"
      )
    else:
      loss = torch.nn.functional.cross_entropy(
        result.logits, torch.tensor(np.array(labels)).long(), reduction="sum"
      )
    (gradient,) = torch.autograd.grad(loss, leaf)
    if moves:
      stats = result.stats
    x = x + scale * ATTACK["step_size"] * np.sign(gradient.numpy())
    x = np.clip(x, clean - epsilon, clean + epsilon)
    x = np.clip(x, 0, 1)
  np.testing.assert_allclose(attacked.images_adv, x, rtol=0, atol=1e-12)
  _assert_trees_close(dict(attacked.batch_stats), stats, rtol=1e-10)
  unmoved = jax.tree.map(
    np.array_equal, attacked.batch_stats, variables["batch_stats"]
  )
  assert all(jax.tree.leaves(unmoved)) != moves


# (objective, attack, its fields, radius of the start, step, radius of the clip),
# all in epsilons, as the authors' codes have them.
SINGLE = {
  "fgsm_rs": ("at", {}, 1.0, 1.25, 1.0),
  "fgsm_rs, step": ("at", {"single_step_size": 0.5}, 1.0, 0.5, 1.0),
  "n_fgsm": ("at", {}, 2.0, 1.0, np.inf),
  "n_fgsm, noise": ("atat", {"single_step_noise": 3.0}, 3.0, 1.0, np.inf),
  "n_fgsm, none": ("at", {"single_step_noise": 0.0}, 0.0, 1.0, np.inf),
  "n_fgsm, kl": ("trades", {}, 2.0, 1.0, np.inf),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_single_step_method_equals_its_authors_step_in_pytorch(
  case, small, twin, x64
):
  name, fields, start, step, clip = SINGLE[case]
  example = small.astype(np.float64)
  model, variables, images, labels = example
  # PGD's numbers are those of another attack, and must not count.
  objective = objectives.create(
    name,
    **ATTACK,
    **fields,
    attack_method=case.split(",")[0],
    attack_start="gaussian",
    attack_batch_norm="batch",
    attack_moves_statistics=True,
  )
  scale = 0.5
  batch = _batch(example)._replace(epsilon_scale=scale)
  attacked = quick.jit(
    lambda variables: objective.attack(KEY, model, variables, batch)
  )(variables)

  torch = twin.torch
  params, stats = (twin.tree(variables[n]) for n in ("params", "batch_stats"))
  clean = torch.tensor(np.asarray(images))
  epsilon = scale * ATTACK["epsilon"]
  draws = jax.random.uniform(KEY, images.shape, np.float64, -1.0, 1.0)
  delta = start * epsilon * torch.tensor(np.asarray(draws))
  delta = torch.clamp(delta, 0 - clean, 1 - clean).requires_grad_()
  target = None
  if objective.attack_loss == "kl":
    first = twin.small(model, params, stats, clean, train=True)
    target = first.logits.softmax(1)
  result = twin.small(model, params, stats, clean + delta, train=True)
  if target is None:
    y = torch.tensor(np.array(labels)).long()
    loss = torch.nn.functional.cross_entropy(result.logits, y)
  else:
    loss = torch.nn.functional.kl_div(
      result.logits.log_softmax(1), target, reduction="batchmean"
    )
  (gradient,) = torch.autograd.grad(loss, delta)
  moved = delta + step * epsilon * gradient.sign()
  moved = moved.clamp(-clip * epsilon, clip * epsilon)
  expected = clean + torch.clamp(moved, 0 - clean, 1 - clean)
  expected = expected.detach().numpy()
  np.testing.assert_allclose(attacked.images_adv, expected, rtol=0, atol=1e-12)
  _assert_trees_close(dict(attacked.batch_stats), result.stats, rtol=1e-10)
  assert attacked.finite.all()
  # The start, the step and the clip have all been felt.
  length = np.abs(expected - np.asarray(images)).max()
  assert length == pytest.approx(min(start + step, clip) * epsilon, rel=0.02)


def test_moved_statistics_are_where_the_students_pass_starts(small):
  """The pass on 2B images moves what the attack left, not the old ones."""
  model, variables, images, _ = small
  batch = _batch(small)
  objective = _atat(attack_moves_statistics=True)

  @quick.jit
  def run(variables):
    prepared = objective.prepare(KEY, model, variables, variables, batch)
    outcome = objective.loss(model, variables, prepared, batch)
    expected = model.apply(
      {**variables, "batch_stats": prepared.attack.batch_stats},
      jnp.concatenate([images, prepared.attack.images_adv]),
      train=True,
      mutable=["batch_stats"],
    )[1]
    return outcome, expected

  outcome, expected = run(variables)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    outcome.batch_stats,
    expected["batch_stats"],
  )


def test_norm_and_loss_reach_the_attack(small):
  model, variables, images, labels = small
  fields = dict(epsilon=0.4, step_size=0.2, num_steps=3, norm="l2")
  objective = _atat(**fields, attack_loss="margin")

  def logits_fn(state, x):
    logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, state

  @quick.jit
  def both(variables):
    start = projected_gradient.random_start(KEY, images, epsilon=0.4, norm="l2")
    expected, _ = projected_gradient.ascend(
      logits_fn, (), start, images, labels, **fields, loss="margin"
    )
    actual = objective.attack(KEY, model, variables, _batch(small))
    return actual.images_adv, expected, start

  actual, expected, start = both(variables)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  assert np.abs(actual - start).max() > 1e-3


# Where norms are zero.


class Plain(nn.Module):
  """No BatchNorm: teacher and student can agree exactly."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.tanh(nn.Conv(4, (3, 3), name="conv")(x))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_is_that_of_cross_entropy_where_nothing_differs(
  p, small, make_variables
):
  """Teacher equals student and the attack found nothing."""
  model, images, labels = Plain(), small.images, small.labels
  params = make_variables(model, images)["params"]
  objective = _atat(p=p)
  twice = jnp.concatenate([images, images]), jnp.concatenate([labels, labels])

  @quick.jit
  def gradients(params):
    # The pass that `loss` makes, so that the maps agree to the last bit.
    _, maps, _ = attention.forward(model, {"params": params}, *twice)
    teacher_maps = jax.tree.map(lambda m: jax.lax.stop_gradient(m[:8]), maps)

    def total(params):
      outcome = objective.loss(
        model,
        {"params": params},
        atat.PreparedATAT(
          adversarial.InnerAttackResult(images, {}), teacher_maps
        ),
        objectives.make_batch(images, labels, 3),
      )
      return outcome.total.mean(), outcome

    def cross_entropy(params):
      log_softmax = nn.log_softmax(model.apply({"params": params}, images))
      return -log_softmax[jnp.arange(8), labels].mean()

    return jax.grad(total, has_aux=True)(params), jax.grad(cross_entropy)(
      params
    )

  (gradient, outcome), expected = gradients(params)
  assert (outcome.terms["attention"] == 0).all()
  assert (outcome.terms["logit_pairing"] == 0).all()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    gradient,
    expected,
  )


# The contract.


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_keeps_the_contract(name, small):
  """Per example, terms as announced, statistics moved, gradient finite."""
  # Weights that differ, so that none can stand for another.
  weights = {
    field: value
    for field, value in WEIGHTS.items()
    if field in objectives.defaults(name)
  }
  objective = objectives.create(name, **weights)
  model, variables, *_ = small
  batch = _batch(small)
  teacher = variables if objective.needs_teacher else None

  @quick.jit
  def run(params):
    student = {**variables, "params": params}
    prepared = objective.prepare(KEY, model, student, teacher, batch)

    def mean_total(params):
      outcome = objective.loss(
        model, {**variables, "params": params}, prepared, batch
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, outcome = run(variables["params"])
  assert isinstance(outcome, base.Outcome)
  assert set(outcome.terms) == set(objective.term_names)
  for value in (outcome.total, *outcome.terms.values()):
    assert value.shape == (8,) and np.isfinite(value).all()
  for logits, there in (
    (outcome.logits_clean, objective.sees_clean),
    (outcome.logits_adversarial, objective.attacks),
  ):
    assert (logits is not None) == there
    assert logits is None or logits.shape == (8, 3)
  # The total is the sum of weight * term for every example.
  assert set(objective.term_weights) == set(objective.term_names)
  total = sum(
    objective.term_weights[name] * np.float64(value)
    for name, value in outcome.terms.items()
  )
  np.testing.assert_allclose(outcome.total, total, rtol=1e-5)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).all()),
    outcome.batch_stats,
    variables["batch_stats"],
  )
  assert all(jax.tree.leaves(moved))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
  again = objectives.create(name, **objectives.defaults(name) | weights)
  assert objective == again and hash(objective) == hash(again)


def test_unknown_method_missing_teacher_and_missing_layer(small):
  with pytest.raises(
    UserError, match=r"method: 'at7'; allowed: .*atat.*standa"
  ):
    objectives.create("at7")
  model, variables, *_ = small
  batch = _batch(small)
  with pytest.raises(UserError, match="teacher: None; allowed: "):
    _atat().prepare(KEY, model, variables, None, batch)
  with pytest.raises(UserError, match="layers: 'top'; allowed: conv1, bn1"):
    _atat(layers=("top",)).prepare(KEY, model, variables, variables, batch)


def test_weights_of_zero_leave_cross_entropy_alone(small):
  model, variables, images, _ = small
  objective = _atat(lambda1=0.0, lambda2=0.0)
  teacher_maps = {"bn2": jnp.ones((8, 3, 3))}
  prepared = atat.PreparedATAT(
    adversarial.InnerAttackResult(images, variables["batch_stats"]),
    teacher_maps,
  )
  outcome = quick.jit(
    lambda variables: objective.loss(model, variables, prepared, _batch(small))
  )(variables)
  assert (outcome.terms["attention"] > 0).all()
  np.testing.assert_array_equal(outcome.total, outcome.terms["cross_entropy"])


# Another method.


@dataclasses.dataclass(frozen=True)
class Inverted:
  """Cross-entropy of negatives: a method as somebody else would add it."""

  weight: float = 1.0

  needs_teacher = False
  starts_from_teacher = False
  sees_clean = False
  attacks = True
  term_names = ("cross_entropy",)

  def prepare(self, key, model, variables, teacher, batch):
    return 1.0 - batch.images

  def loss(self, model, variables, prepared, batch):
    logits, moved = model.apply(
      variables, prepared, train=True, mutable=["batch_stats"]
    )
    log_softmax = jax.nn.log_softmax(logits)
    cross_entropy = -(batch.targets * log_softmax).sum(-1)
    return base.Outcome(
      total=self.weight * cross_entropy,
      terms={"cross_entropy": cross_entropy},
      batch_stats=moved["batch_stats"],
      logits_clean=None,
      logits_adversarial=logits,
    )


def test_an_objective_is_one_class_and_one_line(small, monkeypatch):
  """Registered, it is created by its name, checked and trained."""
  monkeypatch.setitem(objectives.OBJECTIVES, "inverted", Inverted)
  with pytest.raises(UserError, match="'inverted': 'width'; allowed: weight"):
    objectives.create("inverted", width=1)
  objective = objectives.create("inverted", weight=2.0)
  model, variables, images, labels = small
  mesh = sharding.make_mesh(jax.devices()[:1])
  optimizer = optim.make_optimizer(lambda step: 0.1)
  current = state.create(
    model,
    optimizer,
    KEY,
    images[:1],
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    initial=variables,
  )
  step = steps.make_train_step(
    model, objective, optimizer, mesh=mesh, num_classes=3
  )
  data = Split(np.asarray(images * 255).astype(np.uint8), np.asarray(labels))
  losses = []
  for _ in range(10):
    before = np.asarray(current.sums["loss"])
    current = step(current, None, data, np.arange(8))
    losses.append((np.asarray(current.sums["loss"]) - before)[0] / 8)
  assert losses[-1] < 0.9 * losses[0]
  sums = current.sums
  assert set(sums) == {
    "loss",
    "cross_entropy",
    "accuracy_adversarial",
    "gradient_norm",
  }
  total, term = np.asarray(sums["loss"]), np.asarray(sums["cross_entropy"])
  np.testing.assert_allclose(total, term * [2, 1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_goes_with_every_option_and_on_eight_devices(
  name, small, eight_devices
):
  objective = objectives.create(name)
  model, variables, images, _ = small
  optimizer = optim.make_optimizer(lambda step: 0.1)
  generator = np.random.default_rng(6)
  data = Split(
    generator.integers(0, 256, (32, *images.shape[1:]), dtype=np.uint8),
    generator.integers(0, 3, 32).astype(np.int32),
  )

  def train(devices, **fields):
    mesh = sharding.make_mesh(devices)
    chosen = options.Options(**fields)
    current = state.create(
      model,
      optimizer,
      KEY,
      images[:1],
      metric_names=steps.metric_names(objective),
      term_names=steps.term_names(objective),
      initial=variables,
      averages=chosen.averages,
    )
    step = steps.make_train_step(
      model,
      objective,
      optimizer,
      mesh=mesh,
      num_classes=3,
      options=chosen,
    )
    current, teacher, split = sharding.put_replicated(
      mesh, (current, variables if objective.needs_teacher else None, data)
    )
    for indices in np.arange(32, dtype=np.int32).reshape(2, 16):
      batch = sharding.put_batch(mesh, indices)
      current = step(current, teacher, split, batch)
    assert all(first == state.NEVER for first in current.nonfinite.values())
    return current

  one, eight = train(eight_devices[:1]), train(eight_devices)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    (eight.params, eight.batch_stats),
    (one.params, one.batch_stats),
  )
  everything = train(
    eight_devices[:1],
    awp_gamma=0.01,
    ema_decay=0.9,
    label_smoothing=0.1,
    epsilon_warmup=3,
    accumulate_steps=2,
    mix="cutmix",
  )
  for leaf in jax.tree.leaves((everything.params, everything.ema)):
    assert np.isfinite(leaf).all()
  assert everything.sums["loss"][1] == 32
