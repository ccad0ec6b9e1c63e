"""The contract of every network in `models.MODELS`, and the classifier.

A minimal network, registered the way a new one is, goes through the same battery.
"""

import json

import jax
import jax.numpy as jnp
import minimal
import numpy as np
import pytest
import tiny
from flax import linen as nn
from quick import jit

from atat_jax import attention, batch_norm, checkpoints, models, objectives

# Smaller values of whatever fields a network has: tracing takes the time.
SMALL = {
  "depth": 8,
  "width": 1,
  "stem_channels": 4,
  "stage_sizes": (1, 1),
  "stage_channels": (4, 6),
  "base_channels": 4,
  "growth": 4,
  "hidden": 8,
  "image_size": 8,
  "patch_size": 4,
  "channels": 8,
  "num_heads": 2,
  "num_blocks": 1,
  "num_class_blocks": 1,
  "stem_convolutions": 2,
}
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

every_network = pytest.mark.parametrize("name", [*models.MODELS, "minimal"])


@pytest.fixture(autouse=True)
def _minimal(monkeypatch):
  minimal.register_network(monkeypatch)


def _create(name: str, **fields) -> nn.Module:
  known = models.field_names(name)
  small = {key: value for key, value in SMALL.items() if key in known}
  return models.create(name, num_classes=7, **small, **fields)


def _shapes(model: nn.Module):
  return jax.eval_shape(model.init, jax.random.key(0), IMAGES)


@every_network
def test_every_field_has_a_default(name):
  assert "num_classes" in models.field_names(name)
  assert isinstance(models.create(name), nn.Module)


@every_network
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_parameters_and_statistics_are_float32(name, dtype):
  if "dtype" in models.field_names(name):
    model = _create(name, dtype=jnp.dtype(dtype))
  elif dtype == "float32":
    model = _create(name)
  else:
    pytest.skip("the network has no field dtype")
  variables = _shapes(model)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
  assert "params" in variables and set(variables) <= {"params", "batch_stats"}
  for mode in ("running", "batch"):
    logits, stats = jax.eval_shape(
      lambda v, x, mode=mode: batch_norm.apply(model, v, x, batch_norm=mode),
      variables,
      IMAGES,
    )
    assert logits.shape == (2, 7) and logits.dtype == np.float32
    assert jax.tree.structure(stats) == jax.tree.structure(
      variables.get("batch_stats", {})
    )


@every_network
def test_attention_finds_a_tensor_to_tap(name):
  model = _create(name)
  layers = attention.layer_names(model, _shapes(model), IMAGES)
  assert layers
  if name in ("vit", "xcit"):  # tokens follow
    chosen = attention.chosen_layers(model, _shapes(model), IMAGES, None)
    assert chosen == ("features",)
  elif isinstance(model, models.base.Network):
    assert layers[-1] == "features"  # one name in all networks, the default


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atat", "tla"])
@pytest.mark.parametrize("name", ["vit", "xcit"])
def test_objectives_of_maps_train_transformers_without_a_named_layer(
  name, method
):
  model = _create(name)
  objective = objectives.create(method, num_steps=1)

  def gradient(variables, images, labels):
    batch = objectives.make_batch(images, labels, 7)
    prepared = objective.prepare(
      jax.random.key(0), model, variables, variables, batch
    )

    def loss(params):
      changed = {**variables, "params": params}
      return objective.loss(model, changed, prepared, batch).total.sum()

    return jax.grad(loss)(variables["params"])

  shapes = _shapes(model)
  labels = jax.ShapeDtypeStruct((2,), jnp.int32)
  found = jax.eval_shape(gradient, shapes, IMAGES, labels)
  assert jax.tree.structure(found) == jax.tree.structure(shapes["params"])


@every_network
def test_fields_survive_json_and_compare_by_value(name):
  model = _create(name)
  assert hash(model) == hash(_create(name)) and model == _create(name)
  spec = checkpoints.model_spec(name, model, (8, 8, 3))
  fields = json.loads(json.dumps(spec))["fields"]
  fields = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  again = models.create(name, **fields)
  assert checkpoints.model_spec(name, again, (8, 8, 3)) == spec


def test_vgg_without_batch_norm_has_no_statistics():
  assert set(_shapes(_create("vgg16"))) == {"params"}
  assert set(_shapes(_create("vgg16_bn"))) == {"params", "batch_stats"}


@pytest.mark.usefixtures("quick_compilation")
def test_a_minimal_network_trains_on_a_minimal_data_set(monkeypatch, tmp_path):
  """`--config.data.name=minimal --config.model.name=minimal` is enough."""
  minimal.register_data_set(monkeypatch)
  config = tiny.config(
    data__name="minimal",
    model__name="minimal",
    train__num_epochs=1,
    train__validate_every_epochs=1.0,
    teacher__validate_every_epochs=1.0,
  )
  tiny.run(tmp_path, "train", config)
  model, variables = checkpoints.restore_model(tmp_path)
  assert model == minimal.Network(num_classes=minimal.SPEC.num_classes)
  images = jnp.zeros((2, *minimal.SPEC.image_shape))
  assert model.apply(variables, images).shape == (2, minimal.SPEC.num_classes)


def test_running_statistics_classify_an_image_by_itself(wrn):
  def logits(images, mode):
    classifier = models.classifier(wrn.model, wrn.variables, batch_norm=mode)
    return jit(lambda images: classifier(images))(images)

  alone = wrn.images[:2]
  np.testing.assert_allclose(
    logits(wrn.images, "running")[:2], logits(alone, "running"), atol=1e-5
  )
  assert (
    np.abs(logits(wrn.images, "batch")[:2] - logits(alone, "batch")).max()
    > 1e-2
  )


def test_classifier_is_a_pytree_of_the_weights(wrn):
  classifier = models.classifier(wrn.model, wrn.variables)
  leaves = jax.tree.leaves(classifier)
  assert all(
    a is b for a, b in zip(leaves, jax.tree.leaves(wrn.variables), strict=True)
  )
  other = models.classifier(
    wrn.model.clone(), jax.tree.map(lambda x: x * 2, wrn.variables)
  )
  assert jax.tree.structure(classifier) == jax.tree.structure(other)
  batch = models.classifier(wrn.model, wrn.variables, batch_norm="batch")
  assert jax.tree.structure(classifier) != jax.tree.structure(batch)
  ours, plain = jit(lambda c, v, x: (c(x), wrn.model.apply(v, x, train=False)))(
    classifier, wrn.variables, wrn.images
  )
  np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_running_mode_leaves_the_statistics(wrn):
  stats = jit(lambda v, x: batch_norm.apply(wrn.model, v, x)[1])(
    wrn.variables, wrn.images
  )
  jax.tree.map(
    np.testing.assert_array_equal, stats, wrn.variables["batch_stats"]
  )


def test_a_network_without_batch_norm_or_train_argument():
  model = nn.Dense(3)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 2)))
  for mode in ("running", "batch"):
    logits, stats = batch_norm.apply(
      model, variables, jnp.ones((4, 2)), batch_norm=mode
    )
    assert logits.shape == (4, 3) and not stats
