"""Every objective's terms and gradient against PyTorch, in float64.

The adversarial images are given, the targets are not one-hot: cross-entropies
aim at them, everything else at the labels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import attention, objectives
from atat_jax.objectives import adversarial, atat, atat_released, tla

# Compiling is most of the time that these tests take, running none of it.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

ATTACK = dict(epsilon=0.1, step_size=0.03, num_steps=3)
TOLERANCE = dict(rtol=1e-8, atol=1e-10)


class Student(NamedTuple):
  """What the student makes of both batches, in PyTorch.

  Attributes:
    clean: Logits.
    adversarial: Logits.
    maps_clean: {layer: [B, h, w]}.
    maps_adversarial: The same.
    embedded_clean: {layer: [B, C]}, pooled activations.
    embedded_adversarial: The same.
    stats: Running statistics after both.
  """

  clean: Any
  adversarial: Any
  maps_clean: dict[str, Any]
  maps_adversarial: dict[str, Any]
  embedded_clean: dict[str, Any]
  embedded_adversarial: dict[str, Any]
  stats: Any


class Case(NamedTuple):
  """What a method's formula is given, in PyTorch."""

  torch: Any
  student: Student
  teacher: Student
  """Its clean half is all there is of it."""
  targets: Any
  labels: list[int]
  y: Any

  def cross_entropy(self, logits: Any) -> Any:
    return -(self.targets * logits.log_softmax(1)).sum(1)

  def length(self, difference: Any, p: int = 2) -> Any:
    return self.torch.linalg.vector_norm(difference.flatten(1), ord=p, dim=1)


Formula = Callable[[Case], tuple[dict[str, Any], Any]]
"""To terms and total."""


def _maps(torch: Any, result: Any, y: Any, kind: str) -> dict[str, Any]:
  chosen = result.logits[torch.arange(len(y)), y].sum()
  maps = {}
  for layer, tensor in result.activations.items():
    if kind == "channel_sum":
      maps[layer] = tensor.abs().sum(1)
      continue
    (slope,) = torch.autograd.grad(
      chosen, tensor, create_graph=True, allow_unused=True
    )
    weights = slope.mean((2, 3))
    maps[layer] = torch.einsum("bchw,bc->bhw", tensor, weights).relu()
  return maps


def _look(
  torch: Any,
  passes: Callable[[Any, Any], Any],
  stats: Any,
  x: Any,
  x_adv: Any,
  y: Any,
  mode: str,
  kind: str,
) -> Student:
  def one(stats: Any, x: Any, y: Any) -> tuple[Any, ...]:
    result = passes(stats, x)
    embedded = {k: v.mean((2, 3)) for k, v in result.activations.items()}
    maps = _maps(torch, result, y, kind)
    return (result.logits, maps, embedded), result.stats

  if mode == "mixture":
    (logits, maps, embedded), stats = one(
      stats, torch.cat([x, x_adv]), torch.cat([y, y])
    )
    halves = [
      (
        logits.chunk(2)[half],
        {k: v.chunk(2)[half] for k, v in maps.items()},
        {k: v.chunk(2)[half] for k, v in embedded.items()},
      )
      for half in (0, 1)
    ]
  else:
    clean, moved = one(stats, x, y)
    if mode == "in_turn":
      stats = moved
    adversarial, stats = one(stats, x_adv, y)
    halves = [clean, adversarial]
  (clean, adversarial) = halves
  return Student(
    clean[0],
    adversarial[0],
    clean[1],
    adversarial[1],
    clean[2],
    adversarial[2],
    stats,
  )


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


