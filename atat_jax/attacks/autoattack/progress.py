"""Progress of an AutoAttack evaluation, in memory and in a file."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from atat_jax.attacks import diagnostics
from atat_jax.attacks.autoattack.slots import InFlight, Job
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, lock


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
    near: bool [N]: examples at which the network itself must be attacked; None
      without a screening network.
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
  near: np.ndarray | None = None

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
    files.remove_temporaries(path.parent, below=False)

  def lock(self) -> contextlib.AbstractContextManager[object]:
    """Locks the file against other evaluations (process 0 only).

    Raises:
      UserError: Another process works on it.
    """
    if jax.process_index():
      return contextlib.nullcontext()
    beside = self._path.with_name(f".{self._path.name}.lock")
    return lock.file("state_path", beside, self._path)

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
    if progress.near is not None:
      arrays["near"] = progress.near
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
      UserError: The file belongs to another evaluation, or cannot be read.
      DamagedFileError: It is not such a file, or not what was written. It stays
        where it is.
    """
    if not self._path.exists():
      return fresh
    try:
      arrays = files.load_arrays(self._path)
      identity, logits = str(arrays["identity"]), arrays["logits"]
    except PermissionError as error:
      raise UserError(f"state_path: {self._path}: {error.strerror}") from error
    # A damaged file can raise anything in the zip reader or the header parser.
    except Exception as error:
      raise self._damaged(error) from error
    if identity != self._identity:
      raise UserError(
        f"state_path: {self._path} belongs to other images, labels, epsilon,"
        " norm, attacks or seed; use another path or move it away"
      )
    if not _same_logits(logits, fresh.logits):
      raise UserError(
        f"state_path: {self._path} belongs to another classifier; use another"
        " path or move it away"
      )
    try:
      progress = _from_arrays(fresh, arrays)
    except (IndexError, KeyError, TypeError, ValueError) as error:
      raise self._damaged(error) from error
    if (progress.robust & ~np.isfinite(logits).all(-1)).any():
      raise UserError(
        f"state_path: {self._path} is of an earlier version, which took images"
        " with logits that are not finite for robust; move it away"
      )
    return progress

  def _damaged(self, error: Exception) -> DamagedFileError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DamagedFileError(
      f"state_path: {self._path} is not a state of autoattack ({reason}); move"
      " it away to start anew"
    )


def _same_logits(stored: np.ndarray, found: np.ndarray) -> bool:
  """Whether two classifiers agree up to rounding, in what is not finite, too."""
  if stored.shape != found.shape or stored.dtype.kind != "f":
    return False
  finite = np.isfinite(found)
  if not np.array_equal(stored[~finite], found[~finite], equal_nan=True):
    return False
  scale = float(np.abs(found[finite]).max(initial=0)) + 1e-12
  # NaN on one side only: the comparison is False, as it has to be.
  distance = np.abs(stored[finite] - found[finite]).max(initial=0)
  return bool(distance <= 1e-3 * scale)


def _group(arrays: dict[str, np.ndarray], field: str) -> dict[str, np.ndarray]:
  """Returns the arrays under `field/`, by the rest of their names."""
  start = f"{field}/"
  return {
    name.removeprefix(start): value
    for name, value in arrays.items()
    if name.startswith(start)
  }


def _check_like(array: np.ndarray, like: np.ndarray, name: str) -> None:
  if (array.shape, array.dtype) != (like.shape, like.dtype):
    raise ValueError(f"{name}: {array.dtype} {list(array.shape)}")


def _from_arrays(
  fresh: EnsembleProgress, arrays: dict[str, np.ndarray]
) -> EnsembleProgress:
  for name in ("robust", "claimed"):
    _check_like(arrays[name], getattr(fresh, name), name)
  if fresh.near is not None:
    _check_like(arrays["near"], fresh.near, "near")
  done = _group(arrays, "done")
  if set(done) != set(fresh.done):
    raise ValueError(f"attacks: {', '.join(done)}")
  for name, runs in done.items():
    _check_like(runs, fresh.done[name], name)
  nonfinite = _group(arrays, "nonfinite")
  for name, counts in nonfinite.items():
    _check_like(counts, np.zeros(3, np.int64), name)
  where = ~arrays["robust"] | arrays["claimed"]
  adversarial = fresh.adversarial.copy()
  _check_like(arrays["fallen"], adversarial[where], "fallen")
  if not np.isfinite(arrays["fallen"]).all():
    raise ValueError("images are not finite")
  adversarial[where] = arrays["fallen"]
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
    done=done,
    nonfinite=nonfinite,
    in_flight=in_flight,
    near=None if fresh.near is None else arrays["near"],
  )
