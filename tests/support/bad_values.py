"""Values that an argument of a kind must refuse, and a small world to try them.

A value is made from the world when it is tried, because some belong to a
network or must be fresh (a deleted array).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from PIL import Image

from atat_jax import (
  analyses,
  data,
  evaluation,
  explain,
  interop,
  models,
  sharding,
)
from atat_jax.data.base import DatasetSpec

SHAPE, NUM_CLASSES = (2, 6, 6, 1), 5


class Net(nn.Module):
  """One convolution and a dense layer, without BatchNorm."""

  num_classes: int = NUM_CLASSES
  features: int = 2

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    del train
    x = nn.relu(nn.Conv(self.features, (3, 3), name="conv")(images))
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class World:
  """A network, images and whatever else the functions take; made once."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  @functools.cached_property
  def model(self) -> nn.Module:
    return Net()

  @functools.cached_property
  def variables(self) -> Any:
    return self.model.init(jax.random.key(0), self.images)

  @functools.cached_property
  def other_variables(self) -> Any:
    return Net(features=3).init(jax.random.key(0), self.images)

  @functools.cached_property
  def nan_variables(self) -> Any:
    return jax.tree.map(
      lambda x: x.at[(0,) * x.ndim].set(jnp.nan), self.variables
    )

  @functools.cached_property
  def classifier(self) -> Any:
    return models.classifier(self.model, self.variables)

  @functools.cached_property
  def networks(self) -> Any:
    return {"net": (self.model, self.variables)}

  @functools.cached_property
  def key(self) -> jax.Array:
    return jax.random.key(0)

  @functools.cached_property
  def images(self) -> jax.Array:
    return jnp.asarray(
      np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    )

  @functools.cached_property
  def labels(self) -> jax.Array:
    return jnp.array([1, 4], jnp.int32)

  @functools.cached_property
  def mesh(self) -> Any:
    return sharding.make_mesh(jax.devices()[:1])

  @functools.cached_property
  def protocol(self) -> Any:
    return evaluation.parse("fgsm", epsilon=0.1, step_size=0.1)

  @functools.cached_property
  def settings(self) -> Any:
    return analyses.FigureSettings((), self.protocol, 0.1, 0.1)

  @functools.cached_property
  def split(self) -> Any:
    pixels = np.zeros(SHAPE, np.uint8)
    return data.Split(pixels, np.asarray(self.labels))

  @functools.cached_property
  def spec(self) -> Any:
    names = tuple("abcde")
    return DatasetSpec("toy", NUM_CLASSES, SHAPE[1:], names, (0.5,), (0.5,))

  @functools.cached_property
  def weights(self) -> pathlib.Path:
    """Weights of a Wide ResNet with the names of TRADES."""
    fields = dict(depth=10, width=1, stem_channels=2, num_classes=NUM_CLASSES)
    model = models.create("wide_resnet", shortcut="conv", **fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), self.images)
    (layout,) = [
      x for x in interop.layouts.LAYOUTS if x.title.endswith("TRADES")
    ]
    names, tensors = layout.names(model), {}
    for collection in variables.values():
      for layer, leaves in collection.items():
        for leaf, x in leaves.items():
          kind = {"mean": "running_mean", "var": "running_var"}.get(leaf)
          kind = kind or ("bias" if leaf == "bias" else "weight")
          shape = x.shape[::-1] if x.ndim == 2 else x.shape
          if x.ndim == 4:
            shape = (*x.shape[:1:-1], *x.shape[:2])
          tensors[f"{names[layer]}.{kind}"] = np.ones(shape, np.float32)
    path = self.folder / "weights.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path

  @functools.cached_property
  def loaded(self) -> Any:
    return interop.load(self.weights)

  @functools.cached_property
  def photograph(self) -> pathlib.Path:
    path = self.folder / "photo.png"
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(path)
    return path

  @functools.cached_property
  def subject(self) -> Any:
    return explain.Subject(
      "toys",
      self.networks,
      np.asarray(self.images),
      np.asarray(self.labels),
      list("abcde"),
      [],
    )


def _deleted(world: World) -> jax.Array:
  x = jnp.array(world.images)
  x.delete()
  return x


Bank = dict[str, Callable[[World], Any]]


def _values(*values: Any) -> Bank:
  """Constants, labelled by what they look like."""
  bank: Bank = {}
  for value in values:
    label = repr(value).replace("\n", " ")
    if len(label) > 40:
      label = f"{label[:24]}... ({type(value).__name__})"
    bank[label] = functools.partial(lambda value, world: value, value)
  return bank


