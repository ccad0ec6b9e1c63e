"""Sentences of the analyses: the numbers in the files, and nothing fixed."""

import json

import analysis_files
import numpy as np
import pytest

from atat_jax import analyses
from atat_jax.runs import files


@pytest.fixture
def find(tmp_path):
  """(name, arrays) to the sentence and the caption on the page."""

  def found(name, arrays):
    analysis = analyses.ANALYSES[name]
    data = files.Arrays(analysis.path(tmp_path), arrays)
    finding = analysis.find(data)
    return finding.sentence, finding.caption

  return found


def test_steps(find, tmp_path):
  arrays = analysis_files.steps_arrays()
  sentence, caption = find("steps", arrays)
  assert "standard 95.0%, 0.0% and 0.0%; atat 85.0%, 60.0% and 60" in sentence
  assert "falls by 0.0 points at most: PGD had converged after 20" in sentence
  assert "AutoAttack" not in sentence + caption
  arrays["atat_accuracy"] = np.linspace(0.6, 0.3, 101)
  row = {
    "model": "atat",
    "attack": "autoattack",
    "norm": "linf",
    "epsilon": 8 / 255,
    "batch_norm": "running",
    "num_examples": 360,
    "accuracy": 0.25,
  }

  def write(**changes):
    results = {"format": 1, "rows": [row | changes]}
    (tmp_path / "results.json").write_text(json.dumps(results))

  write()
  sentence, caption = find("steps", arrays)
  # 0.6 - 0.3 * 20 / 100 is left after 20 steps.
  assert "atat 85.0%, 54.0% and 30.0%" in sentence
  assert "24.0 points at most: PGD had not converged after 20" in sentence
  assert "AutoAttack leaves atat 25.0% (autoattack, 360 images)" in sentence
  assert "Dotted lines" in caption and "360 images, PGD, linf" in caption
  # Of other images it says nothing beside these.
  write(num_examples=100)
  sentence, caption = find("steps", arrays)
  assert "AutoAttack" not in sentence and "Dotted" not in caption
  assert "AutoAttack is left out where it was run on 100 images" in caption


def test_epsilons(find):
  arrays = analysis_files.epsilons_arrays()
  sentence, _ = find("epsilons", arrays)
  assert "standard from 8/255 on; atat from 16/255 on" in sentence
  assert "never fooled (atat 10.0%)" in sentence
  arrays["atat_worst_case"] = np.zeros(4)
  arrays["atat_accuracy"] = np.full(4, 0.8)
  sentence, _ = find("epsilons", arrays)
  assert "atat nowhere" in sentence and "No image withstands" in sentence


def test_attention(find):
  arrays = analysis_files.maps(["raw", "full"], ["clean", "adversarial"], n=5)
  right = arrays["labels"]
  arrays["raw_adversarial_prediction"] = np.array([1, 1, 3, 3, 0])  # 2 right
  arrays["full_adversarial_prediction"] = np.array([0, 0, 2, 3, 0])  # 3 right
  sentence, caption = find("attention", arrays)
  assert "Of 5 images, raw classifies 5 and 2 correctly" in sentence
  assert "full classifies 5 and 3 correctly" in sentence
  assert "full is right on 2 of the 3 attacked images" in sentence
  assert "right where raw is wrong" in caption and "PGD." in caption

  arrays = analysis_files.maps(["raw"], ["clean", "round2", "round8"], n=5)
  arrays["raw_round8_prediction"] = right + 1
  sentence, _ = find("rounds", arrays)
  assert "5, 5 and 0 correctly (on clean images and after 2 and 8" in sentence


def test_files_of_earlier_versions_are_read(find):
  arrays = analysis_files.maps(["teacher"], ["clean", "adversarial"])
  del arrays["networks"], arrays["kinds"]
  sentence, _ = find("attention", arrays)
  assert "teacher classifies 2 and 2 correctly" in sentence


def test_shift(find):
  arrays = analysis_files.shifts({"raw": 0.9, "full": 0.0})
  sentence, caption = find("shift", arrays)
  mean = arrays["raw_cosine"][-1].mean()
  assert f"cosine distance of raw {mean:.2g} and full 0.0" in sentence
  assert "raw: " in sentence and "AUC 1.00" in sentence  # drawn apart
  assert "60 images, Grad-CAM at features, PGD, 8 steps" in caption


def test_whether_shift_tells_who_is_fooled(find):
  sentence, _ = find("shift", analysis_files.shifts({"raw": 1.0, "full": 0.3}))
  # All are fooled in the end: the comparison is after two rounds.
  assert "raw: after 2 rounds 30 of 60 images are fooled." in sentence
  assert sentence.endswith(
    "full: after 8 rounds 18 of 60 images are fooled. Their attention has"
    " shifted more by cosine distance (AUC 1.00), rank correlation (AUC 1.00),"
    " highest tenth (AUC 1.00), centre of mass (AUC 1.00)."
  )
  sentence, _ = find("shift", analysis_files.shifts({"raw": 0.0}))
  assert sentence.endswith(
    "raw: inconclusive, 0 fooled and 60 not after the last round; at least 10 of"
    " each are needed."
  )


def test_landscape(find):
  arrays = analysis_files.landscape_arrays()
  sentence, _ = find("landscape", arrays)
  # 20 (a + 0.2) from a = 0 to 0.2; wrong where a > 0.1 (two of nine rows of
  # one image, none of the other).
  assert "standard: the loss changes by +4 nats" in sentence
  assert "reaches 8; 11.1% of the plane" in sentence
  assert "atat: the loss changes by +0.02 nats" in sentence


def test_curvature(find):
  arrays = analysis_files.curvature_arrays()
  sentence, _ = find("curvature", arrays)
  means = [arrays[f"{name}_mean"] for name in analysis_files.NETWORKS]
  for mean in means:
    assert f"{mean:.3g} (95% {0.8 * mean:.3g} to {1.2 * mean:.3g})" in sentence
  ratio = means[0] / means[1]
  assert f"standard bends {ratio:.3g} times as much as that of atat" in sentence
