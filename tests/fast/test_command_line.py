"""The command line: help on one screen, names and values as people write them."""

import fractions
import importlib
import itertools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from ml_collections.config_flags import tuple_parser

from atat_jax import (
  analyses,
  attacks,
  checkpoints,
  cli,
  config,
  data,
  errors,
  interop,
  models,
  objectives,
  optim,
  pipeline,
)
from atat_jax.cli import field_values, importing, listing, modes, shipped
from atat_jax.errors import UserError
from atat_jax.process import flag_values

WORKDIR = "--workdir=runs/none"


def pattern(message):
  """A regular expression of a message in which ".*" stands for anything."""
  return re.escape(message).replace(re.escape(".*"), ".*")


def parsed(*words, config="digits"):
  return modes.parse([f"--config={config}", WORKDIR, *words])


# --- Help --------------------------------------------------------------------


def test_the_help_needs_no_jax_and_names_every_command():
  code = (
    "import sys\nfrom atat_jax import cli\ncli.main(['--help'])\n"
    "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  for name in cli.COMMANDS:
    assert f"\n  {name} " in done.stdout


def text_of_help(name, capsys):
  try:
    cli.main([name, "--help"])
  except SystemExit as end:
    assert not end.code
  return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_is_one_screen_with_an_example(name, capsys):
  text = text_of_help(name, capsys)
  lines = text.splitlines()
  assert lines[0].startswith(f"usage: atat-jax {name} ")
  assert len(lines) <= 40
  assert [line for line in lines if len(line) > 80] == []
  assert "example" in lines[-2]
  assert lines[-1].startswith(f"  atat-jax {name} ")


@pytest.mark.parametrize("name", cli.MODES)
def test_the_example_of_a_mode_can_be_read(name, capsys):
  example = text_of_help(name, capsys).splitlines()[-1].split()[2:]
  request = modes.parse(example, mode=name)
  assert (request.mode, str(request.workdir)) == (name, "runs/digits")


def test_every_module_of_a_command_has_a_main():
  for entry in cli.COMMANDS.values():
    assert callable(importlib.import_module(entry.module).main)
  assert set(cli.MODES) == set(pipeline.MODES)


def test_main_py_is_the_same_code(capsys):
  modes.main(["--help"])
  text = capsys.readouterr().out
  assert text.startswith("usage: python main.py --config=")
  assert len(text.splitlines()) <= 40
  modes.main(["--help_fields=train.num_epochs"])
  assert "train.num_epochs = 52\n" in capsys.readouterr().out


def test_the_version_is_told(capsys):
  cli.main(["--version"])
  assert re.fullmatch(r"atat_jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


# --- Names -------------------------------------------------------------------


def swapped(name):
  """The same name with two neighbouring letters exchanged."""
  middle = len(name) // 2
  return (
    name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
  )


@pytest.mark.parametrize(
  "known",
  [
    *(cli.COMMANDS, objectives.OBJECTIVES, objectives.SETTINGS),
    *(models.MODELS, data.DATASETS, analyses.ANALYSES, attacks.ATTACKS),
  ],
  ids=lambda known: next(iter(known)),
)
def test_a_misspelt_name_is_told_from_the_others(known):
  names = [name for name in known if len(name) >= 5]
  assert names
  for name in names:
    assert errors.nearest(swapped(name), known) == name
    assert errors.nearest(name[:-1], known) is not None
    assert errors.near(swapped(name), known) == f" (did you mean {name!r}?)"


@pytest.mark.parametrize("value", ["", "zzz", "x" * 10**6, None, 7, "\0"])
def test_what_is_like_no_name_suggests_none(value):
  assert errors.near(value, attacks.ATTACKS) == ""


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["trian"], "command: 'trian'; allowed: .* (did you mean 'train'?)"),
    (["nothing"], "command: 'nothing'; allowed: run, train, .*"),
    (["fields", "lerning_rate"], "field: 'lerning_rate'; .* (did you mean '.*"),
    (
      ["fields", "--config=digit"],
      "--config: 'digit'; allowed: .* (did you mean 'digits'?)",
    ),
    (
      ["fields", "--config=digits:atta"],
      "method: 'atta'; allowed: .* (did you mean 'atat'?)",
    ),
  ],
)
def test_a_command_that_is_wrong_is_refused(words, message):
  with pytest.raises(UserError) as error:
    cli.main(words)
  assert re.fullmatch(pattern(message), str(error.value), re.S)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ["attack", "x", "--out=y", "--epsilonn=1"],
      "--epsilonn=1 (did you mean '--",
    ),
    (["attack", "x", "--out=y", "--seed=a"], "--seed: invalid int value: 'a'"),
    (["report"], "the following arguments are required: RUN"),
  ],
)
def test_a_wrong_argument_is_one_line(words, message, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(words)
  assert end.value.code == 2
  shown = capsys.readouterr()
  assert shown.out == "" and shown.err.count("\n") == 1
  assert shown.err.startswith("error: ")
  assert re.search(pattern(message), shown.err)
  assert shown.err.endswith(f"; see atat-jax {words[0]} --help\n")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ["--config.trian.num_epochs=1"],
      "config.trian.num_epochs: no such field; allowed: .* (did",
    ),
    (
      ["--config.train.num_epoch=1"],
      "; allowed: .* (did you mean 'train.num_epochs'?)",
    ),
    (["--config.learning_rate=1"], "(did you mean 'train.learning_rate'?)"),
    (
      ["--config.train.num_epochs.x=1"],
      "config.train.num_epochs.x: no such field",
    ),
    (["--noconfig.data.flop"], "(did you mean 'data.flip'?)"),
    (
      ["--config.train.num_epochs=1.5"],
      "config.train.num_epochs: '1.5'; allowed: an",
    ),
    (["--config.train.num_epochs=8/4"], "allowed: an integer"),
    (
      ["--config.evaluation.epsilon=8/0"],
      "'8/0'; allowed: a number, or a fraction",
    ),
    (
      ["--config.evaluation.epsilon=None"],
      "'None'; allowed: a number, or a frac",
    ),
    (["--config.data.flip=perhaps"], "'perhaps'; allowed: true or false"),
    (
      ["--config.figures.rounds=(1,"],
      "config.figures.rounds: '(1,'; allowed: val",
    ),
    (["--epochs=3"], "epochs"),
    (
      ["--mode=evalute"],
      "--mode: 'evalute'; allowed: .* (did you mean 'evaluate'?)",
    ),
    (["train"], "unknown argument 'train'"),
  ],
)
def test_a_wrong_flag_is_named(words, message):
  with pytest.raises(UserError) as error:
    parsed(*words)
  assert re.search(pattern(message), str(error.value), re.S)
  assert "Error" not in str(error.value)


