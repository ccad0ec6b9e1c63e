"""Named evaluation protocols: what exactly a column of the table means."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from atat_jax import attacks, checks, losses
from atat_jax.attacks import balls
from atat_jax.attacks.autoattack import versions
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

_NAME = re.compile(
  rf"(?P<attack>{'|'.join(['nominal', *attacks.ATTACKS, 'autoattack'])})"
  r"(?P<steps>[1-9]\d*)?(-(?P<variant>\w+))?"
)
ALLOWED = (
  "nominal, fgsm, ifgsm<steps>, pgd<steps>, pgd<steps>-<loss>, apgd<steps>,"
  " apgd<steps>-<loss>, fab<steps>, square<queries>, autoattack,"
  " autoattack-<version>; each with :<parameter>=<value> for other numbers"
)
_LOSSES = (*losses.ATTACK_LOSSES, *losses.TARGETED_LOSSES)

# What the number in a name stands for.
_STEPS = {"square": "num_queries"}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """An attack with all its numbers; None where a number does not apply.

  Attributes:
    name: As in the configuration, e.g. "pgd20-margin".
    attack: "nominal" (none), one of `attacks.ATTACKS`, or "autoattack".
    norm: Of the ball.
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    num_steps: Gradient steps, or queries.
    num_restarts: Attempts.
    loss: What the attack increases.
    options: Other numbers, as (parameter, value).
  """

  name: str
  attack: str
  norm: str | None = None
  epsilon: float | None = None
  step_size: float | None = None
  num_steps: int | None = None
  num_restarts: int | None = None
  loss: str | None = None
  options: tuple[tuple[str, Any], ...] = ()

  def arguments(self) -> dict[str, Any]:
    """The keyword arguments of the attack's function."""
    known = _parameters(self.attack)
    steps = _STEPS.get(self.attack, "num_steps")
    given = {
      "norm": self.norm,
      "epsilon": self.epsilon,
      "step_size": self.step_size,
      steps: self.num_steps,
      "num_restarts": self.num_restarts,
      "loss": self.loss,
      **dict(self.options),
    }
    return {name: given[name] for name in known if given.get(name) is not None}

  def run(
    self, key: Array, classifier: Classifier, images: Array, labels: Array
  ) -> Array:
    """The images that the classifier is scored on, [B, H, W, C]."""
    if self.attack == "nominal":
      return images
    if self.attack == "autoattack":
      result = attacks.autoattack(
        key, classifier, images, labels, progress=False, **self.arguments()
      )
      return jnp.asarray(result.adversarial)
    return attacks.ATTACKS[self.attack](
      key, classifier, images, labels, **self.arguments()
    )

  def describe(self) -> str:
    """One line for people."""
    if self.attack == "nominal":
      return "clean images"
    parts = [f"{self.name}: {self.norm}", f"epsilon {self.epsilon:.4g}"]
    if self.num_steps is not None:
      unit = "queries" if self.attack == "square" else "steps"
      of = "" if self.step_size is None else f" of {self.step_size:.4g}"
      parts.append(f"{self.num_steps} {unit}{of}")
    if self.num_restarts is not None:
      parts.append(f"{self.num_restarts} restart")
    if self.loss is not None:
      parts.append(f"{self.loss} loss")
    parts += [f"{name} {value}" for name, value in self.options]
    return ", ".join(parts)


def _parameters(attack: str) -> dict[str, inspect.Parameter]:
  """The numbers that an attack takes, in the order of its signature."""
  function: Callable[..., Any] = attacks.ATTACKS.get(attack, attacks.autoattack)
  known = {
    name: parameter
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY and name != "targets"
  }
  if attack == "autoattack":
    return {name: known[name] for name in ("epsilon", "norm", "version")}
  return known


def _value(name: str, text: str, kind: type) -> Any:
  """The value of a parameter written as text."""
  try:
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    if kind is float and text.count("/") == 1:
      above, below = text.split("/")
      return float(above) / float(below)
    return kind(text)
  except (ValueError, KeyError, ZeroDivisionError):
    kinds = {bool: "true or false", float: "a number", int: "an integer"}
    raise UserError(f"{name}: {text!r}; allowed: {kinds[kind]}") from None


def _given(attack: str, name: str, texts: list[str]) -> dict[str, Any]:
  """The parameters behind a name, `:<parameter>=<value>` each."""
  known, given = _parameters(attack), {}
  for text in texts:
    parameter, equals, value = text.partition("=")
    if not equals or parameter in given:
      raise UserError(
        f"attack: {name!r}; allowed: each parameter once, as"
        " :<parameter>=<value>"
      )
    checks.choice(f"parameter of {attack}", parameter, known)
    kind = known[parameter].annotation
    kind = kind if kind in (bool, int, float) else str
    given[parameter] = _value(parameter, value, kind)
  return given


