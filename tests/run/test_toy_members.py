"""A new member of each kind is one file and one line, and nothing else.

A copy of the project gets a toy attack, version of AutoAttack, objective, data
set, network and analysis in exactly that way; then its own tests and commands
are run.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

FOLDERS = (
  *("atat_jax", "benchmarks", "configs", "docs", "launch", "notebooks"),
  "tests",
)

ATTACK = '''"""Toy attack: a few steps of l2 PGD."""

from typing import Literal

from atat_jax.attacks.projected_gradient import pgd
from atat_jax.typing import Array, Classifier


def toy_attack(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  num_steps: int = 3,
  norm: Literal["l2"] = "l2",
) -> Array:
  """Takes a few long steps."""
  return pgd(
    key,
    classifier,
    images,
    labels,
    epsilon=epsilon,
    step_size=0.1,
    num_steps=num_steps,
    norm=norm,
  )
'''

OBJECTIVE = '''"""Toy objective: adversarial training with a weight."""

import dataclasses

from atat_jax.objectives.at import AT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(AT):
  """Adversarial training with a smaller ball and a weight.

  Attributes:
    epsilon: Radius, pixels in [0, 1].
    toy_weight: Weight that nothing uses.
  """

  epsilon: float = 4 / 255
  toy_weight: float = 2.0
'''

DATA = '''"""Toy data: the digits 0 to 3."""

from atat_jax.data import base, digits

SPEC = base.DatasetSpec(
  name="toy",
  num_classes=4,
  image_shape=(8, 8, 1),
  class_names=("zero", "one", "two", "three"),
  mean=(0.3,),
  std=(0.4,),
)


def _below_four(split: base.Split) -> base.Split:
  kept = split.labels < 4
  return base.Split(split.images[kept], split.labels[kept])


def read(
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  source: str = "auto",
) -> tuple[base.Split, base.Split]:
  """Reads the digits below 4."""
  train, test = digits.read(source=source)
  return _below_four(train), _below_four(test)
'''

MODEL = '''"""Toy network: one convolution."""

import jax
from flax import linen as nn


class Toy(nn.Module):
  """A convolution and a linear head."""

  num_classes: int = 10
  toy_channels: int = 6

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] in [0, 1] to logits [B, K]."""
    x = nn.relu(nn.Conv(self.toy_channels, (3, 3), name="conv")(images))
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
'''

ANALYSIS = '''"""Toy analysis: mean logit of the true class."""

import numpy as np
from jax.sharding import Mesh

from atat_jax import models
from atat_jax.analyses import base
from atat_jax.data import batches
from atat_jax.drawing import style
from atat_jax.evaluation.networks import Networks
from atat_jax.typing import Array


