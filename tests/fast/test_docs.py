"""Documents say nothing about the package that is not so.

Links lead somewhere; tables of members list the registries; paths, names and
fields exist. Commands are in `test_document_commands.py`, Python is run by
`tests/run/test_document_examples.py`.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from documents import DOCUMENTS, blocks, prose

from atat_jax import analyses, attacks, data, models, objectives
from atat_jax.attacks.autoattack import versions
from atat_jax.data import corruptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "atat_jax"
MODULES = {
  path.stem
  for path in PACKAGE.iterdir()
  if path.suffix in ("", ".py") and path.name[0] not in "._"
}
FOLDERS = ("atat_jax", "benchmarks", "configs", "docs", "launch", "tests")
SUFFIXES = ("html", "json", "jsonl", "md", "npz", "pdf", "png", "py")


def _quoted() -> Iterator[tuple[str, str]]:
  """Document and text of everything between single backticks."""
  for name, text in DOCUMENTS.items():
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)):
      yield name, quoted


# --- Links -------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
  headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
  kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
  return {heading.strip().replace(" ", "-") for heading in kept}


def test_every_link_leads_to_a_file_and_a_heading():
  wrong, count = [], 0
  for name, text in DOCUMENTS.items():
    links = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    links += re.findall(r'<img src="([^"]+)"', text)
    for link in links:
      if re.match(r"https?:", link):
        continue
      count += 1
      place, _, anchor = link.partition("#")
      path = (ROOT / name).parent / place if place else ROOT / name
      if not path.exists():
        wrong.append(f"{name}: {link}: no such file")
      elif anchor and anchor not in _anchors(path.read_text(encoding="utf-8")):
        wrong.append(f"{name}: {link}: no such heading")
  assert count > 50
  assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_site():
  nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
  pages = re.findall(r"([\w/]+\.md)$", nav, re.M)
  assert len(set(pages)) == len(pages)
  flat = {page for page in pages if "/" not in page}
  others = {"start.md", "contributing.md", "benchmarks.md", "changelog.md"}
  assert flat - others == {path.name for path in ROOT.glob("docs/*.md")}


def test_every_page_is_in_the_index():
  linked = set(re.findall(r"\]\((\w+\.md)\)", DOCUMENTS["docs/README.md"]))
  pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
  assert sorted(linked) == sorted(pages)


def test_the_glossary_is_sorted_and_explains_what_documents_name():
  text = DOCUMENTS["docs/glossary.md"]
  terms = re.findall(r"^- \*\*(.+?)\*\*: \w", text, re.M)
  assert terms == sorted(terms, key=str.lower)
  words = set(re.findall(r"\w+", text.lower().replace("i-fgsm", "ifgsm")))
  members = {*attacks.ATTACKS, "autoattack", *objectives.OBJECTIVES}
  named = members & {quoted for _, quoted in _quoted()}
  assert len(named) > 10
  # Two names that say what they are.
  assert named - words == {"standard", "atat_released"} - words


# --- Placeholders ------------------------------------------------------------


def test_one_command_fills_in_every_placeholder():
  command = r'^sed -i "s/(\w+)/your-name/" (\S+)$'
  ((word, pattern),) = re.findall(command, DOCUMENTS["CONTRIBUTING.md"], re.M)
  listed = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
  assert len(listed) == 5
  left = re.compile(
    rf"\b{word}\b|\bTODO\b|\bFIXME\b|\bTBD\b|your-name|<(your|owner)\b|/USER/"
  )
  holding, own = set(), ("CONTRIBUTING.md", "tests/")
  suffixes = {".md", ".py", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".sh"}
  for folder in ("", *(f"{x}/**/" for x in (*FOLDERS, "notebooks", ".github"))):
    for path in ROOT.glob(f"{folder}*"):
      name = path.relative_to(ROOT)
      if path.suffix in suffixes and not str(name).startswith(own):
        if left.search(path.read_text(encoding="utf-8")):
          holding.add(name)
  assert holding in (listed, set())  # before and after the owner's command


# --- Members -----------------------------------------------------------------

# List in a document to the registry that it repeats.
LISTS: dict[str, Mapping[str, Any]] = {
  "objectives": objectives.OBJECTIVES,
  "attacks": {**attacks.ATTACKS, "autoattack": attacks.autoattack},
  "versions": versions.VERSIONS,
  "models": models.MODELS,
  "datasets": data.DATASETS,
  "corruptions": corruptions.CORRUPTIONS,
  "analyses": analyses.ANALYSES,
}


@functools.cache
def _committed() -> str:
  """All committed code of the package; "" without git."""
  done = subprocess.run(
    ["git", "grep", "-h", "", "HEAD", "--", "atat_jax/*.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout if done.returncode == 0 else ""


@pytest.mark.parametrize("name", LISTS)
def test_a_table_of_members_lists_the_registry(name):
  marker = rf"<!-- list: {name} -->\n(.*?)<!-- end -->"
  tables = re.findall(marker, "\n".join(DOCUMENTS.values()), re.S)
  assert len(tables) == 1
  listed = re.findall(r"^\| `(\w+)`", tables[0], re.M)
  assert len(set(listed)) == len(listed)
  assert set(listed) <= set(LISTS[name])
  # A member at work is not documented yet; a committed one must be.
  missing = set(LISTS[name]) - set(listed)
  assert not [x for x in missing if f'"{x}":' in _committed()]


def test_versions_of_autoattack_list_their_attacks():
  rows = re.findall(
    r"^\| `(\w+)` \| (.*) \|$", DOCUMENTS["docs/autoattack.md"], re.M
  )
  found = {name: tuple(re.findall(r"`([\w-]+)`", row)) for name, row in rows}
  assert len(found) >= 4
  assert found == {name: versions.VERSIONS[name].attacks for name in found}


def test_every_diagnostic_exists():
  text = DOCUMENTS["docs/evaluating.md"].split("## Diagnostics")[1]
  names = re.findall(r"^\| `(\w+)` \|", text, re.M)
  source = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("attacks", "evaluation")
    for path in (PACKAGE / folder).rglob("*.py")
  )
  assert len(names) > 10
  assert [n for n in names if not re.search(rf"\b{n}\b", source)] == []


# --- Paths and names ---------------------------------------------------------


def test_every_path_exists():
  wrong, count = [], 0
  for name, quoted in _quoted():
    path, _, test = quoted.partition("::")
    first = path.split("/")[0]
    if not re.fullmatch(r"(\.?\w[\w.-]*/)+[\w.*-]*", path):
      continue
    if first in FOLDERS:
      root = ROOT
    elif first in MODULES and path.endswith(".py"):
      root = PACKAGE
    else:
      continue
    count += 1
    found = [p for p in root.glob(path.rstrip("/")) if p.exists()]
    if not found:
      wrong.append(f"{name}: {path}: no such file")
    elif test and f"def {test}(" not in found[0].read_text(encoding="utf-8"):
      wrong.append(f"{name}: {quoted}: no such test")
  assert count > 30
  assert not wrong, "\n".join(wrong)


def _resolves(dotted: str) -> bool:
  """Whether a dotted name is a module, or what a module or a class has."""
  parts = dotted.split(".")
  for end in range(len(parts), 0, -1):
    name = ".".join(parts[:end])
    try:
      if importlib.util.find_spec(name) is None:
        continue
    except ModuleNotFoundError:
      continue
    value = importlib.import_module(name)
    for part in parts[end:]:
      if not hasattr(value, part):
        return False
      value = getattr(value, part)
    return True
  return False


def test_every_name_of_the_package_exists():
  wrong, count = [], 0
  for name, text in DOCUMENTS.items():
    for dotted in sorted(
      set(re.findall(r"\batat_jax(?:\.[A-Za-z]\w*)+", text))
    ):
      count += 1
      if not _resolves(dotted):
        wrong.append(f"{name}: {dotted}")
  for name, quoted in _quoted():
    match = re.match(r"(\w+)\.([A-Za-z]\w*)", quoted)
    if match is None or match[1] not in MODULES or match[2] in SUFFIXES:
      continue
    count += 1
    if match[0].removeprefix("config.") in _fields():
      continue
    if any(f.startswith(f"{match[2]}.") for f in _fields()):
      continue  # a field behind `config.`, checked below
    if not _resolves(f"atat_jax.{match[0]}"):
      wrong.append(f"{name}: {quoted}")
  assert count > 20
  assert not wrong, "\n".join(wrong)


def _code() -> Iterator[tuple[str, str]]:
  """Place and text of the Python that only the slow tests run to its end."""
  for path in sorted(ROOT.glob("notebooks/*.ipynb")):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
      if cell["cell_type"] == "code":
        # Commands of the notebook are no Python.
        text = "".join(cell["source"])
        yield path.name, re.sub(r"^( *)[%!].*$", r"\1pass", text, flags=re.M)
  for name in DOCUMENTS:
    yield from ((name, block.code) for block in blocks(name, "python"))


def test_python_uses_names_that_exist():
  wrong, count = [], 0
  for place, code in _code():
    for node in ast.walk(ast.parse(code)):
      match node:
        case ast.ImportFrom(module=str(module), names=names):
          used = [f"{module}.{alias.name}" for alias in names]
        case ast.Attribute(value=ast.Name(id=module), attr=attr):
          used = [f"atat_jax.{module}.{attr}"] if module in MODULES else []
        case _:
          continue
      # Files of the reader's own.
      used = [name for name in used if not name.startswith("exported.")]
      count += len(used)
      wrong += [f"{place}: {u}" for u in used if not _resolves(u)]
  assert count > 60
  assert not wrong, "\n".join(wrong)


# --- Fields ----------------------------------------------------------------------


def _get_config(path: pathlib.Path) -> Any:
  spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  before = list(sys.path)
  spec.loader.exec_module(module)
  sys.path[:] = before
  return module.get_config


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
  for key, value in tree.items():
    yield f"{path}{key}"
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{path}{key}.")


@functools.cache
def _fields() -> set[str]:
  """Every field that a configuration of any method has."""
  get_config = _get_config(ROOT / "configs" / "default.py")
  found: set[str] = set()
  for method in objectives.OBJECTIVES:
    found.update(_leaves(get_config(method).to_dict()))
  return found


def test_every_field_of_a_configuration_exists():
  wrong, count = [], 0
  for name, text in DOCUMENTS.items():
    named = re.findall(r"(?<![\w/.])(?:--)?config\.([a-z]\w*(?:\.\w+)*)", text)
    named += re.findall(r"--set=([a-z][\w.]+)=", text)
    # The table of options.
    named += re.findall(r"`((?:train|teacher)\.\w+)`", text)
    for field in named:
      count += 1
      if field in SUFFIXES or field == "make_plan":
        continue
      if field not in _fields():
        wrong.append(f"{name}: {field}")
  assert count > 50
  assert not wrong, "\n".join(wrong)


# --- The picture of the layers -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Box:
  """A module in the picture, by its height from the top."""

  name: str
  top: int


def _boxes() -> list[Box]:
  text = (ROOT / "docs" / "figures" / "layers.svg").read_text(encoding="utf-8")
  pattern = r'class="module" x="\d+" y="(\d+)"[^>]*>(\w+)<'
  return [Box(name, int(top)) for top, name in re.findall(pattern, text)]


def test_the_picture_of_the_layers_has_every_module():
  assert sorted(box.name for box in _boxes()) == sorted(MODULES)


def test_no_import_points_up_in_the_picture_of_the_layers():
  tops = {box.name: box.top for box in _boxes()}
  wrong = []
  for path in sorted(PACKAGE.rglob("*.py")):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      match node:
        case ast.ImportFrom(module="atat_jax", names=names):
          imported = [alias.name for alias in names]
        case ast.ImportFrom(module=str(module)) if module.startswith(
          "atat_jax."
        ):
          imported = [module.split(".")[1]]
        case _:
          continue
      wrong += [
        f"{own} imports {other}"
        for other in imported
        if own in tops and tops.get(other, 0) < tops[own]
      ]
  assert not wrong, "\n".join(sorted(set(wrong)))


# --- Measured numbers ---------------------------------------------------------


def test_numbers_over_seeds_are_those_of_their_file():
  marked = r"<!-- numbers: (\S+) -->\n(.*?)<!-- end -->"
  ((path, text),) = re.findall(marked, DOCUMENTS["docs/results.md"], re.S)
  rows = json.loads((ROOT / path).read_text(encoding="utf-8"))["rows"]
  models, count = {"teacher": "standard", "student": "atat"}, 0
  for line in text.splitlines():
    if not line.startswith("| ") or line.startswith("| ---"):
      continue
    first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    if first not in models:
      mode, attacks_ = first.split()[0], cells
      continue
    for attack, cell in zip(attacks_, cells, strict=True):
      wanted = (models[first], attack, mode, 360)
      keys = ("model", "attack", "batch_norm", "num_examples")
      (row,) = [r for r in rows if tuple(r[k] for k in keys) == wanted]
      found = [100 * share for share in row["accuracies"].values()]
      assert len(found) == 5
      mean = sum(found) / 5
      assert cell == f"{mean:.1f} ({min(found):.1f} to {max(found):.1f})", (
        wanted
      )
      count += 1
  assert count == 18
