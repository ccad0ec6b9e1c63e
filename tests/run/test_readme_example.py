"""The README's Python runs as it is written, and its attack stays in the ball."""

import pathlib
import re

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_readme_example_attacks_a_model(capsys):
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
  assert len(blocks) == 1
  names: dict = {}
  exec(compile(blocks[0], "README.md", "exec"), names)
  images, adversarial = names["images"], names["adversarial"]
  logits = images.reshape(len(images), -1) @ names["params"]["kernel"]
  np.testing.assert_array_equal(logits.argmax(-1), names["labels"])
  assert np.abs(adversarial - images).max() <= 8 / 255 + 1e-6
  attacked = adversarial.reshape(len(images), -1) @ names["params"]["kernel"]
  fooled = attacked.argmax(-1) != names["labels"]
  assert fooled.any()
  assert names["result"].robust.sum() <= (~fooled).sum()
  assert "Robust accuracy" in capsys.readouterr().out
