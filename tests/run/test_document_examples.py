"""Every block of Python in the documents runs as it is written.

The blocks of a page run one after the other, in a folder with the small runs and
files that pages name. Names that a page takes from its reader are in `GIVEN`.
"""

import contextlib
import io
import pathlib
import re
import shutil
import sys
import types

import documents
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_names
from flax import linen as nn
from flax import nnx

from atat_jax import models
from atat_jax.cli import importing

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGES = {
  name: blocks
  for name in documents.DOCUMENTS
  if (blocks := documents.blocks(name, "python"))
}

# Pages that compile many programs, or attack in hundreds of steps.
SLOW = {
  f"docs/{x}.md" for x in "autoattack evaluating explaining networks".split()
}


# --- Files that pages name ---------------------------------------------------


def _write_runs(make_variables, names):
  """Writes a small network for digits as the checkpoint of runs."""
  model = models.create("wide_resnet", depth=8, width=1, strides=(1, 2, 2))
  shown = types.SimpleNamespace(
    name="wide_resnet",
    model=model,
    variables=make_variables(model, jnp.zeros((1, 8, 8, 1))),
    image_side=8,
    num_channels=1,
  )
  first, *others = (pathlib.Path("runs", name) for name in names)
  importing.write(shown, first)
  for other in others:
    shutil.copytree(first, other)


def _write_weights(torch):
  """Writes weights of PyTorch; returns images, and the classes that they get."""
  import torch_layouts

  torch.manual_seed(0)
  network = torch_layouts.TradesWideResNet(1, 1, 4, 10).eval()
  torch.save(network.state_dict(), "weights.pth")
  torch.save(
    {"conv1.weight": torch.zeros(4, 3, 5, 5), "fc.weight": torch.zeros(10, 4)},
    "mine.pth",
  )
  images = np.random.default_rng(0).uniform(size=(64, 8, 8, 3))
  images = images.astype(np.float32)
  with torch.no_grad():
    logits = network(torch.tensor(images).permute(0, 3, 1, 2))
  return images, logits.argmax(-1).numpy()


def _write_tensorflow(patch):
  """Writes the checkpoints of the paper's code that the documents load."""
  contents = tensorflow_names.stand_in(patch, [])
  teacher, student = (
    tensorflow_names.variables(f"{scope}/") for scope in ("teacher", "student")
  )
  for prefix, arrays in (
    ("models/checkpoint-70000", tensorflow_names.variables()),
    ("both/checkpoint-1", teacher | student),
  ):
    tensorflow_names.store(contents, pathlib.Path(prefix), arrays)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_variables):
  """Makes the files in a folder of their own; yields images and labels."""
  torch = pytest.importorskip("torch", reason="it writes weights.pth")
  folder = tmp_path_factory.mktemp("documents")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    _write_runs(make_variables, ("digits", "at", "atat"))
    _write_tensorflow(patch)
    yield _write_weights(torch)
    for name in ("exported", "exported.atat"):
      sys.modules.pop(name, None)


# --- Names that pages take from their reader ---------------------------------


class _Linen(nn.Module):
  """A network that returns its logits among other things."""

  @nn.compact
  def __call__(self, images):
    return nn.Dense(10)(nn.Conv(4, (3, 3))(images).mean((1, 2))), "more"


class _Nnx(nnx.Module):
  """A network of nnx."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.head = nnx.Linear(4, 10, rngs=rngs)

  def __call__(self, images):
    return self.head(self.conv(images).mean((1, 2)))


def _equinox():
  """Makes a network of Equinox, which is called on one image [C, H, W]."""
  equinox = pytest.importorskip("equinox", reason="a page adapts its modules")
  keys = jax.random.split(jax.random.key(0))
  return equinox.nn.Sequential(
    [
      equinox.nn.Conv2d(3, 4, 3, key=keys[0]),
      equinox.nn.Lambda(lambda x: x.mean((1, 2))),
      equinox.nn.Linear(4, 10, key=keys[1]),
    ]
  )


def _networks(images, labels):
  linen = _Linen()
  return {
    "images": images,
    "labels": labels,
    "nnx_module": _Nnx(nnx.Rngs(0)),
    "equinox_module": _equinox(),
    "linen_module": linen,
    "its_variables": linen.init(jax.random.key(0), images),
    "features": lambda weights, x: x * weights["scale"],
    "head": lambda weights, x: x.mean((1, 2)) @ weights["out"],
    "weights": {"scale": jnp.ones(3), "out": jnp.eye(3, 10)},
  }


_read: dict[str, dict] = {}


def _readme(*_):
  """Names of the README, whose classifier is attacked again."""
  kept = ("jax", "attacks", "classifier", "images", "labels")
  return {name: _names("README.md")[name] for name in kept}


GIVEN = {
  "docs/autoattack.md": _readme,
  "docs/evaluating.md": lambda *_: {
    "predict": lambda weights, x: x.reshape(len(x), -1) @ weights,
    "weights": jnp.ones((64, 10)),
  },
  "docs/networks.md": _networks,
}


def _names(page, given=()):
  """Runs the blocks of a page unless they have been; returns its names."""
  if page not in _read:
    # A class is looked up in its module by those that print or copy it.
    names = {"__name__": "__main__", **dict(given)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      for block in PAGES[page]:
        # Lines are counted as in the document.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, page, "exec"), names)
    _read[page] = names | {"printed": printed.getvalue()}
  return _read[page]


# --- Tests -------------------------------------------------------------------


@pytest.mark.parametrize(
  "page",
  [
    pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
    for page in PAGES
  ],
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, place):
  given = GIVEN.get(page, lambda *_: {})(*place)
  _names(page, given)
  text = "\n".join(block.code for block in PAGES[page])
  idle = [name for name in given if not re.search(rf"\b{name}\b", text)]
  assert not idle, f"no block of {page} needs {idle}"


def test_no_block_looks_like_python_and_is_not_run():
  found = []
  for name in documents.DOCUMENTS:
    for block in [b for x in ("", "text") for b in documents.blocks(name, x)]:
      if re.search(r"^(from|import) \w|^\w+ = \w+[.(]", block.code, re.M):
        found.append(f"{name}, line {block.line}")
  assert not found


def test_the_readme_example_attacks_a_model():
  names = _names("README.md")
  assert len(PAGES["README.md"]) == 1
  images, adversarial = names["images"], names["adversarial"]
  logits = images.reshape(len(images), -1) @ names["params"]["kernel"]
  np.testing.assert_array_equal(logits.argmax(-1), names["labels"])
  assert np.abs(adversarial - images).max() <= 8 / 255 + 1e-6
  attacked = adversarial.reshape(len(images), -1) @ names["params"]["kernel"]
  fooled = attacked.argmax(-1) != names["labels"]
  assert fooled.any()
  assert names["result"].robust.sum() <= (~fooled).sum()
  assert "Robust accuracy" in names["printed"]
