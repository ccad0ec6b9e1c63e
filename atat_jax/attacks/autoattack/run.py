"""AutoAttack (Croce and Hein, 2020): an ensemble whose worst case is reported.

Every attack starts from the clean images and runs on the examples that no
attack has fooled yet; the images that it returns are classified again, and only
these predictions count. The robust accuracy after the last attack is the
pointwise worst case over all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, rng, sharding
from atat_jax.attacks import base, diagnostics, nonfinite
from atat_jax.attacks import targeting as targets
from atat_jax.attacks.autoattack import screening as screens
from atat_jax.attacks.autoattack import versions
from atat_jax.attacks.autoattack.progress import EnsembleProgress, Store
from atat_jax.attacks.autoattack.slots import InFlight, Job, Slots
from atat_jax.attacks.diagnostics import Diagnostic
from atat_jax.compilation.ahead import Ahead
from atat_jax.errors import UserError
from atat_jax.process import stops
from atat_jax.runs import locations, wording
from atat_jax.typing import Array, Classifier


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
  """Result of an AutoAttack evaluation.

  Attributes:
    adversarial: float32 [N, H, W, C] (float64 where the images are, under
      jax_enable_x64): images that fool the classifier, and the
      clean ones of examples that no attack fooled.
    robust: bool [N]: examples that are classified correctly after every attack.
    robust_accuracy: Attack to the accuracy after it, pointwise worst case; the
      first entry is "clean".
    seconds: Attack to its run time, compilation included.
    diagnostics: Check to its title, rule, number, flag and message.
    protocol: norm, epsilon, version, attacks, num_examples, seed, batch_norm,
      and screening, where there was one.
  """

  adversarial: np.ndarray
  robust: np.ndarray
  robust_accuracy: dict[str, float]
  seconds: dict[str, float]
  diagnostics: dict[str, Diagnostic]
  protocol: dict[str, Any]

  @property
  def accuracy(self) -> float:
    """Robust accuracy after all attacks, in [0, 1]."""
    return float(self.robust.mean())

  @property
  def clean_accuracy(self) -> float:
    """Accuracy without an attack, in [0, 1]."""
    return self.robust_accuracy["clean"]

  @property
  def warnings(self) -> list[str]:
    """Messages of the checks that raised a flag."""
    return [
      found["message"] for found in self.diagnostics.values() if found["flag"]
    ]

  def summary(self) -> str:
    """Returns a table with the protocol and the warnings, valid Markdown."""
    p = self.protocol
    numbers = wording.attack(norm=p["norm"], epsilon=p["epsilon"])
    lines = [
      f"AutoAttack {p['version']}: {numbers},"
      f" {wording.plural(p['num_examples'], 'example')},"
      f" batch_norm {p['batch_norm']}, seed {p['seed']}"
      + (f", screening: {p['screening']}" if "screening" in p else ""),
      "",
      "| attack   | robust accuracy (%) | lowered by | seconds | numbers |",
      "| -------- | ------------------: | ---------: | ------: | ------- |",
    ]
    previous = None
    for name, value in self.robust_accuracy.items():
      lowered = "" if previous is None else f"{100 * (previous - value):.2f}"
      seconds = f"{self.seconds[name]:.1f}" if name in self.seconds else ""
      lines.append(
        f"| {name:<8} | {100 * value:>19.2f} | {lowered:>10} | {seconds:>7} |"
        f" {p['attacks'].get(name, '')} |"
      )
      previous = value
    lines += ["", f"Robust accuracy: {wording.percent(self.accuracy, 2)}"]
    lines += [f"Warning: {message}" for message in self.warnings]
    return "\n".join(lines)


def _seed(key: Array) -> str:
  return "-".join(str(n) for n in np.asarray(jax.random.key_data(key)).ravel())


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _check_options(
  key: Array,
  batch_size: int,
  state_path: str | os.PathLike[str] | None,
  save_every_s: float,
  progress: bool,
) -> None:
  """Checks the arguments of `autoattack` that are not about the attacks."""
  checks.key(key)
  checks.count("batch_size", batch_size)
  if state_path is not None:
    locations.find("state_path", state_path)
  checks.not_negative("save_every_s", save_every_s)
  checks.boolean("progress", progress)


def autoattack(
  key: Array,
  classifier: Classifier,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  norm: str = "linf",
  version: str | Sequence[str] = "standard",
  options: Mapping[str, Mapping[str, int]] | None = None,
  targeting: str | None = None,
  screening: Classifier | str | None = None,
  batch_size: int = 128,
  mesh: Mesh | None = None,
  state_path: str | os.PathLike[str] | None = None,
  save_every_s: float = 60.0,
  progress: bool = True,
) -> AutoAttackResult:
  """Runs AutoAttack on any number of images.

  Args:
    key: Random key; an example's random numbers depend on it and its place only.
    classifier: Callable from images to logits; best a pytree such as
      `models.classifier` returns. `Randomized` for version "rand".
    images: Float [N, H, W, C] in [0, 1].
    labels: True classes, integers [N].
    epsilon: Radius of the ball, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    version: One of `versions.VERSIONS`, or a list of `versions.NAMES`.
    options: Attack to numbers other than the version's; see `versions.make`.
    targeting: One of `targeting.TARGETINGS`; None: the version's.
    screening: "bfloat16" or a cheaper classifier, attacked first; see `screening`.
    batch_size: Images at a time, over all devices; on CPU at most 48 on each.
    mesh: The devices; None: all of them.
    state_path: File of the progress, from which a killed evaluation resumes.
    save_every_s: Seconds between two saves; each attack's end is saved, too.
    progress: Whether to show a progress bar.

  Returns:
    The result.

  Raises:
    UserError: A wrong argument, by name; a state file of another evaluation.
  """
  base.check_norm(norm, epsilon)
  _check_options(key, batch_size, state_path, save_every_s, progress)
  classifier, screen, called = screens.pair(classifier, screening)
  data = base.on_host(classifier, images, labels)
  ensemble = versions.make(
    version,
    norm=norm,
    num_classes=data[-1],
    options=options,
    targeting=targeting,
  )
  evaluation = _Evaluation(key, data, ensemble, epsilon, norm, batch_size, mesh)
  evaluation.screen(screen, called)
  if state_path is not None:
    evaluation.keep(locations.find("state_path", state_path), save_every_s)
  return evaluation.run(progress=progress)


class _Evaluation:
  """Runs the attacks of an ensemble, one after the other.

  Args:
    key: Random key.
    data: Classifier, images, labels and number of classes, as `base.on_host`
      returns them.
    ensemble: Attacks to run.
    epsilon: Radius.
    norm: Norm of the ball.
    batch_size: Largest batch size.
    mesh: The devices; None: all of them.
  """

  def __init__(
    self,
    key: Array,
    data: tuple[Classifier, np.ndarray, np.ndarray, int],
    ensemble: versions.Ensemble,
    epsilon: float,
    norm: str,
    batch_size: int,
    mesh: Mesh | None,
  ):
    classifier, self._images, self._labels, self._num_classes = data
    self._key, self._ensemble = key, ensemble
    self._epsilon, self._norm = float(epsilon), norm
    self._batch_size = min(batch_size, len(self._images))
    self._mesh = sharding.mesh_or_all(mesh)
    self._classifier = sharding.put_replicated(self._mesh, classifier)
    # On several devices, where arrays lie is known once a program is compiled.
    alone = self._mesh.size == 1 and jax.process_count() == 1
    self._ahead = Ahead(enabled=alone)
    self._predict = diagnostics.Scorer(
      self._classifier, self._mesh, self._ahead
    )
    self._jobs = ensemble.jobs
    self._screen: Classifier | None = None
    self._screen_name, self._tolerance = "", 0.0
    self._store: Store | None = None
    self._save_every_s = 0.0

  def screen(self, classifier: Classifier | None, name: str) -> None:
    """Attacks another network first.

    Args:
      classifier: The network; None: there is none.
      name: Its name in protocols.

    Raises:
      UserError: It has another number of classes.
    """
    if classifier is None:
      return
    images, labels = self._images[:2], np.zeros_like(self._labels[:2])
    classifier, *_, num_classes = base.on_host(classifier, images, labels)
    if num_classes != self._num_classes:
      raise UserError(
        f"screening: a classifier of {num_classes} classes; allowed:"
        f" {self._num_classes}, as the classifier has"
      )
    self._screen = sharding.put_replicated(self._mesh, classifier)
    self._screen_name = name
    self._jobs = screens.jobs(self._ensemble.jobs)

  def keep(self, path: pathlib.Path, save_every_s: float) -> None:
    """Keeps the progress in a file, from which `run` resumes."""
    identity = {
      "epsilon": self._epsilon,
      "norm": self._norm,
      "attacks": [versions.as_json(job) for job in self._jobs],
      "seed": _seed(self._key),
      "images": _digest(self._images),
      "labels": _digest(self._labels),
    }
    self._store = Store(path, json.dumps(identity, sort_keys=True))
    self._save_every_s = save_every_s

  def run(self, *, progress: bool) -> AutoAttackResult:
    """Runs the attacks that are not done yet and all diagnostics."""
    lock = self._store.lock() if self._store else contextlib.nullcontext()
    with lock, self._ahead:
      return self._run(progress=progress)

  def _run(self, *, progress: bool) -> AutoAttackResult:
    self._prepare_diagnostics()
    self._classify_clean()
    self._prepare_attacks(self._jobs)
    before = self._diagnose_before()
    self._run_attacks(progress=progress)
    done = self._progress
    found = before | self._diagnose_after()
    bad = self._nonfinite()
    nonfinite.report(
      "autoattack",
      bad["clean"] + bad["points"] + bad["judged"],
      bad["gradients"],
    )
    return AutoAttackResult(
      adversarial=done.adversarial,
      robust=done.robust,
      robust_accuracy=dict(done.accuracies),
      seconds={name: round(s, 3) for name, s in done.seconds.items()},
      diagnostics=found,
      protocol=self._protocol(),
    )

  def _prepare_diagnostics(self) -> None:
    """Has the programs that look at the classifier compiled in threads."""
    half = max(1, self._batch_size // 2)
    self._predict.prepare(self._images, half, self._key)
    diagnostics.prepare_looks(
      self._ahead,
      self._classifier,
      self._images[: self._batch_size],
      self._labels[: self._batch_size],
      self._ensemble.losses,
    )

  def _prepare_attacks(self, jobs: Sequence[Job]) -> None:
    """Has the programs of attacks compiled in threads.

    Args:
      jobs: Attacks to come, the next one first. How many runs the next one has
        to make is known; of the images that others will find, half may be gone
        after the first attack, and a tenth after later ones.
    """
    progress = self._progress
    share = 1.0
    for job in jobs:
      # A network that screens leaves too little to foresee.
      if job.name in progress.accuracies or job.screened != jobs[0].screened:
        continue
      pending = int((~progress.done[job.name][self._open(job)]).sum())
      if share < 1 or progress.in_flight is None:
        # The order of the targets changes no program.
        self._slots(job, self._ranking).prepare(pending, int(share * pending))
      began = len(progress.accuracies) > 1  # more than "clean"
      share = 0.9 if began else 0.5

  def _classify_clean(self) -> None:
    """Classifies the clean images and restores the progress on them."""
    self._logits = self._predict(
      self._images, self._batch_size, rng.stream(self._key, "clean")
    )
    # The highest logit of a robust example is that of its true class; those of
    # logits that are not finite are not attacked.
    order = np.argsort(-self._logits, axis=-1, kind="stable")
    self._ranking = order[:, 1:]
    self._progress = EnsembleProgress.fresh(
      self._images, self._logits, self._labels, self._jobs
    )
    if self._screen is not None:
      self._compare_networks(self._screen)
    if self._store is not None:
      self._progress = self._store.restore(self._progress)

  def _compare_networks(self, screen: Classifier) -> None:
    """Compares the screening network with the network itself."""
    predict = diagnostics.Scorer(screen, self._mesh)
    found = predict(
      self._images, self._batch_size, rng.stream(self._key, "clean")
    )
    robust = self._progress.robust
    self._progress.near = robust & ~diagnostics.correct(found, self._labels)
    self._tolerance = screens.tolerance(self._logits, found, self._labels)

  def _protocol(self) -> dict[str, Any]:
    screening = f"{self._screen_name}, confirmed by the network itself"
    return {
      "norm": self._norm,
      "epsilon": self._epsilon,
      "version": self._ensemble.version,
      "attacks": {job.name: versions.describe(job) for job in self._jobs},
      "num_examples": len(self._images),
      "seed": _seed(self._key),
      "batch_norm": getattr(
        getattr(self._classifier, "func", None),
        "batch_norm",
        "as in the classifier",
      ),
    } | ({} if self._screen is None else {"screening": screening})

  def _diagnose_before(self) -> dict[str, Diagnostic]:
    self._ahead.wait("gradients")
    found = diagnostics.diagnose_classifier(
      self._key,
      self._classifier,
      self._predict,
      self._images,
      self._labels,
      self._logits,
      batch_size=self._batch_size,
      radius=self._epsilon if self._norm == "linf" else 8 / 255,
      attack_losses=self._ensemble.losses,
    )
    found["num_classes"] = diagnostics.num_classes(
      self._num_classes, self._ensemble.needed, self._ensemble.wanted
    )
    if self._ensemble.randomized:
      del found["randomized"]  # such a version is made for these classifiers
    return found

  def _diagnose_after(self) -> dict[str, Diagnostic]:
    found = {"nonfinite": diagnostics.finite_numbers(**self._nonfinite())}
    accuracies = screens.merged(self._progress.accuracies)
    masking = diagnostics.masking(accuracies)
    if masking is not None:
      found["masking"] = masking
    if self._progress.near is not None:
      found["screening"] = screens.diagnose(
        self._progress.near,
        diagnostics.correct(self._logits, self._labels),
        self._tolerance,
        self._screen_name,
      )
    if not isinstance(self._classifier, base.Randomized):
      found["rescored"] = diagnostics.rescored(
        rng.stream(self._key, "rescored"),
        self._predict,
        self._progress.adversarial,
        self._labels,
        self._progress.robust,
        batch_size=max(1, self._batch_size // 2),
      )
    return found

  def _nonfinite(self) -> dict[str, int]:
    """Counts what was not finite, by the names of `finite_numbers`."""
    counts = np.zeros(3, np.int64)
    for more in self._progress.nonfinite.values():
      counts += more
    return {
      "clean": int((~np.isfinite(self._logits).all(-1)).sum()),
      "points": int(counts[0]),
      "gradients": int(counts[1]),
      "judged": int(counts[2]),
    }

  def _run_attacks(self, *, progress: bool) -> None:
    """Runs the attacks that are not done yet."""
    done, jobs = self._progress, self._jobs
    with tqdm(
      total=len(jobs) * len(self._labels),
      unit="ex",
      desc="autoattack",
      dynamic_ncols=True,
      disable=not progress or jax.process_index() != 0,
    ) as bar:
      for number, job in enumerate(jobs):
        if job.name not in done.accuracies and self._has_work(job):
          self._prepare_attacks(jobs[number:])
          self._run_attack(job, bar, number)
        robust = done.robust.mean()
        bar.set_postfix_str(f"{job.name}, robust {robust:.2%}", refresh=False)
        bar.update((number + 1) * len(self._labels) - bar.n)

  def _run_attack(self, job: Job, bar: Any, number: int) -> None:
    progress, count = self._progress, len(self._labels)
    began = saved = time.perf_counter()
    before = progress.seconds.get(job.name, 0.0)
    robust, done = self._open(job), progress.done[job.name]
    earlier = progress.nonfinite.get(job.name, np.zeros(3, np.int64))

    def save(in_flight: InFlight | None = None) -> None:
      nonlocal saved
      confirmation.flush()
      saved = time.perf_counter()
      progress.seconds[job.name] = before + saved - began
      progress.nonfinite[job.name] = np.add(earlier, [*slots.nonfinite, judged])
      if self._store is not None:
        self._store.save(progress, in_flight)

    def on_fooled(examples: np.ndarray, images: np.ndarray) -> None:
      progress.adversarial[examples] = images
      progress.claimed[examples] = True
      robust[examples] = False

    def on_near(examples: np.ndarray) -> None:
      assert progress.near is not None  # noqa: S101 - narrows the type
      progress.near[examples] = True
      robust[examples] = False

    def on_steps(snapshot: Callable[[], InFlight]) -> None:
      todo = (~done[robust]).sum() - slots.under_way
      share = 1 - todo / max(robust.sum() * job.num_runs, 1)
      text = f"{job.name}, robust {robust.mean():.2%}"
      bar.set_postfix_str(text, refresh=False)
      bar.update(int((number + share) * count) - bar.n)
      late = time.perf_counter() - saved > self._save_every_s
      if self._store and (late or stops.requested()):
        save(snapshot())
      stops.check()

    slots, judged = self._slots(job, self._targets(job)), 0
    confirmation = screens.Confirmation(
      self._score,
      self._labels,
      tolerance=self._tolerance,
      batch_size=self._batch_size,
      on_fooled=on_fooled,
      on_near=on_near,
    )
    slots.run(
      done,
      robust,
      on_fooled=on_fooled,
      on_steps=on_steps,
      on_failed=confirmation.add if job.screened else None,
      in_flight=progress.in_flight,
    )
    progress.in_flight = None
    confirmation.flush()
    judged = self._verify(job.name)
    progress.accuracies[job.name] = float(progress.robust.mean())
    save()

  def _open(self, job: Job) -> np.ndarray:
    """Examples that a job has to attack, bool [N]."""
    progress = self._progress
    left = progress.robust & ~progress.claimed
    if progress.near is None:
      return left
    return left & (~progress.near if job.screened else progress.near)

  def _has_work(self, job: Job) -> bool:
    """Whether a job has examples to attack, or has claims to be judged."""
    return bool(self._open(job).any() or self._progress.claimed.any())

  def _score(self, images: np.ndarray) -> np.ndarray:
    """Classifies images with which attacks ended, logits [B, K]."""
    return self._predict(
      images, self._batch_size, rng.stream(self._key, "confirm")
    )

  def _slots(self, job: Job, ranking: np.ndarray) -> Slots:
    classifier = self._screen if job.screened else self._classifier
    assert classifier is not None  # noqa: S101 - narrows the type, cannot fail
    return Slots(
      rng.stream(self._key, screens.attack_of(job.name)),
      classifier,
      job,
      epsilon=self._epsilon,
      images=self._images,
      labels=self._labels,
      ranking=ranking,
      mesh=self._mesh,
      batch_size=self._batch_size,
      program=self._ensemble.program(job),
      ahead=self._ahead,
    )

  def _targets(self, job: Job) -> np.ndarray:
    """Ranks the classes that a job aims at, integers [N, K - 1]."""
    if job.targeting == "logits":
      return self._ranking
    return targets.rank(
      rng.stream(self._key, screens.attack_of(job.name)),
      self._classifier,
      self._images,
      self._labels,
      self._ranking,
      self._open(job),
      norm=self._norm,
      batch_size=self._batch_size,
      mesh=self._mesh,
    )

  def _verify(self, name: str) -> int:
    """Classifies the returned images again, whatever the attack claims.

    Returns:
      The number of images whose logits are not finite; they are not fooled.
    """
    progress = self._progress
    claimed = np.flatnonzero(progress.claimed)
    if not len(claimed):
      return 0
    logits = self._predict(
      progress.adversarial[claimed],
      min(self._batch_size, len(self._labels)),
      rng.stream(self._key, f"judge {name}"),
    )
    finite = np.isfinite(logits).all(-1)
    wrong = (logits.argmax(-1) != self._labels[claimed]) & finite
    progress.robust[claimed[wrong]] = False
    still_robust = claimed[~wrong]
    progress.adversarial[still_robust] = self._images[still_robust]
    if progress.near is not None:  # the screening network alone was fooled
      progress.near[still_robust] = True
    progress.claimed[:] = False
    return int((~finite).sum())
