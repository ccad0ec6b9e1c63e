"""The report: one page that says what a run is worth, and how that is known.

  python -m atat_jax.report runs/at runs/atat --out comparison

makes one page of several finished runs. Reads the files of working
directories; needs no model and no JAX.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from atat_jax import figures
from atat_jax.errors import UserError
from atat_jax.report import comparison, page
from atat_jax.runs import files, tables, wording


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Draws the figures and writes the page that holds all there is to say.

  The page is one file: pictures and style are inside it, it runs no script and
  asks for nothing from any network. Parts whose inputs are missing are left
  out.

  Args:
    workdir: directory of a run. Read: `results.json`, and if they exist
      `config.json`, `metrics.jsonl`, `teacher/metrics.jsonl` and the files of
      the analyses.

  Returns:
    Path of `report.html`; the figures are in `workdir/figures`.

  Raises:
    UserError: there is no `results.json`, or an input cannot be read.
  """
  from atat_jax import analyses  # it imports JAX, which takes long

  workdir = pathlib.Path(workdir)
  results = files.read_results(workdir)
  if results is None:
    raise UserError(
      f"{workdir / 'results.json'} does not exist: evaluate first, with "
      f"`python main.py --mode=evaluate --config=... --workdir={workdir}`"
    )
  run = results.get("run", {})
  config = run.get("config") or files.read_json(workdir / "config.json") or {}
  bars, curves = figures.draw_results(workdir), figures.draw_curves(workdir)
  sections = analyses.sections(workdir, workdir / "figures")
  rows = results["rows"]
  title = _title(config, rows)
  date = run.get("date")
  body = [
    f"<h1>{page.escape(title)}</h1>",
    f"<p class='soft'>Evaluated {page.escape(date)}</p>" if date else "",
    f"<p class='verdict'>{page.escape(verdict(results))}</p>",
    _protocol_section(rows),
    _results_section(rows, bars),
    _diagnostics_section(results.get("diagnostics", {})),
    _curves_section(curves),
    *(_analysis_section(section) for section in sections),
    _run_section(run, config),
  ]
  text = page.document(title, body)
  return files.write_bytes(workdir / "report.html", text.encode())


def _analysis_section(section: Any) -> str:
  return (
    f"<h2>{page.escape(section.heading)}</h2>\n"
    f"<p>{page.escape(section.sentence)}</p>\n"
    f"{page.figure(section.pictures, section.caption, wide=section.wide)}"
  )


