"""Self-contained HTML documents, rendered from templates."""

import base64
import html
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import markupsafe

_TEMPLATES = jinja2.Environment(
  loader=jinja2.PackageLoader("atat_jax.report"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)


def data_uri(picture: pathlib.Path) -> str:
  """Encodes a PNG file as a URI that holds the whole picture."""
  content = base64.b64encode(picture.read_bytes()).decode()
  return f"data:image/png;base64,{content}"


def breakable(text: str) -> markupsafe.Markup:
  """Escapes a name and lets a browser break its line at underscores."""
  return markupsafe.escape(text).replace("_", markupsafe.Markup("_<wbr>"))


_TEMPLATES.filters |= {"data_uri": data_uri, "breakable": breakable}


def render(template: str, **values: Any) -> str:
  """Renders a template of `report/templates` as a self-contained document.

  The style and the pictures are inside the document; it runs no script and
  requests nothing.

  Args:
    template: File name, e.g. "explain.html.j2".
    **values: Values that the template names in its first lines. Text is
      escaped; pictures are paths of PNG files.

  Returns:
    HTML.
  """
  return _TEMPLATES.get_template(template).render(values)


def escape(value: object) -> str:
  """Any value as text of a page."""
  return html.escape(str(value))


def figure(
  paths: list[pathlib.Path], caption: str, *, wide: bool = False
) -> str:
  """Pictures, inside the page, with one caption.

  Args:
    paths: Of PNG files.
    caption: Plain text.
    wide: Below one another, as wide as the page, rather than side by side.

  Returns:
    HTML.
  """
  images = "\n".join(
    f"<img alt='{escape(path.stem.replace('_', ' '))}' "
    "src='data:image/png;base64,"
    f"{base64.b64encode(path.read_bytes()).decode()}'>"
    for path in paths
  )
  if len(paths) > 1:
    layout = "wide" if wide else "pictures"
    images = f"<div class='{layout}'>\n{images}\n</div>"
  return (
    f"<figure>\n{images}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
  )


def facts(found: Mapping[str, object]) -> str:
  """A list of names and what belongs to them (plain text); no empty ones."""
  items = "\n".join(
    f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>"
    for name, fact in found.items()
    if fact
  )
  return f"<dl>\n{items}\n</dl>"


def document(title: str, body: Iterable[str]) -> str:
  """A whole page.

  Args:
    title: Plain text.
    body: Pieces of HTML, in order; empty ones are left out.

  Returns:
    The text of the file.
  """
  content = markupsafe.Markup("\n".join(filter(None, body)))
  return render("plain.html.j2", title=title, content=content)
