"""Arrays of an `attention.npz`, arranged by network and kind of input."""

import dataclasses

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import files, roles

_KINDS = ("clean", "adversarial")


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
  """Attention of one model on clean or attacked images.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1], inputs of the model.
    maps: float32 [N, h, w], at least 0.
    predictions: int32 [N].
    probabilities: float32 [N], of the predicted class.
  """

  images: np.ndarray
  maps: np.ndarray
  predictions: np.ndarray
  probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Attention:
  """Content of an `attention.npz`.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1], clean test images.
    labels: int32 [N].
    class_names: Names of the classes; None: the file has none.
    layer: Name of the tensor whose attention is shown.
    protocol: Attack and BatchNorm mode, in one line.
    networks: Names of the models, in the order of the file.
    kinds: Kinds of inputs, "clean" first: "adversarial", or "round<k>" of an
      attack.
    views: {(model, kind): maps}, for each model with each kind.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: list[str] | None
  layer: str
  protocol: str
  networks: list[str]
  kinds: list[str]
  views: dict[tuple[str, str], AttentionMaps]

  def name(self, label: int) -> str:
    """Returns the name of a class."""
    if self.class_names is None:
      return f"class {label}"
    return self.class_names[label]


def _check(arrays: files.Arrays, name: str, kind: str, *shape: object) -> None:
  """Checks dtype and shape of an array; a size that is text may be any."""
  found = arrays[name]
  fits = found.ndim == len(shape) and all(
    size == wanted or isinstance(wanted, str)
    for size, wanted in zip(found.shape, shape, strict=True)
  )
  if found.dtype.kind not in kind or not fits or not found.size:
    raise UserError(
      f"{arrays.path}: {name} is {found.dtype} {list(found.shape)}; allowed:"
      f" {'floats' if kind == 'f' else 'integers'}"
      f" [{', '.join(map(str, shape))}]"
    )


def _check_images(arrays: files.Arrays) -> int:
  """Checks images, labels and names of classes; returns the number of images."""
  _check(arrays, "images", "f", "N", "H", "W", "C")
  count = len(arrays["images"])
  _check(arrays, "labels", "iu", count)
  used = [arrays["labels"]]
  used += [x for name, x in arrays.items() if name.endswith("_prediction")]
  names = arrays.get("class_names")
  if names is not None:
    low = min(int(x.min(initial=0)) for x in used)
    high = max(int(x.max(initial=0)) for x in used)
    if names.ndim != 1 or low < 0 or high >= len(names):
      raise UserError(
        f"{arrays.path}: labels from {low} to {high}, but {names.size} names"
      )
  return count


def _check_view(
  arrays: files.Arrays, name: str, count: int, *, clean: bool
) -> None:
  if not clean:
    _check(arrays, name, "f", *arrays["images"].shape)
  _check(arrays, f"{name}_map", "f", count, "h", "w")
  _check(arrays, f"{name}_prediction", "iu", count)
  _check(arrays, f"{name}_probability", "f", count)


def arrange(arrays: files.Arrays) -> Attention:
  """Arranges the arrays of an `attention.npz` by network and kind of input.

  Files of earlier versions, which do not say whose maps they hold, have those
  of `roles.MODELS`.

  Raises:
    UserError: An array is missing, or does not fit the images.
  """
  old = [name for name in roles.MODELS if f"{name}_clean_map" in arrays]
  networks = [str(name) for name in arrays.get("networks", np.array(old))]
  kinds = [str(kind) for kind in arrays.get("kinds", np.array(_KINDS))]
  names = arrays.get("class_names")
  count = _check_images(arrays)
  for network in networks:
    for kind in kinds:
      _check_view(arrays, f"{network}_{kind}", count, clean=kind == "clean")
  return Attention(
    images=arrays["images"],
    labels=arrays["labels"],
    class_names=None if names is None else [str(name) for name in names],
    layer=str(arrays["layer"]),
    protocol=str(arrays["protocol"]),
    networks=networks,
    kinds=kinds,
    views={
      (network, kind): AttentionMaps(
        images=arrays["images" if kind == "clean" else f"{network}_{kind}"],
        maps=arrays[f"{network}_{kind}_map"],
        predictions=arrays[f"{network}_{kind}_prediction"],
        probabilities=arrays[f"{network}_{kind}_probability"],
      )
      for network in networks
      for kind in kinds
    },
  )
