"""Contract of every registered analysis: arrays, file, pictures, sentence."""

import dataclasses

import jax
import matplotlib
import numpy as np
import pytest
from pictures import pixels

from atat_jax import analyses, evaluation, models, sharding
from atat_jax.data.photographs import read_photograph
from atat_jax.errors import UserError
from atat_jax.runs import files

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = analyses.FigureSettings(
  analyses=(),
  attack=evaluation.parse("pgd1", epsilon=0.1, step_size=0.05),
  epsilon=0.1,
  step_size=0.05,
  num_images=2,
  rounds=(2,),
  num_followed=1,
  num_examples=6,
  indices=(1,),
  num_points=3,
  num_steps=2,
  epsilons=(0.0, 0.1),
  batch_size=4,
)

every_analysis = pytest.mark.parametrize("name", analyses.ANALYSES)


@pytest.fixture(scope="module")
def networks(small):
  moved = jax.tree.map(lambda x: 1.2 * x, small.variables)
  return {
    "first": (small.model, small.variables),
    "second": (small.model, moved),
  }


@pytest.fixture(scope="module")
def write(small, networks):
  """(name, directory, networks, images) to the path of the file."""

  def written(name, directory, networks=networks, images=small.images):
    (path,) = analyses.write(
      directory,
      networks,
      np.asarray(images),
      np.asarray(small.labels),
      settings=dataclasses.replace(SETTINGS, analyses=(name,)),
      class_names=["zero", "one", "two"],
      mesh=sharding.make_mesh(jax.devices()[:1]),
    )
    return path

  return written


@pytest.fixture(scope="module")
def computed(tmp_path_factory, write):
  """Name of an analysis to its file, computed once."""
  directory, paths = tmp_path_factory.mktemp("computed"), {}

  def path_of(name):
    if name not in paths:
      paths[name] = write(name, directory)
    return paths[name]

  return path_of


@pytest.fixture
def shown(monkeypatch):
  """Bars that `analyses.write` opens."""
  bars = []

  class Bar:
    def __init__(self, *, total, **_):
      self.total, self.n, self.moves = total, 0, []
      bars.append(self)

    def update(self, number):
      self.n += number
      self.moves.append(number)

    def close(self):
      pass

  monkeypatch.setattr(analyses, "tqdm", Bar)
  return bars


@every_analysis
def test_its_arrays_are_plain_and_of_each_network(computed, name):
  path = computed(name)
  assert path.name == f"{analyses.ANALYSES[name].stem}.npz"
  data = files.read_arrays(path)  # which refuses arrays of Python objects
  assert list(data["networks"]) == ["first", "second"]
  assert list(data["class_names"]) == ["zero", "one", "two"]
  expected = analyses.ANALYSES[name].images(SETTINGS, 8)
  assert list(data["indices"]) == list(expected)
  own = [{k for k in data if k.startswith(f"{n}_")} for n in data["networks"]]
  assert own[0] and len(own[0]) == len(own[1])


@every_analysis
def test_again_its_arrays_are_the_same_and_its_bar_moves_by_batches(
  computed, write, tmp_path, name, shown
):
  first, again = (
    files.read_arrays(path) for path in (computed(name), write(name, tmp_path))
  )
  bar, analysis = shown[-1], analyses.ANALYSES[name]
  # The last move is that of the end, which finds nothing left.
  *moves, last = bar.moves
  assert last == 0 and len(moves) >= 2 and min(moves) > 0
  passes = analysis.passes(analysis.arguments(SETTINGS, (6, 6, 2)))
  total = 2 * len(analysis.images(SETTINGS, 8)) * passes
  assert bar.n == bar.total == total
  assert list(first) == list(again)
  for key, array in first.items():
    np.testing.assert_array_equal(array, again[key], err_msg=key)


@every_analysis
def test_only_what_changed_is_computed_again(
  computed, write, networks, small, monkeypatch, name
):
  class Computed(Exception):
    pass

  def fail(*args, **kwargs):
    raise Computed

  path = computed(name)
  before = path.stat().st_mtime_ns
  analysis = dataclasses.replace(analyses.ANALYSES[name], compute=fail)
  monkeypatch.setitem(analyses.ANALYSES, name, analysis)
  unseen = np.array(small.images)
  unseen[7] = 0  # no analysis is made of it
  write(name, path.parent, images=unseen)
  assert path.stat().st_mtime_ns == before
  swapped = {"first": networks["second"], "second": networks["first"]}
  for changes in ({"images": 0.5 * small.images}, {"networks": swapped}):
    with pytest.raises(Computed):
      write(name, path.parent, **changes)


