"""Can this attack's result be believed? One call for any attack, any library.

The checks follow "On Evaluating Adversarial Robustness" (Carlini et al., 2019)
and the flags of the AutoAttack reference. They ask whether the images keep to
the rules, whether the classifier is one that gradient attacks can judge, and
whether a plain attack, given more steps or a larger ball, does what it must.
A flag is a reason to look closer; no flag is no proof of robustness.
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
from atat_jax.attacks import balls, base, diagnostics
from atat_jax.attacks.auto_pgd import apgd
from atat_jax.attacks.diagnostics import Finding
from atat_jax.attacks.projected_gradient import pgd
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

# Of a randomised classifier: gradients averaged, and looks at a set of images.
_EOT_SAMPLES = _LOOKS = 20
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
) -> dict[str, Finding]:
  """Checks the images that an attack returned, and what they were made for.

  Some checks attack the classifier themselves, on the first `num_examples`
  images that it classifies correctly: PGD with the margin loss, a step of a
  quarter of the radius and a random start, the same for any number of steps.
  In l1 it is APGD, as the sparse steps of PGD stall at the borders of the box.
  Nothing compiles anew for other radii or numbers of steps.

  A `Randomized` classifier is attacked through gradients averaged over 20
  samples, which takes 20 times as long; an image counts by the share of 20
  looks at which it is classified correctly.

  Args:
    key: Random key.
    classifier: Callable from images to logits; best a pytree such as
      `models.classifier` returns. `Randomized` if it draws random numbers.
    images: Float [N, H, W, C] in [0, 1]: the clean ones.
    labels: Integers [N]: the true classes.
    adversarial: Float [N, H, W, C]: what the attack made of `images`, the
      clean image or a failed attempt where it did not succeed.
    epsilon: Radius of the ball, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    batch_size: Images at a time, over all devices.
    num_examples: How many images the attacks of the audit run on.
    num_steps: Two or more increasing numbers of steps of PGD.
    num_noise: Random points of the ball's surface to try for each image.
    mesh: The devices; None: all of them.
    progress: Whether to show a bar that says which check runs.

  Returns:
    Check to its rule, number, flag, and message of one sentence:
    "in_ball": are the images in the ball and in [0, 1];
    "probabilities", "zero_gradients", "randomized", "batch_dependence": see
    `attacks.diagnostics`;
    "rescored": do the images score the same in another order and batch size;
    "steps": does PGD find more with more steps;
    "attack_strength": does the attack find what PGD finds;
    "epsilon": does the accuracy fall to 0 as the ball grows;
    "noise": does the attack find more than random noise.
    "batch_dependence" and "rescored" are left out for `Randomized`.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name; or no
      image is classified correctly.
  """
  checks.choice("norm", norm, balls.NORMS)
  checks.epsilon(epsilon, norm)
  for name, value in (
    ("batch_size", batch_size),
    ("num_examples", num_examples),
    ("num_noise", num_noise),
  ):
    checks.positive(name, value, integer=True)
  num_steps = _increasing(num_steps)
  classifier, images, labels, _ = base.on_host(classifier, images, labels)
  adversarial = _as_images(adversarial, images.shape)

  mesh = sharding.make_mesh() if mesh is None else mesh
  randomized = isinstance(classifier, base.Randomized)
  classifier = sharding.put_replicated(mesh, classifier)
  predict = diagnostics.Scorer(classifier, mesh)
  batch_size = min(batch_size, len(images))
  logits = predict(images, batch_size, rng.stream(key, "clean"))
  chosen = np.flatnonzero(logits.argmax(-1) == labels)[:num_examples]
  if not len(chosen):
    raise UserError(
      f"labels: the classifier gives none of the {len(labels)} images its"
      " label; allowed: images of which it classifies some correctly"
    )
  radii = growing(epsilon, norm, images[0].size)
  num_batches = -(-len(chosen) // min(batch_size, len(chosen)))
  with tqdm(
    total=num_batches
    * (sum(num_steps) + num_noise + _STEPS_FOR_RADII * len(radii)),
    unit="step",
    desc="audit",
    dynamic_ncols=True,
    disable=not progress or jax.process_index() != 0,
  ) as bar:
    bar.set_postfix_str("images and classifier")
    found = {"in_ball": in_ball(images, adversarial, epsilon, norm)}
    adversarial = adversarial.astype(np.float32)
    found |= diagnostics.of_classifier(
      key,
      classifier,
      predict,
      images,
      labels,
      logits,
      batch_size=batch_size,
      radius=epsilon if norm == "linf" else 8 / 255,
    )
    if not randomized:
      robust = predict(adversarial, batch_size, key).argmax(-1) == labels
      found["rescored"] = diagnostics.rescored(
        rng.stream(key, "rescored"),
        predict,
        adversarial,
        labels,
        robust,
        batch_size=max(1, batch_size // 2),
      )
    trials = _Trials(
      rng.stream(key, "trials"),
      classifier,
      predict,
      images[chosen],
      labels[chosen],
      mesh=mesh,
      norm=norm,
      batch_size=batch_size,
      bar=bar,
    )
    given = trials.score(adversarial[chosen])
    by_steps = [trials.attack("steps", epsilon, number) for number in num_steps]
    found["steps"] = more_steps(num_steps, by_steps, trials.name)
    found["attack_strength"] = attack_strength(
      given, by_steps[-1], num_steps[-1], trials.name
    )
    by_radius: list[np.ndarray] = []
    for radius in radii:
      by_radius.append(trials.attack("epsilon", radius, _STEPS_FOR_RADII))
      if _count(_standing(by_radius)) < 1:
        break
    found["epsilon"] = larger_balls(radii, by_radius, trials.name)
    found["noise"] = against_noise(
      trials.noise(epsilon, num_noise), given, by_steps[-1], num_noise
    )
    bar.total = bar.n  # the radii may not all have been needed
    bar.set_postfix_str(f"{sum(f['flag'] for f in found.values())} flags")
  return found


def in_ball(
  images: np.ndarray, adversarial: np.ndarray, epsilon: float, norm: str
) -> Finding:
  """Whether adversarial images keep to the rules.

  Args:
    images: [N, H, W, C] in [0, 1].
    adversarial: [N, H, W, C].
    epsilon: Radius.
    norm: "linf", "l2" or "l1".

  Returns:
    The finding; its value is the largest distance among the finite images.
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
  flag = bool(broken.any())
  seen = (
    f"the largest distance is {largest:.6g}, the radius {epsilon:.6g}, pixels"
    f" are in [{low[finite].min(initial=1.0):.6g},"
    f" {high[finite].max(initial=0.0):.6g}]"
  )
  if not finite.all():
    seen += f", {int((~finite).sum())} images have pixels that are not finite"
  return Finding(
    rule=f"largest {norm} distance from the clean image, among finite images;"
    " flag if one is beyond epsilon (1 + 1e-5) + 1e-6, or a pixel more than"
    " 1e-6 outside [0, 1] or not finite",
    value=largest,
    flag=flag,
    message=(
      f"{int(broken.sum())} of {len(broken)} images break the rules of the"
      f" attack: {seen}."
      if flag
      else f"All images are in the ball: {seen}."
    ),
  )


