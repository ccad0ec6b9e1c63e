"""Eq. (5) to (7) and their gradients against PyTorch, in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import attention, objectives
from atat_jax.attacks import projected_gradient
from atat_jax.errors import UserError
from atat_jax.objectives import atat, base

# Compiling is most of the time that these tests take, running none of it.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

KEY = jax.random.key(5)
LAMBDA1, LAMBDA2 = 0.7, 0.3
ATTACK = dict(epsilon=0.1, step_size=0.03, num_steps=3)


def _atat(**fields: Any) -> objectives.Objective:
  defaults = dict(lambda1=LAMBDA1, lambda2=LAMBDA2, **ATTACK)
  return objectives.create("atat", **defaults | fields)


def _batch(example: Any) -> objectives.Batch:
  num_classes = example.variables["params"]["head"]["bias"].size
  return objectives.make_batch(example.images, example.labels, num_classes)


class Expected(NamedTuple):
  """Eq. (7) in PyTorch."""

  terms: dict[str, Any]
  total: Any
  gradient: Any
  stats: Any
  logits: Any


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


def _pytorch_atat(
  torch, network, student, teacher, images, images_adv, labels, *, p, layers
):
  """The method from the paper's equations; `network` is a twin."""
  x, x_adv = (torch.tensor(np.array(v)) for v in (images, images_adv))
  y = torch.tensor(np.array(labels)).long()

  def attention_maps(result, y):
    chosen = result.logits[torch.arange(len(y)), y].sum()
    maps = {}
    for layer in layers:
      tensor = result.activations[layer]
      (slope,) = torch.autograd.grad(chosen, tensor, create_graph=True)
      weights = slope.mean((2, 3))
      maps[layer] = torch.einsum("bchw,bc->bhw", tensor, weights).relu()
    return maps

  for leaf in jax.tree.leaves(teacher["params"]):
    leaf.requires_grad_(True)  # only so that its maps can be asked for
  teacher_maps = attention_maps(
    network(teacher["params"], teacher["batch_stats"], x, train=False), y
  )
  for leaf in jax.tree.leaves(student["params"]):
    leaf.requires_grad_(True)
  both = network(
    student["params"],
    student["batch_stats"],
    torch.cat([x, x_adv]),
    train=True,
  )
  maps = attention_maps(both, torch.cat([y, y]))
  clean, adversarial = both.logits.chunk(2)

  def length(difference, p):
    return torch.linalg.vector_norm(difference.flatten(1), ord=p, dim=1)

  mixture = torch.nn.functional.cross_entropy(
    both.logits, torch.cat([y, y]), reduction="none"
  )
  cross_entropy = mixture.reshape(2, -1).mean(0)
  transfer = 0
  for layer in layers:
    map_clean, map_adversarial = maps[layer].chunk(2)
    target = teacher_maps[layer].detach()
    transfer = transfer + length(target - map_adversarial, p)
    transfer = transfer + length(target - map_clean, p)
  pairing = length(clean - adversarial, 2)
  total = cross_entropy + LAMBDA1 * transfer + LAMBDA2 * pairing
  total.mean().backward()
  return Expected(
    {
      "cross_entropy": cross_entropy,
      "attention": transfer,
      "logit_pairing": pairing,
    },
    total,
    jax.tree.map(lambda leaf: leaf.grad, student["params"]),
    both.stats,
    both.logits,
  )


