"""The report: true numbers, everything escaped, nothing fetched."""

import re

import pytest
import run_files
from html_page import Page
from PIL import Image
from scipy import stats

from atat_jax import figures, report
from atat_jax.errors import UserError
from atat_jax.report import results as results_lib
from atat_jax.report import summary
from atat_jax.runs import worst_case

ACCURACIES = run_files.ACCURACIES


@pytest.fixture(autouse=True)
def drawings(monkeypatch):
  """One small picture instead of each figure: drawing is tested elsewhere."""

  def draw(workdir):
    path = workdir / "figures" / "picture.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return [path]

  monkeypatch.setattr(figures, "draw_results", draw)
  monkeypatch.setattr(figures, "draw_curves", lambda workdir: [])


def cells(page):
  """{(attack, model, batch_norm): text} of the table of results."""
  head, *rows = page.rows
  found, batch_norm = {}, None
  for line in rows:
    if line[0].endswith("fixed classifier"):
      batch_norm = "running"
    elif line[0].startswith("Batch statistics"):
      batch_norm = "batch"
    elif len(line) == len(head):
      attack = next(
        name for name in ("nominal", "fgsm", "pgd20") if name in line[0]
      )
      for model, text in zip(head[1:-1], line[1:-1], strict=True):
        found[attack, model, batch_norm] = text
  return found


def test_missing_results_name_the_command(tmp_path):
  with pytest.raises(UserError) as error:
    report.write_report(tmp_path)
  assert "atat-jax evaluate --config=" in str(error.value)
  assert f"--workdir={tmp_path}" in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_page_shows_the_numbers_given(tmp_path):
  run_files.save(tmp_path, run_files.results())
  path = report.write_report(str(tmp_path))
  assert path == tmp_path / "report.html"
  page = Page(path)
  assert page.rows[0] == ["attack", "teacher", "student", "time"]
  found = cells(page)
  for (model, batch_norm), accuracies in ACCURACIES.items():
    for attack, accuracy in accuracies.items():
      text = found.pop((attack, model, batch_norm))
      assert text.startswith(f"{100 * accuracy:.2f}"), (attack, model)
      interval = stats.binomtest(round(297 * accuracy), 297).proportion_ci(
        method="wilson"
      )
      assert text.endswith(
        f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"
      )
      if batch_norm == "batch":
        gap = 100 * (accuracy - ACCURACIES[model, "running"][attack])
        assert f"{gap:+.1f}".replace("-", "−") in text
  assert found == {}
  assert page.text.index("fixed classifier") < page.text.index(
    "paper's released protocol, no fixed classifier, its attack can fail"
  )
  assert page.text.count("its attack can fail") == 1


def test_protocol_and_time_are_beside_the_numbers(tmp_path):
  run_files.save(tmp_path, run_files.results())
  page = Page(report.write_report(tmp_path))
  (running,) = [
    r for r in page.rows if r[0].startswith("pgd20") and "batches" not in r[0]
  ]
  assert running[0] == (
    "pgd20 linf, epsilon 8/255, 20 steps of 2/255, 1 restart, cross_entropy loss"
  )
  assert running[-1] == "2.0 s"  # of both models
  assert "batches of 100 images" in page.text
  assert "297 digits test images, seed 17." in page.text
  assert "Time of the evaluation" in page.text and "12 s" in page.text


def test_images_are_beside_the_numbers_where_they_differ(tmp_path):
  found = run_files.results()
  for row in found["rows"]:
    if row["attack"] == "pgd20":
      row["num_examples"] = 100
  run_files.save(tmp_path, found)
  page = Page(report.write_report(tmp_path))
  assert "cross_entropy loss; 100 digits test images, seed 17" in page.text
  assert "clean images, no attack; 297 digits test images" in page.text


