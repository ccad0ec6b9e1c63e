"""Gradient of the ATAT loss here and in PyTorch, at the same images.

In float32 a few activations lie so close to the kink of the leaky ReLU that
rounding decides on which side they are, in either library. So the gradients are
compared in float64, where none does, and each float32 gradient with float64.
"""

from typing import Any
from unittest import mock

import numpy as np

WEIGHTS = ("lambda1", "lambda2")


def differences(
  model: Any,
  objective: Any,
  variables: Any,
  teacher: Any,
  images: np.ndarray,
  labels: np.ndarray,
) -> dict[str, float]:
  """Compares both libraries' gradients at the same adversarial images.

  Args:
    model: Flax module of student and teacher.
    objective: ATAT.
    variables: Variables of the student.
    teacher: Variables of the teacher.
    images: float32 [B, H, W, C] in [0, 1].
    labels: int32 [B].

  Returns:
    "float64": the largest difference of a parameter's gradient over its largest
    value, the worst of all parameters. "ours_float32", "peer_float32": length
    of the difference from PyTorch's float64 gradient, over its length.
  """
  import torch

  arrays = (
    images,
    _attacked(model, objective, variables, images, labels),
    labels,
  )
  networks = (model, objective, variables, teacher)
  exact = _peer_gradient(*networks, *arrays, torch.float64)
  return {
    "float64": _worst(_our_gradient(*networks, *arrays, "float64"), exact),
    "ours_float32": _apart(_our_gradient(*networks, *arrays, "float32"), exact),
    "peer_float32": _apart(
      _peer_gradient(*networks, *arrays, torch.float32), exact
    ),
  }


def _attacked(
  model: Any, objective: Any, variables: Any, images: Any, labels: Any
) -> np.ndarray:
  """Runs the objective's attack; returns adversarial images."""
  import jax

  from atat_jax import compilation, objectives

  def attack(variables: Any, images: Any, labels: Any) -> Any:
    batch = objectives.make_batch(images, labels, 10)
    found = objective.attack(jax.random.key(3), model, variables, batch)
    return found.images_adv

  return np.asarray(compilation.jit(attack)(variables, images, labels))


def _our_gradient(
  model: Any,
  objective: Any,
  variables: Any,
  teacher: Any,
  images: np.ndarray,
  images_adv: np.ndarray,
  labels: np.ndarray,
  dtype: str,
) -> dict[str, Any]:
  """Computes the gradient by JAX, under the PyTorch network's names."""
  import jax
  import jax.numpy as jnp
  import torch

  from atat_jax import compilation, objectives
  from atat_jax.objectives import adversarial
  from benchmarks.support.pytorch import TorchWideResNet

  model = model.clone(dtype=jnp.dtype(dtype))

  def gradient(variables: Any, teacher: Any, *arrays: Any) -> Any:
    images, adversarials, labels = arrays
    batch = objectives.make_batch(images, labels, 10)
    fixed = adversarial.InnerAttackResult(
      adversarials, variables["batch_stats"]
    )
    with mock.patch.object(type(objective), "attack", lambda *_: fixed):
      prepared = objective.prepare(
        jax.random.key(3), model, variables, teacher, batch
      )

    def mean(params: Any) -> Any:
      student = {**variables, "params": params}
      return objective.loss(model, student, prepared, batch).total.mean()

    return jax.grad(mean)(variables["params"])

  with jax.enable_x64(dtype == "float64"):
    cast = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x), dtype),
      (variables, teacher, images, images_adv),
    )
    found = compilation.jit(gradient)(*cast, labels)
    network = TorchWideResNet(
      model.clone(dtype="float32"),
      {**variables, "params": found},
      torch.float64,
    )
  return {name: p.detach() for name, p in network.named_parameters()}


def _peer_gradient(
  model: Any,
  objective: Any,
  variables: Any,
  teacher: Any,
  images: np.ndarray,
  images_adv: np.ndarray,
  labels: np.ndarray,
  dtype: Any,
) -> dict[str, Any]:
  """Computes the gradient by PyTorch, as float64."""
  import torch

  from benchmarks.support import pytorch

  def tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy()).to(dtype)

  student = pytorch.TorchWideResNet(model, variables, dtype).train()
  pytorch.atat_loss(
    student,
    pytorch.TorchWideResNet(model, teacher, dtype),
    tensor(images),
    tensor(images_adv),
    torch.from_numpy(labels.astype(np.int64)),
    **{name: getattr(objective, name) for name in WEIGHTS},
  ).backward()
  return {name: p.grad.double() for name, p in student.named_parameters()}


def _worst(found: dict[str, Any], exact: dict[str, Any]) -> float:
  """Returns the largest relative difference of a parameter's gradient."""
  return max(
    float((found[name] - g).abs().max() / g.abs().max())
    for name, g in exact.items()
  )


def _apart(found: dict[str, Any], exact: dict[str, Any]) -> float:
  """Returns the length of the gradients' difference over that of `exact`."""
  squares = sum(
    float((found[name] - g).square().sum()) for name, g in exact.items()
  )
  return (squares / sum(float(g.square().sum()) for g in exact.values())) ** 0.5
