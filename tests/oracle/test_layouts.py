"""Weights of published code: recognised, told, and PyTorch's logits to 1e-4."""

import argparse
import collections
import re

import numpy as np
import pytest
import tiny
from PIL import Image
from quick import jit

from atat_jax import data, explain, interop, models
from atat_jax.config import make_plan
from atat_jax.errors import UserError

torch = pytest.importorskip(
  "torch", reason="PyTorch is the oracle of these tests"
)
import torch_layouts as layouts  # noqa: E402
import torch_zoo  # noqa: E402

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR10_OTHER = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The network in PyTorch, side of an image, normalisation that its code has,
# name of ours, and fields that only the user can know.
CASES = {
  "trades": (
    lambda: layouts.TradesWideResNet(2, 2, 4, 5),
    8,
    None,
    "wide_resnet",
    {},
  ),
  "deepmind": (
    lambda: layouts.DeepMindWideResNet(2, 2, 4, 10),
    8,
    CIFAR10,
    "wide_resnet",
    {},
  ),
  "deepmind preact": (
    lambda: layouts.DeepMindPreActResNet((1, 2), 4, 100),
    8,
    CIFAR100,
    "preact_resnet18",
    {},
  ),
  "rice": (
    lambda: layouts.PreActResNet((2, 1), 4, 10, activated=True),
    8,
    CIFAR10,
    "preact_resnet18",
    {"activated_shortcut": True},
  ),
  "andriushchenko": (
    lambda: layouts.PreActResNet((2, 1), 4, 10, activated=False, final=False),
    8,
    None,
    "preact_resnet18",
    {"activated_shortcut": False, "normalization": "none"},
  ),
  "resnet18 for cifar": (
    lambda: layouts.ResNet(
      (1, 1, 1, 2), 4, 10, head="linear", shortcut="shortcut"
    ),
    8,
    None,
    "resnet18",
    {},
  ),
  "resnet50 for cifar": (
    lambda: layouts.ResNet(
      (1, 2, 1, 1), 4, 10, head="linear", shortcut="shortcut", inner=4
    ),
    8,
    None,
    "resnet50",
    {},
  ),
  "resnet20, option a": (
    lambda: layouts.ResNet((2, 1, 1), 4, 10, head="linear", shortcut=None),
    8,
    IMAGENET,
    "resnet18",
    {},
  ),
  "resnet20, convolutions": (
    lambda: layouts.ResNet((1, 1, 2), 4, 10, head="fc", shortcut="downsample"),
    8,
    CIFAR10_OTHER,
    "resnet18",
    {},
  ),
  "wide resnet50-2": (
    lambda: layouts.ResNet(
      (1, 2), 4, 7, head="fc", shortcut="downsample", large=True, inner=8
    ),
    32,
    IMAGENET,
    "resnet50",
    {},
  ),
  "convnext": (
    lambda: layouts.ConvNeXt((1, 2), (4, 6), 7),
    16,
    IMAGENET,
    "convnext",
    {},
  ),
  "convnext with a convstem": (
    lambda: layouts.ConvNeXt((1, 1), (8, 6), 7, (4, 6, 8)),
    16,
    None,
    "convnext",
    {},
  ),
  "vit": (
    lambda: layouts.ViT(16, 8, 128, 2, 7),
    16,
    IMAGENET,
    "vit",
    {},
  ),
  "vit with a convstem": (
    lambda: layouts.ViT(16, 8, 128, 1, 7, (4, 6, 8)),
    16,
    None,
    "vit",
    {},
  ),
  "xcit for cifar": (
    lambda: layouts.XCiT(4, 32, 1, 4, 10),
    16,
    CIFAR10,
    "xcit",
    {},
  ),
  "xcit": (
    lambda: layouts.XCiT(16, 144, 1, 4, 7),
    32,
    IMAGENET,
    "xcit",
    {},
  ),
}
QUICK = set(CASES) - {
  "andriushchenko",
  "resnet20, convolutions",
  "wide resnet50-2",
  "resnet50 for cifar",
  "convnext with a convstem",
  "vit with a convstem",
  "xcit",
}


