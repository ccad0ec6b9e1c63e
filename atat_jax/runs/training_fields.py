"""Which fields of a configuration a training depends on. Needs no JAX."""

from collections.abc import Iterator
from typing import Any

# Fields that a training does not depend on.
_FREE = (
  "evaluation",
  "figures",
  "data.dir",
  "data.cache_dir",
  "data.source",
  "profile_steps",
  "train.steps_per_dispatch",
  "teacher.steps_per_dispatch",
)
# ... but checkpoints are chosen by these.
_BOUND = (
  "evaluation.validation_attack",
  "evaluation.norm",
  "evaluation.epsilon",
  "evaluation.step_size",
)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, f"{path}.{key}" if path else key)
  else:
    yield path, tree


def of(tree: dict[str, Any]) -> dict[str, Any]:
  """The fields that make two trainings the same.

  Args:
    tree: What `config.json` holds.

  Returns:
    Dotted name of the field to its value.
  """
  return {
    path: value
    for path, value in _leaves(tree)
    if path in _BOUND
    or not any(path == f or path.startswith(f + ".") for f in _FREE)
  }
