"""The PyTorch twin of the network, the tables, and the command itself."""

import argparse
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
from atat_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


# --- The network -------------------------------------------------------------


VARIANTS = {
  "paper": {},
  "paper-222": dict(strides=(2, 2, 2)),
  "paper-112": dict(strides=(1, 1, 2)),
  "paper-symmetric": dict(padding="symmetric"),
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
  # 10 becomes 5: an odd side to pad.
  "odd": dict(shortcut="conv", size=10),
  "odd-symmetric": dict(shortcut="conv", padding="symmetric", size=10),
  "no-widening": dict(shortcut="conv", width=1, strides=(2, 1, 2)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_torch_network_equals_the_flax_one(variant, make_variables):
  torch = pytest.importorskip("torch")
  from benchmarks.torch_wide_resnet import TorchWideResNet

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
  from benchmarks.torch_wide_resnet import TorchWideResNet

  network = TorchWideResNet(wrn.model, wrn.variables)
  numbers = [p.numel() for p in network.parameters()]
  assert sum(numbers) == sum(
    leaf.size for leaf in jax.tree.leaves(wrn.variables["params"])
  )
  assert all(p.requires_grad for p in network.parameters())


def test_the_torch_network_refuses_another_dtype(wrn):
  pytest.importorskip("torch")
  from benchmarks.torch_wide_resnet import TorchWideResNet

  with pytest.raises(ValueError, match="dtype: bfloat16; allowed: float32"):
    TorchWideResNet(wrn.model.clone(dtype=jnp.bfloat16), wrn.variables)


# --- The tables --------------------------------------------------------------


def _side(robust, accuracy, seconds, everything):
  from benchmarks.comparison import Side

  return Side(
    robust=np.array(robust, bool),
    adversarial=np.zeros((len(robust), 1, 1, 1)),
    accuracy=accuracy,
    seconds=seconds,
    everything=everything,
  )


@pytest.fixture
def made_up():
  from benchmarks.comparison import Comparison

  ours = _side(
    [1, 1, 1, 0, 0, 0, 0, 0],
    {"clean": 0.875, "apgd-ce": 0.5, "square": 0.375},
    {"apgd-ce": 4.0, "square": 5.0},
    10.0,
  )
  warm = _side(
    [1, 1, 1, 0, 0, 0, 0, 0],
    ours.accuracy,
    {"apgd-ce": 2.0, "square": 2.5},
    5.0,
  )
  reference = _side(
    [0, 0, 1, 1, 0, 0, 0, 0],
    {"clean": 0.875, "apgd-ce": 0.25},
    {"apgd-ce": 8.0},
    20.0,
  )
  return Comparison("student", "linf", 8 / 255, ours, reference, warm)


def _cells(table):
  lines = [line.strip("|").split("|") for line in table.splitlines()]
  assert len({len(line) for line in lines}) == 1
  assert len({len(line) for line in table.splitlines()}) == 1
  return [[cell.strip() for cell in line] for line in lines]


def test_parity_table(made_up):
  from benchmarks.comparison import parity_table

  header, rule, row = _cells(parity_table([made_up]))
  assert header == [
    "network",
    "norm",
    "epsilon",
    "n",
    "clean (%)",
    "ours (%)",
    "reference (%)",
    "difference (points)",
    "robust by ours only",
    "by the reference only",
  ]
  assert [cell.endswith(":") for cell in rule] == 2 * [False] + 8 * [True]
  expected = "student linf 0.031373 8 87.50 37.50 25.00 +12.50 2 1"
  assert row == expected.split()
  assert made_up.ours_only.tolist() == [0, 1]
  assert made_up.reference_only.tolist() == [3]


def test_parity_table_shows_two_clean_accuracies_that_differ(made_up):
  from benchmarks.comparison import parity_table

  made_up.ours.accuracy["clean"] = 0.75
  assert _cells(parity_table([made_up, made_up]))[3][4] == "75.00 / 87.50"


def test_attack_table(made_up):
  from benchmarks.comparison import attack_table

  assert _cells(attack_table([made_up]))[2:] == [
    ["student", "clean", "87.50", "87.50", "+0.00"],
    ["student", "apgd-ce", "50.00", "25.00", "+25.00"],
    ["student", "square", "37.50", "-", "-"],
  ]


def test_speed_table(made_up):
  from benchmarks.comparison import speed_table

  assert _cells(speed_table([made_up]))[2:] == [
    ["student", "apgd-ce", "4.00", "2.00", "8.00", "2.00", "4.00"],
    ["student", "square", "5.00", "2.50", "-", "-", "-"],
    ["student", "everything", "10.00", "5.00", "20.00", "2.00", "4.00"],
  ]


def test_a_comparison_is_plain_json(made_up):
  found = json.loads(json.dumps(made_up.as_json(), allow_nan=False))
  assert found["difference_points"] == 12.5
  assert found["ours"]["robust"] == "11100000"
  assert found["ratios"]["everything"] == {"first": 2.0, "warm": 4.0}
  assert found["ratios"]["square"] == {"first": None, "warm": None}


# --- The command -------------------------------------------------------------


def test_flags():
  from benchmarks import autoattack, setting

  args = autoattack.parser().parse_args(
    ["--workdir=a=runs/x", "--workdir=runs/y=1/teacher", "--epsilon=8/255"]
  )
  assert args.workdir == [("a", "runs/x"), ("teacher", "runs/y=1/teacher")]
  assert args.epsilon == 8 / 255
  for text in ("0", "-1", "a", "1/0", "inf", "nan", "1/2/3"):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
      setting.number(text)
  for text in ("0", "-1", "1.5", "a"):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
      setting.whole(text)


def test_a_missing_reference_is_told_with_how_to_get_it(tmp_path):
  from benchmarks import original

  with pytest.raises(UserError, match=r"no package autoattack.*git clone"):
    original.load(str(tmp_path))


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


# --- The step, and what is measured of it ------------------------------------


def test_flops_of_a_forward_pass():
  """WRN-28-10 takes 10.5 GFLOP an image (Zagoruyko and Komodakis: 5.2 GMAC)."""
  from benchmarks import flops, setting

  model = setting.wide_resnet("wrn-28-10")
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


def test_flops_of_a_step():
  from atat_jax import objectives
  from benchmarks import flops, setting

  def passes(method, num_steps):
    fields = setting.hyperparameters(method)
    return flops.passes(objectives.create(method, **fields), num_steps)

  assert passes("standard", 0) == 3
  assert passes("at", 7) == 14 + 3
  assert passes("alp", 7) == passes("mart", 7) == 14 + 6
  assert passes("trades", 10) == 20 + 6 + 1
  assert passes("atat", 7) == passes("atat_released", 7) == 14 + 6 + 1
  with pytest.raises(UserError, match="method: 'other'; allowed: alp"):
    setting.hyperparameters("other")


def test_pairs_are_compared_run_by_run():
  from benchmarks import timing

  # The machine was slow in the second pair: that falls on both sides.
  found = timing.summary([[1.0, 4.0, 1.0], [2.0, 8.0, 2.0]])
  assert (found["ratio"], found["ratio_spread"]) == (2.0, 0.0)
  assert (found["seconds"], found["peer_seconds"]) == (1.0, 2.0)


def test_short_functions_are_timed_in_bursts(monkeypatch):
  from benchmarks import timing

  now, calls = [0.0], []
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

  def side(name, seconds):
    def run():
      calls.append(name)
      now[0] += seconds

    return run

  sides = [side("long", 1.0), side("short", 0.0625)]
  times = timing.run_in_turn(sides, repeats=2)
  assert times == [[1.0, 1.0], [0.0625, 0.0625]]
  assert calls == (["long"] + ["short"] * 5) * 2  # one, and four in 0.2 s


def test_a_line_is_fitted_to_a_curve():
  from benchmarks import scaling

  work = np.array([1.0, 2.0, 5.0, 10.0])
  found = scaling.fit(work, 3 + 0.5 * work)
  assert found["constant"] == pytest.approx(3)
  assert found["slope"] == pytest.approx(0.5)
  assert found["worst"] == pytest.approx(0, abs=1e-9)
  bent = scaling.fit(work, work**2)
  assert bent["worst"] > 0.2


def test_a_worse_ratio_is_flagged(tmp_path, capsys):
  from benchmarks import compare

  def write(name, ratios):
    path = tmp_path / name
    path.write_text(json.dumps({"ratios": ratios}))
    return str(path)

  stored = write("stored.json", {"a": 2.0, "b": 1.0})
  compare.main([stored, write("same.json", {"a": 1.81, "b": 1.5, "c": 1.0})])
  assert "worse" not in capsys.readouterr().out
  for name, ratios in (
    ("slow.json", {"a": 1.79, "b": 1.0}),
    ("missing.json", {"a": 2.0}),
  ):
    with pytest.raises(SystemExit, match="1 of 2 ratios are worse"):
      compare.main([stored, write(name, ratios)])
    assert "| worse |" in capsys.readouterr().out
  for name in (str(tmp_path / "none.json"), write("empty.json", {})):
    with pytest.raises(SystemExit, match=r"error: .*allowed"):
      compare.main([stored, name])


def test_all_benchmarks_run(tmp_path):
  """Small, in a process of its own: they restrict cores and caches."""
  pytest.importorskip("torch")
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.run",
      "--smoke",
      f"--out={tmp_path}",
    ],
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
  assert not done.returncode, done.stderr
  found = {
    path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")
  }
  assert set(found) == {"step", "attacks", "scaling", "savings", "maps"}
  for name, result in found.items():
    assert {"command", "commit", "machine"} <= set(result), name
    assert all(ratio > 0 for ratio in result["ratios"].values())
  (row,) = found["step"]["rows"]
  # Weights and images are the same, so are the gradients.
  assert row["gradient_differences"]["float64"] < 1e-7
  # XLA leaves out products with the padding's zeros, many on so small images.
  by_compiler = row["flops"]["forward_per_image_by_compiler"]
  assert 0.6 < by_compiler / row["flops"]["forward_per_image"] < 1.05
  assert row["seconds_compiling"] > 0 and row["memory"]["planned_temporary"] > 0
  (curve,) = found["scaling"]["rows"]
  assert (
    curve["values"] == [2, 4] and curve["flops"][1] == 2 * curve["flops"][0]
  )


def test_tables_are_written_from_files(tmp_path):
  from benchmarks import tables

  (tmp_path / "attacks.json").write_text(
    json.dumps(
      {
        "command": "python -m benchmarks.attacks",
        "commit": "abc",
        "date": "2026-01-02T03:04:05",
        "machine": {
          "cores_used": [0, 1],
          "cpu": "a CPU",
          "device": "cpu",
          "python": "3.11",
          "jax": "0.10",
          "torch": None,
        },
        "rows": [
          {
            "name": "fgsm/wrn-8-1/b4",
            "seconds": 0.0125,
            "spread": 0.001,
            "peer_seconds": 0.025,
            "peer_spread": 0.002,
            "ratio": 2.0,
            "ratio_spread": 0.1,
            "first_seconds": 1.5,
            "peer_first_seconds": 0.03,
            "first_ratio": 0.02,
          }
        ],
      }
    )
  )
  page = "before\n<!-- generated: attacks -->\nold\n<!-- end -->\nafter\n"
  made = tables.generate(page, tmp_path)
  assert "old" not in made
  assert made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n")
  assert "| fgsm/wrn-8-1/b4 |" in made and " 2.00 |" in made
  assert "commit `abc`, 2026-01-02, 2 cores, a CPU" in made
  assert tables.generate(made, tmp_path) == made
  for name, message in (("step", "run first"), ("other", "allowed: attacks")):
    with pytest.raises(UserError, match=message.replace("run first", "first")):
      tables.generate(page.replace("attacks", name), tmp_path)
