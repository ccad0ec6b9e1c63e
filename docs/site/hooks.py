"""Pages of the site that are not in docs/: README, API and notebooks.

mkdocs calls the functions that begin with `on_`. Everything is made from files
of the repository while the site is built, so that nothing is written twice.
"""

import base64
import json
import pathlib
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Pages of the site that are other files of the repository.
PAGES = {
  "start.md": "README.md",
  "changelog.md": "CHANGELOG.md",
  "contributing.md": "CONTRIBUTING.md",
  "benchmarks.md": "benchmarks/README.md",
}

# Modules of the reference, and what a reader looks for there.
MODULES = {
  "attacks": "FGSM, PGD, APGD, FAB, Square and AutoAttack on any classifier",
  "evaluation": "tables of accuracies under named protocols, audit",
  "bounds": "certificates: accuracies from below",
  "models": "networks, classifiers, networks of other libraries",
  "interop": "weights from PyTorch",
  "checkpoints": "networks of runs, restored",
  "attention": "Grad-CAM and the layers of a network",
  "analyses": "maps, attention shift, landscapes, curvature, sweeps",
  "explain": "a page of pictures about any networks",
  "objectives": "training methods and their named settings",
  "data": "data sets by name, and one's own",
  "pipeline": "a run, from configuration to report",
  "report": "pages that people read",
  "figures": "pictures of a run, drawn from its files",
  "batch_norm": "passes with other BatchNorm statistics",
  "losses": "losses of attacks and objectives, one value an example",
  "metrics": "sums and counts of a training",
  "optim": "optimizer and schedules",
  "rng": "random keys by name",
  "sharding": "the mesh of devices",
  "errors": "errors and warnings",
  "typing": "names of types",
}

