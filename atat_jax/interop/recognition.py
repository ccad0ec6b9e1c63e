"""Recognition of the network that PyTorch weights belong to."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from atat_jax import models
from atat_jax.errors import UserError
from atat_jax.interop import (
  entry_names,
  layouts,
  tensorflow_checkpoint,
  torch_weights,
  wrappers,
)
from atat_jax.interop.description import Description, decode, fields_of
from atat_jax.typing import Variables

_NEAR = 0.2  # share of common names below which no layout is called near
_NORMALIZATION = ("normalization", "mean", "std")
# Fields of small networks, for the kinds of names that a layout has.
_SMALL = {
  "depth": 10,
  "stage_sizes": (2, 2, 2),
  "use_batch_norm": True,
  "num_blocks": 2,
  "num_class_blocks": 2,
  "stem_convolutions": 4,
}


@dataclasses.dataclass(frozen=True)
class Recognized:
  """Network of a file, with fields that are still open.

  Attributes:
    layout: Layout of the file.
    name: Name in `models.MODELS`.
    fields: Fields of the network but for the open ones.
    assumed: Fields that the file does not show, but for the normalisation.
    open: Values of each open field.
    variables: The weights.
    words: Choices that were made on the way, in words.
    source: Origin of the normalisation, in words.
  """

  layout: layouts.Layout
  name: str
  fields: Mapping[str, Any]
  assumed: tuple[str, ...]
  open: Mapping[str, tuple[Any, ...]]
  variables: Variables
  words: tuple[str, ...]
  source: str


# --- Refusals ----------------------------------------------------------------


def _pattern(name: str) -> str:
  """Returns a name with # for each number."""
  return re.sub(r"\d+", "#", name)


def _layer(tensor: str) -> str:
  """Returns the pattern of the layer that a tensor belongs to."""
  return _pattern(tensor.rpartition(".")[0] or tensor)


def _layers(layout: layouts.Layout) -> set[str]:
  """Returns the patterns of all layers of a layout."""
  found: set[str] = set()
  for stem in ((), (1, 1)):
    names = layout.names(SimpleNamespace(conv_stem=stem, **_SMALL))
    found |= set(map(_pattern, names.values()))
  return found


def _strangers(layout: layouts.Layout, tensors: Iterable[str]) -> list[str]:
  known = _layers(layout)
  return [name for name in tensors if _layer(name) not in known]


def _nearest(candidates: list[wrappers.Unwrapped]) -> tuple[str, str]:
  """Says which layout names are nearest to; also the prefix of all names."""
  share, layout, found = min(
    (
      (len(_strangers(layout, x.tensors)) / len(x.tensors), layout, x)
      for x in candidates
      for layout in layouts.LAYOUTS
    ),
    key=lambda item: item[0],
  )
  if share > 1 - _NEAR:
    names = candidates[-1].tensors
    return f"{len(names)} tensors, {entry_names.listed(names)}", ""
  others = _strangers(layout, found.tensors)
  words = f"nearest is {layout.title}"
  if others:
    words += f", which does not have {entry_names.listed(others)}"
  else:
    words += ", of which layers or sizes are missing"
  return words, found.prefix


# --- Recognition -------------------------------------------------------------


def _normalization(
  assumed: layouts.Fields, found: wrappers.Unwrapped, channels: int
) -> layouts.Fields:
  """Returns the fields of the normalisation, the file's own before assumed."""
  if found.mean is not None and found.std is not None:
    mean, std = found.mean, found.std
    if len(mean) == 1:
      mean, std = mean * channels, std * channels
    return layouts.normalized((mean, std))
  if assumed["normalization"] == "per_image":
    return {"normalization": "per_image"}
  mean = assumed.get("mean", layouts.IMAGENET[0])
  if len(mean) != channels:  # numbers for colours, and other images
    return layouts.normalized(None)
  return {k: v for k, v in assumed.items() if k in _NORMALIZATION}


def _assemble(
  layout: layouts.Layout,
  found: wrappers.Unwrapped,
  given: Mapping[str, Any],
) -> Recognized | torch_weights.Fit:
  """Makes the network of a layout and puts the weights into it.

  Returns:
    The network, or what does not fit.

  Raises:
    LookupError, ValueError: Names or shapes are not of this layout, or fields
      that were given not of this network.
  """
  shapes = {name: x.shape for name, x in found.tensors.items()}
  name, shown = layout.infer(shapes)
  _refuse_contradictions(shown, given)
  assumed = layout.preset(shown)
  example = models.create(name, **(shown | assumed))
  first = f"{layout.names(example)[layout.first]}.weight"
  channels = shapes[first][1]
  normalization = _normalization(assumed, found, channels)
  fields = shown | assumed | normalization | dict(given)
  fitted = torch_weights.fit(
    found.tensors, models.create(name, **fields), layout, channels
  )
  if len(fitted):
    return fitted
  source = "the file's" if found.mean is not None else "assumed"
  return Recognized(
    layout=layout,
    name=name,
    fields=fields,
    assumed=tuple(
      x for x in assumed if x not in given and x not in _NORMALIZATION
    ),
    open={k: v for k, v in layout.open.items() if k not in given},
    variables=fitted.variables,
    words=(found.words,) if found.words else (),
    source="given" if "normalization" in given else source,
  )


