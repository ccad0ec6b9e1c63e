"""The report: true numbers, everything escaped, nothing fetched."""

import base64
import io
import json
import re

import analysis_files
import chromium
import numpy as np
import pytest
from html_page import Page
from PIL import Image

from atat_jax import report
from atat_jax.errors import UserError

ACCURACIES = {
  ("teacher", "running"): {"nominal": 0.9832, "fgsm": 0.31, "pgd20": 0.0135},
  ("student", "running"): {"nominal": 0.9697, "fgsm": 0.79, "pgd20": 0.7138},
  ("teacher", "batch"): {"nominal": 0.9765, "fgsm": 0.4, "pgd20": 0.05},
  ("student", "batch"): {"nominal": 0.9596, "fgsm": 0.84, "pgd20": 0.7778},
}


def make_results(accuracies=ACCURACIES):
  rows = [
    {
      "model": model,
      "dataset": "digits",
      "split": "test",
      "num_examples": 297,
      "attack": attack,
      "norm": None if attack == "nominal" else "linf",
      "epsilon": None if attack == "nominal" else 0.2,
      "step_size": None if attack == "nominal" else 0.05,
      "num_steps": None if attack == "nominal" else 20,
      "num_restarts": None if attack == "nominal" else 1,
      "loss": None if attack == "nominal" else "cross_entropy",
      "batch_norm": batch_norm,
      "seed": 17,
      "accuracy": accuracy,
      "seconds": 1.0,
      "batch_size": 100,
    }
    for (model, batch_norm), columns in accuracies.items()
    for attack, accuracy in columns.items()
  ]
  return {
    "format": 1,
    "run": {
      "config": {
        "method": "atat",
        "model": {"name": "wide_resnet", "depth": 14, "width": 2},
      },
      "commit": "0123abcd",
      "devices": ["TFRT_CPU_0"],
      "versions": {"jax": "0.10.2"},
      "command": "python main.py --config=configs/digits.py",
      "date": "2026-09-01",
      "checkpoints": {"student": {"step": 2000, "which": "best"}},
    },
    "rows": rows,
    "diagnostics": {
      "more_steps": {
        "rule": "more steps never help the network",
        "value": 0.01,
        "flag": False,
        "message": "PGD-20 is as strong as it should be.",
      },
      "batch_statistics": {
        "rule": "batch minus running <= 0.02",
        "value": 0.064,
        "flag": True,
        "message": "Batch statistics flatter this network.",
      },
      "zero_gradients": {
        "rule": "fewer than 1 in 100",
        "value": None,
        "flag": False,
        "message": "There were no gradients to count.",
      },
    },
  }


def save(workdir, results):
  (workdir / "results.json").write_text(json.dumps(results))


def add_pictures(workdir):
  """All that a run can leave behind, with names that must be escaped."""
  line = {"split": "train", "step": 1, "epoch": 1.0, "learning_rate": 0.1}
  (workdir / "metrics.jsonl").write_text(json.dumps(line))
  names = ["standard", "atat"]
  maps = analysis_files.maps(names, ["clean", "adversarial"])
  maps["class_names"] = np.array(["<b>zero</b>", "one"])
  maps["layer"] = "group<3>"
  maps["protocol"] = "pgd20 with <running> statistics"
  landscape = analysis_files.landscape_arrays()
  landscape["labels"] = landscape["labels"][:1]
  for stem, arrays in (
    ("attention", maps),
    ("attention_rounds", analysis_files.maps(names, ["clean", "round2"])),
    ("attention_shift", analysis_files.shifts({"standard": 0.9, "atat": 0.0})),
    ("loss_landscape", landscape),
    ("curvature", analysis_files.curvature_arrays()),
    ("attack_steps", analysis_files.steps_arrays()),
    ("attack_epsilons", analysis_files.epsilons_arrays()),
  ):
    np.savez(workdir / f"{stem}.npz", **arrays)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """The page of a run that has everything."""
  workdir = tmp_path_factory.mktemp("full")
  results = make_results()
  results["run"]["command"] = "curl https://example.org/<x>"
  save(workdir, results)
  add_pictures(workdir)
  return report.write_report(workdir)


def test_missing_results_name_the_command(tmp_path):
  with pytest.raises(UserError) as error:
    report.write_report(tmp_path)
  assert "python main.py --mode=evaluate" in str(error.value)
  assert f"--workdir={tmp_path}" in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_page_shows_the_numbers_given(tmp_path):
  save(tmp_path, make_results())
  path = report.write_report(str(tmp_path))
  assert path == tmp_path / "report.html"
  head, *rows = Page(path).rows
  assert head == ["accuracy (%)", "nominal", "fgsm", "pgd20"]
  found, batch_norm = [], "running"
  for label, *cells in rows:
    if not cells:  # the heading of a group
      batch_norm = "batch" if found else "running"
      continue
    found.append((label, batch_norm))
    expected = list(ACCURACIES[label, batch_norm].values())
    assert [float(cell) / 100 for cell in cells] == pytest.approx(expected)
  assert found == list(ACCURACIES)  # running statistics first
  text = Page(path).text
  assert text.count("paper's released protocol, can overstate robustness") == 1
  assert "+6.4" in text  # 77.78 - 71.38


