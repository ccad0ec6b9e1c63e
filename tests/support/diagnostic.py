"""Form of a diagnostic, the same for all checks."""

import json
from typing import Any

import pytest


def check(
  found: Any, flag: bool | None = None, value: float | None = None
) -> None:
  """Checks the form of a diagnostic and, where they are given, its result."""
  assert set(found) == {"title", "rule", "value", "flag", "message"}
  json.dumps(found, allow_nan=False)
  assert type(found["flag"]) is bool and type(found["value"]) is float
  assert found["title"] and not found["title"].endswith(".")
  assert found["message"].endswith(".")
  if flag is not None:
    assert found["flag"] is flag, found
  if value is not None:
    assert found["value"] == pytest.approx(value, rel=1e-4, abs=1e-7)
