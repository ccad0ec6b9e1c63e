"""Notebooks are committed as they ran: in order, without errors, small."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LARGEST = 300_000

# A path of the machine on which a notebook ran.
MACHINE = re.compile(r"(?:^|[\s'\"(=])/(?:home|root|tmp|work|Users|usr|opt)/")


def _cells(path):
  return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _outputs(path):
  for cell in _cells(path):
    if cell["cell_type"] == "code":
      yield from cell["outputs"]


def _text(output):
  found = output.get("text") or output.get("data", {}).get("text/plain", "")
  return "".join(found)


def test_the_site_shows_every_notebook():
  nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
  shown = re.findall(r"notebooks/(\w+)\.md$", nav, re.M)
  assert shown == [path.stem for path in NOTEBOOKS]
  assert len(shown) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
  def test_it_is_small(self, path):
    assert path.stat().st_size < LARGEST

  def test_it_ran_from_top_to_bottom(self, path):
    code = [c for c in _cells(path) if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == [*range(1, len(code) + 1)]
    assert all(o["output_type"] != "error" for o in _outputs(path))
    assert any("image/png" in o.get("data", {}) for o in _outputs(path))

  def test_it_begins_with_a_title_and_an_installation(self, path):
    title, install = _cells(path)[:2]
    assert "".join(title["source"]).startswith("# ")
    assert 'find_spec("atat_jax") is None' in "".join(install["source"])
    assert not install["outputs"]
    (other,) = {"".join(_cells(p)[1]["source"]) for p in NOTEBOOKS}
    assert other == "".join(install["source"])

  def test_it_names_no_machine(self, path):
    found = [_text(o) for o in _outputs(path) if MACHINE.search(_text(o))]
    assert not found

  def test_a_picture_has_a_caption(self, path):
    cells = _cells(path)
    for number, cell in enumerate(cells):
      if any("image/png" in o.get("data", {}) for o in cell.get("outputs", ())):
        assert re.match(r"\*[^*]", "".join(cells[number + 1]["source"]))

  def test_no_attack_is_given_a_closure(self, path):
    source = "\n".join(
      "".join(c["source"]) for c in _cells(path) if c["cell_type"] == "code"
    )
    assert "lambda" not in source
