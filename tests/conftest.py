"""What all tests share: eight CPU devices, small networks, their PyTorch twins.

The tests run on the CPU backend (set JAX_PLATFORMS to choose another one).
Most of their time is compilation, so that all programs, those of the processes
that they start included, compile quickly and run slowly (`quick.OPTIONS`).
Compiled programs are kept in pytest's cache directory between sessions.
"""

import gc
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn

from atat_jax import compilation, models

# Before anything asks for a device: the backend reads all when it starts.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
  jax.config.update("jax_platforms", "cpu")
  os.environ["XLA_FLAGS"] = quick.flags()
jax.config.update("jax_num_cpu_devices", 8)

_COMPILATION = "/jax/core/compile/backend_compile_duration"
_compilations: list[float] = []


def _record_compilation(event: str, seconds: float, **_: Any) -> None:
  if event == _COMPILATION:
    _compilations.append(seconds)


def pytest_configure(config: pytest.Config) -> None:
  jax.monitoring.register_event_duration_secs_listener(_record_compilation)
  # A directory for each of pytest-xdist's workers: jax writes its entries in
  # place, so that another worker could read half of one.
  worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
  if worker == "main" and config.getoption("numprocesses", None):
    return  # it runs no test, and the workers would inherit its variable
  # The environment variable is for the processes that tests start.
  path = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir(f"compiled-{worker}"))
  )
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Files whose tests share the finished run of `tiny`, its programs, or the process
# that runs its commands.
_SHARING = (
  "tests/run/test_main.py",
  "tests/run/test_train.py",
  "tests/run/test_checkpoints.py",
  "tests/run/test_evaluation.py",
  "tests/reliability/test_corruption.py",
  "tests/reliability/test_kills.py",
  "tests/reliability/test_machines.py",
  "tests/run/test_interrupts.py",
  "tests/run/test_attack_command.py",
)
# Those that take longest; no worker is left alone with one in the end.
_FIRST = (
  *_SHARING,
  "tests/contract/test_attacks.py",
  "tests/run/test_autoattack.py",
  "tests/run/test_toy_members.py",
  "tests/oracle/test_apgd.py",
  "tests/oracle/test_square.py",
  "tests/oracle/test_fab.py",
)


def _file(nodeid: str) -> str:
  return nodeid.split("::", 1)[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the files that take longest first."""
  places = {file: place for place, file in enumerate(_FIRST)}
  items.sort(key=lambda item: places.get(_file(item.nodeid), len(places)))


def pytest_collection_finish() -> None:
  """Lets the garbage collector pass over what the imports have made."""
  gc.collect()
  gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
  """Gives a file to one worker, and those that share a run to the same one.

  With many workers, making the run again is quicker than waiting for one.
  """
  if config.getvalue("dist") != "loadfile":
    return None
  from xdist.scheduler import LoadScopeScheduling

  together = _SHARING if len(config.getvalue("tx")) <= 4 else ()

  class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
      file = _file(nodeid)
      return "a finished run" if file in together else file

  config.option.loadscopereorder = False  # else by the number of tests
  return Scheduling(config, log)


def _num_mappings() -> int:
  maps = pathlib.Path("/proc/self/maps")
  return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
  """Forgets compiled programs before the kernel refuses memory for more.

  Each takes a few mappings of memory, of which Linux gives a process 65,530 by
  default; beyond them the compiler crashes.
  """
  yield
  if _num_mappings() > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def compilations() -> Callable[[], int]:
  """Asks how many programs have been compiled (or loaded) so far."""

  def number() -> int:
    return len(_compilations)

  before = number()
  jax.block_until_ready(jax.jit(lambda x: x * 3 - 1)(np.float32(2)))
  assert number() > before, f"jax no longer reports {_COMPILATION!r}"
  return number


@pytest.fixture(scope="session")
def eight_devices() -> list[jax.Device]:
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip(f"needs 8 devices, has {len(devices)}")
  return devices[:8]


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
  """The package's own programs compile quickly and run slowly.

  For modules that spend most of their time compiling; they ask for it by
  `pytestmark = pytest.mark.usefixtures("quick_compilation")`.
  """
  options = compilation.compiler_options()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      compilation,
      "compiler_options",
      lambda **_: options | quick.OPTIONS,
    )
    yield


@pytest.fixture
def x64() -> Iterator[None]:
  """The test computes in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
  """Prepared real data: folders `tfds` and `photos`."""
  named = os.environ.get("ATAT_JAX_DATA")
  root = pathlib.Path(__file__).resolve().parents[1]
  path = pathlib.Path(named) if named else root.parent / "shared" / "data"
  if not path.is_dir():
    pytest.skip(f"no real data in {path}; set ATAT_JAX_DATA")
  return path


class Example(NamedTuple):
  """A network with a batch."""

  model: nn.Module
  variables: Any
  images: jax.Array
  labels: jax.Array

  def astype(self, dtype: Any) -> "Example":
    """The same numbers, and the computation, in another dtype."""
    fields = {"dtype": dtype} if hasattr(self.model, "dtype") else {}
    return self._replace(
      model=self.model.clone(**fields),
      variables=jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), dtype), self.variables
      ),
      images=jnp.asarray(np.asarray(self.images), dtype),
    )