def test_page_holds_the_facts_of_the_run(tmp_path):
  found = run_files.results()
  found["run"]["command"] = "curl https://example.org/<x>"
  run_files.save(tmp_path, found)
  page = Page(report.write_report(tmp_path))
  for text in (
    "ATAT on digits, wide_resnet 14-2",
    "flagged, student: Batch statistics give a higher accuracy. These are two"
    " classifiers.",
    "passed, student: more steps. PGD-20 is as strong as it should be.",
    "not measured, student: zero gradients.",
    "git checkout 0123abcd\ncurl https://example.org/<x>",
    "jax 0.10.2",
    "student: best, step 2,000",
    "teacher: 77,754; student: 77,754",
    "2 x cpu",
    '"depth": 14',
  ):
    assert text in page.text
  assert page.headings == ["Results", "Diagnostics", "The run"]


def with_classes(found, num_classes):
  for number, row in enumerate(found["rows"]):
    values = [(number + k) / 100 for k in range(num_classes)]
    row["class_accuracy"] = [None, *values[1:]]
  return found


def test_accuracies_by_class(tmp_path):
  found = with_classes(run_files.results(), 3)
  found["run"]["class_names"] = ["zero", "one", "two<"]
  run_files.save(tmp_path, found)
  page = Page(report.write_report(tmp_path))
  assert page.headings[1] == "Accuracy by class"
  clean, robust = found["rows"][3], found["rows"][5]  # the student's
  assert (clean["attack"], robust["attack"]) == ("nominal", "pgd20")
  assert page.rows[-4:] == [
    ["class", "clean (%)", "pgd20 (%)"],
    ["zero", "–", "–"],
    ["one", "4.0", "6.0"],
    ["two<", "5.0", "7.0"],
  ]


def test_the_least_robust_of_many_classes_are_shown():
  rows = with_classes(run_files.results(), 100)["rows"]
  rows[5]["class_accuracy"] = [None, *((99 - k) / 100 for k in range(99))]
  found = results_lib.by_class(rows)
  assert "The 10 least robust of 100 classes." in found.sentence
  assert [name for name, _, _ in found.lines[:2]] == ["class 99", "class 98"]
  assert found.lines[0][2] == pytest.approx(0.01)


def test_accuracies_by_class_are_those_of_an_attack_that_has_them():
  found = run_files.results()
  assert results_lib.by_class(found["rows"]) is None
  student = {
    row["attack"]: row
    for row in found["rows"]
    if (row["model"], row["batch_norm"]) == ("student", "running")
  }
  student["fgsm"]["class_accuracy"] = [0.5, 0.25]
  by_class = results_lib.by_class(found["rows"])
  assert by_class.attack == "fgsm"
  assert by_class.lines == [("class 0", None, 0.5), ("class 1", None, 0.25)]


def test_page_asks_for_nothing(tmp_path):
  run_files.save(tmp_path, run_files.results())
  Page(report.write_report(tmp_path)).assert_asks_for_nothing()


def test_everything_is_escaped(tmp_path):
  bad = "<script>alert('&amp;\"')</script>"

  def spoil(value):
    if isinstance(value, dict):
      return {f"{k}": spoil(v) for k, v in value.items()}
    if isinstance(value, list):
      return [spoil(v) for v in value]
    return bad + value if isinstance(value, str) else value

  results = with_classes(run_files.results(), 2)
  for row in results["rows"]:
    for field in ("dataset", "split", "norm", "loss"):
      row[field] = bad
    row["attack"] += bad
    row["model"] += bad
  results["run"] = spoil(results["run"])
  results["run"] |= {"versions": {bad: bad}, "class_names": [bad, bad]}
  results["run"]["num_parameters"] = {bad: 1}
  results["diagnostics"] = {
    bad + name: spoil(check) for name, check in results["diagnostics"].items()
  }
  run_files.save(tmp_path, results)
  page = Page(report.write_report(tmp_path))
  assert "<script" not in page.source
  # The text comes through as it was, not escaped twice.
  assert page.text.count(bad) > 20


