"""Floating-point operations of a network, counted from its jaxpr.

Multiplications and additions of convolutions and matrix products, two for each
pair; what is element-wise is left out, as usual for model FLOPs.
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
  """Of one image's forward pass.

  Args:
    model: A flax module; its convolutions are counted as direct sums, in
      whatever form they are computed here.
    variables: Its collections, arrays or shapes.
    shape: Of an image, [H, W, C].

  Returns:
    The number of operations.
  """
  if hasattr(model, "convolution"):
    model = model.clone(convolution="xla")
  images = jax.ShapeDtypeStruct((1, *shape), "float32")
  jaxpr = jax.make_jaxpr(model.apply)(variables, images)
  return sum(map(_count, _equations(jaxpr.jaxpr)))


def passes(objective: Objective, num_steps: int) -> int:
  """What a train step costs, in forward passes of one image.

  A gradient with respect to images is worth one forward pass, one with respect
  to parameters another. An attack takes the first only; standard training is 3.

  Args:
    objective: What is trained by.
    num_steps: Of its attack.

  Returns:
    The number.
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
