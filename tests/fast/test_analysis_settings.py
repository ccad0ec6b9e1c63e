"""Settings of the analyses: wrong ones are refused, naming the field."""

import pytest

from atat_jax import analyses, evaluation
from atat_jax.errors import UserError


def settings(**changes):
  numbers = {"epsilon": 0.1, "step_size": 0.05}
  attack = evaluation.parse("pgd2", **numbers)
  return analyses.FigureSettings(
    **{"analyses": (), "attack": attack, **numbers, **changes}
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_points": 4}, "num_points: 4; allowed: odd"),
    ({"num_points": 1}, "num_points: 1; allowed: odd, at least 3"),
    ({"num_images": 0}, "num_images: 0"),
    ({"num_followed": 0}, "num_followed: 0"),
    ({"num_examples": 0}, "num_examples: 0"),
    ({"num_steps": 0}, "num_steps: 0"),
    ({"batch_size": 1.5}, "batch_size: 1.5"),
    ({"rounds": (8, 2)}, "rounds.*increasing"),
    ({"rounds": (0,)}, "rounds.*above 0"),
    ({"rounds": ()}, "rounds.*above 0"),
    ({"epsilons": (0.2, 0.1)}, "epsilons.*increasing"),
    ({"epsilons": (0, 2)}, "epsilons: 2; allowed: at most 1"),
    ({"epsilon": 2}, "epsilon: 2; allowed: at most 1"),
    ({"step_size": 0}, "step_size: 0"),
    ({"norm": "l3"}, "norm: 'l3'; allowed: .*linf"),
    ({"indices": (-1,)}, "indices"),
    ({"indices": ()}, "indices.*one or more"),
    ({"seed": -1}, "seed: -1"),
  ],
)
def test_a_wrong_number_is_named(changes, message):
  with pytest.raises(UserError, match=message):
    settings(**changes)


def test_names_of_analyses_are_known_and_given_once():
  assert analyses.parse(" steps, attention,") == ("steps", "attention")
  assert analyses.parse("") == ()
  with pytest.raises(
    UserError, match=r"analyses: 'maps'; allowed: .*landscape"
  ):
    analyses.parse("attention,maps")
  with pytest.raises(UserError, match=r"analyses: 'steps,steps'.*once"):
    analyses.parse("steps,steps")


def test_an_index_beyond_the_images_is_named():
  around = settings(analyses=("landscape",), indices=(0, 360))
  with pytest.raises(UserError, match="indices: 360; allowed: 0 to 359"):
    analyses.check_images(around, 360)
  analyses.check_images(around, 361)
  others = settings(analyses=("attention", "shift"), indices=(0, 360))
  analyses.check_images(others, 5)  # which shows the first ones


def test_a_small_test_set_has_landscapes_around_its_first_images():
  paper = settings(analyses=("landscape",), indices=(1450, 7558))
  assert analyses.for_images(paper, 10_000) == paper
  assert analyses.for_images(paper, 7559) == paper
  assert analyses.for_images(paper, 7558).indices == (0, 1)
  assert analyses.for_images(paper, 1).indices == (0,)
  own = settings(analyses=("landscape",), indices=(1450, 7559))
  with pytest.raises(UserError, match="indices: 7559; allowed: 0 to 63"):
    analyses.for_images(own, 64)
