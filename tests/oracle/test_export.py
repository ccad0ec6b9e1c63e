"""Networks written for PyTorch: bit-equal when read, the same logits there."""

import ast
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from quick import jit

from atat_jax import interop, models
from atat_jax.errors import UserError
from atat_jax.interop import torch_module

torch = pytest.importorskip(
  "torch", reason="PyTorch is the oracle of these tests"
)

OTHER = {
  "normalization": "dataset",
  "mean": (0.1, 0.2, 1 / 3),
  "std": (0.4, 0.5, 0.6),
}
VIT = {
  "image_size": 16,
  "channels": 12,
  "num_blocks": 2,
  "hidden": 10,
  "num_classes": 5,
}
XCIT = {"channels": 16, "num_blocks": 1, "hidden": 10, "num_classes": 5}
CNN = {"base_channels": 4, "num_classes": 5}
# Name, fields, height and width of the images.
CASES = {
  "the paper's": (
    "wide_resnet",
    {"depth": 14, "width": 2, "stem_channels": 4, "num_classes": 5},
    (12, 8),
  ),
  "wide, same": (
    "wide_resnet",
    {
      "depth": 10,
      "width": 1,
      "stem_channels": 4,
      "shortcut": "conv",
      "activation": "silu",
      **OTHER,
    },
    (9, 7),
  ),
  "wide, symmetric": (
    "wide_resnet",
    {
      "depth": 8,
      "width": 2,
      "stem_channels": 3,
      "strides": (2, 1, 2),
      "activation": "relu",
      "padding": "symmetric",
      "normalization": "none",
      "shortcut": "conv",
    },
    (9, 7),
  ),
  "preact": ("preact_resnet18", {"stage_sizes": (2, 1), **CNN}, (9, 7)),
  "preact, deepmind": (
    "preact_resnet18",
    {
      "stage_sizes": (1, 1),
      "family": "deepmind",
      "activated_shortcut": False,
      **CNN,
    },
    (9, 6),
  ),
  "preact, no norm": (
    "preact_resnet18",
    {"stage_sizes": (1,), "final_batch_norm": False, **CNN},
    (8, 8),
  ),
  "resnet18": ("resnet18", {"stage_sizes": (2, 1), **CNN}, (20, 24)),
  "resnet20": (
    "resnet18",
    {
      "stage_sizes": (1, 2),
      "small_images": True,
      "padded_shortcut": True,
      **CNN,
    },
    (9, 8),
  ),
  "one stage": (
    "resnet18",
    {"stage_sizes": (1,), "small_images": True, **CNN},
    (8, 8),
  ),
  "resnet50": (
    "resnet50",
    {"stage_sizes": (1, 1), "inner_width": 2, **CNN},
    (20, 24),
  ),
  "vgg16": (
    "vgg16",
    {"stage_sizes": (1, 2), "stage_channels": (4, 6), "hidden": 9},
    (20, 24),
  ),
  "vgg16_bn": (
    "vgg16_bn",
    {"stage_sizes": (2, 1), "stage_channels": (4, 6), "hidden": 9},
    (20, 24),
  ),
  "densenet121": (
    "densenet121",
    {"stage_sizes": (2, 1), "growth": 5, "bottleneck": 3, **CNN},
    (20, 24),
  ),
  "convnext": (
    "convnext",
    {"stage_sizes": (1, 1), "stage_channels": (4, 6), "num_classes": 5},
    (16, 24),
  ),
  "convnext, convstem": (
    "convnext",
    {
      "stage_sizes": (1, 1),
      "stage_channels": (8, 6),
      "conv_stem": (4, 8),
      "num_classes": 5,
    },
    (16, 16),
  ),
  "vit": ("vit", {"patch_size": 4, "num_heads": 3, **VIT}, (16, 16)),
  "vit, convstem": (
    "vit",
    {"patch_size": 4, "num_heads": 2, "conv_stem": (4, 6), **VIT},
    (16, 16),
  ),
  "xcit": (
    "xcit",
    {"patch_size": 4, "num_heads": 2, "num_class_blocks": 2, **XCIT},
    (16, 24),
  ),
  "xcit, of the token alone": (
    "xcit",
    {
      "patch_size": 2,
      "stem_convolutions": 3,
      "num_heads": 4,
      "num_class_blocks": 1,
      "tokens_norm": False,
      **XCIT,
    },
    (8, 8),
  ),
}
QUICK = ("the paper's",)