NO_ARRAYS: Bank = _values(
  None, "abc", b"abc", {}, {1}, [[1], [1, 2]], object, [None], ["a"], 10**30
) | {
  "object array": lambda w: np.array([None, 1], object),
  "text array": lambda w: np.array(["a", "b"]),
  "dates": lambda w: np.array(["2020-01-01"], "datetime64[D]"),
  "a key": lambda w: w.key,
  "keys": lambda w: jax.random.split(w.key),
  "a function": lambda w: len,
  "a generator": lambda w: (x for x in (1, 2)),
  "a masked array": lambda w: np.ma.masked_array(w.images, w.images > 0.5),
}

NUMBERS = _values(
  None,
  "0.1",
  "",
  True,
  False,
  [0.1],
  (0.1, 0.2),
  {},
  1j,
  float("nan"),
  float("inf"),
  float("-inf"),
  -1,
  1e39,
  10**400,
  -2.5,
) | {
  "array of two": lambda w: np.array([0.1, 0.2]),
  "jax array of two": lambda w: jnp.array([0.1, 0.2]),
  "key": lambda w: w.key,
  "numpy nan": lambda w: np.float32(np.nan),
  "jax inf": lambda w: jnp.asarray(jnp.inf),
  "numpy text": lambda w: np.array("0.1"),
  "object": lambda w: object(),
}

IMAGES: Bank = NO_ARRAYS | {
  "a number": lambda w: 0.5,
  "no images": lambda w: w.images[:0],
  "no pixels": lambda w: w.images[:, :0],
  "an empty list": lambda w: [],
  "one image": lambda w: w.images[0],
  "five axes": lambda w: w.images[None],
  "uint8": lambda w: np.zeros(SHAPE, np.uint8),
  "integers": lambda w: np.zeros(SHAPE, int),
  "Booleans": lambda w: np.zeros(SHAPE, bool),
  "complex": lambda w: w.images + 0j,
  "nan": lambda w: w.images.at[1, 2, 3, 0].set(jnp.nan),
  "inf": lambda w: np.asarray(w.images.at[0].set(jnp.inf)),
  "0 to 255": lambda w: w.images * 255,
  "-1 to 1": lambda w: w.images * 2 - 1,
  "just above 1": lambda w: w.images.at[0, 0, 0, 0].set(1.0000001),
  "bfloat16 above 1": lambda w: w.images.astype(jnp.bfloat16) + 1,
  "float16 nan": lambda w: np.full(SHAPE, np.nan, np.float16),
  "deleted": _deleted,
}

LABELS: Bank = NO_ARRAYS | {
  "a number": lambda w: 1,
  "one too few": lambda w: w.labels[:1],
  "one too many": lambda w: jnp.zeros(3, jnp.int32),
  "a column": lambda w: w.labels[:, None],
  "one-hot": lambda w: jax.nn.one_hot(w.labels, NUM_CLASSES),
  "floats": lambda w: w.labels.astype(jnp.float32),
  "Booleans": lambda w: np.array([True, False]),
  "negative": lambda w: np.array([-1, 0]),
  "K": lambda w: np.array([0, NUM_CLASSES]),
  "2**32": lambda w: np.array([2**32, 1]),
  "2**63": lambda w: np.array([2**63, 1], np.uint64),
  "list beyond int32": lambda w: [2**32 + 1, 0],
  "empty": lambda w: np.zeros(0, np.int32),
}


def _classifier(function: Callable[[jax.Array], Any]) -> Callable[[World], Any]:
  return lambda world: function


CLASSIFIERS: Bank = _values(None, 5, "net", [], {}, 0.5) | {
  "a network": lambda w: w.model,
  "variables": lambda w: w.variables,
  "returns a tuple": _classifier(lambda x: (x.reshape(len(x), -1), 1)),
  "returns None": _classifier(lambda x: None),
  "returns a number": _classifier(lambda x: 1.0),
  "returns a text": _classifier(lambda x: "cat"),
  "returns a dict": _classifier(lambda x: {"logits": x.reshape(len(x), -1)}),
  "returns the images": _classifier(lambda x: x),
  "returns one number an image": _classifier(lambda x: x.sum((1, 2, 3))),
  "returns another batch": _classifier(lambda x: x.reshape(len(x), -1)[:1]),
  "returns twice the batch": _classifier(lambda x: x.reshape(2 * len(x), -1)),
  "returns classes": _classifier(lambda x: x.reshape(len(x), -1).argmax(-1)),
  "returns integers": _classifier(
    lambda x: x.reshape(len(x), -1).astype(jnp.int32)
  ),
  "returns no class": _classifier(lambda x: x.reshape(len(x), -1)[:, :0]),
}

