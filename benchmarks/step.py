"""The fused train step, alone or beside the same step in PyTorch.

  python -m benchmarks.step --model=wrn-16-4 --peer=eager --out=step.json

Prints for every model, batch size, dtype and method the step's time, images per
second, the model's operations, their share of the device's peak (MFU), memory
and compilation time. With --peer both sides run in turn on the same weights and
images, and the ratio is the median over pairs of runs.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks.support import machine, networks, timing
from benchmarks.support.machine import say, whole

ATTACK = {"epsilon": 8 / 255, "step_size": 2 / 255}
LOSS = {"lambda1": 1.0, "lambda2": 0.1}
PEER_METHODS = ("standard", "at", "atat")
PEERS = ("none", "eager", "compile")

# Dense peak of one device in FLOP/s: (bfloat16, float32 as jax computes it by
# default: TF32 on GPU, several bfloat16 passes on TPU).
PEAKS = {
  "H100": (989e12, 494e12),
  "H200": (989e12, 494e12),
  "A100": (312e12, 156e12),
  "TPU v4": (275e12, None),
  "TPU v5 lite": (197e12, None),
  "TPU v5p": (459e12, None),
  "TPU v6 lite": (918e12, None),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Measurement to make.

  Attributes:
    model: "wrn-DEPTH-WIDTH", or a name in `models.MODELS`.
    method: Name in `objectives.OBJECTIVES`.
    batch_size: Images per step, over all devices.
    dtype: Compute dtype, "float32" or "bfloat16".
    num_steps: Steps of the attack.
    num_devices: Devices that share the batch.
    steps_per_dispatch: Train steps per call.
    size: Height and width of the images.
    options: Other fields of the objective, of the model (`model.<field>`), of
      `Options` (`train.<field>`).
  """

  model: str
  method: str = "atat"
  batch_size: int = 32
  dtype: str = "float32"
  num_steps: int = 7
  num_devices: int = 1
  steps_per_dispatch: int = 1
  size: int = 32
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    """Name in tables and comparisons."""
    parts = [self.method, self.model, f"b{self.batch_size}", self.dtype]
    if self.method != "standard":
      parts.append(f"pgd{self.num_steps}")
    for label, value, usual in (
      ("devices", self.num_devices, 1),
      ("dispatch", self.steps_per_dispatch, 1),
      ("size", self.size, 32),
    ):
      if value != usual:
        parts.append(f"{label}{value}")
    return "/".join([*parts, *(f"{k}={v}" for k, v in self.options)])


