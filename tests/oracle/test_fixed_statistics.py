"""Batch statistics as constants: gradients against formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from atat_jax import attacks, batch_norm, evaluation, models
from atat_jax.errors import UserError

KEY = jax.random.key(0)
EPSILON = 0.05


class Net(nn.Module):
  """Two BatchNorm layers of different momentum, one above the other."""

  @nn.compact
  def __call__(self, x, train=False):
    """Maps images to four logits."""
    x = x.reshape(len(x), -1)
    for name, momentum in (("first", 0.7), ("second", 0.99)):
      x = nn.Dense(7, name=f"{name}_dense")(x)
      norm = nn.BatchNorm(
        use_running_average=not train, momentum=momentum, name=name
      )
      x = jnp.tanh(norm(x))
    return nn.Dense(4, name="head")(x)


class Odd(nn.Module):
  """A network that doubles its logits in training, and nobody knows why."""

  @nn.compact
  def __call__(self, x, train=False):
    """Maps images to four logits."""
    x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
    return nn.Dense(4)(x) * (2 if train else 1)


class Cumulative(nn.Module):
  """A mean over all batches so far, which is no exponential average."""

  @nn.compact
  def __call__(self, x, train=False):
    """Maps images to four logits."""
    x = x.reshape(len(x), -1)
    count = self.variable("batch_stats", "count", jnp.zeros, ())
    mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
    used = x.mean(0) if train else mean.value
    if train:
      count.value += 1
      mean.value += (used - mean.value) / count.value
    return nn.Dense(4)(x - used)


class AlwaysBatch(nn.Module):
  """A network that cannot be told which statistics to take."""

  @nn.compact
  def __call__(self, x):
    """Maps images to four logits."""
    x = nn.BatchNorm(use_running_average=False)(x.reshape(len(x), -1))
    return nn.Dense(4)(x)


class Counting(nn.Module):
  """Statistics of other kinds beside an average: a counter and a constant."""

  @nn.compact
  def __call__(self, x, train=False):
    """Maps images to four logits."""
    x = x.reshape(len(x), -1)
    count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    scale = self.variable("batch_stats", "scale", jnp.full, (), 3.0)
    if train:
      count.value += 1
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    return nn.Dense(4)(x * scale.value)


def images(count=6, seed=1):
  key = jax.random.key(seed)
  return jax.random.uniform(key, (count, 3, 2, 2)), jnp.arange(count) % 4


def variables(model):
  """Variables of a network whose running statistics are those of no batch."""
  x, _ = images()
  made = model.init(jax.random.key(2), x)
  moved = jax.tree.map(
    lambda s: s + 0.4 if s.dtype == jnp.float32 and s.ndim else s,
    made["batch_stats"],
  )
  return {**made, "batch_stats": moved}


def written_out(params, x, held=None, module=jnp):
  """Logits of `Net` with the statistics held, and its batch statistics."""
  x, found = x.reshape(len(x), -1), []
  for name in ("first", "second"):
    dense, norm = params[f"{name}_dense"], params[name]
    x = x @ dense["kernel"] + dense["bias"]
    own = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    mean, var = held[len(found)] if held else own
    found.append(own)
    x = (x - mean) / module.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    x = module.tanh(x)
  return x @ params["head"]["kernel"] + params["head"]["bias"], found


def cross_entropy(logits, labels):
  true = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
  return (jax.nn.logsumexp(logits, -1) - true).sum()


def classifiers(model=None):
  model = model or Net()
  return [
    models.classifier(
      model, variables(model), batch_norm="batch", fixed_statistics=fixed
    )
    for fixed in (False, True)
  ]


def test_the_statistics_are_those_of_the_batch_whatever_the_momentum():
  x, _ = images()
  made = variables(Net())
  found = jax.jit(lambda v: batch_norm.statistics(Net(), v, x))(made)
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), made["params"])
  _, expected = written_out(params, np.asarray(x, np.float64), module=np)
  for name, (mean, var) in zip(("first", "second"), expected, strict=True):
    np.testing.assert_allclose(found[name]["mean"], mean, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found[name]["var"], var, rtol=2e-5, atol=1e-6)


def test_logits_are_those_of_batch_statistics_bit_for_bit():
  x, _ = images()
  plain, fixed = classifiers()
  np.testing.assert_array_equal(plain(x), fixed(x))
  call = jax.jit(lambda made, x: made(x))
  np.testing.assert_array_equal(call(plain, x), call(fixed, x))


def test_gradients_are_those_with_the_statistics_held_fixed():
  x, labels = images()
  plain, fixed = classifiers()
  params = variables(Net())["params"]

  def explicit(x):
    held = lax.stop_gradient(written_out(params, x)[1])
    return cross_entropy(written_out(params, x, held)[0], labels)

  gradient = jax.jit(
    jax.grad(lambda made, x: cross_entropy(made(x), labels), 1)
  )
  expected = jax.grad(explicit)(x)
  np.testing.assert_allclose(gradient(fixed, x), expected, rtol=1e-3, atol=1e-6)
  through = jax.grad(lambda x: cross_entropy(written_out(params, x)[0], labels))
  np.testing.assert_allclose(
    gradient(plain, x), through(x), rtol=1e-3, atol=1e-5
  )
  # The test can tell the two apart.
  assert np.abs(expected - through(x)).max() > 0.1 * np.abs(expected).max()


def test_gradients_are_finite_differences_in_float64():
  x, labels = images()
  made = variables(Net())["params"]
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), made)
  clean = np.asarray(x, np.float64)
  _, held = written_out(params, clean, module=np)

  def loss(x):
    logits, _ = written_out(params, x, held, np)
    total = np.log(np.exp(logits).sum(-1))
    return (total - logits[np.arange(len(labels)), labels]).sum()

  _, fixed = classifiers()
  found = np.asarray(jax.grad(lambda x: cross_entropy(fixed(x), labels))(x))
  for index in np.ndindex(clean.shape):
    step = np.zeros_like(clean)
    step[index] = 1e-6
    slope = (loss(clean + step) - loss(clean - step)) / 2e-6
    assert found[index] == pytest.approx(slope, rel=2e-3, abs=1e-5), index


def test_a_protocol_attacks_fixed_statistics_and_the_network_of_the_batch():
  x, labels = images()
  plain, fixed = classifiers()
  params = variables(Net())["params"]
  protocol = evaluation.parse(
    "fgsm:statistics=fixed", epsilon=EPSILON, step_size=EPSILON
  )
  held = written_out(params, x)[1]
  gradient = jax.grad(
    lambda x: cross_entropy(written_out(params, x, held)[0], labels)
  )(x)
  expected = jnp.clip(x + EPSILON * jnp.sign(gradient), 0, 1)
  found = protocol.run(KEY, plain, x, labels)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_array_equal(found, protocol.run(KEY, fixed, x, labels))
  through = attacks.fgsm(KEY, plain, x, labels, epsilon=EPSILON)
  assert np.abs(found - through).max() > EPSILON / 2


def test_new_weights_do_not_compile_an_attack_again(compilations):
  x, labels = images()
  _, fixed = classifiers()
  attacks.fgsm(KEY, fixed, x, labels, epsilon=EPSILON)
  other = jax.tree.map(lambda v: v * 1.1, fixed)
  before = compilations()
  attacks.fgsm(KEY, other, x, labels, epsilon=EPSILON)
  assert compilations() == before


def test_what_is_no_average_stays_as_it_was():
  model, (x, labels) = Counting(), images()
  made = variables(model)
  found = batch_norm.statistics(model, made, x)
  assert found["count"] == 0 and found["scale"] == 3
  flat = np.asarray(x, np.float64).reshape(len(x), -1)
  own = found["BatchNorm_0"]
  np.testing.assert_allclose(own["mean"], flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(own["var"], flat.var(0), rtol=1e-5)
  _, fixed = classifiers(model)
  gradient = jax.grad(lambda x: cross_entropy(fixed(x), labels))(x)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_another_training_pass_gives_no_gradient_and_says_so():
  x, labels = images()
  _, fixed = classifiers(Odd())
  with attacks.nonfinite.collect() as counts:
    found = attacks.fgsm(KEY, fixed, x, labels, epsilon=EPSILON)
  assert counts.gradients == len(x)
  np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize(
  ("model", "named"),
  [
    (Cumulative(), "batch_stats: a batch does not move them linearly"),
    (AlwaysBatch(), "takes no `train`; allowed"),
  ],
  ids=["cumulative", "no train"],
)
def test_statistics_that_cannot_be_held_are_refused(model, named):
  x, labels = images()
  _, fixed = classifiers(model)
  with pytest.raises(UserError, match=named):
    attacks.fgsm(KEY, fixed, x, labels, epsilon=EPSILON)


def test_running_statistics_are_never_called_fixed():
  x, labels = images()
  model = Net()
  with pytest.raises(UserError, match="True with batch_norm 'running'"):
    models.classifier(model, variables(model), fixed_statistics=True)
  protocol = evaluation.parse("fgsm:statistics=fixed", epsilon=1, step_size=1)
  for made in (models.classifier(model, variables(model)), lambda x: x):
    with pytest.raises(UserError, match="classifier: one without batch"):
      protocol.run(KEY, made, x, labels)


def test_autoattack_refuses_a_network_with_batch_statistics():
  x, labels = images()
  protocol = evaluation.parse("autoattack-fast", epsilon=0.1, step_size=0.1)
  for made in classifiers():
    with pytest.raises(UserError, match="'autoattack-fast' with batch stat"):
      protocol.run(KEY, made, x, labels)