@every_analysis
def test_its_pictures_need_its_file_alone(
  computed, tmp_path, compilations, name
):
  source, before = computed(name).parent, matplotlib.rcParams.copy()
  compiled = compilations()
  shown = [
    analyses.sections(source, tmp_path / folder, only=[name])
    for folder in ("a", "b")
  ]
  assert compilations() == compiled, "drawing computes something with JAX"
  (first,), (again,) = shown
  assert first.pictures
  for one, other in zip(first.pictures, again.pictures, strict=True):
    assert one.suffix == ".png"
    assert one.stem.startswith(analyses.ANALYSES[name].stem)
    pixels(one)
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF-")):
      content = one.with_suffix(suffix).read_bytes()
      assert content.startswith(start)
      assert content == other.with_suffix(suffix).read_bytes()
      assert b"CreationDate" not in content
  drawn = {path.stem for path in (tmp_path / "a").iterdir()}
  assert drawn == {path.stem for path in first.pictures}
  assert matplotlib.rcParams.copy() == before  # the user's own plots


@every_analysis
def test_its_sentence_is_made_of_its_numbers(computed, name):
  data = files.read_arrays(computed(name))
  finding = analyses.ANALYSES[name].find(data)
  assert finding.heading and finding.caption
  assert any(letter.isdigit() for letter in finding.sentence)
  for network in data["networks"]:
    assert str(network) in finding.sentence
  others = files.Arrays(data.path, dict(data))
  for key in data:
    if key.startswith("first_"):
      others[key] = _changed(data[key])
  assert analyses.ANALYSES[name].find(others).sentence != finding.sentence


def _changed(array):
  if array.dtype == bool:
    return ~array
  if array.dtype.kind in "iu":
    return array + 1
  return array + 7.25


@every_analysis
def test_a_damaged_file_is_named(tmp_path, name):
  path = analyses.ANALYSES[name].path(tmp_path)
  assert analyses.sections(tmp_path, tmp_path, only=[name]) == []
  for content in (b"", b"not an archive"):
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} cannot be read"):
      analyses.sections(tmp_path, tmp_path)


def test_stems_and_headings_are_unique(computed):
  stems = [analysis.stem for analysis in analyses.ANALYSES.values()]
  assert len(set(stems)) == len(stems)
  headings = [
    analysis.find(files.read_arrays(computed(name))).heading
    for name, analysis in analyses.ANALYSES.items()
  ]
  assert len(set(headings)) == len(headings)


@pytest.mark.slow
def test_networks_of_imagenet_on_photographs(tmp_path, data_folder):
  """With random weights: no more is shown than that all of it runs."""
  names = ("vgg16", "resnet50", "densenet121")
  photos = np.stack(
    [
      read_photograph(data_folder / "photos" / name)
      for name in ("cat_chelsea.jpg", "coffee_cup.jpg")
    ]
  )
  networks = {}
  for name in names:
    model = models.create(name)
    networks[name] = model, jax.jit(model.init)(jax.random.key(0), photos[:1])
  numbers = {"epsilon": 16 / 255, "step_size": 2 / 255}
  labels = np.array([281, 504])  # tabby, coffee mug
  key, mesh = jax.random.key(0), sharding.make_mesh(jax.devices()[:1])
  protocol = evaluation.parse("pgd2", **numbers)
  found = analyses.attention_maps(
    key, networks, photos, labels, protocol=protocol, mesh=mesh
  )
  assert found["vgg16_clean_map"].shape == (2, 14, 14)
  assert found["resnet50_clean_map"].shape == (2, 7, 7)
  one = {"resnet50": networks["resnet50"]}
  followed = analyses.attention_rounds(
    key, one, photos, labels, rounds=(1, 2, 3), mesh=mesh, **numbers
  )
  for name, arrays in (("attention", found), ("rounds", followed)):
    np.savez(analyses.ANALYSES[name].path(tmp_path), **arrays)
  for path in analyses.draw(tmp_path, tmp_path):
    pixels(path)
