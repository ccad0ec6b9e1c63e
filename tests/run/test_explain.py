"""`python -m atat_jax.explain`: what it refuses, what it leaves, doing it twice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from html_page import Page
from PIL import Image

from atat_jax import analyses, checkpoints, config, evaluation, explain, models
from atat_jax import state as train_state
from atat_jax.errors import UserError
from atat_jax.optim import make_optimizer
from atat_jax.runs import configuration

pytestmark = pytest.mark.usefixtures("quick_compilation")
pytest_plugins = ("tiny",)

FILES = {f"{analysis.stem}.npz" for analysis in analyses.ANALYSES.values()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two untrained runs on digits; one has an evaluation."""
  folder = tmp_path_factory.mktemp("runs")
  for seed, method in enumerate(("standard", "at")):
    made = tiny.config(method)
    plan = config.make_plan(made)
    configuration.write(plan.record, folder / method)
    state = train_state.create(
      plan.model,
      make_optimizer(lambda count: 0.1),
      jax.random.key(seed),
      jnp.zeros((1, 8, 8, 1)),
      metric_names=("loss",),
      term_names=("cross_entropy",),
    )
    with checkpoints.Checkpointer(folder / method, plan.model_spec) as keeper:
      keeper.save(state, 1, 0.5)
  row = {
    "model": "at",
    "attack": "autoattack",
    "norm": "linf",
    "epsilon": 0.2,
    "batch_norm": "running",
    "num_examples": 8,
    "accuracy": 0.125,
  }
  results = {"format": 1, "rows": [row, {**row, "model": "teacher"}]}
  (folder / "at" / "results.json").write_text(json.dumps(results))
  return folder


# --- What it refuses ---------------------------------------------------------


def refused(argv, *parts):
  with pytest.raises(UserError) as error:
    explain.main([str(word) for word in argv])
  message = str(error.value)
  assert len(message.splitlines()) == 1
  for part in parts:
    assert str(part) in message, message


@pytest.fixture
def photograph(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(np.full((260, 260, 3), 90, np.uint8)).save(path)
  return path


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (["--figures=attention,maps"], ["analyses", "maps", "landscape"]),
    (["--num-points=4"], ["num_points: 4", "odd"]),
    (["--attack=cw"], ["attack: 'cw'", "pgd<steps>"]),
  ],
)
def test_a_wrong_number_is_told_before_anything_is_read(
  runs, tmp_path, monkeypatch, flags, parts
):
  monkeypatch.setattr(explain, "load_runs", None)
  refused([runs / "at", "--out", tmp_path / "out", *flags], *parts)
  assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_there(runs, tmp_path):
  out = tmp_path / "out"
  refused(
    [runs / "at", "--out", out, "--indices", "0", "360"],
    "indices: 360",
    "0 to 359",
  )
  assert not out.exists()


def test_runs_that_are_none(runs, tmp_path):
  refused([tmp_path / "nothing"], tmp_path / "nothing", "config.json")
  refused([runs / "at", runs / "at"], "runs", "once")
  empty = tmp_path / "empty"
  configuration.write(config.make_plan(tiny.config("at")).record, empty)
  refused([runs / "at", empty], empty, "checkpoints")


def test_runs_that_do_not_belong_together(runs, tmp_path):
  for name, change, parts in (
    ("data", {"data__name": "cifar10"}, ["data.name", "'digits'", "'cifar10'"]),
    ("epsilon", {"evaluation__epsilon": 0.1}, ["evaluation.epsilon", "0.1"]),
  ):
    configuration.write(
      config.make_plan(tiny.config("at", **change)).record, tmp_path / name
    )
    refused([runs / "at", tmp_path / name], *parts, tmp_path / name)
  # A number of the command settles it.
  given = {"epsilon": 0.3, "step_size": None, "norm": None}
  found = explain.attack_of_runs([runs / "at", tmp_path / "epsilon"], given)
  assert found == {"epsilon": 0.3, "step_size": 0.05, "norm": "linf"}


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (["--model", "resnet19"], ["model: 'resnet19'", "resnet18"]),
    (["--model", "resnet18", "resnet18"], ["model", "once"]),
    (["--model", "resnet18", "--labels", "3"], ["weights: 0", "1"]),
    (["--weights", "w.pth", "--labels", "3", "5"], ["labels: 2", "1, one for"]),
    (
      ["--weights", "w.pth", "--labels", "1000", "--num-classes", "1000"],
      ["labels: 1000", "0 to 999"],
    ),
    (["--weights", "w.pth", "--data=mnist"], ["mnist", "cifar10, cifar100"]),
    (["--weights", "w.pth", "--labels", "3"], ["w.pth", "No such file"]),
    (
      ["--weights", "w.pth", "--labels", "3", "--class-names", "none.txt"],
      ["class_names", "none.txt"],
    ),
  ],
)
def test_what_does_not_fit_a_photograph(photograph, tmp_path, flags, parts):
  model = [] if "--model" in flags else ["--model", "resnet18"]
  out = tmp_path / "out"
  argv = [*model, "--images", photograph, "--out", out, *flags]
  refused(argv, *parts)
  assert not out.exists()


def test_class_names_are_a_line_each(photograph, tmp_path):
  path = tmp_path / "names.txt"
  path.write_text("cat\ndog\n")
  flags = ["--labels", 1, "--weights", "w", "--class-names", path]
  argv = ["--model", "resnet18", "--images", photograph, *flags]
  refused([*argv, "--num-classes", 3], "class_names: 2 lines", "allowed: 3")


