"""Named evaluation protocols: what exactly a column of the table means."""

import dataclasses
import re
from typing import Any

from atat_jax import attacks, checks, losses
from atat_jax.attacks import norms
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

_NAME = re.compile(
  r"(?P<attack>nominal|fgsm|ifgsm|pgd)(?P<steps>[1-9]\d*)?(-(?P<loss>margin))?"
)
ALLOWED = "nominal, fgsm, ifgsm<steps>, pgd<steps>, pgd<steps>-margin"


@dataclasses.dataclass(frozen=True)
class Protocol:
  """An attack with all its numbers; None where a number does not apply.

  Attributes:
    name: As in the configuration, e.g. "pgd20-margin".
    attack: "nominal" (none) or one of `attacks.ATTACKS`.
    norm: Of the ball.
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    num_steps: Gradient steps.
    num_restarts: Attempts.
    loss: What the attack increases.
  """

  name: str
  attack: str
  norm: str | None = None
  epsilon: float | None = None
  step_size: float | None = None
  num_steps: int | None = None
  num_restarts: int | None = None
  loss: str | None = None

  def run(
    self, key: Array, classifier: Classifier, images: Array, labels: Array
  ) -> Array:
    """The images that the classifier is scored on, [B, H, W, C]."""
    if self.attack == "nominal":
      return images
    options: dict[str, Any] = {"epsilon": self.epsilon}
    if self.attack != "fgsm":
      options |= {"step_size": self.step_size, "num_steps": self.num_steps}
    if self.attack == "pgd":
      options |= {
        "norm": self.norm,
        "loss": self.loss,
        "num_restarts": self.num_restarts,
      }
    return attacks.ATTACKS[self.attack](
      key, classifier, images, labels, **options
    )

  def describe(self) -> str:
    """One line for people."""
    if self.attack == "nominal":
      return "clean images"
    return (
      f"{self.name}: {self.norm}, epsilon {self.epsilon:.4g}, {self.num_steps}"
      f" steps of {self.step_size:.4g}, {self.num_restarts} restart,"
      f" {self.loss} loss"
    )


def parse(
  name: str,
  *,
  epsilon: float,
  step_size: float,
  norm: str = "linf",
  num_restarts: int = 1,
) -> Protocol:
  """The protocol of a name.

  Args:
    name: "nominal"; "fgsm"; "ifgsm20" (20 steps, from the clean image);
      "pgd20" (random start); "pgd20-margin" (margin instead of cross-entropy).
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    norm: Of PGD's ball.
    num_restarts: Of PGD.

  Returns:
    The protocol.

  Raises:
    UserError: Unknown name, or numbers out of range.
  """
  match = _NAME.fullmatch(name)
  attack = match["attack"] if match else ""
  iterative = attack in ("ifgsm", "pgd")
  if not match or bool(match["steps"]) != iterative:
    raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  if match["loss"] and attack != "pgd":
    raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  if attack == "nominal":
    return Protocol(name, attack)
  checks.epsilon(epsilon, norm)
  checks.positive("step_size", step_size)
  checks.positive("num_restarts", num_restarts, integer=True)
  checks.choice("norm", norm, norms.NORMS)
  if attack != "pgd" and norm != "linf":
    raise UserError(f"norm: {norm!r}; allowed: linf for {attack}")
  loss = match["loss"] or "cross_entropy"
  checks.choice("loss", loss, losses.ATTACK_LOSSES)
  return Protocol(
    name,
    attack,
    norm=norm,
    epsilon=epsilon,
    step_size=step_size if iterative else epsilon,
    num_steps=int(match["steps"]) if iterative else 1,
    num_restarts=num_restarts if attack == "pgd" else 1,
    loss=loss,
  )


def parse_list(names: str, **numbers: object) -> tuple[Protocol, ...]:
  """The protocols of a comma-separated list, see `parse`."""
  found = [name.strip() for name in names.split(",") if name.strip()]
  if not found:
    raise UserError(f"attacks: {names!r}; allowed: a list of {ALLOWED}")
  if len(set(found)) < len(found):
    raise UserError(f"attacks: {names!r}; allowed: each name once")
  return tuple(parse(name, **numbers) for name in found)  # type: ignore[arg-type]
