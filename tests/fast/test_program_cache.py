"""The cache of compiled programs: on by default, within limits, with a way off."""

import logging
import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

from atat_jax.compilation import cache

OPTIONS = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
  """A process that has compiled nothing yet, whose user has an empty cache."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  monkeypatch.setattr(cache, "_decided", False)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv(cache.VARIABLE, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def _folder(tmp_path):
  return tmp_path / "atat_jax" / "compiled"


def test_the_cache_is_on_by_default_in_the_users_folder(tmp_path):
  cache.enable_by_default()
  assert jax.config.jax_compilation_cache_dir == str(_folder(tmp_path))
  assert jax.config.jax_persistent_cache_min_compile_time_secs < 1


def test_a_folder_that_the_user_has_chosen_is_left_alone(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  cache.enable_by_default()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
  cache.disable_persistent_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_threshold_that_the_user_has_chosen_is_kept():
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
  cache.enable_by_default()
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 7


@pytest.mark.parametrize("way", ["variable", "jax", "function"])
def test_there_are_ways_to_turn_it_off(way, tmp_path, monkeypatch):
  if way == "variable":
    monkeypatch.setenv(cache.VARIABLE, "0")
  elif way == "jax":
    jax.config.update("jax_enable_compilation_cache", False)
  else:
    cache.disable_persistent_cache()
  cache.enable_by_default()
  assert jax.config.jax_compilation_cache_dir is None


def test_it_is_turned_off_after_it_was_on():
  cache.enable_by_default()
  cache.disable_persistent_cache()
  cache.enable_by_default()
  assert jax.config.jax_compilation_cache_dir is None


def _fill(folder: pathlib.Path, sizes):
  folder.mkdir(parents=True, exist_ok=True)
  for age, size in enumerate(sizes):
    path = folder / f"{age}-cache"
    path.write_bytes(bytes(size))
    os.utime(path, (1e9 - age, 1e9 - age))


def test_what_was_used_longest_ago_is_deleted(tmp_path, monkeypatch):
  _fill(_folder(tmp_path), [400_000, 500_000, 200_000, 100])
  os.utime(_folder(tmp_path) / "1-cache", (2e9, 1e9))  # read since
  monkeypatch.setenv(cache.VARIABLE, "1")
  cache.enable_by_default()
  left = {path.name for path in _folder(tmp_path).iterdir()}
  assert left == {"0-cache", "1-cache"}


def test_files_that_another_process_deletes_are_no_error(tmp_path, monkeypatch):
  _fill(tmp_path, [10, 10, 10])
  unlink = os.unlink

  def gone(path):
    unlink(path)
    raise FileNotFoundError(path)

  monkeypatch.setattr(os, "unlink", gone)
  cache.trim(tmp_path, 5)
  assert not list(tmp_path.glob("*-cache"))
  cache.trim(tmp_path / "none", 5)


def test_a_link_is_not_followed(tmp_path):
  _fill(tmp_path / "mine", [10])
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache" / "link").symlink_to(tmp_path / "mine" / "0-cache")
  cache.trim(tmp_path / "cache", 0)
  assert (tmp_path / "mine" / "0-cache").exists()


def test_a_limit_that_is_no_number_is_told(monkeypatch, caplog):
  monkeypatch.setenv(cache.VARIABLE, "plenty")
  monkeypatch.setattr(logging.getLogger("atat_jax"), "propagate", True)
  cache.enable_by_default()
  assert "plenty" in caplog.text
  assert jax.config.jax_compilation_cache_dir is not None


NOTEBOOK = """
import jax, jax.numpy as jnp, numpy as np
import atat_jax.attacks as attacks
assert jax.config.jax_compilation_cache_dir is None  # not by an import
found = []
jax.monitoring.register_event_listener(lambda e, **k: found.append(e))
images = jnp.full((2, 4, 4, 1), 0.5)
weights = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)))
attacks.pgd(
  jax.random.key(0), lambda x: jnp.tanh(x.reshape(2, -1) @ weights), images,
  jnp.zeros(2, int), epsilon=0.1, step_size=0.1, num_steps=2,
)
print(sum(e.endswith("/cache_hits") for e in found))
"""


def _notebook(tmp_path):
  environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
  return subprocess.run(
    [sys.executable, "-W", "error", "-c", NOTEBOOK],
    capture_output=True,
    text=True,
    check=True,
    env=environment,
    timeout=300,
  )


@pytest.mark.slow
def test_a_second_notebook_finds_the_programs_of_the_first(tmp_path):
  assert int(_notebook(tmp_path).stdout) == 0
  assert list(_folder(tmp_path).glob("*-cache"))
  assert int(_notebook(tmp_path).stdout) > 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_home_that_cannot_be_written_is_told_once(tmp_path):
  tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
  found = _notebook(tmp_path)
  assert found.stderr.count("no cache") == 1