def test_a_missing_flag_is_named():
  for words, name in (([], "--config"), (["--config=digits"], "--workdir")):
    with pytest.raises(UserError, match=f"{name} is missing"):
      modes.parse(words)


# --- Values ------------------------------------------------------------------


def half(text):
  """The double that is nearest to a fraction."""
  above, below = text.split("/")
  return float(fractions.Fraction(int(above), int(below)))


@pytest.mark.parametrize(
  ("word", "value"),
  [
    ("evaluation.epsilon=8/255", half("8/255")),
    ("evaluation.epsilon=1/4", 0.25),
    ("evaluation.epsilon=0.5/255", 0.5 / 255),
    ("train.learning_rate=1e-2", 0.01),
    ("train.learning_rate=1", 1.0),
    ("figures.epsilons=(0.1,0.2)", (0.1, 0.2)),
    ("figures.epsilons=[1/255, 8/255]", (half("1/255"), half("8/255"))),
    ("figures.epsilons=4/255,0.1", (half("4/255"), 0.1)),
    ("figures.epsilons=8/255", (half("8/255"),)),
    ("figures.epsilons=None", ()),
    ("figures.epsilons=()", ()),
    ("figures.rounds=(1,)", (1,)),
    ("figures.rounds=3", (3,)),
    ("model.strides=2,2,2", (2, 2, 2)),
    ("evaluation.batch_norm=running", ("running",)),
    ("evaluation.batch_norm=running,batch", ("running", "batch")),
    ("evaluation.batch_norm=('running',)", ("running",)),
    ("data.dir=1/2", "1/2"),
    ("data.dir=None", "None"),  # the plan takes it for none
    ("evaluation.attacks=pgd20:epsilon=8/255", "pgd20:epsilon=8/255"),
    ("data.flip=true", True),
    ("train.num_epochs=3", 3),
  ],
)
def test_a_value_is_read_as_people_write_it(word, value):
  field = word.partition("=")[0]
  made = parsed(f"--config.{word}").config
  for name in field.split("."):
    made = made[name]
  assert made == value and type(made) is type(value)
  if isinstance(value, tuple):
    assert list(map(type, made)) == list(map(type, value))