KEYS = _values(None, 0, 1.5, "key", [0, 1], (), {}, True) | {
  "keys": lambda w: jax.random.split(w.key),
  "floats": lambda w: jnp.zeros(2),
  "raw keys": lambda w: np.zeros((2, 2), np.uint32),
  "three numbers": lambda w: np.zeros(3, np.uint32),
  "int32": lambda w: jnp.zeros(2, jnp.int32),
  "a function": lambda w: jax.random.key,
}

MODELS = _values(None, "wide_resnet", 5, {}, nn.Dense, len)

VARIABLES: Bank = _values(None, "x", 5, [], {}, {"params": {}}) | {
  "params alone": lambda w: w.variables["params"],
  "None inside": lambda w: {"params": {"conv": None}},
  "text inside": lambda w: {"params": jax.tree.map(str, w.variables["params"])},
  "another network's": lambda w: w.other_variables,
  "one layer less": lambda w: {
    "params": {"conv": w.variables["params"]["conv"]}
  },
  "one layer more": lambda w: {
    "params": {**w.variables["params"], "more": {"bias": jnp.zeros(2)}}
  },
  "integers": lambda w: jax.tree.map(lambda x: x.astype(int), w.variables),
  "a pair": lambda w: (w.variables, {}),
}

FINITE_VARIABLES: Bank = VARIABLES | {
  "nan": lambda w: w.nan_variables,
  "inf": lambda w: jax.tree.map(lambda x: x + jnp.inf, w.variables),
}

NETWORKS: Bank = _values(None, "net", 5, [], {}, (), {"net"}) | {
  "pairs": lambda w: list(w.networks.items()),
  "a pair": lambda w: (w.model, w.variables),
  "a model": lambda w: {"net": w.model},
  "one": lambda w: {"net": (w.model,)},
  "three": lambda w: {"net": (w.model, w.variables, 1)},
  "turned round": lambda w: {"net": (w.variables, w.model)},
  "a number for a name": lambda w: {1: (w.model, w.variables)},
  "no name": lambda w: {"": (w.model, w.variables)},
  "another's weights": lambda w: {"net": (w.model, w.other_variables)},
  "nan": lambda w: {"net": (w.model, w.nan_variables)},
  "none": lambda w: {"net": (w.model, None)},
  "second is bad": lambda w: {**w.networks, "b": (w.model, w.nan_variables)},
}

POSITIVES = NUMBERS | _values(0, 0.0, 1e-60, -1e-3)
SHARES = NUMBERS | _values(2, 1.5, 1e30)
COUNTS = NUMBERS | _values(
  0, 1.0, 2.5, 2**31, 10**30, "3", -3, "inf", [1], np.float64(3)
)
NAMES_OF = _values(
  None, "", "nope", 5, True, b"linf", ["linf"], (), {}, 1.5
) | {
  "array": lambda w: np.array(["linf", "l2"]),
  "very long": lambda w: "x\n" * 10**6,
  "a list": lambda w: ["linf"],
}
BOOLEANS = _values(None, "no", "False", "", 0, 1, 2.5, [], (), {}) | {
  "array": lambda w: np.array([True, False]),
  "jax array": lambda w: jnp.array([True]),
  "integer array": lambda w: jnp.asarray(1),
}
LAYERS = _values("conv", "", (), [], 5, True, ["nope"], [1], ("conv", None)) | {
  "bytes": lambda w: b"conv",
  "a dict": lambda w: {"conv": 1},
  "an array": lambda w: jnp.zeros(2),
}
LAYER = _values("nope", "", 5, True, ("conv",), ["conv"], {}, b"conv")
MESHES = _values(5, "cpu", [], (), True, {}) | {
  "devices": lambda w: jax.devices(),
  "another axis": lambda w: jax.make_mesh(
    (1,), ("x",), devices=jax.devices()[:1]
  ),
}
PROTOCOLS = _values(None, "fgsm", 5, {}, (), True)
COUNT_LISTS = _values(
  None, 5, "5", [], (), {}, [0.5], ["1"], [None], [-1], [True], [2**31], [[1]]
) | {"nan": lambda w: [float("nan")], "falling": lambda w: [3, 1]}
PATHS = _values(None, 5, True, [], {}, b"", "a\0b", 1.5)
FIGURE_RADII = _values(
  None, 5, "0.1", [-0.1], ["0.1"], [None], [True], [0.2, 0.1], [1.5], {}
) | {"nan": lambda w: [float("nan")], "inf": lambda w: [0.1, float("inf")]}

