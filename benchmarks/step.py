"""The fused train step, alone or beside the same step in PyTorch.

  python -m benchmarks.step --model=wrn-16-4 --peer=eager --out=step.json

Prints for every model, batch size, dtype and method the step's time, images a
second, the model's operations and the share of the device's peak (MFU), the
memory, the time to compile; with --peer both sides run in turn, on the same
weights and images, and the ratio is that of each pair of runs.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError
from benchmarks import setting, timing
from benchmarks.setting import say, whole

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
  """One measurement.

  Attributes:
    model: "wrn-DEPTH-WIDTH", or of `models.MODELS`.
    method: Of `objectives.OBJECTIVES`.
    batch_size: Of all devices together.
    dtype: "float32" or "bfloat16".
    num_steps: Of the attack.
    num_devices: Devices that share the batch.
    steps_per_dispatch: Train steps in one call.
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
    """For tables and comparisons."""
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


class Ours:
  """The step of this package, compiled, with a state to run it on."""

  def __init__(self, case: Case):
    import jax
    import jax.numpy as jnp

    from atat_jax import (
      compilation,
      objectives,
      optim,
      sharding,
      state,
      steps,
    )
    from atat_jax.data.base import Split
    from atat_jax.training.options import Options

    if case.num_devices > jax.device_count():
      raise UserError(
        f"devices: {case.num_devices}; allowed: up to {jax.device_count()}"
      )
    fields = dict(case.options)
    of_model, of_train = (
      {
        key.removeprefix(section): fields.pop(key)
        for key in list(fields)
        if key.startswith(section)
      }
      for section in ("model.", "train.")
    )
    self.case = case
    self.model = setting.network(
      case.model, dtype=jnp.dtype(case.dtype), **of_model
    )
    fields = setting.hyperparameters(case.method) | fields
    if case.method != "standard":
      fields |= ATTACK | {"num_steps": case.num_steps}
    self.objective = objectives.create(case.method, **fields)
    mesh = sharding.make_mesh(jax.devices()[: case.num_devices])
    generator = np.random.default_rng(0)
    count = case.steps_per_dispatch * case.batch_size
    shape = (case.size, case.size, 3)
    self.pixels = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    self.labels = generator.integers(0, 10, count).astype(np.int32)
    images = jnp.zeros((1, *shape))
    init = compilation.jit(self.model.init, once=True)
    self.variables, self.teacher = init(jax.random.key(0), images), None
    if self.objective.needs_teacher:
      self.teacher = init(jax.random.key(1), images)
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
      options=Options(**of_train),
    )
    indices = np.arange(count, dtype=np.int32)
    self._rest: tuple[Any, ...] = (
      sharding.put_replicated(mesh, self.teacher),
      sharding.put_replicated(mesh, Split(self.pixels, self.labels)),
    )
    if case.steps_per_dispatch == 1:
      self._rest += (sharding.put_batch(mesh, indices),)
    else:
      rows = indices.reshape(case.steps_per_dispatch, -1)
      rows = sharding.put_batch(mesh, rows, axis=1)
      self._rest += (rows, None, np.int32(case.steps_per_dispatch))
    began = time.perf_counter()
    lowered = step.lower(self._state, *self._rest)
    self.seconds_lowering = time.perf_counter() - began
    began = time.perf_counter()
    self._step = lowered.compile()
    self.seconds_compiling = time.perf_counter() - began

  def __call__(self) -> None:
    """One dispatch, waited for."""
    import jax

    self._state = self._step(self._state, *self._rest)
    jax.block_until_ready(self._state)

  def memory(self) -> dict[str, int | None]:
    """Bytes: what the compiler plans, and what the device saw at its peak."""
    import jax

    plan = self._step.memory_analysis()
    seen = jax.devices()[0].memory_stats() or {}
    return {
      "planned_temporary": plan.temp_size_in_bytes if plan else None,
      "planned_arguments": plan.argument_size_in_bytes if plan else None,
      "peak_in_use": seen.get("peak_bytes_in_use"),
    }

  def flops(self) -> dict[str, float]:
    """Operations of a step, and of one forward pass by two counts."""
    import jax

    from atat_jax import batch_norm
    from benchmarks import flops

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
  """The same step in PyTorch, from the weights and images of ours."""

  def __init__(self, ours: Ours, *, compiled: bool):
    import jax
    import torch

    from benchmarks import torch_step
    from benchmarks.torch_wide_resnet import TorchWideResNet

    case = ours.case
    device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    autocast = case.dtype == "bfloat16"
    self._device = device
    model = ours.model.clone(dtype="float32")

    def network(variables: Any) -> Any:
      made = TorchWideResNet(model, variables).to(device)
      if device == "cuda":
        made = made.to(memory_format=torch.channels_last)
      return made

    self.student = network(ours.variables)
    self.teacher = None if ours.teacher is None else network(ours.teacher)
    if device == "cuda":
      torch.backends.cuda.matmul.allow_tf32 = True
      torch.backends.cudnn.allow_tf32 = True
      torch.backends.cudnn.benchmark = True
    self._step = torch_step.Step(
      case.method,
      self.student,
      self.teacher,
      attack_options=ATTACK | {"num_steps": case.num_steps},
      loss_options={k: dict(case.options).get(k, v) for k, v in LOSS.items()},
      compiled=compiled,
      autocast=autocast,
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
    """[B, H, W, C] to a tensor [B, C, H, W]."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(self._device)
    if self._device == "cuda":
      x = x.contiguous(memory_format=torch.channels_last)
    return x

  def labels(self, ours: Ours, batch: np.ndarray) -> Any:
    """Of a batch."""
    import torch

    return torch.from_numpy(ours.labels[batch].astype(np.int64)).to(
      self._device
    )

  def __call__(self) -> None:
    """As many steps as one dispatch of ours."""
    import torch

    for images, labels in self._batches:
      self._step(images, labels)
    if self._device == "cuda":
      torch.cuda.synchronize()


def gradient_differences(ours: Ours) -> dict[str, float]:
  """How far both sides' gradients are apart, at the same adversarial images.

  In float32 a few activations lie so close to the kink of the leaky ReLU that
  rounding decides on which side, in either library. So the two are compared in
  float64, where none does, and each one's float32 with that.

  Args:
    ours: A step with the method "atat".

  Returns:
    "float64": the largest difference of a parameter's gradient over its largest
    value, the worst of all parameters. "ours_float32", "peer_float32": length
    of the whole difference from PyTorch's float64 gradient over its length.
  """
  import jax
  import jax.numpy as jnp
  import torch

  from atat_jax import compilation, objectives
  from atat_jax.objectives import adversarial
  from benchmarks import torch_step
  from benchmarks.torch_wide_resnet import TorchWideResNet

  batch = slice(0, ours.case.batch_size)
  pixels, labels = ours.pixels[batch] / np.float32(255), ours.labels[batch]
  objective = ours.objective

  def attacked(variables: Any, images: Any, labels: Any) -> Any:
    made = objectives.make_batch(images, labels, 10)
    key = jax.random.key(3)
    return objective.attack(key, ours.model, variables, made).images_adv

  images_adv = np.asarray(
    compilation.jit(attacked)(ours.variables, pixels, labels)
  )

  def flat(gradient: Any) -> dict[str, Any]:
    """As weights of a network, so that both have the same names."""
    network = TorchWideResNet(
      ours.model, {**ours.variables, "params": gradient}, torch.float64
    )
    return {n: p.detach() for n, p in network.named_parameters()}

  def our_gradient(dtype: str) -> dict[str, Any]:
    model = ours.model.clone(dtype=jnp.dtype(dtype))

    def gradient(variables: Any, teacher: Any, *arrays: Any) -> Any:
      images, adversarials, labels = arrays
      made = objectives.make_batch(images, labels, 10)
      fixed = adversarial.InnerAttackResult(
        adversarials, variables["batch_stats"]
      )
      with mock.patch.object(type(objective), "attack", lambda *_: fixed):
        prepared = objective.prepare(
          jax.random.key(3), model, variables, teacher, made
        )

      def mean(params: Any) -> Any:
        student = {**variables, "params": params}
        return objective.loss(model, student, prepared, made).total.mean()

      return jax.grad(mean)(variables["params"])

    with jax.enable_x64(dtype == "float64"):
      cast = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), dtype),
        (ours.variables, ours.teacher, pixels, images_adv),
      )
      return flat(compilation.jit(gradient)(*cast, labels))

  def peer_gradient(dtype: Any) -> dict[str, Any]:
    def tensor(array: Any) -> Any:
      return torch.from_numpy(array.transpose(0, 3, 1, 2).copy()).to(dtype)

    student = TorchWideResNet(ours.model, ours.variables, dtype).train()
    torch_step.atat_loss(
      student,
      TorchWideResNet(ours.model, ours.teacher, dtype),
      tensor(pixels),
      tensor(images_adv),
      torch.from_numpy(labels.astype(np.int64)),
      **{name: getattr(objective, name) for name in LOSS},
    ).backward()
    return {n: p.grad.double() for n, p in student.named_parameters()}

  exact = peer_gradient(torch.float64)

  def worst(found: dict[str, Any]) -> float:
    return max(
      float((found[n] - g).abs().max() / g.abs().max())
      for n, g in exact.items()
    )

  def apart(found: dict[str, Any]) -> float:
    squares = sum(
      float((found[n] - g).square().sum()) for n, g in exact.items()
    )
    return (
      squares / sum(float(g.square().sum()) for g in exact.values())
    ) ** 0.5

  return {
    "float64": worst(our_gradient("float64")),
    "ours_float32": apart(our_gradient("float32")),
    "peer_float32": apart(peer_gradient(torch.float32)),
  }


def peak(dtype: str, num_devices: int) -> float | None:
  """The devices' peak in FLOP/s, None where it is not known."""
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
    case: What.
    peer: Of `PEERS`.
    repeats: Timed runs of each side.
    compile_only: Whether to time nothing.

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
  row["memory"] = ours.memory()  # now with the peak
  return row


def _gigabytes(memory: dict[str, int | None]) -> str:
  found = memory["peak_in_use"] or memory["planned_temporary"]
  return "-" if not found else f"{found / 1e9:.2f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of what `measure` returned."""
  from benchmarks.comparison import markdown

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
  return markdown(header, lines)


def gradient_table(rows: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of `gradient_differences`."""
  from benchmarks.comparison import markdown

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
  return markdown(header, lines)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  several = {"nargs": "+"}
  add(
    "--model",
    **several,
    default=["wrn-10-1"],
    help="wrn-DEPTH-WIDTH or, without a peer, any network of the package",
  )
  add(
    "--method",
    **several,
    default=["atat"],
    help="any method; with a peer standard, at, atat",
  )
  add("--batch_size", **several, type=whole, default=[32])
  add(
    "--dtype", **several, default=["float32"], choices=("float32", "bfloat16")
  )
  add("--num_steps", **several, type=whole, default=[7], help="of the attack")
  add("--devices", **several, type=whole, default=[1], metavar="N")
  add("--steps_per_dispatch", **several, type=whole, default=[1])
  add("--size", type=whole, default=32, help="height and width of the images")
  add("--peer", default="none", choices=PEERS, help="PyTorch beside it")
  add("--repeats", type=whole, default=7)
  add(
    "--compile_only",
    action="store_true",
    help="compile and compare gradients, time nothing",
  )
  add("--threads", type=whole, help="cores of both; default: all allowed")
  add("--out", type=pathlib.Path, help="JSON file for all of it")
  return made


def cases(args: argparse.Namespace) -> list[Case]:
  """All that the flags ask for."""
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

  try:
    cores = setting.start(args.threads, cache=False, torch=args.peer != "none")
    setting.report(measured(), table, cores=cores, out=args.out)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
