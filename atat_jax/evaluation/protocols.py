"""Named evaluation protocols: the exact meaning of a column of the table.

Names, parameters, norms and losses are those of `attacks.ATTACKS`, read from
the signatures of its functions: an attack that is listed there can be named.
"""

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import attacks, checks, losses, models
from atat_jax.attacks import balls, base
from atat_jax.attacks.autoattack import versions
from atat_jax.attacks.autoattack.screening import SCREENINGS
from atat_jax.attacks.targeting import TARGETINGS
from atat_jax.errors import UserError, near, nearest, shown
from atat_jax.runs import better_attacks, wording
from atat_jax.typing import Array, Classifier

_NOMINAL, _AUTOATTACK = "nominal", "autoattack"

REFILLED = (
  "with batch statistics, whose batches are filled up with the images that are"
  " left; allowed: running statistics"
)
"""Why AutoAttack is refused in the BatchNorm mode "batch"."""

STATISTICS = ("through", "fixed")
"""Values of the option `statistics` of attacks by gradients: whether these pass
through the batch's statistics or take them as constants (BatchNorm mode
"batch"). The first is the default."""

_WITHOUT_GRADIENTS = (_NOMINAL, "square", _AUTOATTACK)  # it has other attacks

# Parameters that the number in a name can set.
_STEPS = ("num_steps", "num_queries")

# Images on which a protocol is tried when it is made; a plan knows the real ones.
_TRIED_SHAPE, _TRIED_CLASSES = (32, 32, 3), 10

# Numbers of an attack that its function has no parameter for.
_IMPLIED: dict[str, dict[str, Any]] = {
  "fgsm": {"num_steps": 1, "num_restarts": 1},
  "ifgsm": {"num_restarts": 1},
}


class _Signature(NamedTuple):
  """Parameters of an attack that a protocol can set.

  Attributes:
    parameters: Name to parameter, in the order of the function's signature.
    steps: Parameter that the number in a name sets, if there is one.
    variant: Parameter that the word behind the dash sets, if there is one.
    choices: Parameter to its allowed values.
  """

  parameters: dict[str, inspect.Parameter]
  steps: str | None
  variant: str | None
  choices: dict[str, tuple[str, ...]]


def _is_settable(parameter: inspect.Parameter) -> bool:
  """Whether a parameter is a number or a name, which text can give."""
  kinds = (bool, int, float, str)
  return parameter.kind == parameter.KEYWORD_ONLY and (
    parameter.annotation in kinds
    or typing.get_origin(parameter.annotation) is typing.Literal
  )


def _signature(attack: str) -> _Signature:
  """Reads the signature of an attack's function."""
  function: Callable[..., Any] = attacks.ATTACKS.get(attack, attacks.autoattack)
  known = inspect.signature(function, eval_str=True).parameters
  if attack == _AUTOATTACK:
    names = ["epsilon", "norm", "version", "targeting", "screening"]
  else:
    names = [name for name in known if _is_settable(known[name])]
  choices = {"norm": base.norms(function)}
  if "loss" in names:
    choices["loss"] = typing.get_args(known["loss"].annotation) or base.LOSSES
  if attack == _AUTOATTACK:
    choices["version"] = tuple(versions.VERSIONS)
    choices["screening"] = SCREENINGS
  if "targeting" in names:
    choices["targeting"] = TARGETINGS
  parameters = {name: known[name] for name in names}
  if attack not in _WITHOUT_GRADIENTS:
    # It says which classifier is attacked: no attack knows of BatchNorm.
    choices["statistics"] = STATISTICS
    parameters["statistics"] = inspect.Parameter(
      "statistics",
      inspect.Parameter.KEYWORD_ONLY,
      default=STATISTICS[0],
      annotation=str,
    )
  return _Signature(
    parameters,
    steps=next((name for name in _STEPS if name in names), None),
    variant=next((name for name in ("version", "loss") if name in names), None),
    choices=choices,
  )


def allowed_names() -> str:
  """Lists the forms that the name of a protocol can have."""
  forms = [_NOMINAL]
  for attack in (*attacks.ATTACKS, _AUTOATTACK):
    signature = _signature(attack)
    form = attack
    if signature.steps:
      form += f"<{signature.steps.removeprefix('num_')}>"
    forms.append(form)
    if signature.variant:
      forms.append(f"{form}-<{signature.variant}>")
  return ", ".join(forms) + "; each with :<parameter>=<value> for other numbers"


def _not_allowed(name: str) -> UserError:
  return UserError(
    f"attack: {name!r}; allowed: {allowed_names()}{_meant(name)}"
  )


