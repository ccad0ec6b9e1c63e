"""`results.json` of somebody else: refused in one line, or shown as text."""

import copy
import json
import os
import random

import pytest
import run_files

from atat_jax import analyses, figures
from atat_jax.errors import UserError
from atat_jax.report import comparison, run_page
from atat_jax.runs import configuration, files, lock, terminal

SCRIPT = "<script>alert(1)</script>"
VALUES = [
  *(None, True, -1, 0, 1.5, 1e308, -1e308, 10**18, "", "nan", "x" * 3000),
  *([], [1], [[]], {}, {"a": 1}, "\x1b[2J\x07", SCRIPT, "a\nb|c", "$\\frac{"),
  *("\u202eabc", "../../x", "__class__", "`rm`", "](javascript:x)"),
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
  monkeypatch.setattr(figures, "draw_results", lambda _: [])
  monkeypatch.setattr(figures, "draw_curves", lambda _: [])
  monkeypatch.setattr(figures, "draw_comparison", lambda _: [])
  monkeypatch.setattr(analyses, "sections", lambda *_: [])


def places(tree, path=()):
  """Paths of everything in a JSON tree."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    yield (*path, key)
    if isinstance(value, dict | list):
      yield from places(value, (*path, key))


def changed(tree, path, value):
  tree = copy.deepcopy(tree)
  inner = tree
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return tree


def show(workdir, tree):
  """Writes every text that a run gives rise to: pages, and plain texts."""
  workdir.mkdir()
  (workdir / files.RESULTS).write_text(json.dumps(tree))
  page = run_page.write_report(workdir).read_text()
  html, markdown, _ = comparison.write_comparison([workdir], workdir / "c")
  table = terminal.results_table(files.read_results(workdir))
  return (page, html.read_text()), (markdown.read_text(), table)


def test_results_of_others_are_text_or_refused(tmp_path):
  tree = run_files.results()
  choose = random.Random(0)
  every = list(places(tree))
  shown = refused = 0
  for number in range(300):
    path, value = choose.choice(every), choose.choice(VALUES)
    try:
      pages, texts = show(tmp_path / str(number), changed(tree, path, value))
    except UserError as error:
      assert str(error).isprintable(), (path, value)
      refused += 1
      continue
    shown += 1
    assert all(SCRIPT not in page for page in pages), (path, value)
    for text in texts:
      assert all(line.isprintable() for line in text.split("\n")), path
  assert shown > 40 and refused > 100


@pytest.mark.parametrize("field", ["model", "attack", "dataset", "loss"])
def test_names_are_shown_as_they_are(tmp_path, field):
  tree = run_files.results()
  for row in tree["rows"]:
    if row[field] is not None:
      row[field] = {"model": row[field] + SCRIPT}.get(field, SCRIPT)
  try:
    pages, _ = show(tmp_path / "run", tree)
  except UserError:
    return
  assert any("&lt;script&gt;" in page for page in pages)
  assert all(SCRIPT not in page for page in pages)


@pytest.mark.parametrize("field", ["method", "seed", "train", "data"])
def test_a_configuration_of_another_kind_is_refused(tmp_path, field):
  for value in (None, [], 1.5, ["x"], "" if field != "method" else 3):
    tree = {"method": "at", field: value}
    with pytest.raises(UserError, match=f"{field}: "):
      configuration.parse(tree, tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe"])
def test_a_planted_lock_leads_to_no_other_file(tmp_path, kind):
  mine, workdir = tmp_path / "mine.txt", tmp_path / "run"
  mine.write_text("precious")
  workdir.mkdir()
  with lock.directory("workdir", workdir) as held:
    place = held.path
  if kind == "pipe":
    os.mkfifo(place)
  elif kind == "hard link":
    os.link(mine, place)
  else:
    place.symlink_to(mine if kind == "link" else tmp_path / "new")
  with pytest.raises(UserError, match="workdir: "):
    with lock.directory("workdir", workdir):
      pass
  assert mine.read_text() == "precious"
  assert not (tmp_path / "new").exists()


def test_a_planted_pipe_holds_up_no_cleaning(tmp_path):
  """Its name is that of a file which a killed process has left."""
  with files.replacing(tmp_path / "a.txt") as temporary:
    temporary.touch()
  os.mkfifo(temporary)
  files.remove_temporaries(tmp_path)