def write_comparison(
  workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> list[pathlib.Path]:
  """Merges finished runs into one page, one Markdown text, one JSON file.

  Args:
    workdirs: Directories of finished runs.
    out: Where to, without a suffix, e.g. "runs/comparison".

  Returns:
    Paths of `<out>.html`, `<out>.md` and `<out>.json`; the pictures of the page
    are `<out>_<data set>.png`.

  Raises:
    UserError: A directory without results, by name; a run given twice.
  """
  found = comparison.compare(workdirs)
  out = pathlib.Path(out)
  path = out.with_name(f"{out.name}.json")
  text = json.dumps(found, indent=1, allow_nan=False) + "\n"
  files.write_bytes(path, text.encode())
  pictures = figures.draw_comparison(path)
  caption = (
    "Mean over training seeds; a bar is one standard error to either side."
  )
  pages = {
    ".html": comparison.as_html(found, page.figure(pictures, caption)),
    ".md": comparison.as_markdown(found),
  }
  return [
    *(
      files.write_bytes(out.with_name(out.name + suffix), text.encode())
      for suffix, text in pages.items()
    ),
    path,
  ]


def is_old(workdir: pathlib.Path) -> bool:
  """Whether there is no page yet, or something that it shows is newer."""
  report = workdir / "report.html"
  shown = ("results.json", "metrics.jsonl", "teacher/metrics.jsonl")
  return not report.exists() or any(
    path.stat().st_mtime > report.stat().st_mtime
    for path in [*(workdir / name for name in shown), *workdir.glob("*.npz")]
    if path.exists()
  )


def results_table(results: dict[str, Any]) -> str:
  """The results as text for a terminal, valid as a Markdown table.

  Args:
    results: what `results.json` holds.

  Returns:
    A table with a line for each model and BatchNorm mode, a column for each
    attack, accuracies in percent; under it the protocol of each column.
  """
  rows = results["rows"]
  columns = tables.columns(rows)
  lines = [["accuracy (%)", *(column.label for column in columns)]]
  for model, batch_norm in tables.series(rows):
    numbers = [
      _percent(column.accuracy(model, batch_norm)) for column in columns
    ]
    lines.append([f"{model}, {tables.BATCH_NORM_NAMES[batch_norm]}", *numbers])
  text = [tables.markdown(lines), ""]
  text += [f"{c.label}: {tables.protocol(c)}" for c in columns]
  if any(batch_norm == "batch" for _, batch_norm in tables.series(rows)):
    text.append(f"batch statistics: {tables.BATCH_WARNING}")
  return "\n".join(text)


def verdict(results: dict[str, Any]) -> str:
  """What the numbers say, in plain words.

  The strongest attack is the one that, with running statistics, leaves the
  student the least accuracy (the teacher, if there is no student).

  Args:
    results: what `results.json` holds.

  Returns:
    One paragraph of plain text.
  """
  rows = results["rows"]
  columns = tables.columns(rows)
  models = [model for model, _ in tables.series(rows)]
  model = "student" if "student" in models else (models or ["student"])[0]
  attacked = [
    column
    for column in columns
    if not column.nominal and (model, "running") in column.rows
  ]
  if not attacked:
    return (
      "No attack was evaluated with BatchNorm's running statistics, so these "
      "results do not say how robust the classifier is."
    )
  sentences = [
    _robustness_sentence(attacked, model),
    _clean_sentence(columns, model),
    _batch_statistics_sentence(attacked, model),
    _flags_sentence(results.get("diagnostics", {})),
    "An attack only bounds robustness from above: a stronger one may fool the "
    "network on more images.",
  ]
  return " ".join(filter(None, sentences))


def _strongest(columns: list[tables.Column], model: str) -> tables.Column:
  return min(columns, key=lambda c: c.rows[model, "running"]["accuracy"])


def _robustness_sentence(attacked: list[tables.Column], model: str) -> str:
  strongest = _strongest(attacked, model)
  row = strongest.rows[model, "running"]
  rank = (
    f"the strongest of the {len(attacked)} attacks run"
    if len(attacked) > 1
    else "the only attack run"
  )
  low, high = _confidence(row["accuracy"], row["num_examples"])
  sentence = (
    f"Under {strongest.label}, {rank} ({row['norm']}, epsilon "
    f"{wording.pixels(row['epsilon'])}), the {model} classifies "
    f"{100 * row['accuracy']:.1f}% of {row['num_examples']:,} "
    f"{row['dataset']} {row['split']} images correctly (95% confidence: "
    f"{100 * low:.1f}% to {100 * high:.1f}%)"
  )
  teacher = strongest.accuracy("teacher", "running")
  if model == "teacher" or teacher is None:
    return f"{sentence}."
  return (
    f"{sentence}, {_compared(row['accuracy'], teacher)} the teacher "
    f"({100 * teacher:.1f}%)."
  )


def _clean_sentence(columns: list[tables.Column], model: str) -> str:
  for column in columns:
    accuracy = column.accuracy(model, "running")
    if not column.nominal or accuracy is None:
      continue
    sentence = f"On clean images the {model} is right on {100 * accuracy:.1f}%"
    teacher = column.accuracy("teacher", "running")
    if model == "teacher" or teacher is None:
      return f"{sentence}."
    return f"{sentence}, the teacher on {100 * teacher:.1f}%."
  return ""


def _batch_statistics_sentence(
  attacked: list[tables.Column], model: str
) -> str:
  both = [column for column in attacked if (model, "batch") in column.rows]
  if not both:
    return ""
  strongest = _strongest(both, model)
  honest = strongest.rows[model, "running"]["accuracy"]
  claimed = strongest.rows[model, "batch"]["accuracy"]
  return (
    "With the statistics of the batch being evaluated, which is how the "
    f"paper's released code evaluates, the {model} would be credited with "
    f"{100 * claimed:.1f}% under {strongest.label}, "
    f"{_compared(claimed, honest)} the {100 * honest:.1f}% of the fixed "
    "classifier that one would deploy."
  )


def _flags_sentence(diagnostics: dict[str, Any]) -> str:
  flags = sum(bool(check["flag"]) for check in diagnostics.values())
  if not flags:
    return ""
  return (
    f"{flags} of the {len(diagnostics)} diagnostics below "
    f"{'raises' if flags == 1 else 'raise'} a flag: read them before trusting "
    "these numbers."
  )


def _compared(a: float, b: float) -> str:
  """How accuracy a stands to accuracy b, to be followed by what b is."""
  points = round(100 * (a - b), 1)
  if points == 0:
    return "as much as"
  return f"{abs(points):.1f} points {'more' if points > 0 else 'less'} than"


def _confidence(accuracy: float, count: int) -> tuple[float, float]:
  """Wilson's 95% interval of a proportion; sound at 0 and 1 too."""
  z2 = 1.96**2
  center = (accuracy + z2 / (2 * count)) / (1 + z2 / count)
  spread = math.sqrt(
    z2 * accuracy * (1 - accuracy) / count + (z2 / count) ** 2 / 4
  )
  half = spread / (1 + z2 / count)
  return max(0.0, center - half), min(1.0, center + half)


def _percent(accuracy: float | None) -> str:
  return "–" if accuracy is None else f"{100 * accuracy:.2f}"


def _title(config: dict[str, Any], rows: list[tables.Row]) -> str:
  """Method, data set and network, as far as they are known."""
  title = str(config.get("method", "")).upper() or "Robustness"
  datasets = dict.fromkeys(str(row["dataset"]) for row in rows)
  if datasets:
    title += f" on {', '.join(datasets)}"
  model = config.get("model")
  if isinstance(model, dict) and "name" in model:
    size = "-".join(str(model[k]) for k in ("depth", "width") if k in model)
    title += f", {model['name']} {size}".rstrip()
  return title


def _results_section(
  rows: list[tables.Row], pictures: list[pathlib.Path]
) -> str:
  if not rows:
    return ""
  columns = tables.columns(rows)
  series = tables.series(rows)
  head = "".join(
    f"<th scope='col'>{page.escape(c.label)}</th>" for c in columns
  )
  parts = [
    "<h2>Results</h2>",
    "<div class='scroll'>",
    "<table>",
    f"<thead><tr><th scope='col'>accuracy (%)</th>{head}</tr></thead>",
  ]
  for batch_norm, heading in (
    ("running", "Running statistics: one fixed classifier"),
    ("batch", f"Batch statistics: {tables.BATCH_WARNING}"),
  ):
    models = [model for model, mode in series if mode == batch_norm]
    if not models:
      continue
    parts += [
      f"<tbody class='{batch_norm}'>",
      f"<tr><th class='group' colspan='{len(columns) + 1}'>"
      f"<span>{page.escape(heading)}</span></th></tr>",
    ]
    for model in models:
      cells = "".join(_cell(column, model, batch_norm) for column in columns)
      parts.append(f"<tr><th scope='row'>{page.escape(model)}</th>{cells}</tr>")
    parts.append("</tbody>")
  parts += ["</table>", "</div>"]
  caption = "Accuracy under each attack."
  if {mode for _, mode in series} == {"running", "batch"}:
    parts.append(
      "<p class='soft'>Small numbers: percentage points by which batch "
      "statistics differ from running statistics.</p>"
    )
    caption += (
      " Solid bars: running statistics. Hatched bars: batch statistics, not "
      "comparable with the solid ones."
    )
  if pictures:
    parts.append(page.figure(pictures, caption))
  return "\n".join(parts)


def _cell(column: tables.Column, model: str, batch_norm: str) -> str:
  accuracy = column.accuracy(model, batch_norm)
  text = _percent(accuracy)
  running = column.accuracy(model, "running")
  if batch_norm == "batch" and accuracy is not None and running is not None:
    points = 100 * (accuracy - running)
    text += f"<span class='delta'>{points:+.1f}</span>"
  return f"<td>{text}</td>"


def _protocol_section(rows: list[tables.Row]) -> str:
  columns = tables.columns(rows)
  if not columns:
    return ""
  items = page.facts({c.label: tables.protocol(c) for c in columns})
  return (
    "<h2>Protocol</h2>\n<p class='soft'>Epsilon and step size are in units of "
    f"the pixel range [0, 1].</p>\n{items}"
  )


def _diagnostics_section(diagnostics: dict[str, Any]) -> str:
  if not diagnostics:
    return ""
  items = "\n".join(
    _diagnostic(name, check) for name, check in diagnostics.items()
  )
  return (
    "<h2>Diagnostics</h2>\n<p class='soft'>Signs that an evaluation measures "
    "a weak attack rather than a robust network.</p>\n"
    f"<ul class='checks'>\n{items}\n</ul>"
  )


def _diagnostic(name: str, check: dict[str, Any]) -> str:
  value = check["value"]
  measured = "not measured" if value is None else f"measured {value:.4g}"
  mark = "▲ flagged" if check["flag"] else "✓ passed"
  if value is None and not check["flag"]:
    mark = "– not measured"
  return (
    f"<li class='{'flag' if check['flag'] else 'pass'}'>"
    f"<strong>{mark}: {page.escape(name.replace('_', ' '))}.</strong> "
    f"{page.escape(check['message'])} "
    f"<span class='soft'>Rule: {page.escape(check['rule'])}; {measured}.</span></li>"
  )


def _curves_section(pictures: list[pathlib.Path]) -> str:
  if not pictures:
    return ""
  caption = (
    "Training of teacher and student. Validation images are held out of the "
    "training set; they choose the checkpoint, the test set never does."
  )
  return f"<h2>Training</h2>\n{page.figure(pictures, caption)}"


def _run_section(run: dict[str, Any], config: dict[str, Any]) -> str:
  commit = run.get("commit")
  facts = {
    "Checkpoints": "; ".join(
      f"{model}: {point['which']}, step {point['step']:,}"
      for model, point in run.get("checkpoints", {}).items()
    ),
    "Devices": ", ".join(str(device) for device in run.get("devices", [])),
    "Versions": ", ".join(
      f"{name} {version}" for name, version in run.get("versions", {}).items()
    ),
    "Commit": commit or "not recorded",
  }
  parts = ["<h2>The run</h2>", page.facts(facts)]
  if run.get("command"):
    steps = [f"git checkout {commit}"] if commit else []
    steps.append(run["command"])
    parts.append(
      f"<p>To reproduce it:</p>\n<pre>{page.escape(chr(10).join(steps))}</pre>"
    )
  if config:
    text = json.dumps(config, indent=2)
    parts.append(
      "<details><summary>Configuration</summary>\n"
      f"<pre>{page.escape(text)}</pre></details>"
    )
  return "\n".join(parts)
