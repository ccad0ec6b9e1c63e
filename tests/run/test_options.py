"""Options of the train step: in one step against PyTorch, and all together."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from atat_jax import objectives, optim, sharding, state, steps
from atat_jax.data.base import Split
from atat_jax.training import accumulation, averaging
from atat_jax.training.batch import assemble, gather
from atat_jax.training.options import OFF, Options

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE, DECAY, BATCH, CLASSES = 0.2, 0.01, 12, 3
INDICES = [np.arange(12), np.arange(12, 24), np.arange(20, 32)]

OBJECTIVES = {
  "standard": {},
  "atat": {
    "lambda1": 0.7,
    "lambda2": 0.3,
    "epsilon": 0.1,
    "step_size": 0.04,
    "num_steps": 1,
  },
}
EACH = {
  "awp": {"awp_gamma": 0.01},
  "awp from a step on": {"awp_gamma": 0.01, "awp_start": 2},
  "ema": {"ema_decay": 0.9},
  "swa": {"swa_start": 2, "statistics_batches": 4},
  "label smoothing": {"label_smoothing": 0.1},
  "mixup": {"mix": "mixup"},
  "cutmix": {"mix": "cutmix", "mix_alpha": 0.5},
  "accumulation": {"accumulate_steps": 3},
  "epsilon warm-up": {"epsilon_warmup": 4},
}
ALL = {key: value for one in EACH.values() for key, value in one.items()} | {
  "swa_start": 0
}


@pytest.fixture(scope="module")
def data(small):
  generator = np.random.default_rng(6)
  shape = (40, *small.images.shape[1:])
  return Split(
    generator.integers(0, 256, shape, dtype=np.uint8),
    generator.integers(0, CLASSES, 40).astype(np.int32),
  )


def build(small, options, *, method="standard", clip_norm=0.0):
  """A step, and a state before it."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  objective = objectives.create(method, **OBJECTIVES[method])
  optimizer = optim.make_optimizer(
    lambda step: RATE, weight_decay=DECAY, clip_norm=clip_norm
  )
  made = state.create(
    small.model,
    optimizer,
    jax.random.key(4),
    small.images[:1],
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    initial=small.variables,
    averages=options.averages,
  )
  step = steps.make_train_step(
    small.model,
    objective,
    optimizer,
    mesh=mesh,
    num_classes=CLASSES,
    padding=1,
    flip=True,
    options=options,
  )
  return step, sharding.put_replicated(mesh, made)


def assert_close(actual: Any, expected: Any, **tolerance: Any) -> float:
  """Returns the largest error relative to each leaf's largest value."""
  largest = 0.0
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, err_msg=where, **tolerance)
    largest = max(largest, np.abs(a - b).max() / np.abs(b).max())
  return largest


# ----- awp, label smoothing, clipping, accumulation, EMA: one step in PyTorch


class Reference:
  """SGD with all of them, in float64, written from their definitions."""

  def __init__(self, twin, variables):
    self.torch, self.twin = twin.torch, twin
    as64 = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    self.params = dict(as64["params"])
    self.stats = twin.tree(as64["batch_stats"])
    self.velocity = jax.tree.map(np.zeros_like, self.params)
    self.ema = jax.tree.map(np.copy, as64)

  def gradient(self, params, images, targets):
    """Gradient of the mean cross-entropy, and the statistics after it."""
    leaves = self.twin.tree(params, requires_grad=True)
    out = self.twin.small(None, leaves, self.stats, images, train=True)
    loss = -(targets * out.logits.log_softmax(-1)).sum(-1).mean()
    loss.backward()
    return jax.tree.map(lambda x: x.grad.numpy(), leaves), out.stats

  def step(self, number, pixels, labels, *, gamma, parts, clip, smoothing):
    one_hot = np.eye(CLASSES)[labels]
    targets = (1 - smoothing) * one_hot + smoothing / CLASSES
    total = jax.tree.map(np.zeros_like, self.params)
    for part in range(parts):
      images, target = (
        self.torch.tensor(np.asarray(x, np.float64)[part::parts])
        for x in (pixels / 255, targets)
      )
      weights = self.params
      if gamma:
        ascent, _ = self.gradient(weights, images, target)

        def moved(w, g):
          if w.ndim == 1:
            return w
          norms = [np.sqrt(np.square(x).sum()) for x in (w, g)]
          return w + gamma * norms[0] / norms[1] * g

        weights = jax.tree.map(moved, weights, ascent)
      found, self.stats = self.gradient(weights, images, target)
      total = jax.tree.map(lambda a, b: a + b / parts, total, found)
    leaves = jax.tree.leaves(total)
    length = np.sqrt(sum(np.square(g).sum() for g in leaves))
    self.length = length

    def momentum(path, velocity, w, g):
      g = g * min(1, clip / length)
      if path[-1].key == "kernel":
        g = g + DECAY * w
      return 0.9 * velocity + g

    self.velocity = jax.tree_util.tree_map_with_path(
      momentum, self.velocity, self.params, total
    )
    self.params = jax.tree.map(
      lambda w, v: w - RATE * v, self.params, self.velocity
    )
    decay = min(0.3, (1 + number) / (10 + number))
    new = {
      "params": self.params,
      "batch_stats": jax.tree.map(lambda x: x.numpy(), self.stats),
    }
    self.ema = jax.tree.map(
      lambda a, b: decay * a + (1 - decay) * b, self.ema, new
    )


