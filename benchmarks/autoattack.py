"""AutoAttack here and the original in PyTorch, side by side in one process.

  python benchmarks/autoattack.py --reference=../auto-attack --workdir=runs/atat \\
    --num_examples=1000 --warm --out=benchmarks/results/autoattack.json

The same network (the flax weights in a PyTorch module), the same images,
batches, numbers of steps and cores; first ours, then the original. Prints the
accuracies and the times of both, and writes all of it as JSON.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]

if __name__ == "__main__":
  # This folder leads the path of a script, and in it "autoattack" is this file.
  kept = [
    p for p in sys.path if pathlib.Path(p).resolve() != ROOT / "benchmarks"
  ]
  sys.path[:] = [str(ROOT), *kept]

from atat_jax.errors import UserError  # noqa: E402
from benchmarks import comparison, setting  # noqa: E402
from benchmarks.setting import number, say, whole  # noqa: E402

EPSILONS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}


def named(text: str) -> tuple[str, str]:
  """A run directory and its name: "name=path", or the path's last part."""
  name, separator, path = text.partition("=")
  if separator and name and "/" not in name:
    return name, path
  return pathlib.Path(text).resolve().name, text


def parser() -> argparse.ArgumentParser:
  """The flags."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add(
    "--workdir",
    action="append",
    default=[],
    type=named,
    metavar="[NAME=]DIR",
    help="run directory with a checkpoint (the best is taken); may be repeated",
  )
  add(
    "--model",
    action="append",
    default=[],
    metavar="wrn-DEPTH-WIDTH",
    help="a network of random weights on random images, for smoke tests",
  )
  add("--reference", metavar="DIR", help="folder that holds `autoattack`")
  add("--data_dir", help="where the data are; default: as the run has it")
  add("--norm", choices=list(EPSILONS), default="linf")
  add("--epsilon", type=number, help="default: 8/255, 0.5 (l2), 12 (l1)")
  which = made.add_mutually_exclusive_group()
  which.add_argument(
    "--version", choices=["standard", "fast", "plus"], default="standard"
  )
  which.add_argument(
    "--attacks", help="names separated by commas, with the standard numbers"
  )
  add(
    "--num_examples", type=whole, default=1000, help="first of the test split"
  )
  add("--batch_size", type=whole, default=250, help="of both")
  add("--threads", type=whole, help="cores of both; default: all allowed")
  add("--num_steps", type=whole, help="of APGD and FAB, on both sides")
  add("--num_queries", type=whole, help="of Square, on both sides")
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
    help="let JAX's cache on disk stay on: the first run may not compile",
  )
  add("--seed", type=int, default=0)
  add("--out", type=pathlib.Path, help="JSON file for all of it")
  return made


def trained_network(
  name: str, workdir: str, num_examples: int, data_dir: str | None
) -> setting.Network:
  """A network from a run directory, on the test split of its data.

  Args:
    name: For the tables.
    workdir: The directory, or the teacher's within one.
    num_examples: At most so many, the first ones.
    data_dir: Where the data are; None: as the run's configuration has it.

  Returns:
    The network.
  """
  from atat_jax import checkpoints, data

  folder = pathlib.Path(workdir).resolve()
  step = checkpoints.checkpoint_step(folder, which="best")
  model, variables = checkpoints.restore_model(folder, step=step)
  model = model.clone(dtype=np.float32)  # as the original computes
  configs = [f / "config.json" for f in (folder, folder.parent)]
  path = next((path for path in configs if path.is_file()), None)
  if path is None:
    raise UserError(f"workdir: no config.json in {folder} or above it")
  config = json.loads(path.read_text(encoding="utf-8"))["data"]
  split = data.load(
    config["name"],
    data_dir=data_dir or config["dir"],
    cache_dir=config["cache_dir"],
    validation_size=config["validation_size"],
    source=config["source"],
  ).test
  images = split.images[:num_examples].astype(np.float32) / 255
  return setting.Network(
    name,
    f"{workdir}, step {step}; {config['name']}, test split",
    model,
    variables,
    images,
    split.labels[:num_examples],
  )


class Ours:
  """Runs the attacks of this package on one device.

  Args:
    network: What is attacked.
    args: The flags.
    attacks: The attacks' names.
  """

  def __init__(
    self,
    network: setting.Network,
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
    if event == setting.COMPILATION:
      self._compiled.append(seconds)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] to logits [B, K]."""
    return np.asarray(self._logits(self._classifier, images))

  def run(self) -> comparison.Side:
    """Runs AutoAttack."""
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
  """The same network in PyTorch.

  Args:
    network: What is attacked.
    device: "cpu" or "cuda".
    freeze: Whether its weights ask for no gradients.
  """

  def __init__(self, network: setting.Network, device: str, *, freeze: bool):
    from benchmarks.torch_wide_resnet import TorchWideResNet

    self.device = device
    self.module = TorchWideResNet(network.model, network.variables).to(device)
    if freeze:
      self.module.requires_grad_(False)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] to logits [B, K]."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
      return self.module(x.to(self.device)).cpu().numpy()