def test_page_holds_everything_there_is_to_say(full):
  page = Page(full)
  assert page.headings == [
    "Protocol",
    "Results",
    "Diagnostics",
    "Training",
    "Accuracy against the attack's steps",
    "Accuracy against epsilon",
    "Attention",
    "Attention as an attack goes on",
    "Attention shift",
    "Loss landscape",
    "Curvature of the loss",
    "The run",
  ]
  for text in (
    "ATAT on digits, wide_resnet 14-2",
    "linf, epsilon 0.2, 20 steps of 0.05, 1 restart, cross_entropy loss; 297"
    " digits test images, seed 17; BatchNorm: running statistics and batch"
    " statistics of 100 images",
    "clean images, no attack; 297 digits test images",
    "flagged: batch statistics. Batch statistics flatter this network.",
    "passed: more steps. PGD-20 is as strong as it should be.",
    "not measured: zero gradients.",
    "Grad-CAM at group<3>",
    "pgd20 with <running> statistics",
    "git checkout 0123abcd\ncurl https://example.org/<x>",
    "jax 0.10.2",
    "student: best, step 2,000",
    '"depth": 14',
  ):
    assert text in page.text
  # Every picture that was drawn is on the page, whole.
  drawn = {
    base64.b64encode(path.read_bytes()).decode()
    for path in (full.parent / "figures").glob("*.png")
  }
  shown = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
  assert {src.removeprefix("data:image/png;base64,") for src in shown} == drawn
  assert len(shown) == len(drawn) >= 11
  for src in shown:
    with Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))) as image:
      assert image.format == "PNG" and min(image.size) > 200


def test_page_asks_for_nothing(full):
  Page(full).assert_asks_for_nothing()


def test_every_picture_has_its_sentence_and_its_protocol(full):
  source = full.read_text()
  parts = source.split("<h2>")[5:-1]  # behind the training
  assert len(parts) == 7
  for part in parts:
    sentence = re.search(r"</h2>\n<p>(.+)</p>", part)[1]
    caption = re.search(r"<figcaption>(.+)</figcaption>", part, re.S)[1]
    assert any(digit in sentence for digit in "0123456789"), part[:200]
    assert any(word in caption for word in ("PGD", "pgd20", "iteration", "x +"))


def test_everything_is_escaped(tmp_path):
  bad = "<script>alert('&amp;\"')</script>"

  def spoil(value):
    if isinstance(value, dict):
      return {f"{k}": spoil(v) for k, v in value.items()}
    if isinstance(value, list):
      return [spoil(v) for v in value]
    return bad + value if isinstance(value, str) else value

  results = make_results()
  for row in results["rows"]:
    for field in ("dataset", "split", "norm", "loss"):
      row[field] = bad
    row["attack"] += bad
    row["model"] += bad
  results["run"] = spoil(results["run"])
  results["run"]["versions"] = {bad: bad}
  results["diagnostics"] = {
    bad + name: spoil(check) for name, check in results["diagnostics"].items()
  }
  save(tmp_path, results)
  page = Page(report.write_report(tmp_path))
  assert "<script" not in page.source
  # The text comes through as it was, not escaped twice.
  assert page.text.count(bad) > 10


def test_parts_without_inputs_are_left_out(tmp_path):
  only_teacher = {("teacher", "running"): ACCURACIES["teacher", "running"]}
  results = make_results(only_teacher)
  results["diagnostics"] = {}
  results["run"] = {"commit": None}
  save(tmp_path, results)
  (tmp_path / "config.json").write_text('{"method": "standard"}')
  page = Page(report.write_report(tmp_path))
  assert page.headings == ["Protocol", "Results", "The run"]
  assert "STANDARD on digits" in page.text
  assert '"method": "standard"' in page.text
  assert "overstate" not in page.text and "student" not in page.text
  assert "the teacher classifies 1.4%" in page.text


def test_no_rows_at_all(tmp_path):
  save(tmp_path, {"format": 1, "rows": []})
  page = Page(report.write_report(tmp_path))
  assert page.headings == ["The run"]
  assert "do not say how robust" in page.text


def test_writing_again_replaces_the_page(tmp_path):
  results = make_results()
  save(tmp_path, results)
  first = report.write_report(tmp_path).read_text()
  assert report.write_report(tmp_path).read_text() == first
  results["run"]["date"] = "2027-01-01"
  save(tmp_path, results)
  assert "2027-01-01" in report.write_report(tmp_path).read_text()
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"figures", "report.html", "results.json"}