def test_a_step_with_options_equals_pytorch(small, data, twin, capsys):
  options = Options(
    awp_gamma=0.02,
    awp_start=1,
    ema_decay=0.3,
    label_smoothing=0.2,
    accumulate_steps=3,
  )
  clip = 0.37
  step, current = build(small, options, clip_norm=clip)
  expected = Reference(twin, small.variables)
  clipped = []
  for number, indices in enumerate(INDICES):
    batch = assemble(
      current.rng,
      current.step,
      data.images[indices],
      data.labels[indices],
      num_classes=CLASSES,
      padding=1,
      flip=True,
      options=OFF,
    )
    expected.step(
      number,
      np.asarray(batch.images, np.float64) * 255,
      data.labels[indices],
      gamma=options.awp_gamma if number >= 1 else 0,
      parts=3,
      clip=clip,
      smoothing=0.2,
    )
    clipped.append(expected.length > clip)
    current = step(current, None, data, indices)
  assert set(clipped) == {True, False}  # both happen
  tolerance = dict(rtol=1e-4, atol=1e-5)
  error = assert_close(current.params, expected.params, **tolerance)
  stats = jax.tree.map(lambda x: x.numpy(), expected.stats)
  assert_close(current.batch_stats, stats, **tolerance)
  assert_close(current.ema, expected.ema, **tolerance)
  assert_close(state.evaluated(current), expected.ema, **tolerance)
  with capsys.disabled():
    print(f"step with options against PyTorch: {error:.1e}")
  # It would have shown: the perturbation is no rounding error.
  plain = Reference(twin, small.variables)
  for number, indices in enumerate(INDICES):
    plain.step(
      number,
      data.images[indices],
      data.labels[indices],
      gamma=0,
      parts=1,
      clip=np.inf,
      smoothing=0,
    )
  with pytest.raises(AssertionError):
    assert_close(current.params, plain.params, **tolerance)


def authors_step(twin, variables, images, labels, gamma):
  """AT-AWP's step by torch.optim, and its d; decay of kernels only.

  The optimizer steps while the weights are w + d, which are then restored.
  """
  torch, functional = twin.torch, twin.functional
  params, stats = (
    twin.tree(
      jax.tree.map(lambda x: np.asarray(x, np.float64), variables[item])
    )
    for item in ("params", "batch_stats")
  )
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
  kernels = [path[-1].key == "kernel" for path in paths]
  for leaf in leaves:
    leaf.requires_grad_()
  groups = [
    {"params": [leaf], "weight_decay": DECAY * kernel}
    for leaf, kernel in zip(leaves, kernels, strict=True)
  ]
  optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)

  def backward():
    optimizer.zero_grad()
    out = twin.small(None, params, stats, images, train=True)
    functional.cross_entropy(out.logits, labels).backward()

  backward()
  with torch.no_grad():
    added = [
      gamma * leaf.norm() / leaf.grad.norm() * leaf.grad
      if leaf.ndim > 1
      else torch.zeros_like(leaf)
      for leaf in leaves
    ]
    for leaf, one in zip(leaves, added, strict=True):
      leaf.add_(one)
  backward()
  optimizer.step()
  with torch.no_grad():
    for leaf, one in zip(leaves, added, strict=True):
      leaf.sub_(one)
  return [x.detach().numpy() for x in leaves], [x.numpy() for x in added]