def test_values_that_were_read_before_are_read_the_same():
  parsers = [
    (field_values._Number(), flags.FloatParser()),
    (field_values._Integer(), flags.IntegerParser()),
    (field_values._Boolean(), flags.BooleanParser()),
    (field_values._Tuple(), tuple_parser.TupleParser()),
  ]
  texts = "0 1 -1 1.5 1e3 inf nan 0x10 true False yes (1,) 1,2 (1,2.5) [1] {1}"
  texts = [*texts.split(), "('a','b')", "'a'", "abc", "a-b", "((1,),)", "1_000"]
  compared = 0
  for (ours, theirs), text in itertools.product(parsers, texts):
    try:
      expected = theirs.parse(text)
    except (ValueError, TypeError):
      continue
    compared += 1
    assert repr(ours.parse(text)) == repr(expected), text
  assert compared > 30


def test_fractions_are_read_in_fields_of_networks():
  assert flag_values.assignment("std=(1/4,0.5)") == ("std", (0.25, 0.5))
  assert flag_values.assignment("family=a b") == ("family", "a b")
  assert flag_values.assignment("family=1/0") == ("family", "1/0")
  for text in ("f()", "a.b", "2**999", "(1", "x if y else z", "[" * 5000):
    with pytest.raises(ValueError):
      flag_values.literal(text)


def test_a_repeated_flag_of_a_tuple_adds_to_it():
  made = parsed(
    "--config.evaluation.batch_norm=running",
    "--config.evaluation.batch_norm=batch",
  ).config
  assert made.evaluation.batch_norm == ("running", "batch")


def test_a_network_brings_its_own_fields():
  words = ["--config.model.name=vit", "--config.model.patch_size=4"]
  made = parsed(*words, "--config.model.conv_stem=(8,16)", config="cifar10:at")
  model = made.config.model
  assert (model.patch_size, model.conv_stem) == (4, (8, 16))
  assert "num_heads" not in model  # nothing else is added
  with pytest.raises(UserError, match="patch_size: no such field"):
    parsed("--config.model.patch_size=4")
  with pytest.raises(UserError, match="num_classes: no such field"):
    parsed("--config.model.name=vit", "--config.model.num_classes=4")


def test_two_command_lines_in_one_process_do_not_meet():
  first = parsed("--config.train.num_epochs=3").config
  second = parsed("--config.train.num_epochs=4", "--step=2")
  assert (first.train.num_epochs, second.config.train.num_epochs) == (3, 4)
  assert (second.step, second.mode) == (2, "run")
  assert parsed("--mode=train").mode == "train"


# --- Configurations by name --------------------------------------------------


@pytest.mark.parametrize(
  "text",
  [
    "digits",
    "digits.py",
    "configs/digits.py",
    "digits:atat",
    "configs/digits.py:atat",
  ],
)
def test_a_shipped_configuration_is_found_anywhere(text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  expected = tiny.load_config("digits").to_json()
  assert shipped.load(text).to_json() == expected
  assert parsed(config=text).config.to_json() == expected
  words = ["--config", text, "--workdir", "x"]
  assert modes.parse(words).config.to_json() == expected


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "digits").mkdir()  # a folder of that name is no configuration
  own = tmp_path / "configs/digits.py"
  own.write_text((tiny.ROOT / "configs/digits.py").read_text())
  assert shipped.locate("configs/digits.py:at") == "configs/digits.py:at"
  found = shipped.locate("digits:at")
  assert found == f"{tiny.ROOT / 'configs/digits.py'}:at"


@pytest.mark.parametrize(
  ("text", "named"),
  [
    (
      "cifar01",
      "'cifar01'; allowed: a file, or one of .* (did you mean 'cifar10'?)",
    ),
    (
      "configs/cifar01.py",
      "'configs/cifar01.py'; .* (did you mean 'cifar10'?)",
    ),
    (
      "nothing.py:at",
      "'nothing.py'; allowed: a file, or one of cifar10, cifar100",
    ),
    ("x" * 5000, "allowed: a file"),
    ("a\0b", "allowed: a file"),
    ("", "''; allowed: a file"),
  ],
)
def test_no_such_configuration(text, named):
  with pytest.raises(UserError) as error:
    shipped.locate(text)
  assert re.search(pattern(named), str(error.value), re.S)


# --- The fields --------------------------------------------------------------


@pytest.fixture(scope="module")
def listed():
  """Every field of the default configuration, which stays as it is."""
  made = shipped.load("default")
  before = made.to_json()
  found = {field.name: field for field in listing.fields(made)}
  assert made.to_json() == before
  return found


def test_every_field_has_a_meaning_and_allowed_values(listed):
  made = shipped.load("default")
  assert list(listed) == [name for name, _ in listing._leaves(made)]
  for name, field in listed.items():
    assert field.meaning.endswith((".", '".')), name
    assert field.allowed, name


