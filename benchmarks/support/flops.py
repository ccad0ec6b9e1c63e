"""Floating-point operations of a network, counted from its jaxpr.

Counts the multiplications and additions of convolutions and matrix products;
element-wise operations are left out, as usual for model FLOPs.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.extend import core

from atat_jax.objectives import Objective
from atat_jax.typing import Variables


def _equations(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        if isinstance(inner, core.ClosedJaxpr):
          yield from _equations(inner.jaxpr)
        elif isinstance(inner, core.Jaxpr):
          yield from _equations(inner)


def _count(equation: Any) -> int:
  if equation.primitive.name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    output = equation.outvars[0].aval.shape
    return 2 * math.prod(output) * math.prod(kernel) // features
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    output = equation.outvars[0].aval.shape
    return 2 * math.prod(output) * math.prod(left[i] for i in contracted)
  return 0


def forward(
  model: nn.Module, variables: Variables, shape: tuple[int, ...]
) -> int:
  """Counts the operations of one image's forward pass.

  Args:
    model: Flax module; its convolutions are counted as direct sums, in
      whatever form they are computed.
    variables: Collections of the module, arrays or shapes.
    shape: Shape of an image, [H, W, C].

  Returns:
    Number of operations.
  """
  if hasattr(model, "convolution"):
    # In 16 bits the first convolution sees its input in two halves.
    model = model.clone(convolution="xla", dtype="float32")
  images = jax.ShapeDtypeStruct((1, *shape), "float32")
  jaxpr = jax.make_jaxpr(model.apply)(variables, images)
  return sum(map(_count, _equations(jaxpr.jaxpr)))


def passes(objective: Objective, num_steps: int) -> int:
  """Counts the cost of a train step in forward passes of one image.

  A gradient with respect to images costs one forward pass, one with respect to
  parameters another. An attack takes the first only; standard training costs 3.

  Args:
    objective: Training objective.
    num_steps: Number of steps of its attack.

  Returns:
    Number of forward passes.
  """
  if not objective.attacks:
    return 3
  found = 2 * num_steps + 3  # the attack; a pass on adversarial images
  if objective.sees_clean:
    found += 3
  if getattr(objective, "attack_loss", "") == "kl":
    found += 1  # the clean logits that the attack leaves
  if objective.needs_teacher:
    found += 1
  return found