def test_parts_without_inputs_are_left_out(tmp_path):
  only_teacher = {("teacher", "running"): ACCURACIES["teacher", "running"]}
  results = run_files.results(only_teacher)
  results["diagnostics"] = {}
  results["run"] = {"commit": None}
  run_files.save(tmp_path, results)
  (tmp_path / "config.json").write_text('{"method": "standard"}')
  page = Page(report.write_report(tmp_path))
  assert page.headings == ["Results", "The run"]
  assert "STANDARD on digits" in page.text
  assert '"method": "standard"' in page.text
  assert "overstate" not in page.text and "student" not in page.text
  assert "the teacher classifies 1.4%" in page.text


def test_no_rows_at_all(tmp_path):
  run_files.save(tmp_path, {"format": 1, "rows": []})
  page = Page(report.write_report(tmp_path))
  assert page.headings == ["The run"]
  assert "do not say how robust" in page.text


def test_writing_again_replaces_the_page(tmp_path):
  results = run_files.results()
  run_files.save(tmp_path, results)
  assert report.is_old(tmp_path)
  first = report.write_report(tmp_path).read_text()
  assert not report.is_old(tmp_path)
  assert report.write_report(tmp_path).read_text() == first
  results["run"]["date"] = "2027-01-01"
  run_files.save(tmp_path, results)
  assert "2027-01-01" in report.write_report(tmp_path).read_text()
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"figures", "report.html", "results.json"}


def test_verdict():
  text = report.verdict(run_files.results())
  assert text.startswith(
    "Under pgd20, the strongest of the 2 attacks run (linf, epsilon 8/255), the"
    " student classifies 71.4% of 297 digits test images correctly"
  )
  assert "70.0 points more than the teacher (1.4%)" in text  # 71.38 - 1.35
  assert "97.0% of the clean images correctly, the teacher 98.3%" in text
  assert "credited with 77.8% under pgd20, 6.4 points more than the" in text
  assert "1 of the 3 diagnostics below raises a flag" in text


def test_the_verdict_says_whether_autoattack_was_run():
  content = run_files.results()
  assert "AutoAttack was not run on these images" in summary.verdict(content)
  row = run_files.result_row("student", "autoattack", "running", 0.6, seed=17)
  content["rows"].append(row)
  assert "not run" not in summary.verdict(content)
  # On other images it says nothing of these.
  content["rows"][-1] |= {"num_examples": 20}
  assert "AutoAttack was not run on these images" in summary.verdict(content)


def test_verdict_when_batch_statistics_claim_less():
  accuracies = {
    ("student", "running"): {"pgd7": 0.5, "apgd": 0.4},
    ("student", "batch"): {"pgd7": 0.45},
  }
  text = report.verdict(run_files.results(accuracies))
  assert "Under apgd, the strongest of the 2 attacks" in text
  assert "45.0% under pgd7, 5.0 points less than the 50.0%" in text
  assert "teacher" not in text


def test_verdict_says_what_better_attacks_leave_of_the_claim():
  accuracies = {
    ("student", "running"): {"fgsm": 0.6, "pgd20": 0.5, "pgd20-margin": 0.4},
    ("student", "batch"): {
      "fgsm": 0.89,
      "pgd20": 0.783,
      "pgd20:statistics=fixed": 0.661,
      "pgd20-margin": 0.675,
    },
  }
  found = run_files.results(accuracies)
  for row in found["rows"]:
    if row["attack"].endswith("fixed"):
      row["options"] = {"statistics": "fixed"}
    if row["attack"].endswith("margin"):
      row["loss"] = "margin"
  text = report.verdict(found)
  # Not under pgd20-margin, though that is the strongest in both modes.
  assert "credited with 78.3% under pgd20, 28.3 points more than" in text
  assert (
    "pgd20:statistics=fixed leaves the same classifier 66.1%, 12.2 points less"
    " than pgd20." in text
  )
  del found["rows"][-2:]
  text = report.verdict(found)
  assert (
    "hold those statistics fixed, or have the margin loss, were not" in text
  )


def test_verdict_without_running_statistics():
  only_batch = {("student", "batch"): ACCURACIES["student", "batch"]}
  text = report.verdict(run_files.results(only_batch))
  assert "do not say how robust" in text and "77" not in text