def _meant(name: str) -> str:
  """Says which protocol a misspelt name may stand for."""
  head, colon, rest = name.partition(":")
  match = re.fullmatch(r"([A-Za-z_]+)(\d*)(?:-(\w+))?", head)
  if not match:
    return ""
  attack = nearest(match[1], (_NOMINAL, *attacks.ATTACKS, _AUTOATTACK))
  if attack is None:
    return ""
  meant, variant = attack + match[2], match[3]
  if variant is not None:
    signature = _signature(attack)
    variants = signature.choices.get(signature.variant or "", ())
    meant += f"-{nearest(variant, variants)}"
  meant += colon + rest
  try:
    if meant != name:
      _read(meant)
      return f" (did you mean {meant!r}?)"
  except UserError:
    pass
  return ""


@dataclasses.dataclass(frozen=True)
class Protocol:
  """An attack with all its numbers; None where a number does not apply.

  Attributes:
    name: Name in the configuration, e.g. "pgd20-margin".
    attack: "nominal" (none), one of `attacks.ATTACKS`, or "autoattack".
    norm: Norm of the ball.
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    num_steps: Number of gradient steps, or of queries.
    num_restarts: Number of restarts.
    loss: Loss that the attack increases.
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

  @property
  def fixed_statistics(self) -> bool:
    """Whether the attack takes the batch's statistics as constants."""
    return ("statistics", "fixed") in self.options

  def measures(self, batch_norm: str) -> bool:
    """Whether a row of a BatchNorm mode can be made.

    Args:
      batch_norm: "running" or "batch".

    Returns:
      False for fixed statistics of no batch ("running"), and for AutoAttack
      with batch statistics: its batches are filled up with the images that are
      left, so that no image keeps its statistics.
    """
    if batch_norm == "running":
      return not self.fixed_statistics
    return self.attack != _AUTOATTACK

  def companions(self) -> tuple["Protocol", ...]:
    """Names the better attacks on batch statistics beside a published one.

    Returns:
      For FGSM, I-FGSM and PGD with cross-entropy through the statistics: the
      same with the statistics fixed, and with the margin loss. None for others.
    """
    if self.attack not in better_attacks.PUBLISHED or self.fixed_statistics:
      return ()
    if self.loss != "cross_entropy":
      return ()
    fixed = (*self.options, ("statistics", "fixed"))
    return (
      dataclasses.replace(self, name=_fixed_name(self.name), options=fixed),
      dataclasses.replace(self, name=_margin_name(self.name), loss="margin"),
    )

  def arguments(self) -> dict[str, Any]:
    """Returns the keyword arguments of the attack's function."""
    signature = _signature(self.attack)
    given: dict[str | None, Any] = {
      "norm": self.norm,
      "epsilon": self.epsilon,
      "step_size": self.step_size,
      signature.steps: self.num_steps,
      "num_restarts": self.num_restarts,
      "loss": self.loss,
      **dict(self.options),
    }
    return {
      name: given[name]
      for name in signature.parameters
      if name != "statistics" and given.get(name) is not None
    }

  def run(
    self, key: Array, classifier: Classifier, images: Array, labels: Array
  ) -> Array:
    """Returns the images that the classifier is scored on, [B, H, W, C].

    Args:
      key: Random key of the attack.
      classifier: Callable from images to logits; one of `models.classifier`
        with batch statistics for an attack that holds them fixed.
      images: Clean images, [B, H, W, C] in [0, 1].
      labels: True classes, int32 [B].

    Raises:
      UserError: The attack does not suit the classifier's BatchNorm mode, or
        refuses an argument.
    """
    if self.fixed_statistics:
      classifier = models.with_fixed_statistics(classifier)
    elif self.attack == _AUTOATTACK:
      if models.batch_norm_of(classifier) == "batch":
        raise UserError(f"attack: {self.name!r} {REFILLED}")
    return self._attack(key, classifier, images, labels)

  def _attack(
    self, key: Array, classifier: Classifier, images: Array, labels: Array
  ) -> Array:
    if self.attack == _NOMINAL:
      return images
    if self.attack == _AUTOATTACK:
      result = attacks.autoattack(
        key, classifier, images, labels, progress=False, **self.arguments()
      )
      return jnp.asarray(result.adversarial)
    return attacks.ATTACKS[self.attack](
      key, classifier, images, labels, **self.arguments()
    )

  def check(self, image_shape: Sequence[int], num_classes: int) -> None:
    """Checks that the attack takes its numbers, without computing anything.

    Args:
      image_shape: Shape [H, W, C] of the images.
      num_classes: Number of classes, K.

    Raises:
      UserError: The attack refuses a number, or cannot attack such images.
    """
    _dry_run(self, tuple(image_shape), num_classes)

  def describe(self) -> str:
    """Describes the protocol on one line."""
    if self.attack == _NOMINAL:
      return "clean images"
    numbers = wording.attack(
      norm=self.norm,
      epsilon=self.epsilon,
      step_size=self.step_size,
      num_steps=self.num_steps,
      num_restarts=self.num_restarts,
      loss=self.loss,
      unit="query"
      if _signature(self.attack).steps == "num_queries"
      else "step",
      options=self.options,
    )
    return f"{self.name}: {numbers}"


