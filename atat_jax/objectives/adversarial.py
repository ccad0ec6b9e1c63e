"""Bases of the methods that attack: the inner attack and the student's passes.

A method inherits the fields of its bases, so that its hyperparameters are one
flat list.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import batch_norm, checks, fields, losses
from atat_jax.attacks import balls, projected_gradient
from atat_jax.errors import UserError
from atat_jax.objectives.base import Batch, Objective
from atat_jax.typing import (
  Array,
  BatchNormMode,
  PyTree,
  Scalar,
  Variables,
)

METHODS = ("pgd", "fgsm_rs", "n_fgsm")
STARTS = ("uniform", "gaussian")
PASSES = ("mixture", "in_turn", "separate")

GAUSSIAN_START = 0.001
"""Standard deviation of the start of TRADES and MART, in pixels."""

SINGLE_STEPS = {"fgsm_rs": 1.25, "n_fgsm": 1.0}
"""Length of the step of a single-step method, in epsilons, by its authors."""

Forward = Callable[[PyTree, Array, Array], tuple[Any, PyTree]]
"""(batch_stats, images, labels) to a tree of [B, ...] and moved batch_stats."""


def attack_is_finite(prepared: Any) -> Array | None:
  """Whether the inner attack of each image was finite, bool [B].

  Args:
    prepared: Result of an objective's `prepare`: that of the inner attack, or a
      tuple with it as `attack`.

  Returns:
    The Booleans; None where there is no inner attack.
  """
  result = getattr(prepared, "attack", prepared)
  return getattr(result, "finite", None)


class InnerAttackResult(NamedTuple):
  """Result of the inner attack.

  Attributes:
    images_adv: Adversarial images, [B, H, W, C].
    batch_stats: The student's running statistics after the attack.
    finite: Whether each image's logits, losses and gradients were finite all
      along, bool [B]; None: not known.
  """

  images_adv: Array
  batch_stats: PyTree
  finite: Array | None = None


def check_weights(objective: object, *names: str) -> None:
  """Checks that weights of terms are finite and >= 0.

  Raises:
    UserError: A weight that is not.
  """
  for name in names:
    if not 0 <= getattr(objective, name) < float("inf"):
      raise UserError(f"{name}: {getattr(objective, name)}; allowed: >= 0")
    fields.check_value(name, float, getattr(objective, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerAttack(Objective):
  """Inner maximisation: projected gradient ascent on the student's loss.

  Only the gradient with respect to the images is taken. The defaults are those
  of Madry et al.'s code and of the paper's. Single-step methods take one
  gradient: `step_size`, `num_steps` and `attack_start` are PGD's alone.

  Attributes:
    attack_method: "pgd"; "fgsm_rs", one step from a uniform start, projected
      (Wong et al., 2020, Algorithm 3); or "n_fgsm", one step from uniform noise
      larger than the ball, not projected (de Jorge et al., 2022).
    epsilon: Radius of the ball, pixels in [0, 1].
    step_size: Length of a step.
    num_steps: Number of steps.
    single_step_size: Length of the step of a single-step method, in epsilons;
      0: its authors' (`SINGLE_STEPS`).
    single_step_noise: Radius of the noise of "n_fgsm", in epsilons; 0: none,
      which is FGSM from the clean image.
    norm: Norm of the ball: "linf", "l2" or "l1".
    attack_loss: Loss that the attack increases: "cross_entropy", "margin" or
      "dlr" of the label, or "kl", KL(p(x) || p(x_adv)) as in TRADES.
    attack_start: "uniform" in the ball, or "gaussian": the clean image with a
      little noise, not clipped before the first step (TRADES, MART).
    attack_batch_norm: Statistics that the student uses while it is attacked:
      "batch" as in Madry et al.'s code and the paper's, or "running".
    attack_moves_statistics: Whether the attack's passes move the running
      statistics, as in the same codes; needs attack_batch_norm="batch".
    starts_from_teacher: Whether the student starts from the parameters of a
      standardly trained network instead of fresh ones, which makes a method
      comparable with ATAT, whose student does.
  """

  attack_method: str = "pgd"
  epsilon: float = 8 / 255
  step_size: float = 2 / 255
  num_steps: int = 7
  single_step_size: float = 0.0
  single_step_noise: float = 2.0
  norm: str = "linf"
  attack_loss: str = "cross_entropy"
  attack_start: str = "uniform"
  attack_batch_norm: BatchNormMode = "batch"
  attack_moves_statistics: bool = True
  starts_from_teacher: bool = False

  attacks = True
  sees_clean = True

  def __post_init__(self) -> None:
    """Checks the hyperparameters of the attack."""
    fields.check_values(type(self), vars(self), bits=False)
    checks.choice("attack_method", self.attack_method, METHODS)
    checks.epsilon(self.epsilon, self.norm)
    checks.positive("step_size", self.step_size)
    checks.not_negative("single_step_size", self.single_step_size)
    checks.not_negative("single_step_noise", self.single_step_noise)
    checks.positive("num_steps", self.num_steps, integer=True)
    checks.choice("norm", self.norm, balls.BALLS)
    checks.choice(
      "attack_loss", self.attack_loss, (*losses.ATTACK_LOSSES, "kl")
    )
    checks.choice("attack_start", self.attack_start, STARTS)
    checks.choice(
      "attack_batch_norm", self.attack_batch_norm, ("running", "batch")
    )
    if self.attack_moves_statistics and self.attack_batch_norm == "running":
      raise UserError(
        "attack_moves_statistics: True; allowed: False where"
        " attack_batch_norm='running', which has no batch statistics"
      )
    fields.check_values(InnerAttack, vars(self))

  @property
  def needs_teacher(self) -> bool:
    """Whether there is a teacher, if only to start from."""
    return self.starts_from_teacher

  @property
  def takes_single_step(self) -> bool:
    """Whether the attack is a single-step method, which may overfit to it."""
    return self.attack_method in SINGLE_STEPS

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> Any:
    """Attacks the student; a method with more constants overrides this."""
    return self.attack(key, model, variables, batch)

  @jax.named_scope("attack")
  def attack(
    self, key: Array, model: nn.Module, variables: Variables, batch: Batch
  ) -> InnerAttackResult:
    """Attacks the student.

    Args:
      key: Key of the random start.
      model: Network of the student.
      variables: The student's variables.
      batch: Clean images, and the labels that the attack leads away from.

    Returns:
      Adversarial images, and the running statistics after the attack.
    """
    epsilon = batch.epsilon_scale * self.epsilon
    stats = variables.get("batch_stats", {})
    logits_fn = functools.partial(
      self._attacked_pass, model, variables["params"]
    )
    loss: str | Callable[[Array], Array] = self.attack_loss
    if loss == "kl":
      clean, _ = logits_fn(stats, batch.images)
      loss = functools.partial(losses.kl_divergence, clean)
    # A gradient that is not finite counts as 0 there, which must not hide it.
    images_adv, stats, wrong = projected_gradient.counted_ascend(
      logits_fn,
      stats,
      self._start(key, batch.images, epsilon),
      batch.images,
      batch.labels,
      epsilon=epsilon,
      step_size=self._step_size(batch.epsilon_scale),
      num_steps=1 if self.takes_single_step else self.num_steps,
      norm=self.norm,
      loss=loss,
      targeted=False,
      targets=None,
      momentum=None,
      eot_samples=1,
      bounded=self.attack_method != "n_fgsm",
    )
    finite = (wrong.points + wrong.gradients) == 0
    return InnerAttackResult(images_adv, stats, finite)

  def _start(self, key: Array, images: Array, epsilon: Scalar) -> Array:
    """Draws the first iterate, [B, H, W, C]."""
    if self.attack_method == "pgd" and self.attack_start == "gaussian":
      noise = jax.random.normal(key, images.shape, images.dtype)
      return images + GAUSSIAN_START * noise
    if self.attack_method == "n_fgsm":
      epsilon = self.single_step_noise * epsilon
    return projected_gradient.random_start(
      key, images, epsilon=epsilon, norm=self.norm
    )

  def _step_size(self, scale: Scalar) -> Scalar:
    """Length of a step, where the batch scales epsilon."""
    if not self.takes_single_step:
      return scale * self.step_size
    share = self.single_step_size or SINGLE_STEPS[self.attack_method]
    return scale * (share * self.epsilon)

  def _attacked_pass(
    self, model: nn.Module, params: PyTree, stats: PyTree, images: Array
  ) -> tuple[Array, PyTree]:
    """Logits [B, K] and running statistics after one pass of the attack."""
    logits, moved = batch_norm.apply(
      model,
      {"params": params, "batch_stats": stats},
      images,
      batch_norm=self.attack_batch_norm,
    )
    return logits, moved if self.attack_moves_statistics else stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedPasses(InnerAttack):
  """Base of the methods whose student sees clean and adversarial images.

  Attributes:
    student_batch_norm: Batches that BatchNorm normalises by in the student's
      passes.
      "mixture": [clean; adversarial] together (the paper's code, ALP).
      "in_turn": each batch by itself; the clean one moves the running
        statistics first, then the adversarial one (TRADES, MART, TLA).
      "separate": each batch by itself; only the adversarial one moves the
        running statistics, so that evaluation follows it. Scale and bias are
        shared, unlike in AdvProp (Xie et al., 2020).
  """

  student_batch_norm: str = "mixture"

  def __post_init__(self) -> None:
    """Checks the hyperparameters of the attack and of the passes."""
    super().__post_init__()
    checks.choice("student_batch_norm", self.student_batch_norm, PASSES)

  def forward_pair(
    self, forward: Forward, attack: InnerAttackResult, batch: Batch
  ) -> tuple[Any, Any, PyTree]:
    """Makes the student's passes on clean and adversarial images.

    Args:
      forward: One pass of the student.
      attack: Adversarial images, and the running statistics before the passes.
      batch: Clean images and labels.

    Returns:
      The result of `forward` for the clean images, its result for the
      adversarial ones, and the running statistics after both.
    """
    images_adv, stats, _ = attack
    if self.student_batch_norm == "mixture":
      both, stats = forward(
        stats,
        jnp.concatenate([batch.images, images_adv]),
        jnp.concatenate([batch.labels, batch.labels]),
      )
      size = len(batch.images)
      clean, adversarial = (
        jax.tree.map(lambda x: x[:size], both),
        jax.tree.map(lambda x: x[size:], both),
      )
      return clean, adversarial, stats
    clean, moved = forward(stats, batch.images, batch.labels)
    if self.student_batch_norm == "in_turn":
      stats = moved
    adversarial, stats = forward(stats, images_adv, batch.labels)
    return clean, adversarial, stats

  def logits_pair(
    self,
    model: nn.Module,
    variables: Variables,
    attack: InnerAttackResult,
    batch: Batch,
  ) -> tuple[Array, Array, PyTree]:
    """Returns clean logits [B, K], adversarial ones, and the statistics."""
    forward = functools.partial(_logits, model, variables["params"])
    return self.forward_pair(forward, attack, batch)


def _logits(
  model: nn.Module, params: PyTree, stats: PyTree, images: Array, _: Array
) -> tuple[Array, PyTree]:
  """Makes the student's pass for logits, a `Forward`."""
  student = {"params": params, "batch_stats": stats}
  return batch_norm.apply(model, student, images, batch_norm="batch")
