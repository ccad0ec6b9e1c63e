"""Pages with real pictures: complete, and right in a headless Chromium."""

import base64
import io
import json
import re

import analysis_files
import chromium
import numpy as np
import pytest
import run_files
from html_page import Page
from PIL import Image

from atat_jax import report
from atat_jax.drawing import style


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


def save_png(fig, path):
  """Saves a figure without the PDF, which no page shows and takes longest."""
  path.parent.mkdir(exist_ok=True)
  fig.savefig(path)
  return path


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """The page of a run that has everything, and nine attacks."""
  workdir = tmp_path_factory.mktemp("full")
  attacks = ["nominal", "fgsm", "ifgsm20", "pgd7", "pgd20", "pgd20-margin"]
  attacks += ["apgd-cross-entropy", "square5000", "autoattack"]
  results = run_files.results(
    {key: dict.fromkeys(attacks, 0.5) for key in run_files.ACCURACIES}
  )
  for row in results["rows"]:
    row["class_accuracy"] = [0.1 * k for k in range(10)]
  run_files.save(workdir, results)
  add_pictures(workdir)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(style, "save", save_png)
    return report.write_report(workdir)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """The comparison of eight runs under nine attacks."""
  folder = tmp_path_factory.mktemp("compared")
  attacks = [f"a-rather-long-attack{k}" for k in range(8)] + ["nominal"]
  workdirs = []
  for number in range(8):
    workdirs.append(folder / str(number))
    results = run_files.results(
      {("student", "running"): dict.fromkeys(attacks, 0.5)}
    )
    results["run"]["config"] |= {
      "seed": number,
      "objective": {"weight": number // 2},
    }
    workdirs[-1].mkdir()
    run_files.save(workdirs[-1], results)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(style, "save", save_png)
    return report.write_comparison(workdirs, folder / "all")[0]


def test_page_shows_every_analysis_and_every_picture(full):
  page = Page(full)
  assert page.headings == [
    "Results",
    "Accuracy by class",
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
  assert "Grad-CAM at group<3>" in page.text
  assert "pgd20 with <running> statistics" in page.text
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


# --- In a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  with chromium.tab(tmp_path_factory.mktemp("profile")) as found:
    yield found


def pixels(content):
  with Image.open(io.BytesIO(content)) as image:
    return np.asarray(image.convert("RGB")).astype(int)


def test_a_browser_shows_the_page_and_asks_for_nothing(full, tab):
  tab.resize(1200, 900)
  url = tab.open(full)
  sizes = tab.evaluate(
    "[...document.images].map(x => [x.naturalWidth, x.clientWidth])"
  )
  assert len(sizes) >= 11 and min(map(min, sizes)) > 200
  assert tab.complaints() == []
  requests = tab.requests()
  assert url in requests
  assert [x for x in requests if x != url and x[:5] != "data:"] == []
  assert pixels(tab.screenshot()).std() > 10


def test_what_the_browser_notes_is_noted(tmp_path, tab):
  """Or the test above would pass for any page."""
  path = tmp_path / "page.html"
  path.write_text(
    "<img src='missing.png'><script>console.log('a'); nothing()</script>"
  )
  tab.open(path)
  assert any(x.endswith("missing.png") for x in tab.requests())
  found = " ".join(tab.complaints())
  assert '"a"' in found and "nothing is not defined" in found


WIDER_THAN_THE_PAGE = """
  [...document.querySelectorAll("body *")]
    .filter(x => !x.closest(".scroll"))
    .filter(x => x.getBoundingClientRect().right > innerWidth + 1)
    .map(x => x.outerHTML.slice(0, 80))
"""
SCROLLED = """
  [...document.querySelectorAll(".scroll")]
    .filter(x => x.scrollWidth > x.clientWidth)
    .map(x => x.innerHTML.slice(0, 200))
"""


@pytest.mark.parametrize("width", [320, 400, 1200])
@pytest.mark.parametrize("name", ["full", "compared"])
def test_nothing_is_wider_than_the_window(name, tab, width, request):
  tab.open(request.getfixturevalue(name))
  tab.resize(width, 900)
  assert tab.evaluate("innerWidth") == width
  assert tab.evaluate("document.documentElement.scrollWidth") <= width
  assert tab.evaluate(WIDER_THAN_THE_PAGE) == []
  if width == 1200:  # nine attacks fit without scrolling
    assert tab.evaluate(SCROLLED) == []


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
