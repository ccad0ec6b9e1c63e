"""Programs compiled ahead change nothing but the time: AutoAttack, training."""

import json
import threading
from collections import Counter

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.tree_util import Partial

from atat_jax import checkpoints, sharding, train
from atat_jax.attacks.auto_pgd import APGD
from atat_jax.attacks.autoattack import run, slots
from atat_jax.compilation import ahead as threads

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIONS = {
  "apgd-ce": {"num_steps": 5},
  "apgd-t": {"num_steps": 5, "num_targets": 2},
  "fab-t": {"num_steps": 5, "num_targets": 2},
}


def _mlp(params, images):
  flat = images.reshape(len(images), -1) - 0.5
  return jnp.tanh(flat @ params[0]) @ params[1]


@pytest.fixture(scope="module")
def problem():
  generator = np.random.default_rng(0)
  params = [
    jnp.asarray(generator.normal(size=shape), jnp.float32)
    for shape in ((36, 16), (16, 5))
  ]
  images = generator.uniform(size=(23, 3, 4, 3)).astype(np.float32)
  labels = np.array(_mlp(params, images).argmax(-1), np.int32)
  return params, images, labels


def _captured(params):
  return lambda images: _mlp(params, images)


def _attack(
  problem, *, kind=Partial, batch_size=12, epsilon=0.02, second="apgd-t"
):
  params, images, labels = problem
  classifier = Partial(_mlp, params) if kind is Partial else _captured(params)
  return run.autoattack(
    jax.random.key(1),
    classifier,
    images,
    labels,
    epsilon=epsilon,
    version=["apgd-ce", second],
    options={name: OPTIONS[name] for name in ("apgd-ce", second)},
    batch_size=batch_size,
    mesh=sharding.make_mesh(jax.devices()[:1]),
    progress=False,
  )


@pytest.fixture(scope="module")
def compiled():
  """Names of the programs that are compiled, and by which thread."""
  found = []

  def listen(event, seconds, *, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append((fun_name, threading.current_thread().name))

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("kind", [Partial, "captures its weights"])
def test_threads_change_no_number_and_compile_nothing_twice(
  kind, problem, compiled, monkeypatch
):
  monkeypatch.setattr(threads, "_MOST_THREADS", 2)
  jax.clear_caches()
  compiled.clear()
  with_threads = _attack(problem, kind=kind)
  threads._finish()
  first = list(compiled)
  if kind is Partial:  # the steps of both attacks, which differ in their loss
    assert sum("advance" in name for name, _ in first) == 1
  assert {name for _, name in first} >= {"compile", "MainThread"}
  jax.clear_caches()
  compiled.clear()
  monkeypatch.setattr(run, "Ahead", lambda **_: threads.Ahead(enabled=False))
  without = _attack(problem, kind=kind)
  assert Counter(name for name, _ in first) == Counter(
    name for name, _ in compiled
  )
  assert 0 < without.accuracy < 1
  assert with_threads.robust_accuracy == without.robust_accuracy
  np.testing.assert_array_equal(with_threads.adversarial, without.adversarial)


class _Planted:
  """A program that cannot be compiled: ahead, or at all."""

  def __init__(self, program, *, at_all):
    self._program, self._at_all = program, at_all
    self.tried = threading.Event()

  def ahead(self, *args, **kwargs):
    def compile_program():
      self.tried.set()
      raise RuntimeError("planted")

    return compile_program

  def __call__(self, *args, **kwargs):
    if self._at_all:
      raise RuntimeError("planted")
    return self._program(*args, **kwargs)


@pytest.mark.parametrize("at_all", [False, True])
def test_a_program_that_fails_in_a_thread_is_the_calls_error(
  at_all, problem, monkeypatch
):
  expected = _attack(problem)
  planted = _Planted(slots._jitted_advance, at_all=at_all)
  monkeypatch.setattr(slots, "_jitted_advance", planted)
  if at_all:
    with pytest.raises(RuntimeError, match="planted"):
      _attack(problem)
  else:
    found = _attack(problem)
    np.testing.assert_array_equal(found.adversarial, expected.adversarial)
  assert planted.tried.wait(20)


def test_nobody_waits_for_programs_that_are_not_needed(problem, monkeypatch):
  """Every image is fooled by the first attack, while the second compiles."""
  free = threading.Event()
  ahead = slots._jitted_advance.ahead
  _attack(problem, epsilon=0.5, second="fab-t")

  def slow(*args, search, **kwargs):
    compile_program = ahead(*args, search=search, **kwargs)
    if isinstance(search, APGD):
      return compile_program
    return lambda: free.wait(60)

  monkeypatch.setattr(threads, "_MOST_THREADS", 2)
  monkeypatch.setattr(slots._jitted_advance, "ahead", slow)
  assert _attack(problem, epsilon=0.5, second="fab-t").accuracy == 0
  assert not free.is_set()
  free.set()


# --- Training ----------------------------------------------------------------


def _final(workdir):
  _, variables = checkpoints.restore_model(workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  clock = ("seconds", "images_per_second", "time")
  return variables, [
    {k: v for k, v in line.items() if k not in clock} for line in logged
  ]


@pytest.mark.slow
def test_training_with_and_without_threads(tmp_path, compiled, monkeypatch):
  config = tiny.config("at", train__num_epochs=1)
  compiled.clear()
  tiny._made.clear()
  tiny.run(tmp_path / "with", "train", config)
  threads._finish()
  steps = [thread for name, thread in compiled if "dispatch" in name]
  assert steps == ["compile"]
  monkeypatch.setattr(train, "Ahead", lambda **_: threads.Ahead(enabled=False))
  tiny.run(tmp_path / "without", "train", config)
  found, expected = _final(tmp_path / "with"), _final(tmp_path / "without")
  jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
  assert len(found[1]) == len(expected[1])
