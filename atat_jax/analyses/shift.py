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

Arrays: `networks` [m], `distances` (see `map_distances.DISTANCES`), `rounds` [r],
`labels` [n], `layer`, `protocol`, `confidence` and `auc_confidence` (the bands
and the AUC's intervals in words), and for each network those of `summarize`, as
`<name>_<array>`.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from atat_jax import attention, checks, compilation, models, rng, sharding
from atat_jax.analyses import base
from atat_jax.attacks import base as attacks_base
from atat_jax.attacks import nonfinite
from atat_jax.data import batches
from atat_jax.drawing import panels, style
from atat_jax.drawing.style import Figure
from atat_jax.drawing.text import plain
from atat_jax.evaluation import iterates
from atat_jax.evaluation.attention_views import tapped_layers
from atat_jax.evaluation.map_distances import DISTANCES
from atat_jax.evaluation.networks import (
  Networks,
  classifiers,
  devices,
  refuse_nonfinite,
)
from atat_jax.evaluation.ranking import auc
from atat_jax.runs import files, intervals, wording
from atat_jax.typing import Array, Variables

# Smaller groups of images say nothing of a network.
_ENOUGH = 10
_MOST_CLASSES = 20
_FINITE = "finite"

_CONFIDENCE = "95 %, by Student's t"
_AUC_CONFIDENCE = "95 %, the wider ends of DeLong's and Newcombe's"
_OLD_AUC_CONFIDENCE = "95 %, from DeLong's standard error"


# --- Arrays ------------------------------------------------------------------


def _shift(
  key: Array,
  variables: Variables,
  images: Array,
  labels: Array,
  rounds: Array,
  *,
  model: nn.Module | compilation.Opaque,
  layer: str,
  **attack: Any,
) -> dict[str, Array]:
  """Returns predictions, whose logits are finite, and distances [r + 1, B].

  The clean images come first.
  """
  network = compilation.unwrap(model)

  def view(seen: Array) -> tuple[Array, Array, Array]:
    logits, maps, _ = attention.forward(
      network, variables, seen, labels, layers=(layer,)
    )
    return logits.argmax(-1), nonfinite.usable(logits), maps[layer]

  kept = iterates.pgd_iterates(
    key, models.classifier(network, variables), images, labels, rounds, **attack
  )
  # One compiled network for all of them, and memory for one at a time.
  predictions, finite, maps = lax.map(
    view, jnp.concatenate([images[None], kept])
  )
  distances = {
    name: distance(maps[:1], maps) for name, distance in DISTANCES.items()
  }
  return {"prediction": predictions, _FINITE: finite, **distances}


_jitted = compilation.jit(
  _shift, static_argnames=("model", "layer", "norm", "loss")
)


def _measure(
  number: int,
  images: Array,
  labels: Array,
  *,
  key: Array,
  variables: Variables,
  model: nn.Module,
  layer: str,
  attack: iterates.WatchedAttack,
) -> dict[str, Array]:
  """Returns predictions and distances [r + 1, B] of one batch."""
  return _jitted(
    rng.stream(key, "evaluation", number),
    variables,
    images,
    labels,
    model=compilation.hashable(model),
    layer=layer,
    **attack.traced(),
    **attack.static(),
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
  """Returns distances of the true class's maps between clean and attacked images.

  Batches draw from the keys from which `evaluation.accuracy` draws.

  Args:
    key: Random key of the attacks' start.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], any number.
    labels: Integers [n]: the true classes.
    epsilon: Radius; this and the next, see `iterates.WatchedAttack`.
    step_size: Length of a step.
    rounds: r numbers of steps; 0, the random start, says what noise does.
    norm: Norm of the ball.
    loss: Loss that the attack increases.
    random_start: Whether the start is random.
    layer: A submodule of all the networks; None: the last convolutional tensor.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Returns:
    The arrays that the module describes, by name.

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  checks.key(key)
  attack = iterates.WatchedAttack(
    rounds, epsilon, step_size, norm, loss, random_start
  )
  checks.positive("batch_size", batch_size, integer=True)
  named, images, labels, num_classes = classifiers(networks, images, labels)
  attacks_base.check_loss(loss, num_classes)
  layers = tapped_layers(networks, images, layer)
  found = _facts(list(named), labels, layers, attack)
  walk: dict[str, Any] = {"batch_size": min(batch_size, len(labels))}
  walk["mesh"] = devices(mesh)
  for name, (model, _) in networks.items():
    (variables,) = sharding.put_replicated(walk["mesh"], named[name].args)
    batch = {"variables": variables, "model": model, "layer": layers[name]}
    measure = functools.partial(_measure, key=key, attack=attack, **batch)
    measured = batches.map_batches(measure, images, labels, axis=-1, **walk)
    statistics = summarize(_checked(name, measured), labels, num_classes)
    found |= {f"{name}_{what}": value for what, value in statistics.items()}
  return found


def _checked(
  name: str, measured: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
  """Returns one network's measurements, all finite."""
  refuse_nonfinite(name, "images' logits", np.all(measured[_FINITE], 0))
  for distance in DISTANCES:
    refuse_nonfinite(name, f"distances ({distance})", measured[distance])
  return measured


def _facts(
  names: list[str],
  labels: np.ndarray,
  layers: Mapping[str, str],
  attack: iterates.WatchedAttack,
) -> dict[str, np.ndarray]:
  """Returns the arrays that are not of one network."""
  return {
    "networks": np.array(names),
    "distances": np.array(list(DISTANCES)),
    "rounds": attack.steps,
    "labels": labels,
    "layer": np.array(", ".join(dict.fromkeys(layers.values()))),
    "protocol": np.array(attack.describe()),
    "confidence": np.array(_CONFIDENCE),
    "auc_confidence": np.array(_AUC_CONFIDENCE),
  }


def summarize(
  measured: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
  """Returns the statistics of one network.

  An image is fooled in a round if the network is right without attack and wrong
  after that round; it is kept if it is right both times. Images that are wrong
  without attack are neither: no attack has to move anything there. Fooled is
  what the AUC predicts, from the distance in the same round.

  Args:
    measured: `prediction` and the distances [r + 1, n], the clean images first.
    labels: int32 [n].
    num_classes: Number of classes, K.

  Returns:
    `clean_prediction` int32 [n], `prediction` int32 [r, n], `fooled`, `kept` bool
    [r, n], and for each distance
    `<distance>` float32 [r, n], with the mean and the band
    `<distance>_mean`, `_low`, `_high` float64 [r] over all images,
    `<distance>_fooled_mean`, `_low`, `_high` [r] over those fooled, and
    `..._kept_...` over those kept,
    `<distance>_class_mean`, `_low`, `_high` [K] by true class, after the last
    round, and
    `<distance>_auc`, `_auc_low`, `_auc_high`, `_auc_error` [r]: area, interval
    (`intervals.area`) and standard error (`ranking.auc`), NaN where no image or
    every image is fooled. Bands are those of `mean_band`.
  """
  prediction = measured["prediction"]
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
    distance = measured[name][1:]
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
    for what, value in _areas(distance, groups["fooled"], right[0]).items():
      found[f"{name}_{what}"] = value
  return found


def _areas(
  distance: np.ndarray, fooled: np.ndarray, right: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns areas under the ROC curve [r] with errors and intervals."""
  found = []
  for values, positive in zip(distance, fooled, strict=True):
    area, error = auc(values[right], positive[right])
    count = int(positive[right].sum())
    ends = intervals.area(area, error, count, int(right.sum()) - count)
    found.append((area, error, *ends))
  names = ("auc", "auc_error", "auc_low", "auc_high")
  return dict(zip(names, np.array(found).T, strict=True))


def mean_band(values: np.ndarray, members: np.ndarray) -> dict[str, np.ndarray]:
  """Returns means over the members of each row, with 95 % bands.

  Args:
    values: [g, n].
    members: bool [g, n]: those that count.

  Returns:
    `mean`, `low`, `high` float64 [g]: the mean and its interval
    (`intervals.mean`). The mean of no member is NaN, and so is the band of fewer
    than two or of equal values.
  """
  found = np.full((3, len(values)), np.nan)
  for place, (row, chosen) in enumerate(zip(values, members, strict=True)):
    if chosen.any():
      mean, ends = intervals.mean(row[chosen])
      found[:, place] = mean, *ends
  return dict(zip(("mean", "low", "high"), found, strict=True))


# --- Pictures ----------------------------------------------------------------

_TITLES = {
  "cosine": "cosine distance",
  "rank_correlation": "rank correlation",
  "top_decile": "highest tenth",
  "center_of_mass": "centre of mass",
}
_UNITS = {
  "cosine": "1 - cosine",
  "rank_correlation": "1 - Spearman's correlation",
  "top_decile": "share that has moved",
  "center_of_mass": "distance moved, in map diagonals",
}
_MARKS: dict[str, dict[str, Any]] = {
  "still right": {"marker": "o", "markerfacecolor": "white"},
  "fooled": {"marker": "s"},
}
_GROUPS = (("kept", "still right", -0.14), ("fooled", "fooled", 0.14))


def _draw(data: files.Arrays, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws the statistics, a panel for each distance.

  Each distance against the rounds of the attack, with bands; its mean over
  images that are fooled and over those that are not; the area under the ROC
  curve when it is to tell the ones from the others; its mean by class, up to 20
  classes. Pictures that would be empty are left out.

  Fooled and not fooled are compared after the last round after which a network
  has 10 images or more of either kind; a network without such a round is left
  out, which is said.
  """
  names = base.network_names(data)
  comparable = {
    name: place
    for name in names
    if (place := telling_round(data, name)) is not None
  }
  drawings: list[Callable[[], Figure]] = [functools.partial(_rounds, data)]
  if comparable:
    drawings += [
      functools.partial(_by_success, data, comparable),
      functools.partial(_auc, data, comparable),
    ]
  if len(data[f"{names[0]}_cosine_class_mean"]) <= _MOST_CLASSES:
    drawings.append(functools.partial(_classes, data))
  paths = []
  for number, drawing in enumerate(drawings, start=1):
    with style.context():
      path = directory / f"attention_shift_{number}.png"
      paths.append(style.save(drawing(), path))
  return paths


def telling_round(data: files.Arrays, name: str) -> int | None:
  """Returns the last place in `rounds` with enough images fooled and kept."""
  smaller = np.minimum(
    data[f"{name}_fooled"].sum(-1), data[f"{name}_kept"].sum(-1)
  )
  enough = np.flatnonzero(smaller >= _ENOUGH)
  return int(enough[-1]) if len(enough) else None


def _rounds_text(data: files.Arrays, place: int) -> str:
  return wording.plural(int(data["rounds"][place]), "round")


def _caption(fig: Figure, data: files.Arrays, *more: str) -> None:
  """Writes what was measured, and more sentences, below a figure."""
  images = wording.plural(len(data["labels"]), "image")
  about = (
    f"Maps of the true class at {data['layer']}, clean against attacked,"
    f" {images}; {data['protocol']}."
  )
  style.caption(fig, " ".join([about, *filter(None, more)]))


def _rounds(data: files.Arrays) -> Figure:
  rounds = data["rounds"]
  fig, axes = panels.four(_TITLES, 7.4, 6.6)
  for distance, ax in axes.items():
    for name, look in style.model_looks(base.network_names(data)).items():
      mean, low, high = (
        data[f"{name}_{distance}_{what}"] for what in ("mean", "low", "high")
      )
      line = style.line(look, marked=len(rounds) == 1)
      ax.plot(rounds, mean, label=plain(name), **line)
      ax.fill_between(
        rounds, low, high, color=look.color, alpha=0.2, linewidth=0
      )
    ax.set_ylim(bottom=0)
    ax.set_ylabel(_UNITS[distance])
    panels.integer_ticks(ax)
  for distance in list(axes)[2:]:
    axes[distance].set_xlabel("rounds of the attack (0: its start)")
  style.legend(fig, ax)
  _caption(fig, data, f"Bands: mean, {data['confidence']}.")
  return fig


def _row_names(data: files.Arrays, comparable: dict[str, int]) -> list[str]:
  """Returns each model with the number of its images that are fooled."""
  last = len(data["rounds"]) - 1
  names = []
  for name, place in comparable.items():
    fooled, kept = (
      data[f"{name}_{what}"][place] for what in ("fooled", "kept")
    )
    rounds = "" if place == last else f", {_rounds_text(data, place)}"
    names.append(
      f"{name}\n{fooled.sum():,} of {(fooled | kept).sum():,}{rounds}"
    )
  return names


def _counted(data: files.Arrays, comparable: dict[str, int]) -> str:
  """Returns what stands below the models' names, and who is left out."""
  text = (
    "Below a model: images fooled, of those right without attack, after"
    f" {_rounds_text(data, -1)} unless said otherwise."
  )
  missing = [n for n in base.network_names(data) if n not in comparable]
  if missing:
    text += (
      f" Left out, as no round has {_ENOUGH} images of either kind:"
      f" {', '.join(missing)}."
    )
  return text


def _at(
  data: files.Arrays, comparable: dict[str, int], pattern: str
) -> np.ndarray:
  """Returns an array's values [models] in the round of each model."""
  return np.array(
    [data[pattern.format(name)][place] for name, place in comparable.items()]
  )


def _by_success(data: files.Arrays, comparable: dict[str, int]) -> Figure:
  fig, axes = panels.four(_TITLES, 7.4, 2.6 + 0.6 * len(comparable))
  colors = style.model_colors(base.network_names(data))
  names = _row_names(data, comparable)
  for number, (distance, ax) in enumerate(axes.items()):
    panels.rows(ax, names, named=number % 2 == 0)
    for group, label, offset in _GROUPS:
      values = (
        _at(data, comparable, f"{{}}_{distance}_{group}_{what}")
        for what in ("mean", "low", "high")
      )
      panels.intervals_in_rows(
        ax,
        [colors[name] for name in comparable],
        *values,
        shift=offset,
        **_MARKS[label],
      )
    ax.set_xlim(left=0)
    ax.set_xlabel(_UNITS[distance])
  panels.key_to_marks(
    fig, {label: {**mark, "color": "black"} for label, mark in _MARKS.items()}
  )
  bars = f"Bars: mean, {data['confidence']}."
  _caption(fig, data, _counted(data, comparable), bars)
  return fig


def _auc(data: files.Arrays, comparable: dict[str, int]) -> Figure:
  fig, axes = panels.four(_TITLES, 7.4, 2.4 + 0.6 * len(comparable))
  colors = style.model_colors(base.network_names(data))
  names = _row_names(data, comparable)
  for number, (distance, ax) in enumerate(axes.items()):
    panels.rows(ax, names, named=number % 2 == 0)
    area, low, high = (
      _at(data, comparable, f"{{}}_{distance}_{what}")
      for what in ("auc", "auc_low", "auc_high")
    )
    ax.axvline(0.5, color=style.GREY, linewidth=1)
    used = [colors[name] for name in comparable]
    panels.intervals_in_rows(ax, used, area, low, high, marker="o")
    for row, value in enumerate(area):
      ax.annotate(
        f"{value:.2f}",
        (value, row),
        (0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
    ax.set_xlim(0, 1)
  for distance in list(axes)[2:]:
    axes[distance].set_xlabel("AUC (0.5: chance)")
  _caption(
    fig,
    data,
    "AUC: how often a fooled image's map has moved farther than that of one that"
    " is not.",
    _counted(data, comparable),
    f"Bars: {data.get('auc_confidence', _OLD_AUC_CONFIDENCE)}.",
  )
  return fig


def _classes(data: files.Arrays) -> Figure:
  networks = base.network_names(data)
  num_classes = len(data[f"{networks[0]}_cosine_class_mean"])
  names = [str(n) for n in data.get("class_names", np.arange(num_classes))]
  fig, axes = panels.four(_TITLES, 7.4, 2.6 + 0.4 * num_classes)
  for number, (distance, ax) in enumerate(axes.items()):
    means = [data[f"{name}_{distance}_class_mean"] for name in networks]
    panels.color_table(
      ax,
      np.array(means).T,
      names if number % 2 == 0 else [""] * num_classes,
      networks if number > 1 else [""] * len(networks),
    )
  _caption(
    fig,
    data,
    f"Numbers: means over the images of a class after {_rounds_text(data, -1)}."
    " Colours: shares of a model's largest mean, each model on its own scale.",
  )
  return fig


# --- Sentence ----------------------------------------------------------------

_MORE = "Their attention has shifted more"
_LESS = "Their attention has shifted less"
_NOTHING = "Their shift does not tell them from the others"


def _find(data: files.Arrays) -> base.Finding:
  names = base.network_names(data)
  means = [f"{name} {data[f'{name}_cosine_mean'][-1]:.2g}" for name in names]
  sentence = " ".join(
    [
      f"After {_rounds_text(data, -1)} the maps of clean and attacked images are"
      f" at a cosine distance of {wording.listed(means)} on average. Does the"
      " shift tell which images are fooled?",
      *(verdict(data, name) for name in names),
    ]
  )
  caption = (
    "Distances between the true class's maps of the clean image and of the image"
    " after so many rounds of the attack; 0: attention has not moved. Fooled:"
    " right on the clean image and wrong after that round; still right: right on"
    " both. AUC: the probability that a fooled image's map has moved further than"
    f" that of one still right. Bands: {data['confidence']}."
    f" {wording.plural(len(data['labels']), 'image')}, Grad-CAM at"
    f" {data['layer']}, {data['protocol']}."
  )
  return base.Finding("Attention shift", sentence, caption)


def verdict(data: files.Arrays, name: str) -> str:
  """Returns whether a network's attention shift predicts misclassification.

  A distance is said to tell where its AUC's 95 % interval leaves out 0.5.

  Args:
    data: Arrays of `attention_shift`.
    name: Name of the network.
  """
  place = telling_round(data, name)
  groups = ("fooled", "kept")
  fooled, kept = (
    int(data[f"{name}_{g}"][-1 if place is None else place].sum())
    for g in groups
  )
  if place is None:
    return (
      f"{name}: inconclusive, {fooled:,} fooled and {kept:,} not after the last"
      f" round; at least {_ENOUGH} of each are needed."
    )
  found: dict[str, list[str]] = {}
  for distance in map(str, data["distances"]):
    area, low, high = (
      float(data[f"{name}_{distance}_{what}"][place])
      for what in ("auc", "auc_low", "auc_high")
    )
    answer = _MORE if low > 0.5 else _LESS if high < 0.5 else _NOTHING
    found.setdefault(answer, []).append(f"{_TITLES[distance]} (AUC {area:.2f})")
  told = " ".join(
    f"{answer} by {', '.join(found[answer])}."
    for answer in (_MORE, _LESS, _NOTHING)
    if answer in found
  )
  return (
    f"{name}: after {_rounds_text(data, place)} {fooled:,} of {fooled + kept:,}"
    f" images are fooled. {told}"
  )


ANALYSIS = base.Analysis(
  stem="attention_shift",
  compute=attention_shift,
  arguments=lambda settings, _: {
    "batch_size": settings.batch_size,
    "rounds": tuple(range(settings.rounds[-1] + 1)),
    **settings.pgd(),
  },
  images=base.first("num_examples"),
  draw=_draw,
  find=_find,
  wide=True,
  unknown=("_mean", "_low", "_high", "_auc", "_auc_error"),
)
