"""Attention shift as a number: how far an attack moves a network's maps.

The paper shows maps (Fig. 1 to 3) and concludes that successful attacks shift
attention, stronger ones more. Here are the distances behind such pictures:
against the rounds of an attack, for images that it fools and those that it does
not, by class, and whether the shift tells the one from the other (AUC).

Mind that the map is of the true class, and that in networks which pool their
last tensor its sum before the ReLU is that class's logit up to a bias: an attack
that lowers the logit must take from the map. Some correlation is therefore
built in; the distances, which ignore scale, see only what the attack takes from
one place more than from others.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from atat_jax import attention, checks, compilation, models, rng, sharding
from atat_jax.analyses.attention import tapped_layer
from atat_jax.attacks import base
from atat_jax.data import batches
from atat_jax.evaluation import iterates
from atat_jax.evaluation.map_distances import DISTANCES
from atat_jax.evaluation.networks import Networks, classifiers
from atat_jax.evaluation.ranking import auc
from atat_jax.typing import Array, Variables

_TWO_SIDED_95 = 1.959964


def _shift(
  key: Array,
  variables: Variables,
  images: Array,
  labels: Array,
  rounds: Array,
  epsilon: Array,
  step_size: Array,
  random_start: Array,
  *,
  model: nn.Module | compilation.ByIdentity,
  layer: str,
  norm: str,
  loss: str,
) -> dict[str, Array]:
  """Predictions and distances [r + 1, B], the clean images first."""
  network = compilation.unwrap(model)

  def look(seen: Array) -> tuple[Array, Array]:
    logits, maps, _ = attention.forward(
      network, variables, seen, labels, layers=(layer,)
    )
    return logits.argmax(-1), maps[layer]

  kept = iterates.pgd_iterates(
    key,
    models.classifier(network, variables),
    images,
    labels,
    rounds,
    epsilon=epsilon,
    step_size=step_size,
    random_start=random_start,
    norm=norm,
    loss=loss,
  )
  # One compiled network for all of them, and memory for one at a time.
  predictions, maps = lax.map(look, jnp.concatenate([images[None], kept]))
  distances = {
    name: distance(maps[:1], maps) for name, distance in DISTANCES.items()
  }
  return {"prediction": predictions, **distances}


_jitted = compilation.jit(
  _shift, static_argnames=("model", "layer", "norm", "loss")
)


def attention_shift(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  step_size: float,
  rounds: Sequence[int] = tuple(range(17)),
  norm: str = "linf",
  loss: str = "cross_entropy",
  random_start: bool = True,
  layer: str | None = None,
  batch_size: int = 128,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Distances of the true class's maps between clean and attacked images.

  One attack of PGD for each network; its iterates after the given rounds are
  looked at. Batches draw from the keys from which `evaluation.accuracy` draws.

  An image is fooled in a round if the network is right without attack and wrong
  after that round; it is kept if it is right both times. Images that are wrong
  without attack are neither: no attack has to move anything there. Fooled is
  what the AUC predicts, from the distance in the same round.

  Args:
    key: Random key of the attacks' start.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], any number.
    labels: Integers [n]: the true classes.
    epsilon: Radius of the ball, in the unit of the pixels.
    step_size: Length of a step, in the same unit.
    rounds: r numbers of steps, increasing; 0 is the attack's start, so that
      with `random_start` it says what noise does.
    norm: "linf", "l2" or "l1".
    loss: What the attack increases, one of `losses.ATTACK_LOSSES`.
    random_start: Whether the attack starts at a random point of the ball or at
      the clean image.
    layer: A submodule that all the networks have; None: the last convolutional
      tensor of each.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Returns:
    `networks` [m], `distances` (see `map_distances.DISTANCES`), `rounds` [r],
    `labels` [n], `layer`, `protocol`, `confidence` (what the bands are), and for
    each network
    `<name>_clean_prediction` int32 [n], `<name>_prediction` int32 [r, n],
    `<name>_fooled`, `<name>_kept` bool [r, n], and for each distance
    `<name>_<distance>` float32 [r, n], with the mean and the band
    `<name>_<distance>_mean`, `_low`, `_high` float64 [r] over all images,
    `<name>_<distance>_fooled_mean`, `_low`, `_high` [r] over those fooled, and
    `..._kept_...` over those kept,
    `<name>_<distance>_class_mean`, `_low`, `_high` [K] by true class, after the
    last round, and
    `<name>_<distance>_auc`, `_auc_low`, `_auc_high`, `_auc_error` [r]: area,
    interval and standard error (`ranking.auc`), NaN where no image or every
    image is fooled.
    Bands are the mean and 1.96 standard errors (normal, 95 %) to either side;
    NaN for groups of fewer than two images, the mean of none being NaN.

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  steps = iterates.check_settings(
    rounds=rounds, epsilon=epsilon, step_size=step_size, norm=norm, loss=loss
  )
  checks.positive("batch_size", batch_size, integer=True)
  named, images, labels, num_classes = classifiers(networks, images, labels)
  base.check_loss(loss, num_classes)
  layers = {
    name: tapped_layer(*pair, images, layer) for name, pair in networks.items()
  }
  mesh = sharding.make_mesh() if mesh is None else mesh
  found = {
    "networks": np.array(list(named)),
    "distances": np.array(list(DISTANCES)),
    "rounds": steps,
    "labels": labels,
    "layer": np.array(", ".join(dict.fromkeys(layers.values()))),
    "protocol": np.array(
      iterates.describe(
        rounds=steps,
        epsilon=epsilon,
        step_size=step_size,
        norm=norm,
        loss=loss,
        random_start=random_start,
      )
    ),
    "confidence": np.array("95 %: 1.96 standard errors to either side"),
  }
  indices, _ = batches.eval_batches(len(labels), min(batch_size, len(labels)))
  for name, (model, _) in networks.items():
    (variables,) = sharding.put_replicated(mesh, named[name].args)
    parts = []
    for number, rows in enumerate(indices):
      part = _jitted(
        rng.stream(key, "evaluation", number),
        variables,
        sharding.put_batch(mesh, images[rows]),
        sharding.put_batch(mesh, labels[rows]),
        jnp.asarray(steps),
        jnp.asarray(epsilon, jnp.float32),
        jnp.asarray(step_size, jnp.float32),
        jnp.asarray(random_start, bool),
        model=compilation.hashable(model),
        layer=layers[name],
        norm=norm,
        loss=loss,
      )
      parts.append(sharding.to_host(mesh, part))
    looks = {
      what: np.concatenate([part[what] for part in parts], -1)[:, : len(labels)]
      for what in parts[0]
    }
    statistics = summarize(looks, labels, num_classes)
    found |= {f"{name}_{what}": value for what, value in statistics.items()}
  return found


def summarize(
  looks: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
  """What `attention_shift` returns of one network, without its name.

  Args:
    looks: `prediction` and the distances [r + 1, n], the clean images first.
    labels: int32 [n].
    num_classes: K.

  Returns:
    Predictions, groups, distances, and their statistics.
  """
  prediction = looks["prediction"]
  right = prediction == labels
  groups = {"fooled": right[0] & ~right[1:], "kept": right[0] & right[1:]}
  found = {
    "clean_prediction": prediction[0],
    "prediction": prediction[1:],
    **groups,
  }
  everyone = np.ones_like(groups["fooled"])
  classes = labels == np.arange(num_classes)[:, None]
  for name in DISTANCES:
    distance = looks[name][1:]
    last = np.broadcast_to(distance[-1], classes.shape)
    found[name] = distance
    for group, values, members in (
      ("", distance, everyone),
      ("fooled_", distance, groups["fooled"]),
      ("kept_", distance, groups["kept"]),
      ("class_", last, classes),
    ):
      for what, value in mean_band(values, members).items():
        found[f"{name}_{group}{what}"] = value
    areas = [
      auc(values[right[0]], fooled[right[0]])
      for values, fooled in zip(distance, groups["fooled"], strict=True)
    ]
    area, error = np.array(areas).T
    found[f"{name}_auc"], found[f"{name}_auc_error"] = area, error
    found[f"{name}_auc_low"] = np.clip(area - _TWO_SIDED_95 * error, 0, 1)
    found[f"{name}_auc_high"] = np.clip(area + _TWO_SIDED_95 * error, 0, 1)
  return found


def mean_band(values: np.ndarray, members: np.ndarray) -> dict[str, np.ndarray]:
  """Means over the members of each row, with 95 % bands.

  Args:
    values: [g, n].
    members: bool [g, n]: which of them count.

  Returns:
    `mean`, `low`, `high` float64 [g]: the mean and 1.96 standard errors (normal)
    to either side. The mean of no member, and the band of fewer than two, is
    NaN.
  """
  rows = []
  for row, chosen in zip(values, members, strict=True):
    some = row[chosen].astype(np.float64)
    mean = some.mean() if len(some) else np.nan
    spread = some.std(ddof=1) if len(some) > 1 else np.nan
    half = _TWO_SIDED_95 * spread / np.sqrt(max(len(some), 1))
    rows.append((mean, mean - half, mean + half))
  mean, low, high = np.array(rows, np.float64).reshape(-1, 3).T
  return {"mean": mean, "low": low, "high": high}
