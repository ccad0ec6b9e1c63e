"""Runs notebooks from top to bottom and keeps their outputs.

  python notebooks/execute.py                 # all of them
  python notebooks/execute.py notebooks/1_*.ipynb

The notebooks are the only source: they are edited as notebooks and run by this.
Needs `pip install -e '.[test]'`.
"""

import os
import pathlib
import resource
import sys
import tempfile
import time

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
LARGEST = 300_000
"""Largest size of a notebook with its outputs, in bytes."""
SECONDS = 180
"""Longest time that a notebook may take on two cores."""


def sources() -> list[pathlib.Path]:
  """Lists the notebooks in the order in which they are read."""
  return sorted(FOLDER.glob("*.ipynb"))


def execute(
  path: pathlib.Path, folder: pathlib.Path
) -> tuple[nbformat.NotebookNode, float]:
  """Runs a notebook in a folder of its own, with caches that are empty.

  Args:
    path: The notebook; it is not changed.
    folder: Folder in which it runs, and in which its files are left.

  Returns:
    The notebook with its outputs, and its CPU time in seconds.

  Raises:
    CellExecutionError: A cell raised an exception.
    ValueError: A cell left a warning.
  """
  notebook = nbformat.read(path, as_version=4)
  for number, cell in enumerate(notebook.cells):
    cell.metadata = {}
    cell.id = f"cell-{number}"
  begin = _cpu_seconds()
  client = nbclient.NotebookClient(
    notebook,
    kernel_name="python3",
    timeout=10 * SECONDS,
    resources={"metadata": {"path": str(folder)}},
    record_timing=False,
    coalesce_streams=True,
  )
  client.execute(env=_environment(folder))
  for cell in notebook.cells:
    if cell.cell_type == "code":
      _clean(cell)
  notebook.metadata = {
    "kernelspec": {
      "display_name": "Python 3",
      "language": "python",
      "name": "python3",
    },
    "language_info": {"name": "python"},
  }
  return notebook, _cpu_seconds() - begin


def _environment(folder: pathlib.Path) -> dict[str, str]:
  """Returns an environment with this Python's commands and no caches."""
  binaries = pathlib.Path(sys.executable).parent
  return os.environ | {
    "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(FOLDER.parent),
    "XDG_CACHE_HOME": str(folder / "cache"),
    "IPYTHONDIR": str(folder / "ipython"),
    "JAX_PLATFORMS": "cpu",
  }


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def _clean(cell: nbformat.NotebookNode) -> None:
  """Drops progress bars, and refuses warnings."""
  kept = []
  for output in cell.outputs:
    if output.output_type == "stream" and output.name == "stderr":
      if "Warning" in output.text:
        raise ValueError(f"{cell.id}: {output.text}")
      continue
    if output.output_type == "stream":
      output.text = _terminal(output.text)
    output.get("metadata", {}).clear()
    kept.append(output)
  cell.outputs = kept


def _terminal(text: str) -> str:
  """Returns what a terminal shows: a carriage return begins a line again."""
  lines = text.replace("\r\n", "\n").split("\n")
  return "\n".join(line.rsplit("\r", 1)[-1].rstrip() for line in lines)


def main(names: list[str]) -> None:
  """Runs notebooks in place.

  Args:
    names: Paths of notebooks; none: all.
  """
  for path in map(pathlib.Path, names) if names else sources():
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
      notebook, cpu = execute(path, pathlib.Path(folder))
    nbformat.write(notebook, path)
    sys.stdout.write(
      f"{path.name}: {time.perf_counter() - began:.0f} s, {cpu:.0f} s of CPU"
      f" time, {path.stat().st_size / 1000:.0f} kB\n"
    )


if __name__ == "__main__":
  main(sys.argv[1:])