def randomized(model, images):
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key in ("var", "scale"):
      return jax.numpy.asarray(rng.uniform(0.5, 1.5, leaf.shape), np.float32)
    return jax.numpy.asarray(rng.normal(size=leaf.shape) / 3, np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def made(case, channels=3):
  name, fields, side = CASES[case]
  model = models.create(name, **fields)
  rng = np.random.default_rng(1)
  images = rng.uniform(size=(2, *side, channels)).astype(np.float32)
  return model, randomized(model, images), images


def imported(path):
  """The only class in a file that imports nothing but PyTorch."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  imports = [
    ast.unparse(node).split()[1].split(".")[0]
    for node in ast.walk(tree)
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]
  classes = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
  assert set(imports) == {"torch"} and classes == ["Network"]
  spec = importlib.util.spec_from_file_location("exported", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.Network()


def pytorchs(saved):
  network = imported(saved.module)
  network.load_state_dict(  # strictly: every tensor has its place
    {
      name: torch.tensor(x)
      for name, x in safetensors.numpy.load_file(saved.weights).items()
    }
  )
  return network.eval()


@pytest.mark.parametrize(
  "case",
  [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES],
)
def test_pytorch_computes_the_same_logits_and_what_is_read_is_equal(
  case, tmp_path
):
  model, variables, images = made(case)
  saved = interop.save(tmp_path / "net.safetensors", model, variables)
  loaded = interop.load(saved.weights)
  assert loaded.model == model and loaded.name == CASES[case][0]
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
  assert "fields as atat_jax wrote them" in loaded.told
  with torch.no_grad():
    found = pytorchs(saved)(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
  expected = jit(lambda c, x: c(x))(loaded.classifier, images)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A saved network with the names and the fields of TRADES."""
  model, variables, _ = made("wide, symmetric")
  model = model.clone(
    strides=(1, 2, 2), depth=10, batch_norm_epsilon=1e-5, **OTHER
  )
  path = tmp_path_factory.mktemp("export") / "net-1.safetensors"
  return interop.save(path, model, variables), model, variables


@pytest.fixture
def usual(written, tmp_path):
  """The saved network in a folder of its own."""
  saved, model, variables = written
  copies = (shutil.copy(path, tmp_path / path.name) for path in saved)
  return type(saved)(*copies), model, variables


def test_weights_that_pytorch_saves_again_keep_their_normalisation(
  usual, tmp_path
):
  saved, model, variables = usual
  assert saved.module.name == "net_1.py"  # a name that can be imported
  path = tmp_path / "again.pth"
  torch.save(pytorchs(saved).state_dict(), path)
  loaded = interop.load(path)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
  np.testing.assert_allclose(loaded.model.mean, model.mean, rtol=1e-6)
  assert loaded.model.clone(mean=model.mean) == model


def test_fields_precede_the_description_unless_the_weights_show_others(usual):
  saved, model, _ = usual
  loaded = interop.load(saved.weights, normalization="none")
  assert loaded.model == model.clone(normalization="none")
  assert "normalisation none (given)" in loaded.told
  with pytest.raises(UserError, match="num_classes: 7; allowed: what the file"):
    interop.load(saved.weights, num_classes=7)


def test_a_network_of_ones_own_choice_must_be_the_described_one(usual):
  saved, model, variables = usual
  found = interop.load_torch(saved.weights, model)
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  other = model.clone(activation="silu")
  with pytest.raises(UserError, match="activation='silu', not 'relu'; allowed"):
    interop.load_torch(saved.weights, other)
  assert interop.load_torch(saved.weights, other, check_fields=False)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"depth": 9_998}, "other numbers of layers"),
    ({"width": 3}, "of different networks: of another shape"),
    ({"stem_channels": 10**9}, "stem_channels: 1000000000; allowed"),
    ({"shortcut": "pad"}, "of different networks: not of this network"),
    ({"activation": {"silu": 1}}, "'activation': {'silu': 1}; allowed"),
    ({"strides": [[1], 2, 2]}, "'strides': "),
    ({"dtype": "float64"}, "the description: 'dtype'"),
    ({"nothing": 1}, "field of model 'wide_resnet': 'nothing'"),
    ({"mean": "abc"}, "mean"),
    ({"std": [0.1]}, "std"),
  ],
)
def test_a_description_of_another_network_is_refused(change, said, usual):
  refused(usual, lambda found: found["fields"].update(change), said)


