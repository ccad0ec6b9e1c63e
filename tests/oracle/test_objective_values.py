"""Every objective's terms and gradient against PyTorch, in float64.

The adversarial images are given, the targets are not one-hot: cross-entropies
use them, everything else uses the labels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from atat_jax import objectives
from atat_jax.objectives import adversarial, tla

TOLERANCE = dict(rtol=1e-8, atol=1e-10)


class Outputs(NamedTuple):
  """Outputs of a network for clean and adversarial images, in PyTorch.

  Attributes:
    clean: Logits.
    adversarial: Logits.
    maps_clean: {layer: [B, h, w]}.
    maps_adversarial: {layer: [B, h, w]}.
    embedded_clean: {layer: [B, C]}, pooled activations.
    embedded_adversarial: {layer: [B, C]}.
    stats: Running statistics after the passes.
  """

  clean: Any
  adversarial: Any
  maps_clean: dict[str, Any]
  maps_adversarial: dict[str, Any]
  embedded_clean: dict[str, Any]
  embedded_adversarial: dict[str, Any]
  stats: Any


class Case(NamedTuple):
  """Arguments of a method's formula, in PyTorch.

  Attributes:
    torch: The module.
    objective: The objective, for its hyperparameters.
    student: Outputs of the student.
    teacher: Outputs of the teacher for the clean images, without gradient.
    targets: [B, K].
    labels: B integers.
    y: The labels as a tensor.
    relatives: TLA's second positives.
  """

  torch: Any
  objective: Any
  student: Outputs
  teacher: Outputs
  targets: Any
  labels: list[int]
  y: Any
  relatives: list[int]

  def cross_entropy(self, logits: Any) -> Any:
    return -(self.targets * logits.log_softmax(1)).sum(1)

  def mixture(self) -> Any:
    clean, adversarial = self.student[:2]
    return (self.cross_entropy(clean) + self.cross_entropy(adversarial)) / 2

  def kl(self) -> Any:
    """KL(clean || adversarial), by PyTorch's own function."""
    clean, adversarial = self.student[:2]
    return self.torch.nn.functional.kl_div(
      adversarial.log_softmax(1), clean.softmax(1), reduction="none"
    ).sum(1)

  def length(self, difference: Any, p: int = 2) -> Any:
    return self.torch.linalg.vector_norm(difference.flatten(1), ord=p, dim=1)


Formula = Callable[[Case], tuple[dict[str, Any], Any]]
"""A case to terms and total."""


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


def _outputs(
  torch: Any,
  forward: Callable[[Any, Any], Any],
  stats: Any,
  x: Any,
  x_adv: Any,
  y: Any,
  mode: str,
  kind: str,
) -> Outputs:
  """Passes in the mode of BatchNorm: a student's, or "clean" for one batch."""

  def one(stats: Any, x: Any, y: Any) -> tuple[Any, ...]:
    result = forward(stats, x)
    embedded = {k: v.mean((2, 3)) for k, v in result.activations.items()}
    maps = _maps(torch, result, y, kind)
    return (result.logits, maps, embedded), result.stats

  if mode == "mixture":
    (logits, maps, embedded), stats = one(
      stats, torch.cat([x, x_adv]), torch.cat([y, y])
    )
    clean, adversarial = (
      (
        logits.chunk(2)[half],
        {k: v.chunk(2)[half] for k, v in maps.items()},
        {k: v.chunk(2)[half] for k, v in embedded.items()},
      )
      for half in (0, 1)
    )
  elif mode in ("clean", "adversarial"):
    clean, stats = one(stats, x if mode == "clean" else x_adv, y)
    adversarial = clean
  else:
    clean, moved = one(stats, x, y)
    if mode == "in_turn":
      stats = moved
    adversarial, stats = one(stats, x_adv, y)
  paired = zip(clean, adversarial, strict=True)
  return Outputs(*(half for pair in paired for half in pair), stats)


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


def _relatives(labels: list[int]) -> list[int]:
  """Another image of the class: the next one, around the corner."""
  size = len(labels)
  found = [
    next(j % size for j in range(i + 1, i + size + 1) if labels[j % size] == y)
    for i, y in enumerate(labels)
  ]
  assert found != list(range(size))
  return found


