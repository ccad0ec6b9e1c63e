"""Audit of an attack's result, whatever attack or library it comes from.

The checks follow "On Evaluating Adversarial Robustness" (Carlini et al., 2019)
and the flags of the AutoAttack reference. They ask whether the images keep to
the rules, whether the classifier is one that gradient attacks can judge, and
whether a plain attack, given more steps or a larger ball, does what it must.
A flag is a reason to investigate; no flag is no proof of robustness.

The checks, in their order:
  in_ball: whether the images are in the ball and in [0, 1];
  probabilities, zero_gradients, randomized, batch_dependence: properties of the
    classifier, see `attacks.diagnostics`;
  rescored: whether the images score the same in another order and batch size;
  steps: whether PGD fools more images with more steps;
  attack_strength: whether the attack fools as many images as PGD;
  epsilon: whether the accuracy falls to 0 as the ball grows;
  noise: whether the attack fools more images than random noise;
  nonfinite: whether all logits and gradients were finite.
An image whose logits are not finite is not fooled, whatever argmax makes of
them. `batch_dependence` and `rescored` are left out for `Randomized` classifiers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.attacks import balls, base, diagnostics, nonfinite
from atat_jax.attacks.auto_pgd import apgd
from atat_jax.attacks.diagnostics import Diagnostic, diagnostic
from atat_jax.attacks.projected_gradient import pgd
from atat_jax.data import batches
from atat_jax.errors import UserError
from atat_jax.evaluation.networks import devices
from atat_jax.runs import wording
from atat_jax.typing import Array, Classifier

# A randomised classifier has this many gradients averaged at each point, and its
# images are evaluated as often.
_EOT_SAMPLES = _NUM_EVALUATIONS = 20
_STEPS_FOR_RADII = 40
_ROUNDING = 1e-6


def audit(
  key: Array,
  classifier: Classifier,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  adversarial: Array | np.ndarray,
  *,
  epsilon: float,
  norm: str = "linf",
  batch_size: int = 128,
  num_examples: int = 100,
  num_steps: Sequence[int] = (20, 100, 1000),
  num_noise: int = 50,
  mesh: Mesh | None = None,
  progress: bool = True,
) -> dict[str, Diagnostic]:
  """Checks the images that an attack returned, and their classifier.

  Some checks attack the classifier themselves, on the first `num_examples`
  images that it classifies correctly: by PGD with the margin loss, a step of a
  quarter of the radius and a random start, whatever the number of steps. In l1
  it is APGD, as the sparse steps of PGD stall at the borders of the box. Other
  radii or numbers of steps compile nothing. A `Randomized` classifier is
  attacked through gradients averaged over 20 samples; an image counts by the
  share of 20 evaluations in which it is classified correctly.

  Args:
    key: Random key.
    classifier: Callable from images to logits; best a pytree such as
      `models.classifier` returns. `Randomized` if it draws random numbers.
    images: Clean images, float [N, H, W, C] in [0, 1].
    labels: True classes, integers [N].
    adversarial: Images that the attack returned, float [N, H, W, C]: a clean
      image or a failed attempt where it did not succeed.
    epsilon: Radius of the ball, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    batch_size: Images at a time, over all devices.
    num_examples: Number of images on which the audit's own attacks run.
    num_steps: Two or more increasing numbers of steps of PGD.
    num_noise: Number of random points on the ball's surface for each image.
    mesh: The devices; None: all of them.
    progress: Whether to show a progress bar that names the current check.

  Returns:
    Check to its title, rule, number, flag and message; see the module.

  Raises:
    UserError: A wrong argument, by name; or no image is classified correctly.
  """
  _check(key, epsilon, norm, progress, batch_size, num_examples, num_noise)
  num_steps = _increasing(num_steps)
  data = base.on_host(classifier, images, labels)[:3]
  adversarial = _as_images(adversarial, data[1].shape)
  audited = _Audited(key, *data, norm=norm, batch_size=batch_size, mesh=mesh)
  trials = audited.trials(num_examples)
  numbers = epsilon, num_steps, num_noise
  with trials.show_progress(progress, *numbers), nonfinite.collect() as bad:
    found = audited.check(adversarial, epsilon)
    found |= trials.check(adversarial, *numbers, found)
  return found | {"nonfinite": trials.finite_numbers(audited, bad)}


class _Audited:
  """Classifier under audit, with its images."""

  def __init__(
    self,
    key: Array,
    classifier: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: str,
    batch_size: int,
    mesh: Mesh | None,
  ):
    self._key, self._images, self._labels = key, images, labels
    self._norm, self._batch_size = norm, min(batch_size, len(images))
    self._mesh = devices(mesh)
    self._classifier = sharding.put_replicated(self._mesh, classifier)
    self._predict = diagnostics.Scorer(self._classifier, self._mesh)
    self._logits = self._predict(
      images, self._batch_size, rng.stream(key, "clean")
    )

  @property
  def nonfinite(self) -> int:
    """Number of clean images whose logits are not finite."""
    return int((~np.isfinite(self._logits).all(-1)).sum())

  def trials(self, num_examples: int) -> "_Trials":
    """Selects the images on which the audit's own attacks run."""
    correct = np.flatnonzero(diagnostics.correct(self._logits, self._labels))
    if not len(correct):
      raise UserError(
        f"labels: the classifier gives none of the {len(self._labels)} images"
        " its label; allowed: images of which it classifies some correctly"
      )
    return _Trials(
      rng.stream(self._key, "trials"),
      self._classifier,
      self._predict,
      self._images,
      self._labels,
      correct[:num_examples],
      mesh=self._mesh,
      norm=self._norm,
      batch_size=self._batch_size,
    )

  def check(
    self, adversarial: np.ndarray, epsilon: float
  ) -> dict[str, Diagnostic]:
    """Makes the checks that need no attack."""
    found = {"in_ball": in_ball(self._images, adversarial, epsilon, self._norm)}
    found |= diagnostics.diagnose_classifier(
      self._key,
      self._classifier,
      self._predict,
      self._images,
      self._labels,
      self._logits,
      batch_size=self._batch_size,
      radius=epsilon if self._norm == "linf" else 8 / 255,
    )
    if not isinstance(self._classifier, base.Randomized):
      adversarial = adversarial.astype(np.float32)
      logits = self._predict(adversarial, self._batch_size, self._key)
      found["rescored"] = diagnostics.rescored(
        rng.stream(self._key, "rescored"),
        self._predict,
        adversarial,
        self._labels,
        diagnostics.correct(logits, self._labels),
        batch_size=max(1, self._batch_size // 2),
      )
    return found


def in_ball(
  images: np.ndarray, adversarial: np.ndarray, epsilon: float, norm: str
) -> Diagnostic:
  """Checks whether adversarial images are in the ball and in [0, 1].

  Args:
    images: Clean images [N, H, W, C] in [0, 1].
    adversarial: Adversarial images [N, H, W, C].
    epsilon: Radius.
    norm: "linf", "l2" or "l1".

  Returns:
    The diagnostic; its value is the largest distance among finite images.
  """
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  distances, lows, highs = [], [], []
  for first in range(0, len(images), 1024):
    part = slice(first, first + 1024)
    x = np.asarray(adversarial[part], np.float64).reshape(len(images[part]), -1)
    delta = x - np.asarray(images[part], np.float64).reshape(x.shape)
    # NaN or infinite if any pixel is.
    distances.append(np.linalg.norm(delta, ord=order, axis=1))
    lows.append(x.min(1))
    highs.append(x.max(1))
  distance = np.concatenate(distances)
  low, high = np.concatenate(lows), np.concatenate(highs)
  finite = np.isfinite(distance)
  largest = float(distance[finite].max(initial=0.0))
  broken = (
    ~finite
    | ~(distance <= epsilon * (1 + 1e-5) + _ROUNDING)
    | ~((low >= -_ROUNDING) & (high <= 1 + _ROUNDING))
  )
  numbers = (
    f"the largest distance is {largest:.6g}, the radius {epsilon:.6g}, pixels"
    f" are in [{low[finite].min(initial=1.0):.6g},"
    # Digits enough to tell an excess of 1e-6 from 1.
    f" {high[finite].max(initial=0.0):.8g}]"
  )
  if not finite.all():
    count = wording.plural(int((~finite).sum()), "image")
    numbers += f"; pixels that are not finite: {count}"
  return diagnostic(
    bool(broken.any()),
    flagged=(
      "Images break the rules of the attack",
      f"{int(broken.sum())} of {len(broken)} images break the rules of the"
      f" attack: {numbers}.",
    ),
    passed=(
      "All images are in the ball",
      f"All images are in the ball: {numbers}.",
    ),
    rule=f"largest {norm} distance from the clean image, among finite images;"
    " flag if one is beyond epsilon (1 + 1e-5) + 1e-6, or a pixel more than"
    " 1e-6 outside [0, 1] or not finite",
    value=largest,
  )


def more_steps(
  num_steps: Sequence[int], correct: Sequence[np.ndarray], attack: str = "PGD"
) -> Diagnostic:
  """Checks whether an attack had converged.

  Args:
    num_steps: Increasing numbers of steps.
    correct: For each, whether the images are still classified correctly, float
      [n].
    attack: Name of the attack.

  Returns:
    The diagnostic.
  """
  count = len(correct[0])
  left = [_count(images) for images in correct]
  falls = [before - left[-1] for before in left[:-1]]
  flags = [
    _is_more_than(fall, 0.01 if n else 0.02, count)
    for n, fall in enumerate(falls)
  ]
  leaves = ", ".join(
    f"{_percent(images)} after {number}"
    for number, images in zip(num_steps, correct, strict=True)
  )
  summary = (
    f"Of {wording.plural(count, 'image')} {attack} leaves {leaves} steps"
  )
  return diagnostic(
    any(flags),
    flagged=(
      f"{attack} had not converged",
      f"{summary}: it needs that many, and a result of fewer steps overstates"
      " robustness.",
    ),
    passed=(f"{attack} had converged", f"{summary}: it has converged."),
    rule=f"accuracy under {attack} with fewer steps minus with {num_steps[-1]},"
    f" the largest; flag if it falls by more than 0.02 from {num_steps[0]} steps"
    " on, or by more than 0.01 from any number between, and by at least 2 images",
    value=max(falls) / count,
  )


def attack_strength(
  given: np.ndarray,
  strongest: np.ndarray,
  num_steps: int,
  attack: str = "PGD",
) -> Diagnostic:
  """Checks whether an attack fools as many images as a plain one.

  Args:
    given: Whether images are still classified correctly under the attack, float
      [n].
    strongest: The same under the plain attack.
    num_steps: Number of steps of the plain attack.
    attack: Name of the plain attack.

  Returns:
    The diagnostic.
  """
  gap = _count(given) - _count(strongest)
  numbers = (
    f"of {wording.plural(len(given), 'image')} the attack leaves"
    f" {_percent(given)}, {attack} with {wording.plural(num_steps, 'step')}"
    f" {_percent(strongest)}"
  )
  return diagnostic(
    _is_more_than(gap, 0.02, len(given)),
    flagged=(
      f"The attack is weaker than {attack}",
      f"The attack is weak: {numbers}.",
    ),
    passed=(
      f"The attack is no weaker than {attack}",
      f"The attack is no weaker than {attack}: {numbers}.",
    ),
    rule=f"accuracy of the given images minus accuracy under {attack} with"
    f" {num_steps} steps, on the same images; flag above 0.02 and at least 2"
    " images",
    value=gap / len(given),
  )


def larger_balls(
  radii: Sequence[float], correct: Sequence[np.ndarray], attack: str = "PGD"
) -> Diagnostic:
  """Checks whether the accuracy falls to 0 as the ball grows.

  The last ball holds every possible image, so an image that survives in it
  shows that the attack is blind, or that the classifier has only one answer.

  Args:
    radii: Increasing radii; the last ball covers all images.
    correct: For each radius that was tried, whether the images are still
      classified correctly, float [n].
    attack: Name of the attack.

  Returns:
    The diagnostic.
  """
  count = len(correct[0])
  left = _still_correct(correct)
  counts = np.array([_count(images) for images in correct])
  rise = float((counts - np.minimum.accumulate(counts)).max())
  curve = ", ".join(
    f"{_percent(images)} at {wording.pixels(radius)}"
    for radius, images in zip(radii, correct, strict=False)
  )
  if _count(left) >= 1:
    flagged = (
      "Accuracy does not fall to 0 in larger balls",
      f"{_count(left):.4g} of {count} images survive even the ball that holds"
      f" every image ({curve}): gradients are masked, or the classifier gives"
      " the same answer whatever the image.",
    )
  else:
    flagged = (
      "Accuracy rises as the ball grows",
      f"{attack} fools fewer images in a larger ball ({curve}): gradients"
      " mislead it.",
    )
  return diagnostic(
    bool(_count(left) >= 1 or rise > 2 + _ROUNDING),
    flagged=flagged,
    passed=(
      "Accuracy falls to 0 as the ball grows",
      f"Every image is fooled as the ball grows ({curve}).",
    ),
    rule=f"share of images that survive {attack} with {_STEPS_FOR_RADII} steps"
    " at every radius, from epsilon on, doubled until the ball holds every image"
    " or none survives; flag if 1 image or more does, or if the accuracy rises"
    " by more than 2 images above that at a smaller radius",
    value=_count(left) / count,
  )


def against_noise(
  noise: np.ndarray, given: np.ndarray, strongest: np.ndarray, num_noise: int
) -> Diagnostic:
  """Checks whether an attack fools more images than random noise.

  Args:
    noise: Whether images are classified correctly at the worst random point,
      float [n].
    given: The same under the attack.
    strongest: The same under the plain attack.
    num_noise: Number of random points.

  Returns:
    The diagnostic.
  """
  count = len(given)
  by_noise, by_attack = _count(noise), _count(given)
  # In a tiny ball there may be nothing to find.
  nothing = min(by_noise, by_attack, _count(strongest)) > count - _ROUNDING
  flag = by_attack > _ROUNDING and by_noise <= by_attack + _ROUNDING
  numbers = (
    f"of {wording.plural(count, 'image')} the worst of"
    f" {wording.plural(num_noise, 'random point')} leaves {_percent(noise)},"
    f" the attack {_percent(given)}"
  )
  passed = (
    "The attack does better than random noise",
    f"The attack does better than random noise: {numbers}.",
  )
  if nothing:
    passed = (
      "Nothing fools the classifier in this ball",
      f"Nothing fools the classifier in this ball: {numbers}.",
    )
  return diagnostic(
    flag and not nothing,
    flagged=(
      "Random noise does as well as the attack",
      f"Random noise does as well as the attack: {numbers}.",
    ),
    passed=passed,
    rule=f"accuracy at the worst of {num_noise} random points on the ball's"
    " surface minus accuracy of the given images, on the same images; flag if"
    " noise leaves no more than the attack and the attack leaves some, unless"
    " neither they nor the plain attack of the audit fool a single image",
    value=(by_noise - by_attack) / count,
  )


def _count(correct: np.ndarray) -> float:
  return float(correct.sum())


def _percent(correct: np.ndarray) -> str:
  return wording.percent(float(correct.mean()))


def _is_more_than(images: float, share: float, count: int) -> bool:
  """Whether so many images are above a share of all and at least 2."""
  return images > share * count + _ROUNDING and images > 2 - _ROUNDING


def _still_correct(correct: Sequence[np.ndarray]) -> np.ndarray:
  # An image that fools in one ball is in every larger one.
  return np.min(correct, axis=0)


def growing(epsilon: float, norm: str, num_pixels: int) -> list[float]:
  """Doubles a radius until the ball covers all images.

  Args:
    epsilon: First radius, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    num_pixels: Numbers in an image, H * W * C.

  Returns:
    The radii, in increasing order.
  """
  whole = {"linf": 1.0, "l2": num_pixels**0.5, "l1": float(num_pixels)}[norm]
  radii, radius = [], float(epsilon)
  while radius < whole:
    radii.append(radius)
    radius *= 2
  return [*radii, whole]


def _check(
  key: Any, epsilon: Any, norm: Any, progress: Any, *counts: Any
) -> None:
  checks.key(key)
  base.check_norm(norm, epsilon)
  checks.boolean("progress", progress)
  names = ("batch_size", "num_examples", "num_noise")
  for name, value in zip(names, counts, strict=True):
    checks.positive(name, value, integer=True)


def _increasing(num_steps: Any) -> tuple[int, ...]:
  numbers = tuple(num_steps) if isinstance(num_steps, Sequence) else ()
  for number in numbers:
    checks.positive("num_steps", number, integer=True)
  if len(numbers) < 2 or list(numbers) != sorted(set(numbers)):
    raise UserError(
      f"num_steps: {num_steps!r}; allowed: two or more increasing integers"
    )
  return numbers


def _as_images(adversarial: Any, shape: tuple[int, ...]) -> np.ndarray:
  adversarial = np.asarray(checks.array(adversarial, "adversarial"))
  if adversarial.shape != shape:
    raise UserError(
      f"adversarial: shape {adversarial.shape}; allowed: {shape}, that of the"
      " images"
    )
  if not jnp.issubdtype(adversarial.dtype, jnp.floating):
    raise UserError(
      f"adversarial: dtype {adversarial.dtype}; allowed: floating point in"
      " [0, 1] (uint8 pixels: divide by 255)"
    )
  return adversarial


def _noise(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  epsilon: Array,
  num_noise: Array,
  *,
  norm: str,
) -> Array:
  """Returns each image's worst of some random points on the ball's surface."""
  ball = balls.BALLS[norm]

  def body(point: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
    noise_key, draw_key = jax.random.split(jax.random.fold_in(key, point))
    # Corners of the linf cube, directions in l2, a few pixels in l1.
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    noisy = jnp.clip(images + epsilon * ball.direction(noise), 0.0, 1.0)
    logits = base.apply(classifier, draw_key, noisy)
    value = losses.margin(logits, labels).astype(jnp.float32)
    better = (value > best[1]) & nonfinite.usable(logits)
    return (
      jnp.where(better[:, None, None, None], noisy, best[0]),
      jnp.where(better, value, best[1]),
    )

  start = images, jnp.full(len(images), -jnp.inf, jnp.float32)
  return lax.fori_loop(0, num_noise, body, start)[0]


_jitted_noise = compilation.jit(_noise, static_argnames="norm")


class _Trials:
  """Attacks by the audit on the same images, all scored in the same way."""

  def __init__(
    self,
    key: Array,
    classifier: Classifier,
    predict: diagnostics.Predict,
    images: np.ndarray,
    labels: np.ndarray,
    chosen: np.ndarray,
    *,
    mesh: Mesh,
    norm: str,
    batch_size: int,
  ):
    self._key, self._classifier, self._predict = key, classifier, predict
    self._chosen = chosen
    self._images, self._labels = images[chosen], labels[chosen]
    self._mesh, self._norm = mesh, norm
    self._batch_size = min(batch_size, len(chosen))
    self._bar: Any = None
    self.name = "APGD" if norm == "l1" else "PGD"
    self.nonfinite = 0  # scores whose logits are not finite
    randomized = isinstance(classifier, base.Randomized)
    self._num_evaluations = _NUM_EVALUATIONS if randomized else 1
    self._eot_samples = _EOT_SAMPLES if randomized else 1

  def show_progress(
    self,
    shown: bool,
    epsilon: float,
    num_steps: Sequence[int],
    num_noise: int,
  ) -> Any:
    """Opens a progress bar over the steps of all attacks."""
    num_batches = -(-len(self._images) // self._batch_size)
    num_radii = len(self._radii(epsilon))
    self._bar = tqdm(
      total=num_batches
      * (sum(num_steps) + num_noise + _STEPS_FOR_RADII * num_radii),
      unit="step",
      desc="audit",
      dynamic_ncols=True,
      disable=not shown or jax.process_index() != 0,
    )
    self._bar.set_postfix_str("images and classifier")
    return self._bar

  def check(
    self,
    adversarial: np.ndarray,
    epsilon: float,
    num_steps: Sequence[int],
    num_noise: int,
    before: dict[str, Diagnostic],
  ) -> dict[str, Diagnostic]:
    """Makes the checks that attack; `before` are the results so far."""
    given = self._score(adversarial.astype(np.float32)[self._chosen])
    by_steps = [self._attack("steps", epsilon, number) for number in num_steps]
    found = {
      "steps": more_steps(num_steps, by_steps, self.name),
      "attack_strength": attack_strength(
        given, by_steps[-1], num_steps[-1], self.name
      ),
    }
    by_radius: list[np.ndarray] = []
    for radius in self._radii(epsilon):
      by_radius.append(self._attack("epsilon", radius, _STEPS_FOR_RADII))
      if _count(_still_correct(by_radius)) < 1:
        break
    found["epsilon"] = larger_balls(self._radii(epsilon), by_radius, self.name)
    noise = self._worst_noise(epsilon, num_noise)
    found["noise"] = against_noise(noise, given, by_steps[-1], num_noise)
    self._bar.total = self._bar.n  # some radii may not have been needed
    flags = sum(result["flag"] for result in (before | found).values())
    self._bar.set_postfix_str(wording.plural(flags, "flag"))
    return found

  def finite_numbers(
    self, audited: _Audited, counts: nonfinite.Collected
  ) -> Diagnostic:
    """Says what was not finite, of the clean images, scores and attacks."""
    return diagnostics.finite_numbers(
      clean=audited.nonfinite,
      judged=self.nonfinite,
      points=counts.points,
      gradients=counts.gradients,
    )

  def _radii(self, epsilon: float) -> list[float]:
    return growing(epsilon, self._norm, self._images[0].size)

  def _score(self, adversarial: np.ndarray) -> np.ndarray:
    """Share of evaluations in which images are classified correctly, [n]."""
    stands = []
    # An image with pixels or logits that are not finite fools nothing.
    bad_pixels = ~np.isfinite(adversarial).all((1, 2, 3))
    for number in range(self._num_evaluations):
      key = rng.stream(self._key, "score", number)
      logits = self._predict(adversarial, self._batch_size, key)
      bad = ~np.isfinite(logits).all(-1)
      self.nonfinite += int(bad.sum())
      right = diagnostics.correct(logits, self._labels)
      stands.append(right | bad | bad_pixels)
    return np.mean(stands, axis=0)

  def _attack(self, name: str, epsilon: float, num_steps: int) -> np.ndarray:
    """Runs the plain attack; returns the images' scores."""
    self._bar.set_postfix_str(
      f"{name}: {self.name}({num_steps}), radius {wording.pixels(epsilon)}"
    )

    def attack(key: Array, images: Array, labels: Array) -> Array:
      numbers: dict[str, Any] = {
        "epsilon": epsilon,
        "num_steps": num_steps,
        "norm": self._norm,
        "loss": "margin",
        "eot_samples": self._eot_samples,
      }
      data = self._classifier, images, labels
      if self._norm == "l1":
        return apgd(key, *data, **numbers)
      return pgd(key, *data, step_size=epsilon / 4, **numbers)

    return self._score(self._run("pgd", attack, num_steps))

  def _worst_noise(self, epsilon: float, num_noise: int) -> np.ndarray:
    """Tries random points; returns the images' scores at the worst."""
    self._bar.set_postfix_str(f"noise: {wording.plural(num_noise, 'point')}")

    def attack(key: Array, images: Array, labels: Array) -> Array:
      return _jitted_noise(
        key,
        self._classifier,
        images,
        labels,
        jnp.asarray(epsilon, images.dtype),
        jnp.asarray(num_noise, jnp.int32),
        norm=self._norm,
      )

    return self._score(self._run("noise", attack, num_noise))

  def _run(
    self,
    stream: str,
    attack: Callable[[Array, Array, Array], Array],
    num_steps: int,
  ) -> np.ndarray:
    """Runs an attack on all images, batch by batch."""

    def run(number: int, images: Array, labels: Array) -> Array:
      key = rng.stream(self._key, stream, number * self._batch_size)
      adversarial = attack(key, images, labels)
      self._bar.update(num_steps)
      return adversarial

    return batches.map_batches(
      run,
      self._images,
      self._labels,
      batch_size=self._batch_size,
      mesh=self._mesh,
    )
