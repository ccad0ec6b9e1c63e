"""Seconds of the first call of an attack in a fresh process, caches off.

  python -m benchmarks.first_call --network convnet --attack fgsm

Imports, weights and images are not counted. On a machine with other work the
CPU seconds, of all threads, say more than those of the clock.
"""

import argparse
import time
from typing import Any

NETWORKS = ("convnet", "wrn-10-1", "wrn-16-4")


def _network(name: str) -> Any:
  """A flax network, the user's own or one of this package."""
  from flax import linen as nn

  from atat_jax import models

  if name != "convnet":
    depth, width = map(int, name.split("-")[1:])
    return models.create("wide_resnet", depth=depth, width=width)

  class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
      del train
      x = nn.relu(nn.Conv(16, (3, 3))(x))
      x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
      return nn.Dense(10)(x.mean((1, 2)))

  return ConvNet()


def measure(network: str, attack: str) -> dict[str, float]:
  """Calls an attack twice.

  Args:
    network: One of `NETWORKS`.
    attack: "fgsm" or "pgd" (10 steps).

  Returns:
    Seconds of the clock and of the CPU for the first call and the second, and
    the number of programs that the first compiled.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from atat_jax import attacks, models

  jax.config.update("jax_enable_compilation_cache", False)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
      compiled.append(seconds)
      if event.endswith("/backend_compile_duration")
      else None
    )
  )
  model = _network(network)
  images = jax.random.uniform(jax.random.key(0), (32, 32, 32, 3))
  labels = jnp.arange(32) % 10
  variables = jax.jit(model.init)(jax.random.key(1), images)
  classifier = models.classifier(model, variables)
  key = jax.random.key(2)
  numbers: dict[str, Any] = {"epsilon": 8 / 255}
  if attack == "pgd":
    numbers |= {"step_size": 2 / 255, "num_steps": 10}
  function = getattr(attacks, attack)
  jax.block_until_ready((variables, images, labels, key))
  compiled.clear()
  found: dict[str, float] = {}
  for call in ("first", "second"):
    began, worked = time.perf_counter(), time.process_time()
    result = function(key, classifier, images, labels, **numbers)
    np.asarray(result)
    found[f"{call} (s)"] = time.perf_counter() - began
    found[f"{call}, CPU (s)"] = time.process_time() - worked
    found.setdefault("programs", len(compiled))
  return found


def main() -> None:
  """Prints one line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--network", choices=NETWORKS, default="convnet")
  parser.add_argument("--attack", choices=("fgsm", "pgd"), default="fgsm")
  args = parser.parse_args()
  found = measure(args.network, args.attack)
  numbers = ", ".join(f"{name} {x:.3g}" for name, x in found.items())
  print(f"{args.network} {args.attack}: {numbers}")


if __name__ == "__main__":
  main()