def _make_variables(
  model: nn.Module, images: Any, seed: int = 0, dtype: Any = np.float32
) -> Any:
  generator = np.random.default_rng(seed)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    normal = generator.normal(size=leaf.shape)
    match path[-1].key:
      case "kernel":
        value = normal * math.sqrt(2 / math.prod(leaf.shape[:-1]))
      case "scale":
        value = 1 + 0.2 * normal
      case "var":
        value = generator.uniform(0.5, 1.5, leaf.shape)
      case _:  # bias, mean
        value = 0.2 * normal
    return jnp.asarray(value, dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def make_variables() -> Callable[..., Any]:
  """(model, images, seed=0, dtype=float32) to variables drawn by numpy.

  Running means, variances, scales and biases are not those of a fresh network,
  so that a mistake in any of them shows.
  """
  return _make_variables


def _make_example(
  model: nn.Module, shape: tuple[int, ...], num_classes: int
) -> Example:
  generator = np.random.default_rng(1)
  images = jnp.asarray(generator.uniform(size=shape), jnp.float32)
  labels = jnp.asarray(generator.integers(0, num_classes, shape[0]), jnp.int32)
  return Example(model, _make_variables(model, images), images, labels)


@pytest.fixture(scope="session")
def wrn() -> Example:
  """The paper's network at depth 8 and width 1, and 8 images of 8x8."""
  model = models.create("wide_resnet", depth=8, width=1, strides=(1, 1, 2))
  return _make_example(model, (8, 8, 8, 1), 10)


class SmallNet(nn.Module):
  """Two convolutions, smooth, and nothing of the package in it."""

  num_classes: int = 3

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    for index, (features, stride) in enumerate([(4, 1), (6, 2)], start=1):
      x = nn.Conv(
        features,
        (3, 3),
        stride,
        padding=1,
        use_bias=False,
        name=f"conv{index}",
      )(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-3,
        name=f"bn{index}",
      )(x)
      x = nn.tanh(x)
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="session")
def small() -> Example:
  """`SmallNet` and 8 images of 6x6x2 in 3 classes."""
  return _make_example(SmallNet(), (8, 6, 6, 2), 3)


class Pass(NamedTuple):
  """A forward pass in PyTorch.

  Attributes:
    logits: [B, K].
    activations: {layer: [B, C, h, w]}, in the graph of the logits.
    stats: Running statistics after it.
  """

  logits: Any
  activations: dict[str, Any]
  stats: dict[str, Any]


