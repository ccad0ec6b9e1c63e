"""The benchmarks beside PyTorch: equal networks and gradients, one small run."""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import models

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


# --- The network -------------------------------------------------------------


VARIANTS = {
  "paper": {},
  "paper-222": dict(depth=8, strides=(2, 2, 2)),
  "paper-112": dict(depth=8, strides=(1, 1, 2)),
  "paper-symmetric": dict(depth=8, padding="symmetric"),
  "usual": dict(
    shortcut="conv",
    padding="symmetric",
    activation="relu",
    normalization="dataset",
    mean=(0.1, 0.5, 0.3),
    std=(0.2, 0.4, 0.3),
  ),
  "usual-222-same": dict(
    shortcut="conv",
    strides=(2, 2, 2),
    activation="silu",
    normalization="none",
    batch_norm_epsilon=1e-5,
  ),
  # The side of 10 becomes 5: "same" padding is uneven.
  "odd": dict(depth=8, shortcut="conv", size=10),
  "odd-symmetric": dict(depth=8, shortcut="conv", padding="symmetric", size=10),
  "no-widening": dict(shortcut="conv", width=1, strides=(2, 1, 2)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_torch_network_equals_the_flax_one(variant, make_variables):
  torch = pytest.importorskip("torch")
  from benchmarks.support.pytorch import TorchWideResNet

  fields = dict(depth=14, width=2, num_classes=5, stem_channels=4)
  fields |= VARIANTS[variant]
  size = fields.pop("size", 8)
  model = models.create("wide_resnet", **fields)
  generator = np.random.default_rng(0)
  images = generator.uniform(size=(3, size, size, 3)).astype(np.float32)
  weights = generator.normal(size=(3, 5)).astype(np.float32)
  variables = make_variables(model, images)

  def objective(x):
    logits = model.apply(variables, x)
    return (logits * weights).sum(), logits

  gradient, logits = jax.jit(
    jax.grad(objective, has_aux=True),
    compiler_options={"xla_backend_optimization_level": 0},
  )(images)

  network = TorchWideResNet(model, variables)
  assert not network.training
  x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
  found = network(x)
  (slope,) = torch.autograd.grad((found * torch.tensor(weights)).sum(), x)
  np.testing.assert_allclose(
    found.detach().numpy(), logits, rtol=1e-4, atol=1e-4
  )
  scale = np.abs(gradient).max()
  np.testing.assert_allclose(
    slope.numpy().transpose(0, 2, 3, 1) / scale, gradient / scale, atol=1e-4
  )


def test_the_torch_network_has_the_flax_ones_parameters(wrn):
  pytest.importorskip("torch")
  from benchmarks.support.pytorch import TorchWideResNet

  network = TorchWideResNet(wrn.model, wrn.variables)
  numbers = [p.numel() for p in network.parameters()]
  assert sum(numbers) == sum(
    leaf.size for leaf in jax.tree.leaves(wrn.variables["params"])
  )
  assert all(p.requires_grad for p in network.parameters())


def test_the_torch_network_refuses_another_dtype(wrn):
  pytest.importorskip("torch")
  from benchmarks.support.pytorch import TorchWideResNet

  with pytest.raises(ValueError, match="dtype: bfloat16; allowed: float32"):
    TorchWideResNet(wrn.model.clone(dtype=jnp.bfloat16), wrn.variables)


# --- Operations --------------------------------------------------------------


def test_flops_of_a_forward_pass():
  """WRN-28-10 takes 10.5 GFLOP an image (Zagoruyko and Komodakis: 5.2 GMAC)."""
  from benchmarks.support import flops, networks

  model = networks.wide_resnet("wrn-28-10")
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  found = flops.forward(model, variables, (32, 32, 3))
  # By hand: the stem, three stages of four units, the head; in each stage the
  # first convolution comes from fewer channels.
  expected = 32 * 32 * 9 * 3 * 16
  before = 16
  for side, channels in ((32, 160), (16, 320), (8, 640)):
    expected += side**2 * 9 * channels * (before + 7 * channels)
    before = channels
  assert found == 2 * (expected + 640 * 10)
  assert found == pytest.approx(10.5e9, rel=0.01)


# --- Small runs --------------------------------------------------------------


@pytest.fixture
def quick(quick_compilation, monkeypatch):
  """The caches of the other tests' programs stay."""
  monkeypatch.setattr(jax, "clear_caches", lambda: None)


def test_a_step_runs_beside_pytorch_with_the_same_gradient(quick):
  pytest.importorskip("torch")
  from benchmarks import step

  case = step.Case("wrn-8-1", batch_size=4, num_steps=1, size=8)
  row = step.measure(case, peer="eager", repeats=1)
  # Weights and images are the same, so are the gradients.
  assert row["gradient_differences"]["float64"] < 1e-7
  # XLA leaves out products with the padding's zeros, many on so small images.
  by_compiler = row["flops"]["forward_per_image_by_compiler"]
  assert 0.6 < by_compiler / row["flops"]["forward_per_image"] < 1.05
  assert row["seconds_compiling"] > 0 and row["memory"]["planned_temporary"] > 0
  assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
  assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
  json.dumps(row, allow_nan=False)
  assert row["name"] in step.table([row])
  assert row["name"] in step.gradient_table([row])


def test_an_attack_runs_beside_pytorch(quick):
  pytest.importorskip("torch")
  from benchmarks import attacks
  from benchmarks.support import networks

  network = networks.random_network("wrn-8-1", 4, seed=0)
  row = attacks.measure(network, "fgsm", epsilon=8 / 255, repeats=1)
  assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
  assert "| fgsm/wrn-8-1/b4 |" in attacks.table([row])


@pytest.mark.slow
def test_a_network_of_flax_runs_in_both_forms_and_equals_its_torch_copy(quick):
  torch = pytest.importorskip("torch")
  from benchmarks import foreign
  from benchmarks.support import networks, pytorch

  row = foreign.measure("resnet-8", 2, repeats=1)
  assert "| resnet-8/b2 |" in foreign.table([row])
  assert row["step_to_gradient"][0] < row["kept_to_gradient"][0]
  network = networks.random_network("resnet-8", 3, seed=0)
  expected = network.model.apply(network.variables, network.images)
  twin = pytorch.copy(network.model, network.variables)
  with torch.no_grad():
    found = twin(torch.from_numpy(network.images.transpose(0, 3, 1, 2).copy()))
  np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.slow
def test_the_smoke_plan_runs(tmp_path):
  """Each benchmark in a process of its own, as the runner starts it."""
  pytest.importorskip("torch")
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.run", "--smoke", f"--out={tmp_path}"],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles quickly
    },
    cwd=ROOT,
    check=False,
  )
  assert not done.returncode, done.stdout + done.stderr
  found = {
    path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")
  }
  assert set(found) == {"run", "step", "attacks", "scaling", "savings", "maps"}
  del found["run"]
  for name, result in found.items():
    assert {"command", "commit", "machine"} <= set(result), name
    assert all(ratio > 0 for ratio in result["ratios"].values())
  (curve,) = found["scaling"]["rows"]
  assert (
    curve["values"] == [2, 4] and curve["flops"][1] == 2 * curve["flops"][0]
  )


