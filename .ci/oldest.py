"""Prints constraints for pip: the oldest version that each requirement allows.

  python .ci/oldest.py > oldest.txt && pip install -c oldest.txt '.[test]'

The tests then run with what pyproject.toml promises, not with the newest.
"""

import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable

_PROJECT = pathlib.Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(requirements: Iterable[str]) -> list[str]:
  """Turns lower bounds into exact versions.

  Args:
    requirements: Requirements such as "jax>=0.10.2; sys_platform != 'win32'".

  Returns:
    Constraints such as "jax==0.10.2", sorted.

  Raises:
    ValueError: A requirement without a lower bound.
  """
  found = {}
  for requirement in requirements:
    match = re.match(r"([\w.-]+)(?:\[\w+\])?\s*[>=]=\s*([\w.]+)", requirement)
    if match is None:
      raise ValueError(f"{requirement!r} has no lower bound")
    found[match[1].lower()] = match[2]
  return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
  _tree = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))
  sys.stdout.write("\n".join(oldest(_tree["project"]["dependencies"])) + "\n")
