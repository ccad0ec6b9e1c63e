"""One call from a classifier and images to an honest table."""

import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, sharding
from atat_jax.attacks import base
from atat_jax.data.base import Split, as_floats
from atat_jax.errors import UserError
from atat_jax.evaluation import certifying, corrupted, measuring, protocols
from atat_jax.runs import files, locations, provenance, terminal
from atat_jax.typing import Array, Classifier

_PROBE = "classifier.npz"
_PROBED = 16  # images whose logits tell a classifier from others
_SAME = {
  "rtol": 1e-2,
  "atol": 1e-3,
}  # machines and batch sizes round differently


def _score(classifier: Classifier, images: Array) -> Array:
  return classifier(images)


_logits = compilation.jit(_score)


class Rows(list[dict[str, Any]]):
  """Rows of `results.json`, worst cases included.

  Args:
    content: Content of `results.json`.

  Attributes:
    content: The same.
  """

  def __init__(self, content: dict[str, Any]):
    super().__init__(content["rows"])
    self.content = content

  @property
  def diagnostics(self) -> dict[str, Any]:
    """Checks for overestimated robustness by name, with their findings."""
    return self.content["diagnostics"]

  def table(self) -> str:
    """Lays out accuracies, protocols and what the checks found, in Markdown."""
    warnings = [
      f"warning: {found['message']}"
      for found in self.diagnostics.values()
      if found["flag"]
    ]
    told = [
      f"certified: {found['message']}"
      for name, found in self.diagnostics.items()
      if name.endswith("_certified") and not found["flag"]
    ]
    return "\n".join([terminal.results_table(self.content), *told, *warnings])


def benchmark(
  key: Array,
  classifier: Classifier,
  images: Any,
  labels: Any,
  *,
  epsilon: float,
  attacks: str = "pgd20,autoattack-fast",
  norm: str = "linf",
  step_size: float | None = None,
  num_restarts: int = 1,
  batch_size: int = 256,
  name: str = "network",
  dataset: str = "images",
  out: pathlib.Path | str | None = None,
  corruptions: str = "",
  certify: bool = False,
  mesh: Mesh | None = None,
) -> Rows:
  """Measures the accuracy of a classifier, clean first and then attacked.

  Args:
    key: Random key, `jax.random.key(seed)`.
    classifier: Callable from float32 images [B, H, W, C] in [0, 1] to logits
      [B, K], with running statistics; best a pytree, see `models.classifier`.
    images: Clean images [N, H, W, C], uint8 or float in [0, 1].
    labels: True classes, integers [N].
    epsilon: Radius of the ball, in the unit of the pixels (8/255).
    attacks: Names separated by commas, see `parse`.
    norm: Norm of the ball, "linf", "l2" or "l1".
    step_size: Length of a step of PGD; None: a quarter of epsilon.
    num_restarts: Number of restarts of PGD.
    batch_size: Images at a time.
    name: Name of the classifier in the rows.
    dataset: Name of the images in the rows.
    out: Directory for `results.json`, where an interrupted call goes on and
      later ones add rows; None: nothing is written.
    corruptions: Corrupted images: "generated", the folder of CIFAR-10-C, or "".
    certify: Whether images are certified, too (`bounds.crown`), which no attack
      may contradict; for small networks, linf only.
    mesh: The devices; None: all of them.

  Returns:
    The rows, the worst case over attacks last.

  Raises:
    UserError: A bad argument, by name; an `out` of another classifier.
  """
  checks.key(key)
  checks.number("epsilon", epsilon, 0, above=True)
  step = epsilon / 4 if step_size is None else step_size
  shared = {"norm": norm, "epsilon": epsilon, "step_size": step}
  protocols_ = _protocols(attacks, **shared, num_restarts=num_restarts)
  radius = _radius(certify, norm, epsilon)
  fields = {"model": name, "dataset": dataset, "batch_size": batch_size}
  folder = None if out is None else _folder(out)
  test = _split(images, labels)
  return _measure(
    key, classifier, test, protocols_, fields, folder, mesh, corruptions, radius
  )


def _folder(out: pathlib.Path | str) -> pathlib.Path:
  """Returns the directory of results, which need not be there yet."""
  found = locations.find("out", out)
  for place in () if locations.is_remote(found) else (found, *found.parents):
    if place.exists() and not place.is_dir():
      raise UserError(f"out: {place} is a file; allowed: a directory")
  return found


def _radius(certify: bool, norm: str, epsilon: float) -> float | None:
  """Returns the radius in which images are certified; None: they are not."""
  checks.boolean("certify", certify)
  if certify and norm != "linf":
    raise UserError(f"certify: True with norm {norm!r}; allowed: norm 'linf'")
  return epsilon if certify else None


