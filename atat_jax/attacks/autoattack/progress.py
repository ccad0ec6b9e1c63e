"""Progress of an AutoAttack evaluation, in memory and in a file."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import numpy as np

from atat_jax.attacks import diagnostics
from atat_jax.attacks.autoattack.slots import InFlight, Job
from atat_jax.errors import UserError
from atat_jax.runs import files


@dataclasses.dataclass
class EnsembleProgress:
  """Progress of an evaluation; changed in place.

  Attributes:
    logits: Logits of the clean images, [N, K].
    robust: bool [N]: examples that no attack has fooled.
    claimed: bool [N]: examples that the running attack claims to have fooled.
    adversarial: Images that fool the classifier, elsewhere the clean ones,
      [N, H, W, C].
    accuracies: "clean" and finished attacks to the accuracy after them.
    seconds: Attack to its run time.
    done: Attack to its finished runs, bool [N, runs].
    nonfinite: Attack to its evaluations that were not finite, int64 [3]:
      points, gradients, and images that were judged.
    in_flight: Unfinished runs.
  """

  logits: np.ndarray
  robust: np.ndarray
  claimed: np.ndarray
  adversarial: np.ndarray
  accuracies: dict[str, float]
  seconds: dict[str, float]
  done: dict[str, np.ndarray]
  nonfinite: dict[str, np.ndarray]
  in_flight: InFlight | None = None

  @classmethod
  def fresh(
    cls,
    images: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    jobs: Sequence[Job],
  ) -> "EnsembleProgress":
    """Returns the progress before the first attack."""
    robust = diagnostics.correct(logits, labels)
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
      nonfinite={},
    )


class Store:
  """File of an evaluation, written as a whole or not at all.

  Args:
    path: The file.
    identity: Everything the evaluation depends on, as text, except for the
      classifier, which is recognised by its logits on the clean images.

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

  def save(
    self, progress: EnsembleProgress, in_flight: InFlight | None = None
  ) -> None:
    """Writes the file (process 0 only)."""
    if jax.process_index():
      return
    # Stored states of earlier versions have these names.
    arrays: dict[str, np.ndarray] = {
      "identity": np.array(self._identity),
      "logits": progress.logits,
      "robust": progress.robust,
      "claimed": progress.claimed,
      "fallen": progress.adversarial[~progress.robust | progress.claimed],
    }
    for field in ("accuracies", "seconds", "done", "nonfinite"):
      for name, value in getattr(progress, field).items():
        arrays[f"{field}/{name}"] = np.asarray(value)
    if in_flight is not None:
      arrays["in_flight/examples"] = in_flight.examples
      arrays["in_flight/runs"] = in_flight.runs
      arrays["in_flight/i"] = in_flight.i
      for number, leaf in enumerate(in_flight.leaves):
        arrays[f"in_flight/leaf{number:03d}"] = leaf
    files.write_arrays(self._path, arrays)

  def restore(self, fresh: EnsembleProgress) -> EnsembleProgress:
    """Reads the file; returns `fresh` if there is none.

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
    if not _same(logits, fresh.logits):
      raise UserError(
        f"state_path: {self._path} belongs to another classifier; use another"
        " path or move it away"
      )
    if (arrays["robust"] & ~np.isfinite(logits).all(-1)).any():
      raise UserError(
        f"state_path: {self._path} is of an earlier version, which took images"
        " with logits that are not finite for robust; move it away"
      )
    return _from_arrays(fresh, arrays)


def _same(stored: np.ndarray, fresh: np.ndarray) -> bool:
  """Whether logits are those of one classifier, up to rounding."""
  finite = np.isfinite(fresh)
  if stored.shape != fresh.shape or (np.isfinite(stored) != finite).any():
    return False
  # Infinities and NaN are equal to themselves.
  if not np.array_equal(stored[~finite], fresh[~finite], equal_nan=True):
    return False
  scale = float(np.abs(fresh[finite]).max(initial=0.0)) + 1e-12
  change = np.abs(stored[finite] - fresh[finite]).max(initial=0.0)
  return bool(change <= 1e-3 * scale)


def _group(arrays: dict[str, np.ndarray], field: str) -> dict[str, np.ndarray]:
  """Returns the arrays under `field/`, by the rest of their names."""
  start = f"{field}/"
  return {
    name.removeprefix(start): value
    for name, value in arrays.items()
    if name.startswith(start)
  }


def _from_arrays(
  fresh: EnsembleProgress, arrays: dict[str, np.ndarray]
) -> EnsembleProgress:
  adversarial = fresh.adversarial.copy()
  adversarial[~arrays["robust"] | arrays["claimed"]] = arrays["fallen"]
  running = _group(arrays, "in_flight")
  in_flight = None
  if running:
    leaves = sorted(name for name in running if name.startswith("leaf"))
    in_flight = InFlight(
      running["examples"],
      running["runs"],
      running["i"],
      [running[name] for name in leaves],
    )
  return EnsembleProgress(
    logits=arrays["logits"],
    robust=arrays["robust"],
    claimed=arrays["claimed"],
    adversarial=adversarial,
    accuracies={k: float(v) for k, v in _group(arrays, "accuracies").items()},
    seconds={k: float(v) for k, v in _group(arrays, "seconds").items()},
    done=_group(arrays, "done"),
    nonfinite=_group(arrays, "nonfinite"),
    in_flight=in_flight,
  )
