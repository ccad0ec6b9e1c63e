"""Public functions with right arguments and the kinds of their arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import bad_values
import numpy as np
from bad_values import BANKS, World

from atat_jax import (
  analyses,
  attacks,
  attention,
  batch_norm,
  bounds,
  checkpoints,
  data,
  evaluation,
  explain,
  figures,
  interop,
  losses,
  metrics,
  models,
  objectives,
  optim,
  report,
  rng,
  sharding,
)
from atat_jax.attacks import classifiers
from atat_jax.attacks.autoattack import versions
from atat_jax.data import (
  augment,
  batches,
  cifar,
  corruptions,
  digits,
  mixing,
  photographs,
)
from atat_jax.evaluation import iterates
from atat_jax.models import base as base_networks
from atat_jax.runs import configuration, files


@dataclasses.dataclass(frozen=True)
class Entry:
  """A public function with right arguments and the kinds of its arguments.

  Attributes:
    function: The function or class.
    right: World to keyword arguments that it accepts.
    kinds: Argument to its kind in `BANKS`; a "?" behind it: None is allowed.
    says: Argument to a pattern that may name it in its place.
    title: Name in the report of a failure, where the function has many entries.
  """

  function: Callable[..., Any]
  right: Callable[[World], dict[str, Any]]
  kinds: dict[str, str]
  says: dict[str, str] = dataclasses.field(default_factory=dict)
  title: str = ""

  @property
  def name(self) -> str:
    """Module and name of the function."""
    if self.title:
      return self.title
    module = self.function.__module__.removeprefix("atat_jax.")
    return f"{module}.{self.function.__qualname__}"

  def values(self, argument: str) -> bad_values.Bank:
    """The values that an argument must refuse."""
    kind = self.kinds[argument]
    bank = BANKS[kind.removesuffix("?")]
    return {k: v for k, v in bank.items() if k != "None" or kind[-1] != "?"}


def _attack(w: World) -> dict[str, Any]:
  return {
    "key": w.key,
    "classifier": w.classifier,
    "images": w.images,
    "labels": w.labels,
    "epsilon": 0.1,
  }


_ATTACK = {
  "key": "key",
  "classifier": "classifier",
  "images": "images",
  "labels": "labels",
  "epsilon": "epsilon",
}


def _bounds(w: World) -> dict[str, Any]:
  return {name: x for name, x in _attack(w).items() if name != "key"}


def _analysis(w: World) -> dict[str, Any]:
  return {
    "key": w.key,
    "networks": w.networks,
    "images": w.images,
    "labels": w.labels,
  }


_ANALYSIS = {
  "key": "key",
  "networks": "networks",
  "images": "images",
  "labels": "labels",
  "mesh": "mesh?",
}


_IN_PROTOCOL = (
  r"attacks?|parameter|num_\w+|epsilon|step_size|momentum|norm|random_start"
  r"|enlarged"
)


ENTRIES = [
  Entry(attacks.fgsm, _attack, {**_ATTACK, "loss": "name"}),
  Entry(
    attacks.ifgsm,
    lambda w: {**_attack(w), "step_size": 0.1, "num_steps": 2},
    {
      **_ATTACK,
      "step_size": "positive",
      "num_steps": "count",
      "loss": "name",
    },
  ),
  Entry(
    attacks.pgd,
    lambda w: {**_attack(w), "step_size": 0.1, "num_steps": 2},
    {
      **_ATTACK,
      "step_size": "positive",
      "num_steps": "count",
      "norm": "name",
      "loss": "name",
      "random_start": "boolean",
      "num_restarts": "count",
      "targets": "labels?",
      "num_targets": "count",
      "momentum": "number",
      "eot_samples": "count",
    },
  ),
  Entry(
    attacks.apgd,
    lambda w: {**_attack(w), "num_steps": 2},
    {
      **_ATTACK,
      "num_steps": "count",
      "norm": "name",
      "loss": "name",
      "num_targets": "count",
      "num_restarts": "count",
      "eot_samples": "count",
      "enlarged": "boolean",
      "targeting": "name",
    },
  ),
  Entry(
    attacks.fab,
    lambda w: {**_attack(w), "num_steps": 2},
    {
      **_ATTACK,
      "num_steps": "count",
      "norm": "name",
      "num_targets": "count",
      "num_restarts": "count",
      "targeted": "boolean",
      "targeting": "name",
    },
  ),
  Entry(
    attacks.square,
    lambda w: {**_attack(w), "num_queries": 2},
    {
      **_ATTACK,
      "num_queries": "count",
      "norm": "name",
      "num_restarts": "count",
    },
  ),
  Entry(
    attacks.autoattack,
    lambda w: {**_attack(w), "version": ["apgd-ce"], "progress": False},
    {
      **_ATTACK,
      "norm": "name",
      "version": "name",
      "options": "options?",
      "targeting": "name?",
      "screening": "name?",
      "batch_size": "count",
      "mesh": "mesh?",
      "state_path": "path?",
      "save_every_s": "number",
      "progress": "boolean",
    },
  ),
  Entry(
    attention.grad_cam,
    lambda w: {
      "model": w.model,
      "variables": w.variables,
      "images": w.images,
      "labels": w.labels,
    },
    {
      "model": "model",
      "variables": "finite variables",
      "images": "images",
      "labels": "labels",
      "layers": "layers",
      "batch_norm": "name",
    },
  ),
  Entry(
    models.classifier,
    lambda w: {"model": w.model, "variables": w.variables},
    {
      "model": "model",
      "variables": "collections",
      "batch_norm": "name",
      "fixed_statistics": "boolean",
    },
  ),
  Entry(
    models.with_fixed_statistics,
    lambda w: {
      "made": models.classifier(w.model, w.variables, batch_norm="batch")
    },
    {"made": "classifier"},
    {"made": "classifier"},
  ),
  Entry(
    models.with_dtype,
    lambda w: {
      "made": models.classifier(w.model, w.variables),
      "dtype": "bfloat16",
    },
    {"made": "classifier", "dtype": "name"},
    {"made": "classifier"},
  ),
  Entry(
    analyses.attack_steps,
    lambda w: {**_analysis(w), "epsilon": 0.1, "step_size": 0.1},
    {
      **_ANALYSIS,
      "epsilon": "epsilon",
      "step_size": "positive",
      "num_steps": "count",
      "norm": "name",
      "loss": "name",
      "batch_size": "count",
    },
  ),
  Entry(
    analyses.attack_epsilons,
    lambda w: {**_analysis(w), "epsilons": [0.0, 0.1]},
    {
      **_ANALYSIS,
      "epsilons": "radii",
      "num_steps": "count",
      "norm": "name",
      "loss": "name",
      "batch_size": "count",
    },
  ),
  Entry(
    analyses.attention_maps,
    lambda w: {**_analysis(w), "protocol": w.protocol},
    {
      **_ANALYSIS,
      "protocol": "protocol",
      "source": "name?",
      "layer": "layer",
    },
  ),
  Entry(
    analyses.attention_rounds,
    lambda w: {**_analysis(w), "epsilon": 0.1, "step_size": 0.1},
    {
      **_ANALYSIS,
      "epsilon": "epsilon",
      "step_size": "positive",
      "rounds": "counts",
      "norm": "name",
      "loss": "name",
      "random_start": "boolean",
      "source": "name?",
      "layer": "layer",
    },
  ),
  Entry(
    analyses.attention_shift,
    lambda w: {**_analysis(w), "epsilon": 0.1, "step_size": 0.1},
    {
      **_ANALYSIS,
      "epsilon": "epsilon",
      "step_size": "positive",
      "rounds": "counts",
      "norm": "name",
      "loss": "name",
      "random_start": "boolean",
      "layer": "layer",
      "batch_size": "count",
    },
  ),
  Entry(
    analyses.loss_landscape,
    lambda w: {**_analysis(w), "radius": 0.1, "num_points": 3},
    {
      **_ANALYSIS,
      "radius": "positive",
      "num_points": "odd count",
      "batch_size": "count",
    },
  ),
  Entry(
    analyses.loss_curvature,
    lambda w: {**_analysis(w), "num_iterations": 2},
    {
      **_ANALYSIS,
      "num_iterations": "count",
      "tolerance": "positive",
      "batch_size": "count",
    },
  ),
  Entry(
    analyses.default_epsilons,
    lambda w: {"epsilon": 0.1, "norm": "linf", "num_pixels": 12},
    {"epsilon": "epsilon", "norm": "name", "num_pixels": "count"},
  ),
  Entry(
    analyses.parse,
    lambda w: {"names": "steps"},
    {"names": "comma list"},
    {"names": "analyses"},
  ),
  Entry(
    analyses.FigureSettings,
    lambda w: {
      "analyses": ("steps",),
      "attack": w.protocol,
      "epsilon": 0.1,
      "step_size": 0.1,
    },
    {
      "analyses": "analysis names",
      "attack": "protocol",
      "epsilon": "epsilon",
      "step_size": "positive",
      "norm": "name",
      "num_images": "count",
      "rounds": "counts",
      "num_followed": "count",
      "num_examples": "count",
      "indices": "indices",
      "num_points": "odd count",
      "num_steps": "count",
      "epsilons": "radii",
      "batch_size": "count",
      "seed": "seed",
    },
  ),
  Entry(
    evaluation.accuracy,
    lambda w: {
      "key": w.key,
      "classifier": w.classifier,
      "data": w.split,
      "protocol": w.protocol,
      "batch_size": 2,
      "mesh": w.mesh,
    },
    {
      "key": "key",
      "classifier": "classifier",
      "data": "split",
      "protocol": "protocol",
      "batch_size": "count",
      "mesh": "mesh",
      "on_batch": "function",
    },
  ),
  Entry(
    evaluation.class_counts,
    lambda w: {
      "key": w.key,
      "classifier": w.classifier,
      "data": w.split,
      "protocol": w.protocol,
      "batch_size": 2,
      "num_classes": bad_values.NUM_CLASSES,
      "mesh": w.mesh,
    },
    {
      "key": "key",
      "classifier": "classifier",
      "data": "split",
      "protocol": "protocol",
      "batch_size": "count",
      "num_classes": "count",
      "mesh": "mesh",
      "on_batch": "function",
    },
  ),
  Entry(
    evaluation.audit,
    lambda w: {
      **_attack(w),
      "adversarial": w.images,
      "num_steps": (1, 2),
      "num_noise": 2,
      "num_examples": 2,
      "progress": False,
    },
    {
      **_ATTACK,
      "adversarial": "attacked images",
      "norm": "name",
      "batch_size": "count",
      "num_examples": "count",
      "num_steps": "counts",
      "num_noise": "count",
      "mesh": "mesh?",
      "progress": "boolean",
    },
  ),
  Entry(
    evaluation.benchmark,
    lambda w: {**_attack(w), "attacks": "pgd1", "batch_size": 4},
    {
      **_ATTACK,
      "images": "clean images",
      "norm": "name",
      "attacks": "name",
      "step_size": "positive?",
      "num_restarts": "count",
      "batch_size": "count",
      "dataset": "text",
      "name": "text",
      "out": "path?",
      "corruptions": "path",
      "certify": "boolean",
      "mesh": "mesh?",
    },
  ),
  Entry(
    bounds.interval,
    _bounds,
    {k: v for k, v in _ATTACK.items() if k != "key"},
  ),
  Entry(
    bounds.crown,
    _bounds,
    {k: v for k, v in _ATTACK.items() if k != "key"},
  ),
  Entry(
    evaluation.parse,
    lambda w: {"name": "pgd2", "epsilon": 0.1, "step_size": 0.1},
    {
      "name": "protocol name",
      "epsilon": "epsilon",
      "step_size": "positive",
      "norm": "name",
      "num_restarts": "count",
    },
    {"name": _IN_PROTOCOL},
  ),
  Entry(
    evaluation.parse_list,
    lambda w: {"names": "pgd2", "epsilon": 0.1, "step_size": 0.1},
    {
      "names": "protocol names",
      "epsilon": "epsilon",
      "step_size": "positive",
      "norm": "name",
      "num_restarts": "count",
    },
    {"names": _IN_PROTOCOL},
  ),
]


# Objectives, networks, losses: fields and their kinds by type and name.


def _kind(name: str, value: Any) -> str:
  """Kind of a field of an objective or a network, from name and default."""
  named = {
    "epsilon": "epsilon",
    "step_size": "positive",
    "num_steps": "count",
    "mean": "means",
    "std": "stds",
    "dtype": "dtype",
    "depth": "depth",
    "p": "order",
    "negative_slope": "real",
    "batch_norm_momentum": "fraction",
    "batch_norm_epsilon": "positive",
    "batch_norm_group_size": "number of an axis",
  }
  if name in named:
    return named[name]
  if isinstance(value, bool):
    return "boolean"
  if isinstance(value, str):
    return "name"
  if isinstance(value, int):
    return "count"
  if isinstance(value, float):
    return "weight"
  return "sizes" if value and isinstance(value[0], int) else "names of layers"


def _created(create: Any, name: str, fields: dict[str, Any]) -> Entry:
  """Entry of a registered member whose fields are given to `create`."""
  kinds = {field: _kind(field, value) for field, value in fields.items()}
  if "layer" in kinds:  # the network is not known yet
    kinds["layer"] = "text"
  fixed = {"mean": (0.5,), "std": (0.5,)} if "mean" in fields else {}
  return Entry(
    create,
    lambda _: {"name": name, **fixed},
    {"name": "name", **kinds},
    {"name": "method|model"},
    title=f"{create.__module__.removeprefix('atat_jax.')}.create({name})",
  )


def _network_fields(name: str) -> dict[str, Any]:
  return {
    field.name: field.default
    for field in dataclasses.fields(models.MODELS[name])
    if field.name in models.field_names(name)
  }


ENTRIES += [
  _created(objectives.create, name, objectives.defaults(name))
  for name in objectives.OBJECTIVES
]
ENTRIES += [
  _created(models.create, name, _network_fields(name)) for name in models.MODELS
]


def _two(w: World) -> dict[str, Any]:
  del w
  return {
    "logits": np.zeros((2, 5), np.float32),
    "labels": np.array([1, 2], np.int32),
  }


def _pair(first: str, second: str) -> Callable[[World], dict[str, Any]]:
  return lambda _: {
    first: np.zeros((2, 5), np.float32),
    second: np.zeros((2, 5), np.float32),
  }


_TWO = {"logits": "logits", "labels": "classes"}
_EITHER = {"logits": "labels", "labels": "logits"}

ENTRIES += [
  Entry(losses.cross_entropy, _two, _TWO, _EITHER),
  Entry(losses.margin, _two, _TWO, _EITHER),
  Entry(losses.dlr, _two, _TWO, _EITHER),
  Entry(
    losses.targeted_dlr,
    lambda w: {**_two(w), "targets": np.array([2, 1])},
    {**_TWO, "targets": "classes"},
    {**_EITHER, "targets": "logits"},
  ),
  Entry(
    losses.targeted_margin,
    lambda w: {**_two(w), "targets": np.array([2, 1])},
    {**_TWO, "targets": "classes"},
    {**_EITHER, "targets": "logits"},
  ),
  Entry(
    losses.soft_cross_entropy,
    _pair("logits", "targets"),
    {"logits": "more logits", "targets": "more logits"},
    {"logits": "targets", "targets": "logits"},
  ),
  Entry(
    losses.mixture_cross_entropy,
    lambda w: {
      **_pair("clean", "adversarial")(w),
      "targets": np.zeros((2, 5), np.float32),
    },
    {
      "clean": "more logits",
      "adversarial": "more logits",
      "targets": "more logits",
    },
    {
      "clean": "targets|logits",
      "adversarial": "targets|logits",
      "targets": "logits",
    },
  ),
  Entry(
    losses.kl_divergence,
    _pair("p_logits", "q_logits"),
    {"p_logits": "more logits", "q_logits": "more logits"},
    {"p_logits": "q_logits", "q_logits": "p_logits"},
  ),
  Entry(
    losses.mean_square,
    _pair("a", "b"),
    {"a": "batch", "b": "batch"},
    {"a": "b", "b": "a"},
  ),
  Entry(
    losses.distance,
    _pair("a", "b"),
    {"a": "batch", "b": "batch", "p": "order"},
    {"a": "b", "b": "a"},
  ),
  Entry(
    losses.norm,
    lambda w: {"x": np.zeros((2, 5), np.float32)},
    {"x": "arrays", "p": "order"},
  ),
  Entry(
    losses.attack_loss,
    lambda w: {**_two(w), "name": "margin"},
    {**_TWO, "name": "name"},
    {**_EITHER, "name": "loss"},
  ),
  Entry(
    losses.attack_loss,
    lambda w: {**_two(w), "name": "targeted_margin"},
    {"targets": "classes"},
    {"targets": "logits"},
    title="losses.attack_loss(targeted)",
  ),
  Entry(
    metrics.zeros, lambda _: {"names": ("loss",)}, {"names": "metric names"}
  ),
  Entry(
    metrics.from_examples,
    lambda _: {"values": {"loss": np.zeros(2)}, "mask": np.ones(2, bool)},
    {"values": "values", "mask": "mask?"},
    {"mask": "values", "values": "mask"},
  ),
  Entry(
    metrics.merge,
    lambda _: {"a": {"a": np.ones(2)}, "b": {"a": np.ones(2)}},
    {"a": "sums", "b": "sums"},
    {"a": "b", "b": "a"},
  ),
  Entry(
    metrics.compute, lambda _: {"sums": {"a": np.ones(2)}}, {"sums": "sums"}
  ),
  *(
    Entry(
      optim.make_schedule,
      lambda _, name=name: {
        "name": name,
        "learning_rate": 0.1,
        "total_steps": 100,
        "boundaries": (50,),
        "warmup_fraction": 0.1,
      },
      {
        "name": "name",
        "learning_rate": "positive",
        "total_steps": "count",
        "warmup_fraction": "fraction",
      }
      | (
        {"boundaries": "boundaries", "factor": "positive"}
        if name == "piecewise"
        else {}
      ),
      {"name": "schedule"},
      title=f"optim.make_schedule({name})",
    )
    for name in optim.SCHEDULES
  ),
  Entry(
    optim.make_optimizer,
    lambda _: {"schedule": lambda step: 0.1},
    {
      "schedule": "schedule",
      "momentum": "fraction",
      "nesterov": "boolean",
      "weight_decay": "weight",
      "clip_norm": "weight",
      "name": "name",
      "second_momentum": "fraction",
    },
    {"name": "optimizer"},
  ),
  Entry(
    rng.stream,
    lambda w: {"key": w.key, "name": "attack"},
    {"key": "key", "name": "text", "step": "step"},
  ),
  Entry(sharding.make_mesh, lambda _: {}, {"devices": "devices"}),
  Entry(sharding.replicated, lambda w: {"mesh": w.mesh}, {"mesh": "mesh"}),
  Entry(
    sharding.batch_sharding,
    lambda w: {"mesh": w.mesh, "batch_size": 2},
    {"mesh": "mesh", "batch_size": "count", "axis": "number of an axis"},
  ),
  Entry(
    sharding.check_divides,
    lambda w: {"mesh": w.mesh, "batch_size": 8 * w.mesh.size},
    {"mesh": "mesh", "batch_size": "count", "parts": "count"},
  ),
  Entry(
    sharding.split_mesh,
    lambda w: {"mesh": w.mesh, "model_axis": 1},
    {"mesh": "mesh", "model_axis": "count"},
  ),
  Entry(sharding.splits_state, lambda w: {"mesh": w.mesh}, {"mesh": "mesh"}),
  *(
    Entry(
      function,
      lambda w: {"mesh": w.mesh, "tree": {"a": np.zeros(2)}},
      {"mesh": "mesh"},
    )
    for function in (
      sharding.state_shardings,
      sharding.split_state,
      sharding.put_state,
    )
  ),
  Entry(
    sharding.gather,
    lambda w: {"mesh": w.mesh, "tree": {"a": np.zeros(2)}},
    {"mesh": "mesh"},
  ),
  Entry(
    sharding.put_batch,
    lambda w: {"mesh": w.mesh, "array": np.zeros((2, 3))},
    {"mesh": "mesh", "array": "host arrays", "axis": "axis"},
  ),
  Entry(
    sharding.put_replicated,
    lambda w: {"mesh": w.mesh, "tree": {"a": np.zeros(2)}},
    {"mesh": "mesh"},
  ),
  Entry(
    sharding.to_host,
    lambda w: {"mesh": w.mesh, "tree": {"a": np.zeros(2)}},
    {"mesh": "mesh"},
  ),
  Entry(
    objectives.defaults,
    lambda _: {"name": "at"},
    {"name": "name"},
    {"name": "method"},
  ),
  Entry(
    objectives.setting,
    lambda _: {"name": "atat_mixture"},
    {"name": "name"},
    {"name": "method"},
  ),
  Entry(
    objectives.setting_name,
    lambda _: {"method": "atat", "fields": {"lambda1": 0.0, "lambda2": 0.0}},
    {"method": "name", "fields": "mapping"},
  ),
  Entry(
    objectives.make_batch,
    lambda w: {"images": w.images, "labels": w.labels, "num_classes": 5},
    {"images": "image batch", "labels": "classes", "num_classes": "count"},
    {"labels": "images", "images": "labels"},
  ),
  Entry(
    models.field_names,
    lambda _: {"name": "vgg16"},
    {"name": "name"},
    {"name": "model"},
  ),
  Entry(
    models.adapt,
    lambda w: {
      "network": w.model,
      "variables": w.variables,
      "call": lambda network, images: network(images),
    },
    {"network": "no function", "variables": "collections", "call": "function"},
    {"network": "network|variables"},
  ),
  Entry(
    models.from_functions,
    lambda _: {"features": lambda x: x, "head": lambda x: x.mean((1, 2))},
    {"features": "function", "head": "function"},
  ),
  Entry(
    attention.layers,
    lambda w: {"model": w.model, "variables": w.variables, "images": w.images},
    {"model": "model", "variables": "variables", "images": "image batch"},
  ),
  Entry(
    attention.layer_names,
    lambda w: {"model": w.model, "variables": w.variables, "images": w.images},
    {"model": "model", "variables": "variables", "images": "image batch"},
  ),
  Entry(
    attention.chosen_layers,
    lambda w: {
      "model": w.model,
      "variables": w.variables,
      "images": w.images,
      "layers": None,
    },
    {
      "model": "model",
      "variables": "variables",
      "images": "image batch",
      "layers": "layers",
    },
  ),
  Entry(
    attention.activations,
    lambda w: {"model": w.model, "variables": w.variables, "images": w.images},
    {
      "model": "model",
      "variables": "variables",
      "images": "image batch",
      "layers": "layers",
      "batch_norm": "name",
    },
  ),
  Entry(
    attention.forward,
    lambda w: {
      "model": w.model,
      "variables": w.variables,
      "images": w.images,
      "labels": w.labels,
    },
    {
      "model": "model",
      "variables": "variables",
      "images": "image batch",
      "labels": "classes",
      "layers": "layers",
      "batch_norm": "name",
      "maps": "name",
    },
    {"labels": "images", "images": "labels"},
  ),
  Entry(
    attention.channel_sum,
    lambda w: {"tensor": w.images},
    {"tensor": "image batch"},
  ),
  Entry(
    attention.check_layers,
    lambda _: {"layers": ["a"], "names": ["a"]},
    {"layers": "layers"},
  ),
  Entry(
    batch_norm.apply,
    lambda w: {"model": w.model, "variables": w.variables, "images": w.images},
    {
      "model": "model",
      "variables": "collections",
      "images": "arrays",
      "batch_norm": "name",
    },
  ),
  *(
    Entry(
      function,
      lambda w: {
        "model": w.model,
        "variables": w.variables,
        "images": w.images,
      },
      {"model": "model", "variables": "collections", "images": "arrays"},
    )
    for function in (batch_norm.statistics, batch_norm.apply_fixed)
  ),
  Entry(
    data.load,
    lambda _: {"name": "digits"},
    {
      "name": "name",
      "data_dir": "place?",
      "cache_dir": "place?",
      "validation_size": "count",
      "source": "name",
      "size": "number",
      "streaming": "spec?",
    },
  ),
  Entry(data.check_name, lambda _: {"name": "digits"}, {"name": "name"}),
  Entry(
    data.spec,
    lambda _: {"name": "digits"},
    {
      "name": "name",
      "data_dir": "place?",
      "cache_dir": "place?",
      "size": "number",
      "streaming": "spec?",
    },
  ),
  Entry(
    augment.to_float, lambda w: {"images": w.split.images}, {"images": "pixels"}
  ),
  Entry(
    augment.pad_crop_flip,
    lambda w: {
      "key": w.key,
      "images": w.images,
      "padding": 1,
      "flip": True,
    },
    {"key": "key", "images": "pixels", "padding": "padding", "flip": "boolean"},
  ),
  Entry(
    augment.crop_flip,
    lambda w: {
      "images": w.images,
      "offsets": np.zeros((2, 2), np.int32),
      "flips": np.zeros(2, bool),
      "padding": 1,
    },
    {
      "images": "pixels",
      "offsets": "classes",
      "flips": "mask",
      "padding": "padding",
    },
    {"offsets": "images", "flips": "images", "images": "offsets"},
  ),
  Entry(
    corruptions.corrupt,
    lambda w: {
      "key": w.key,
      "images": w.images,
      "kind": "contrast",
      "severity": 3,
    },
    {
      "key": "key",
      "images": "images",
      "kind": "name",
      "severity": "count",
      "numbers": "classes?",
    },
    {"numbers": "images", "images": "numbers"},
  ),
  Entry(
    mixing.check,
    lambda _: {"name": "mixup", "alpha": 1.0},
    {"name": "name", "alpha": "positive"},
    {"name": "mix", "alpha": "mix_alpha"},
  ),
  Entry(
    mixing.mix,
    lambda w: {
      "key": w.key,
      "images": w.images,
      "labels": w.labels,
      "targets": np.zeros((2, 5), np.float32),
      "name": "mixup",
      "alpha": 1.0,
    },
    {
      "key": "key",
      "images": "image batch",
      "labels": "classes",
      "targets": "logits",
      "name": "name",
      "alpha": "positive",
    },
    {
      "name": "mix",
      "alpha": "mix_alpha",
      "labels": "images",
      "targets": "images",
      "images": "labels",
    },
  ),
  Entry(
    photographs.read_photograph,
    lambda w: {"path": w.photograph},
    {"path": "file", "resize": "count", "crop": "count"},
    {"path": "missing|world.*"},
  ),
  Entry(
    batches.train_indices,
    lambda _: {"seed": 0, "step": 0, "num_examples": 10, "batch_size": 2},
    {
      "seed": "seed of a run",
      "step": "step",
      "num_examples": "count",
      "batch_size": "count",
    },
  ),
  Entry(
    batches.eval_batches,
    lambda _: {"num_examples": 10, "batch_size": 2},
    {"num_examples": "count", "batch_size": "count"},
  ),
  Entry(
    data.extra.read,
    lambda w: {"path": w.folder, "spec": w.spec},
    {"path": "file", "spec": "spec"},
    {"path": "missing|world.*|extra"},
  ),
  Entry(
    checkpoints.restore_model,
    lambda w: {"workdir": w.folder},
    {
      "workdir": "folder",
      "step": "step?",
      "which": "name",
      "expected": "mapping?",
      "averaged": "boolean",
    },
    {"workdir": "missing"},
  ),
  Entry(
    checkpoints.checkpoint_step,
    lambda w: {"workdir": w.folder},
    {"workdir": "folder", "step": "step?", "which": "name"},
    {"workdir": "missing"},
  ),
  Entry(
    checkpoints.model_spec,
    lambda w: {"name": "net", "model": w.model, "image_shape": (6, 6, 1)},
    {"name": "text", "model": "model", "image_shape": "sizes"},
  ),
  Entry(
    interop.load_torch,
    lambda w: {"path": w.folder / "x.pth", "model": models.create("vgg16")},
    {
      "path": "file",
      "model": "model",
      "num_channels": "count",
      "entry": "text?",
      "check_fields": "boolean",
    },
    {"path": "weights|missing|world.*"},
  ),
  Entry(
    interop.read_state_dict,
    lambda w: {"path": w.folder / "x.pth"},
    {"path": "file", "entry": "text?"},
    {"path": "weights|missing|world.*"},
  ),
  Entry(
    interop.load,
    lambda w: {
      "path": w.weights,
      "images": w.images,
      "labels": w.labels,
    },
    {
      "path": "file",
      "images": "stored images?",
      "labels": "labels?",
      "num_examples": "count",
      "entry": "text?",
    },
    {"path": "weights|missing|world.*"},
  ),
  Entry(
    interop.save,
    lambda w: {
      "path": w.folder / "saved.safetensors",
      "model": w.loaded.model,
      "variables": w.loaded.variables,
    },
    {"path": "file", "model": "model", "variables": "variables"},
  ),
  Entry(
    interop.sanity,
    lambda w: {"loaded": w.loaded, "images": w.images, "labels": w.labels},
    {
      "loaded": "subject",
      "images": "stored images",
      "labels": "labels",
      "num_examples": "count",
    },
  ),
  Entry(
    evaluation.diagnose,
    lambda _: {"rows": [], "model": "net"},
    {"rows": "rows", "model": "text"},
  ),
  Entry(
    iterates.WatchedAttack,
    lambda _: {"rounds": (1, 2), "epsilon": 0.1, "step_size": 0.1},
    {
      "rounds": "counts",
      "epsilon": "epsilon",
      "step_size": "positive",
      "norm": "name",
      "loss": "name",
      "random_start": "boolean",
    },
  ),
  Entry(
    versions.make,
    lambda _: {"version": ["apgd-ce"], "norm": "linf", "num_classes": 5},
    {
      "version": "name",
      "norm": "name",
      "num_classes": "count",
      "options": "options?",
      "targeting": "name?",
    },
  ),
  Entry(
    report.write_report,
    lambda w: {"workdir": w.folder},
    {"workdir": "folder"},
    {"workdir": "missing"},
  ),
  Entry(
    report.write_comparison,
    lambda w: {"workdirs": [w.folder], "out": w.folder / "out"},
    {"workdirs": "paths", "out": "place"},
    {"workdirs": "workdir"},
  ),
  Entry(report.is_old, lambda w: {"workdir": w.folder}, {"workdir": "place"}),
  Entry(
    report.results_table,
    lambda _: {"results": {"format": 1, "rows": []}},
    {"results": "results"},
  ),
  Entry(
    report.verdict,
    lambda _: {"results": {"format": 1, "rows": []}},
    {"results": "results"},
  ),
  Entry(
    figures.draw_all, lambda w: {"workdir": w.folder}, {"workdir": "place"}
  ),
  Entry(
    figures.draw_results, lambda w: {"workdir": w.folder}, {"workdir": "place"}
  ),
  Entry(
    figures.draw_curves, lambda w: {"workdir": w.folder}, {"workdir": "place"}
  ),
  Entry(
    figures.draw_comparison,
    lambda w: {"path": w.folder / "x.json"},
    {"path": "file"},
    {"path": "missing|world.*"},
  ),
  Entry(
    analyses.write,
    lambda w: {
      "directory": w.folder,
      "networks": w.networks,
      "images": np.asarray(w.images),
      "labels": np.asarray(w.labels),
      "settings": w.settings,
      "class_names": list("abcde"),
      "mesh": w.mesh,
    },
    {
      "directory": "place",
      "networks": "networks",
      "images": "stored images",
      "labels": "labels",
      "settings": "settings",
      "class_names": "class names",
      "mesh": "mesh",
    },
    {"settings": "analyses|indices", "class_names": "labels"},
  ),
  *(
    Entry(
      function,
      lambda w: {"settings": w.settings, "count": 2},
      {"settings": "settings", "count": "count"},
      {"settings": "analyses|indices"},
    )
    for function in (analyses.check_images, analyses.for_images)
  ),
  Entry(
    analyses.sections,
    lambda w: {"directory": w.folder, "figures_directory": w.folder},
    {
      "directory": "place",
      "figures_directory": "place",
      "only": "analysis names?",
    },
  ),
  Entry(
    analyses.draw,
    lambda w: {"directory": w.folder, "figures_directory": w.folder},
    {"directory": "place", "figures_directory": "place"},
  ),
  Entry(
    configuration.read,
    lambda w: {"workdir": w.folder},
    {"workdir": "folder"},
    {"workdir": "missing"},
  ),
  *(
    Entry(function, lambda w: {"path": w.folder / "x"}, {"path": "place"})
    for function in (files.read_json, files.read_arrays, files.read_metrics)
  ),
  Entry(
    files.read_results, lambda w: {"workdir": w.folder}, {"workdir": "place"}
  ),
  Entry(
    explain.load_photographs,
    lambda w: {
      "names": ["vgg16"],
      "weights": [w.folder / "x.pth"],
      "photographs": [w.photograph],
      "labels": [1],
      "num_classes": 1000,
    },
    {
      "names": "model names",
      "weights": "paths",
      "photographs": "paths",
      "labels": "label list",
      "num_classes": "count?",
      "class_names": "file?",
      "entry": "text?",
      "fields": "mapping?",
    },
    {
      "names": "model",
      "weights": "path",
      "photographs": "images|path",
      "class_names": "labels|weights",
    },
  ),
  Entry(
    explain.load_weights,
    lambda w: {"names": [], "weights": [w.weights], "dataset": "digits"},
    {
      "names": "model names",
      "weights": "paths",
      "dataset": "name",
      "data_dir": "place?",
      "entry": "text?",
      "fields": "mapping?",
    },
    {"names": "model", "weights": "path", "dataset": "data.name|name"},
  ),
  Entry(
    explain.load_runs,
    lambda w: {"workdirs": [w.folder]},
    {"workdirs": "paths"},
    {"workdirs": "workdir|runs"},
  ),
  Entry(
    explain.run_names,
    lambda w: {"workdirs": [w.folder]},
    {"workdirs": "paths"},
    {"workdirs": "workdir|runs"},
  ),
  Entry(
    explain.explain,
    lambda w: {"subject": w.subject, "settings": w.settings, "out": w.folder},
    {
      "subject": "subject",
      "settings": "settings",
      "out": "place",
      "command": "text",
    },
    {"settings": "analyses|indices"},
  ),
]

ENTRIES += [
  Entry(
    classifiers.as_pytree,
    lambda w: {"classifier": w.classifier},
    {"classifier": "no function"},
  ),
  Entry(sharding.mesh_or_all, lambda w: {"mesh": w.mesh}, {"mesh": "mesh?"}),
  Entry(sharding.check_mesh, lambda w: {"mesh": w.mesh}, {"mesh": "mesh"}),
  *(
    Entry(
      read,
      lambda _: {"data_dir": "nowhere"},
      {"source": "name"},
      title=f"{read.__module__.removeprefix('atat_jax.')}.{read.__name__}",
    )
    for read in (digits.read, cifar.read_cifar10, cifar.read_cifar100)
  ),
  Entry(
    base_networks.standardize_images,
    lambda w: {"images": w.images},
    {"images": "image batch"},
  ),
  Entry(
    explain.attack_of_runs,
    lambda w: {"workdirs": [w.folder], "given": {}},
    {"workdirs": "paths", "given": "mapping"},
    {"workdirs": "workdir|runs"},
  ),
]


PARTS = (
  # Loops, programs, files and pictures of the package itself: whatever they get
  # has been checked by a function of the table, or by `config.make_plan`, whose
  # fields have a test of their own.
  "checks",
  "cli",
  "compilation",
  "config",
  "drawing",
  "errors",
  "evaluate",
  "fields",
  "pipeline",
  "plan",
  "process",
  "runtime",
  "state",
  "steps",
  "train",
  "training",
  "trial",
  "untrusted",
  "bounds.affine_rules",
  "bounds.curves",
  "bounds.network",
  "bounds.nodes",
  "bounds.products",
  "bounds.propagation",
  "bounds.windows",
  "attacks.autoattack.progress",
  "attacks.autoattack.screening",
  "attacks.autoattack.slots",
  "attacks.balls",
  "attacks.base",
  "attacks.convolutions",
  "attacks.diagnostics",
  "attacks.hyperplane",
  "attacks.nonfinite",
  "attacks.search",
  "attacks.simplex",
  "attacks.targeting",
  "data.archives",
  "data.base",
  "data.corruptions.apply",
  "data.corruptions.blur",
  "data.corruptions.digital",
  "data.corruptions.geometry",
  "data.corruptions.noise",
  "data.corruptions.published",
  "data.corruptions.weather",
  "data.batches.tell",
  "data.batches.watch",
  "data.prepare",
  "data.record_files",
  "data.streamed",
  "evaluation.certifying",
  "evaluation.corrupted",
  "evaluation.map_distances",
  "evaluation.networks",
  "evaluation.parts",
  "evaluation.ranking",
  "evaluation.sweeps",
  "figures.comparison",
  "figures.curves",
  "figures.robustness",
  "interop.description",
  "interop.entry_names",
  "interop.layouts",
  "interop.loaded",
  "interop.recognition",
  "interop.safetensors_file",
  "interop.sanity_check.decide",
  "interop.sanity_check.examples",
  "interop.tensorflow_checkpoint",
  "interop.torch_file",
  "interop.torch_module",
  "interop.torch_names",
  "interop.saving.Saved",
  "interop.torch_weights.example_side",
  "interop.torch_weights.fit",
  "interop.torch_weights.read",
  "interop.torch_weights.tensor_name",
  "interop.torch_weights.to_torch",
  "interop.wrappers",
  "models.blocks",
  "models.normalization",
  "models.convolution",
  "models.winograd",
  "report.corruptions",
  "report.groups",
  "report.layout",
  "report.merge",
  "report.page",
  "report.published",
  "runs.attention_file",
  "runs.comparable",
  "runs.corrupted",
  "runs.copies",
  "runs.intervals",
  "runs.inventory",
  "runs.locations",
  "runs.lock",
  "runs.overfitting",
  "runs.provenance",
  "runs.results_format",
  "runs.tables",
  "runs.wording",
  "runs.worst_case",
  # Made by `objectives.create` and `models.create`, which are in the table.
  "models.base.Network",
  "models.base.ResidualNetwork",
  "models.convnext.ConvNeXt",
  "models.densenet.DenseNet121",
  "models.preact_resnet.PreActResNet18",
  "models.resnet.ResNet18",
  "models.vgg.VGG16",
  "models.vit.ViT",
  "models.wide_resnet.WideResNet",
  "models.xcit.XCiT",
  "objectives.adversarial.InnerAttack",
  "objectives.adversarial.PairedPasses",
  "objectives.alp.ALP",
  "objectives.atat.ATAT",
  "objectives.atat_released.ATATReleased",
  "objectives.mart.MART",
  "objectives.tla.TLA",
  "objectives.trades.TRADES",
  # Parts of modules that have entries.
  "analyses.attention.draw_maps",
  "analyses.attention.find_in_maps",
  "analyses.base.digest",
  "analyses.base.first",
  "analyses.base.network_names",
  "analyses.base.section",
  "analyses.base.write",
  "analyses.num_images",
  "analyses.shift.mean_band",
  "attention.taps.listing",
  "attention.taps.run",
  "analyses.shift.summarize",
  "analyses.shift.telling_round",
  "analyses.shift.verdict",
  "attacks.auto_pgd.APGD",
  "attacks.autoattack.versions.as_json",
  "attacks.autoattack.versions.describe",
  "attacks.classifiers.check_logits",
  "attacks.classifiers.num_classes",
  "attacks.fast_boundary.FAB",
  "attacks.projected_gradient.ascend",
  "attacks.projected_gradient.counted_ascend",
  "attacks.projected_gradient.random_start",
  "attacks.square_search.level",
  "attacks.square_search.schedule",
  "checkpoints.Checkpointer",
  "checkpoints.find",
  "checkpoints.restore_before",
  "data.batches.map_batches",
  "data.extra.Extra",
  "data.mixing.boxes",
  "data.folder",
  "data.npz",
  "data.own",
  "data.pictures",
  "data.tfds_sets",
  "data.prefetch.Prefetcher",
  "data.rand_augment",
  "evaluation.accuracies.by_class",
  "evaluation.accuracies.count_classes",
  "evaluation.accuracies.judge",
  "evaluation.accuracies.score",
  "evaluation.attention_views",
  "evaluation.auditing.against_noise",
  "evaluation.auditing.attack_strength",
  "evaluation.auditing.growing",
  "evaluation.auditing.in_ball",
  "evaluation.auditing.larger_balls",
  "evaluation.auditing.more_steps",
  "evaluation.benchmarking.Rows",
  "evaluation.measuring",
  "evaluation.iterates.pgd_iterates",
  "evaluation.iterates.watch",
  "evaluation.protocols.allowed_names",
  "evaluation.rules.batch_statistics",
  "evaluation.rules.iterations_beat_one_step",
  "evaluation.rules.margin_loss",
  "evaluation.rules.nonfinite",
  "evaluation.rules.published_attack",
  "evaluation.rules.steps_converged",
  "evaluation.rules.storable",
  "attack",
  "explain.main",
  "export",
  "models.batch_norm_of",
  "models.base.check_size",
  "models.base.check_sizes",
  "models.wide_resnet.average_pool",
  "objectives.adversarial.attack_is_finite",
  "objectives.adversarial.check_weights",
  "objectives.tla.hardest_negatives",
  "optim.decay_mask",
  "report.comparison.as_html",
  "report.comparison.as_markdown",
  "report.results.blocks",
  "report.results.by_class",
  "report.results.images",
  "report.results.models",
  "report.results.titled",
  "report.results.total_time",
  "report.summary.headline",
  "report.summary.sentences",
  "runs.better_attacks.find",
  "runs.better_attacks.is_published",
  "runs.configuration.check",
  "runs.configuration.parse",
  "runs.configuration.training_fields",
  "runs.configuration.write",
  "runs.files.Appender",
  "runs.files.Arrays",
  "runs.files.local",
  "runs.files.stamp",
  "sharding.as_numpy",
  "sharding.local_rows",
  "sharding.put_rows",
  "runs.files.load_arrays",
  "runs.files.parse_json",
  "runs.files.plain_errors",
  "runs.files.read_autoattack",
  "runs.files.read_bytes",
  "runs.files.read_lines",
  "runs.files.remove_temporaries",
  "runs.files.replacing",
  "runs.files.set_aside",
  "runs.files.write_arrays",
  "runs.files.write_bytes",
  "runs.files.write_json",
  "runs.files.write_text",
  "runs.spreadsheet.as_csv",
  "runs.spreadsheet.write_results",
  "runs.terminal.percent",
)
"""Modules and names that only the package itself calls, after its checks."""