def toy_logits(
  key: Array,
  networks: Networks,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns the mean logit of the true class, `<name>_logit`."""
  found = {"networks": np.array(list(networks))}
  for name, (model, variables) in networks.items():
    logits = np.asarray(models.classifier(model, variables)(images))
    found[f"{name}_logit"] = logits[np.arange(len(labels)), labels].mean()
    batches.tell(len(labels), len(labels))  # moves the progress bar
  return found


def _draw(data, directory):
  with style.context():
    fig = style.new_figure(3.0, 2.0)
    fig.add_subplot().bar(
      *zip(*((n, data[f"{n}_logit"]) for n in base.network_names(data)))
    )
    return [style.save(fig, directory / "toy.png")]


def _find(data):
  found = ", ".join(
    f"{n} {float(data[f'{n}_logit']):.3f}" for n in base.network_names(data)
  )
  return base.Finding("Toy heading", f"Toy logits: {found}.", "Toy caption.")


ANALYSIS = base.Analysis(
  stem="toy",
  compute=toy_logits,
  arguments=lambda settings, shape: {},
  images=base.first("num_examples"),
  draw=_draw,
  find=_find,
)
'''

# Package, file, registry, its line, and what the line needs.
MEMBERS = {
  "attacks": (
    ATTACK,
    "ATTACKS",
    '"toy": toy_attack',
    "from atat_jax.attacks.toy import toy_attack",
  ),
  "objectives": (
    OBJECTIVE,
    "OBJECTIVES",
    '"toy": Toy',
    "from atat_jax.objectives.toy import Toy",
  ),
  "data": (
    DATA,
    "DATASETS",
    '"toy": base.Source(toy.SPEC, toy.read)',
    "from atat_jax.data import toy",
  ),
  "models": (
    MODEL,
    "MODELS",
    '"toy": Toy',
    "from atat_jax.models.toy import Toy",
  ),
  "analyses": (
    ANALYSIS,
    "ANALYSES",
    '"toy": toy.ANALYSIS',
    "from atat_jax.analyses import toy",
  ),
}


def _register(path: pathlib.Path, registry: str, line: str) -> None:
  """Adds a line at the end of a registry."""
  text, count = re.subn(
    rf"(?ms)^({registry}\b[^=]*= \{{.*?)^\}}",
    rf"\g<1>  {line},\n}}",
    path.read_text(encoding="utf-8"),
    count=1,
  )
  assert count == 1, f"{path} has no {registry}"
  path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """The project with a toy member of each kind."""
  root = tmp_path_factory.mktemp("toys") / "project"
  root.mkdir()
  for folder in FOLDERS:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, root)
  for package, (text, registry, line, needed) in MEMBERS.items():
    folder = root / "atat_jax" / package
    (folder / "toy.py").write_text(text, encoding="utf-8")
    _register(folder / "__init__.py", registry, line)
    own = folder / "__init__.py"
    source = own.read_text(encoding="utf-8")
    own.write_text(
      re.sub(r"(?m)^from atat_jax", f"{needed}\nfrom atat_jax", source, count=1)
    )
  _register(
    root / "atat_jax" / "attacks" / "autoattack" / "versions.py",
    "VERSIONS",
    '"toy": Version(("apgd-ce",))',
  )
  return root


def _run(root: pathlib.Path, *arguments: str) -> str:
  """Runs Python in the copy and returns its output; fails if that fails."""
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
  return done.stdout + done.stderr


def test_a_run_knows_the_toys(copy, tmp_path):
  _run(
    copy,
    "main.py",
    "--config=configs/digits.py:toy",
    f"--workdir={tmp_path / 'toy'}",
    "--config.data.name=toy",
    "--config.data.validation_size=40",
    "--config.model.name=toy",
    "--config.objective.toy_weight=3.0",
    "--config.train.num_epochs=1",
    "--config.evaluation.attacks=nominal,toy2:norm=l2,autoattack-toy",
    "--config.evaluation.batch_norm=('running',)",
    "--config.evaluation.num_examples=8",
    "--config.figures.analyses=toy",
    "--config.figures.num_examples=8",
  )
  results = json.loads((tmp_path / "toy" / "results.json").read_text())
  rows = {row["attack"]: row for row in results["rows"]}
  assert set(rows) == {"nominal", "toy2:norm=l2", "autoattack-toy"}
  assert rows["toy2:norm=l2"]["num_steps"] == 2
  assert rows["nominal"]["dataset"] == "toy"
  config = results["run"]["config"]
  assert config["objective"]["toy_weight"] == 3.0
  assert config["objective"]["epsilon"] == 0.2  # as configs/digits.py has it
  page = (tmp_path / "toy" / "report.html").read_text()
  assert "Toy heading" in page and "Toy logits: toy " in page
  _run(copy, "-m", "atat_jax.report", str(tmp_path / "toy"), "--out=all")
  assert "toy" in (copy / "all.md").read_text()


LISTS = (
  *("docs", "readme", "methods", "config", "layers", "protocols"),
  "comparison",
)
"""Tests in `tests/fast` that compare a registry with something else."""

REFUSALS = ("bad_value", "takes_the_fields", "is_refused", "are_refused")
"""Tests in the same files to which a new member makes no difference."""


def test_the_contracts_cover_the_toys_and_no_list_misses_them(copy):
  """One process for both, which starts and imports once."""
  files = [f"tests/fast/test_{name}.py" for name in LISTS]
  # The contract of an attack for one norm has a toy of its own.
  lists = f"({' or '.join(LISTS)}) and not ({' or '.join(REFUSALS)})"
  chosen = f"(toy and not for_one_norm) or {lists}"
  out = _run(copy, "-m", "pytest", "-v", "tests/contract", *files, "-k", chosen)
  passed = re.findall(r"(?m)^(tests/\w+)/\w+\.py::\S+ PASSED", out)
  assert passed.count("tests/contract") >= len(MEMBERS), out[-2000:]
  assert passed.count("tests/fast") > 100, out[-2000:]
