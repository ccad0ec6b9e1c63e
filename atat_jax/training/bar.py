"""Progress of a training on the terminal, and its speed."""

import contextlib
import time
from typing import Any

import jax
from tqdm import tqdm

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

  def __init__(self, name: str, *, total: int, start: int, batch_size: int):
    self._bar = tqdm(
      total=total,
      initial=start,
      desc=name,
      unit="step",
      disable=jax.process_index() != 0,
      dynamic_ncols=True,
    )
    self._batch_size = batch_size
    self.restart()

  def __exit__(self, *error: object) -> None:
    """Closes the bar."""
    self._bar.close()

  def restart(self) -> None:
    """Restarts the clock, which leaves out compiling, validating and saving."""
    self._since, self._steps = time.perf_counter(), 0

  def advance(self, count: int) -> None:
    """Counts steps that were made."""
    self._steps += count
    self._bar.update(count)

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
    rate = values["images_per_second"]
    self._bar.set_postfix({"img/s": f"{rate:.0f}", **shown})

  def print_scores(self, step: int, scores: dict[str, float]) -> None:
    """Prints a line of validation accuracies that stays above the bar."""
    if not self._bar.disable:
      self._bar.write(
        f"{self._bar.desc} step {step}/{self._bar.total} validation: "
        + ", ".join(f"{name} {100 * v:.1f} %" for name, v in scores.items())
      )
