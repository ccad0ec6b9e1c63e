"""Names of tensors without the wrappers that training code puts around them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from atat_jax.errors import UserError
from atat_jax.interop import entry_names

Tensors: TypeAlias = dict[str, np.ndarray]

# DataParallel, torch.compile, Sequential(normalisation, network), attacks, ...
_WRAPPERS = frozenset(
  "module model net network _orig_mod 1 basic_net ema_model ema".split()
)
# The library `robustness` saves the network twice, once inside its attacker.
_COPY = re.compile(r"(.*\.)?attacker\..*")
_MEANS = frozenset("mu mean means new_mean image_mean pixel_mean".split())
_STDS = frozenset("sigma std stds sds new_std image_std pixel_std".split())
_MOST_CHANNELS = 64
_MOST_WRAPPERS = 16


@dataclasses.dataclass(frozen=True)
class Unwrapped:
  """Tensors of a network alone.

  Attributes:
    tensors: Arrays by the names of the network's own code.
    prefix: The part that was in front of these names, as "module.model.";
      "": nothing.
    mean: Mean of each channel, which the file subtracts from images in [0, 1];
      None: the file has none.
    std: The deviation that it divides by.
    words: The choice that was made, in words; "": there was no choice.
  """

  tensors: Tensors
  prefix: str = ""
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  words: str = ""


def _shared(names: Mapping[str, object]) -> str | None:
  """Returns the first part of all names, without the dot; None: they differ."""
  first = next(iter(names), "").split(".")[0]
  if all(name.startswith(f"{first}.") for name in names):
    return first
  return None


def without_wrappers(tensors: Tensors) -> Tensors:
  """Takes the names of known wrappers off, as often as all names have them.

  Args:
    tensors: Arrays by name.

  Returns:
    The same arrays by shorter names.
  """
  for _ in range(_MOST_WRAPPERS):
    first = _shared(tensors)
    if first not in _WRAPPERS:
      break
    tensors = _shortened(tensors, first)
  return tensors


def _shortened(tensors: Tensors, first: str) -> Tensors:
  return {name[len(first) + 1 :]: x for name, x in tensors.items()}


def _numbers(
  tensors: Tensors, kinds: frozenset[str]
) -> tuple[float, ...] | None:
  """Removes the buffers of one kind and returns their numbers."""
  found: dict[tuple[float, ...], str] = {}
  for name in [x for x in tensors if x.rpartition(".")[2] in kinds]:
    if 1 <= tensors[name].size <= _MOST_CHANNELS:
      values = np.ravel(tensors.pop(name)).astype(np.float64)
      # float32 shows 0.4914 as 0.4914000034; networks compute in float32.
      rounded = tuple(
        float(np.format_float_positional(v)) for v in values.astype(np.float32)
      )
      found[rounded] = name
  if len(found) > 1:
    raise UserError(
      f"the normalisation: {entry_names.listed(found.values())} have different"
      " numbers; allowed: one mean and one deviation"
    )
  return next(iter(found), None)


def _normalization(
  tensors: Tensors,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
  """Removes and returns mean and deviation, for images in [0, 1]."""
  kinds = {name.rpartition(".")[2] for name in tensors}
  if not (kinds & _MEANS and kinds & _STDS):
    return None, None
  mean, std = _numbers(tensors, _MEANS), _numbers(tensors, _STDS)
  if mean is None or std is None:  # too large for numbers of channels
    return None, None
  if len(mean) != len(std):
    short = min(mean, std, key=len)
    if len(short) > 1:
      raise UserError(
        f"the normalisation: {len(mean)} means, {len(std)} deviations; allowed:"
        " as many of both"
      )
    length = max(len(mean), len(std))
    mean = mean * (length // len(mean))
    std = std * (length // len(std))
  if not all(np.isfinite([*mean, *std])) or min(std) <= 0:
    raise UserError(
      f"the normalisation: mean {mean}, deviation {std}; allowed: finite"
      " numbers, deviations > 0"
    )
  if max(std) > 2:  # they are for pixels from 0 to 255
    mean, std = (tuple(x / 255 for x in values) for values in (mean, std))
  return mean, std


def _averaged(tensors: Tensors) -> tuple[Tensors, str]:
  """Keeps the averaged ones of two copies of a network in one state dict."""
  firsts = dict.fromkeys(name.split(".")[0] for name in tensors)
  copies = [first for first in firsts if entry_names.is_averaged(first)]
  if len(copies) != 1 or len(firsts) == 1:
    return tensors, ""
  first = copies[0]
  kept = {
    name: x for name, x in tensors.items() if name.startswith(f"{first}.")
  }
  others = entry_names.listed([x for x in firsts if x != first])
  return kept, f"averaged weights {first}, not {others}"


def unwrapped(tensors: Mapping[str, np.ndarray]) -> Iterator[Unwrapped]:
  """Yields a network's tensors under ever shorter names.

  Numbers (counters, accuracies) are left out, as are copies inside an attacker;
  mean and deviation of the pixels are taken apart.

  Args:
    tensors: Arrays by name, as a file has them.

  Yields:
    First without known wrappers, then with one more part off that all names
    share, until they share none.

  Raises:
    UserError: Means or deviations of the pixels that do not fit together.
  """
  kept = {name: x for name, x in tensors.items() if x.ndim}
  kept = {k: x for k, x in kept.items() if not _COPY.fullmatch(k)} or kept
  mean, std = _normalization(kept)
  if not kept:
    raise UserError("no weights; allowed: the tensors of a network by name")
  kept, words = _averaged(kept)
  longest = next(iter(kept), "")
  kept = without_wrappers(kept)
  for _ in range(_MOST_WRAPPERS):
    shortest = next(iter(kept))
    prefix = longest[: len(longest) - len(shortest)]
    yield Unwrapped(kept, prefix, mean, std, words)
    first = _shared(kept)
    if first is None:
      return
    kept = _shortened(kept, first)
