"""What an objective is: the page where model, attack, attention and losses meet.

An objective is a frozen dataclass whose fields are the method's
hyperparameters. `prepare` does what is not differentiated (attack the student,
ask the teacher), `loss` what is.
"""

from typing import Any, NamedTuple, Protocol

from flax import linen as nn

from atat_jax.typing import Array, PyTree, Variables


class Outcome(NamedTuple):
  """What `loss` returns.

  Attributes:
    total: [B], what is minimised, weights applied.
    terms: Name to [B]: each term before its weight.
    batch_stats: Running statistics after the pass.
    logits_clean: [B, K].
    logits_adversarial: [B, K], or None where nothing was attacked.
  """

  total: Array
  terms: dict[str, Array]
  batch_stats: PyTree
  logits_clean: Array
  logits_adversarial: Array | None


class Objective(Protocol):
  """The contract of an entry of `OBJECTIVES`."""

  @property
  def needs_teacher(self) -> bool:
    """Whether `prepare` is given a teacher's variables."""

  @property
  def term_names(self) -> tuple[str, ...]:
    """The keys of `Outcome.terms`."""

  @property
  def attacks(self) -> bool:
    """Whether there are adversarial logits."""

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    images: Array,
    labels: Array,
  ) -> Any:
    """Constants of the loss: adversarial images, teacher maps. A pytree."""

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Any,
    images: Array,
    labels: Array,
  ) -> Outcome:
    """The loss of each example; differentiated with respect to variables."""
