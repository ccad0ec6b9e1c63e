"""One call from a file of PyTorch weights to a network."""

import pathlib
from typing import Any

from atat_jax import checks, models
from atat_jax.errors import UserError
from atat_jax.interop import loaded as results
from atat_jax.interop import recognition, sanity_check
from atat_jax.interop.loaded import Loaded
from atat_jax.runs import locations


def load(
  path: pathlib.Path | str,
  *,
  images: Any = None,
  labels: Any = None,
  num_examples: int = 256,
  entry: str | None = None,
  **fields: Any,
) -> Loaded:
  """Loads PyTorch weights and recognises their network by names and shapes.

  Args:
    path: A `.safetensors` file, or one written by `torch.save`; no code in it
      is run. docs/networks.md lists the layouts.
    images: Clean images [N, H, W, C], uint8 or float in [0, 1], for a sanity
      check (`sanity`), which can change the normalisation and decides between
      networks that files do not tell apart; None: no check.
    labels: True classes [N] of the images.
    num_examples: Number of images for the check, evenly spread.
    entry: Entry of the checkpoint to take; None: see `read_state_dict`.
    **fields: Fields of the network that are known, such as num_classes or
      activated_shortcut; they precede what the layout says.

  Returns:
    The network, its variables, and what was recognised in one line.

  Raises:
    UserError: A file that cannot be read or is of no layout, fields that do
      not fit it, networks that only images or a field can tell apart, or
      accuracy at chance.
  """
  path = locations.expand("path", path)
  if (images is None) != (labels is None):
    raise UserError("images, labels: one of them; allowed: both or none")
  known = {x for name in models.MODELS for x in models.field_names(name)}
  for field in fields:
    checks.choice("field", field, known)
  if images is not None:  # before the file is read
    sanity_check.examples(images, labels, 1)
  checks.count("num_examples", num_examples)
  try:
    found = recognition.recognize(path, entry, fields)
    candidates = results.alternatives(path, found)
    if images is not None:
      return sanity_check.decide(
        candidates, images, labels, num_examples
      ).loaded
    if len(candidates) > 1:
      raise UserError(_open(found))
  except UserError as error:
    text = str(error)
    text = text if text.startswith(str(path)) else f"{path}: {text}"
    raise UserError(text) from None
  return candidates[0]


def _open(found: recognition.Recognized) -> str:
  """Says which fields the file leaves open."""
  choices = ", ".join(
    f"{name}={' or '.join(map(repr, values))}"
    for name, values in found.open.items()
  )
  return (
    f"{found.layout.title}: the file does not show which; allowed: {choices},"
    " or images and labels to decide it"
  )