def _counts(fields: Mapping[str, Any]) -> list[Any]:
  """Returns the numbers of layers, which names alone show."""
  depth = fields.get("depth")
  stages = fields.get("stage_sizes"), len(fields.get("stage_channels") or ())
  blocks = [fields.get(x) for x in ("num_blocks", "num_class_blocks")]
  stem = [fields.get(x) for x in ("stem_convolutions", "conv_stem")]
  return [depth and (depth - 2) // 6, *stages, *blocks, *stem]


def described(
  description: Description,
  tensors: Mapping[str, np.ndarray],
  given: Mapping[str, Any],
) -> Recognized:
  """Puts weights into the network that a description says they are of.

  Args:
    description: The description.
    tensors: Arrays by PyTorch's name.
    given: Fields that are known; they precede the description's.

  Returns:
    The network and its weights.

  Raises:
    UserError: The description is of no network here, or of another one.
  """
  found = next(wrappers.unwrapped(tensors))
  model = description.create(**given)
  fields = fields_of(model)
  layout = layouts.saved(model)
  try:
    _, shown = layout.infer({k: x.shape for k, x in found.tensors.items()})
    if _counts(fields) != _counts({"stage_channels": (), **shown}):
      raise ValueError("other numbers of layers")
  except (LookupError, ValueError) as error:
    raise UserError(
      f"the description and the tensors are of different networks: {error}"
    ) from None
  _refuse_contradictions({"num_classes": shown["num_classes"]}, given)
  first = found.tensors[f"{layout.names(model)[layout.first]}.weight"]
  fitted = torch_weights.fit(found.tensors, model, layout, first.shape[1])
  if len(fitted):
    raise UserError(
      "the description and the tensors are of different networks:"
      f" {fitted.words()}"
    )
  # The names are those of a layout, the network need not be.
  title = type(model).__name__
  return Recognized(
    layout=dataclasses.replace(layout, title=title),
    name=description.name,
    fields=fields,
    assumed=(),
    open={},
    variables=fitted.variables,
    words=("fields as atat_jax wrote them",),
    source="given" if "normalization" in given else "the file's",
  )


def _of_checkpoint(
  prefix: pathlib.Path, entry: str | None, given: Mapping[str, Any]
) -> Recognized:
  """Finds the network of a TensorFlow checkpoint."""
  state = tensorflow_checkpoint.read(prefix, entry)
  layout = tensorflow_checkpoint.LAYOUT
  try:
    result = _assemble(layout, wrappers.Unwrapped(state.tensors), given)
  except (LookupError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    result = None
    differs = f"of other names or shapes ({error})"
  if not isinstance(result, Recognized):
    differs = differs if result is None else result.words()
    raise UserError(
      f"no known network: nearest is {layout.title}; {differs}; allowed: its"
      " variables"
    )
  words = (state.entry,) if state.entry else ()
  return dataclasses.replace(result, words=words)


def _refuse_contradictions(
  shown: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
  """Raises a `UserError` if a field is not what the names and shapes show."""
  for field, value in given.items():
    if field in shown and shown[field] != value:
      raise UserError(
        f"{field}: {value!r}; allowed: what the file shows, {shown[field]!r}"
      )


def recognize(
  path: pathlib.Path, entry: str | None, given: Mapping[str, Any]
) -> Recognized:
  """Finds the network that a file of weights belongs to.

  Args:
    path: File of weights.
    entry: Entry of the checkpoint; None: `read_state_dict` says which.
    given: Fields that are known.

  Returns:
    The network and its weights.

  Raises:
    UserError: The file is of no layout: the nearest one and what differs.
  """
  if checkpoint := tensorflow_checkpoint.find(path):
    found = _of_checkpoint(checkpoint, entry, given)
    if checkpoint.name != path.name:
      words = (f"checkpoint {checkpoint.name}", *found.words)
      return dataclasses.replace(found, words=words)
    return found
  state = torch_weights.read(path, entry)
  if state.description:
    return described(decode(state.description), state.tensors, given)
  best: tuple[layouts.Layout, torch_weights.Fit, str] | None = None
  candidates = list(wrappers.unwrapped(state.tensors))
  for tensors in candidates:
    for layout in layouts.LAYOUTS:
      try:
        result = _assemble(layout, tensors, given)
      except UserError:
        if given:
          raise
        continue
      except (LookupError, ValueError):
        continue
      if isinstance(result, Recognized):
        words = (state.entry,) if state.entry else ()
        return dataclasses.replace(result, words=words + result.words)
      if best is None or len(result) < len(best[1]):
        best = layout, result, tensors.prefix
  if best is not None:
    layout, fitted, prefix = best
    differs = f"nearest is {layout.title}; {fitted.words()}"
  else:
    differs, prefix = _nearest(candidates)
  begin = (
    f"; all names begin with {entry_names.listed([prefix])}" if prefix else ""
  )
  raise UserError(
    f"no known network: {differs}{begin}; allowed: the layouts of"
    " docs/networks.md, or read_state_dict and a network of your own"
  )