BANKS: dict[str, Bank] = {
  "key": KEYS,
  "classifier": CLASSIFIERS,
  "images": IMAGES,
  "labels": LABELS,
  "model": MODELS,
  "variables": VARIABLES,
  "finite variables": FINITE_VARIABLES,
  "networks": NETWORKS,
  "number": NUMBERS,
  "positive": POSITIVES,
  "epsilon": POSITIVES | _values(8, 1.001, 255),
  "share": SHARES,
  "count": COUNTS,
  "odd count": COUNTS | _values(1, 2, 8),
  "name": NAMES_OF,
  "boolean": BOOLEANS,
  "layers": LAYERS,
  "layer": LAYER,
  "mesh": MESHES,
  "protocol": PROTOCOLS,
  "counts": COUNT_LISTS,
  "path": PATHS,
  "radii": FIGURE_RADII,
}

BANKS |= {
  "collections": _values(None, "x", 5, [], ())
  | {
    "a pair": lambda w: (w.variables, {}),
  },
  "options": _values("x", 5, [], {"nope": {}}, {"apgd-ce": 5}, ())
  | {
    "unknown": lambda w: {"apgd-ce": {"nope": 5}},
    "a float": lambda w: {"apgd-ce": {"num_steps": 2.5}},
    "none": lambda w: {"apgd-ce": {"num_steps": 0}},
    "True": lambda w: {"apgd-ce": {"num_restarts": True}},
    "huge": lambda w: {"apgd-ce": {"num_steps": 2**31}},
    "a number for a name": lambda w: {1: {"num_steps": 2}},
  },
  "comma list": _values(
    None, 5, b"steps", ["steps"], "nope", "steps,steps", {}
  ),
  "names": _values(None, 5, "steps", ["nope"], [1], {}, ("steps", "steps")),
  "seed": _values(None, "0", 1.5, True, -1, [0], 2**63, float("nan"), {}),
  "split": _values(None, 5, "x", (), {})
  | {
    "arrays": lambda w: (w.images, w.labels),
    "0 to 255": lambda w: w.split._replace(
      images=np.full(SHAPE, 255, np.float32)
    ),
    "nan": lambda w: w.split._replace(
      images=np.full(SHAPE, np.nan, np.float32)
    ),
    "no labels": lambda w: w.split._replace(labels=None),
    "no images": lambda w: w.split._replace(images="abc"),
    "labels out of range": lambda w: w.split._replace(
      labels=np.array([0, NUM_CLASSES], np.int32)
    ),
    "negative labels": lambda w: w.split._replace(
      labels=np.array([0, -1], np.int32)
    ),
    "labels of 2**32": lambda w: w.split._replace(labels=np.array([2**32, 1])),
    "another number": lambda w: w.split._replace(labels=np.zeros(3, np.int32)),
    "empty": lambda w: type(w.split)(
      np.zeros((0, *SHAPE[1:]), np.uint8), np.zeros(0, np.int32)
    ),
  },
  "function": _values(None, 5, "x", [], {}),
  "protocol name": _values(
    None,
    5,
    "",
    "nope",
    "pgd",
    "pgd0",
    "pgd-2",
    "pgd2.5",
    "pgd99999999999",
    "pgd2-nope",
    "pgd2:",
    "pgd2:nope=1",
    "pgd2:momentum=x",
    "pgd2:momentum=nan",
    "pgd2:momentum=inf",
    "pgd2:epsilon=1e39",
    "pgd2:num_restarts=0",
    "nominal2",
    "pgd2:random_start=maybe",
    "pgd2:norm=l3",
    "pgd2:epsilon=2",
    "apgd5:x",
    "apgd5:enlarged=true",
    "autoattack-nope",
    "pgd2 ",
    b"pgd2",
    ["pgd2"],
    (),
    "pgd2:step_size=0",
    "pgd2:momentum=1:momentum=1",
    "PGD2",
    "pgd\u0662",
    "pgd2:epsilon=1/0",
    "pgd2:targets=1",
    "square5000000000",
    "fgsm:num_steps=5",
    "pgd2\n",
    "pgd2:num_restarts=99999999999",
  ),
  "protocol names": _values(
    None,
    5,
    "",
    ",",
    "pgd2,pgd2",
    "nope",
    ["pgd2"],
    b"pgd2",
    "pgd2,nope",
    {},
    "pgd99999999999",
  ),
}