def normalized(images, values):
  x = torch.tensor(images).permute(0, 3, 1, 2)
  if values is None:
    return x
  mean, std = (torch.tensor(v)[:, None, None] for v in values)
  return (x - mean) / std


def images_of(side):
  shape = (2, side, side, 3)
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def compare(loaded, network, values, side, tolerance=1e-4):
  images = images_of(side)
  with torch.no_grad():
    expected = network(normalized(images, values)).numpy()
  logits = jit(lambda c, x: c(x))(loaded.classifier, images)
  scale = np.abs(expected).max()
  assert scale > 1e-2
  np.testing.assert_allclose(logits, expected, atol=tolerance * scale)


def one_line(text):
  assert text.isprintable() and len(text) < 900, text
  return text


def refusal(path, **arguments):
  with pytest.raises(UserError) as error:
    interop.load(path, **arguments)
  text = one_line(str(error.value))
  assert text.startswith(f"{path}: "), text
  return text


@pytest.fixture
def path(tmp_path):
  return tmp_path / "weights.pth"


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
  ],
)
def test_logits_equal_pytorchs(name, path):
  make, side, values, ours, fields = CASES[name]
  network = torch_zoo.randomize(make())
  torch.save(network.state_dict(), path)
  loaded = interop.load(path, **fields)
  assert loaded.name == ours
  assert (loaded.model.normalization == "dataset") == (values is not None)
  if values is not None:
    assert (loaded.model.mean, loaded.model.std) == values
  compare(loaded, network, values, side)
  one_line(loaded.told)
  assert loaded.layout in loaded.told and loaded.normalization in loaded.told


# The networks of configs/imagenet.py, as wide and deep as they are there.
IMAGENETS = {
  "resnet50": lambda: layouts.ResNet(
    (3, 4, 6, 3),
    64,
    1000,
    head="fc",
    shortcut="downsample",
    large=True,
    inner=64,
  ),
  "convnext_t": lambda: layouts.ConvNeXt(
    (3, 3, 9, 3), (96, 192, 384, 768), 1000, (48, 96)
  ),
  "vit_s": lambda: layouts.ViT(224, 16, 384, 12, 1000, (48, 96, 192, 384)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENETS)
def test_networks_of_the_imagenet_configuration_are_the_published_ones(
  name, path, monkeypatch
):
  spec = data.DatasetSpec("i", 1000, (224, 224, 3), ("",) * 1000, *IMAGENET)
  monkeypatch.setattr(data, "spec", lambda *_, **__: spec)
  config = tiny.load_config("imagenet", f"at,{name}")
  config.model.dtype = "float32"
  model = make_plan(config).model
  network = torch_zoo.randomize(IMAGENETS[name]())
  torch.save(network.state_dict(), path)
  # The authors of those with a stem of convolutions normalise nothing.
  plain = name != "resnet50"
  assert model.normalization == ("none" if plain else "dataset")
  loaded = interop.load(path, normalization=model.normalization)
  assert type(loaded.model) is type(model)
  # The configuration's network takes the weights; the file shows no mean.
  values = None if plain else IMAGENET
  assert plain or (model.mean, model.std) == IMAGENET
  classifier = models.classifier(model, loaded.variables)
  images = images_of(224)
  with torch.no_grad():
    expected = network(normalized(images, values)).numpy()
  logits = jit(lambda c, x: c(x))(classifier, images)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def trades():
  return torch_zoo.randomize(layouts.TradesWideResNet(1, 2, 4, 5))


@pytest.fixture(scope="module")
def state(trades):
  return dict(trades.state_dict())


def same(loaded, path_or_loaded):
  import jax

  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables, path_or_loaded.variables
  )


