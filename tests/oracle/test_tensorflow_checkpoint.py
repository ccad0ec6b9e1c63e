"""Checkpoints of the paper's code: TensorFlow's names, its formula in float64.

TensorFlow itself writes and reads one where it is installed; elsewhere a module
that has its two functions stands in.
"""

import sys

import numpy as np
import pytest
import tensorflow_names
from quick import jit
from tensorflow_names import CLASSES, UNITS, WIDTH, variables

from atat_jax import interop
from atat_jax.errors import UserError

torch = pytest.importorskip(
  "torch", reason="PyTorch is the oracle of these tests"
)
from torch.nn import functional  # noqa: E402

SLOTS = {
  "global_step": np.int64(7),
  "beta1_power": np.float32(0.9),
  "logit/DW/Momentum": np.zeros((32, CLASSES), np.float32),
  "unit_last/BatchNorm/gamma/Adam_1": np.zeros(3, np.float32),
}


def formula(arrays, images):
  """Logits in float64, written from the description of the released code."""
  arrays = {k: torch.tensor(v, dtype=torch.float64) for k, v in arrays.items()}
  levels = 255 * torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
  standardized = []
  for image in levels:  # tf.image.per_image_standardization
    deviation = max(image.std(correction=0), 1 / np.sqrt(image.numel()))
    standardized.append((image - image.mean()) / deviation)

  def conv(x, name, stride=1):
    kernel = arrays[name].permute(3, 2, 0, 1)
    total = [
      max((-(-n // stride) - 1) * stride + 3 - n, 0) for n in x.shape[2:]
    ]
    (top, left), (bottom, right) = zip(
      *((n // 2, n - n // 2) for n in total), strict=True
    )
    return functional.conv2d(
      functional.pad(x, (left, right, top, bottom)), kernel, stride=stride
    )

  def norm_act(x, name):
    gamma, beta, mean, variance = (
      arrays[f"{name}/BatchNorm/{part}"][:, None, None]
      for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    x = gamma * (x - mean) / torch.sqrt(variance + 0.001) + beta
    return torch.where(x < 0, 0.1 * x, x)

  x = conv(torch.stack(standardized), "input/init_conv/DW")
  for group, stride in ((1, 1), (2, 2), (3, 2)):
    for unit in range(UNITS):
      name = f"unit_{group}_{unit}"
      if (group, unit) == (1, 0):
        h = shortcut = norm_act(x, f"{name}/shared_activation")
      else:
        h, shortcut = norm_act(x, f"{name}/residual_only_activation"), x
      h = conv(h, f"{name}/sub1/conv1/DW", 1 if unit else stride)
      h = conv(norm_act(h, f"{name}/sub2"), f"{name}/sub2/conv2/DW")
      if unit == 0:
        shortcut = functional.avg_pool2d(shortcut, stride)
        side = (h.shape[1] - shortcut.shape[1]) // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, side, side))
      x = h + shortcut
  x = norm_act(x, "unit_last").mean((2, 3))
  return (x @ arrays["logit/DW"] + arrays["logit/biases"]).numpy()


@pytest.fixture
def stored(monkeypatch, tmp_path):
  """Puts arrays where a checkpoint's are read; returns the prefix."""
  asked = []
  contents = tensorflow_names.stand_in(monkeypatch, asked)

  def store(content, name="checkpoint-70000"):
    return tensorflow_names.store(contents, tmp_path / name, content)

  store.asked = asked
  return store


def compare(loaded, arrays):
  images = np.random.default_rng(1).uniform(size=(3, 12, 12, 3))
  images = images.astype(np.float32)
  images[2] *= 1e-4  # the floor of the deviation counts
  expected = formula(arrays, images)
  logits = jit(lambda c, x: c(x))(loaded.classifier, images)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, atol=1e-5 * scale)


def test_logits_equal_the_formula_of_the_released_code(stored):
  arrays = variables()
  prefix = stored(arrays | SLOTS)
  loaded = interop.load(prefix)
  compare(loaded, arrays)
  model = loaded.model
  assert (model.depth, model.width, model.num_classes) == (14, WIDTH, CLASSES)
  assert loaded.told.startswith(
    "checkpoint-70000: Wide ResNet of the paper's code and of Madry et al. in"
    " TensorFlow, 14-2, 5 classes (wide_resnet); normalisation image by image"
  )
  assert "shortcut='pad', activation='leaky_relu'" in loaded.told


def test_a_checkpoint_is_found_by_folder_prefix_or_file(stored, tmp_path):
  prefix = stored(variables())
  for path in (
    tmp_path,
    prefix,
    f"{prefix}.index",
    f"{prefix}.meta",
    f"{prefix}.data-00000-of-00001",
  ):
    assert "14-2, 5 classes" in interop.load(path).told
    assert stored.asked[-1] == str(prefix)
  stored(variables(), "checkpoint-800")
  with pytest.raises(
    UserError, match=r"several TensorFlow checkpoints, .*-800"
  ):
    interop.load(tmp_path)
  newest = 'model_checkpoint_path: "/gone/dir/checkpoint-70000"\n'
  (tmp_path / "checkpoint").write_text(newest, encoding="utf-8")
  assert "; checkpoint checkpoint-70000; " in interop.load(tmp_path).told
  assert stored.asked[-1] == str(prefix)


def test_paths_that_are_no_checkpoint_stay_what_they_are(tmp_path):
  for name in (".index", "x.index", "n" * 250, ".", "x.data-00000-of-00001"):
    with pytest.raises(UserError, match=r"No such file|directory"):
      interop.load(tmp_path / name)


def test_of_two_networks_in_a_checkpoint_entry_chooses(stored):
  arrays = variables("teacher/")
  double = {k.replace("teacher", "student"): 2 * x for k, x in arrays.items()}
  prefix = stored(arrays | double)
  with pytest.raises(UserError, match="several networks, student, teacher;"):
    interop.load(prefix)
  with pytest.raises(UserError, match="entry: 'x'; allowed: student, teacher"):
    interop.load(prefix, entry="x")
  loaded = interop.load(prefix, entry="teacher")
  np.testing.assert_array_equal(
    loaded.variables["params"]["head"]["kernel"], arrays["teacher/logit/DW"]
  )


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda x: x.pop("input/init_conv/DW"), "no variable input/init_conv/DW"),
    (
      lambda x: x.pop("unit_2_1/sub1/conv1/DW"),
      "missing: block2.layer.1.conv1",
    ),
    (
      lambda x: x.update({"unit_1_0/sub3/DW": np.zeros(3)}),
      "not of this network: unit_1_0/sub3/DW",
    ),
    (
      lambda x: x.update(
        {
          f"unit_1_0/{kind}_activation/BatchNorm/gamma": np.ones(16, "f4")
          for kind in ("shared", "residual_only")
        }
      ),
      "gamma': a second variable for block1.layer.0.bn1.weight",
    ),
    (lambda x: x.pop("logit/DW"), "nearest is Wide ResNet of the paper's code"),
  ],
)
def test_other_checkpoints_are_refused(change, said, stored):
  arrays = variables()
  change(arrays)
  prefix = stored(arrays)
  with pytest.raises(UserError) as error:
    interop.load(prefix)
  text = str(error.value)
  assert text.startswith(f"{prefix}: ") and said in text and "\n" not in text


def test_without_tensorflow_the_remedy_is_named(stored, monkeypatch):
  prefix = stored(variables())
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(UserError, match=r"pip install 'atat_jax\[tensorflow\]'"):
    interop.load(prefix)


def test_tensorflow_writes_and_the_network_is_read(tmp_path):
  tf = pytest.importorskip("tensorflow", reason="it writes the checkpoint")
  arrays = variables()
  v1 = tf.compat.v1
  with v1.Graph().as_default(), v1.Session() as session:
    made = [
      v1.get_variable(name, initializer=x)
      for name, x in (arrays | SLOTS).items()
    ]
    session.run(v1.global_variables_initializer())
    saver = v1.train.Saver(made)
    prefix = saver.save(session, str(tmp_path / "checkpoint"), global_step=9)
  compare(interop.load(prefix), arrays)
  compare(interop.load(tmp_path), arrays)
  index = tmp_path / "checkpoint-9.index"
  index.write_bytes(index.read_bytes()[:40])
  with pytest.raises(UserError, match=r"no TensorFlow checkpoint \("):
    interop.load(prefix)
