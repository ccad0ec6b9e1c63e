"""Collectives of the sharded train step on simulated devices.

  python tests/support/collectives_of_a_step.py 64

prints them for so many devices, for both statistics of the attack.
"""

import functools
import json
import os
import sys
from typing import Any

NUM_NORMS, NUM_STEPS = 2, 3


def _network() -> Any:
  from flax import linen as nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
      for number in range(1, NUM_NORMS + 1):
        x = nn.Conv(8, (3, 3), name=f"conv{number}")(x)
        x = nn.BatchNorm(not train, momentum=0.9, name=f"bn{number}")(x)
        x = nn.tanh(x)
      return nn.Dense(3, name="head")(x.mean((1, 2)))

  return Net()


def find(devices: Any, attack_batch_norm: str) -> dict[str, Any]:
  """Compiles a step for devices; returns its collectives and its sizes."""
  import jax
  import jax.numpy as jnp
  import optax
  import quick

  from atat_jax import objectives, sharding, state, steps
  from atat_jax.data.base import Split
  from benchmarks.support import collectives

  batch = 2 * len(devices)
  model, mesh = _network(), sharding.make_mesh(devices)
  objective = objectives.create(
    "at",
    num_steps=NUM_STEPS,
    attack_batch_norm=attack_batch_norm,
    attack_moves_statistics=attack_batch_norm == "batch",
  )
  optimizer = optax.sgd(0.1, momentum=0.9)
  build = functools.partial(
    state.build,
    model=model,
    optimizer=optimizer,
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    averages=False,
    guarded=False,
  )
  made = jax.eval_shape(
    lambda: build(jax.random.key(0), jnp.zeros((1, 6, 6, 1)), None)
  )
  everywhere = sharding.replicated(mesh)
  current, pixels, labels = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    (
      made,
      jax.ShapeDtypeStruct((batch, 6, 6, 1), jnp.uint8),
      jax.ShapeDtypeStruct((batch,), jnp.int32),
    ),
  )
  indices = jax.ShapeDtypeStruct(
    (batch,), jnp.int32, sharding=sharding.batch_sharding(mesh, batch)
  )
  step = functools.partial(
    steps.train_step,
    model=model,
    objective=objective,
    optimizer=optimizer,
    mesh=mesh,
    num_classes=3,
  )
  program = quick.jit(step, donate_argnums=0, out_shardings=everywhere)
  compiled = program.lower(current, None, Split(pixels, labels), indices)
  layers = {
    layer: [4 * leaf.size for leaf in jax.tree.leaves(leaves)]
    for layer, leaves in made.params.items()
  }
  found = collectives.find(compiled.compile().as_text())
  return {"collectives": found, "layers": layers}


def check(found: dict[str, Any], attack_batch_norm: str) -> str:
  """Checks what the step sends; returns it in words."""
  everything = found["collectives"]
  assert {one.kind for one in everything} <= {"all-reduce"}, everything
  inside = [one for one in everything if one.loops]
  outside = [one for one in everything if not one.loops]
  if attack_batch_norm == "running":
    assert not inside, inside
  else:
    # Sums of values and of squares, once forward and once backward.
    assert len(inside) == 2 * NUM_NORMS, inside
    assert all(_of_batch_norm(one) and one.size == 64 for one in inside)
  # The backward sums are the gradients of BatchNorm's scale and bias, too.
  norms = [one for one in outside if _of_batch_norm(one)]
  assert len(norms) == 2 * NUM_NORMS, outside
  flags = [one for one in outside if one.origin.endswith("reduce_and")]
  assert len(flags) == 1 and flags[0].size <= 8, outside
  (gradient,) = (one for one in outside if one not in norms + flags)
  # Each array of all other layers once, and single numbers of the metrics.
  arrays = sorted(
    size
    for layer, sizes in found["layers"].items()
    if "bn" not in layer
    for size in sizes
  )
  assert sorted(size for size in gradient.sizes if size > 4) == arrays, gradient
  return (
    f"attack {attack_batch_norm}: {len(inside)} all-reduces in a step of PGD,"
    f" all of BatchNorm; outside {len(norms)} of BatchNorm, 1 of the gradient"
    f" ({len(arrays)} arrays and {len(gradient.sizes) - len(arrays)} sums), 1"
    " whether all is finite"
  )


def _of_batch_norm(one: Any) -> bool:
  return "bn" in one.origin and "conv" not in one.origin


if __name__ == "__main__":
  number = int(sys.argv[1])
  os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={number} "
    + os.environ.get("XLA_FLAGS", "")
  )
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  assert len(jax.devices()) == number
  for mode in ("batch", "running"):
    print(json.dumps(check(find(jax.devices(), mode), mode)))