BANKS["analysis names"] = _values(None, 5, "steps", [1], {}, [None], True)
BANKS["indices"] = {k: v for k, v in COUNT_LISTS.items() if k != "falling"}
BANKS["attacked images"] = {
  label: value
  for label, value in IMAGES.items()
  if label not in ("nan", "inf", "0 to 255", "-1 to 1", "float16 nan")
  and "above 1" not in label
}

FILES = ("missing", "a folder")
"""Labels of paths that lead to no file."""

_WEIGHTS = _values(
  None, "1", True, [1.0], {}, 1j, -0.5, 1e39, float("nan"), float("inf")
)
_LOGITS = NO_ARRAYS | {
  "a vector": lambda w: np.zeros(5, np.float32),
  "three axes": lambda w: np.zeros((2, 2, 5), np.float32),
  "integers": lambda w: np.zeros((2, 5), np.int32),
  "complex": lambda w: np.zeros((2, 5), np.complex64),
  "another batch": lambda w: np.zeros((3, 5), np.float32),
  "a number": lambda w: 1.0,
}
_CLASSES = NO_ARRAYS | {
  "one too few": lambda w: np.zeros(1, np.int32),
  "a column": lambda w: np.zeros((2, 1), np.int32),
  "floats": lambda w: np.zeros(2, np.float32),
  "Booleans": lambda w: np.zeros(2, bool),
  "one-hot": lambda w: np.zeros((2, 5), np.float32),
}
_CHANNELS = _values(
  "abc",
  5,
  (),
  ("a",),
  (None,),
  (float("nan"),),
  (float("inf"),),
  (True,),
  (1e39,),
  {},
  b"a",
)

BANKS |= {
  "weight": _WEIGHTS,
  "real": {k: v for k, v in _WEIGHTS.items() if k != "-0.5"},
  "logits": _LOGITS,
  "more logits": _LOGITS
  | {"other classes": lambda w: np.zeros((2, 4), np.float32)},
  "classes": _CLASSES,
  "batch": NO_ARRAYS
  | {
    "another batch": lambda w: np.zeros((3, 5), np.float32),
    "other shape": lambda w: np.zeros((2, 4), np.float32),
    "a number": lambda w: 1.0,
  },
  "order": _values(None, 0, 3, -1, 1.5, "2", True, [2], float("inf")),
  "means": _CHANNELS,
  "stds": _CHANNELS | _values((0.0,), (-1.0,), (1e-60,)),
  "sizes": _values(
    None,
    5,
    "5",
    (),
    ("a",),
    (0,),
    (-1,),
    (1.5,),
    (True,),
    (None,),
    {},
    (2**31,),
    ((1,),),
  ),
  "dtype": _values("float99", 5, [], {}, "int32", int, "a\nb"),
  "depth": COUNTS | _values(7, 9, 11),
  "fraction": _values(
    None, "0.1", True, [0.1], -0.1, 1.0, 2, float("nan"), float("inf"), {}
  ),
  "mapping": _values(None, 5, "x", [], ()),
  "devices": _values(5, "cpu", [], (), [1], ["cpu"], {}, True),
  "step": _values(None, "1", 1.5, True, -1, 2**63, [1], {}, float("nan")),
  "text": _values(None, 5, True, b"x", [], {}, ("x",)),
  "file": PATHS
  | {
    "missing": lambda w: w.folder / "missing",
    "a folder": lambda w: w.folder,
  },
  "folder": PATHS | {"missing": lambda w: w.folder / "missing"},
  "place": PATHS,
  "paths": _values(None, 5, "runs", [], (), [5], [None], {}, [b"a"], [""]),
  "padding": _values(None, "1", 1.5, True, -1, 2**31, [1], {}, float("nan")),
  "pixels": NO_ARRAYS
  | {
    "one image": lambda w: np.zeros((6, 6, 1), np.uint8),
    "a number": lambda w: 1,
    "complex": lambda w: w.images + 0j,
  },
  "spec": _values(None, 5, "digits", {}, ()),
  "rows": _values(None, 5, "x", {}, [1], ["a"], [{}], [{"model": "net"}]),
  "results": _values(
    None,
    5,
    "x",
    [],
    {},
    {"rows": 5},
    {"rows": [1]},
    {"rows": [{}]},
    {"format": 2, "rows": []},
    {"format": 1},
  ),
  "sums": _values(
    None,
    5,
    "x",
    [],
    {"a": 1.0},
    {"a": "x"},
    {1: [0.0, 1.0]},
    {"a": [1, 2, 3]},
    {"a": None},
  ),
  "values": _values(
    None,
    5,
    "x",
    [],
    {"a": 1.0},
    {"a": "x"},
    {"a": None},
    {1: [1.0]},
    {"a": [[1.0]]},
  ),
  "metric names": _values(None, 5, "loss", {}, [1], [None]),
}

