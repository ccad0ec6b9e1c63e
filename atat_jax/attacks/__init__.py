"""Attacks on any classifier: (key, classifier, images, labels, ...) to images.

An attack sees a callable from images to logits and nothing else. Adding one is
one file and one line in `ATTACKS`.
"""

from collections.abc import Callable

from atat_jax.attacks.projected_gradient import fgsm, ifgsm, pgd
from atat_jax.typing import Array

ATTACKS: dict[str, Callable[..., Array]] = {
  "fgsm": fgsm,
  "ifgsm": ifgsm,
  "pgd": pgd,
}

__all__ = ["ATTACKS", "fgsm", "ifgsm", "pgd"]