def _in_batches(logits: Any, images: np.ndarray, size: int) -> np.ndarray:
  starts = range(0, len(images), size)
  return np.concatenate([logits(images[i : i + size]) for i in starts])


def _largest(side: comparison.Side, images: np.ndarray, norm: str) -> float:
  """The norm of the largest perturbation."""
  delta = np.abs(side.adversarial.astype(np.float64) - images)
  delta = delta.reshape(len(images), -1)
  lengths = {
    "linf": delta.max(-1),
    "l2": np.sqrt(np.square(delta).sum(-1)),
    "l1": delta.sum(-1),
  }
  return float(lengths[norm].max())


def _tell(name: str, side: comparison.Side) -> None:
  accuracies = (f"{part} {100 * a:.2f} %" for part, a in side.accuracy.items())
  say(f"{name}: {', '.join(accuracies)}; {side.everything:.1f} s")


def compare(
  network: setting.Network,
  args: argparse.Namespace,
  attacks: Sequence[str],
  module: Any,
) -> comparison.Comparison:
  """Runs both sides on a network, one after the other.

  Args:
    network: What is attacked.
    args: The flags.
    attacks: The attacks' names.
    module: The original package.

  Returns:
    What they found.
  """
  import jax

  from benchmarks import original

  images, labels, name = network.images, network.labels, network.name
  ours = Ours(network, args, attacks)
  device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
  twin = Twin(network, device, freeze=args.freeze)
  first = images[: args.batch_size]
  distance = float(np.abs(ours.logits(first) - twin.logits(first)).max())
  say(f"{name}: logits of both differ by at most {distance:.1e}")

  jax.clear_caches()  # a network before this one may have had the same programs
  load = {"ours": os.getloadavg()[0]}
  say(f"{name}: ours, {len(images)} examples, {', '.join(attacks)}")
  cold = ours.run()
  _tell(f"{name}: ours", cold)
  warm = None
  if args.warm:
    load["warm"] = os.getloadavg()[0]
    say(f"{name}: ours again")
    warm = ours.run()
    _tell(f"{name}: ours, warm", warm)
    if not np.array_equal(warm.robust, cold.robust):
      say(f"{name}: WARNING: the two runs of ours differ")
  load["reference"] = os.getloadavg()[0]
  say(f"{name}: reference")
  reference = original.run(
    module,
    twin.module,
    images,
    labels,
    epsilon=args.epsilon,
    norm=args.norm,
    version="plus" if args.version == "plus" else "standard",
    attacks=attacks,
    batch_size=args.batch_size,
    seed=args.seed,
    device=device,
    num_steps=args.num_steps,
    num_queries=args.num_queries,
    say=lambda line: say(f"{name}: reference: {line}"),
  )
  _tell(f"{name}: reference", reference)

  crossed = {}
  for side, found, judge in (
    ("ours", cold, twin.logits),
    ("reference", reference, ours.logits),
  ):
    fallen = (found.adversarial != images).any((1, 2, 3))
    logits = _in_batches(judge, found.adversarial, args.batch_size)
    wrong = logits.argmax(-1) != labels
    crossed[side] = {
      "adversarial": int(fallen.sum()),
      "fool_the_other_network": int((fallen & wrong).sum()),
      "largest_perturbation": _largest(found, images, args.norm),
    }
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
      "images": crossed,
      "repeatable": None
      if warm is None
      else bool(np.array_equal(warm.robust, cold.robust)),
      "load_average_at_start": load,
    },
  )


def _run(args: argparse.Namespace) -> None:
  if not args.workdir and not args.model:
    raise UserError("workdir: missing; name a run with --workdir")
  if args.epsilon is None:
    args.epsilon = EPSILONS[args.norm]
  cores = setting.start(args.threads, cache=args.compilation_cache)
  from atat_jax import checks
  from atat_jax.attacks.autoattack import versions
  from atat_jax.runs import files
  from benchmarks import original

  attacks = list(versions.VERSIONS[args.version])
  if args.attacks:
    attacks = args.attacks.split(",")
    for name in attacks:
      checks.choice("attacks", name, versions.NAMES)
  module = original.load(args.reference)
  networks = [
    trained_network(name, path, args.num_examples, args.data_dir)
    for name, path in args.workdir
  ]
  networks += [
    setting.random_network(name, args.num_examples, args.seed)
    for name in args.model
  ]
  settings = {
    "version": None if args.attacks else args.version,
    "attacks": attacks,
    **{
      name: getattr(args, name)
      for name in (
        "batch_size",
        "num_steps",
        "num_queries",
        "seed",
        "freeze",
        "compilation_cache",
      )
    },
  }
  results = {
    **setting.describe(cores),
    "reference": {"sha256": original.digest(module)},
    "settings": settings,
    "networks": [],
  }
  found: list[comparison.Comparison] = []
  for network in networks:
    found.append(compare(network, args, attacks, module))
    results["networks"] = [one.as_json() for one in found]
    if args.out is not None:
      files.write_json(args.out, results)
  print(report(found))
  if args.out is not None:
    print(f"\nresults: {args.out}")


def report(found: Sequence[comparison.Comparison]) -> str:
  """The tables, and whether each side's images fool the other's network."""
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
  try:
    _run(args)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
