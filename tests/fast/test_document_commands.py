"""Commands in documents and docstrings are what their own parsers read."""

import contextlib
import re
import shlex

import documents
import numpy as np
import picture_folders
import pytest

from atat_jax import cli


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """Data of one's own, small, as `configs/own.py` and `imagenet.py` want them."""
  root = tmp_path_factory.mktemp("own")
  folder = picture_folders.write(root / "mine", classes=2, train=1, test=1)
  images = np.zeros((4, 8, 8, 3), np.uint8)
  arrays = {
    f"{split}_{what}": array
    for split in ("train", "test")
    for what, array in (("images", images), ("labels", np.arange(4) % 2))
  }
  np.savez(root / "mine.npz", **arrays)
  return {"folder": folder, "npz": root / "mine.npz"}


def test_every_command_is_read_by_its_own_parser(own):
  found = list(documents.commands())
  wrong = [
    f"{place}: {shlex.join(words)}: {fault}"
    for place, words in found
    if (fault := documents.fault(words, own))
  ]
  assert len(found) > 200
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
  ("command", "named"),
  [
    ("python main.py --config=digits --workdir=w --config.no=1", "config.no"),
    ("python main.py --config=digits:at7 --workdir=w", "at7"),
    (
      "python main.py --config=digits --workdir=w --config.evaluation.attacks=pg",
      "evaluation.attacks",
    ),
    (
      "python main.py --config=imagenet --workdir=w --config.data.dir=/x"
      " --config.train.num_epochs=0",
      "train.num_epochs",
    ),
    ("atat-jax report runs/at --outs=x", "--outs"),
    ("atat-jax no", "no such command"),
    ("python -m benchmarks.step --modle=wrn-10-1", "--modle"),
    ("python benchmarks/steps.py", "no such file"),
    ("python launch/local_cluster.py --devices=2 -- --config=no", "'no'"),
    ("launch/tpu_vm.sh --zne=z -- --config=digits --workdir=w", "--zne"),
    ("python -m pytest tests/fast/test_no.py", "no such file"),
    ("frobnicate", "no program"),
  ],
)
def test_a_command_that_is_wrong_is_found(command, named, own):
  assert named in documents.fault(shlex.split(command), own)


def test_a_script_is_split_into_its_commands():
  script = (
    'A="x  # no\ny"\nB=1 python a.py $A \\\n  --b=1,2:3 # why\nc && d | e; f\n'
  )
  assert documents.split(script.replace("  # no", "")) == [
    ["python", "a.py", "x", "y", "--b=1,2:3"],
    *([letter] for letter in "cdef"),
  ]


def sessions():
  """Commands behind a `$` in the documents, and what they print there."""
  for name in documents.DOCUMENTS:
    for block in documents.blocks(name, ""):
      if block.code.startswith("$ "):
        first, _, output = block.code.partition("\n")
        yield pytest.param(first[2:], output, id=f"{name}, line {block.line}")


@pytest.mark.parametrize(("command", "output"), list(sessions()))
def test_a_session_prints_what_the_document_shows(command, output, capsys):
  program, *words = shlex.split(command)
  assert program == "atat-jax"
  try:
    cli.main(words)
  except Exception as error:
    assert output == f"error: {error}\n"
  else:
    printed = capsys.readouterr().out
    assert output.rstrip() in printed, printed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_example_of_a_command_can_be_read(name, capsys, own):
  with contextlib.suppress(SystemExit):
    cli.main([name, "--help"])
  example = capsys.readouterr().out.splitlines()[-1]
  assert re.match(rf"  atat-jax {name} ", example)
  assert documents.fault(shlex.split(example), own) is None