@pytest.mark.parametrize("method", objectives.OBJECTIVES)
def test_every_field_of_a_method_has_a_meaning(method):
  found = listing._meanings(shipped.load(f"default:{method}"))
  for name in objectives.defaults(method):
    assert found[f"objective.{name}"].endswith((".", '".')), name


@pytest.mark.parametrize("name", models.MODELS)
def test_every_field_of_a_network_has_a_meaning(name):
  found = listing._attributes(models.MODELS[name])
  lacking = set(models.field_names(name)) - set(found)
  assert not lacking


def test_the_names_that_are_listed_are_those_that_the_plan_takes(listed):
  made = shipped.load("default")
  assert listed["train.schedule"].allowed == ", ".join(sorted(optim.SCHEDULES))
  assert listed["model.name"].allowed == ", ".join(sorted(models.MODELS))
  for name in ("train.nonfinite", "objective.maps", "model.activation"):
    values = listed[name].allowed.split(", ")
    assert len(values) > 1
    for value in values:
      config.make_plan(listing._changed(made, name, value))
  assert listed["evaluation.epsilon"].allowed == "a number > 0"
  assert listed["train.num_epochs"].allowed == "an integer > 0"


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (8 / 255, "8/255"),
    (0.1, "0.1"),
    ((0.5, 0.75), "(0.5,0.75)"),
    ((1,), "(1,)"),
  ],
)
def test_a_value_is_shown_as_it_can_be_given(value, text):
  assert listing.shown(value) == text
  found = field_values._Tuple().parse(text)
  assert found == (value if isinstance(value, tuple) else (value,))


def test_a_part_of_a_name_lists_the_fields_that_have_it(capsys):
  cli.main(["fields", "train.ep"])
  out = capsys.readouterr().out
  assert "train.epsilon_warmup = 0.0\n" in out and "train.num_epochs" not in out
  assert out.splitlines()[-1].startswith("next: ")
  cli.main(["fields", "model.patch", "--model=vit"])
  assert capsys.readouterr().out.startswith(
    "model.patch_size = 16\n    Side of a patch in pixels.\n    allowed: "
  )
  cli.main(["fields", "lambda1", "--config=digits:tla"])
  assert capsys.readouterr().out.startswith("objective.lambda1 = 2.0\n")


# --- The work ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "evaluate", "figures", "run"])
def test_a_mode_runs_and_says_where_to_look_next(mode, monkeypatch, capsys):
  ran = []
  monkeypatch.setattr(modes.runtime, "set_up", lambda **_: None)
  monkeypatch.setattr(
    pipeline, "run", lambda *args, step: ran.append((*args, step))
  )
  cli.main([mode, "--config=digits:at", WORKDIR, "--config.seed=3"])
  ((found, made, workdir, step),) = ran
  assert (found, made.seed, made.method, step) == (mode, 3, "at", None)
  assert workdir == pathlib.Path("runs/none")
  assert capsys.readouterr().out.splitlines()[-1].startswith("next: ")


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--out="], "out: ''; allowed: a path"),
    (["--size=8"], "--size, --data-dir: without --data; allowed: with it"),
    (["--data-dir=x"], "--size, --data-dir: without --data; allowed: with"),
    (["--out=taken"], "out: taken holds checkpoints already; allowed: another"),
  ],
)
def test_import_refuses_flags_before_it_loads(
  words, said, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "taken" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match=pattern(said)):
    importing.main(["gone.pth", *words])


def test_imported_weights_are_a_checkpoint(tmp_path, capsys):
  from bad_values import World

  world = World(tmp_path)
  out = tmp_path / "imported"
  cli.main(["import", str(world.weights), f"--out={out}"])
  shown = capsys.readouterr().out
  assert "network:     wide_resnet, " in shown
  assert "8 x 7 pixels, " in importing.describe(world.loaded, (8, 7, 1))
  assert shown.splitlines()[-1].startswith(f"next: atat-jax attack {out} ")
  model, variables = checkpoints.restore_model(out)
  shape = (32, 32, 1)
  assert checkpoints.model_spec("", model, shape) == checkpoints.model_spec(
    "", world.loaded.model, shape
  )
  expected = world.loaded.variables
  assert jax.tree.structure(variables) == jax.tree.structure(dict(expected))
  for found, wanted in zip(
    jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(found, wanted)
  with pytest.raises(UserError, match="holds checkpoints already"):
    importing.write(world.loaded, out)
  # ... and back.
  written = tmp_path / "exported"
  cli.main(["export", str(out), f"--out={written}", "--name=net"])
  assert capsys.readouterr().out.splitlines()[-1].startswith("next: ")
  again = interop.load(written / "net.safetensors").variables
  jax.tree.map(np.testing.assert_array_equal, again, dict(expected))
