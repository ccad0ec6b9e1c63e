"""`python -m atat_jax.export`: a run or a file of weights to files for others."""

import json

import jax
import numpy as np
import pytest

from atat_jax import checkpoints, export, interop, models
from atat_jax.errors import UserError

pytest_plugins = ("tiny",)

ROW = {
  "model": "net",
  "dataset": "cifar10",
  "split": "test",
  "num_examples": 10_000,
  "attack": "autoattack",
  "norm": "linf",
  "epsilon": 8 / 255,
  "step_size": None,
  "num_steps": None,
  "num_restarts": None,
  "loss": None,
  "batch_norm": "running",
  "batch_size": 100,
  "seed": 0,
  "options": {"version": "standard"},
  "accuracy": 0.5,
  "seconds": 1.0,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  model = models.create("wide_resnet", depth=8, width=1, stem_channels=2)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
  )
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  path = tmp_path_factory.mktemp("weights") / "net.safetensors"
  return interop.save(path, model, ones).weights


def files_of(folder):
  return sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file()
  )


def test_a_file_of_weights_and_the_results_of_an_attack(
  weights, tmp_path, capsys
):
  results, out = tmp_path / "results", tmp_path / "out"
  results.mkdir()
  content = {"format": 1, "run": {}, "rows": [ROW], "diagnostics": {}}
  (results / "results.json").write_text(json.dumps(content), encoding="utf-8")
  arguments = [str(weights), f"--out={out}", f"--results={results}"]
  export.main([*arguments, "--name=Me2026Title", "--paper=venue=ICML 2026"])
  assert files_of(out) == [
    "Me2026Title.py",
    "Me2026Title.safetensors",
    "model_info/cifar10/Linf/Me2026Title.json",
    "new_model.md",
  ]
  assert interop.load(out / "Me2026Title.safetensors").model.depth == 8
  info = json.loads(
    (out / "model_info/cifar10/Linf/Me2026Title.json").read_text("utf-8")
  )
  assert (info["autoattack_acc"], info["venue"]) == ("50.00", "ICML 2026")
  assert info["clean_acc"] is None
  printed = capsys.readouterr().out
  assert "not known:  clean_acc: no row without an attack\n" in printed
  assert f"weights:    {out / 'Me2026Title.safetensors'}\n" in printed


def test_without_results_there_is_nothing_for_robustbench(
  weights, tmp_path, capsys
):
  export.main([str(weights), f"--out={tmp_path}"])
  assert files_of(tmp_path) == ["net.py", "net.safetensors"]
  assert "nothing for RobustBench" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--paper=title=x", "--paper: 'title=x'; allowed: FIELD=TEXT for name"),
    ("--paper=link", "--paper: 'link'; allowed"),
    ("--name=", "--name: ''; allowed: a name without a folder"),
    ("--name=../x", "--name: '../x'; allowed: a name without a folder"),
    ("--results=none", "--results: none; allowed: a folder with results.json"),
    ("--network=x", "--network: 'x' without results; allowed: with a results"),
    ("--step=3", "--step, --which: given for gone.pth, no run; allowed: for"),
    ("--which=last", "--step, --which: given for gone.pth, no run; allowed"),
  ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(flag, said, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(UserError, match=said.replace("(", r"\(")):
    export.main(["gone.pth", f"--out={out}", flag])
  assert not out.exists()


@pytest.mark.slow
def test_a_run_is_exported_with_what_its_rows_do_not_show(
  finished, tmp_path, capsys
):
  export.main([str(finished.workdir), f"--out={tmp_path}", "--name=mine"])
  assert files_of(tmp_path) == [
    "mine.py",
    "mine.safetensors",
    "model_info/mine.json",
    "new_model.md",
  ]
  model, variables = checkpoints.restore_model(finished.workdir)
  loaded = interop.load(tmp_path / "mine.safetensors")
  assert loaded.model == model.clone(dtype=loaded.model.dtype)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
  assert "no leaderboard of digits" in capsys.readouterr().out