def _check(
  objective: Any,
  example: Any,
  network: Any,
  twin: Any,
  make_variables: Any,
  prepare: Callable[[Any, Any], Any],
  formula: Formula,
  *,
  kind: str = "grad_cam",
  adversarial_only: bool = False,
) -> Any:
  """`prepare`: (attacked, function of the teacher) to the method's Prepared."""
  model, variables, images, labels = example
  teacher = make_variables(model, images, seed=9, dtype=np.float64)
  generator = np.random.default_rng(2)
  noise = generator.uniform(-0.1, 0.1, images.shape)
  images_adv = jnp.asarray(np.clip(np.asarray(images) + noise, 0, 1))
  num_classes = variables["params"]["head"]["bias"].size
  targets = generator.dirichlet(np.ones(num_classes), len(labels))
  batch = objectives.Batch(images, labels, jnp.asarray(targets), 1.0)

  @jit
  def ours(params, teacher):
    attacked = adversarial.InnerAttackResult(
      images_adv, variables["batch_stats"]
    )
    prepared = prepare(
      attacked,
      lambda **options: attention.forward(
        model, teacher, images, labels, **options
      ),
    )

    def mean_total(params):
      outcome = objective.loss(
        # The statistics that count are those after the attack.
        model,
        {"params": params, "batch_stats": teacher["batch_stats"]},
        prepared,
        batch,
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, outcome = ours(variables["params"], teacher)

  torch = twin.torch
  x, x_adv = (torch.tensor(np.array(v)) for v in (images, images_adv))
  y = torch.tensor(np.array(labels)).long()
  params = twin.tree(variables["params"], requires_grad=True)
  frozen = twin.tree(teacher["params"], requires_grad=True)
  student = _look(
    torch,
    lambda stats, x: network(model, params, stats, x, train=True),
    twin.tree(variables["batch_stats"]),
    x,
    x_adv,
    y,
    "in_turn"
    if adversarial_only
    else getattr(objective, "student_batch_norm", "mixture"),
    kind,
  )
  if adversarial_only:
    alone = network(
      model, params, twin.tree(variables["batch_stats"]), x_adv, train=True
    )
    student = student._replace(adversarial=alone.logits, stats=alone.stats)
  teachers = _look(
    torch,
    lambda stats, x: network(model, frozen, stats, x, train=False),
    twin.tree(teacher["batch_stats"]),
    x,
    x,
    y,
    "in_turn",
    kind,
  )
  detached = teachers._replace(
    clean=teachers.clean.detach(),
    maps_clean={k: v.detach() for k, v in teachers.maps_clean.items()},
  )
  terms, total = formula(
    Case(torch, student, detached, torch.tensor(targets), labels.tolist(), y)
  )
  total.mean().backward()

  assert set(outcome.terms) == set(objective.term_names) == set(terms)
  for name, term in terms.items():
    assert outcome.terms[name].shape == (len(labels),)
    assert term.abs().max() > 1e-4 or "transfer" in name  # the term is there
    np.testing.assert_allclose(
      outcome.terms[name], term.detach(), err_msg=name, **TOLERANCE
    )
  np.testing.assert_allclose(outcome.total, total.detach(), **TOLERANCE)
  _assert_trees_close(
    gradient, jax.tree.map(lambda leaf: leaf.grad, params), **TOLERANCE
  )
  _assert_trees_close(dict(outcome.batch_stats), student.stats, **TOLERANCE)
  np.testing.assert_allclose(
    outcome.logits_adversarial, student.adversarial.detach(), **TOLERANCE
  )
  if objective.sees_clean:
    np.testing.assert_allclose(
      outcome.logits_clean, student.clean.detach(), **TOLERANCE
    )
  else:
    assert outcome.logits_clean is None
  return outcome


def _attacked_only(attacked: Any, teacher: Any) -> Any:
  del teacher
  return attacked


# Peers.


def _at(case):
  cross_entropy = case.cross_entropy(case.student.adversarial)
  return {"cross_entropy": cross_entropy}, cross_entropy


def _mixture(case):
  clean, adversarial = case.student[:2]
  return (case.cross_entropy(clean) + case.cross_entropy(adversarial)) / 2


def _alp(case):
  mixture = _mixture(case)
  pairing = (case.student.clean - case.student.adversarial).square().mean(1)
  terms = {"cross_entropy": mixture, "logit_pairing": pairing}
  return terms, mixture + 0.5 * pairing


def _kl(case):
  """KL(clean || adversarial), by PyTorch's own function."""
  clean, adversarial = case.student[:2]
  return case.torch.nn.functional.kl_div(
    adversarial.log_softmax(1), clean.softmax(1), reduction="none"
  ).sum(1)


def _trades(case):
  cross_entropy, kl = case.cross_entropy(case.student.clean), _kl(case)
  return {"cross_entropy": cross_entropy, "kl": kl}, cross_entropy + 6 * kl


def _mart(case):
  clean, adversarial = case.student[:2]
  cross_entropy = case.cross_entropy(adversarial)
  probabilities = adversarial.softmax(1)
  margins = []
  for row, label in zip(probabilities, case.labels, strict=True):
    runner_up = max(row[k] for k in range(len(row)) if k != label)
    margins.append(-(1.0001 - runner_up).log())
  margin = case.torch.stack(margins)
  doubt = 1 - clean.softmax(1).gather(1, case.y[:, None])[:, 0]
  kl = _kl(case) * doubt
  terms = {"cross_entropy": cross_entropy, "margin": margin, "kl": kl}
  return terms, cross_entropy + margin + 6 * kl


PEERS: dict[str, tuple[str, dict[str, Any], Formula]] = {
  "at": ("at", {}, _at),
  "alp": ("alp", {}, _alp),
  "alp-separate": ("alp", {"student_batch_norm": "separate"}, _alp),
  "trades": ("trades", {}, _trades),
  "mart": ("mart", {}, _mart),
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_equal_pytorch(name, small, twin, make_variables, x64):
  method, fields, formula = PEERS[name]
  _check(
    objectives.create(method, **ATTACK, **fields),
    small.astype(np.float64),
    twin.small,
    twin,
    make_variables,
    _attacked_only,
    formula,
    adversarial_only=method == "at",
  )


def test_standard_equals_pytorch(small, twin, x64):
  model, variables, images, labels = small.astype(np.float64)
  objective = objectives.create("standard")
  targets = np.random.default_rng(2).dirichlet(np.ones(3), 8)
  batch = objectives.Batch(images, labels, jnp.asarray(targets), 1.0)

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
    result.logits, torch.tensor(targets), reduction="none"
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


# TLA.


def _tla(case, *, layer, relatives, margin, lambda1, lambda2):
  torch, student = case.torch, case.student
  anchors = student.embedded_adversarial[layer]
  embedded = student.embedded_clean[layer]

  def cosine(a, b):
    return torch.dot(a, b) / (a.norm() * b.norm())

  triplets, squares = [], []
  for i, label in enumerate(case.labels):
    others = [j for j, other in enumerate(case.labels) if other != label]
    hardest = max(others, key=lambda j: cosine(anchors[i], embedded[j]).item())
    triplet = square = 0
    for j in (i, relatives[i]):
      near = 1 - cosine(anchors[i], embedded[j]).abs()
      far = 1 - cosine(anchors[i], embedded[hardest]).abs()
      triplet = triplet + (near - far + margin).clamp(min=0)
      parts = (anchors[i], embedded[j], embedded[hardest])
      square = square + sum(part.square() for part in parts).mean()
    triplets.append(triplet)
    squares.append(square)
  triplet, square = torch.stack(triplets), torch.stack(squares)
  assert (triplet > 0).any() and (triplet == 0).any()
  cross_entropy = case.cross_entropy(student.adversarial)
  terms = {
    "cross_entropy": cross_entropy,
    "triplet": triplet,
    "embedding_square": square,
  }
  return terms, cross_entropy + lambda1 * triplet + lambda2 * square


@pytest.mark.parametrize(
  ("layer", "mode"), [("", "in_turn"), ("bn1", "mixture")], ids=["top", "bn1"]
)
def test_tla_equals_pytorch(layer, mode, small, twin, make_variables, x64):
  example = small.astype(np.float64)
  # Another of the class: the next one, around the corner.
  labels = example.labels.tolist()
  relatives = [
    next(j % 8 for j in range(i + 1, i + 9) if labels[j % 8] == labels[i])
    for i in range(8)
  ]
  assert relatives != list(range(8))
  weights = dict(margin=0.03, lambda1=2.0, lambda2=0.1)
  _check(
    objectives.create(
      "tla", **ATTACK, **weights, layer=layer, student_batch_norm=mode
    ),
    example,
    twin.small,
    twin,
    make_variables,
    lambda attacked, _: tla.PreparedTLA(attacked, jnp.asarray(relatives)),
    functools.partial(
      _tla, layer=layer or "bn2", relatives=relatives, **weights
    ),
  )


def test_hardest_negatives_are_the_most_similar_of_other_classes():
  generator = np.random.default_rng(4)
  anchor, embedded = generator.normal(size=(2, 12, 2))  # of either sign
  embedded *= generator.uniform(0.1, 9, (12, 1))  # lengths do not matter
  labels = generator.integers(0, 3, 12)
  labels[0] = 3
  embedded[1:] = np.abs(embedded[1:])
  anchor[0] = [-1, -1]  # all of other classes are on its other side
  hardest, exists = tla.hardest_negatives(anchor, embedded, labels)
  assert exists.all() and hardest[0] != 0
  different = 0
  for i in range(12):
    cosines = {
      j: anchor[i] @ embedded[j] / np.linalg.norm(embedded[j])
      for j in range(12)
      if labels[j] != labels[i]
    }
    expected = max(cosines, key=cosines.get)
    assert hardest[i] == expected
    strongest = max(np.abs(list(cosines.values())))
    different += cosines[expected] != strongest
  assert different  # a sign matters
  assert not tla.hardest_negatives(anchor, embedded, labels * 0)[1].any()


def test_relatives_are_others_of_the_class_where_there_are(small):
  model, variables, images, _ = small
  labels = jnp.asarray([0, 1, 0, 2, 0, 1, 0, 0], jnp.int32)
  objective = objectives.create("tla", **ATTACK)
  batch = objectives.make_batch(images, labels, 3)
  prepare = jit(
    lambda key: objective.prepare(key, model, variables, None, batch).relatives
  )
  drawn = np.stack([prepare(jax.random.key(seed)) for seed in range(20)])
  assert (drawn[:, 3] == 3).all()  # the only one of its class
  assert (drawn[:, 1] == 5).all() and (drawn[:, 5] == 1).all()
  for i in (0, 2, 4, 6, 7):
    assert set(drawn[:, i]) == {0, 2, 4, 6, 7} - {i}


def test_a_batch_of_one_class_has_no_triplet(small):
  model, variables, images, _ = small
  objective = objectives.create("tla", **ATTACK)
  batch = objectives.make_batch(images, jnp.ones(8, jnp.int32), 3)
  attacked = adversarial.InnerAttackResult(images, variables["batch_stats"])

  @jit
  def run(params):
    def mean_total(params):
      outcome = objective.loss(
        model,
        {"params": params},
        tla.PreparedTLA(attacked, jnp.arange(8)),
        batch,
      )
      return outcome.total.mean(), outcome.terms

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, terms = run(variables["params"])
  assert (terms["triplet"] == 0).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# ATAT.

LAMBDA1, LAMBDA2 = 0.7, 0.3


def _atat(case, objective, layers):
  torch = case.torch

  def normalized(maps):
    if objective.normalization == "l2":
      return maps / case.length(maps)[:, None, None]
    if objective.normalization == "min_max":
      low, high = (f(maps, (1, 2), True) for f in (torch.amin, torch.amax))
      return (maps - low) / (high - low)
    return maps

  maps = {
    "teacher": case.teacher.maps_clean,
    "clean": case.student.maps_clean,
    "adversarial": case.student.maps_adversarial,
  }
  transfer = 0
  for pair in objective.pairs:
    first, second = pair.split("_")
    for layer in layers:
      difference = normalized(maps[first][layer]) - normalized(
        maps[second][layer]
      )
      if objective.distance == "norm":
        transfer = transfer + case.length(difference, objective.p)
      else:
        transfer = transfer + difference.square().mean((1, 2))
  pairing = case.length(case.student.clean - case.student.adversarial)
  mixture = _mixture(case)
  terms = {
    "cross_entropy": mixture,
    "attention": transfer,
    "logit_pairing": pairing,
  }
  return terms, mixture + LAMBDA1 * transfer + LAMBDA2 * pairing


def _check_atat(example, network, twin, make_variables, **fields):
  objective = objectives.create(
    "atat", lambda1=LAMBDA1, lambda2=LAMBDA2, **ATTACK, **fields
  )
  model, variables, images, _ = example
  names = attention.layer_names(model, variables, images)
  layers = objective.layers or names[-1:]

  def prepare(attacked, teacher):
    if not objective.needs_teacher:
      return atat.PreparedATAT(attacked, {})
    maps = teacher(layers=layers, maps=objective.maps)[1]
    return atat.PreparedATAT(attacked, objective._normalize_all(maps))

  _check(
    objective,
    example,
    network,
    twin,
    make_variables,
    prepare,
    functools.partial(_atat, objective=objective, layers=layers),
    kind=objective.maps,
  )


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"p": 1, "layers": ("conv1", "bn2")},
    {"normalization": "l2", "pairs": ("clean_adversarial", "teacher_clean")},
    {"normalization": "min_max", "distance": "mean_square"},
    {
      "maps": "channel_sum",
      "pairs": ("clean_adversarial",),
      "student_batch_norm": "in_turn",
      "layers": ("bn1",),
    },
    {
      "maps": "channel_sum",
      "normalization": "min_max",
      "p": 1,
      "student_batch_norm": "separate",
    },
  ],
  ids=["paper", "two", "l2", "min-max", "self", "channels"],
)
def test_atat_equals_pytorch(fields, small, twin, make_variables, x64):
  example = small.astype(np.float64)
  _check_atat(example, twin.small, twin, make_variables, **fields)