def _split_options(
  options: tuple[tuple[str, Any], ...],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Splits a case's options into fields of objective, model and training."""
  objective: dict[str, Any] = {}
  sections: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
  for key, value in options:
    section, _, field = key.partition(".")
    if field:
      sections[section][field] = value
    else:
      objective[key] = value
  return objective, sections["model"], sections["train"]


def _objective(case: Case, fields: dict[str, Any]) -> Any:
  """Makes the case's objective, with the case's attack."""
  from atat_jax import objectives

  if case.method != "standard":
    fields = fields | ATTACK | {"num_steps": case.num_steps}
  return objectives.create(case.method, **fields)


class Ours:
  """The step of this package, compiled, with a state to run it on.

  Args:
    case: Measurement to make.

  Attributes:
    model: Flax module of student and teacher.
    objective: Training objective.
    variables: Variables of the student before training.
    teacher: Variables of the teacher; None: the method needs none.
    pixels: uint8 [N, size, size, 3], images of one dispatch.
    labels: int32 [N].
    seconds_lowering: Seconds to trace and lower the step.
    seconds_compiling: Seconds to compile it.
  """

  def __init__(self, case: Case):
    import jax
    import jax.numpy as jnp

    from atat_jax import compilation, optim, sharding, state, steps
    from atat_jax.training.options import Options

    if case.num_devices > jax.device_count():
      raise UserError(
        f"devices: {case.num_devices}; allowed: up to {jax.device_count()}"
      )
    self.case = case
    fields, model_fields, train_fields = _split_options(case.options)
    self.model = networks.network(
      case.model, dtype=jnp.dtype(case.dtype), **model_fields
    )
    self.objective = _objective(case, fields)
    self._make_examples()
    images = jnp.zeros((1, *self.pixels.shape[1:]))
    init = compilation.jit(self.model.init, once=True)
    self.variables, self.teacher = init(jax.random.key(0), images), None
    if self.objective.needs_teacher:
      self.teacher = init(jax.random.key(1), images)
    mesh = sharding.make_mesh(jax.devices()[: case.num_devices])
    optimizer = optim.make_optimizer(lambda _: 0.1)
    self._state = sharding.put_replicated(
      mesh,
      state.create(
        self.model,
        optimizer,
        jax.random.key(2),
        images,
        metric_names=steps.metric_names(self.objective),
        term_names=steps.term_names(self.objective),
        initial=self.variables,
      ),
    )
    step = steps.make_train_step(
      self.model,
      self.objective,
      optimizer,
      mesh=mesh,
      num_classes=10,
      options=Options(**train_fields),
    )
    self._arguments = self._put_arguments(mesh)
    self._compile(step)

  def _make_examples(self) -> None:
    """Draws the images and labels of one dispatch."""
    case, generator = self.case, np.random.default_rng(0)
    count = case.steps_per_dispatch * case.batch_size
    shape = (count, case.size, case.size, 3)
    self.pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    self.labels = generator.integers(0, 10, count).astype(np.int32)

  def _put_arguments(self, mesh: Any) -> tuple[Any, ...]:
    """Puts the step's arguments after the state on the devices."""
    from atat_jax import sharding
    from atat_jax.data.base import Split

    indices = np.arange(len(self.labels), dtype=np.int32)
    fixed = (
      sharding.put_replicated(mesh, self.teacher),
      sharding.put_replicated(mesh, Split(self.pixels, self.labels)),
    )
    dispatch = self.case.steps_per_dispatch
    if dispatch == 1:
      return (*fixed, sharding.put_batch(mesh, indices))
    rows = sharding.put_batch(mesh, indices.reshape(dispatch, -1), axis=1)
    return (*fixed, rows, None, np.int32(dispatch))

  def _compile(self, step: Any) -> None:
    began = time.perf_counter()
    lowered = step.lower(self._state, *self._arguments)
    self.seconds_lowering = time.perf_counter() - began
    began = time.perf_counter()
    self._step = lowered.compile()
    self.seconds_compiling = time.perf_counter() - began

  def __call__(self) -> None:
    """Runs one dispatch and waits for it."""
    import jax

    self._state = self._step(self._state, *self._arguments)
    jax.block_until_ready(self._state)

  def memory(self) -> dict[str, int | None]:
    """Returns the bytes that the compiler plans, and the peak on the device."""
    import jax

    plan = self._step.memory_analysis()
    seen = jax.devices()[0].memory_stats() or {}
    return {
      "planned_temporary": plan.temp_size_in_bytes if plan else None,
      "planned_arguments": plan.argument_size_in_bytes if plan else None,
      "peak_in_use": seen.get("peak_bytes_in_use"),
    }

  def flops(self) -> dict[str, float]:
    """Counts operations of a step, and of one forward pass in two ways."""
    import jax

    from atat_jax import batch_norm
    from benchmarks.support import flops

    case = self.case
    shape = self.pixels.shape[1:]
    forward = flops.forward(self.model, self.variables, shape)
    plain = self.model.clone(convolution="xla", dtype="float32")
    images = jax.ShapeDtypeStruct((1, *shape), "float32")
    cost = (
      jax.jit(lambda v, x: batch_norm.apply(plain, v, x)[0])
      .lower(self.variables, images)
      .compile()
      .cost_analysis()
    )
    return {
      "forward_per_image": forward,
      "forward_per_image_by_compiler": float(cost["flops"]),
      "step": float(
        forward
        * flops.passes(self.objective, case.num_steps)
        * case.batch_size
        * case.steps_per_dispatch
      ),
    }


class Peer:
  """The same step in PyTorch, from the weights and images of ours.

  Args:
    ours: Step of this package.
    compiled: Whether the networks go through `torch.compile`.
  """

  def __init__(self, ours: Ours, *, compiled: bool):
    import jax
    import torch

    from benchmarks.support import pytorch

    case = ours.case
    device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    self._device = device
    model = ours.model.clone(dtype="float32")

    def network(variables: Any) -> Any:
      made = pytorch.TorchWideResNet(model, variables).to(device)
      if device == "cuda":
        made = made.to(memory_format=torch.channels_last)
      return made

    self.student = network(ours.variables)
    self.teacher = None if ours.teacher is None else network(ours.teacher)
    if device == "cuda":
      torch.backends.cuda.matmul.allow_tf32 = True
      torch.backends.cudnn.allow_tf32 = True
      torch.backends.cudnn.benchmark = True
    self._step = pytorch.Step(
      case.method,
      self.student,
      self.teacher,
      attack_options=ATTACK | {"num_steps": case.num_steps},
      loss_options={k: dict(case.options).get(k, v) for k, v in LOSS.items()},
      compiled=compiled,
      autocast=case.dtype == "bfloat16",
    )
    batches = np.split(np.arange(len(ours.labels)), case.steps_per_dispatch)
    self._batches = [
      (self.images(ours.pixels[b] / np.float32(255)), self.labels(ours, b))
      for b in batches
    ]
    began = time.perf_counter()
    self()
    self.seconds_first = time.perf_counter() - began

  def images(self, images: np.ndarray) -> Any:
    """Converts images [B, H, W, C] to a tensor [B, C, H, W]."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(self._device)
    if self._device == "cuda":
      x = x.contiguous(memory_format=torch.channels_last)
    return x

  def labels(self, ours: Ours, batch: np.ndarray) -> Any:
    """Returns the labels of a batch as a tensor."""
    import torch

    return torch.from_numpy(ours.labels[batch].astype(np.int64)).to(
      self._device
    )

  def __call__(self) -> None:
    """Makes as many steps as one dispatch of ours."""
    import torch

    for images, labels in self._batches:
      self._step(images, labels)
    if self._device == "cuda":
      torch.cuda.synchronize()


def gradient_differences(ours: Ours) -> dict[str, float]:
  """Compares the gradients of an ATAT step, see `support.gradients`."""
  from benchmarks.support import gradients

  batch = slice(0, ours.case.batch_size)
  return gradients.differences(
    ours.model,
    ours.objective,
    ours.variables,
    ours.teacher,
    ours.pixels[batch] / np.float32(255),
    ours.labels[batch],
  )


def peak(dtype: str, num_devices: int) -> float | None:
  """Returns the devices' peak in FLOP/s; None: not known."""
  import jax

  kind = jax.devices()[0].device_kind
  for name, (low, full) in PEAKS.items():
    if name.lower() in kind.lower():
      one = low if dtype == "bfloat16" else full
      return None if one is None else one * num_devices
  return None


def measure(
  case: Case, *, peer: str, repeats: int, compile_only: bool = False
) -> dict[str, Any]:
  """Measures a case.

  Args:
    case: Measurement to make.
    peer: PyTorch's side, one of `PEERS`.
    repeats: Number of timed runs of each side.
    compile_only: Whether to compile and compare gradients only.

  Returns:
    Plain values.
  """
  if peer != "none":
    checks.choice("method", case.method, PEER_METHODS)
    if not case.model.startswith("wrn-"):
      raise UserError(
        f"model: {case.model!r}; allowed with a peer: wrn-DEPTH-WIDTH"
      )
  ours = Ours(case)
  row: dict[str, Any] = {
    "name": case.name,
    "case": dataclasses.asdict(case),
    "seconds_lowering": ours.seconds_lowering,
    "seconds_compiling": ours.seconds_compiling,
  }
  row["flops"], row["memory"] = ours.flops(), ours.memory()
  if peer != "none" and case.method == "atat" and case.dtype == "float32":
    row["gradient_differences"] = gradient_differences(ours)
  if compile_only:
    return row
  sides: list[Callable[[], None]] = [ours]
  if peer != "none":
    twin = Peer(ours, compiled=peer == "compile")
    sides.append(twin)
    row["peer"] = peer
    row["peer_first_seconds"] = twin.seconds_first
  ours()
  row |= timing.summary(timing.run_in_turn(sides, repeats=repeats))
  count = case.batch_size * case.steps_per_dispatch
  row["images_per_second"] = count / row["seconds"]
  row["flops_per_second"] = row["flops"]["step"] / row["seconds"]
  best = peak(case.dtype, case.num_devices)
  row["mfu"] = None if best is None else row["flops_per_second"] / best
  row["memory"] = ours.memory()  # again: the peak is known only now
  return row


def _gigabytes(memory: dict[str, int | None]) -> str:
  found = memory["peak_in_use"] or memory["planned_temporary"]
  return "-" if not found else f"{found / 1e9:.2f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `measure` in Markdown."""
  header = [
    "step",
    "ms",
    "+-",
    "images/s",
    "TFLOP/step",
    "TFLOP/s",
    "MFU (%)",
    "GB",
    "compile (s)",
    "peer (ms)",
    "+-",
    "peer / ours",
    "+-",
  ]
  lines = []
  for row in rows:
    best = row.get("mfu")
    mfu = "-" if best is None else f"{100 * best:.1f}"
    compiling = row["seconds_lowering"] + row["seconds_compiling"]
    beside = ["-"] * 4
    if "ratio" in row:
      beside = [
        f"{1e3 * row['peer_seconds']:.0f}",
        f"{1e3 * row['peer_spread']:.0f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_spread']:.2f}",
      ]
    ran = ["-"] * 3
    rate = "-"
    if "seconds" in row:
      ran = [
        f"{1e3 * row['seconds']:.0f}",
        f"{1e3 * row['spread']:.0f}",
        f"{row['images_per_second']:.0f}",
      ]
      rate = f"{row['flops_per_second'] / 1e12:.3f}"
    lines.append(
      [
        row["name"],
        *ran,
        f"{row['flops']['step'] / 1e12:.3f}",
        rate,
        mfu,
        _gigabytes(row["memory"]),
        f"{compiling:.1f}",
        *beside,
      ]
    )
  return tables.markdown([header, *lines])


def gradient_table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `gradient_differences` in Markdown."""
  names = ("float64", "ours_float32", "peer_float32")
  lines = [
    [row["name"], *(f"{row['gradient_differences'][n]:.1e}" for n in names)]
    for row in rows
  ]
  header = [
    "step",
    "float64, worst parameter",
    "ours in float32",
    "PyTorch in float32",
  ]
  return tables.markdown([header, *lines])


def add_case_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags from which `cases` makes measurements."""

  def several(flag: str, **options: Any) -> None:
    parser.add_argument(flag, nargs="+", **options)

  several(
    "--model",
    default=["wrn-10-1"],
    help="wrn-DEPTH-WIDTH or, without a peer, any network of the package",
  )
  several(
    "--method",
    default=["atat"],
    help=f"any method; with a peer {', '.join(PEER_METHODS)}",
  )
  several("--batch_size", type=whole, default=[32])
  several("--dtype", default=["float32"], choices=("float32", "bfloat16"))
  several("--num_steps", type=whole, default=[7], help="steps of the attack")
  several("--devices", type=whole, default=[1], metavar="N")
  several("--steps_per_dispatch", type=whole, default=[1])
  parser.add_argument(
    "--size", type=whole, default=32, help="height and width of the images"
  )


def cases(args: argparse.Namespace) -> list[Case]:
  """Returns all combinations of the flags' values."""
  return [
    Case(model, method, batch_size, dtype, steps, devices, dispatch, args.size)
    for model, method, batch_size, dtype, steps, devices, dispatch in (
      itertools.product(
        args.model,
        args.method,
        args.batch_size,
        args.dtype,
        args.num_steps,
        args.devices,
        args.steps_per_dispatch,
      )
    )
  ]


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add_case_flags(made)
  add = made.add_argument
  add("--peer", default="none", choices=PEERS, help="PyTorch's side")
  add("--repeats", type=whole, default=7)
  add(
    "--compile_only",
    action="store_true",
    help="compile and compare gradients, time nothing",
  )
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)

  def measured() -> Iterator[dict[str, Any]]:
    for case in cases(args):
      say(case.name)
      yield measure(
        case,
        peer=args.peer,
        repeats=args.repeats,
        compile_only=args.compile_only,
      )

  machine.run(args, measured(), table, torch=args.peer != "none")


if __name__ == "__main__":
  main()
