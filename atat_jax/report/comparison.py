"""Several finished runs side by side, with the published numbers."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from atat_jax import figures
from atat_jax.report import layout, merge, page
from atat_jax.runs import files, locations, tables

_CAPTION = (
  "Mean over training seeds, with one standard error to either side where there"
  " are several. Each panel has an axis of its own; an arrow at its left end is"
  " a point far below."
)


def write_comparison(
  workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> list[pathlib.Path]:
  """Merges finished runs into a page, a Markdown text and a JSON file.

  Args:
    workdirs: Directories of finished runs.
    out: Path of the files without a suffix, e.g. "runs/comparison".

  Returns:
    Paths of `<out>.html`, `<out>.md` and `<out>.json`; the pictures of the page
    are `<out>_<data set>.png`.

  Raises:
    UserError: A directory has no results, or a run is given twice.
  """
  out = locations.find("out", out)
  found = merge.compare(workdirs)
  html, text, json = (
    out.with_name(out.name + suffix) for suffix in (".html", ".md", ".json")
  )
  files.write_json(json, found)
  pictures = figures.draw_comparison(json)
  files.write_text(html, as_html(found, pictures))
  files.write_text(text, as_markdown(found))
  return [html, text, json]


def _listed(sentences: Sequence[str]) -> str:
  return "\n".join(f"- {tables.escaped(sentence)}" for sentence in sentences)


def as_markdown(comparison: dict[str, Any]) -> str:
  """Lays out a whole comparison as Markdown."""
  parts = ["# Comparison", *map(tables.escaped, layout.verdict(comparison))]
  for found in [*layout.tables(comparison), *layout.other_tables(comparison)]:
    parts += [
      f"## {tables.escaped(found.heading)}",
      layout.table_as_markdown(found),
      _listed(found.notes),
    ]
  if comparison["missing"]:
    parts += ["## Missing", _listed(comparison["missing"])]
  return "\n\n".join(filter(None, parts)) + "\n"


def as_html(
  comparison: dict[str, Any], pictures: Sequence[pathlib.Path] = ()
) -> str:
  """Renders a whole comparison as a self-contained page.

  Args:
    comparison: Result of `merge.compare`.
    pictures: PNG files to be shown below the accuracies.

  Returns:
    HTML.
  """
  caption = _CAPTION
  if any(map(tables.is_derived, comparison["rows"])):
    caption += f" {tables.WORST_CASE_MEANING}"
  return page.render(
    "comparison.html.j2",
    title="Comparison",
    verdict=layout.verdict(comparison),
    accuracies=layout.tables(comparison),
    pictures=pictures,
    caption=caption,
    missing=comparison["missing"],
    others=layout.other_tables(comparison),
  )