def _measure(
  key: Array,
  classifier: Classifier,
  test: Split,
  chosen: Sequence[protocols.Protocol],
  fields: dict[str, Any],
  out: pathlib.Path | None,
  mesh: Mesh | None,
  corruptions: str,
  radius: float | None,
) -> Rows:
  """Measures the rows of some protocols; `fields` are the caller's own."""
  corrupted.check_name(corruptions)
  for field in ("model", "dataset"):
    named = "name" if field == "model" else field
    checks.instance(named, fields[field], str, "a text")
  checks.count("batch_size", fields["batch_size"])
  classifier, num_classes = _checked(classifier, test)
  source = corrupted.open_source(
    corruptions,
    dataset=fields["dataset"],
    image_shape=test.images.shape[1:],
    num_classes=num_classes,
  )
  if source is not None:
    source.check_labels(test.labels, fields["dataset"])
  mesh = sharding.mesh_or_all(mesh)
  classifier = sharding.put_replicated(mesh, classifier)
  path = None if out is None else out / files.RESULTS
  if path is not None:
    _check_same(path.parent, classifier, test)
  devices = [device.device_kind for device in jax.devices()]
  table = measuring.ResultsTable(
    path, steps={fields["model"]: None}, record=provenance.record(devices)
  )
  shared = {
    **fields,
    "num_examples": len(test.labels),
    "batch_norm": "running",
    "seed": _seed(key),
  }
  pending = [
    measuring.Pending(measuring.row_of(one, **shared), one, classifier)
    for one in chosen
  ]
  if radius is not None:
    _certify(table, classifier, test, fields, radius)
  measuring.complete(table, pending, test, num_classes=num_classes, mesh=mesh)
  if corruptions:
    corrupted.complete(
      table,
      {(fields["model"], "running"): classifier},
      corrupted.Corrupted(test, fields["dataset"], shared["seed"], source),
      batch_sizes={"running": fields["batch_size"]},
      mesh=mesh,
    )
  return Rows(table.content)


def _certify(
  table: measuring.ResultsTable,
  classifier: Classifier,
  test: Split,
  fields: dict[str, Any],
  radius: float,
) -> None:
  """Certifies the images, unless that is done."""
  wanted = certifying.wanted(
    model=fields["model"],
    epsilon=radius,
    num_examples=len(test.labels),
    checkpoint_step=None,
  )
  if not table.has_certificate(wanted):
    size = fields["batch_size"]
    table.certify(certifying.measure(wanted, classifier, test, batch_size=size))


def _checked(classifier: Classifier, test: Split) -> tuple[Classifier, int]:
  """Checks the classifier; returns it as a pytree, and the number of classes."""
  few = jnp.asarray(as_floats(test.images[:2]))
  zeros = jnp.zeros(len(few), jnp.int32)
  classifier, *_, num_classes = base.check_arguments(classifier, few, zeros)
  checks.inspect_labels(test.labels, len(test.images), num_classes)
  return classifier, num_classes


def _protocols(names: str, **numbers: Any) -> list[protocols.Protocol]:
  """Parses the attacks; clean images come first in any case."""
  checks.instance("attacks", names, str, "a list of attacks, see parse")
  for length in ("epsilon", "step_size"):
    checks.number(length, numbers[length], 0, above=True)
  checks.positive("num_restarts", numbers["num_restarts"], integer=True)
  try:
    chosen = list(protocols.parse_list(names, **numbers))
  except UserError as error:
    text = str(error).removeprefix("attack: ")
    raise UserError(
      f"attacks: {text}" if text != str(error) else text
    ) from None
  clean = [one for one in chosen if one.name == "nominal"]
  others = [one for one in chosen if one.name != "nominal"]
  return [*(clean or protocols.parse_list("nominal", **numbers)), *others]


def _split(images: Any, labels: Any) -> Split:
  """Checks the images; those that are uint8 by nature stay so."""
  images, labels = checks.host("images", images), checks.host("labels", labels)
  if images.dtype != np.uint8:
    checks.inspect_images(images)
    images = images.astype(np.float32)
  elif images.ndim != 4 or 0 in images.shape:
    raise UserError(
      f"images: uint8 of shape {images.shape}; allowed: [N, H, W, C], not empty"
    )
  checks.inspect_labels(labels, len(images), checks.LARGEST_INTEGER)
  return Split(images, labels.astype(np.int32))


def _seed(key: Array) -> int:
  """Returns the seed that a key was made of, for the protocol."""
  return int(np.asarray(jax.random.key_data(key)).ravel()[-1] & 0x7FFFFFFF)


def _check_same(
  directory: pathlib.Path, classifier: Classifier, test: Split
) -> None:
  """Compares classifier and images with those that a directory is of."""
  shown = as_floats(test.images[:_PROBED])
  logits = np.asarray(_logits(classifier, shown), np.float32)
  mark = zlib.crc32(np.ascontiguousarray(test.images).tobytes())
  mark = zlib.crc32(test.labels.tobytes(), mark)
  found = files.read_arrays(directory / _PROBE)
  if found is None:
    arrays = {"images": np.array(mark), "logits": logits}
    if jax.process_index() == 0:
      files.write_arrays(directory / _PROBE, arrays)
    return
  if int(found["images"]) != mark:
    raise UserError(
      f"out: {directory} holds results on other images or labels; allowed:"
      " another directory"
    )
  same = found["logits"].shape == logits.shape and np.allclose(
    found["logits"], logits, **_SAME, equal_nan=True
  )
  if not same:
    raise UserError(
      f"out: {directory} holds results of another classifier; allowed: another"
      " directory"
    )