def more_steps(
  num_steps: Sequence[int], rights: Sequence[np.ndarray], attack: str = "PGD"
) -> Finding:
  """Whether an attack had converged.

  Args:
    num_steps: Increasing numbers of steps.
    rights: For each, float [n]: who is still classified correctly.
    attack: Its name.

  Returns:
    The finding.
  """
  count = len(rights[0])
  standing = [_count(right) for right in rights]
  falls = [before - standing[-1] for before in standing[:-1]]
  flags = [
    _is_more_than(fall, 0.01 if n else 0.02, count)
    for n, fall in enumerate(falls)
  ]
  flag = any(flags)
  leaves = ", ".join(
    f"{_percent(right)} after {number}"
    for number, right in zip(num_steps, rights, strict=True)
  )
  last = num_steps[-1]
  return Finding(
    rule=f"accuracy under {attack} with fewer steps minus with {last}, the"
    f" largest; flag if it falls by more than 0.02 from {num_steps[0]} steps on, or by"
    " more than 0.01 from any number between, and by at least 2 images",
    value=max(falls) / count,
    flag=flag,
    message=(
      f"Of {count} images {attack} leaves {leaves} steps"
      + (
        ": it needs that many, and a result of fewer steps overstates"
        " robustness."
        if flag
        else ": it has converged."
      )
    ),
  )


