"""FGSM, PGD-20 and APGD-100 beside PyTorch, called as in a notebook.

  python -m benchmarks.attacks --reference=../auto-attack --model wrn-10-2 wrn-16-4

Both sides attack the same network (running statistics) with the same images and
numbers of steps. They run in turn and the ratio is the median over pairs of
runs. A second ratio compares the first calls: ours compiles.
"""

import argparse
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks.support import machine, networks, timing
from benchmarks.support.machine import number, say, whole

ATTACKS = ("fgsm", "pgd20", "apgd100")


def _ours(
  network: networks.Network, attack: str, epsilon: float
) -> Callable[[], None]:
  """Returns a function that attacks the images once by this package."""
  import jax

  from atat_jax import attacks, models

  classifier = models.classifier(network.model, network.variables)
  key = jax.random.key(0)
  images, labels = jax.device_put((network.images, network.labels))
  function, options = {
    "fgsm": (attacks.fgsm, {}),
    "pgd20": (attacks.pgd, {"step_size": epsilon / 4, "num_steps": 20}),
    "apgd100": (attacks.apgd, {"num_steps": 100}),
  }[attack]

  def run() -> None:
    jax.block_until_ready(
      function(key, classifier, images, labels, epsilon=epsilon, **options)
    )

  return run


def _peer(
  network: networks.Network, attack: str, epsilon: float
) -> Callable[[], None]:
  """Returns a function that attacks the images once by PyTorch."""
  import jax
  import torch

  from benchmarks.support import pytorch

  device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
  module = pytorch.TorchWideResNet(network.model, network.variables).to(device)
  images = torch.from_numpy(network.images.transpose(0, 3, 1, 2).copy())
  images = images.to(device)
  labels = torch.from_numpy(network.labels.astype(np.int64)).to(device)
  if attack == "apgd100":
    base = importlib.import_module("autoattack.autopgd_base")
    apgd = base.APGDAttack(
      module, n_iter=100, norm="Linf", eps=epsilon, device=device, seed=0
    )
    apgd.loss = "ce"
    run: Callable[[], Any] = lambda: apgd.perturb(images, labels)  # noqa: E731
  else:
    options = {"step_size": epsilon, "num_steps": 1, "random_start": False}
    if attack == "pgd20":
      options = {"step_size": epsilon / 4, "num_steps": 20}

    def run() -> Any:
      return pytorch.attack(module, images, labels, epsilon=epsilon, **options)

  def waited() -> None:
    run()
    if device == "cuda":
      torch.cuda.synchronize()

  return waited


def measure(
  network: networks.Network,
  attack: str,
  *,
  epsilon: float,
  repeats: int,
) -> dict[str, Any]:
  """Measures an attack on a network.

  Args:
    network: Network and one batch of images.
    attack: Name of the attack, one of `ATTACKS`.
    epsilon: Radius of the linf ball.
    repeats: Number of timed runs of each side, after the first.

  Returns:
    Plain values.
  """
  import jax

  jax.clear_caches()
  sides = [
    _ours(network, attack, epsilon),
    _peer(network, attack, epsilon),
  ]
  first = []
  for side in sides:
    began = time.perf_counter()
    side()
    first.append(time.perf_counter() - began)
  times = timing.run_in_turn(sides, repeats=repeats)
  return {
    "name": f"{attack}/{network.name}/b{len(network.labels)}",
    "first_seconds": first[0],
    "peer_first_seconds": first[1],
    "first_ratio": first[1] / first[0],
    **timing.summary(times),
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `measure` in Markdown."""
  lines = [
    [
      row["name"],
      f"{1e3 * row['seconds']:.0f}",
      f"{1e3 * row['spread']:.0f}",
      f"{1e3 * row['peer_seconds']:.0f}",
      f"{1e3 * row['peer_spread']:.0f}",
      f"{row['ratio']:.2f}",
      f"{row['ratio_spread']:.2f}",
      f"{1e3 * row['first_seconds']:.0f}",
      f"{1e3 * row['peer_first_seconds']:.0f}",
      f"{row['first_ratio']:.2f}",
    ]
    for row in rows
  ]
  header = [
    "attack",
    "ms",
    "+-",
    "peer (ms)",
    "+-",
    "peer / ours",
    "+-",
    "first call (ms)",
    "peer's (ms)",
    "peer's / ours",
  ]
  return tables.markdown([header, *lines])


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add(
    "--reference",
    help="clone of fra31/auto-attack, for apgd100; default: the installed"
    " package",
  )
  add("--model", nargs="+", default=["wrn-10-1"], metavar="wrn-DEPTH-WIDTH")
  add(
    "--attack",
    nargs="+",
    choices=ATTACKS,
    help="default: all, without apgd100 where the original package is missing",
  )
  add("--batch_size", type=whole, nargs="+", default=[128])
  add("--epsilon", type=number, default=8 / 255)
  add("--repeats", type=whole, default=7)
  return made


def _attacks(args: argparse.Namespace) -> list[str]:
  """Chooses the attacks and makes the original package importable.

  Raises:
    UserError: The original package is needed and missing.
  """
  from benchmarks.support import original

  chosen = list(args.attack or ATTACKS)
  if "apgd100" in chosen:
    try:
      original.load(args.reference)
    except UserError as error:
      if args.attack or args.reference:
        raise
      chosen.remove("apgd100")
      say(f"without apgd100: {error}")
  return chosen


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)

  def measured() -> Iterator[dict[str, Any]]:
    attacks = _attacks(args)
    for model, batch_size in itertools.product(args.model, args.batch_size):
      network = networks.random_network(model, batch_size, seed=0)
      for attack in attacks:
        say(f"{attack}, {model}, {batch_size} images")
        yield measure(
          network, attack, epsilon=args.epsilon, repeats=args.repeats
        )

  machine.run(args, measured(), table, torch=True)


if __name__ == "__main__":
  main()
