"""Attention shift: against rounds, by success of the attack, as a predictor."""

import pathlib
from collections.abc import Callable

import numpy as np
from matplotlib import axes, colors, figure, lines, ticker

from atat_jax.drawing import style
from atat_jax.runs import files

# Groups of fewer images say nothing of a network.
_ENOUGH = 10
_MOST_CLASSES = 20

_MORE = "Their attention has shifted more"
_LESS = "Their attention has shifted less"
_NOTHING = "Their shift does not tell them from the others"

_NAMES = {
  "cosine": ("cosine distance", "1 - cosine"),
  "rank_correlation": ("rank correlation", "1 - Spearman's correlation"),
  "top_decile": ("highest tenth", "share of it that has moved"),
  "center_of_mass": ("centre of mass", "its way, in diagonals of the map"),
}


def draw(path: pathlib.Path, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws the statistics, a panel for each distance.

  Each distance against the rounds of the attack, with bands; its mean over
  images that are fooled and over those that are not; the area under the ROC
  curve when it is to tell the ones from the others; its mean by class, up to 20
  classes.

  Fooled and not fooled are compared after the last round after which a network
  has 10 images or more of either kind; a network without such a round is left
  out, which is said.

  Args:
    path: Of `attention_shift.npz`, what `evaluation.attention_shift` returns;
      `class_names` [K] may be added.
    directory: Where to.

  Returns:
    Paths of `attention_shift_{1,2,3,4}.png`; nothing if there is no file. Those
    that would be empty are left out.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None:
    return []
  telling = {name: telling_round(data, name) for name in _networks(data)}
  comparable = {name: k for name, k in telling.items() if k is not None}
  drawings: list[Callable[[], figure.Figure]] = [lambda: _rounds(data)]
  if comparable:
    drawings += [
      lambda: _by_success(data, comparable),
      lambda: _auc(data, comparable),
    ]
  if len(data[f"{_networks(data)[0]}_cosine_class_mean"]) <= _MOST_CLASSES:
    drawings.append(lambda: _classes(data))
  paths = []
  for number, drawing in enumerate(drawings, start=1):
    with style.context():
      fig = drawing()
      target = directory / f"attention_shift_{number}.png"
      paths.append(style.save(fig, target))
  return paths


def telling_round(data: files.Arrays, name: str) -> int | None:
  """The last place in `rounds` with enough images fooled and not fooled."""
  smaller = np.minimum(
    data[f"{name}_fooled"].sum(-1), data[f"{name}_kept"].sum(-1)
  )
  enough = np.flatnonzero(smaller >= _ENOUGH)
  return int(enough[-1]) if len(enough) else None


def sentences(path: pathlib.Path) -> list[str]:
  """Does attention shift predict misclassification? An answer for each network.

  A distance is said to tell where its AUC's 95 % interval leaves out 0.5.

  Args:
    path: Of `attention_shift.npz`.

  Returns:
    Two sentences or more for each network; none if there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  return [] if data is None else [_sentence(data, n) for n in _networks(data)]


def _sentence(data: files.Arrays, name: str) -> str:
  at = telling_round(data, name)
  if at is None:
    fooled = int(data[f"{name}_fooled"][-1].sum())
    kept = int(data[f"{name}_kept"][-1].sum())
    return (
      f"{name}: not to be said, {fooled:,} images are fooled and {kept:,} are"
      f" not after the last round; {_ENOUGH} of either are needed."
    )
  fooled = int(data[f"{name}_fooled"][at].sum())
  count = fooled + int(data[f"{name}_kept"][at].sum())
  found: dict[str, list[str]] = {}
  for distance in map(str, data["distances"]):
    area, low, high = (
      float(data[f"{name}_{distance}_{what}"][at])
      for what in ("auc", "auc_low", "auc_high")
    )
    verdict = _MORE if low > 0.5 else _LESS if high < 0.5 else _NOTHING
    found.setdefault(verdict, []).append(
      f"{_NAMES[distance][0]} (AUC {area:.2f})"
    )
  told = " ".join(
    f"{verdict} by {', '.join(found[verdict])}."
    for verdict in (_MORE, _LESS, _NOTHING)
    if verdict in found
  )
  return (
    f"{name}: after {_rounds_text(data, at)} {fooled:,} of {count:,} images are"
    f" fooled. {told}"
  )


def _rounds_text(data: files.Arrays, at: int) -> str:
  number = int(data["rounds"][at])
  return f"{number} round" + ("" if number == 1 else "s")


def _networks(data: files.Arrays) -> list[str]:
  return [str(name) for name in data["networks"]]


def _panels(
  data: files.Arrays, width: float, height: float
) -> tuple[figure.Figure, dict[str, axes.Axes]]:
  """A figure with a titled panel for each distance."""
  distances = [str(distance) for distance in data["distances"]]
  fig = style.new_figure(width, height)
  grid = fig.subplots(2, 2, squeeze=False)
  panels = dict(zip(distances, grid.flat, strict=True))
  for distance, ax in panels.items():
    ax.set_title(_NAMES[distance][0])
  return fig, panels


def _about(data: files.Arrays, *more: str) -> str:
  count = len(data["labels"])
  return " ".join(
    [
      f"Maps of the true class at {data['layer']}, clean against attacked,"
      f" {count:,} images; {data['protocol']}.",
      *more,
    ]
  )


def _rounds(data: files.Arrays) -> figure.Figure:
  rounds = data["rounds"]
  fig, panels = _panels(data, 7.4, 6.6)
  for distance, ax in panels.items():
    for name, look in style.model_looks(_networks(data)).items():
      mean, low, high = (
        data[f"{name}_{distance}_{what}"] for what in ("mean", "low", "high")
      )
      line = style.line(look, marked=len(rounds) == 1)
      ax.plot(rounds, mean, label=name, **line)
      ax.fill_between(
        rounds, low, high, color=look.color, alpha=0.2, linewidth=0
      )
    ax.set_ylim(bottom=0)
    ax.set_ylabel(_NAMES[distance][1])
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  for distance in list(panels)[2:]:
    panels[distance].set_xlabel("rounds of the attack (0: its start)")
  handles, names = ax.get_legend_handles_labels()
  fig.legend(handles, names, loc="outside upper center", ncols=4)
  style.caption(fig, _about(data, "Bands: mean,", f"{data['confidence']}."), 8)
  return fig


def _rows(
  data: files.Arrays, comparable: dict[str, int], height: float
) -> tuple[figure.Figure, dict[str, axes.Axes]]:
  """Panels with a row for each network that can be compared."""
  fig, panels = _panels(data, 7.4, height + 0.6 * len(comparable))
  last = len(data["rounds"]) - 1
  names = []
  for name, at in comparable.items():
    fooled, kept = (data[f"{name}_{what}"][at] for what in ("fooled", "kept"))
    rounds = "" if at == last else f", {_rounds_text(data, at)}"
    names.append(
      f"{name}\n{fooled.sum():,} of {(fooled | kept).sum():,}{rounds}"
    )
  for number, ax in enumerate(panels.values()):
    ax.set_yticks(range(len(names)), names if number % 2 == 0 else [])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.grid(visible=False, axis="y")
  return fig, panels


_COUNTED = "Below a model: images fooled, of those right without attack,"


def _left_out(data: files.Arrays, comparable: dict[str, int]) -> str:
  missing = [name for name in _networks(data) if name not in comparable]
  if not missing:
    return ""
  return (
    f"Left out, as no round has {_ENOUGH} images of either kind:"
    f" {', '.join(missing)}."
  )


_GROUPS = (
  ("kept", "still right", style.BLUE, "o", "white", -0.14),
  ("fooled", "fooled", style.VERMILION, "s", style.VERMILION, 0.14),
)


def _by_success(
  data: files.Arrays, comparable: dict[str, int]
) -> figure.Figure:
  fig, panels = _rows(data, comparable, 2.6)
  for distance, ax in panels.items():
    for group, _, color, marker, fill, shift in _GROUPS:
      mean, low, high = (
        np.array(
          [
            data[f"{name}_{distance}_{group}_{what}"][at]
            for name, at in comparable.items()
          ]
        )
        for what in ("mean", "low", "high")
      )
      ax.errorbar(
        mean,
        np.arange(len(mean)) + shift,
        xerr=(mean - low, high - mean),
        linestyle="",
        marker=marker,
        markersize=5,
        color=color,
        markerfacecolor=fill,
      )
    ax.set_xlim(left=0)
    ax.set_xlabel(_NAMES[distance][1])
  handles = [
    lines.Line2D(
      [],
      [],
      linestyle="",
      marker=marker,
      color=color,
      markerfacecolor=fill,
      label=label,
    )
    for _, label, color, marker, fill, _ in _GROUPS
  ]
  fig.legend(handles=handles, loc="outside upper center", ncols=2)
  style.caption(
    fig,
    _about(
      data,
      f"{_COUNTED} after {_rounds_text(data, -1)} unless said otherwise. Bars:"
      " mean,",
      f"{data['confidence']}.",
      _left_out(data, comparable),
    ).strip(),
    8,
  )
  return fig


def _auc(data: files.Arrays, comparable: dict[str, int]) -> figure.Figure:
  fig, panels = _rows(data, comparable, 2.4)
  for distance, ax in panels.items():
    area, low, high = (
      np.array(
        [
          data[f"{name}_{distance}_{what}"][at]
          for name, at in comparable.items()
        ]
      )
      for what in ("auc", "auc_low", "auc_high")
    )
    ax.axvline(0.5, color=style.GREY, linewidth=1)
    ax.errorbar(
      area,
      np.arange(len(area)),
      xerr=(area - low, high - area),
      linestyle="",
      marker="o",
      markersize=5,
      color=style.BLUE,
    )
    for y, value in enumerate(area):
      ax.annotate(
        f"{value:.2f}",
        (value, y),
        (0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
    ax.set_xlim(0, 1)
  for distance in list(panels)[2:]:
    panels[distance].set_xlabel("AUC (0.5: says nothing)")
  style.caption(
    fig,
    _about(
      data,
      "AUC: how often a fooled image's map has moved farther than that of one"
      f" that is not. {_COUNTED} after {_rounds_text(data, -1)} unless said"
      " otherwise. Bars: 95 %, from DeLong's standard error.",
      _left_out(data, comparable),
    ).strip(),
    8,
  )
  return fig


def _classes(data: files.Arrays) -> figure.Figure:
  networks = _networks(data)
  num_classes = len(data[f"{networks[0]}_cosine_class_mean"])
  names = data.get("class_names", np.arange(num_classes))
  fig, panels = _panels(data, 7.4, 3.0 + 0.4 * num_classes)
  for number, (distance, ax) in enumerate(panels.items()):
    values = np.array(
      [data[f"{name}_{distance}_class_mean"] for name in networks]
    ).T
    top = np.nanmax(values, initial=0) or 1
    picture = ax.pcolormesh(
      np.ma.masked_invalid(values),
      cmap="viridis",
      norm=colors.Normalize(0, top),
      edgecolors="white",
      linewidth=0.5,
    )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.tick_params(length=0, labelsize=8)
    ax.set_yticks(
      np.arange(num_classes) + 0.5,
      list(names) if number % 2 == 0 else [""] * num_classes,
    )
    ax.set_xticks(
      np.arange(len(networks)) + 0.5,
      networks if number > 1 else [""] * len(networks),
      rotation=45,
      ha="right",
      rotation_mode="anchor",
    )
    bar = fig.colorbar(picture, ax=ax)
    bar.set_label(_NAMES[distance][1], fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
  last = _rounds_text(data, -1)
  style.caption(
    fig, _about(data, f"Means over the images of a class after {last}."), 8
  )
  return fig
