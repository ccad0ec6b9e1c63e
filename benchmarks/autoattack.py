"""AutoAttack here and the original in PyTorch, side by side in one process.

  python benchmarks/autoattack.py --reference=../auto-attack --workdir=runs/atat \\
    --num_examples=1000 --warm --out=autoattack.json

Both attack the same network (the flax weights in a PyTorch module) with the same
images, batches, numbers of steps and cores; ours runs first. Prints accuracies
and times of both, and writes everything as JSON after each network.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

if __name__ == "__main__" and not __package__:
  # The script's folder leads the path, and in it "autoattack" is this file.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from atat_jax.errors import UserError
from atat_jax.runs import files
from benchmarks.support import comparison, machine, networks
from benchmarks.support.machine import number, say, whole

EPSILONS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""Default radius for each norm."""

_SETTINGS = (
  "batch_size",
  "num_steps",
  "num_queries",
  "seed",
  "freeze",
  "compilation_cache",
)


def named(text: str) -> tuple[str, str]:
  """Parses "name=path" or "path", whose last part is then the name."""
  name, separator, path = text.partition("=")
  if separator and name and "/" not in name:
    return name, path
  return pathlib.Path(text).resolve().name, text


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add(
    "--workdir",
    action="append",
    default=[],
    type=named,
    metavar="[NAME=]DIR",
    help="run directory, whose best checkpoint is taken; may be repeated",
  )
  add(
    "--model",
    action="append",
    default=[],
    metavar="wrn-DEPTH-WIDTH",
    help="network with random weights on random images, for smoke tests; also"
    " one of flax's own layers, such as resnet-20",
  )
  add("--data_dir", help="folder of the data; default: the run's")
  add(
    "--num_examples",
    type=whole,
    default=1000,
    help="number of images, the first ones of the test split",
  )


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  _add_network_flags(made)
  add = made.add_argument
  add("--reference", metavar="DIR", help="clone of fra31/auto-attack")
  add("--norm", choices=list(EPSILONS), default="linf")
  add("--epsilon", type=number, help="default: 8/255, 0.5 (l2), 12 (l1)")
  which = made.add_mutually_exclusive_group()
  which.add_argument(
    "--version",
    choices=["standard", "fast", "quick", "plus"],
    default="standard",
    help="attacks; their numbers on our side, the original has its own",
  )
  which.add_argument(
    "--attacks",
    help="names separated by commas, with the standard numbers of steps",
  )
  add("--batch_size", type=whole, default=250, help="images per batch")
  add("--num_steps", type=whole, help="steps of APGD and FAB, on both sides")
  add("--num_queries", type=whole, help="queries of Square, on both sides")
  add("--warm", action="store_true", help="run ours twice, to time it compiled")
  add(
    "--freeze",
    action="store_true",
    help="requires_grad=False for PyTorch's weights, which the attacks do not"
    " need; default: as PyTorch makes them",
  )
  add(
    "--compilation_cache",
    action="store_true",
    help="keep JAX's cache on disk on: the first run may not compile",
  )
  add("--seed", type=int, default=0)
  return made


def trained_network(
  name: str, workdir: str, num_examples: int, data_dir: str | None
) -> networks.Network:
  """Restores a network from a run directory, with its test images.

  Args:
    name: Name in the tables.
    workdir: Run directory, or the teacher's within one.
    num_examples: Largest number of images.
    data_dir: Folder of the data; None: the run's.

  Returns:
    The network.

  Raises:
    UserError: No configuration beside the checkpoint.
  """
  from atat_jax import checkpoints, data
  from atat_jax.runs import configuration

  folder = pathlib.Path(workdir).resolve()
  step = checkpoints.checkpoint_step(folder, which="best")
  model, variables = checkpoints.restore_model(folder, step=step)
  model = model.clone(dtype=np.float32)  # the original computes in float32
  arguments = configuration.read(folder).data
  if data_dir:
    arguments["data_dir"] = data_dir
  split = data.load(**arguments).test
  images = split.images[:num_examples].astype(np.float32) / 255
  return networks.Network(
    name,
    f"{workdir}, step {step}; {arguments['name']}, test split",
    model,
    variables,
    images,
    split.labels[:num_examples],
  )


