"""RobustBench's fields are filled by honest rows only, and named otherwise."""

import pytest

from atat_jax import models
from atat_jax.errors import UserError
from atat_jax.export import robustbench

# Fields of the JSON files in RobustBench's model_info, in their order.
FIELDS = [
  *("link", "name", "authors", "additional_data", "number_forward_passes"),
  *("dataset", "venue", "architecture", "eps", "clean_acc", "reported"),
  *("autoattack_acc", "footnote", "unreliable"),
]
MODEL = models.create("wide_resnet", depth=28, width=10)


def row(attack="autoattack", **changes):
  attacked = attack != "nominal"
  return {
    "model": "student",
    "dataset": "cifar10",
    "split": "test",
    "num_examples": 10_000,
    "attack": attack,
    "norm": "linf" if attacked else None,
    "epsilon": 8 / 255 if attacked else None,
    "batch_norm": "running",
    "seed": 3,
    "checkpoint_step": 70,
    "options": {"version": "standard"} if attacked else None,
    "accuracy": 0.5123 if attacked else 0.87654,
    "nonfinite": 0,
    "nonfinite_gradients": 0,
    "diagnostics": {"deterministic": {"flag": False, "message": ""}},
    **changes,
  }


def entry(*rows, config=None, step=70, network="student", **paper):
  config = {"data": {"extra": None}} if config is None else config
  run = {"config": config, "commit": "abc123"}
  return robustbench.entry(
    {"rows": list(rows), "run": run},
    network=network,
    model=MODEL,
    step=step,
    paper=paper,
  )


def test_honest_rows_fill_what_they_show():
  weaker = row(accuracy=0.52, seed=4)
  found = entry(row("nominal"), weaker, row(), name="A title", link="https://x")
  assert list(found.info) == FIELDS
  assert found.info == {
    "link": "https://x",
    "name": "A title",
    "authors": None,
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": None,
    "architecture": "WideResNet-28-10",
    "eps": "8/255",
    "clean_acc": "87.65",
    "reported": "51.23",
    "autoattack_acc": "51.23",
    "footnote": None,
    "unreliable": False,
  }
  assert set(found.unknown) == {"authors", "venue"}
  assert found.folder == "model_info/cifar10/Linf"


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"attack": "autoattack-fast"}, "autoattack-fast is not AutoAttack's"),
    ({"options": {"version": "rand"}}, "not AutoAttack's standard version"),
    (
      {"options": {"version": "standard", "square": 1}},
      "other numbers than the standard version's",
    ),
    ({"batch_norm": "batch"}, "statistics of the batch"),
    ({"split": "validation"}, "images of the split validation"),
    ({"num_examples": 1_000}, "1,000 images, not all 10,000"),
    ({"epsilon": 4 / 255}, "epsilon 4/255, the leaderboard's is 8/255"),
    ({"norm": "l1"}, "no leaderboard of cifar10 under l1"),
    ({"checkpoint_step": 60}, "weights of step 60, not 70, which is exported"),
    ({"nonfinite": 2}, "not finite"),
    ({"nonfinite_gradients": 2}, "not finite"),
    (
      {"diagnostics": {"x": {"flag": True, "message": "It is random."}}},
      "a diagnostic is flagged: It is random.",
    ),
    ({"dataset": "digits"}, "no leaderboard of digits under linf"),
    ({"dataset": "imagenet"}, "no leaderboard of imagenet under linf whose"),
    ({"model": "teacher"}, "no row under AutoAttack"),
  ],
)
def test_a_row_of_another_protocol_fills_nothing(changes, reason):
  found = entry(row("nominal"), row(**changes))
  for field in ("eps", "reported", "autoattack_acc", "unreliable"):
    assert found.info[field] is None and reason in found.unknown[field]
  assert found.info["clean_acc"] == "87.65"
  assert found.threat_model == found.evaluation == ""
  form = robustbench.form(found)
  assert f"- **Robust accuracy**: (not known: {found.unknown['eps']})" in form


def test_a_clean_accuracy_of_a_part_or_of_batch_statistics_is_not_known():
  batch = row("nominal", batch_norm="batch")
  part = row("nominal", num_examples=9)
  for wrong in (batch, part):
    found = entry(wrong, row())
    assert found.info["clean_acc"] is None and "clean_acc" in found.unknown
    assert found.info["autoattack_acc"] == "51.23"
  assert entry(batch, row("nominal"), row()).info["clean_acc"] == "87.65"


def test_data_that_are_not_known_are_not_called_none():
  rows = row("nominal"), row()
  assert entry(*rows, config={}).info["additional_data"] is None
  extra = {"data": {"extra": "images.npz"}}
  assert entry(*rows, config=extra).info["additional_data"] is True


def test_the_form_has_the_sections_of_robustbenchs():
  found = entry(row("nominal"), row(), name="A title")
  text = robustbench.form(found, "https://x/weights")
  for line in (
    "# Paper Information",
    "- **Paper Title**: A title",
    "- **Paper authors**: (not known: the authors know it)",
    "# Leaderboard Claim(s)",
    "- **Architecture**: WideResNet-28-10",
    "- **Threat Model**: Linf",
    "- **eps**: 8/255",
    "- **Clean accuracy**: 87.65%",
    "- **Robust accuracy**: 51.23%",
    "- **Additional data**: false",
    "- **Checkpoint and code**: https://x/weights",
    "# Model Zoo:",
  ):
    assert line in text.splitlines()
  assert "AutoAttack, standard version" in text and "commit abc123" in text
  assert "running statistics" in text and "all 10,000 test images" in text


def test_the_network_whose_rows_count_is_never_guessed():
  both = [row(model="a"), row(model="b")]
  assert robustbench.network_of([row(), *both], None) == "student"
  assert robustbench.network_of(both[:1], None) == "a"
  assert robustbench.network_of(both, "b") == "b"
  for rows, name in ((both, None), (both, "c"), ([], None)):
    with pytest.raises(UserError, match="network: "):
      robustbench.network_of(rows, name)


@pytest.mark.parametrize(
  ("name", "fields", "expected"),
  [
    ("preact_resnet18", {}, "PreActResNet-18"),
    ("resnet18", {"stage_sizes": (3, 4, 6, 3)}, "ResNet-34"),
    ("resnet18", {"stage_sizes": (9, 9, 9)}, "ResNet-56"),
    ("resnet50", {}, "ResNet-50"),
    ("resnet50", {"inner_width": 2}, "WideResNet-50-2"),
    ("vgg16", {}, "VGG-16"),
    ("densenet121", {}, "DenseNet-121"),
    ("densenet121", {"stage_sizes": (6, 12, 32, 32)}, "DenseNet-169"),
    ("convnext", {}, "ConvNeXt-T"),
    ("convnext", {"conv_stem": (48, 96)}, "ConvNeXt-T-ConvStem"),
    ("vit", {}, "ViT-B"),
    ("xcit", {}, "XCiT-S12"),
  ],
)
def test_networks_have_the_names_of_the_leaderboard(name, fields, expected):
  assert robustbench.architecture(models.create(name, **fields)) == expected