def _fixed_name(name: str) -> str:
  """Returns the name of a protocol with the statistics fixed."""
  return (
    name.removesuffix(":statistics=through").replace(
      ":statistics=through:", ":"
    )
    + ":statistics=fixed"
  )


def _margin_name(name: str) -> str:
  """Returns the name of a cross-entropy protocol with the margin loss."""
  head, *texts = name.split(":")
  given = "loss=cross_entropy"
  if given in texts:
    texts[texts.index(given)] = "loss=margin"
    return ":".join([head, *texts])
  return ":".join([f"{head.removesuffix('-cross_entropy')}-margin", *texts])


def _mean_pixel(images: Array, weights: Array) -> Array:
  """Maps images [B, H, W, C] to logits [B, K]: a classifier to be traced."""
  return images.mean((1, 2, 3))[:, None] * weights


@functools.lru_cache(maxsize=1024)
def _dry_run(
  protocol: Protocol, image_shape: tuple[int, ...], num_classes: int
) -> None:
  """Traces an attack's program; see `Protocol.check`."""
  if protocol.attack == _NOMINAL:
    return
  arguments = protocol.arguments()
  if protocol.attack == _AUTOATTACK:
    versions.make(
      arguments["version"],
      norm=arguments["norm"],
      num_classes=num_classes,
      targeting=arguments.get("targeting"),
    )
    return

  def attack(key: Array, weights: Array, images: Array, labels: Array) -> Array:
    classifier = jax.tree_util.Partial(_mean_pixel, weights=weights)
    return protocol._attack(key, classifier, images, labels)

  try:
    jax.eval_shape(
      attack,
      jax.eval_shape(lambda: jax.random.key(0)),
      jax.ShapeDtypeStruct((num_classes,), np.float32),
      jax.ShapeDtypeStruct((2, *image_shape), np.float32),
      jax.ShapeDtypeStruct((2,), np.int32),
    )
  except UserError as error:
    raise UserError(f"attack: {protocol.name!r}: {error}") from None
  except (TypeError, ValueError, OverflowError) as error:
    raise UserError(
      f"attack: {protocol.name!r}: {error}; allowed: numbers that the attack"
      " takes"
    ) from None


def _value(name: str, text: str, kind: Any) -> Any:
  """Reads the value of a parameter from text."""
  try:
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    if kind is float and text.count("/") == 1:
      above, below = text.split("/")
      return float(above) / float(below)
    return kind(text) if kind in (int, float) else text
  except (ValueError, KeyError, ZeroDivisionError):
    kinds = {bool: "true or false", float: "a number", int: "an integer"}
    raise UserError(f"{name}: {text!r}; allowed: {kinds[kind]}") from None


def _given(attack: str, name: str, texts: list[str]) -> dict[str, Any]:
  """Reads the parameters behind a name, `:<parameter>=<value>` each."""
  known, given = _signature(attack).parameters, {}
  for text in texts:
    parameter, equals, value = text.partition("=")
    if not equals or parameter in given:
      raise UserError(
        f"attack: {name!r}; allowed: each parameter once, as"
        " :<parameter>=<value>"
      )
    checks.choice(f"parameter of {attack}", parameter, known)
    given[parameter] = _value(parameter, value, known[parameter].annotation)
  return given