def attack_strength(
  given: np.ndarray,
  strongest: np.ndarray,
  num_steps: int,
  attack: str = "PGD",
) -> Finding:
  """Whether an attack finds what a plain one finds.

  Args:
    given: Float [n]: who the attack leaves classified correctly.
    strongest: Float [n]: who the plain attack leaves.
    num_steps: Of the plain attack.
    attack: Name of the plain attack.

  Returns:
    The finding.
  """
  gap = _count(given) - _count(strongest)
  flag = _is_more_than(gap, 0.02, len(given))
  leaves = (
    f"of {len(given)} images the attack leaves {_percent(given)}, {attack}"
    f" with {num_steps} steps {_percent(strongest)}"
  )
  return Finding(
    rule=f"accuracy of the given images minus accuracy under {attack} with"
    f" {num_steps} steps, on the same images; flag above 0.02 and at least 2"
    " images",
    value=gap / len(given),
    flag=flag,
    message=(
      f"The attack is weak: {leaves}."
      if flag
      else f"The attack is no weaker than {attack}: {leaves}."
    ),
  )


def larger_balls(
  radii: Sequence[float], rights: Sequence[np.ndarray], attack: str = "PGD"
) -> Finding:
  """Whether the accuracy falls to 0 as the ball grows.

  The last ball holds every image there is, so that an image which survives
  tells that the attack is blind, or that the classifier has one answer only.

  Args:
    radii: Growing; the last one covers all images.
    rights: For each as far as was tried, float [n]: who is still classified
      correctly.
    attack: Its name.

  Returns:
    The finding.
  """
  count = len(rights[0])
  left = _standing(rights)
  standing = np.array([_count(right) for right in rights])
  rise = float((standing - np.minimum.accumulate(standing)).max())
  survive, rises = _count(left) >= 1, rise > 2 + _ROUNDING
  curve = ", ".join(
    f"{_percent(right)} at {radius:.4g}"
    for radius, right in zip(radii, rights, strict=False)
  )
  if survive:
    text = (
      f"{_count(left):.4g} of {count} images survive even the ball that holds"
      f" every image ({curve}): gradients are masked, or the classifier gives"
      " the same answer whatever the image."
    )
  elif rises:
    text = (
      f"{attack} finds less in a larger ball ({curve}): gradients mislead it."
    )
  else:
    text = f"Every image is fooled as the ball grows ({curve})."
  return Finding(
    rule=f"share of images that survive {attack} with {_STEPS_FOR_RADII} steps"
    " at every radius, from epsilon on, doubled until the ball holds every image"
    " or none survives; flag if 1 image or more does, or if the accuracy rises"
    " by more than 2 images above that at a smaller radius",
    value=_count(left) / count,
    flag=bool(survive or rises),
    message=text,
  )


def against_noise(
  noise: np.ndarray, given: np.ndarray, strongest: np.ndarray, num_noise: int
) -> Finding:
  """Whether an attack finds more than chance.

  Args:
    noise: Float [n]: who is classified correctly at the worst random point.
    given: Float [n]: who the attack leaves classified correctly.
    strongest: Float [n]: who the plain attack leaves.
    num_noise: Random points.

  Returns:
    The finding.
  """
  count = len(given)
  by_noise, by_attack = _count(noise), _count(given)
  # In a tiny ball there may be nothing to find.
  nothing = min(by_noise, by_attack, _count(strongest)) > count - _ROUNDING
  flag = by_attack > _ROUNDING and by_noise <= by_attack + _ROUNDING
  flag = flag and not nothing
  leaves = (
    f"of {count} images the worst of {num_noise} random points leaves"
    f" {_percent(noise)}, the attack {_percent(given)}"
  )
  if flag:
    text = f"Random noise does as well as the attack: {leaves}."
  elif nothing:
    text = f"Nothing fools the classifier in this ball: {leaves}."
  else:
    text = f"The attack does better than random noise: {leaves}."
  return Finding(
    rule=f"accuracy at the worst of {num_noise} random points on the ball's"
    " surface minus accuracy of the given images, on the same images; flag if"
    " noise leaves no more than the attack and the attack leaves some, unless"
    " neither they nor the plain attack of the audit fool a single image",
    value=(by_noise - by_attack) / count,
    flag=flag,
    message=text,
  )


def _count(right: np.ndarray) -> float:
  return float(right.sum())


