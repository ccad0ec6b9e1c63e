"""Sentences of the analyses: the numbers in the files, and nothing fixed."""

import html
import json
import re

import analysis_files
import numpy as np
import pytest

from atat_jax import findings
from atat_jax.errors import UserError


@pytest.fixture
def say(tmp_path):
  """(stem, arrays) to the sentence and the caption on the page."""
  picture = tmp_path / "a.png"
  picture.write_bytes(b"png")

  def said(stem, arrays):
    path = tmp_path / f"{stem}.npz"
    np.savez(path, **arrays)
    text = html.unescape(findings.section(path, [picture]))
    sentence = re.search(r"<p>(.+)</p>", text)[1]
    return sentence, re.search(r"<figcaption>(.+)</figcaption>", text)[1]

  return said


def test_no_file_and_no_picture_are_no_section(tmp_path):
  path = tmp_path / "curvature.npz"
  assert findings.section(path, [tmp_path / "a.png"]) == ""
  np.savez(path, **analysis_files.curvature_arrays())
  assert findings.section(path, []) == ""
  path.write_bytes(b"no archive")
  with pytest.raises(UserError, match=r"curvature\.npz cannot be read"):
    findings.section(path, [tmp_path / "a.png"])


def test_steps(say, tmp_path):
  arrays = analysis_files.steps_arrays()
  sentence, caption = say("attack_steps", arrays)
  assert "standard 95.0%, 0.0% and 0.0%; atat 85.0%, 60.0% and 60" in sentence
  assert "take 0.0 points at most: the attack has nearly" in sentence
  assert "AutoAttack" not in sentence + caption
  arrays["atat_accuracy"] = np.linspace(0.6, 0.3, 101)
  row = {
    "model": "atat",
    "attack": "autoattack",
    "norm": "linf",
    "epsilon": 8 / 255,
    "batch_norm": "running",
    "num_examples": 100,
    "accuracy": 0.25,
  }
  results = {"format": 1, "rows": [row]}
  (tmp_path / "results.json").write_text(json.dumps(results))
  sentence, caption = say("attack_steps", arrays)
  # 0.6 - 0.3 * 20 / 100 is left after 20 steps.
  assert "atat 85.0%, 54.0% and 30.0%" in sentence
  assert "take 24.0 points at most, so fewer steps overstate" in sentence
  assert "AutoAttack leaves atat 25.0% (autoattack, 100 images)" in sentence
  assert "Dotted lines" in caption and "360 images, PGD, linf" in caption


def test_epsilons(say):
  arrays = analysis_files.epsilons_arrays()
  sentence, _ = say("attack_epsilons", arrays)
  assert "standard from 0.0314 on; atat from 0.0627 on" in sentence
  assert "never fooled (atat 10.0%)" in sentence
  arrays["atat_worst_case"] = np.zeros(4)
  arrays["atat_accuracy"] = np.full(4, 0.8)
  sentence, _ = say("attack_epsilons", arrays)
  assert "atat nowhere" in sentence and "No image withstands" in sentence


def test_attention(say):
  arrays = analysis_files.maps(["raw", "full"], ["clean", "adversarial"], n=5)
  right = arrays["labels"]
  arrays["raw_adversarial_prediction"] = np.array([1, 1, 3, 3, 0])  # 2 right
  arrays["full_adversarial_prediction"] = np.array([0, 0, 2, 3, 0])  # 3 right
  sentence, caption = say("attention", arrays)
  assert "Of 5 images, raw classifies 5 and 2 correctly" in sentence
  assert "full classifies 5 and 3 correctly" in sentence
  assert "full is right on 2 of the 3 attacked images" in sentence
  assert "correctly where raw is wrong" in caption and "PGD." in caption

  arrays = analysis_files.maps(["raw"], ["clean", "round2", "round8"], n=5)
  arrays["raw_round8_prediction"] = right + 1
  sentence, _ = say("attention_rounds", arrays)
  assert "5, 5 and 0 correctly (on clean images and after 2 and 8" in sentence


def test_files_of_earlier_versions_are_read(say):
  arrays = analysis_files.maps(["teacher"], ["clean", "adversarial"])
  del arrays["networks"], arrays["kinds"]
  sentence, _ = say("attention", arrays)
  assert "teacher classifies 2 and 2 correctly" in sentence


def test_shift(say):
  arrays = analysis_files.shifts({"raw": 0.9, "full": 0.0})
  sentence, caption = say("attention_shift", arrays)
  mean = arrays["raw_cosine"][-1].mean()
  assert f"cosine distance of raw {mean:.2g} and full 0.0" in sentence
  assert "raw: " in sentence and "AUC 1.00" in sentence  # drawn apart
  assert "60 images, Grad-CAM at features, PGD, 8 steps" in caption


def test_landscape(say):
  arrays = analysis_files.landscape_arrays()
  sentence, _ = say("loss_landscape", arrays)
  # 20 (a + 0.2) from a = 0 to 0.2; wrong where a > 0.1 (two of nine rows of
  # one image, none of the other).
  assert "standard: the loss changes by +4.00 nats" in sentence
  assert "reaches 8.00; 11.1% of the plane" in sentence
  assert "atat: the loss changes by +0.02 nats" in sentence


def test_curvature(say):
  arrays = analysis_files.curvature_arrays()
  sentence, _ = say("curvature", arrays)
  means = [arrays[f"{name}_mean"] for name in analysis_files.NETWORKS]
  for mean in means:
    assert f"{mean:.3g} (95% {0.8 * mean:.3g} to {1.2 * mean:.3g})" in sentence
  ratio = means[0] / means[1]
  assert f"standard bends {ratio:.3g} times as much as atat" in sentence