def test_verdict():
  text = report.verdict(make_results())
  assert text.startswith(
    "Under pgd20, the strongest of the 2 attacks run (linf, epsilon 0.2), "
    "the student classifies 71.4% of 297 digits test images correctly"
  )
  assert "70.0 points more than the teacher (1.4%)" in text  # 71.38 - 1.35
  assert "the student is right on 97.0%, the teacher on 98.3%" in text
  assert "credited with 77.8% under pgd20, 6.4 points more than the" in text
  assert "1 of the 3 diagnostics below raises a flag" in text


def test_verdict_when_batch_statistics_claim_less():
  accuracies = {
    ("student", "running"): {"pgd7": 0.5, "apgd": 0.4},
    ("student", "batch"): {"pgd7": 0.45},
  }
  text = report.verdict(make_results(accuracies))
  assert "Under apgd, the strongest of the 2 attacks" in text
  assert "45.0% under pgd7, 5.0 points less than the 50.0%" in text
  assert "teacher" not in text


def test_verdict_without_running_statistics():
  only_batch = {("student", "batch"): ACCURACIES["student", "batch"]}
  text = report.verdict(make_results(only_batch))
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
  results = make_results({("student", "running"): {"pgd20": accuracy}})
  results["rows"][0]["num_examples"] = count
  found = re.search(r"confidence: (.*)% to (.*)%\)", report.verdict(results))
  assert float(found[1]) == pytest.approx(100 * low, abs=0.06)
  assert float(found[2]) == pytest.approx(100 * high, abs=0.06)


def test_terminal_table():
  accuracies = {key: dict(values) for key, values in ACCURACIES.items()}
  del accuracies["student", "batch"]["fgsm"]
  text = report.results_table(make_results(accuracies))
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
  assert re.search(r"^pgd20: linf, epsilon 0\.2, .*seed 17; ", protocol, re.M)
  assert "can overstate robustness" in protocol
  running = {k: v for k, v in accuracies.items() if k[1] == "running"}
  assert "overstate" not in report.results_table(make_results(running))


# --- In a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  if chromium.find() is None:
    pytest.skip("no Chromium on the path: nobody has looked at the page")
  with chromium.tab(tmp_path_factory.mktemp("profile")) as found:
    yield found


def pixels(content):
  with Image.open(io.BytesIO(content)) as image:
    return np.asarray(image.convert("RGB")).astype(int)


WIDER_THAN_THE_PAGE = """
  [...document.querySelectorAll("body *")]
    .filter(x => !x.closest(".scroll"))
    .filter(x => x.getBoundingClientRect().right > innerWidth + 1)
    .map(x => x.outerHTML.slice(0, 80))
"""


def test_a_browser_shows_the_page_and_asks_for_nothing(full, tab):
  tab.resize(1200, 900)
  url = tab.open(full)
  sizes = tab.evaluate(
    "[...document.images].map(x => [x.naturalWidth, x.clientWidth])"
  )
  assert len(sizes) >= 11 and min(map(min, sizes)) > 200
  assert tab.complaints == []
  assert url in tab.requests
  elsewhere = [x for x in tab.requests if x != url and x[:5] != "data:"]
  assert elsewhere == []
  assert pixels(tab.screenshot()).std() > 10


def test_what_the_browser_notes_is_noted(tmp_path, tab):
  """Or the test above would pass for any page."""
  path = tmp_path / "page.html"
  path.write_text(
    "<img src='missing.png'><script>console.log('a'); nothing()</script>"
  )
  seen = len(tab.requests), len(tab.complaints)
  tab.open(path)
  assert any(x.endswith("missing.png") for x in tab.requests[seen[0] :])
  found = " ".join(tab.complaints[seen[1] :])
  assert '"a"' in found and "nothing is not defined" in found


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_is_wider_than_the_window(full, tab, width):
  tab.open(full)
  tab.resize(width, 900)
  page = "document.documentElement"
  assert tab.evaluate(f"{page}.scrollWidth") <= width
  assert tab.evaluate(WIDER_THAN_THE_PAGE) == []


def test_dark_where_dark_is_wanted(full, tab):
  tab.open(full)
  tab.resize(400, 900)
  found = {}
  for scheme in ("light", "dark"):
    tab.set_scheme(scheme)
    found[scheme] = np.median(pixels(tab.screenshot()))
  assert found["dark"] < 60 and found["light"] > 230


def test_printed(full, tab):
  """Light whatever the screen is, with every picture and the configuration."""
  tab.open(full)
  tab.set_scheme("dark")
  content = tab.pdf()
  assert content.startswith(b"%PDF-")
  assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20
  assert len(re.findall(rb"/Subtype\s*/Image", content)) >= 11