def _percent(right: np.ndarray) -> str:
  return f"{100 * float(right.mean()):.1f} %"


def _is_more_than(images: float, share: float, count: int) -> bool:
  """Whether so many images are above a share of all and at least 2."""
  return images > share * count + _ROUNDING and images > 2 - _ROUNDING


def _standing(rights: Sequence[np.ndarray]) -> np.ndarray:
  # What fools in a ball is in every larger one.
  return np.min(rights, axis=0)


def growing(epsilon: float, norm: str, num_pixels: int) -> list[float]:
  """Radii from epsilon on, doubled, to the one that covers all images.

  Args:
    epsilon: The first radius, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    num_pixels: H * W * C of an image.

  Returns:
    The radii, growing.
  """
  whole = {"linf": 1.0, "l2": num_pixels**0.5, "l1": float(num_pixels)}[norm]
  radii, radius = [], float(epsilon)
  while radius < whole:
    radii.append(radius)
    radius *= 2
  return [*radii, whole]


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
  adversarial = np.asarray(adversarial)
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
  ball = balls.NORMS[norm]

  def body(point: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
    noise_key, look_key = jax.random.split(jax.random.fold_in(key, point))
    # Corners of the cube, directions on the sphere, a few pixels for l1.
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    noisy = jnp.clip(images + epsilon * ball.direction(noise), 0.0, 1.0)
    logits = base.apply(classifier, look_key, noisy)
    value = losses.margin(logits, labels).astype(jnp.float32)
    better = value > best[1]
    return (
      jnp.where(better[:, None, None, None], noisy, best[0]),
      jnp.where(better, value, best[1]),
    )

  start = images, jnp.full(len(images), -jnp.inf, jnp.float32)
  return lax.fori_loop(0, num_noise, body, start)[0]


_jitted_noise = compilation.jit(_noise, static_argnames="norm")


class _Trials:
  """Attacks on the same images, all scored in the same way."""

  def __init__(
    self,
    key: Array,
    classifier: Classifier,
    predict: diagnostics.Predict,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mesh: Mesh,
    norm: str,
    batch_size: int,
    bar: Any,
  ):
    self._key, self._classifier, self._predict = key, classifier, predict
    self._images, self._labels = images, labels
    self._mesh, self._norm, self._bar = mesh, norm, bar
    self._batch_size = min(batch_size, len(images))
    self.name = "APGD" if norm == "l1" else "PGD"
    randomized = isinstance(classifier, base.Randomized)
    self._looks = _LOOKS if randomized else 1
    self._eot_samples = _EOT_SAMPLES if randomized else 1

  def score(self, adversarial: np.ndarray) -> np.ndarray:
    """Who is right, float [n]; what is not finite fools nobody."""
    right = [
      self._predict(
        adversarial, self._batch_size, rng.stream(self._key, "score", look)
      ).argmax(-1)
      == self._labels
      for look in range(self._looks)
    ]
    finite = np.isfinite(adversarial).all((1, 2, 3))
    return np.where(finite, np.mean(right, axis=0), 1.0)

  def attack(self, name: str, epsilon: float, num_steps: int) -> np.ndarray:
    """Who is right after the plain attack, float [n]."""
    self._bar.set_postfix_str(
      f"{name}: {self.name}({num_steps}), radius {epsilon:.4g}"
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

    return self.score(self._run("pgd", attack, num_steps))

  def noise(self, epsilon: float, num_noise: int) -> np.ndarray:
    """Who is right at the worst of random points, float [n]."""
    self._bar.set_postfix_str(f"noise: {num_noise} points")

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

    return self.score(self._run("noise", attack, num_noise))

  def _run(
    self,
    stream: str,
    attack: Callable[[Array, Array, Array], Array],
    num_steps: int,
  ) -> np.ndarray:
    count, size = len(self._images), self._batch_size
    made = []
    for first in range(0, count, size):
      # The last batch is filled up with real images.
      rows = np.arange(first, first + size) % count
      adversarial = attack(
        rng.stream(self._key, stream, first),
        sharding.put_batch(self._mesh, self._images[rows]),
        sharding.put_batch(self._mesh, self._labels[rows]),
      )
      made.append(sharding.to_host(self._mesh, adversarial))
      self._bar.update(num_steps)
    return np.concatenate(made)[:count]
