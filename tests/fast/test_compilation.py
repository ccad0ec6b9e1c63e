"""Compiler options: only where they may stand, and only where they exist."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import compilation


@pytest.fixture
def probe_again():
  """What is installed is asked for anew, before and after the test."""
  compilation.compiler_options.cache_clear()
  yield
  compilation.compiler_options.cache_clear()


def _options_of_jit(monkeypatch) -> list[dict]:
  """Records the options that are given to jax.jit."""
  given, jit = [], jax.jit

  def recording(*args, **kwargs):
    given.append(kwargs.get("compiler_options"))
    return jit(*args, **kwargs)

  monkeypatch.setattr(jax, "jit", recording)
  return given


@pytest.mark.parametrize("effort", [None, "once", "light", "rough"])
def test_options_are_what_xla_takes(effort):
  options = compilation.compiler_options(**{effort: True} if effort else {})
  compiled = jax.jit(lambda x: x * 2, compiler_options=options)
  assert compiled(21) == 42


def test_top_level_call_has_the_options(monkeypatch):
  monkeypatch.setattr(compilation, "compiler_options", lambda **_: {"a": "b"})
  given = _options_of_jit(monkeypatch)
  function = compilation.jit(lambda x: x + 1)
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile opti"):
    function(1.0)
  assert {"a": "b"} in given


def test_nested_calls_have_no_options(monkeypatch):
  """With options that no compiler knows: any use of them would raise."""
  monkeypatch.setattr(compilation, "compiler_options", lambda **_: {"a": "b"})
  function = compilation.jit(lambda x: jnp.sin(x).sum())
  x = jnp.arange(4.0)
  np.testing.assert_allclose(jax.jit(function)(x), np.sin(x).sum(), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(function)(x), np.cos(x), rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(function)(x), np.sin(x), rtol=1e-6)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(jax.grad(function)))(x), np.cos(x), rtol=1e-6
  )
  loop = jax.lax.fori_loop(0, 3, lambda _, x: function(x) + x, x)
  assert np.isfinite(loop).all()


def test_a_nested_call_on_constants_has_no_options():
  """Nothing among the arguments is traced, the call still is inside jit."""
  function = compilation.jit(lambda x: x + 1)
  result = jax.jit(lambda y: y * function(np.float32(1)))(3.0)
  assert result == 6


def test_a_call_that_closes_over_tracers_has_no_options():
  """Only what the function closes over is traced."""

  def outer(scale):
    return compilation.jit(lambda x: scale * x)(2.0)

  assert jax.jit(outer)(3.0) == 6
  assert jax.grad(outer)(3.0) == 2
  assert jax.vmap(outer)(jnp.arange(3.0)).tolist() == [0, 2, 4]


def test_an_option_that_xla_lacks_is_left_out(monkeypatch, probe_again):
  for name in ("_FAST", "_ONCE"):
    monkeypatch.setattr(compilation, name, {"xla_no_such_flag": "1"})
  for once in (False, True):
    assert compilation.compiler_options(once=once) == {}
    assert compilation.jit(lambda x: x + 1, once=once)(1) == 2


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_other_backends_get_no_options(backend, monkeypatch, probe_again):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert compilation.compiler_options() == {}


def test_callers_cannot_change_the_options():
  compilation.compiler_options()
  assert isinstance(compilation._FAST, dict)
  assert compilation.compiler_options() is not compilation._FAST


def test_keywords_of_jit_pass_through():
  function = compilation.jit(
    lambda x, *, twice: 2 * x if twice else x,
    static_argnames=("twice",),
    donate_argnums=0,
  )
  x = jnp.ones(8)
  assert function(x, twice=True).tolist() == [2.0] * 8
  assert x.is_deleted()


def test_one_compilation_for_many_calls(compilations):
  function = compilation.jit(lambda x: x - 1)
  x = jnp.ones(3)
  function(x)
  before = compilations()
  for _ in range(3):
    function(x)
  assert compilations() == before


def test_name_and_docstring_are_kept():
  def add_one(x):
    """Adds one."""
    return x + 1

  function = compilation.jit(add_one)
  assert (function.__name__, function.__doc__) == ("add_one", "Adds one.")


@pytest.fixture
def cache_directory():
  before = jax.config.jax_compilation_cache_dir
  yield lambda: jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", before)


def test_the_compilation_cache_is_in_the_users_directory(
  monkeypatch, cache_directory, tmp_path
):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compilation.enable_persistent_cache()
  assert cache_directory() == str(tmp_path / "atat_jax" / "compiled")

  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  compilation.enable_persistent_cache()
  expected = tmp_path / "home" / ".cache" / "atat_jax" / "compiled"
  assert cache_directory() == str(expected)


def test_cache_from_the_environment_is_respected(monkeypatch, cache_directory):
  before = cache_directory()
  assert os.environ["JAX_COMPILATION_CACHE_DIR"]  # conftest.py sets it
  compilation.enable_persistent_cache()
  assert cache_directory() == before
