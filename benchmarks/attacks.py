"""FGSM, PGD-20 and APGD-100 beside PyTorch, as notebooks call them.

  python -m benchmarks.attacks --reference=../auto-attack --model wrn-10-2 wrn-16-4

The same network (running statistics), images and numbers of steps; both sides
run in turn and the ratio is that of each pair of runs. A second ratio counts
the first call of ours, which compiles, against the first of PyTorch's.
"""

import argparse
import importlib
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.errors import UserError
from benchmarks import setting, timing
from benchmarks.setting import number, say, whole

ATTACKS = ("fgsm", "pgd20", "apgd100")


def _ours(network: setting.Network, attack: str, epsilon: float) -> Any:
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
  network: setting.Network, attack: str, epsilon: float
) -> Callable[[], None]:
  import jax
  import torch

  from benchmarks import torch_step
  from benchmarks.torch_wide_resnet import TorchWideResNet

  device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
  module = TorchWideResNet(network.model, network.variables).to(device)
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
      return torch_step.attack(
        module, images, labels, epsilon=epsilon, **options
      )

  def waited() -> None:
    run()
    if device == "cuda":
      torch.cuda.synchronize()

  return waited


def measure(
  network: setting.Network,
  attack: str,
  *,
  epsilon: float,
  repeats: int,
) -> dict[str, Any]:
  """Measures an attack on a network.

  Args:
    network: With the images, one batch.
    attack: Of `ATTACKS`.
    epsilon: Radius.
    repeats: Timed runs of each side, after the first.

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
  """A Markdown table of what `measure` returned."""
  from benchmarks.comparison import markdown

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
  return markdown(header, lines)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add(
    "--reference",
    help="folder of a clone of fra31/auto-attack, for apgd100; default: the"
    " installed package",
  )
  add("--model", nargs="+", default=["wrn-10-1"], metavar="wrn-DEPTH-WIDTH")
  add("--attack", nargs="+", default=list(ATTACKS), choices=ATTACKS)
  add("--batch_size", type=whole, nargs="+", default=[128])
  add("--epsilon", type=number, default=8 / 255)
  add("--repeats", type=whole, default=7)
  add("--threads", type=whole, help="cores of both; default: all allowed")
  add("--out", type=pathlib.Path, help="JSON file for all of it")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  from benchmarks import original

  args = parser().parse_args(argv)

  def measured() -> Iterator[dict[str, Any]]:
    for model, batch_size in itertools.product(args.model, args.batch_size):
      network = setting.random_network(model, batch_size, seed=0)
      for attack in args.attack:
        say(f"{attack}, {model}, {batch_size} images")
        yield measure(
          network, attack, epsilon=args.epsilon, repeats=args.repeats
        )

  try:
    cores = setting.start(args.threads, cache=False)
    if "apgd100" in args.attack:
      original.load(args.reference)
    setting.report(measured(), table, cores=cores, out=args.out)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