def _check(
  objective: Any,
  example: Any,
  network: Any,
  twin: Any,
  make_variables: Any,
  formula: Formula,
) -> Any:
  """Compares `prepare` (but for the attack) and `loss` with a formula."""
  model, variables, images, labels = example
  teacher = make_variables(model, images, seed=9, dtype=np.float64)
  generator = np.random.default_rng(2)
  noise = generator.uniform(-0.1, 0.1, images.shape)
  images_adv = jnp.asarray(np.clip(np.asarray(images) + noise, 0, 1))
  num_classes = variables["params"]["head"]["bias"].size
  targets = generator.dirichlet(np.ones(num_classes), len(labels))
  batch = objectives.Batch(images, labels, jnp.asarray(targets), 1.0)
  relatives = _relatives(labels.tolist())

  @quick.jit
  def ours(params, teacher):
    attack = adversarial.InnerAttackResult(images_adv, variables["batch_stats"])
    # Statistics of an objective that attacks are those after the attack.
    stats = (teacher if objective.attacks else variables)["batch_stats"]
    student = {"params": params, "batch_stats": stats}
    with mock.patch.object(
      adversarial.InnerAttack, "attack", lambda *_: attack
    ):
      prepared = objective.prepare(
        jax.random.key(0),
        model,
        student,
        teacher if objective.needs_teacher else None,
        batch,
      )
    if isinstance(prepared, tla.PreparedTLA):  # drawn at random
      prepared = prepared._replace(relatives=jnp.asarray(relatives))

    def mean_total(params):
      outcome = objective.loss(
        model, {**student, "params": params}, prepared, batch
      )
      return outcome.total.mean(), outcome

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, outcome = ours(variables["params"], teacher)

  torch = twin.torch
  x, x_adv = (torch.tensor(np.array(v)) for v in (images, images_adv))
  y = torch.tensor(np.array(labels)).long()
  params = twin.tree(variables["params"], requires_grad=True)
  frozen = twin.tree(teacher["params"], requires_grad=True)
  kind = getattr(objective, "maps", "grad_cam")
  alone = "adversarial" if objective.attacks else "clean"
  student = _outputs(
    torch,
    lambda stats, x: network(model, params, stats, x, train=True),
    twin.tree(variables["batch_stats"]),
    x,
    x_adv,
    y,
    getattr(objective, "student_batch_norm", alone),
    kind,
  )
  teachers = _outputs(
    torch,
    lambda stats, x: network(model, frozen, stats, x, train=False),
    twin.tree(teacher["batch_stats"]),
    x,
    x,
    y,
    "clean",
    kind,
  )
  detached = teachers._replace(
    clean=teachers.clean.detach(),
    maps_clean={k: v.detach() for k, v in teachers.maps_clean.items()},
  )
  terms, total = formula(
    Case(
      torch,
      objective,
      student,
      detached,
      torch.tensor(targets),
      labels.tolist(),
      y,
      relatives,
    )
  )
  total.mean().backward()

  assert set(outcome.terms) == set(objective.term_names) == set(terms)
  for name, term in terms.items():
    assert outcome.terms[name].shape == (len(labels),)
    # The term is there; the released maps are tiny.
    assert (
      term.abs().max() > 1e-4 or getattr(objective, "variant", "") == "maps"
    )
    np.testing.assert_allclose(
      outcome.terms[name], term.detach(), err_msg=name, **TOLERANCE
    )
  np.testing.assert_allclose(outcome.total, total.detach(), **TOLERANCE)
  _assert_trees_close(
    gradient, jax.tree.map(lambda leaf: leaf.grad, params), **TOLERANCE
  )
  _assert_trees_close(dict(outcome.batch_stats), student.stats, **TOLERANCE)
  for logits, expected, there in (
    (outcome.logits_clean, student.clean, objective.sees_clean),
    (outcome.logits_adversarial, student.adversarial, objective.attacks),
  ):
    assert (logits is not None) == there
    if there:
      np.testing.assert_allclose(logits, expected.detach(), **TOLERANCE)
  return outcome


def _standard(case):
  cross_entropy = case.torch.nn.functional.cross_entropy(
    case.student.clean, case.targets, reduction="none"
  )
  return {"cross_entropy": cross_entropy}, cross_entropy


def _at(case):
  cross_entropy = case.cross_entropy(case.student.adversarial)
  return {"cross_entropy": cross_entropy}, cross_entropy


def _alp(case):
  mixture = case.mixture()
  pairing = (case.student.clean - case.student.adversarial).square().mean(1)
  terms = {"cross_entropy": mixture, "logit_pairing": pairing}
  return terms, mixture + 0.5 * pairing


def _trades(case):
  cross_entropy, kl = case.cross_entropy(case.student.clean), case.kl()
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
  kl = case.kl() * doubt
  terms = {"cross_entropy": cross_entropy, "margin": margin, "kl": kl}
  return terms, cross_entropy + margin + 6 * kl


def _tla(case):
  torch, student, objective = case.torch, case.student, case.objective
  layer, relatives = objective.layer or "bn2", case.relatives
  margin = 0.03
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
  weighted = objective.lambda1 * triplet + objective.lambda2 * square
  return terms, cross_entropy + weighted


