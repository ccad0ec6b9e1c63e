"""Lines of the benchmarks' plans at toy size, by one rule.

What a line does stays: its module, methods, seeds, recipes, dtypes, attacks,
peers and files. Only sizes become small:

| command | sizes |
| --- | --- |
| `benchmarks.methods` | the smallest network of the family, an epoch of two batches of 8 images, one attack step in training, 12 test images of which 4 for AutoAttack |
| `benchmarks.autoattack` | 4 images, 2 steps, 10 queries |
| `step`, `kernels`, `savings`, `attacks` | WRN-8-1, batches of 4 images of 8x8, one step, one repeat |
| `scaling`, `maps` | their flag `--smoke` |
| `first_call` | the smallest network, once |
| `certified` | an epoch, 4 images, one epsilon |

The data are a CIFAR archive of random images, and `torch.compile` is PyTorch's
eager mode, as it asks for a compiler.
"""

import pathlib
import re
import shlex

import cifar_archives

_METHODS = {
  "train.num_epochs": 1,
  "train.batch_size": 8,
  "train.validate_every_epochs": 1.0,
  "teacher.num_epochs": 1,
  "teacher.batch_size": 8,
  "teacher.validate_every_epochs": 1.0,
  "data.validation_size": 8,
  "evaluation.batch_size": 12,
  "evaluation.batch_statistics_size": 6,
  "evaluation.validation_attack": "pgd1",
}
_NETWORKS = {
  "fast": {"model.base_channels": 4},
  "modern": {"model.depth": 10, "model.width": 1},
}
_STEP = {
  "--model": ["wrn-8-1"],
  "--batch_size": ["4"],
  "--repeats": ["1"],
  "--num_steps": ["1"],
  "--size": ["8"],
}
_SMALL = {
  "step": _STEP,
  "kernels": _STEP,
  "savings": {k: _STEP[k] for k in ("--model", "--batch_size", "--repeats")},
  "attacks": {k: _STEP[k] for k in ("--model", "--batch_size", "--repeats")},
  "scaling": {"--smoke": [], "--repeats": ["1"]},
  "maps": {"--smoke": []},
  "autoattack": {
    "--num_examples": ["4"],
    "--batch_size": ["4"],
    "--num_steps": ["2"],
    "--num_queries": ["10"],
    "--epsilon": ["8/255"],
  },
  "first_call": {"--network": ["convnet"], "--repeats": ["1"]},
  "certified": {
    "--epochs": ["1"],
    "--num_examples": ["4"],
    "--epsilons": ["0.05"],
  },
  "honest": {},
}


def data(folder: pathlib.Path) -> pathlib.Path:
  """Writes archives of 24 training and 12 test images, of both CIFARs."""
  train, test = (
    cifar_archives.random_images(count, 10, seed)
    for seed, count in enumerate((24, 12))
  )
  for make in (cifar_archives.cifar10_binary, cifar_archives.cifar100_binary):
    name = make.__name__.replace("_", "-").replace("cifar10", "cifar-10")
    make(folder / f"{name}.tar.gz", train, test)
  return folder


def split(text: str, names: dict[str, str]) -> tuple[str, list[str]]:
  """Splits a line's command into its module and its arguments.

  Args:
    text: Command of the line.
    names: Values of the variables that plans may use.
  """
  for name, value in names.items():
    text = text.replace(f"${{{name}:+--reference=${name}}}", "")
    text = text.replace(f"${name}", value)
  python, flag, module, *arguments = shlex.split(text)
  assert (python, flag) == ("python", "-m"), text
  return module, arguments


def small(text: str, names: dict[str, str]) -> tuple[str, list[str]]:
  """Makes a line of a plan small; returns its module and its arguments."""
  module, arguments = split(text, names)
  kind = module.removeprefix("benchmarks.")
  if kind == "methods":
    return module, [*arguments, *_small_methods(arguments)]
  flags = [x.partition("=")[0] for x in arguments]
  if kind == "step" and "--peer" in flags:
    arguments[arguments.index("--peer") + 1] = "eager"
  more = [
    part for flag, values in _SMALL[kind].items() for part in (flag, *values)
  ]
  return module, [*arguments, *more]


def _small_methods(arguments: list[str]) -> list[str]:
  (recipe,) = (
    x.partition("=")[2] for x in arguments if x.startswith("--recipe=")
  )
  fields = {**_METHODS, **_NETWORKS[recipe]}
  fields["objective.num_steps"] = 1
  return [
    "--running_examples=4",
    *(f"--set={name}={value}" for name, value in fields.items()),
  ]


def work(module: str, arguments: list[str]) -> tuple[str, ...]:
  """Names what a line of `small` runs, whatever its seeds, numbers and folder.

  Args:
    module: Module of the line.
    arguments: Its arguments.
  """
  if module != "benchmarks.methods":
    return module, *arguments
  kept = (x for x in arguments if not re.match("--(seeds|workdir)=", x))
  return module, *(re.sub(r"(--set=.*)=[-.\de]+$", r"\1", x) for x in kept)