@pytest.fixture(scope="module")
def plain(state, tmp_path_factory):
  path = tmp_path_factory.mktemp("layouts") / "plain.pth"
  torch.save(state, path)
  return interop.load(path)


def prefixed(state, prefix):
  return {f"{prefix}{name}": x for name, x in state.items()}


BUFFERS = {
  "mu": torch.tensor([0.1, 0.2, 0.3])[None, :, None, None],
  "sigma": torch.tensor([0.4, 0.5, 0.6])[None, :, None, None],
}
NORMALIZED = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
RENAMED = {
  "normalize.mean": BUFFERS["mu"],
  "normalize.std": BUFFERS["sigma"],
}


@pytest.mark.parametrize(
  ("wrap", "values"),
  [
    (lambda s: prefixed(s, "module."), None),
    (lambda s: prefixed(s, "module._orig_mod.model."), None),
    (lambda s: {"net": prefixed(s, "_orig_mod.")}, None),
    (lambda s: {"model": {"state_dict": prefixed(s, "my.own.")}}, None),
    (lambda s: s | {"n_averaged": torch.tensor(3)}, None),
    (lambda s: s | {"again.1.weight": s["conv1.weight"]}, None),
    (lambda s: s | BUFFERS, NORMALIZED),
    (lambda s: prefixed(s | BUFFERS, "module."), NORMALIZED),
    (lambda s: prefixed(s, "model.") | RENAMED, NORMALIZED),
    (
      lambda s: (
        prefixed(s, "1.")
        | {"0.mean": BUFFERS["mu"] * 255, "0.std": BUFFERS["sigma"] * 255}
      ),
      NORMALIZED,
    ),
    (
      lambda s: {
        "state_dict": prefixed(s, "module.model.")
        | prefixed(s, "module.attacker.model.")
        | {
          "module.normalizer.new_mean": BUFFERS["mu"],
          "module.normalizer.new_std": BUFFERS["sigma"],
          "module.attacker.normalize.new_mean": BUFFERS["mu"],
          "module.attacker.normalize.new_std": BUFFERS["sigma"],
        }
      },
      NORMALIZED,
    ),
    (
      lambda s: {
        "state_dict": s,
        "accuracy": np.float64(0.5),
        "best": torch.tensor(0.5),
        "shape": torch.Size([3]),
        "args": argparse.Namespace(depth=34),
        "history": collections.defaultdict(list, loss=[np.float32(1)]),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "list": [torch.zeros(2)],
      },
      None,
    ),
  ],
)
@pytest.mark.parametrize(
  "legacy",
  [False, pytest.param(True, marks=pytest.mark.slow)],
  ids=["zip", "legacy"],
)
def test_wrappers_are_taken_off(wrap, values, legacy, state, plain, path):
  torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
  loaded = interop.load(path)
  same(loaded, plain)
  if values is None:
    assert loaded.model == plain.model
  else:
    found = loaded.model.mean, loaded.model.std
    np.testing.assert_allclose(found, values, rtol=1e-6)
    assert loaded.model.normalization == "dataset"
    assert "(the file's)" in loaded.told


AVERAGED = [
  (lambda raw, mean: {"model": raw, "model_ema": mean}, "model_ema", "model"),
  (
    lambda raw, mean: {"state_dict": raw, "ema": prefixed(mean, "module.")},
    "ema",
    "state_dict",
  ),
  (
    lambda raw, mean: {
      "unaveraged_model_state_dict": raw,
      "model_state_dict": mean,
    },
    "model_state_dict",
    "unaveraged_model_state_dict",
  ),
  (
    lambda raw, mean: (
      prefixed(raw, "online_model.") | prefixed(mean, "ema_model.")
    ),
    "ema_model",
    None,
  ),
]


