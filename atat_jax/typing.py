"""Shared types and the letters of shapes.

B batch, H height, W width, C channels, K classes. Images are float32
[B, H, W, C] in [0, 1]; perturbation sizes are in the same unit (8/255). Labels
are int32 [B], logits float32 [B, K]. Stored images are uint8 [N, H, W, C].
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax

Array: TypeAlias = jax.Array
Scalar: TypeAlias = jax.Array | float
"""Number, traced or not."""

PyTree: TypeAlias = Any
Variables: TypeAlias = Mapping[str, Any]
"""Collections of a flax model: {"params": ..., "batch_stats": ...}."""

Classifier: TypeAlias = Callable[[Array], Array]
"""Function from images [B, H, W, C] to logits [B, K]."""

BatchNormMode: TypeAlias = Literal["running", "batch"]