BANKS |= {
  "names of layers": _values(None, "conv", 5, [1], (None,), {}, True),
  "arrays": NO_ARRAYS | {"a number": lambda w: 1.0},
  "image batch": NO_ARRAYS
  | {
    "one image": lambda w: w.images[0],
    "integers": lambda w: np.zeros(SHAPE, int),
    "a number": lambda w: 1.0,
    "no images": lambda w: w.images[:0],
  },
  "mask": NO_ARRAYS
  | {
    "integers": lambda w: np.ones(2, int),
    "another batch": lambda w: np.ones(3, bool),
    "two axes": lambda w: np.ones((2, 2), bool),
  },
  "axis": _values(None, "0", 1.5, True, 7, [0], {}),
  "boundaries": _values(
    None,
    5,
    "5",
    (),
    ("a",),
    (0,),
    (-1,),
    (1.5,),
    (True,),
    (None,),
    {},
    (3, 2),
    (3, 3),
    (2**31,),
  ),
  "schedule": _values(None, 0.1, "cosine", [], {}),
  "settings": _values(None, 5, "x", {}, [])
  | {
    "unknown": lambda w: dataclasses.replace(w.settings, analyses=("nope",)),
    "index": lambda w: dataclasses.replace(
      w.settings, analyses=("landscape",), indices=(99,)
    ),
  },
  "stored images": {k: v for k, v in IMAGES.items() if k != "uint8"},
  "class names": _values(None, 5, "abcde", [1], ["a"], {}, []),
  "trees": _values(None, 5, "x", [], {}, ()),
  "model names": _values(None, 5, "vgg16", ["nope"], [1], {}, ["vgg16"] * 2),
  "label list": _values(
    None, 5, "1", [], ["1"], [1.5], [True], [-1], [1000], [2**32], {}, [None]
  ),
}

BANKS["seed of a run"] = _values(
  None, "1", 1.5, True, -1, 2**64, [1], {}, float("nan")
)
BANKS["text or name"] = BANKS["text"]

BANKS["subject"] = _values(None, 5, "x", {}, [], ())
BANKS["host arrays"] = {
  k: v for k, v in BANKS["arrays"].items() if "key" not in k
}

BANKS["no function"] = _values(None, 5, "net", [], {}, 0.5)
BANKS["number of an axis"] = _values(None, "0", 1.5, True, -1, [0], {})
BANKS["maps"] = NO_ARRAYS | {
  "a vector": lambda w: np.zeros(3),
  "complex": lambda w: np.zeros((2, 3, 3), complex),
  "other shape": lambda w: np.zeros((2, 4, 4)),
  "integers": lambda w: np.zeros((2, 3, 3), int),
}
BANKS["scores"] = NO_ARRAYS | {
  "a number": lambda w: 1.0,
  "another length": lambda w: np.zeros(3),
  "two axes": lambda w: np.zeros((2, 2)),
  "complex": lambda w: np.zeros(4, complex),
}
BANKS["four Booleans"] = NO_ARRAYS | {
  "integers": lambda w: np.zeros(4, int),
  "another length": lambda w: np.zeros(3, bool),
  "two axes": lambda w: np.zeros((2, 2), bool),
}
BANKS["text"] = _values(None, 5, True, b"x", [], (), {}, 1.5)
BANKS["clean images"] = {k: v for k, v in IMAGES.items() if k != "uint8"}