@pytest.mark.parametrize(("save", "mean", "raw"), AVERAGED)
def test_which_of_raw_and_averaged_weights_is_told(
  save, mean, raw, state, plain, path
):
  half = {k: v / 2 if v.is_floating_point() else v for k, v in state.items()}
  torch.save(save(half, state), path)
  loaded = interop.load(path)
  same(loaded, plain)
  assert f"averaged weights {mean}, not " in loaded.told
  if raw:
    other = interop.load(path, entry=raw)
    assert f"raw weights {raw}, not {mean}" in other.told
    kernels = [x.variables["params"]["head"]["kernel"] for x in (other, loaded)]
    np.testing.assert_array_equal(2 * kernels[0], kernels[1])
    with pytest.raises(UserError, match="entry: 'best'; allowed: "):
      interop.load(path, entry="best")


def test_several_state_dicts_of_equal_right_are_refused(state, path):
  torch.save({"last": state, "best": state, "epoch": 3}, path)
  torch.save({"last": state, "best": dict(state), "epoch": 3}, path)
  assert "entry: several state dicts, last, best" in refusal(path)
  assert interop.load(path, entry="last").name == "wide_resnet"


def test_what_names_do_not_show_is_set_and_told(state, plain):
  model = plain.model
  assert model.shortcut == "conv" and model.activation == "relu"
  assert model.padding == "symmetric" and model.normalization == "none"
  assert model.batch_norm_epsilon == 1e-5
  told = plain.told
  assert told.startswith("plain.pth: Wide ResNet of TRADES, 10-2, 5 classes")
  assert "normalisation none (assumed)" in told
  for field in ("activation='relu'", "padding='symmetric'", "shortcut='conv'"):
    assert field in told, told


def test_networks_that_names_do_not_tell_apart_are_refused(path):
  network = layouts.PreActResNet((1, 1), 4, 3, activated=False)
  torch.save(network.state_dict(), path)
  text = refusal(path)
  assert "activated_shortcut=True or False, or images and labels" in text
  found = interop.load(path, activated_shortcut=False)
  assert not found.model.activated_shortcut


def test_fields_that_the_layouts_code_does_not_have_are_refused(state, path):
  torch.save(state, path)
  fields = dict(depth=10, width=2, stem_channels=4, num_classes=5)
  model = models.create("wide_resnet", shortcut="conv", **fields)
  with pytest.raises(UserError) as error:
    interop.load_torch(path, model)
  text = one_line(str(error.value))
  assert "padding='same'" in text and "padding='symmetric'" in text
  assert "batch_norm_epsilon=0.001" in text and "check_fields=False" in text
  assert interop.load_torch(path, model, check_fields=False)
  torch.save(state | BUFFERS, path)
  with pytest.raises(UserError, match="normalization: 'per_image'; allowed"):
    interop.load_torch(path, model, check_fields=False)


def test_facebooks_names_of_a_convnext_are_known(path, tmp_path):
  state = torch_zoo.randomize(CASES["convnext"][0]()).state_dict()
  torch.save(state, path)
  other = tmp_path / "facebook.pth"
  torch.save({"model": layouts.facebook_names(state)}, other)
  timm, facebook = interop.load(path), interop.load(other)
  assert timm.model == facebook.model and timm.layout != facebook.layout
  same(timm, facebook)


def test_old_names_of_an_xcit_are_known(path, tmp_path):
  state = torch_zoo.randomize(CASES["xcit for cifar"][0]()).state_dict()
  torch.save(state, path)
  old = tmp_path / "old.pth"
  renamed = {k.replace("pos_embed", "pos_embeder"): v for k, v in state.items()}
  torch.save(renamed, old)
  same(interop.load(path), interop.load(old))


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "densenet121"])
def test_other_networks_of_torchvision_are_recognised(name, path):
  fields = {
    "vgg16": dict(stage_sizes=(1, 2), stage_channels=(4, 6), hidden=9),
    "vgg16_bn": dict(stage_sizes=(2, 1), stage_channels=(4, 6), hidden=9),
    "densenet121": dict(
      stage_sizes=(2, 1), growth=5, bottleneck=3, base_channels=6
    ),
  }[name]
  model = models.create(name, num_classes=5, **fields)
  torch.save(torch_zoo.TWINS[name](model).state_dict(), path)
  loaded = interop.load(path)
  assert loaded.name == name and loaded.model == model


