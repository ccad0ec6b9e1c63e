"""Residual networks, attack and train steps in PyTorch, written as its users would.

The peer of the benchmarks: the weights of a flax network, the same losses on
the same images, SGD with momentum and weight decay on kernels.
"""

from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atat_jax.models.wide_resnet import WideResNet
from benchmarks.support.plain import PlainResNet

_ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu}


def _tensor(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.array(array))


def _conv(kernel: np.ndarray, stride: int, padding: int) -> nn.Conv2d:
  size, _, inputs, outputs = kernel.shape
  conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
  conv.weight.data = _tensor(kernel.transpose(3, 2, 0, 1))
  return conv


def _norm(params: Any, stats: Any, epsilon: float) -> nn.BatchNorm2d:
  norm = nn.BatchNorm2d(len(params["scale"]), eps=epsilon)
  norm.weight.data = _tensor(params["scale"])
  norm.bias.data = _tensor(params["bias"])
  norm.running_mean = _tensor(stats["mean"])
  norm.running_var = _tensor(stats["var"])
  return norm


def _margins(size: int, kernel: int, stride: int) -> tuple[int, int]:
  """Returns the margins of "same" padding: an odd pixel goes to the end."""
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


class TorchWideResNet(nn.Module):
  """Network from images [B, C, H, W] in [0, 1] to logits [B, K].

  Args:
    model: Flax module that it copies.
    variables: Parameters and running statistics of the module.
    dtype: Dtype of weights and statistics.

  Raises:
    ValueError: The flax module does not compute in float32.
  """

  def __init__(
    self,
    model: WideResNet,
    variables: Any,
    dtype: torch.dtype = torch.float32,
  ):
    super().__init__()
    if np.dtype(model.dtype) != np.float32:
      raise ValueError(f"dtype: {np.dtype(model.dtype)}; allowed: float32")
    self.model = model
    params = jax.tree.map(np.asarray, variables["params"])
    stats = jax.tree.map(np.asarray, variables["batch_stats"])
    strides = {
      f"stage{stage}_unit1_{part}": stride
      for stage, stride in enumerate(model.strides, start=1)
      for part in ("conv1", "shortcut")
    }
    self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
    for name, value in params.items():
      if name in stats:
        self.norms[name] = _norm(value, stats[name], model.batch_norm_epsilon)
      elif name != "head":
        stride, size = strides.get(name, 1), len(value["kernel"])
        # The convolution can pad by itself where both rules agree.
        own = model.padding == "symmetric" or stride == 1
        self.convs[name] = _conv(
          value["kernel"], stride, size // 2 if own else 0
        )
    head = params["head"]
    self.head = nn.Linear(*head["kernel"].shape)
    self.head.weight.data = _tensor(head["kernel"].T)
    self.head.bias.data = _tensor(head["bias"])
    if model.normalization == "dataset":
      for name in ("mean", "std"):
        value = torch.tensor(getattr(model, name)).view(1, -1, 1, 1)
        self.register_buffer(name, value)
    self.to(dtype)
    self.eval()

  def _normalize(self, x: torch.Tensor) -> torch.Tensor:
    if self.model.normalization == "per_image":
      floor = 1.0 / (255.0**2 * x[0].numel())
      mean = x.mean((1, 2, 3), keepdim=True)
      variance = ((x - mean) ** 2).mean((1, 2, 3), keepdim=True)
      return (x - mean) / variance.clamp_min(floor).sqrt()
    if self.model.normalization == "dataset":
      return (x - self.mean) / self.std
    return x

  def _convolve(self, name: str, x: torch.Tensor) -> torch.Tensor:
    conv = self.convs[name]
    (size, _), (stride, _) = conv.kernel_size, conv.stride
    if self.model.padding == "same" and stride > 1:
      height, width = (_margins(n, size, stride) for n in x.shape[2:])
      if any(margins := (*width, *height)):
        x = functional.pad(x, margins)
    return conv(x)

  def _activate(self, name: str, x: torch.Tensor) -> torch.Tensor:
    x = self.norms[name](x)
    if self.model.activation == "leaky_relu":
      return functional.leaky_relu(x, self.model.negative_slope)
    return _ACTIVATIONS[self.model.activation](x)

  def _unit(
    self, x: torch.Tensor, name: str, features: int, stride: int
  ) -> torch.Tensor:
    widens = x.shape[1] != features
    conv_shortcut = self.model.shortcut == "conv"
    shared = widens if conv_shortcut else name == "stage1_unit1"
    h = self._activate(f"{name}_bn1", x)
    shortcut = h if shared else x
    h = self._convolve(f"{name}_conv1", h)
    h = self._convolve(f"{name}_conv2", self._activate(f"{name}_bn2", h))
    if conv_shortcut:
      if widens or stride > 1:
        shortcut = self._convolve(f"{name}_shortcut", shortcut)
    else:
      if stride > 1:
        shortcut = functional.avg_pool2d(shortcut, stride)
      if widens:
        extra = features - shortcut.shape[1]
        sides = (extra // 2, extra - extra // 2)
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, *sides))
    return shortcut + h

  def features(self, x: torch.Tensor) -> torch.Tensor:
    """Computes the tensor before the pooling, [B, C, h, w]."""
    model = self.model
    x = self._convolve("stem", self._normalize(x))
    for stage, stride in enumerate(model.strides, start=1):
      features = model.stem_channels * model.width * 2 ** (stage - 1)
      for unit in range(1, (model.depth - 2) // 6 + 1):
        name = f"stage{stage}_unit{unit}"
        x = self._unit(x, name, features, stride if unit == 1 else 1)
    return self._activate("final_bn", x)

  def classify(self, features: torch.Tensor) -> torch.Tensor:
    """Computes logits [B, K] from the tensor before the pooling."""
    return self.head(features.mean((2, 3)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Computes logits [B, K]."""
    return self.classify(self.features(x))


class TorchPlainResNet(nn.Module):
  """Network from images [B, C, H, W] in [0, 1] to logits [B, K].

  Args:
    model: Flax module that it copies.
    variables: Parameters and running statistics of the module.
  """

  def __init__(self, model: PlainResNet, variables: Any):
    super().__init__()
    self.model = model
    params = jax.tree.map(np.asarray, variables["params"])
    stats = jax.tree.map(np.asarray, variables["batch_stats"])
    self.layers = nn.ModuleDict()
    for name, value in params.items():
      if name in stats:
        self.layers[name] = _norm(value, stats[name], 1e-5)
      elif name != "head":
        stage, _, part = name.partition("_")
        first = part in ("block0_first", "block0_shortcut")
        stride = 2 if first and stage != "stage0" else 1
        kernel = value["kernel"]
        self.layers[name] = _conv(kernel, stride, len(kernel) // 2)
    head = params["head"]
    self.head = nn.Linear(*head["kernel"].shape)
    self.head.weight.data = _tensor(head["kernel"].T)
    self.head.bias.data = _tensor(head["bias"])
    self.eval()

  def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
    return self.layers[f"{name}_bn"](self.layers[name](x))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Computes logits [B, K]."""
    x = self._layer("stem", x).relu()
    for stage in range(len(self.model.widths)):
      for block in range(self.model.blocks):
        name = f"stage{stage}_block{block}"
        h = self._layer(f"{name}_first", x).relu()
        h = self._layer(f"{name}_second", h)
        if f"{name}_shortcut" in self.layers:
          x = self._layer(f"{name}_shortcut", x)
        x = (x + h).relu()
    return self.head(x.mean((2, 3)))


def copy(model: Any, variables: Any) -> nn.Module:
  """Copies a network of the benchmarks, float32, in evaluation mode."""
  if isinstance(model, PlainResNet):
    return TorchPlainResNet(model, variables)
  return TorchWideResNet(model, variables)


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
  """Runs PGD, in the mode (training or evaluation) that the network is in."""
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
  """Computes logits, and Grad-CAM of the tensor before the pooling."""
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
  """Computes Eq. (7) of the paper, the mean over the batch."""
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
  """Train step.

  Args:
    method: "standard", "at" or "atat".
    student: Network to train.
    teacher: Teacher's network, for "atat".
    attack_options: epsilon, step_size, num_steps.
    loss_options: lambda1, lambda2, for "atat".
    learning_rate: Learning rate of SGD with momentum 0.9.
    weight_decay: Weight decay of the kernels.
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
    """Computes the mean loss of a batch of images [B, C, H, W]."""
    if self._method == "standard":
      return functional.cross_entropy(self._network(images), labels)
    images_adv = attack(self._network, images, labels, **self._attack_options)
    if self._method == "at":
      return functional.cross_entropy(self._network(images_adv), labels)
    assert self._teacher is not None  # noqa: S101 - a check of the benchmark itself, never run with -O
    return atat_loss(
      self._student,
      self._teacher,
      images,
      images_adv,
      labels,
      **self._loss_options,
    )

  def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Makes one update."""
    with torch.autocast(
      images.device.type, torch.bfloat16, enabled=self._autocast
    ):
      loss = self.loss(images, labels)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._optimizer.step()
