"""`results.csv` has the rows of `results.json`, number by number."""

import csv
import json

import pytest

from atat_jax.evaluation import measuring, parse
from atat_jax.runs import files, spreadsheet

ROWS = [
  {"model": "student", "attack": "nominal", "epsilon": None, "accuracy": 1 / 3},
  {
    "model": 'a "quoted", name\nof two lines',
    "attack": "pgd20",
    "epsilon": 8 / 255,
    "accuracy": 0.1,
    "num_steps": 20,
    "options": {"momentum": 1.0, "random_start": False},
    "correct": "AAAA",
    "class_accuracy": [0.5, None],
  },
]


def _read(text):
  return list(csv.DictReader(text.splitlines(keepends=True)))


def _same(cell, value):
  if value is None:
    return cell == ""
  if isinstance(value, dict):
    return json.loads(cell) == value
  return type(value)(cell) == value


def test_every_value_reads_back_as_it_was():
  lines = _read(spreadsheet.as_csv(ROWS))
  assert len(lines) == len(ROWS)
  for line, row in zip(lines, ROWS, strict=True):
    for field, cell in line.items():
      assert _same(cell, row.get(field)), field
  assert {*lines[0]} == {*ROWS[1]} - {"correct", "class_accuracy"}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\tx"])
def test_no_text_is_run_as_a_formula(text):
  (line,) = _read(spreadsheet.as_csv([{"model": text, "accuracy": -0.5}]))
  assert line == {"model": f"'{text}", "accuracy": "-0.5"}


def test_the_writer_of_results_keeps_both_files_alike(tmp_path):
  path = tmp_path / files.RESULTS
  table = measuring.ResultsTable(path, steps={"student": 7}, record={})
  protocols = [
    parse(name, epsilon=0.2, step_size=0.05)
    for name in ("nominal", "fgsm", "pgd20:momentum=1")
  ]
  for number, protocol in enumerate(protocols):
    row = measuring.row_of(
      protocol,
      model="student",
      dataset="digits",
      num_examples=8,
      batch_norm="running",
      batch_size=8,
      seed=0,
      checkpoint_step=7,
    )
    # One bit an image; the attacks fool different ones.
    bits = {0: "/w==", 1: "8A==", 2: "Dw=="}[number]
    share = {0: 1.0, 1: 0.5, 2: 0.5}[number]
    table.add({**row, "accuracy": share, "correct": bits, "seconds": 0.25})
    rows = files.read_json(path)["rows"]
    lines = _read((tmp_path / spreadsheet.NAME).read_text(encoding="utf-8"))
    assert len(lines) == len(rows) >= number + 1
    for line, found in zip(lines, rows, strict=True):
      scalars = {k for k in found if k not in spreadsheet.LEFT_OUT}
      assert scalars <= {*line}
      assert all(_same(line[field], found.get(field)) for field in line)
  assert "worst_case" in {line["attack"] for line in lines}


def test_names_that_utf8_does_not_have_are_escaped(tmp_path):
  """As Python reads them from folders of other encodings."""
  rows = [{"model": "a\udce9", "accuracy": 0.5}]
  path = tmp_path / "results.json"
  spreadsheet.write_results(path, {"rows": rows})
  assert files.read_json(path)["rows"] == rows
  text = path.with_name(spreadsheet.NAME).read_text(encoding="utf-8")
  assert text == "model,accuracy\na\\udce9,0.5\n"