@pytest.mark.parametrize(
  ("units", "width"), [(4, 10), (5, 10), (5, 20), (11, 16), (15, 16)]
)
def test_depth_and_width_of_the_usual_wide_resnets_are_read(units, width):
  found = interop.layouts.LAYOUTS
  for layout, make in zip(
    found[:2],
    (layouts.TradesWideResNet, layouts.DeepMindWideResNet),
    strict=True,
  ):
    with torch.device("meta"):
      network = make(units, width, 16, 10)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    name, fields = layout.infer(shapes)
    assert name == "wide_resnet"
    assert (fields["depth"], fields["width"]) == (6 * units + 4, width)


# --- Refusals ----------------------------------------------------------------


def test_a_refusal_names_the_nearest_layout_and_what_differs(state, path):
  broken = prefixed(state, "a.b.")
  broken["a.b.scores"] = torch.zeros(2)
  del broken["a.b.bn1.running_mean"]
  torch.save(broken, path)
  text = refusal(path)
  assert "nearest is Wide ResNet of TRADES; missing: bn1.running_mean" in text
  assert "not of this network: scores" in text
  assert "all names begin with a.b." in text
  torch.save(
    {f"encoder.{i}.{j}.weight": torch.zeros(2) for i in "ab" for j in "cd"},
    path,
  )
  assert "4 tensors, a.c.weight, " in refusal(path)


def test_a_layout_whose_sizes_cannot_be_read_is_still_the_nearest(state, path):
  state = {k: x for k, x in state.items() if k != "conv1.weight"}
  torch.save(state, path)
  assert "nearest is Wide ResNet of TRADES" in refusal(path)


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("net.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX file"),
    ("net.pth", b"\x08\x07\x12\x07pytorch", "an ONNX file"),
    ("net.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
  ],
)
def test_other_formats_are_named(name, content, said, tmp_path):
  path = tmp_path / name
  path.write_bytes(content + bytes(99))
  text = refusal(path)
  assert said in text and "torch.save(model.state_dict(), path)" in text


def test_fields_that_contradict_the_file_are_refused(state, path):
  torch.save(state, path)
  assert "num_classes: 10; allowed: what the file shows, 5" in refusal(
    path, num_classes=10
  )
  with pytest.raises(UserError, match="field: 'dept'; allowed: "):
    interop.load(path, dept=10)
  with pytest.raises(UserError, match="images, labels: one of them"):
    interop.load(path, labels=[1])


# --- The sanity check --------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
  images = np.random.default_rng(1).uniform(size=(96, 8, 8, 3))
  return images.astype(np.float32) ** 2 * np.float32([1.0, 0.5, 0.1])


def trained(network, images, values, path):
  """Saves a network that is right about labels that differ; returns these."""
  head = getattr(network, "fc", None) or network.linear
  with torch.no_grad():
    logits = network(normalized(images, values))
    head.bias -= logits.mean(0)
    labels = (logits - logits.mean(0)).argmax(1).numpy()
  assert len(np.unique(labels)) > 2
  torch.save(network.state_dict(), path)
  return labels


