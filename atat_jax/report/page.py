"""Self-contained HTML documents, rendered from templates."""

import base64
import pathlib
import re
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
  """Escapes a name and lets a browser break its line behind _, : and =."""
  place = markupsafe.Markup("<wbr>")
  return place.join(re.split("(?<=[_:=])", text))  # escapes each part


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