def test_the_schedule_counts_each_evaluation_once():
  """Where no image is ever fooled, every run of every image is made in full."""
  schedule = importlib.import_module("benchmarks.schedule")
  shares = {"num_examples": 20, "batch_size": 16, "clean": 0.8}
  whole = schedule.count("fast", robust=0.8, **shares)
  assert whole["apgd-ce"].needed == 16 * 101
  assert whole["apgd-t"].needed == 16 * 9 * 101
  ce = whole["apgd-ce"]
  assert (ce.made, ce.turns, ce.full) == (16 * 101, 21, 21)  # turns of 5 steps
  some = schedule.count("fast", robust=0.4, **shares)
  # Seven or eight of sixteen images are fooled within 20 steps.
  assert 8 * 101 < some["apgd-ce"].needed <= 8 * 101 + 8 * 101
  assert some["apgd-ce"].made >= some["apgd-ce"].needed
  assert 8 * 9 * 101 <= some["apgd-t"].needed < 16 * 9 * 101


# --- AutoAttack beside the original, where it is installed --------------------


@pytest.fixture
def reference():
  """Flags that name the original package."""
  pytest.importorskip("torch")
  named = os.environ.get("ATAT_JAX_AUTOATTACK")
  if named:
    return [f"--reference={pathlib.Path(named).resolve()}"]
  if importlib.util.find_spec("autoattack") is None:
    pytest.skip("no original AutoAttack; set ATAT_JAX_AUTOATTACK")
  return []


def test_the_command_runs_both_sides(reference, tmp_path):
  out = tmp_path / "results" / "autoattack.json"
  done = subprocess.run(
    [
      sys.executable,
      str(ROOT / "benchmarks" / "autoattack.py"),
      *reference,
      "--model=wrn-10-1",
      "--num_examples=9",
      "--batch_size=4",
      "--epsilon=4/255",
      "--num_steps=3",
      "--num_queries=20",
      "--threads=1",
      "--compilation_cache",  # pytest's
      "--warm",
      f"--out={out}",
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    cwd=tmp_path,
    check=False,
  )
  assert not done.returncode, done.stderr
  found = json.loads(out.read_text())
  assert found["settings"]["attacks"] == [
    "apgd-ce",
    "apgd-t",
    "fab-t",
    "square",
  ]
  assert len(found["machine"]["cores_used"]) == 1
  assert found["machine"]["torch_threads"] == 1
  (network,) = found["networks"]
  assert network["num_examples"] == 9
  assert network["largest_logit_difference"] < 1e-4
  assert network["repeatable"]
  for side in ("ours", "ours_warm", "reference"):
    result = network[side]
    assert result["accuracy"]["clean"] == pytest.approx(8 / 9)
    assert list(result["seconds"]) == list(result["accuracy"])[1:]
    assert sum(result["seconds"].values()) < result["seconds_everything"]
    last = list(result["accuracy"].values())[-1]
    assert last == pytest.approx(result["robust_accuracy"])
    assert result["robust"].count("1") / 9 == pytest.approx(last)
  for side, images in network["images"].items():
    assert images["adversarial"] == 8 - network[side]["robust"].count("1")
    assert images["largest_perturbation"] <= 4 / 255 + 1e-6
  assert "| wrn-10-1 | linf |" in done.stdout
  assert "reference / ours, warm" in done.stdout
  assert f"results: {out}" in done.stdout