class Ours:
  """AutoAttack of this package on one device.

  Args:
    network: Network and images to attack.
    args: Flags of the command.
    attacks: Names of the attacks.
  """

  def __init__(
    self,
    network: networks.Network,
    args: argparse.Namespace,
    attacks: Sequence[str],
  ):
    import jax

    from atat_jax import compilation, models

    self._network, self._args = network, args
    self._version = attacks if args.attacks else args.version
    steps, queries = args.num_steps, args.num_queries
    self._options = {
      name: {"num_queries": queries}
      if name == "square"
      else {"num_steps": steps}
      for name in attacks
      if (queries if name == "square" else steps) is not None
    }
    self._classifier = models.classifier(network.model, network.variables)
    self._logits = compilation.jit(lambda classifier, x: classifier(x))
    self._compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def _on_event(self, event: str, seconds: float, **_: Any) -> None:
    if event == machine.COMPILATION:
      self._compiled.append(seconds)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Computes logits [B, K] of images [B, H, W, C]."""
    return np.asarray(self._logits(self._classifier, images))

  def run(self) -> comparison.Side:
    """Runs the attacks."""
    import jax

    from atat_jax import sharding
    from atat_jax.attacks.autoattack.run import autoattack

    args, network = self._args, self._network
    self._compiled.clear()
    began, cpu = time.perf_counter(), time.process_time()
    found = autoattack(
      jax.random.key(args.seed),
      self._classifier,
      network.images,
      network.labels,
      epsilon=args.epsilon,
      norm=args.norm,
      version=self._version,
      options=self._options,
      batch_size=args.batch_size,
      mesh=sharding.make_mesh(jax.devices()[:1]),
      progress=sys.stderr.isatty(),
    )
    everything = time.perf_counter() - began
    cpu = time.process_time() - cpu
    return comparison.Side(
      robust=found.robust,
      adversarial=found.adversarial,
      accuracy=dict(found.robust_accuracy),
      seconds=dict(found.seconds),
      everything=everything,
      cpu=cpu,
      compiling=sum(self._compiled),
      warnings=tuple(found.warnings),
    )


class Twin:
  """Copy of a network in PyTorch.

  Args:
    network: Network to copy.
    device: "cpu" or "cuda".
    freeze: Whether gradients of the weights are turned off.
  """

  def __init__(self, network: networks.Network, device: str, *, freeze: bool):
    from benchmarks.support import pytorch

    self.device = device
    module = pytorch.copy(network.model, network.variables)
    self.module = module.to(device)
    if freeze:
      self.module.requires_grad_(False)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Computes logits [B, K] of images [B, H, W, C]."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
      return self.module(x.to(self.device)).cpu().numpy()


def _in_batches(logits: Any, images: np.ndarray, size: int) -> np.ndarray:
  starts = range(0, len(images), size)
  return np.concatenate([logits(images[i : i + size]) for i in starts])


def _largest(side: comparison.Side, images: np.ndarray, norm: str) -> float:
  """Returns the norm of the largest perturbation."""
  delta = np.abs(side.adversarial.astype(np.float64) - images)
  delta = delta.reshape(len(images), -1)
  lengths = {
    "linf": delta.max(-1),
    "l2": np.sqrt(np.square(delta).sum(-1)),
    "l1": delta.sum(-1),
  }
  return float(lengths[norm].max())


def _tell(name: str, side: comparison.Side) -> None:
  """Prints accuracies and time of a side."""
  accuracies = (f"{part} {100 * a:.2f} %" for part, a in side.accuracy.items())
  say(f"{name}: {', '.join(accuracies)}; {side.everything:.1f} s")


def compare(
  network: networks.Network,
  args: argparse.Namespace,
  attacks: Sequence[str],
  module: Any,
) -> comparison.Comparison:
  """Runs both sides on a network, one after the other.

  Args:
    network: Network and images to attack.
    args: Flags of the command.
    attacks: Names of the attacks.
    module: The original package.

  Returns:
    Results of both.
  """
  import jax

  images, name = network.images, network.name
  ours = Ours(network, args, attacks)
  device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
  twin = Twin(network, device, freeze=args.freeze)
  first = images[: args.batch_size]
  distance = float(np.abs(ours.logits(first) - twin.logits(first)).max())
  say(f"{name}: logits of both differ by at most {distance:.1e}")

  jax.clear_caches()  # an earlier network may have had the same programs
  load = {"ours": os.getloadavg()[0]}
  say(f"{name}: ours, {len(images)} examples, {', '.join(attacks)}")
  cold, warm = ours.run(), None
  _tell(f"{name}: ours", cold)
  if args.warm:
    load["warm"] = os.getloadavg()[0]
    warm = ours.run()
    _tell(f"{name}: ours, warm", warm)
  load["reference"] = os.getloadavg()[0]
  reference = _run_reference(network, twin, args, attacks, module)
  _tell(f"{name}: reference", reference)
  return comparison.Comparison(
    name,
    args.norm,
    args.epsilon,
    cold,
    reference,
    warm,
    details={
      "source": network.source,
      "largest_logit_difference": distance,
      "images": {
        "ours": _transfer(network, cold, twin.logits, args),
        "reference": _transfer(network, reference, ours.logits, args),
      },
      "repeatable": _repeatable(name, cold, warm),
      "load_average_at_start": load,
    },
  )


def _repeatable(
  name: str, cold: comparison.Side, warm: comparison.Side | None
) -> bool | None:
  """Whether two runs of ours agree; None if there was one only."""
  if warm is None:
    return None
  same = bool(np.array_equal(warm.robust, cold.robust))
  if not same:
    say(f"{name}: WARNING: the two runs of ours differ")
  return same


def _run_reference(
  network: networks.Network,
  twin: Twin,
  args: argparse.Namespace,
  attacks: Sequence[str],
  module: Any,
) -> comparison.Side:
  """Runs the original package on the PyTorch network."""
  from benchmarks.support import original

  adversary = original.make(
    module,
    twin.module,
    epsilon=args.epsilon,
    norm=args.norm,
    version="plus" if args.version == "plus" else "standard",
    attacks=attacks,
    seed=args.seed,
    device=twin.device,
    num_steps=args.num_steps,
    num_queries=args.num_queries,
  )
  return original.run(
    module,
    adversary,
    network.images,
    network.labels,
    batch_size=args.batch_size,
    say=lambda line: say(f"{network.name}: reference: {line}"),
  )


def _transfer(
  network: networks.Network,
  side: comparison.Side,
  logits: Any,
  args: argparse.Namespace,
) -> dict[str, Any]:
  """Counts a side's adversarial images, and those that fool the other network.

  Args:
    network: Network and clean images.
    side: Result whose images are judged.
    logits: Function of the other side's network.
    args: Flags of the command.

  Returns:
    Plain values.
  """
  fooled = (side.adversarial != network.images).any((1, 2, 3))
  found = _in_batches(logits, side.adversarial, args.batch_size)
  wrong = found.argmax(-1) != network.labels
  return {
    "adversarial": int(fooled.sum()),
    "fool_the_other_network": int((fooled & wrong).sum()),
    "largest_perturbation": _largest(side, network.images, args.norm),
  }


def _attacks(args: argparse.Namespace) -> list[str]:
  """Returns the names of the attacks.

  Raises:
    UserError: Unknown name.
  """
  from atat_jax import checks
  from atat_jax.attacks.autoattack import versions

  if not args.attacks:
    return list(versions.VERSIONS[args.version].attacks)
  names = args.attacks.split(",")
  for name in names:
    checks.choice("attacks", name, versions.NAMES)
  return names


def _run(args: argparse.Namespace) -> None:
  if not args.workdir and not args.model:
    raise UserError("workdir: missing; name a run with --workdir")
  if args.epsilon is None:
    args.epsilon = EPSILONS[args.norm]
  machine.check_out(args.out)
  cores = machine.start(args.threads, cache=args.compilation_cache)
  from benchmarks.support import original

  attacks, module = _attacks(args), original.load(args.reference)
  todo = [
    trained_network(name, path, args.num_examples, args.data_dir)
    for name, path in args.workdir
  ]
  todo += [
    networks.random_network(name, args.num_examples, args.seed)
    for name in args.model
  ]
  results = {
    **machine.describe(cores),
    "reference": {"sha256": original.digest(module)},
    "settings": {
      "version": None if args.attacks else args.version,
      "attacks": attacks,
      **{name: getattr(args, name) for name in _SETTINGS},
    },
  }
  found: list[comparison.Comparison] = []
  for network in todo:
    found.append(compare(network, args, attacks, module))
    if args.out is not None:
      done = [one.as_json() for one in found]
      files.write_json(args.out, results | {"networks": done})
  print(report(found))
  if args.out is not None:
    print(f"\nresults: {args.out}")


def report(found: Sequence[comparison.Comparison]) -> str:
  """Returns the tables, and how each side's images transfer to the other."""
  lines = [
    comparison.parity_table(found),
    comparison.attack_table(found),
    comparison.speed_table(found),
  ]
  for one in found:
    ours, reference = (one.details["images"][s] for s in ("ours", "reference"))
    lines.append(
      f"{one.network}: {ours['fool_the_other_network']} of our"
      f" {ours['adversarial']} adversarial images fool the PyTorch network,"
      f" {reference['fool_the_other_network']} of the reference's"
      f" {reference['adversarial']} the flax network."
    )
  return "\n\n".join(["", *lines])


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  with machine.plain_errors():
    _run(args)


if __name__ == "__main__":
  main()
