"""What an AutoAttack evaluation has done so far, in memory and in a file."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import numpy as np

from atat_jax.attacks.autoattack.slots import InFlight, Job
from atat_jax.errors import UserError


@dataclasses.dataclass
class Progress:
  """How far an evaluation is; changed in place.

  Attributes:
    logits: [N, K] of the clean images.
    robust: bool [N]: who still stands.
    claimed: bool [N]: who the running attack says it has fooled.
    adversarial: [N, H, W, C]: images that fool, elsewhere the clean ones.
    accuracies: "clean" and attacks that are over to the accuracy after them.
    seconds: Attack to the time it has taken.
    done: Attack to bool [N, runs]: the runs that are over.
    in_flight: Runs in the middle of their way.
  """

  logits: np.ndarray
  robust: np.ndarray
  claimed: np.ndarray
  adversarial: np.ndarray
  accuracies: dict[str, float]
  seconds: dict[str, float]
  done: dict[str, np.ndarray]
  in_flight: InFlight | None = None

  @classmethod
  def fresh(
    cls,
    images: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    jobs: Sequence[Job],
  ) -> "Progress":
    """Before the first attack."""
    robust = logits.argmax(-1) == labels
    return cls(
      logits=logits,
      robust=robust,
      claimed=np.zeros_like(robust),
      adversarial=images.copy(),
      accuracies={"clean": float(robust.mean())},
      seconds={},
      done={
        job.name: np.zeros((len(labels), job.num_runs), bool) for job in jobs
      },
    )


class Store:
  """The file of an evaluation: written at once or not at all.

  Args:
    path: The file.
    identity: Everything the evaluation depends on, as text, the classifier
      aside: that is known by its logits on the clean images.

  Raises:
    UserError: The folder of the file cannot be made.
  """

  def __init__(self, path: pathlib.Path, identity: str):
    self._path, self._identity = path, identity
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"state_path: {path}: {error.strerror}") from None
    if path.is_dir():
      raise UserError(f"state_path: {path} is a folder; allowed: a file")

  def save(self, state: Progress, in_flight: InFlight | None = None) -> None:
    """Writes the file (process 0 only)."""
    if jax.process_index():
      return
    fallen = ~state.robust | state.claimed
    arrays: dict[str, np.ndarray] = {
      "identity": np.array(self._identity),
      "logits": state.logits,
      "robust": state.robust,
      "claimed": state.claimed,
      "fallen": state.adversarial[fallen],
    }
    for field in ("accuracies", "seconds", "done"):
      for name, value in getattr(state, field).items():
        arrays[f"{field}/{name}"] = np.asarray(value)
    if in_flight is not None:
      arrays["in_flight/examples"] = in_flight.examples
      arrays["in_flight/runs"] = in_flight.runs
      arrays["in_flight/i"] = in_flight.i
      for number, leaf in enumerate(in_flight.leaves):
        arrays[f"in_flight/leaf{number:03d}"] = leaf
    partial = self._path.with_name(f".{self._path.name}.partial")
    with partial.open("wb") as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(partial, self._path)

  def restore(self, fresh: Progress) -> Progress:
    """What the file holds, or `fresh` where there is none.

    Raises:
      UserError: Not such a file, or that of another evaluation.
    """
    if not self._path.exists():
      return fresh
    try:
      with np.load(self._path, allow_pickle=False) as file:
        arrays = dict(file)
      identity, logits = str(arrays["identity"]), arrays["logits"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      raise UserError(
        f"state_path: {self._path} is not a state of autoattack; move it away"
        " to start anew"
      ) from None
    if identity != self._identity:
      raise UserError(
        f"state_path: {self._path} belongs to other images, labels, epsilon,"
        " norm, attacks or seed; use another path or move it away"
      )
    scale = float(np.abs(fresh.logits).max()) + 1e-12
    if (
      logits.shape != fresh.logits.shape
      or np.abs(logits - fresh.logits).max() > 1e-3 * scale
    ):
      raise UserError(
        f"state_path: {self._path} belongs to another classifier; use another"
        " path or move it away"
      )
    return self._progress(fresh, arrays)

  def _progress(
    self, fresh: Progress, arrays: dict[str, np.ndarray]
  ) -> Progress:
    def group(field: str) -> dict[str, np.ndarray]:
      start = f"{field}/"
      return {
        name.removeprefix(start): value
        for name, value in arrays.items()
        if name.startswith(start)
      }

    adversarial = fresh.adversarial.copy()
    adversarial[~arrays["robust"] | arrays["claimed"]] = arrays["fallen"]
    running = group("in_flight")
    return Progress(
      logits=arrays["logits"],
      robust=arrays["robust"],
      claimed=arrays["claimed"],
      adversarial=adversarial,
      accuracies={k: float(v) for k, v in group("accuracies").items()},
      seconds={k: float(v) for k, v in group("seconds").items()},
      done=group("done"),
      in_flight=InFlight(
        running["examples"],
        running["runs"],
        running["i"],
        [running[name] for name in sorted(running) if name.startswith("leaf")],
      )
      if running
      else None,
    )