def _check_against_pytorch(example, network, twin, make_variables, p, layers):
  model, variables, images, labels = example
  teacher = make_variables(model, images, seed=9, dtype=np.float64)
  noise = np.random.default_rng(2).uniform(-0.1, 0.1, images.shape)
  images_adv = jnp.asarray(np.clip(np.asarray(images) + noise, 0, 1))
  objective = _atat(p=p, layers=layers)
  batch = _batch(example)
  names = layers or attention.layer_names(model, variables, images)[-1:]

  @jit
  def ours(params):
    maps = attention.forward(model, teacher, images, labels, layers=names)[1]

    def mean_total(params):
      outcome = objective.loss(
        model,
        {**variables, "params": params},
        atat.Prepared(images_adv, variables["batch_stats"], maps),
        batch,
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, outcome = ours(variables["params"])
  expected = _pytorch_atat(
    twin.torch,
    lambda params, stats, x, train: network(
      model, params, stats, x, train=train
    ),
    twin.tree(variables),
    twin.tree(teacher),
    images,
    images_adv,
    labels,
    p=p,
    layers=names,
  )
  tolerance = dict(rtol=1e-8, atol=1e-10)
  assert set(outcome.terms) == set(objective.term_names)
  for name, term in expected.terms.items():
    assert outcome.terms[name].shape == (len(labels),)
    assert term.abs().min() > 1e-4  # the term is there
    np.testing.assert_allclose(
      outcome.terms[name], term.detach(), err_msg=name, **tolerance
    )
  np.testing.assert_allclose(
    outcome.total, expected.total.detach(), **tolerance
  )
  _assert_trees_close(gradient, expected.gradient, **tolerance)
  _assert_trees_close(dict(outcome.batch_stats), expected.stats, **tolerance)
  np.testing.assert_allclose(
    np.concatenate([outcome.logits_clean, outcome.logits_adversarial]),
    expected.logits.detach(),
    **tolerance,
  )


@pytest.mark.parametrize("layers", [(), ("conv1", "bn2")], ids=["top", "two"])
@pytest.mark.parametrize("p", [1, 2])
def test_atat_equals_pytorch(p, layers, small, twin, make_variables, x64):
  example = small.astype(np.float64)
  _check_against_pytorch(example, twin.small, twin, make_variables, p, layers)


def test_atat_of_the_wide_resnet_equals_pytorch(wrn, twin, make_variables, x64):
  _check_against_pytorch(
    wrn.astype(np.float64), twin.wide_resnet, twin, make_variables, 2, ()
  )


def test_standard_equals_pytorch(small, twin, x64):
  example = small.astype(np.float64)
  model, variables, images, labels = example
  batch = _batch(example)
  objective = objectives.create("standard")

  @jit
  def ours(params):
    def mean_total(params):
      outcome = objective.loss(
        model, {**variables, "params": params}, None, batch
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, outcome = ours(variables["params"])
  torch = twin.torch
  params = twin.tree(variables["params"], requires_grad=True)
  result = twin.small(
    model,
    params,
    twin.tree(variables["batch_stats"]),
    torch.tensor(np.array(images)),
    train=True,
  )
  expected = torch.nn.functional.cross_entropy(
    result.logits, torch.tensor(np.array(labels)).long(), reduction="none"
  )
  expected.mean().backward()
  np.testing.assert_allclose(outcome.total, expected.detach(), rtol=1e-10)
  assert list(outcome.terms) == ["cross_entropy"]
  np.testing.assert_array_equal(outcome.terms["cross_entropy"], outcome.total)
  _assert_trees_close(
    gradient,
    jax.tree.map(lambda leaf: leaf.grad, params),
    rtol=1e-8,
    atol=1e-12,
  )
  _assert_trees_close(dict(outcome.batch_stats), result.stats, rtol=1e-10)
  assert outcome.logits_adversarial is None
  prepared = objective.prepare(KEY, model, variables, None, batch)
  assert prepared is None


# The attack in training.


@pytest.mark.parametrize(
  ("mode", "moves"),
  [("running", False), ("batch", False), ("batch", True)],
  ids=["running", "batch", "moving"],
)
def test_attack_and_its_statistics_equal_a_pytorch_loop(
  mode, moves, small, twin, make_variables, x64
):
  example = small.astype(np.float64)
  model, variables, images, labels = example
  teacher = make_variables(model, images, seed=9, dtype=np.float64)
  objective = _atat(attack_batch_norm=mode, attack_moves_statistics=moves)
  prepared = jit(
    lambda variables, teacher: objective.prepare(
      KEY, model, variables, teacher, _batch(example)
    )
  )(variables, teacher)

  torch = twin.torch
  params, stats = (twin.tree(variables[n]) for n in ("params", "batch_stats"))
  x = np.asarray(
    projected_gradient.random_start(KEY, images, epsilon=ATTACK["epsilon"])
  )
  clean = np.asarray(images)
  for _ in range(ATTACK["num_steps"]):
    leaf = torch.tensor(x, requires_grad=True)
    result = twin.small(model, params, stats, leaf, train=mode == "batch")
    loss = torch.nn.functional.cross_entropy(
      result.logits, torch.tensor(np.array(labels)).long(), reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    if moves:
      stats = result.stats
    x = x + ATTACK["step_size"] * np.sign(gradient.numpy())
    x = np.clip(x, clean - ATTACK["epsilon"], clean + ATTACK["epsilon"])
    x = np.clip(x, 0, 1)
  np.testing.assert_allclose(prepared.images_adv, x, rtol=0, atol=1e-12)
  _assert_trees_close(dict(prepared.batch_stats), stats, rtol=1e-10)
  unmoved = jax.tree.map(
    np.array_equal, prepared.batch_stats, variables["batch_stats"]
  )
  assert all(jax.tree.leaves(unmoved)) != moves

  # The teacher: clean images, its own running statistics.
  result = twin.small(
    model,
    twin.tree(teacher["params"], requires_grad=True),
    twin.tree(teacher["batch_stats"]),
    torch.tensor(clean),
    train=False,
  )
  chosen = result.logits[torch.arange(8), torch.tensor(np.array(labels)).long()]
  tensor = result.activations["bn2"]
  (slope,) = torch.autograd.grad(chosen.sum(), tensor)
  expected = torch.einsum("bchw,bc->bhw", tensor, slope.mean((2, 3))).relu()
  assert list(prepared.teacher_maps) == ["bn2"]
  np.testing.assert_allclose(
    prepared.teacher_maps["bn2"], expected.detach(), rtol=1e-8, atol=1e-12
  )


def test_moved_statistics_are_where_the_students_pass_starts(small):
  """The pass on 2B images moves what the attack left, not the old ones."""
  model, variables, images, _ = small
  batch = _batch(small)
  objective = _atat(attack_moves_statistics=True)

  @jit
  def run(variables):
    prepared = objective.prepare(KEY, model, variables, variables, batch)
    outcome = objective.loss(model, variables, prepared, batch)
    expected = model.apply(
      {**variables, "batch_stats": prepared.batch_stats},
      jnp.concatenate([images, prepared.images_adv]),
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


@pytest.mark.parametrize(
  "fields",
  [dict(norm="l2", epsilon=0.4, step_size=0.2), dict(attack_loss="margin")],
  ids=["l2", "margin"],
)
def test_attack_fields_reach_the_attack(fields, small):
  model, variables, images, labels = small

  def prepare(**fields):
    objective = _atat(**fields)
    return jit(
      lambda variables: objective.prepare(
        KEY, model, variables, variables, _batch(small)
      )
    )(variables)

  images_adv = prepare(**fields).images_adv
  start = projected_gradient.random_start(
    KEY,
    images,
    epsilon=fields.get("epsilon", ATTACK["epsilon"]),
    norm=fields.get("norm", "linf"),
  )

  def logits_fn(state, x):
    logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, state

  arguments = ATTACK | {
    {"attack_loss": "loss"}.get(name, name): value
    for name, value in fields.items()
  }
  expected = jit(
    lambda start: projected_gradient.ascend(
      logits_fn, (), start, images, labels, **arguments
    )[0]
  )(start)
  np.testing.assert_allclose(images_adv, expected, atol=1e-5)
  assert np.abs(images_adv - prepare().images_adv).max() > 1e-3


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

  @jit
  def gradients(params):
    # The pass that `loss` makes, so that the maps agree to the last bit.
    _, maps, _ = attention.forward(model, {"params": params}, *twice)
    teacher_maps = jax.tree.map(lambda m: jax.lax.stop_gradient(m[:8]), maps)

    def total(params):
      outcome = objective.loss(
        model,
        {"params": params},
        atat.Prepared(images, {}, teacher_maps),
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


# The contract, and errors.


def _create(name: str) -> objectives.Objective:
  """With values for the fields that have none, by their names."""
  values = dict(lambda1=1.0, lambda2=1.0, **ATTACK)
  known = objectives.OBJECTIVES[name].__dataclass_fields__
  return objectives.create(
    name, **{key: value for key, value in values.items() if key in known}
  )


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_keeps_the_contract(name, small):
  """Per example, terms as announced, statistics moved, gradient finite."""
  objective = _create(name)
  model, variables, *_ = small
  batch = _batch(small)
  teacher = variables if objective.needs_teacher else None

  @jit
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
  assert outcome.logits_clean.shape == (8, 3)
  assert (outcome.logits_adversarial is not None) == objective.attacks
  moved = jax.tree.map(
    lambda a, b: bool((a != b).all()),
    outcome.batch_stats,
    variables["batch_stats"],
  )
  assert all(jax.tree.leaves(moved))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
  assert objective == _create(name) and hash(objective) == hash(_create(name))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(epsilon=0.0), "epsilon: 0.0; allowed: a number > 0"),
    (dict(epsilon=float("nan")), "epsilon: nan; allowed: a number > 0"),
    (dict(epsilon=8), "epsilon: 8; allowed: at most 1 for linf"),
    (dict(step_size=-1), "step_size: -1; allowed: a number > 0"),
    (dict(num_steps=0), "num_steps: 0; allowed: an integer > 0"),
    (dict(num_steps=1.5), "num_steps: 1.5; allowed: an integer > 0"),
    (dict(lambda1=-0.1), "lambda1: -0.1; allowed: >= 0"),
    (dict(lambda2=float("inf")), "lambda2: inf; allowed: >= 0"),
    (dict(lambda2=float("nan")), "lambda2: nan; allowed: >= 0"),
    (dict(p=3), "p: 3; allowed: 1, 2"),
    (dict(norm="l0"), "norm: 'l0'; allowed: l1, l2, linf"),
    (
      dict(attack_loss="kl"),
      "attack_loss: 'kl'; allowed: cross_entropy, dlr, margin",
    ),
    (
      dict(attack_batch_norm="train"),
      "attack_batch_norm: 'train'; allowed: batch, running",
    ),
    (
      dict(attack_batch_norm="running", attack_moves_statistics=True),
      "attack_moves_statistics: True; allowed: False where",
    ),
    (dict(lambda3=1.0), "hyperparameter of 'atat': 'lambda3'; allowed: "),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_hyperparameters_are_named(fields, message):
  with pytest.raises(UserError) as error:
    _atat(**fields)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


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
  prepared = atat.Prepared(images, variables["batch_stats"], teacher_maps)
  outcome = jit(
    lambda variables: objective.loss(model, variables, prepared, _batch(small))
  )(variables)
  assert (outcome.terms["attention"] > 0).all()
  np.testing.assert_array_equal(outcome.total, outcome.terms["cross_entropy"])
