"""Everything that a training writes: metrics, checkpoints, its progress.

Only process 0 writes metrics and progress.
"""

import contextlib
import json
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from atat_jax import checkpoints, metrics
from atat_jax.data import batches
from atat_jax.runs import files, locations, overfitting
from atat_jax.state import TrainState
from atat_jax.training.incidents import Incidents
from atat_jax.training.interrupts import Interrupted
from atat_jax.training.outline import Outline

_log = logging.getLogger(__name__)


class MetricsWriter(contextlib.AbstractContextManager[Any]):
  """Writer of `metrics.jsonl` and `tensorboard/`, a context manager.

  Args:
    directory: Directory that holds both.
    step: Step that the training starts or resumes from; later lines, left by an
      interrupted run, are dropped, as they will be computed again. So is a last
      line that a kill has cut off; the others stay.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    path = directory / files.METRICS
    lines = files.read_lines(path)
    if lines.bad:
      copy = files.set_aside(path, directory, copy=True)
      _log.warning("%s: all of it was copied to %s", path, copy)
    kept = [text for text, line in lines.found if line["step"] <= step]
    files.write_bytes(path, b"".join(kept))
    self._file = files.Appender(path)
    self._board = _Board(directory / files.TENSORBOARD, step)

  def write(
    self, split: str, step: int, values: Mapping[str, float | str]
  ) -> None:
    """Appends a line, and its numbers to TensorBoard.

    Args:
      split: "train" or "validation".
      step: Number of steps made.
      values: Metrics and remarks by name.

    Raises:
      UserError: The operating system refuses.
    """
    if not self._writes:
      return
    line = json.dumps({"split": split, "step": step, **values}) + "\n"
    # After a validation a checkpoint follows, which counts on it.
    self._file.write(line.encode(), sync=split == "validation")
    self._board.write(
      {f"{split}/{k}": v for k, v in values.items() if isinstance(v, float)},
      step,
    )

  def __exit__(self, *error: object) -> None:
    """Closes both files."""
    if self._writes:
      self._file.close()
      self._board.close()


class _Board:
  """Scalars for TensorBoard, on the disk when a call returns.

  `tensorboardX.SummaryWriter` writes in a thread, which a full disk ends with a
  traceback; whoever writes next would wait for it for ever.

  Args:
    directory: Directory of the files.
    step: Step that the training starts or resumes from; TensorBoard leaves out
      what earlier files have beyond it.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    self._directory = directory
    # On an object store, copies of a local file are sent.
    self._spool: tempfile.TemporaryDirectory[str] | None = None
    self._sent = time.monotonic()
    with files.plain_errors(directory):
      place = directory
      if locations.is_remote(directory):
        self._spool = tempfile.TemporaryDirectory()
        place = pathlib.Path(self._spool.name)
      directory.mkdir(parents=True, exist_ok=True)
      self._events = event_file_writer.EventsWriter(str(place / "events"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step + 1, session_log=start)
    self._flush()

  def write(self, values: Mapping[str, float], step: int) -> None:
    """Writes numbers by name.

    Raises:
      UserError: The operating system refuses.
    """
    for name, value in values.items():
      self._add(step, summary=summary.scalar(name, value))
    self._flush()

  def _add(self, step: int, **content: Any) -> None:
    with files.plain_errors(self._directory):
      self._events.write_event(
        event_pb2.Event(wall_time=time.time(), step=step, **content)
      )

  def _flush(self) -> None:
    with files.plain_errors(self._directory):
      self._events.flush()
      if time.monotonic() - self._sent > files.SEND_EVERY:
        self._send()

  def _send(self) -> None:
    """Sends the file to an object store, if it is for one."""
    self._sent = time.monotonic()
    if self._spool is not None:
      for path in pathlib.Path(self._spool.name).iterdir():
        (self._directory / path.name).write_bytes(path.read_bytes())

  def close(self) -> None:
    """Closes the file, which holds everything already."""
    with contextlib.suppress(OSError):  # it was said when it was written
      self._events.close()
    with files.plain_errors(self._directory):
      self._send()
    if self._spool is not None:
      self._spool.cleanup()


INPUT_WAIT = "input_wait"
"""Share of the time since the last log line that devices waited for pictures."""
_MUCH_WAITING = 0.05

# Metrics that the bar shows, under shorter names.
_SHOWN = {
  "loss": "loss",
  "attention": "att",
  "logit_pairing": "pair",
  "accuracy_clean": "clean",
  "accuracy_adversarial": "adv",
}


class StepBar(contextlib.AbstractContextManager[Any]):
  """Progress bar of a stage, with the clock behind images per second.

  Args:
    name: Name of the stage.
    total: Number of steps of the stage.
    start: Number of steps made before.
    batch_size: Number of images in a batch.
  """

  def __init__(self, name: str, total: int, *, start: int, batch_size: int):
    self._bar = tqdm(
      total=total,
      initial=start,
      desc=name,
      unit="step",
      disable=jax.process_index() != 0,
      dynamic_ncols=True,
    )
    self._batch_size = batch_size
    self._metrics: dict[str, str] = {}
    self.restart()

  def __exit__(self, *error: object) -> None:
    """Closes the bar."""
    self._bar.close()

  def restart(self) -> None:
    """Restarts the clock, which leaves out compiling, validating and saving."""
    self._since, self._steps = time.perf_counter(), 0
    self._waited = 0.0

  def advance(self, count: int) -> None:
    """Counts steps that were made."""
    self._steps += count
    self._bar.update(count)

  def wait(self, seconds: float) -> None:
    """Counts time in which the devices waited for images."""
    self._waited += seconds

  def waiting_share(self) -> float:
    """Share of the time since the clock was restarted that they waited."""
    seconds = time.perf_counter() - self._since
    return min(1.0, self._waited / max(seconds, 1e-9))

  @contextlib.contextmanager
  def validating(self) -> Iterator[None]:
    """Shows behind the bar how far a pass over the validation images is."""

    def show(done: int, count: int) -> None:
      self._bar.set_postfix_str(f"validation, {done}/{count} images")

    with batches.watch(show):
      yield
    self._bar.set_postfix(self._metrics, refresh=False)

  def images_per_second(self) -> float:
    """Speed since the clock was restarted."""
    seconds = time.perf_counter() - self._since
    return self._batch_size * self._steps / max(seconds, 1e-9)

  def show_metrics(self, values: dict[str, float]) -> None:
    """Shows metrics behind the bar.

    Args:
      values: Metrics by name, `images_per_second` among them.
    """
    shown = {
      short: f"{values[name]:.3f}"
      for name, short in _SHOWN.items()
      if name in values
    }
    self._metrics = {"img/s": f"{values['images_per_second']:.0f}"}
    if INPUT_WAIT in values:
      self._metrics["wait"] = f"{100 * values[INPUT_WAIT]:.0f} %"
    self._metrics |= shown
    self._bar.set_postfix(self._metrics)

  def print_scores(
    self, step: int, scores: dict[str, float], ratios: dict[str, float]
  ) -> None:
    """Prints a line of a validation that stays above the bar."""
    if self._bar.disable:
      return
    line = f"{self._bar.desc} step {step}/{self._bar.total} validation: "
    line += ", ".join(f"{name} {100 * v:.1f} %" for name, v in scores.items())
    if ratios:
      shown = ", ".join(f"{name} {v:.2g}" for name, v in ratios.items())
      line += f"; gradients relative to cross-entropy: {shown}"
    self._bar.write(line)


class Journal(contextlib.AbstractContextManager[Any]):
  """Everything that a training writes: metrics, checkpoints, the terminal.

  Args:
    outline: Outline of the training.
    checkpointer: Its checkpoints; they stay open.
    saved: Step of the last checkpoint; None: there is none yet.
    incidents: Steps that were not finite.
  """

  def __init__(
    self,
    outline: Outline,
    checkpointer: checkpoints.Checkpointer,
    saved: int | None,
    incidents: Incidents,
  ):
    self._outline, self._checkpointer = outline, checkpointer
    self._incidents = incidents
    self._saved, start = saved, saved or 0
    self._advised = False
    self._place = outline.directory / files.CHECKPOINTS
    metrics_writer = MetricsWriter(outline.directory, start)
    bar = StepBar(
      outline.name,
      outline.total,
      start=start,
      batch_size=outline.batch_size,
    )
    with contextlib.ExitStack() as stack:
      self._metrics = stack.enter_context(metrics_writer)
      self.bar = stack.enter_context(bar)
      self._opened = stack.pop_all()
    found = files.read_metrics(outline.directory / files.METRICS)
    self._validations = found.get("validation", [])

  def __exit__(self, *error: object) -> None:
    """Closes the metrics and the bar."""
    self._opened.close()

  def _kept(self) -> str:
    """Says which checkpoint is the last good one."""
    kept = f"step {self._saved} is kept" if self._saved else "there is none yet"
    return f"the last good checkpoint ({kept}) is in {self._place}"

  def check_finite(self, current: TrainState) -> TrainState:
    """Looks for steps that were not finite, and does what the policy says.

    Returns:
      The state to go on from.

    Raises:
      TrainingDivergedError: The training stops; the message names step and term.
      RolledBack: It goes back to its last checkpoint.
    """
    return self._incidents.examine(current, self._kept())

  def check_logits(self, wrong: int, images: int, step: int) -> None:
    """Stops a training whose validation logits are not finite.

    Raises:
      TrainingDivergedError: `wrong` of the `images` have such logits.
    """
    self._incidents.check_logits(wrong, images, step, self._kept())

  def log(
    self,
    current: TrainState,
    step: int,
    learning_rate: float,
    input_advice: str | None = None,
  ) -> None:
    """Writes the metrics since the last log line.

    Args:
      current: State with the metrics.
      step: Number of steps made.
      learning_rate: Learning rate of the last of them.
      input_advice: Advice for a run that waits for its pictures; None: they do
        not come while it goes on.
    """
    means = metrics.compute(current.sums)
    values = {
      "epoch": step / self._outline.per_epoch,
      # An interval whose steps were all left out has no means.
      **{name: mean for name, mean in means.items() if math.isfinite(mean)},
      **self._left_out(step),
      "learning_rate": learning_rate,
      "images_per_second": self.bar.images_per_second(),
      **self._waiting(step, input_advice),
    }
    self._metrics.write("train", step, values)
    self.bar.show_metrics(values)

  def _waiting(self, step: int, advice: str | None) -> dict[str, float]:
    """Share of waiting for pictures; where it is large, that is said once."""
    if advice is None:
      return {}
    share = self.bar.waiting_share()
    if share > _MUCH_WAITING and not self._advised:
      self._advised = True
      if jax.process_index() == 0:
        _log.warning(
          "%s, step %d: the devices waited %.0f %% of the time for pictures; %s",
          self._outline.name,
          step,
          100 * share,
          advice,
        )
    return {INPUT_WAIT: share}

  def updates(self, step: int) -> int:
    """Returns the number of updates until a step, at least 1."""
    return max(1, step - self._incidents.count(1, step))

  def _left_out(self, step: int) -> dict[str, float]:
    """Number of steps since the last log line that changed nothing."""
    if not self._incidents.leaves_out:
      return {}
    first = (step - 1) // self._outline.log_every * self._outline.log_every + 1
    return {"steps_left_out": float(self._incidents.count(first, step))}

  def save(
    self,
    current: TrainState,
    step: int,
    scores: dict[str, float],
    ratios: dict[str, float],
  ) -> None:
    """Writes what a validation found, and a checkpoint with its last score."""
    values = {
      "epoch": step / self._outline.per_epoch,
      **scores,
      **{f"{files.GRADIENT_RATIO}{name}": x for name, x in ratios.items()},
    }
    self._validations.append({"step": step, **scores})
    self._metrics.write(
      "validation",
      step,
      {**values, "attack": self._outline.attack, **self._alarm(step)},
    )
    self._checkpointer.save(current, step, list(scores.values())[-1], scores)
    self._saved = step
    self.bar.print_scores(step, scores, ratios)

  def _alarm(self, step: int) -> dict[str, str]:
    """Remark on a validation; a collapse that goes on is logged once."""
    found = overfitting.find(self._validations)
    if not found or found[-1].step != step:
      return {}
    text = found[-1].describe()
    before = [line["step"] for line in self._validations[:-1]]
    goes_on = [one.step for one in found[:-1]][-1:] == before[-1:]
    if jax.process_index() == 0 and not goes_on:
      _log.warning("%s: step %d: %s", self._outline.name, step, text)
    return {overfitting.ALARM: text}

  def interrupted(self, step: int, signum: int) -> Interrupted:
    """Makes the error that ends a training stopped on request."""
    return Interrupted(
      f"{self._outline.name}: stopped at step {step} of {self._outline.total}, saved in"
      f" {self._place}; the same command resumes there",
      signum,
      agreed=True,
    )
