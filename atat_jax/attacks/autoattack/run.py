"""AutoAttack (Croce and Hein, 2020): an ensemble whose worst case is reported.

Every attack starts from the clean image and runs on the examples that are
still standing; who has fallen is judged again on the images returned. The
robust accuracy after the last attack is the pointwise worst case over all.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, rng, sharding
from atat_jax.attacks import balls, base, diagnostics
from atat_jax.attacks.autoattack import versions
from atat_jax.attacks.autoattack.progress import Progress, Store
from atat_jax.attacks.autoattack.slots import InFlight, Slots
from atat_jax.attacks.diagnostics import Finding
from atat_jax.typing import Array, Classifier


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
  """What an evaluation found, and how.

  Attributes:
    adversarial: float32 [N, H, W, C]: where an example fell the image that
      fools the classifier, elsewhere the clean one.
    robust: bool [N]: who is classified correctly after every attack.
    robust_accuracy: Attack to the accuracy after it, pointwise worst case; the
      first entry is "clean".
    seconds: Attack to the time it took, compilation included.
    diagnostics: Check to its rule, number, flag and message.
    protocol: norm, epsilon, version, attacks, num_examples, seed, batch_norm.
  """

  adversarial: np.ndarray
  robust: np.ndarray
  robust_accuracy: dict[str, float]
  seconds: dict[str, float]
  diagnostics: dict[str, Finding]
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
    """A table with the protocol and the warnings, valid Markdown."""
    p = self.protocol
    lines = [
      f"AutoAttack {p['version']}: {p['norm']}, epsilon {p['epsilon']:.5g},"
      f" {p['num_examples']} examples, batch_norm {p['batch_norm']},"
      f" seed {p['seed']}",
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
    lines += ["", f"Robust accuracy: {100 * self.accuracy:.2f} %"]
    lines += [f"Warning: {message}" for message in self.warnings]
    return "\n".join(lines)


def _seed(key: Array) -> str:
  return "-".join(str(n) for n in np.asarray(jax.random.key_data(key)).ravel())


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


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
  batch_size: int = 128,
  mesh: Mesh | None = None,
  state_path: str | os.PathLike[str] | None = None,
  save_every_s: float = 60.0,
  progress: bool = True,
) -> AutoAttackResult:
  """Runs AutoAttack on any number of images.

  Args:
    key: Random key; an example's random numbers depend on it and on the
      example's place alone, not on the batch size or the devices.
    classifier: Callable from images to logits; best a pytree such as
      `models.classifier` returns. `Randomized` for version "rand".
    images: Float [N, H, W, C] in [0, 1].
    labels: Integers [N].
    epsilon: Radius of the ball, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    version: "standard" (apgd-ce, apgd-t, fab-t, square), "fast" (its first
      two), "rand" (apgd-ce and apgd-dlr over 20 samples of a randomised
      classifier), "plus" (all six, with more restarts), or a list of names.
    options: Attack to numbers other than the version's; see `versions.make`.
    batch_size: Images at a time, over all devices; on CPU at most 48 on each,
      of which the activations stay in the caches.
    mesh: The devices; None: all of them.
    state_path: File that keeps what is done. If it exists the evaluation goes
      on from there; the same file for another classifier, other data or
      numbers is refused.
    save_every_s: Seconds between two saves; each attack's end is saved, too.
    progress: Whether to show a bar.

  Returns:
    The result.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name; a state
      file of another evaluation.
  """
  checks.choice("norm", norm, balls.NORMS)
  checks.epsilon(epsilon, norm)
  checks.positive("batch_size", batch_size, integer=True)
  mesh = sharding.make_mesh() if mesh is None else mesh
  classifier, images, labels, num_classes = base.on_host(
    classifier, images, labels
  )
  chosen = versions.make(
    version, norm=norm, num_classes=num_classes, options=options
  )
  batch_size = min(batch_size, len(images))

  classifier = sharding.put_replicated(mesh, classifier)
  predict = diagnostics.Scorer(classifier, mesh)
  protocol = {
    "norm": norm,
    "epsilon": float(epsilon),
    "version": chosen.version,
    "attacks": {job.name: versions.describe(job) for job in chosen.jobs},
    "num_examples": len(images),
    "seed": _seed(key),
    "batch_norm": getattr(
      getattr(classifier, "func", None), "batch_norm", "as in the classifier"
    ),
  }
  identity = {
    "epsilon": float(epsilon),
    "norm": norm,
    "attacks": [versions.as_json(job) for job in chosen.jobs],
    "seed": protocol["seed"],
    "images": _digest(images),
    "labels": _digest(labels),
  }
  store = None
  if state_path is not None:
    store = Store(
      pathlib.Path(state_path), json.dumps(identity, sort_keys=True)
    )

  logits = predict(images, batch_size, rng.stream(key, "clean"))
  state = Progress.fresh(images, logits, labels, chosen.jobs)
  if store is not None:
    state = store.restore(state)
  found = diagnostics.of_classifier(
    key,
    classifier,
    predict,
    images,
    labels,
    logits,
    batch_size=batch_size,
    radius=epsilon if norm == "linf" else 8 / 255,
  )
  found["num_classes"] = diagnostics.num_classes(
    num_classes, chosen.needed, chosen.wanted
  )
  if chosen.version == "rand":
    del found["randomized"]  # is what the version is for
  runner = _Runner(
    key,
    classifier,
    predict,
    state,
    images=images,
    labels=labels,
    # Of those who stand the highest logit is the true class's.
    ranking=np.argsort(-logits, axis=-1, kind="stable")[:, 1:],
    epsilon=epsilon,
    mesh=mesh,
    batch_size=batch_size,
    store=store,
    save_every_s=save_every_s,
  )
  runner.run(chosen.jobs, progress=progress)
  accuracies = dict(state.accuracies)
  if (masking := diagnostics.masking(accuracies)) is not None:
    found["masking"] = masking
  if not isinstance(classifier, base.Randomized):
    found["rescored"] = diagnostics.rescored(
      rng.stream(key, "rescored"),
      predict,
      state.adversarial,
      labels,
      state.robust,
      batch_size=max(1, batch_size // 2),
    )
  return AutoAttackResult(
    adversarial=state.adversarial,
    robust=state.robust,
    robust_accuracy=accuracies,
    seconds={
      name: round(seconds, 3) for name, seconds in state.seconds.items()
    },
    diagnostics=found,
    protocol=protocol,
  )


class _Runner:
  """Takes the ensemble's attacks one after the other to the examples left."""

  def __init__(
    self,
    key: Array,
    classifier: Classifier,
    predict: diagnostics.Scorer,
    state: Progress,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    ranking: np.ndarray,
    epsilon: float,
    mesh: Mesh,
    batch_size: int,
    store: Store | None,
    save_every_s: float,
  ):
    self._key, self._classifier, self._predict = key, classifier, predict
    self._state = state
    self._images, self._labels, self._ranking = images, labels, ranking
    self._epsilon, self._mesh, self._batch_size = epsilon, mesh, batch_size
    self._store, self._save_every_s = store, save_every_s

  def run(self, jobs: Sequence[Any], *, progress: bool) -> None:
    """Runs what is not done yet."""
    state = self._state
    with tqdm(
      total=len(jobs) * len(self._labels),
      unit="ex",
      desc="autoattack",
      dynamic_ncols=True,
      disable=not progress or jax.process_index() != 0,
    ) as bar:
      for number, job in enumerate(jobs):
        if job.name not in state.accuracies and state.robust.any():
          self._run_one(job, bar, number)
        robust = state.robust.mean()
        bar.set_postfix_str(f"{job.name}, robust {robust:.2%}", refresh=False)
        bar.update((number + 1) * len(self._labels) - bar.n)

  def _run_one(self, job: Any, bar: Any, number: int) -> None:
    state, count = self._state, len(self._labels)
    began = saved = time.perf_counter()
    before = state.seconds.get(job.name, 0.0)
    standing, done = state.robust & ~state.claimed, state.done[job.name]

    def save(in_flight: InFlight | None = None) -> None:
      nonlocal saved
      saved = time.perf_counter()
      state.seconds[job.name] = before + saved - began
      if self._store is not None:
        self._store.save(state, in_flight)

    def on_fooled(examples: np.ndarray, images: np.ndarray) -> None:
      state.adversarial[examples] = images
      state.claimed[examples] = True
      standing[examples] = False

    def on_steps(snapshot: Any) -> None:
      todo = (~done[standing]).sum() - slots.under_way
      share = 1 - todo / max(standing.sum() * job.num_runs, 1)
      robust = standing.mean()
      bar.set_postfix_str(f"{job.name}, robust {robust:.2%}", refresh=False)
      bar.update(int((number + share) * count) - bar.n)
      if self._store and time.perf_counter() - saved > self._save_every_s:
        save(snapshot())

    slots = Slots(
      rng.stream(self._key, job.name),
      self._classifier,
      job,
      epsilon=self._epsilon,
      images=self._images,
      labels=self._labels,
      ranking=self._ranking,
      mesh=self._mesh,
      batch_size=self._batch_size,
    )
    slots.run(
      done,
      standing,
      on_fooled=on_fooled,
      on_steps=on_steps,
      in_flight=state.in_flight,
    )
    state.in_flight = None
    self._judge(job.name)
    state.accuracies[job.name] = float(state.robust.mean())
    save()

  def _judge(self, name: str) -> None:
    """Believes no attack: looks at the returned images again."""
    state = self._state
    claimed = np.flatnonzero(state.claimed)
    if not len(claimed):
      return
    logits = self._predict(
      state.adversarial[claimed],
      min(self._batch_size, len(self._labels)),
      rng.stream(self._key, f"judge {name}"),
    )
    wrong = logits.argmax(-1) != self._labels[claimed]
    state.robust[claimed[wrong]] = False
    standing = claimed[~wrong]
    state.adversarial[standing] = self._images[standing]
    state.claimed[:] = False