@pytest.mark.parametrize(
  ("accuracy", "count", "low", "high"),
  [
    (1.0, 10, 0.7225, 1.0),  # n / (n + z^2)
    (0.0, 10, 0.0, 0.2775),
    (0.5, 100, 0.4038, 0.5962),
  ],
)
def test_confidence_is_wilsons(accuracy, count, low, high):
  results = run_files.results({("student", "running"): {"pgd20": accuracy}})
  results["rows"][0]["num_examples"] = count
  found = re.search(r"confidence: (.*)% to (.*)%\)", report.verdict(results))
  assert float(found[1]) == pytest.approx(100 * low, abs=0.06)
  assert float(found[2]) == pytest.approx(100 * high, abs=0.06)


def test_terminal_table():
  accuracies = {key: dict(values) for key, values in ACCURACIES.items()}
  del accuracies["student", "batch"]["fgsm"]
  text = report.results_table(run_files.results(accuracies))
  lines = [line for line in text.splitlines() if line.startswith("|")]
  assert len({len(line) for line in lines}) == 1  # aligned
  head, rule, *rows = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  ]
  assert head == ["accuracy (%)", "nominal", "fgsm", "pgd20"]
  assert all(re.fullmatch("-+:?", cell) for cell in rule)
  assert [row[0] for row in rows] == [
    f"{model}, {batch_norm} statistics" for model, batch_norm in accuracies
  ]
  for (_, *cells), expected in zip(rows, accuracies.values(), strict=True):
    for attack, cell in zip(head[1:], cells, strict=True):
      if attack in expected:
        assert float(cell) / 100 == pytest.approx(expected[attack])
      else:
        assert cell == "–"
  protocol = text.split("\n\n")[1]
  assert re.search(r"^pgd20: linf, epsilon 8/255, .*seed 17; ", protocol, re.M)
  assert "its attack can fail" in protocol
  running = {k: v for k, v in accuracies.items() if k[1] == "running"}
  assert "overstate" not in report.results_table(run_files.results(running))


def test_the_page_begins_with_the_result_and_what_to_doubt(tmp_path):
  found = run_files.results()
  found["run"]["config"] |= {
    "seed": 3,
    "train": {"num_epochs": 24, "batch_size": 64},
    "objective": {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 7},
  }
  # The same finding of an attack and of the rows beside it is one.
  found["diagnostics"]["student_again"] = {
    **found["diagnostics"]["student_zero_gradients"],
    "title": "zero gradients",
  }
  run_files.save(tmp_path, found)
  text = " ".join(Page(report.write_report(tmp_path)).text.split())
  parts = [
    "The student withstands pgd20 on 71.4% of 297 digits test images (linf,"
    " epsilon 8/255); without attack it is right on 97.0%.",
    "Before you trust these numbers student: Batch statistics give a higher"
    " accuracy. These are two classifiers.",
    "Results",
    "▲ flagged, student: Batch statistics give a higher accuracy. These are two"
    " classifiers. Rule: batch minus running <= 0.02; measured 0.064.",
    "✓ passed, student: more steps.",
    "24 epochs in batches of 64; attacked by pgd: linf, epsilon 8/255,"
    " 7 steps of 2/255; seed 3",
  ]
  places = [text.find(part) for part in parts]
  assert -1 not in places and places == sorted(places), places
  assert text.count("zero gradients.") == 1


def test_the_headline_is_the_worst_case_where_it_is_known():
  rows = [
    run_files.result_row("at", "nominal", "running", 1.0, correct="/w=="),
    run_files.result_row("at", "fgsm", "running", 0.5, correct="8A=="),
    run_files.result_row("at", "pgd20", "running", 0.5, correct="PA=="),
  ]
  for row in rows:
    row["num_examples"] = 8
  content = {"format": 1, "rows": worst_case.complete(rows)}
  assert summary.headline(content).startswith(
    "The at withstands each of 2 attacks on 25.0% of 8 digits test images"
  )
  only_batch = [row | {"batch_norm": "batch"} for row in rows]
  assert summary.headline({"format": 1, "rows": only_batch}) == ""