def _check(attack: str, given: dict[str, Any]) -> None:
  """Checks the values of an attack's parameters before anything is compiled."""
  if attack == "autoattack":
    checks.choice("version", given["version"], versions.VERSIONS)
  if "norm" in given:
    # fgsm and ifgsm have no such parameter: they are linf attacks.
    names = balls.NORMS if "norm" in _parameters(attack) else ("linf",)
    if given["norm"] not in names:
      allowed = ", ".join(sorted(names))
      raise UserError(
        f"norm: {given['norm']!r}; allowed: {allowed}"
        + (f" for {attack}" if len(names) == 1 else "")
      )
  checks.epsilon(given["epsilon"], given["norm"])
  if "loss" in given:
    checks.choice("loss", given["loss"], _LOSSES)
  if "momentum" in given:
    checks.not_negative("momentum", given["momentum"])
  for name, value in given.items():
    if name.startswith("num_") or name == "eot_samples":
      checks.positive(name, value, integer=True)
    elif name == "step_size":
      checks.positive(name, value)


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
      "pgd20" (random start); "pgd20-margin" (another loss); "apgd100",
      "apgd100-targeted_dlr"; "fab100"; "square5000"; "autoattack",
      "autoattack-fast". Parameters of the attack's function can follow:
      "pgd20:momentum=1:random_start=false", "square:norm=l2:epsilon=0.5".
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    norm: Of the ball.
    num_restarts: Of PGD.

  Returns:
    The protocol.

  Raises:
    UserError: Unknown name, or numbers out of range.
  """
  head, *texts = name.split(":")
  match = _NAME.fullmatch(head)
  if not match:
    raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  attack, steps, variant = match["attack"], match["steps"], match["variant"]
  if attack == "nominal":
    if steps or variant or texts:
      raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
    return Protocol(name, attack)
  known = _parameters(attack)
  steps_name = _STEPS.get(attack, "num_steps")
  variant_name = "version" if attack == "autoattack" else "loss"
  given = _given(attack, name, texts)
  for value, parameter in ((steps, steps_name), (variant, variant_name)):
    # A number or a variant must mean something, and be said once.
    if value and (parameter not in known or parameter in given):
      raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  if variant and variant not in (
    versions.VERSIONS if attack == "autoattack" else _LOSSES
  ):
    raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  if steps:
    given[steps_name] = int(steps)
  if variant:
    given[variant_name] = variant
  defaults: dict[str, Any] = {"epsilon": epsilon, "norm": norm}
  if "step_size" in known:
    defaults["step_size"] = step_size
  steps_parameter = known.get(steps_name)
  if (
    steps_parameter is not None
    and steps_parameter.default is inspect.Parameter.empty
    and steps_name not in given
  ):
    raise UserError(f"attack: {name!r}; allowed: {ALLOWED}")
  if attack == "pgd":
    defaults["num_restarts"] = num_restarts
  given = defaults | given
  for parameter, described in known.items():
    if described.default is not inspect.Parameter.empty:
      given.setdefault(parameter, described.default)
  _check(attack, given)
  return _protocol(name, attack, given)


def _protocol(name: str, attack: str, given: dict[str, Any]) -> Protocol:
  """Sorts the parameters into what every row of a table says and the rest."""
  gradient = attack in ("fgsm", "ifgsm")
  fixed = {
    "norm": given.pop("norm"),
    "epsilon": given.pop("epsilon"),
    "step_size": given.pop("step_size", None),
    "num_steps": given.pop(_STEPS.get(attack, "num_steps"), None),
    "num_restarts": given.pop("num_restarts", 1 if gradient else None),
    "loss": given.pop("loss", "cross_entropy" if gradient else None),
  }
  if attack == "fgsm":
    fixed |= {"step_size": fixed["epsilon"], "num_steps": 1}
  if fixed["loss"] not in losses.TARGETED_LOSSES and attack != "fab":
    given.pop("num_targets", None)
  # Only what differs from the plain attack needs to be said.
  known = _parameters(attack)
  options = tuple(
    (option, value)
    for option, value in given.items()
    if value != known[option].default or option in ("num_targets", "version")
  )
  return Protocol(name, attack, options=options, **fixed)


def parse_list(names: str, **numbers: object) -> tuple[Protocol, ...]:
  """The protocols of a comma-separated list, see `parse`."""
  found = [name.strip() for name in names.split(",") if name.strip()]
  if not found:
    raise UserError(f"attacks: {names!r}; allowed: a list of {ALLOWED}")
  if len(set(found)) < len(found):
    raise UserError(f"attacks: {names!r}; allowed: each name once")
  return tuple(parse(name, **numbers) for name in found)  # type: ignore[arg-type]