def _atat(case):
  torch, objective = case.torch, case.objective
  layers = objective.layers or list(case.student.maps_clean)[-1:]

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
  mixture = case.mixture()
  terms = {
    "cross_entropy": mixture,
    "attention": transfer,
    "logit_pairing": pairing,
  }
  weighted = objective.lambda1 * transfer + objective.lambda2 * pairing
  return terms, mixture + weighted


def _released(case):
  student, teacher = case.student, case.teacher
  size, num_classes = case.targets.shape
  if case.objective.variant == "logits":
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
  mixture = case.mixture()
  terms = {
    "cross_entropy": mixture,
    "transfer_clean": one,
    "transfer_adversarial": other,
  }
  return terms, mixture + case.objective.weight * (one + other)


FORMULAS: dict[str, Formula] = {
  "standard": _standard,
  "at": _at,
  "alp": _alp,
  "tla": _tla,
  "trades": _trades,
  "mart": _mart,
  "atat": _atat,
  "atat_released": _released,
}
"""The published methods."""


@pytest.mark.parametrize("method", objectives.OBJECTIVES)
def test_loss_and_gradient_equal_pytorch(
  method, small, twin, make_variables, x64
):
  if method not in FORMULAS:
    pytest.skip(
      f"no formula in PyTorch for {method!r}: nothing to compare with"
    )
  _check(
    objectives.create(method),
    small.astype(np.float64),
    twin.small,
    twin,
    make_variables,
    FORMULAS[method],
  )


@pytest.mark.parametrize(
  ("method", "fields"),
  [
    (
      "tla",
      {"layer": "bn1", "student_batch_norm": "mixture", "lambda2": 0.1},
    ),
    (
      "atat",
      {
        "lambda1": 0.7,
        "lambda2": 0.3,
        "p": 1,
        "layers": ("conv1", "bn2"),
        "normalization": "l2",
        "pairs": ("clean_adversarial", "teacher_clean"),
      },
    ),
    ("atat", {"normalization": "min_max", "distance": "mean_square"}),
    (
      "atat",
      {
        "maps": "channel_sum",
        "pairs": ("clean_adversarial",),
        "student_batch_norm": "in_turn",
        "layers": ("bn1",),
      },
    ),
    (
      "atat",
      {
        "maps": "channel_sum",
        "normalization": "min_max",
        "p": 1,
        "student_batch_norm": "separate",
      },
    ),
  ],
  ids=["tla-bn1", "atat-l2", "atat-min-max", "atat-self", "atat-channels"],
)
def test_variations_equal_pytorch(
  method, fields, small, twin, make_variables, x64
):
  _check(
    objectives.create(method, **fields),
    small.astype(np.float64),
    twin.small,
    twin,
    make_variables,
    FORMULAS[method],
  )


def test_released_maps_equal_pytorch_and_are_negligible(
  small, twin, make_variables, x64
):
  outcome = _check(
    objectives.create("atat_released", variant="maps", weight=1e4),
    small.astype(np.float64),
    twin.small,
    twin,
    make_variables,
    _released,
  )
  assert 0 < outcome.terms["transfer_adversarial"].max() < 1e-3


def test_atat_of_the_wide_resnet_equals_pytorch(wrn, twin, make_variables, x64):
  _check(
    objectives.create("atat", lambda1=0.7, lambda2=0.3),
    wrn.astype(np.float64),
    twin.wide_resnet,
    twin,
    make_variables,
    _atat,
  )


# Draws and triplets of TLA.


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
  objective = objectives.create("tla")
  batch = objectives.make_batch(images, labels, 3)
  attack = adversarial.InnerAttackResult(images, {})

  def draw(key):
    with mock.patch.object(
      adversarial.InnerAttack, "attack", lambda *_: attack
    ):
      return objective.prepare(key, model, variables, None, batch).relatives

  keys = jax.random.split(jax.random.key(0), 20)
  drawn = np.asarray(quick.jit(jax.vmap(draw))(keys))
  assert (drawn[:, 3] == 3).all()  # the only one of its class
  assert (drawn[:, 1] == 5).all() and (drawn[:, 5] == 1).all()
  for i in (0, 2, 4, 6, 7):
    assert set(drawn[:, i]) == {0, 2, 4, 6, 7} - {i}


def test_a_batch_of_one_class_has_no_triplet(small):
  model, variables, images, _ = small
  objective = objectives.create("tla")
  batch = objectives.make_batch(images, jnp.ones(8, jnp.int32), 3)
  attack = adversarial.InnerAttackResult(images, variables["batch_stats"])

  @quick.jit
  def run(params):
    def mean_total(params):
      outcome = objective.loss(
        model,
        {"params": params},
        tla.PreparedTLA(attack, jnp.arange(8)),
        batch,
      )
      return outcome.total.mean(), outcome.terms

    return jax.grad(mean_total, has_aux=True)(params)

  gradient, terms = run(variables["params"])
  assert (terms["triplet"] == 0).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
