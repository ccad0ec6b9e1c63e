"""Choice of the weights to take from a checkpoint that has several."""

import re
from collections.abc import Collection, Mapping

from atat_jax.errors import UserError, printable, shown

USUAL = (
  "model_state_dict",
  "state_dict",
  "model",
  "net",
  "network",
  "ema",
  "model_ema",
  "module",
  "weights",
  "params",
)
"""Names under which training scripts save the state dict, by preference."""

_AVERAGED = re.compile(r"(.*[._])?(ema|swa|wa|avg|averaged?)([._].*)?")
_OTHER = re.compile(r"opt|optim|sched|scaler|amp|rng|criterion|loss|awp")
_RAW = "unaveraged_model_state_dict"


def is_averaged(name: str) -> bool:
  """Returns whether an entry is said to be averaged, as "model_ema"."""
  return _AVERAGED.fullmatch(name) is not None


def listed(names: Collection[str], most: int = 3) -> str:
  """Lists names of a file in a message: a few of them, each short.

  Args:
    names: Names.
    most: Largest number of names that are listed.

  Returns:
    Text such as "conv1.weight, conv2.weight and 7 more".
  """
  some = [printable(name) for name in list(names)[:most]]
  some = [x if len(x) <= 80 else f"{x[:40]}...{x[-30:]}" for x in some]
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(some) + more


def _single(found: list[str]) -> str:
  """Returns the only one of several entries of equal right."""
  if len(found) > 1:
    raise UserError(
      f"entry: several state dicts, {listed(found)}; allowed: entry= one of"
      " them"
    )
  return found[0]


def _preferred(found: Mapping[str, Collection[str]]) -> str:
  names = [name for name in found if name and not _OTHER.match(name)]
  if averaged := [name for name in names if is_averaged(name)]:
    return _single(averaged)
  for name in USUAL:
    inside = [x for x in names if x == name or x.startswith(f"{name}.")]
    if inside:
      return _single(inside)
  if "" in found and (
    not names or any(name.endswith("weight") for name in found[""])
  ):
    return ""
  names = [
    name for name in names if any(x.endswith("weight") for x in found[name])
  ]
  if not names:
    raise UserError(
      "no state dict; allowed: tensors by name, or a dict that has them as"
      f" {', '.join(USUAL[:3])}"
    )
  return _single(names)


def choose(
  found: Mapping[str, Collection[str]], entry: str | None = None
) -> tuple[str, str]:
  """Chooses the weights to take: averaged ones before raw ones.

  Args:
    found: Names of the tensors of each entry; "" are those of the file itself.
    entry: The entry to take; None: this function chooses.

  Returns:
    The entry, and words that say which it is where there are others.

  Raises:
    UserError: No entry, not this one, or several of equal right.
  """
  if entry is None:
    chosen = _preferred(found)
  else:
    # A dict can hold the state dict under one more name.
    inside = [x for x in found if x == entry or x.startswith(f"{entry}.")]
    if not inside:
      names = listed([x for x in found if x], 9)
      raise UserError(f"entry: {shown(entry)}; allowed: {names or 'none'}")
    chosen = inside[0]
  others = [
    name
    for name in found
    if name not in (chosen, "") and not _OTHER.match(name)
  ]
  if not others:
    return chosen, ""
  averaged = is_averaged(chosen) or (
    _RAW in others and chosen == "model_state_dict"
  )
  raw = chosen == _RAW or any(map(is_averaged, others))
  kind = "averaged " if averaged else "raw " if raw else ""
  return chosen, (
    f"{kind}weights {listed([chosen])}, not {listed(others)} (entry= takes"
    " those)"
  )
