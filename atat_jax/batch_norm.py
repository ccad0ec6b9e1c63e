"""Forward pass with running or batch statistics of BatchNorm.

"running" is the mode of a deployed classifier: every image is classified by
itself. "batch" normalises by the statistics of the current batch, so that the
logits of an image depend on the other images; the paper's released code
evaluates in this mode, which can overstate robustness, so it is never a default
outside training.
"""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from flax import linen as nn

from atat_jax import checks
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables


def apply(
  model: nn.Module,
  variables: Variables,
  images: Array,
  *,
  batch_norm: BatchNormMode = "running",
) -> tuple[Array, PyTree]:
  """Makes one forward pass.

  Args:
    model: A linen module whose `__call__` takes images and, if it has BatchNorm
      or dropout, `train`.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].
    batch_norm: "running" or "batch".

  Returns:
    Logits [B, K] and the collection `batch_stats` after the pass: unchanged in
    the mode "running", moved by this batch in the mode "batch".

  Raises:
    UserError: Unknown mode.
  """
  checks.choice("batch_norm", batch_norm, get_args(BatchNormMode))
  checks.module(model)
  checks.instance(
    "variables", variables, Mapping, "the network's collections by name"
  )
  images = checks.batch(images, "images")
  stats = variables.get("batch_stats", {})
  takes_train = "train" in inspect.signature(type(model).__call__).parameters
  kwargs: dict[str, Any] = (
    {"train": batch_norm == "batch"} if takes_train else {}
  )
  if batch_norm == "running" or not stats:
    logits: Any = model.apply(variables, images, **kwargs)
    return logits, stats
  logits, updated = model.apply(
    variables, images, mutable=["batch_stats"], **kwargs
  )
  return logits, updated["batch_stats"]