class Torch:
  """The twins of `wrn` and `small` in PyTorch, written from their description.

  Weights are trees as flax has them, of torch tensors; images are
  [B, H, W, C].
  """

  def __init__(self, torch: Any) -> None:
    self.torch = torch
    self.functional = torch.nn.functional

  def tree(self, tree: Any, *, requires_grad: bool = False) -> Any:
    """Copies a tree of arrays, in their own dtype."""
    return jax.tree.map(
      lambda x: self.torch.tensor(np.array(x), requires_grad=requires_grad),
      dict(tree),
    )

  def convolve(
    self, x: Any, kernel: Any, stride: int, padding: str = "symmetric"
  ) -> Any:
    """[B, C, H, W] with a kernel [k, k, C, F]."""
    size = kernel.shape[0]
    if padding == "same":  # TensorFlow's rule
      margins = []
      for n in (x.shape[3], x.shape[2]):  # torch pads from the last axis on
        total = max((math.ceil(n / stride) - 1) * stride + size - n, 0)
        margins += [total // 2, math.ceil(total / 2)]
      x, margin = self.functional.pad(x, margins), 0
    else:
      margin = size // 2
    weight = kernel.permute(3, 2, 0, 1)
    return self.functional.conv2d(x, weight, stride=stride, padding=margin)

  def _batch_norm(
    self, x: Any, params: Any, stats: Any, *, train: bool, epsilon: float
  ) -> tuple[Any, Any]:
    mean, var = stats["mean"], stats["var"]
    if train:
      mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
      stats = {
        "mean": 0.9 * stats["mean"] + 0.1 * mean.detach(),
        "var": 0.9 * stats["var"] + 0.1 * var.detach(),
      }

    def channels(vector: Any) -> Any:
      return vector[None, :, None, None]

    x = (x - channels(mean)) / channels(var + epsilon).sqrt()
    return channels(params["scale"]) * x + channels(params["bias"]), stats

  def small(
    self, model: Any, params: Any, stats: Any, images: Any, *, train: bool
  ) -> Pass:
    del model
    activations, moved = {}, {}
    x = images.permute(0, 3, 1, 2)
    for index, stride in ((1, 1), (2, 2)):
      conv, bn = f"conv{index}", f"bn{index}"
      x = activations[conv] = self.convolve(x, params[conv]["kernel"], stride)
      x, moved[bn] = self._batch_norm(
        x, params[bn], stats[bn], train=train, epsilon=1e-3
      )
      activations[bn] = x
      x = x.tanh()
    head = params["head"]
    logits = x.mean((2, 3)) @ head["kernel"] + head["bias"]
    return Pass(logits, activations, moved)

  def wide_resnet(
    self,
    model: Any,
    params: Any,
    stats: Any,
    images: Any,
    *,
    train: bool,
    added: Any = None,
  ) -> Pass:
    """`added` ({layer: tensor}) is added to a layer's output."""
    torch, functional = self.torch, self.functional
    activations, moved, added = {}, {}, added or {}

    def tap(name: str, x: Any) -> Any:
      activations[name] = x + added.get(name, 0.0)
      return activations[name]

    def norm_act(x: Any, name: str) -> Any:
      x, moved[name] = self._batch_norm(
        x,
        params[name],
        stats[name],
        train=train,
        epsilon=model.batch_norm_epsilon,
      )
      if model.activation == "leaky_relu":
        return torch.where(x > 0, x, model.negative_slope * x)
      return getattr(functional, model.activation)(x)

    def conv(x: Any, name: str, stride: int = 1) -> Any:
      return self.convolve(x, params[name]["kernel"], stride, model.padding)

    x = images.permute(0, 3, 1, 2)
    if model.normalization == "per_image":
      flat = x.flatten(1)
      floor = 1 / math.sqrt(flat.shape[1]) / 255
      deviation = flat.std(1, unbiased=False).clamp_min(floor)
      x = x - flat.mean(1)[:, None, None, None]
      x = x / deviation[:, None, None, None]
    elif model.normalization == "dataset":
      mean, std = (
        torch.tensor(v, dtype=x.dtype)[None, :, None, None]
        for v in (model.mean, model.std)
      )
      x = (x - mean) / std
    x = conv(x, "stem")
    for stage in (1, 2, 3):
      features = model.stem_channels * model.width * 2 ** (stage - 1)
      for unit in range(1, (model.depth - 2) // 6 + 1):
        name = f"stage{stage}_unit{unit}"
        stride = model.strides[stage - 1] if unit == 1 else 1
        first = stage == 1 and unit == 1
        widens = x.shape[1] != features
        h = norm_act(x, f"{name}_bn1")
        if model.shortcut == "conv":
          shortcut = h if first or widens else x
          if widens or stride > 1:
            shortcut = conv(shortcut, f"{name}_shortcut", stride)
        else:
          shortcut = h if first else x
          if stride > 1:
            shortcut = functional.avg_pool2d(shortcut, stride)
          extra = features - x.shape[1]
          sides = (extra // 2, extra - extra // 2)
          shortcut = functional.pad(shortcut, (0, 0, 0, 0, *sides))
        h = norm_act(conv(h, f"{name}_conv1", stride), f"{name}_bn2")
        x = tap(name, shortcut + conv(h, f"{name}_conv2"))
    x = tap("features", norm_act(x, "final_bn"))
    head = params["head"]
    logits = x.mean((2, 3)) @ head["kernel"] + head["bias"]
    return Pass(logits, activations, moved)


@pytest.fixture(scope="session")
def twin() -> Torch:
  return Torch(
    pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
  )
