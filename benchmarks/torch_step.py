"""The train steps in PyTorch, written as a PyTorch user would write them.

The peer of `step.py`: the same losses on the same images, SGD with momentum and
weight decay on kernels. Only the images are differentiated in the attack.
"""

from typing import Any

import torch
from torch.nn import functional

from benchmarks.torch_wide_resnet import TorchWideResNet


def attack(
  network: Any,
  images: torch.Tensor,
  labels: torch.Tensor,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int,
  random_start: bool = True,
) -> torch.Tensor:
  """PGD; the network is in the mode that it is in."""
  images_adv = images.clone()
  if random_start:
    images_adv += torch.empty_like(images).uniform_(-epsilon, epsilon)
    images_adv.clamp_(0, 1)
  for _ in range(num_steps):
    images_adv.requires_grad_(True)
    loss = functional.cross_entropy(network(images_adv), labels)
    (gradient,) = torch.autograd.grad(loss, images_adv)
    with torch.no_grad():
      images_adv = images_adv + step_size * gradient.sign()
      images_adv = images_adv.clamp(images - epsilon, images + epsilon)
      images_adv = images_adv.clamp(0, 1)
  return images_adv.detach()


def _maps(
  network: TorchWideResNet,
  features: torch.Tensor,
  labels: torch.Tensor,
  *,
  create_graph: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
  """Logits, and Grad-CAM of the tensor before the pooling."""
  if not features.requires_grad:
    features = features.detach().requires_grad_(True)
  logits = network.classify(features)
  chosen = logits.gather(1, labels[:, None]).sum()
  (gradient,) = torch.autograd.grad(
    chosen, features, retain_graph=True, create_graph=create_graph
  )
  weights = gradient.mean((2, 3), keepdim=True)
  return logits, (weights * features).sum(1).relu()


def atat_loss(
  student: TorchWideResNet,
  teacher: TorchWideResNet,
  images: torch.Tensor,
  images_adv: torch.Tensor,
  labels: torch.Tensor,
  *,
  lambda1: float,
  lambda2: float,
) -> torch.Tensor:
  """Eq. (7) of the paper, the mean over the batch."""
  with torch.no_grad():
    features = teacher.features(images)
  target = _maps(teacher, features, labels, create_graph=False)[1].detach()
  both = torch.cat([labels, labels])
  features = student.features(torch.cat([images, images_adv]))
  logits, maps = _maps(student, features, both, create_graph=True)
  clean, adversarial = logits.chunk(2)
  attention = sum(
    (target - part).flatten(1).norm(dim=1) for part in maps.chunk(2)
  )
  pairing = (clean - adversarial).norm(dim=1)
  return (
    functional.cross_entropy(logits, both)
    + lambda1 * attention.mean()
    + lambda2 * pairing.mean()
  )


class Step:
  """A train step.

  Args:
    method: "standard", "at" or "atat".
    student: What is trained.
    teacher: Its teacher, for "atat".
    attack_options: epsilon, step_size, num_steps.
    loss_options: lambda1, lambda2, for "atat".
    learning_rate: Of SGD with momentum 0.9.
    weight_decay: On kernels.
    compiled: Whether the networks go through `torch.compile`.
    autocast: Whether they compute in bfloat16 (CUDA).
  """

  def __init__(
    self,
    method: str,
    student: TorchWideResNet,
    teacher: TorchWideResNet | None,
    *,
    attack_options: dict[str, Any],
    loss_options: dict[str, Any],
    learning_rate: float = 0.1,
    weight_decay: float = 2e-4,
    compiled: bool = False,
    autocast: bool = False,
  ):
    self._method, self._student, self._teacher = method, student, teacher
    self._attack_options, self._loss_options = attack_options, loss_options
    self._autocast = autocast
    kernels = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    self._optimizer = torch.optim.SGD(
      [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
      ],
      lr=learning_rate,
      momentum=0.9,
    )
    student.train()
    self._network = torch.compile(student) if compiled else student
    if compiled:
      student.features = torch.compile(student.features)
      if teacher is not None:
        teacher.features = torch.compile(teacher.features)

  def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch [B, C, H, W]."""
    if self._method == "standard":
      return functional.cross_entropy(self._network(images), labels)
    images_adv = attack(self._network, images, labels, **self._attack_options)
    if self._method == "at":
      return functional.cross_entropy(self._network(images_adv), labels)
    assert self._teacher is not None
    return atat_loss(
      self._student,
      self._teacher,
      images,
      images_adv,
      labels,
      **self._loss_options,
    )

  def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One update."""
    with torch.autocast(
      images.device.type, torch.bfloat16, enabled=self._autocast
    ):
      loss = self.loss(images, labels)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._optimizer.step()