def test_atat_of_the_wide_resnet_equals_pytorch(wrn, twin, make_variables, x64):
  _check_atat(wrn.astype(np.float64), twin.wide_resnet, twin, make_variables)


# The released variants.


def _released(case, *, variant, weight):
  student, teacher = case.student, case.teacher
  size, num_classes = case.targets.shape
  if variant == "logits":
    target, clean, adversarial = (
      teacher.clean,
      student.clean,
      student.adversarial,
    )
  else:
    # The released gradient is that of a mean over N images and K classes.
    target = teacher.maps_clean["bn2"] / (size * num_classes)
    clean, adversarial = (
      maps["bn2"] / (2 * size * num_classes)
      for maps in (student.maps_clean, student.maps_adversarial)
    )
  one = (clean - target).square().flatten(1).mean(1)
  other = (adversarial - target).square().flatten(1).mean(1)
  mixture = _mixture(case)
  terms = {
    "cross_entropy": mixture,
    "transfer_clean": one,
    "transfer_adversarial": other,
  }
  return terms, mixture + weight * (one + other)


@pytest.mark.parametrize(
  ("variant", "weight"),
  [("logits", 1.0), ("maps", 1e4)],
  ids=["logits", "maps"],
)
def test_released_variants_equal_pytorch(
  variant, weight, small, twin, make_variables, x64
):
  def prepare(attacked, teacher):
    logits, maps, _ = teacher()
    if variant == "logits":
      return atat_released.PreparedATATReleased(attacked, logits)
    return atat_released.PreparedATATReleased(attacked, maps["bn2"] / (8 * 3))

  outcome = _check(
    objectives.create(
      "atat_released", **ATTACK, variant=variant, weight=weight
    ),
    small.astype(np.float64),
    twin.small,
    twin,
    make_variables,
    prepare,
    functools.partial(_released, variant=variant, weight=weight),
  )
  transfer = outcome.terms["transfer_adversarial"].max()
  assert transfer > 1e-3 if variant == "logits" else 0 < transfer < 1e-3


def test_released_teacher_is_scaled_by_its_own_batch(
  small, make_variables, x64
):
  model, variables, images, labels = small.astype(np.float64)
  teacher = make_variables(model, images, seed=9, dtype=np.float64)
  batch = objectives.make_batch(images, labels, 3)
  for variant, expected in (
    ("logits", lambda: model.apply(teacher, images)),
    (
      "maps",
      lambda: (
        attention.grad_cam(model, teacher, images, labels)["bn2"] / (8 * 3)
      ),
    ),
  ):
    objective = objectives.create("atat_released", **ATTACK, variant=variant)
    prepared = jit(
      lambda teacher, o=objective: (
        o.prepare(jax.random.key(0), model, variables, teacher, batch).teacher
      )
    )(teacher)
    np.testing.assert_allclose(prepared, expected(), rtol=1e-9)
