"""Each notebook runs from top to bottom and shows what the committed one does."""

import importlib.util
import pathlib

import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def _executor():
  spec = importlib.util.spec_from_file_location(
    "execute", ROOT / "notebooks" / "execute.py"
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


EXECUTE = _executor()


def _kinds(notebook):
  """Kinds of the outputs, cell by cell: a figure must not turn into a text."""
  return [
    [sorted(o.get("data", {"text": 0})) for o in cell.outputs]
    for cell in notebook.cells
    if cell.cell_type == "code"
  ]


@pytest.mark.parametrize("path", EXECUTE.sources(), ids=lambda path: path.stem)
# The kernel's own libraries open sockets that they leave to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter.*).*")
def test_a_notebook_runs_within_its_time(path, tmp_path):
  notebook, cpu = EXECUTE.execute(path, tmp_path)
  assert cpu < 2 * EXECUTE.SECONDS
  assert _kinds(notebook) == _kinds(nbformat.read(path, as_version=4))