def refused(usual, change, said):
  saved, _, _ = usual
  tensors = safetensors.numpy.load_file(saved.weights)
  with safetensors.safe_open(saved.weights, "numpy") as file:
    found = json.loads(file.metadata()["atat_jax"])
  text = change(found) or json.dumps(found)
  safetensors.numpy.save_file(tensors, saved.weights, {"atat_jax": text})
  with pytest.raises(UserError) as error:
    interop.load(saved.weights)
  message = str(error.value)
  assert message.startswith(f"{saved.weights}: ") and said in message
  assert message.isprintable() and len(message) < 900


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda x: x.update(name="vit"), "field of model 'vit': 'depth'"),
    (lambda x: x.update(name="x"), "model: 'x'; allowed: convnext"),
    (lambda x: x.update(name=["x"]), "a name and fields"),
    (lambda x: x.update(more=1), "a name and fields"),
    (lambda x: "{", "not valid JSON"),
    (lambda x: "[" * 10_000, "not valid JSON"),
  ],
)
def test_a_text_that_is_no_description_is_refused(change, said, usual):
  refused(usual, change, said)


def test_a_name_of_a_file_is_no_code(tmp_path):
  model, variables, _ = made("one stage")
  path = tmp_path / 'x"""\nraise SystemExit\n""".safetensors'
  saved = interop.save(path, model, variables)
  assert saved.module.name == "x____raise_SystemExit____.py"
  pytorchs(saved)


def test_a_module_hides_no_other_and_can_be_imported():
  names = {"torch", "random", "class", "7", "a-b", "net"}
  found = {name: torch_module.module_name(name) for name in names}
  assert found == {
    **{name: f"_{name}" for name in ("torch", "random", "class", "7")},
    "a-b": "a_b",
    "net": "net",
  }


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
  model, variables, _ = made("one stage")
  code = tmp_path / "train.py"
  code.write_text("print('mine')\n", encoding="utf-8")

  class Own(type(model)):
    """A network that computes something else, possibly."""

  half = jax.tree.map(lambda x: x.astype("bfloat16"), variables)
  lost = jax.tree.map(lambda x: x * float("nan"), variables)
  taken = tmp_path / "taken-x.safetensors"
  taken.touch()
  for path, network, arrays, said in (
    ("train.safetensors", model, variables, "train.py would be overwritten"),
    ("taken_x.safetensors", model, variables, "module of taken-x.safetensors"),
    ("taken-x.safetensors", model, variables, "x.safetensors would be overw"),
    ("net.pth", model, variables, r"a name that ends in .safetensors"),
    ("net.safetensors", Own(), variables, "model: Own; allowed: wide_resnet"),
    ("net.safetensors", model, half, "has dtype bfloat16; allowed: float32"),
    ("net.safetensors", model, lost, "mean has values that are not finite"),
    ("net.safetensors", model, {}, "variables: no "),
    ("net.safetensors", torch.nn.ReLU(), variables, "model: "),
  ):
    with pytest.raises(UserError, match=said):
      interop.save(tmp_path / path, network, arrays)
  taken.unlink()
  assert [x.name for x in tmp_path.iterdir()] == ["train.py"]
  assert code.read_text(encoding="utf-8") == "print('mine')\n"
