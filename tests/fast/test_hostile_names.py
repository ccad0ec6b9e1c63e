"""Names that others chose are shown as they are, in figures, pages and tables."""

import copy
import json

import analysis_files
import numpy as np
import pytest
import run_files

from atat_jax import analyses, report
from atat_jax.drawing.text import plain
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.figures import comparison as comparison_figure
from atat_jax.figures import curves, robustness
from atat_jax.report import comparison
from atat_jax.runs import files, tables

pytest_plugins = ("pictures",)

DOLLARS = "$\\frac{1$ and $x_"
HTML = "<img src=x onerror=alert(1)> | **bold** [a](javascript:b)"


def letters(fig):
  """All texts of a figure as drawn."""
  fig.canvas.draw()
  return [
    artist._preprocess_math(artist.get_text())[0]
    for artist in fig.findobj(lambda one: hasattr(one, "_preprocess_math"))
    if artist._preprocess_math(artist.get_text())[1] is False
  ]


def shows(fig, name):
  return any(name in text.replace("\u200b", "") for text in letters(fig))


@pytest.mark.parametrize("name", [DOLLARS, "_hidden", "a\\$b$c$", "$"])
def test_bars_and_curves_show_names_letter_by_letter(
  figures_drawn, tmp_path, name
):
  rows = [
    run_files.result_row(name, "pgd20", "running", 0.5),
    run_files.result_row(name, "fgsm", "running", 0.6),
  ]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  line = {"split": "train", "step": 1, "epoch": 1, "loss": 1.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  robustness.draw(tmp_path)
  curves.draw(tmp_path)
  assert shows(figures_drawn["robustness"], name)
  assert shows(figures_drawn["curves_student_loss"], name)
  legend = figures_drawn["robustness"].legends[0]
  assert len(legend.get_texts()) == 1  # an underscore would hide it


@pytest.mark.parametrize("analysis", ["steps", "epsilons", "landscape"])
def test_analyses_show_names_letter_by_letter(
  figures_drawn, tmp_path, analysis
):
  arrays = getattr(analysis_files, f"{analysis}_arrays")()
  named = {
    key.replace("atat_", f"{DOLLARS}_"): value for key, value in arrays.items()
  }
  names = [str(name) for name in arrays["networks"]]
  named["networks"] = np.array([DOLLARS if n == "atat" else n for n in names])
  path = analyses.ANALYSES[analysis].path(tmp_path)
  files.write_arrays(path, named)
  analyses.ANALYSES[analysis].draw(files.read_arrays(path), tmp_path)
  assert figures_drawn
  assert all(shows(fig, DOLLARS) for fig in figures_drawn.values())


def test_plain_text_stays_as_it_is():
  for text in ("pgd20 (epsilon=8/255)", "cross_entropy", "± 95 %", "a\nb"):
    assert plain(text) == text
  assert "\x00" not in plain("a\x00b") and len(plain("a\x00b")) == 3


def write_run(directory, method, **changes):
  row = run_files.result_row(method, "pgd20", "running", 0.5)
  return run_files.write_run(directory, [row | changes], method)


def test_markdown_shows_names_as_they_are(tmp_path, monkeypatch):
  monkeypatch.setattr(comparison.figures, "draw_comparison", lambda path: [])
  write_run(tmp_path / "a", "at", dataset=HTML, attack=HTML)
  report.write_comparison([tmp_path / "a"], tmp_path / "out")
  text = (tmp_path / "out.md").read_text()
  for mark in ("<img", "**bold", "](java"):
    at = [i for i in range(len(text)) if text.startswith(mark, i)]
    assert all(text[i - 1] == "\\" for i in at), mark
  rows = [line for line in text.splitlines() if line.startswith("| at")]
  assert rows and all(
    line.replace("\\|", "").count("|") == rows[0].replace("\\|", "").count("|")
    for line in rows[:1]
  )
  assert "<img" not in (tmp_path / "out.html").read_text()
  plain_name = "pgd20 (epsilon=8/255), cross_entropy ± 0.5 %"
  assert tables.escaped(plain_name) == plain_name
  assert tables.escaped("a\x1b[31mb\nc") == "a [31mb c"


def test_pictures_of_a_comparison_stay_in_their_folder(tmp_path):
  path = tmp_path / "in" / "comparison.json"
  row = run_files.result_row("at", "pgd20", "running", 0.5, dataset="../../x")
  row |= {"standard_error": None, "published": None}
  files.write_json(path, {"format": 1, "rows": [row]})
  (drawn,) = comparison_figure.draw(path)
  assert drawn.parent == path.parent


def test_values_that_are_not_finite_are_told_beside_a_curve(
  figures_drawn, tmp_path
):
  lines = [
    {"split": "train", "step": k, "epoch": k, "loss": loss}
    for k, loss in enumerate([1.0, float("nan"), 0.5, float("inf"), "x"])
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  curves.draw(tmp_path)
  assert shows(figures_drawn["curves_student_loss"], "total (2 not finite)")


def test_arrays_that_are_not_finite_are_not_drawn(tmp_path):
  arrays = analysis_files.steps_arrays()
  arrays["atat_accuracy"][3] = np.nan
  files.write_arrays(analyses.ANALYSES["steps"].path(tmp_path), arrays)
  with pytest.raises(
    DamagedFileError, match=r"1 of 101 numbers of atat_accuracy are not finite"
  ):
    analyses.sections(tmp_path, tmp_path)


def test_arrays_of_another_shape_are_refused_in_one_line(tmp_path):
  arrays = analysis_files.steps_arrays()
  arrays["atat_accuracy"] = np.zeros(3)
  files.write_arrays(analyses.ANALYSES["steps"].path(tmp_path), arrays)
  with pytest.raises(UserError, match=r"attack_steps.npz cannot be read"):
    analyses.sections(tmp_path, tmp_path)


FAULTS = [
  ("rows", None, "no list of rows"),
  ("rows", {}, "no list of rows"),
  ("rows", [5], "row 1: 5"),
  ("model", None, "row 2: no model"),
  ("model", 5, "row 2: model: 5; allowed: text"),
  ("attack", ["pgd20"], "row 2: attack: "),
  (
    "batch_norm",
    "fast",
    "row 2: batch_norm: 'fast'; allowed: running or batch",
  ),
  ("accuracy", None, "row 2: no accuracy"),
  ("accuracy", "0.5", "row 2: accuracy: '0.5'"),
  ("accuracy", True, "row 2: accuracy: True"),
  ("accuracy", 1.01, "row 2: accuracy: 1.01; allowed: a number from 0 to 1"),
  ("accuracy", -1e-9, "row 2: accuracy: -1e-09"),
  ("num_examples", 0, "row 2: num_examples: 0"),
  ("num_examples", 360.0, "row 2: num_examples: 360.0"),
  ("num_examples", 10**400, "row 2: num_examples"),
  ("epsilon", "8/255", "row 2: epsilon: '8/255'"),
  ("epsilon", -1, "row 2: epsilon: -1"),
  ("seconds", 1e300, "row 2: seconds"),
  ("dataset", None, "row 2: no dataset"),
  ("class_accuracy", [0.5, 2], "row 2: class_accuracy"),
  ("class_accuracy", {}, "row 2: class_accuracy"),
  ("nonfinite", -1, "row 2: nonfinite: -1"),
  ("options", {"a": {}}, "row 2: options"),
  ("attacks", [{"attack": "apgd"}], "row 2: attacks"),
  ("diagnostics", {"a": {"flag": 1}}, "row 2: diagnostics"),
  ("run", [], "run: "),
  ("run", {"class_names": "abc"}, "run: class_names: 'abc'"),
  ("run", {"checkpoints": {"student": 3}}, "run: checkpoints"),
  ("results", {"a": {"flag": True}}, "diagnostics; allowed: an object"),
]


@pytest.mark.parametrize(("field", "value", "message"), FAULTS)
def test_a_fault_of_the_results_is_one_line(tmp_path, field, value, message):
  results = copy.deepcopy(run_files.results())
  if field == "results":
    results["diagnostics"] = value
  elif field in ("rows", "run"):
    results[field] = value
  elif value is None:
    del results["rows"][1][field]
  else:
    results["rows"][1][field] = value
  run_files.save(tmp_path, results)
  with pytest.raises(DamagedFileError) as error:
    report.write_report(tmp_path)
  text = str(error.value)
  assert f"results.json: not a results file ({message}" in text
  assert "\n" not in text and len(text) < 2000
  assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(tmp_path, number):
  results = run_files.results()
  results["rows"][1]["accuracy"] = "here"
  text = json.dumps(results).replace('"here"', number)
  (tmp_path / "results.json").write_text(text)
  with pytest.raises(DamagedFileError, match=r"results.json is not valid JSON"):
    report.write_report(tmp_path)
