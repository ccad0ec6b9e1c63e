"""Certified accuracy beside that under attacks: each checks the other.

An image that is certified is classified correctly everywhere in the ball, so
that an attack which fools it contradicts the bound: one of them is wrong.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from atat_jax import bounds
from atat_jax.attacks.diagnostics import Diagnostic, diagnostic
from atat_jax.data.base import Split, as_floats
from atat_jax.process import stops
from atat_jax.runs import wording, worst_case
from atat_jax.typing import Classifier

Certificate = dict[str, Any]
"""Entry of "certificates" in `results.json`."""

_IDENTITY = ("model", "method", "norm", "epsilon", "num_examples")


def wanted(
  *, model: str, epsilon: float, num_examples: int, checkpoint_step: int | None
) -> Certificate:
  """Makes a certificate without its result.

  Args:
    model: Name of the network.
    epsilon: Radius of the linf ball.
    num_examples: Number of images.
    checkpoint_step: Step of the network's checkpoint, None where there is none.
  """
  return {
    "model": model,
    "method": "crown",
    "norm": "linf",
    "epsilon": epsilon,
    "num_examples": num_examples,
    "checkpoint_step": checkpoint_step,
  }


def is_same(one: Certificate, other: Certificate) -> bool:
  """Whether two certificates answer one question."""
  return all(one[field] == other[field] for field in _IDENTITY)


def measure(
  certificate: Certificate,
  classifier: Classifier,
  test: Split,
  *,
  batch_size: int,
) -> Certificate:
  """Certifies images, and adds the result.

  Args:
    certificate: Certificate without its result.
    classifier: The network, as a pytree.
    test: Images, uint8 or float32 in [0, 1], and labels, on the host.
    batch_size: Images at a time.

  Returns:
    The certificate, with a bit an image.

  Raises:
    UserError: A network with a part that has no bounds.
  """
  began, count = time.perf_counter(), len(test.labels)
  size = min(batch_size, count)
  found = []
  with tqdm(
    total=count,
    unit="img",
    desc=f"certify {certificate['model']}",
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for start in range(0, count, size):
      stops.check()
      places = np.minimum(np.arange(start, start + size), count - 1)
      made = bounds.crown(
        classifier,
        jnp.asarray(as_floats(test.images[places])),
        jnp.asarray(test.labels[places]),
        epsilon=certificate["epsilon"],
      )
      found.append(np.asarray(made.certified))
      bar.update(min(size, count - start))
  certified = np.concatenate(found)[:count]
  return {
    **certificate,
    "accuracy": float(certified.mean()),
    "correct": worst_case.pack(certified),
    "seconds": round(time.perf_counter() - began, 3),
  }


def check(
  certificate: Certificate, rows: Sequence[Mapping[str, Any]]
) -> Diagnostic | None:
  """Compares a certificate with the rows on the same images in the same ball.

  Args:
    certificate: The certificate.
    rows: Rows of `results.json`.

  Returns:
    The diagnostic; None if there is no such row.
  """
  certified = worst_case.unpack(certificate)
  below = {
    row["attack"]: row
    for row in rows
    if row["model"] == certificate["model"]
    and row["batch_norm"] == "running"
    and row["num_examples"] == certificate["num_examples"]
    and row.get("correct") is not None
    and _is_within(row, certificate)
  }
  if not below:
    return None
  fooled = {
    name: int((certified & ~worst_case.unpack(row)).sum())
    for name, row in below.items()
  }
  worst = max(fooled, key=lambda name: fooled[name])
  least = min(below, key=lambda name: below[name]["accuracy"])
  shares = (
    f"{wording.percent(certificate['accuracy'])} of"
    f" {wording.plural(len(certified), 'image')} are certified by linear bounds"
    f" (CROWN, linf, epsilon {certificate['epsilon']:.4g})"
  )
  remains = f"{least} leaves {wording.percent(below[least]['accuracy'])}"
  return diagnostic(
    fooled[worst] > 0,
    flagged=(
      "Certified images were fooled",
      f"{shares}, and yet {worst} fooled {fooled[worst]} of these: the bounds or"
      " the attack is wrong, and neither number can be believed.",
    ),
    passed=(
      "No certified image was fooled",
      f"{shares}, and none of these was fooled; {remains}. The robust accuracy"
      " lies between.",
    ),
    rule="largest number of certified images that a row on the same images, in"
    " the same ball or a smaller one, has as not correct; flag above 0",
    value=fooled[worst],
  )


def _is_within(row: Mapping[str, Any], certificate: Certificate) -> bool:
  """Whether the images of a row lie in the ball of a certificate."""
  if row["attack"] == "nominal":
    return True
  return row["norm"] == "linf" and row["epsilon"] <= certificate["epsilon"]