# Members whose place is not the module that offers them.
MEMBERS = {
  "attacks": ("attacks.autoattack.run.autoattack",),
  "models": (
    "models.wide_resnet.WideResNet",
    "models.preact_resnet.PreActResNet18",
    "models.resnet.ResNet18",
    "models.resnet.ResNet50",
    "models.densenet.DenseNet121",
    "models.vgg.VGG16",
    "models.vgg.VGG16BN",
    "models.convnext.ConvNeXt",
    "models.vit.ViT",
    "models.xcit.XCiT",
  ),
  "objectives": (
    "objectives.standard.Standard",
    "objectives.at.AT",
    "objectives.alp.ALP",
    "objectives.tla.TLA",
    "objectives.trades.TRADES",
    "objectives.mart.MART",
    "objectives.atat.ATAT",
    "objectives.atat_released.ATATReleased",
  ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are made of other files."""
  pages: dict[str, str | bytes] = {}
  for page, source in PAGES.items():
    text = (ROOT / source).read_text(encoding="utf-8")
    pages[page] = relinked(text, posixpath.dirname(source), page)
  pages |= _reference()
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    pages |= notebook(path, config.repo_url)
  for name, content in pages.items():
    files.append(File.generated(config, name, content=content))
  return files


def on_nav(
  nav: Navigation, config: MkDocsConfig, files: Files
) -> Navigation | None:
  """Refuses a notebook that the navigation does not have."""
  shown = {page.file.src_uri for page in nav.pages}
  made = {file.src_uri for file in files.documentation_pages()}
  missing = {name for name in made - shown if name.startswith("notebooks/")}
  if missing:
    raise PluginError(f"nav of mkdocs.yml lacks {', '.join(sorted(missing))}")
  return nav


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links out of docs/ into links to the pages made of these files."""
  if page.file.generated_by is not None:
    return markdown
  return with_captions(relinked(markdown, "docs", page.file.src_uri))


def with_captions(text: str) -> str:
  """Returns a text whose pictures on a line of their own have a caption.

  The caption is the text for those who do not see the picture.

  Args:
    text: Markdown.
  """
  figure = (
    r'\n<figure markdown="span">\n![\1](\2)\n'
    r"<figcaption>\1</figcaption>\n</figure>\n"
  )
  return re.sub(r"^!\[([^\]]+)\]\(([^)\s]+)\)$", figure, text, flags=re.M)


# --- Links -------------------------------------------------------------------


def relinked(text: str, folder: str, page: str) -> str:
  """Returns a text whose links lead to pages of the site.

  Args:
    text: Markdown.
    folder: Folder of its file in the repository.
    page: Path of its page in the site.

  Returns:
    The text; links to files that the site does not have become plain code.
  """

  def place(target: str) -> str | None:
    """Returns the place in the site of a file; None where it has none."""
    path = posixpath.normpath(posixpath.join(folder, target))
    found = {source: made for made, source in PAGES.items()}.get(path)
    if found is None and path.startswith("docs/"):
      found = path.removeprefix("docs/")
    if found is None and re.fullmatch(r"notebooks/\w+\.ipynb", path):
      found = path.replace(".ipynb", ".md")
    if found is None:
      return None
    return posixpath.relpath(found, posixpath.dirname(page) or ".")

  def link(match: re.Match[str]) -> str:
    target, _, anchor = match[2].partition("#")
    if re.match(r"\w+:", target) or not target:
      return match[0]
    found = place(target)
    if found is None:
      return match[1] if match[1].startswith("`") else f"`{match[1]}`"
    return f"[{match[1]}]({found}{'#' + anchor if anchor else ''})"

  def image(match: re.Match[str]) -> str:
    return f'{match[1]}"{place(match[2]) or match[2]}"'

  text = re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)", link, text)
  text = re.sub(r'(<img [^>]*?src=)"([^"]+)"', image, text)
  # An interval, 62.5 to 79.9, in brackets is no reference.
  return re.sub(r"\[(\d[\d.]*–\d[\d.]*)\]", r"\\[\1\\]", text)


# --- Reference ---------------------------------------------------------------


def _reference() -> dict[str, str | bytes]:
  """Returns the pages of the API."""
  lines = ["# API", "", "Signatures and docstrings, read from the source.", ""]
  pages: dict[str, str | bytes] = {}
  for name, text in MODULES.items():
    lines.append(f"- [`atat_jax.{name}`]({name}.md): {text}")
    parts = [f"# {name}", f"[All modules](index.md): {text}."]
    parts.append(f"::: atat_jax.{name}")
    parts += [
      f"::: atat_jax.{member}\n    options:\n      show_root_heading: true"
      "\n      show_root_toc_entry: true"
      for member in MEMBERS.get(name, ())
    ]
    pages[f"api/{name}.md"] = "\n\n".join(parts) + "\n"
  pages["api/index.md"] = "\n".join(lines) + "\n"
  return pages


# --- Notebooks ---------------------------------------------------------------


def notebook(
  path: pathlib.Path, repo_url: str | None
) -> dict[str, str | bytes]:
  """Returns the page of a notebook, and its pictures.

  Args:
    path: The notebook.
    repo_url: Address of the repository on GitHub; None: no link to Colab.

  Returns:
    Path in the site to content.
  """
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  pages: dict[str, str | bytes] = {}
  parts = []
  for number, cell in enumerate(cells):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
      parts.append(relinked(source, "notebooks", f"notebooks/{path.stem}.md"))
      continue
    parts.append(_fenced(source, "python"))
    caption = _caption(cells[number + 1 :])
    for index, output in enumerate(cell["outputs"]):
      data = output.get("data", {})
      if "image/png" in data:
        name = f"{path.stem}_{number}_{index}.png"
        pages[f"notebooks/{name}"] = base64.b64decode(data["image/png"])
        parts.append(f"![{caption}]({name})")
      else:
        parts.append(_fenced(_text(output), "text"))
  parts.insert(1, _origin(path, repo_url))
  pages[f"notebooks/{path.stem}.md"] = "\n\n".join(parts) + "\n"
  return pages


def _text(output: Mapping[str, Any]) -> str:
  """Returns the text of an output."""
  if output["output_type"] == "stream":
    return "".join(output["text"])
  return "".join(output["data"]["text/plain"])


def _fenced(text: str, language: str) -> str:
  return f"````{language}\n{text.rstrip()}\n````"


def _caption(following: list[Mapping[str, Any]]) -> str:
  """Returns the caption below a picture, as text for those who do not see it."""
  text = "".join(following[0]["source"]) if following else ""
  match = re.match(r"\*([^*]+)\*", text)
  return " ".join(match[1].split()) if match else ""


def _origin(path: pathlib.Path, repo_url: str | None) -> str:
  name = f"notebooks/{path.name}"
  if not repo_url:
    return f"The notebook is `{name}`."
  repository = repo_url.removeprefix("https://github.com/").strip("/")
  colab = "https://colab.research.google.com/github"
  return f"[Open in Colab]({colab}/{repository}/blob/main/{name})"