def _read(name: str) -> tuple[str, dict[str, Any]]:
  """Reads the attack that a name stands for and the parameters it gives."""
  head, *texts = name.split(":")
  known = "|".join(map(re.escape, (_NOMINAL, *attacks.ATTACKS, _AUTOATTACK)))
  match = re.fullmatch(
    rf"(?P<attack>{known})(?P<steps>[1-9][0-9]*)?(-(?P<variant>\w+))?", head
  )
  if not match:
    raise _not_allowed(name)
  attack, steps, variant = match["attack"], match["steps"], match["variant"]
  if attack == _NOMINAL:
    if name != _NOMINAL:
      raise _not_allowed(name)
    return attack, {}
  signature = _signature(attack)
  given = _given(attack, name, texts)
  for value, parameter in (
    (steps and _value(signature.steps or "steps", steps, int), signature.steps),
    (variant, signature.variant),
  ):
    if not value:
      continue
    # A number or a variant must have a meaning, and be given only once.
    choices = signature.choices.get(parameter or "", (value,))
    if parameter is None or parameter in given or value not in choices:
      raise _not_allowed(name)
    given[parameter] = value
  return attack, given


def _check(attack: str, given: dict[str, Any]) -> None:
  """Checks the values of an attack's parameters before anything is compiled."""
  signature = _signature(attack)
  for parameter, choices in signature.choices.items():
    value = given[parameter]
    if value is None and signature.parameters[parameter].default is None:
      continue
    if not isinstance(value, str) or value not in choices:
      only = f" for {attack}" if set(choices) < set(balls.BALLS) else ""
      raise UserError(
        f"{parameter}: {shown(value)}; allowed:"
        f" {', '.join(sorted(choices))}{only}{near(value, choices)}"
      )
  checks.epsilon(given["epsilon"], given["norm"])
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
  """Returns the protocol of a name.

  Args:
    name: "nominal"; "fgsm"; "ifgsm20" (20 steps, from the clean image);
      "pgd20" (random start); "pgd20-margin" (another loss); "apgd100",
      "apgd100-targeted_dlr"; "fab100"; "square5000"; "autoattack",
      "autoattack-fast". Parameters of the attack's function can follow:
      "pgd20:momentum=1:random_start=false", "square:norm=l2:epsilon=0.5"; and
      one of `STATISTICS`: "pgd20:statistics=fixed".
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step.
    norm: Norm of the ball.
    num_restarts: Number of restarts of PGD.

  Returns:
    The protocol.

  Raises:
    UserError: Unknown name, numbers out of range, or numbers that the attack
      refuses together, whatever the images.
  """
  checks.instance("attack", name, str, allowed_names())
  attack, given = _read(name)
  if attack == _NOMINAL:
    return Protocol(name, attack)
  known = _signature(attack).parameters
  configured: dict[str, Any] = {"epsilon": epsilon, "norm": norm}
  if "step_size" in known:
    configured["step_size"] = step_size
  if attack == "pgd":
    configured["num_restarts"] = num_restarts
  given = configured | given
  for parameter, described in known.items():
    given.setdefault(parameter, described.default)
    if given[parameter] is inspect.Parameter.empty:
      raise _not_allowed(name)
  _check(attack, given)
  made = _protocol(name, attack, given)
  made.check(_TRIED_SHAPE, _TRIED_CLASSES)
  return made


def _protocol(name: str, attack: str, given: dict[str, Any]) -> Protocol:
  """Sorts the parameters into what every row of a table has and the rest."""
  signature = _signature(attack)
  numbers = _IMPLIED.get(attack, {}) | given
  fixed = {
    "norm": numbers.pop("norm"),
    "epsilon": numbers.pop("epsilon"),
    "step_size": numbers.pop("step_size", None),
    "num_steps": numbers.pop(signature.steps or "num_steps", None),
    "num_restarts": numbers.pop("num_restarts", None),
    "loss": numbers.pop("loss", None),
  }
  if attack == "fgsm":
    fixed["step_size"] = fixed["epsilon"]
  if "loss" in given and given["loss"] not in losses.TARGETED_LOSSES:
    numbers.pop("num_targets", None)
  # Only numbers that differ from the plain attack are listed.
  options = tuple(
    (option, value)
    for option, value in numbers.items()
    if value != signature.parameters[option].default
    or option in ("num_targets", "version")
  )
  return Protocol(name, attack, options=options, **fixed)


def parse_list(names: str, **numbers: object) -> tuple[Protocol, ...]:
  """Returns the protocols of a comma-separated list, see `parse`."""
  checks.instance("attacks", names, str, f"a list of {allowed_names()}")
  found = [name.strip() for name in names.split(",") if name.strip()]
  if not found:
    raise UserError(f"attacks: {names!r}; allowed: a list of {allowed_names()}")
  if len(set(found)) < len(found):
    raise UserError(f"attacks: {names!r}; allowed: each name once")
  return tuple(parse(name, **numbers) for name in found)  # type: ignore[arg-type]