def test_either_runs_or_networks(runs, capsys):
  for argv in ([], [str(runs / "at"), "--model", "resnet18"]):
    with pytest.raises(SystemExit):
      explain.main(argv)
    assert "name runs, or networks" in capsys.readouterr().err


# --- What it leaves ----------------------------------------------------------


def test_names_are_as_long_as_they_must_be(tmp_path):
  def names(*paths):
    return explain.run_names([tmp_path / path for path in paths])

  assert names("a/at", "a/atat") == ["at", "atat"]
  assert names("0/at", "1/at", "1/alp") == ["0-at", "1-at", "1-alp"]
  assert names("a/atat/teacher") == ["atat (teacher)"]
  assert names("a/at", "a/atat/teacher", "a/atat") == [
    "at",
    "atat (teacher)",
    "atat (student)",
  ]


@pytest.fixture(scope="module")
def explained(runs, tmp_path_factory):
  """What the command leaves for both runs, and its arguments."""
  out = tmp_path_factory.mktemp("explained") / "out"
  argv = [
    *(str(runs / name) for name in ("standard", "at")),
    f"--out={out}",
    "--figures=attention,steps",
    "--num-images=2",
    "--num-examples=8",
    "--num-steps=3",
    "--attack=pgd2",
  ]
  with tiny.devices(1):
    explain.main(argv)
  return out, argv


def test_the_files_that_are_left(explained):
  out, _ = explained
  assert {path.name for path in out.iterdir()} == {
    "attack_steps.npz",
    "attention.npz",
    "explain.html",
    "figures",
    "results.json",
  }
  for name, count in (("attention", 2), ("attack_steps", 8)):
    with np.load(out / f"{name}.npz") as arrays:
      assert list(arrays["networks"]) == ["standard", "at"]
      assert list(arrays["indices"]) == list(range(count))
      assert list(arrays["class_names"]) == list("0123456789")
      assert f"epsilon {0.2:.4g}" in str(arrays["protocol"])
  drawn = {path.name for path in (out / "figures").iterdir()}
  assert {"attack_steps.png", "attack_steps.pdf", "attention_1.png"} <= drawn


def test_the_page_that_is_left(explained, runs):
  out, argv = explained
  page = Page(out / "explain.html")
  page.assert_asks_for_nothing()
  assert page.headings == [
    "Accuracy against the attack's steps",
    "Attention",
    "How it was made",
  ]
  assert "standard, at" in page.text and "digits test images" in page.text
  assert "AutoAttack leaves at 12.5% (autoattack, 8 images)" in page.text
  assert f"python -m atat_jax.explain {' '.join(argv)}" in page.text
  drawn = len(list((out / "figures").glob("*.png")))
  assert [tag for tag, _ in page.tags].count("img") == drawn


def test_maps_are_those_of_the_library(explained, runs):
  out, _ = explained
  networks = {
    name: checkpoints.restore_model(runs / name) for name in ("standard", "at")
  }
  with np.load(out / "attention.npz") as found:
    wanted = analyses.attention_maps(
      jax.random.key(0),
      networks,
      found["images"],
      found["labels"],
      protocol=evaluation.parse("pgd2", epsilon=0.2, step_size=0.05),
      mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
    )
    for name, array in wanted.items():
      np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_what_is_there_is_not_computed_again(explained, capsys):
  out, argv = explained
  (out / "attention.npz").write_bytes(b"")  # damaged: made again
  before = tiny.snapshot(out)
  with tiny.devices(1):
    explain.main(argv)
  assert str(out / "explain.html") in capsys.readouterr().out
  after = tiny.snapshot(out)
  assert after["attack_steps.npz"] == before["attack_steps.npz"]
  with np.load(out / "attention.npz") as arrays:
    assert arrays["images"].shape == (2, 8, 8, 1)


# --- Everything --------------------------------------------------------------


@pytest.mark.slow
def test_everything_of_trained_runs(finished, tmp_path):
  argv = [
    str(finished.workdir / "teacher"),
    str(finished.workdir),
    f"--out={tmp_path}",
    "--num-examples=30",
    "--num-points=5",
  ]
  explain.main(argv)
  assert FILES <= {path.name for path in tmp_path.iterdir()}
  page = Page(tmp_path / "explain.html")
  assert len(page.headings) == len(FILES) + 1
  with np.load(tmp_path / "attack_steps.npz") as arrays:
    run = finished.workdir.name
    assert list(arrays["networks"]) == [f"{run} (teacher)", f"{run} (student)"]


@pytest.mark.slow
def test_photographs(tmp_path, data_folder):
  torch = pytest.importorskip("torch")
  torch_zoo = pytest.importorskip("torch_zoo")
  path = tmp_path / "resnet18.pth"
  torch.manual_seed(0)
  network = torch_zoo.ResNet(models.create("resnet18"))
  torch.save(network.state_dict(), path)
  photographs = [
    str(data_folder / "photos" / f"{name}.jpg")
    for name in ("cat_chelsea", "coffee_cup")
  ]
  out = tmp_path / "out"
  argv = ["--model=resnet18", f"--weights={path}", f"--out={out}"]
  argv += ["--images", *photographs, "--labels", "281", "504"]
  explain.main([*argv, "--num-points=3", "--rounds", "1", "2", "--attack=pgd2"])
  assert {path.name for path in out.glob("*.npz")} == {
    "attention.npz",
    "attention_rounds.npz",
    "loss_landscape.npz",
  }
  page = Page(out / "explain.html")
  assert "epsilon 16/255" in page.text