def test_awp_is_the_authors_but_for_the_decay_of_the_perturbation(
  small, data, twin
):
  """Where the optimizer steps at w + d, as theirs does, it decays d too."""
  gamma, torch = 0.5, twin.torch
  step, current = build(small, Options(awp_gamma=gamma))
  batch = assemble(
    current.rng,
    current.step,
    data.images[INDICES[0]],
    data.labels[INDICES[0]],
    num_classes=CLASSES,
    padding=1,
    flip=True,
    options=OFF,
  )
  images = torch.tensor(np.asarray(batch.images, np.float64))
  labels = torch.tensor(np.asarray(batch.labels)).long()
  theirs, added = authors_step(twin, small.variables, images, labels, gamma)
  current = step(current, None, data, INDICES[0])
  ours = jax.tree.leaves(current.params)
  largest = 0.0
  for a, b, d in zip(ours, theirs, added, strict=True):
    np.testing.assert_allclose(a, b + RATE * DECAY * d, rtol=1e-4, atol=1e-6)
    largest = max(largest, np.abs(RATE * DECAY * d).max())
  assert largest > 1e-4  # it would have shown


# ----- accumulation


def test_parts_give_the_whole_where_examples_are_independent(x64):
  """A linear model: mean gradient, values and order are the batch's."""
  generator = np.random.default_rng(1)
  weight = jnp.asarray(generator.normal(size=(5,)))
  images = jnp.asarray(generator.normal(size=(12, 5, 1, 1)))
  batch = objectives.make_batch(images, jnp.arange(12), 12)

  def function(stats, key, part):
    def loss(w):
      values = jnp.square(part.images[:, :, 0, 0] @ w - part.labels)
      outcome = objectives.Outcome(
        values,
        {"noise": jax.random.normal(key, values.shape)},
        stats + 1,
        part.targets,
        None,
      )
      return values.mean(), outcome

    return jax.grad(loss, has_aux=True)(weight)

  whole, parts = (
    quick.jit(
      lambda batch, n=n: accumulation.accumulate(
        function, 0.0, jax.random.key(0), batch, parts=n, params=weight
      )
    )(batch)
    for n in (1, 4)
  )
  np.testing.assert_allclose(parts[0], whole[0], rtol=1e-12)
  np.testing.assert_allclose(parts[1].total, whole[1].total, rtol=1e-12)
  np.testing.assert_array_equal(parts[1].logits_clean, batch.targets)
  assert parts[1].logits_adversarial is None
  assert (whole[1].batch_stats, parts[1].batch_stats) == (1, 4)
  noise = np.asarray(parts[1].terms["noise"])
  assert len(set(noise)) == 12  # every part has a key of its own


# ----- averages


def test_statistics_converge_to_those_of_the_data(small, data, twin):
  """Weights that stand still, one batch that is the whole data."""
  torch = twin.torch
  options = Options(swa_start=1, statistics_batches=160)
  mesh = sharding.make_mesh(jax.devices()[:1])
  _, made = build(small, options)
  made = made.replace(
    step=jnp.int32(2),
    # Neither the trained weights nor their statistics are asked.
    params=jax.tree.map(jnp.zeros_like, made.params),
    batch_stats=jax.tree.map(lambda x: x + 3, made.batch_stats),
  )
  statistics_pass = averaging.make_statistics_pass(
    small.model,
    objectives.create("standard"),
    mesh=mesh,
    num_classes=CLASSES,
    options=options,
  )
  everything = np.arange(40)
  numbers = []

  def draw(number):
    numbers.append(number)
    return everything, None

  found = averaging.estimate_statistics(
    made, statistics_pass, None, data, draw, options
  )
  assert numbers == list(range(160))
  images = torch.tensor(data.images / 255.0)
  zero = twin.tree(
    jax.tree.map(lambda x: np.zeros(x.shape), small.variables["batch_stats"])
  )
  params = jax.tree.map(
    lambda x: torch.tensor(np.asarray(x, np.float64)),
    dict(small.variables["params"]),
  )
  moved = twin.small(None, params, zero, images, train=True).stats
  expected = jax.tree.map(lambda x: x.numpy() / 0.1, moved)
  assert_close(found.ema["batch_stats"], expected, rtol=1e-3, atol=1e-4)
  for name in ("params", "batch_stats"):
    a, b = getattr(found, name), getattr(made, name)
    jax.tree.map(np.testing.assert_array_equal, a, b)
  # Averaged weights, true statistics: logits are those of the batch itself.
  logits = small.model.apply(state.evaluated(found), data.images / 255.0)
  whole = twin.small(None, params, zero, images, train=True).logits
  np.testing.assert_allclose(logits, whole.numpy(), atol=1e-3)


