"""The audit of dependencies never takes "nobody to ask" for "nothing found"."""

import importlib.util
import json
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# First versions without an advisory that was public when they were written
# here; a lower floor would allow a version known to be bad.
MENDED = {
  "jinja2": (3, 1, 6),
  "pillow": (11, 3),
  "scikit-learn": (1, 5),
  "tqdm": (4, 66, 3),
}


def _load():
  path = ROOT / ".ci" / "advisories.py"
  spec = importlib.util.spec_from_file_location("advisories", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def answer(*packages):
  return json.dumps({"dependencies": list(packages), "fixes": []})


GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {
  "name": "bad",
  "version": "2.0",
  "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}],
}
SKIPPED = {"name": "lost", "skip_reason": "Dependency not found: lost (3.0)"}


@pytest.mark.parametrize(
  ("output", "errors", "status", "said"),
  [
    (answer(GOOD), "", 0, ["0 in 1 packages"]),
    (answer(GOOD, BAD), "", 1, ["1 in 2 packages", "bad 2.0: PYSEC-1", "2.1"]),
    (answer(GOOD, SKIPPED), "", 0, ["0 in 1 packages", "not audited: lost"]),
    (answer(SKIPPED), "No known vulnerabilities found", 0, ["NOT AUDITED"]),
    (answer(), "", 0, ["NOT AUDITED"]),
    ("", "x\nConnectionError: no route", 0, ["NOT AUDITED", "no route"]),
    ("", "", 0, ["NOT AUDITED", "no reason"]),
    ("[1]", "", 0, ["NOT AUDITED"]),
  ],
)
def test_the_answer_is_told_as_it_is(output, errors, status, said):
  found, lines = _load().audit(lambda: (output, errors))
  assert found == status
  text = "\n".join(lines)
  assert all(part in text for part in said), text


def test_no_floor_allows_a_version_that_is_known_to_be_bad():
  content = tomllib.loads((ROOT / "pyproject.toml").read_text())
  floors = dict(
    re.match(r"([\w-]+)[^>]*>=([\d.]+)", line).groups()
    for line in content["project"]["dependencies"]
  )
  for name, version in MENDED.items():
    assert tuple(map(int, floors[name].split("."))) >= version, name
