"""Metrics on disk: lines, TensorBoard, and the cut where a run resumes."""

import argparse
import json
import struct

import jax
import numpy as np
import pytest
import tensorboardX.proto.event_pb2 as events

from atat_jax import sharding
from atat_jax.data import batches
from atat_jax.training import writer as writers
from atat_jax.training.writer import MetricsWriter, StepBar


def write_lines(directory, steps, **more):
  with MetricsWriter(directory, 0) as writer:
    for step in steps:
      writer.write("train", step, {"loss": step / 2, **more})


def lines(directory):
  text = (directory / "metrics.jsonl").read_text()
  assert text == "" or text.endswith("\n")
  return [json.loads(line) for line in text.splitlines()]


def board(directory):
  """All scalars on a TensorBoard as (tag, step, value), file after file."""
  found = []
  for path in sorted((directory / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      (size,) = struct.unpack("<Q", data[:8])
      event = events.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
      ]
  return found


def test_lines_are_json_with_split_and_step(tmp_path):
  with MetricsWriter(tmp_path / "run", 0) as writer:
    writer.write("train", 4, {"loss": 0.5, "epoch": 0.25})
    # At once on disk: what follows may be a kill.
    assert len(lines(tmp_path / "run")) == 1
    writer.write("validation", 5, {"accuracy": 1.0, "attack": "pgd2: x"})
  assert lines(tmp_path / "run") == [
    {"split": "train", "step": 4, "loss": 0.5, "epoch": 0.25},
    {"split": "validation", "step": 5, "accuracy": 1.0, "attack": "pgd2: x"},
  ]


def test_tensorboard_has_the_numbers_and_no_text(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    writer.write("train", 4, {"loss": 0.5})
    writer.write("validation", 5, {"accuracy": 0.25, "attack": "pgd2: x"})
  assert board(tmp_path) == [
    ("train/loss", 4, 0.5),
    ("validation/accuracy", 5, 0.25),
  ]


def test_resuming_drops_what_lies_beyond(tmp_path):
  write_lines(tmp_path, [4, 8, 12, 16])
  with MetricsWriter(tmp_path, 10) as writer:
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    writer.write("train", 12, {"loss": 7.0})
  assert [line["loss"] for line in lines(tmp_path)] == [2.0, 4.0, 7.0]


def test_resuming_keeps_the_step_itself(tmp_path):
  write_lines(tmp_path, [4, 8, 12])
  with MetricsWriter(tmp_path, 8):
    pass
  assert [line["step"] for line in lines(tmp_path)] == [4, 8]


@pytest.mark.parametrize(
  "torn",
  ['{"split": "train", "step": 8, "lo', '{"split": "tr', "{", "\0\0\0", "{}"],
)
def test_a_torn_line_is_dropped(tmp_path, torn):
  write_lines(tmp_path, [4])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(torn)
  with MetricsWriter(tmp_path, 8) as writer:
    writer.write("train", 8, {"loss": 1.0})
  assert [line["step"] for line in lines(tmp_path)] == [4, 8]


def test_a_new_run_drops_everything(tmp_path):
  # It was killed before its first checkpoint: it begins again.
  write_lines(tmp_path, [4, 8])
  with MetricsWriter(tmp_path, 0):
    pass
  assert lines(tmp_path) == []


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with MetricsWriter(tmp_path / "run", 0) as writer:
    writer.write("train", 1, {"loss": 1.0})
  assert list(tmp_path.iterdir()) == []


def test_the_bar_of_a_training_moves_with_the_batches_of_a_validation():
  mesh, shown = sharding.make_mesh(jax.devices()[:1]), []

  def measure(number, x):
    shown.append(bar._bar.postfix)
    return x

  with StepBar("at", 10, start=0, batch_size=4) as bar:
    bar.show_metrics({"images_per_second": 3.0, "loss": 2.0})
    with bar.validating():
      batches.map_batches(measure, np.arange(10.0), batch_size=4, mesh=mesh)
    shown.append(bar._bar.postfix)
  metrics = "img/s=3, loss=2.000"
  done = [f"validation, {number}/10 images" for number in (4, 8)]
  assert shown == [metrics, *done, metrics]


@pytest.mark.parametrize("number", [0, 1])
def test_a_bar_can_validate_before_there_are_metrics(number, monkeypatch):
  """So it is after a resume; the second process of a job shows no bar."""
  monkeypatch.setattr(jax, "process_index", lambda: number)
  with StepBar("at", 10, start=8, batch_size=4) as bar, bar.validating():
    bar.advance(1)
  assert bar.images_per_second() > 0


def test_a_run_that_waits_for_its_pictures_is_told_once(monkeypatch, caplog):
  clock = [0.0]
  monkeypatch.setattr(writers.time, "perf_counter", lambda: clock[0])
  journal = writers.Journal.__new__(writers.Journal)
  journal._advised, journal._outline = False, argparse.Namespace(name="at")
  with StepBar("at", 10, start=0, batch_size=4) as journal.bar:
    for waited, share in ((0.4, 0.04), (1.2, 0.12), (9.0, 0.9)):
      journal.bar.restart()
      clock[0] += 10.0
      journal.bar.wait(waited / 2)
      journal.bar.wait(waited / 2)
      found = journal._waiting(7, "data.workers=15 would help")
      assert found == {"input_wait": pytest.approx(share)}
      journal.bar.show_metrics({"images_per_second": 3.0, **found})
      assert journal.bar._bar.postfix.endswith(f"wait={100 * share:.0f} %")
    assert journal._waiting(8, None) == {}
  assert [record.getMessage() for record in caplog.records] == [
    "at, step 7: the devices waited 12 % of the time for pictures;"
    " data.workers=15 would help"
  ]