def test_statistics_are_estimated_only_of_what_is_averaged(small):
  def never(*args):
    raise AssertionError

  _, made = build(small, Options(ema_decay=0.9))
  made = made.replace(step=jnp.int32(5))
  for options in (
    OFF,
    Options(ema_decay=0.9),
    Options(statistics_batches=9),
    Options(swa_start=5, statistics_batches=9),
  ):
    assert (
      averaging.estimate_statistics(made, never, None, None, never, options)
      is made
    )


# ----- inputs


def test_label_smoothing_and_hard_labels(data):
  def targets(smoothing):
    batch = assemble(
      jax.random.key(0),
      jnp.int32(0),
      data.images,
      data.labels,
      num_classes=CLASSES,
      padding=0,
      flip=False,
      options=Options(label_smoothing=smoothing),
    )
    np.testing.assert_array_equal(batch.labels, data.labels)
    np.testing.assert_array_equal(batch.images, np.float32(data.images) / 255)
    return np.asarray(batch.targets)

  expected = np.full((40, CLASSES), 0.25 / 3)
  expected[np.arange(40), data.labels] += 0.75
  np.testing.assert_allclose(targets(0.25), expected, rtol=1e-6)
  assert set(targets(0.0).ravel()) == {0.0, 1.0}


def test_extra_images_stand_behind_the_others(data, eight_devices):
  """... and the whole batch is split over the devices, as its parts are not."""
  mesh = sharding.make_mesh(eight_devices)
  further = Split(data.images[:5], data.labels[:5])
  take = jax.jit(functools.partial(gather, mesh=mesh))
  inputs_ = sharding.put_replicated(mesh, (data, np.array([9, 5, 7]), further))
  images, labels = take(*inputs_)
  for array in (images, labels):
    assert len(array.sharding.device_set) == 8
    assert {len(shard.data) for shard in array.addressable_shards} == {1}
  rows = [9, 5, 7, 0, 1, 2, 3, 4]
  np.testing.assert_array_equal(images, data.images[rows])
  np.testing.assert_array_equal(labels, data.labels[rows])


# ----- with objectives


@pytest.mark.parametrize(
  ("name", "method"),
  [("accumulation", "standard"), *((name, "atat") for name in EACH)],
)
def test_every_option_leaves_the_state_its_form(small, data, name, method):
  """Traced, not run: what comes out can go in again, so nothing recompiles."""
  step, before = build(small, Options(**EACH[name]), method=method)
  after = jax.eval_shape(
    step.__wrapped__, before, small.variables, data, INDICES[0]
  )
  assert jax.tree.structure(after) == jax.tree.structure(before)
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_all_options_together_make_steps(small, data, compilations):
  step, current = build(small, Options(**ALL), method="atat", clip_norm=1.0)
  start = jax.tree.map(np.asarray, current.params)
  teacher = jax.tree.map(lambda x: 0.9 * x, small.variables)
  indices, further = np.arange(9), Split(data.images[:3], data.labels[:3])
  for number in range(3):
    if number == 1:
      before = compilations()
    current = step(current, teacher, data, indices + number, further)
  assert compilations() == before
  assert int(current.step) == 3
  for name in current.sums:
    total, count = np.asarray(current.sums[name])
    assert np.isfinite(total)
    assert count == (3 if name == "gradient_norm" else 3 * BATCH), name
  for tree in (current.params, current.ema["params"]):
    changed = jax.tree.map(lambda a, b: (a != b).any(), tree, start)
    assert all(jax.tree.leaves(changed))
