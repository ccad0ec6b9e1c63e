"""Rules of the audit: each on both sides of its threshold."""

import numpy as np
import pytest
from diagnostic import check

from atat_jax.evaluation.auditing import (
  against_noise,
  attack_strength,
  in_ball,
  larger_balls,
  more_steps,
)


def robust(number, count):
  """Float [count]: the first ones are right."""
  return (np.arange(count) < number).astype(float)


@pytest.mark.parametrize(
  ("count", "numbers", "flag"),
  [
    (100, (50, 50, 50), False),
    (100, (52, 50, 50), False),  # 0.02 from the first
    (100, (53, 50, 50), True),
    (100, (51, 51, 50), False),  # 1 image
    (100, (52, 52, 50), True),  # 0.02 from the second: above 0.01
    (1000, (520, 510, 500), False),
    (1000, (521, 510, 500), True),
    (1000, (500, 511, 500), True),
    (1000, (400, 450, 500), False),  # no fall
    (20, (11, 10, 10), False),  # 0.05, 1 image
    (20, (12, 10, 10), True),
    (1000, (520, 500), False),  # of two numbers, the first rule
    (1000, (521, 500), True),
  ],
)
def test_rule_of_steps(count, numbers, flag):
  steps = (20, 100, 1000)[-len(numbers) :]
  found = more_steps(steps, [robust(n, count) for n in numbers])
  largest = max(n - numbers[-1] for n in numbers[:-1])
  check(found, flag, largest / count)
  assert (
    f"{100 * numbers[0] / count:.1f}% after {steps[0]}, " in (found["message"])
  )


@pytest.mark.parametrize(
  ("count", "given", "pgd", "flag"),
  [
    (100, 50, 50, False),
    (100, 52, 50, False),
    (100, 53, 50, True),
    (1000, 520, 500, False),
    (1000, 521, 500, True),
    (20, 11, 10, False),
    (20, 12, 10, True),
    (100, 10, 50, False),
  ],
)
def test_rule_of_strength(count, given, pgd, flag):
  found = attack_strength(robust(given, count), robust(pgd, count), 1000)
  check(found, flag, (given - pgd) / count)
  assert ("is weak" in found["message"]) is flag


@pytest.mark.parametrize(
  ("numbers", "flag", "word"),
  [
    ((60, 20, 0), False, "Every image is fooled"),
    ((60, 62, 0), False, "Every image is fooled"),  # 2 more
    ((60, 63, 0), True, "mislead"),
    ((60, 61, 62, 63, 0), True, "mislead"),  # above the lowest before
    ((60, 20, 1), True, "1 of 100 images survive"),
    ((60, 20, 20), True, "20 of 100 images survive"),
  ],
)
def test_rule_of_the_growing_ball(numbers, flag, word):
  correct = [robust(n, 100) for n in numbers]
  found = larger_balls([0.1 * 2**n for n in range(8)], correct)
  check(found, flag, numbers[-1] / 100)
  assert word in found["message"]
  assert f"{numbers[1]:.1f}% at 0.2" in found["message"]


def test_an_image_fooled_in_a_ball_counts_as_fooled_in_larger_ones():
  """Other images than before survive the last ball: none survives all."""
  correct = [robust(2, 100), 1 - robust(98, 100)]
  check(larger_balls([0.5, 1.0], correct), False, 0.0)


@pytest.mark.parametrize(
  ("noise", "given", "pgd", "flag"),
  [
    (90, 50, 50, False),
    (51, 50, 50, False),
    (50, 50, 50, True),
    (40, 50, 50, True),
    (100, 100, 50, True),
    (100, 100, 99, True),
    (99, 100, 100, True),
    (100, 100, 100, False),  # nothing to find
    (0, 0, 0, False),  # everything found
  ],
)
def test_rule_of_noise(noise, given, pgd, flag):
  found = against_noise(*(robust(n, 100) for n in (noise, given, pgd)), 50)
  check(found, flag, (noise - given) / 100)
  assert ("does as well" in found["message"]) is flag


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
  ("factor", "flag"), [(0.5, False), (1 + 0.9e-5, False), (1.0001, True)]
)
def test_rule_of_the_ball(norm, factor, flag):
  """One image of 3 is as far as told, in three pixels."""
  images = np.full((3, 2, 2, 1), 0.5)
  pixels = np.array([3.0, -4.0, 1.0, 0.0]).reshape(2, 2, 1)
  length = {"linf": 4.0, "l2": 26**0.5, "l1": 8.0}[norm]
  images_adv = images.copy()
  images_adv[1] += 0.3 * factor * pixels / length
  found = in_ball(images, images_adv, 0.3, norm)
  check(found, flag, 0.3 * factor)
  if flag:
    assert found["message"].startswith("1 of 3 images break the rules")


@pytest.mark.parametrize(
  ("pixel", "flag"),
  [
    (0.0, False),
    (1.0, False),
    (1 + 5e-7, False),
    (1 + 2e-6, True),
    (-5e-7, False),
    (-2e-6, True),
    (np.nan, True),
    (np.inf, True),
  ],
)
def test_rule_of_the_box(pixel, flag):
  images = np.full((2, 2, 2, 1), 0.5)
  images_adv = images.copy()
  images_adv[1, 0, 1] = pixel
  found = in_ball(images, images_adv, 0.6, "linf")
  # The largest distance among the finite images, a number in any case.
  distance = abs(pixel - 0.5) if np.isfinite(pixel) else 0.0
  check(found, flag, distance)
  assert ("not finite: 1 image." in found["message"]) is (distance == 0)
