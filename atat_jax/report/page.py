"""A page of HTML that needs nothing but itself: no script, nothing fetched."""

import base64
import html
import pathlib
from collections.abc import Iterable, Mapping

# Nothing may be fetched: the page must read the same in ten years.
_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2329; --soft: #57606a; --page: #ffffff; --panel: #f5f7f9;
  --line: #d5dbe1; --accent: #0072b2; --warn: #a84300; --warn-panel: #fff3e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e8ec; --soft: #a3adb8; --page: #14181c; --panel: #1e242a;
    --line: #39424b; --accent: #6cb8e6; --warn: #ffa263; --warn-panel: #33241a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem;
  color: var(--text); background: var(--page);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 {
  font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.25rem;
  border-bottom: 1px solid var(--line); break-after: avoid;
}
.soft, figcaption, .delta { color: var(--soft); }
.soft, figcaption { font-size: 0.9rem; }
.verdict {
  margin: 1.25rem 0; padding: 1rem 1.25rem; font-size: 1.08rem;
  background: var(--panel); border-left: 0.3rem solid var(--accent);
}
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
th, td { padding: 0.4rem 0.6rem; text-align: right; vertical-align: top; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child {
  text-align: left; position: sticky; left: 0; background: var(--page);
}
tbody th { font-weight: normal; }
tbody th.group { padding-top: 1rem; font-weight: 600; }
.group span {
  display: inline-block; position: sticky; left: 0.6rem;
  max-width: calc(100vw - 3.5rem); white-space: normal;
}
tbody.running td { font-weight: 600; }
tbody.batch, tbody.batch th { background: var(--warn-panel); }
tbody.batch td, tbody.batch th { font-style: italic; }
tbody.batch th.group, .flag strong { color: var(--warn); }
.delta { display: block; font-size: 0.8rem; }
dl { margin: 0; }
dt { font-weight: 600; margin-top: 0.75rem; }
dd { margin: 0; }
.checks { list-style: none; padding: 0; margin: 0; }
.checks li {
  padding: 0.6rem 0.9rem; margin-bottom: 0.5rem; break-inside: avoid;
  background: var(--panel); border-left: 0.3rem solid var(--line);
}
.checks .flag {
  background: var(--warn-panel); border-left-color: var(--warn);
}
figure { margin: 1rem 0; }
.pictures {
  display: grid; gap: 0.75rem; justify-content: center;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
}
img {
  display: block; width: 100%; max-width: 40rem; margin: 0 auto;
  padding: 0.4rem; background: #fff; border: 1px solid var(--line);
  border-radius: 0.3rem; break-inside: avoid;
}
.wide { display: grid; gap: 0.75rem; }
.wide img { max-width: 52rem; }
figcaption { margin-top: 0.6rem; }
pre {
  padding: 0.75rem 1rem; background: var(--panel); overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem;
}
summary { cursor: pointer; }
@media (max-width: 32rem) {
  th, td { padding: 0.35rem 0.35rem; font-size: 0.88rem; }
  .group span { left: 0.35rem; }
  .verdict { font-size: 1rem; padding: 0.75rem 1rem; }
}
@media print {
  :root {
    color-scheme: light;
    --text: #000; --soft: #444; --page: #fff; --panel: #f5f7f9;
    --line: #c5cbd1; --accent: #0072b2; --warn: #a84300;
    --warn-panel: #fff3e8;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .verdict, tbody.batch, .checks li, pre { print-color-adjust: exact; }
  .pictures { grid-template-columns: 1fr 1fr; }
  figure > img { max-width: 26rem; }
  details::details-content { content-visibility: visible; }
  .verdict, tr, dd { break-inside: avoid; }
}
"""


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
  return "\n".join(
    [
      "<!DOCTYPE html>",
      "<html lang='en'>",
      "<head>",
      "<meta charset='utf-8'>",
      "<meta name='viewport' content='width=device-width, initial-scale=1'>",
      "<meta http-equiv='Content-Security-Policy' "
      f'content="{_CONTENT_POLICY}">',
      f"<title>{escape(title)}</title>",
      f"<style>{_STYLE}</style>",
      "</head>",
      "<body>",
      *filter(None, body),
      "</body>",
      "</html>",
      "",
    ]
  )
