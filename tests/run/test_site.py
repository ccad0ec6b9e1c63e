"""The site builds without a warning and has what it promises."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """Folder of the site, built strictly from a copy of the documents."""
  pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
  pytest.importorskip("mkdocstrings", reason="needs pip install -e '.[docs]'")
  out = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  return out


def test_the_reference_has_every_public_name(site):
  missing, count = [], 0
  for page in site.glob("api/*.html"):
    if page.stem == "index":
      continue
    module = importlib.import_module(f"atat_jax.{page.stem}")
    text = page.read_text(encoding="utf-8")
    headings = set(re.findall(r'id="atat_jax\.([\w.]+)"', text))
    ends = {heading.rsplit(".", 1)[-1] for heading in headings}
    registries = (
      getattr(module, name, {}) for name in ("MODELS", "OBJECTIVES")
    )
    members = {
      member.__name__ for found in registries for member in found.values()
    }
    # Registries and modules have tables and pages of their own.
    names = {
      name
      for name in getattr(module, "__all__", ())
      if not isinstance(getattr(module, name), dict | types.ModuleType)
    }
    for name in members | names:
      count += 1
      if name not in ends:
        missing.append(f"{page.stem}.{name}")
  assert count > 60
  assert not missing


def test_the_reference_has_every_package_that_offers_something(site):
  offering = {
    path.parent.name
    for path in ROOT.glob("atat_jax/*/__init__.py")
    if "__all__ = [" in path.read_text(encoding="utf-8")
  }
  pages = {page.stem for page in site.glob("api/*.html")}
  # How callables are compiled is the package's own affair.
  assert offering - pages == {"compilation"}


def test_nothing_is_fetched_from_elsewhere(site):
  fetched = re.compile(
    r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"'
    r'|<link[^>]*rel="(?:stylesheet|preload|preconnect)"[^>]*href="(https?:[^"]+)"'
  )
  pages = list(site.rglob("*.html"))
  assert len(pages) > 40
  found = {
    match[0]
    for page in pages
    for match in fetched.finditer(page.read_text(encoding="utf-8"))
  }
  assert not found


def test_every_picture_has_a_text_and_a_file(site):
  count = 0
  for page in site.rglob("*.html"):
    for tag in re.findall(r"<img [^>]*>", page.read_text(encoding="utf-8")):
      count += 1
      alt = re.search(r'alt="([^"]*)"', tag)
      assert alt is not None and alt[1].strip(), f"{page}: {tag}"
      source = re.search(r'src="([^"]+)"', tag)
      assert source is not None
      assert (page.parent / source[1]).is_file(), f"{page}: {tag}"
  assert count > 20


def test_a_link_to_nowhere_fails(tmp_path):
  pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
  for name in ("docs", "notebooks", "benchmarks", "atat_jax"):
    shutil.copytree(ROOT / name, tmp_path / name)
  for name in ("mkdocs.yml", *(path.name for path in ROOT.glob("*.md"))):
    shutil.copy(ROOT / name, tmp_path)
  page = tmp_path / "docs" / "faq.md"
  page.write_text(
    page.read_text() + "\n[nowhere](robustness.md#no-such-thing)\n"
  )
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert "no-such-thing" in done.stderr