def small_trades():
  return torch_zoo.randomize(layouts.TradesWideResNet(1, 2, 4, 5))


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (None, r"100\.0 % on 96 images; none of \d+ other preparations"),
    (((0.5,) * 3, (0.5,) * 3), "normalisation pixels from -1 to 1, which was"),
    pytest.param(
      ((0.0,) * 3, (1 / 255,) * 3),
      "normalisation pixels from 0 to 255",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_preparation_that_classifies_best_is_taken(
  values, said, seen, path
):
  labels = trained(small_trades(), seen, values, path)
  found = interop.sanity(interop.load(path), seen, labels)
  assert found.accuracy == 1 and found.num_examples == 96
  assert re.search(said, found.told), found.told
  assert found.loaded.told.endswith(found.told)
  one_line(found.loaded.told)
  if values:
    model = found.loaded.model
    np.testing.assert_allclose((model.mean, model.std), values)


def test_blue_before_red_is_found_and_kept(seen, path):
  labels = trained(small_trades(), seen[..., ::-1].copy(), None, path)
  found = interop.sanity(interop.load(path), seen, labels)
  assert "blue, green, red" in found.told and found.accuracy == 1
  classes = jit(lambda c, x: c(x))(found.loaded.classifier, seen).argmax(-1)
  np.testing.assert_array_equal(classes, labels)


def test_chance_level_is_refused_with_what_was_tried(plain, seen):
  labels = np.random.default_rng(5).integers(0, 5, len(seen))
  with pytest.raises(UserError) as error:
    interop.sanity(plain, seen, labels)
  text = one_line(str(error.value))
  assert "weights: chance level" in text and "mean and std of CIFAR-10" in text
  with pytest.raises(UserError, match="images: 1 channels; allowed: 3"):
    interop.sanity(plain, seen[..., :1], labels)


@pytest.mark.parametrize(
  "activated", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_images_decide_between_networks_of_the_same_names(
  activated, path, seen
):
  network = layouts.PreActResNet((1, 1), 4, 10, activated=activated)
  labels = trained(torch_zoo.randomize(network), seen, CIFAR10, path)
  loaded = interop.load(path, images=seen, labels=labels)
  assert loaded.model.activated_shortcut == activated
  assert "clean accuracy 100.0 %" in loaded.told


# --- The command -------------------------------------------------------------


@pytest.fixture(scope="module")
def reader_of_digits(tmp_path_factory):
  """Weights of a network with random features and a head fitted to digits."""
  path = tmp_path_factory.mktemp("digits") / "digits.pth"
  network = layouts.TradesWideResNet(1, 2, 8, 10, channels=1)
  network = torch_zoo.randomize(network)
  train = data.load("digits", validation_size=1).train
  x = torch.tensor(train.images / 255, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    features = network.pooled(x)
    features = torch.cat([features, torch.ones(len(x), 1)], 1)
    targets = torch.eye(10)[torch.tensor(train.labels).long()]
    head = torch.linalg.lstsq(features, targets).solution.T
    network.fc.weight.copy_(head[:, :-1])
    network.fc.bias.copy_(head[:, -1])
  torch.save(network.state_dict(), path)
  return path


def test_explain_takes_weights_without_a_model(reader_of_digits, caplog):
  with caplog.at_level("INFO", "atat_jax"):
    subject = explain.load_weights([], [str(reader_of_digits)], "digits")
  assert list(subject.networks) == ["wide_resnet"]
  model, _ = subject.networks["wide_resnet"]
  assert model.shortcut == "conv" and model.num_classes == 10
  assert "Wide ResNet of TRADES" in caplog.text
  assert "clean accuracy" in caplog.text
  with pytest.raises(UserError, match="model: 'vit'; allowed: 'wide_resnet'"):
    explain.load_weights(["vit"], [str(reader_of_digits)], "digits")


def test_explain_takes_weights_on_photographs(reader_of_digits, tmp_path):
  network = layouts.TradesWideResNet(1, 2, 4, 5)
  path, photograph = tmp_path / "small.pth", tmp_path / "photo.png"
  torch.save({"model": network.state_dict()}, path)
  Image.new("RGB", (50, 40), "red").save(photograph)
  subject = explain.load_photographs([], [path], [photograph], [4])
  assert subject.images.shape == (1, 32, 32, 3)
  assert len(subject.class_names) == 5
  with pytest.raises(UserError, match="labels: 5; allowed: 0 to 4"):
    explain.load_photographs([], [path], [photograph], [5])
  other = [path, reader_of_digits]
  with pytest.raises(UserError, match="num_classes: 5, 10 in the files"):
    explain.load_photographs([], other, [photograph], [4])
