"""Attacks on any classifier: (key, classifier, images, labels, ...) to images.

An attack sees a callable from images to logits and nothing else. Adding one is
one file and one line in `ATTACKS`: protocols read its name, parameters, norms
and losses from its signature (see `base.norms`), and the contract tests run on
everything that is listed. `autoattack` runs an ensemble of attacks on any
number of images and returns an `AutoAttackResult`. Numbers that are not finite
follow one rule, see `nonfinite`: images stay finite and in ball and box, and a
`NonFiniteWarning` tells how often it was needed.
"""

from collections.abc import Callable

from atat_jax.attacks.auto_pgd import apgd
from atat_jax.attacks.autoattack import AutoAttackResult, autoattack
from atat_jax.attacks.base import Randomized
from atat_jax.attacks.fast_boundary import fab
from atat_jax.attacks.projected_gradient import fgsm, ifgsm, pgd
from atat_jax.attacks.square_search import square
from atat_jax.typing import Array

ATTACKS: dict[str, Callable[..., Array]] = {
  "fgsm": fgsm,
  "ifgsm": ifgsm,
  "pgd": pgd,
  "apgd": apgd,
  "fab": fab,
  "square": square,
}

__all__ = [
  "ATTACKS",
  "AutoAttackResult",
  "Randomized",
  "apgd",
  "autoattack",
  "fab",
  "fgsm",
  "ifgsm",
  "pgd",
  "square",
]
