"""The queue: what is to be run on an accelerator, in this order.

A step is one command of the repository. In a dry run the arguments of `dry` come
after its own, so that it is the same command with small numbers.
"""

import dataclasses
import itertools

CONFIG = "--config=configs/cifar10.py"

# In the arguments: {data}, the decoded copy; {run}, the entry's own folder;
# {reference}, the original AutoAttack.


@dataclasses.dataclass(frozen=True)
class Step:
  """One command, done or not done.

  Attributes:
    name: Unique within the entry.
    arguments: After `python`.
    dry: More of them in a dry run; None: it is left out there.
    instead: Another step of that name where the first fails.
    result: JSON file that it writes, "" for the runs' own files.
    leaves: What later steps need of it and does not come back.
  """

  name: str
  arguments: tuple[str, ...]
  dry: tuple[str, ...] | None = ()
  instead: "Step | None" = None
  result: str = ""
  leaves: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of the queue.

  Attributes:
    title: What it is.
    purpose: Which question it answers.
    minutes: Of an H100 or H200, estimated from operations, never measured.
    expected: What is expected, for the comparison with what comes.
    steps: In order of importance.
    data: Data set, "" for none.
  """

  title: str
  purpose: str
  minutes: int
  expected: str
  steps: tuple[Step, ...]
  data: str = "cifar10"


# --- a: the step -------------------------------------------------------------


def _step_case(
  model: str, dtype: str, batch_size: int, method: str, peer: str
) -> Step:
  name = f"{model}-{dtype}-b{batch_size}-{method}"
  result = f"{{run}}/{name}.json"
  common = (
    *("-m", "benchmarks.step", "--model", model, "--method", method),
    *("--dtype", dtype, "--batch_size", str(batch_size)),
    *("--repeats", "5", f"--out={result}"),
  )
  tiny = (
    *("--model", "wrn-10-1", "--batch_size", "4", "--size", "8"),
    *("--num_steps", "1", "--repeats", "1"),
  )
  alone = Step(name, (*common, "--peer", "none"), dry=tiny, result=result)
  if peer == "none":
    return dataclasses.replace(alone, dry=None)
  return Step(
    name,
    (*common, "--peer", peer),
    # PyTorch's side goes through the C++ compiler on CPU: slow, and another one.
    dry=(*tiny, "--peer", "eager")
    if (model, batch_size) == ("wrn-28-10", 512)
    else None,
    instead=alone,
    result=result,
  )


def _step_cases() -> tuple[Step, ...]:
  """The goal's network first; PyTorch beside all of it, and one of the rest."""
  cases = []
  for model in ("wrn-28-10", "wrn-32-10", "wrn-16-8"):
    for dtype, batch_size, method in itertools.product(
      ("bfloat16", "float32"), (512, 256, 128, 1024), ("atat", "at")
    ):
      beside = model == "wrn-28-10" or batch_size == 256
      peer = "compile" if beside else "none"
      cases.append(_step_case(model, dtype, batch_size, method, peer))
  profile = Step(
    "profile",
    (
      *("-m", "benchmarks.accelerator.kernels", "--results={run}"),
      "--out={run}/profile.json",
    ),
    dry=("--size", "8", "--num_steps", "1"),
    result="{run}/profile.json",
  )
  # After bfloat16 of the goal's network: 4 batch sizes, 2 methods.
  return (*cases[:8], profile, *cases[8:])


# --- c, d, e, g: runs of all methods -----------------------------------------

PREACT = (
  "--set=model.name=preact_resnet18",
  "--set=model.normalization=dataset",
  "--set=model.batch_norm_epsilon=1e-5",
)
BFLOAT16 = "--set=model.dtype=bfloat16"
_TINY = (
  "--set=data.validation_size=16",
  "--set=teacher.batch_size=16",
  "--set=model.name=wide_resnet",
  "--set=model.depth=10",
  "--set=model.width=1",
  "--set=train.num_epochs=1",
  "--set=train.batch_size=16",
  "--set=train.validate_every_epochs=1.0",
  "--set=evaluation.batch_size=8",
  "--set=evaluation.batch_statistics_size=8",
  "--set=evaluation.validation_attack=pgd2",
  "--set=evaluation.num_examples=8",
  "--set=figures.num_images=2",
  "--set=figures.attack=pgd2",
  "--attacks=nominal,fgsm,ifgsm2,pgd2",
  "--running_attacks=autoattack-fast",
  "--running_examples=2",
)
_TINY_ATTACK = (*_TINY, "--set=objective.num_steps=1")


def _methods(
  config: str,
  methods: tuple[str, ...],
  epochs: int,
  more: tuple[str, ...] = (),
  *,
  attacked: tuple[str, ...] = (),
  dry: tuple[str, ...] = ("standard", "atat"),
) -> tuple[Step, ...]:
  """A step for each method, the teacher first; `attacked` is for the others."""
  return tuple(
    Step(
      method,
      (
        *("benchmarks/methods.py", f"--config={config}", "--recipe=modern"),
        *("--workdir={run}", "--seeds=0", f"--methods={method}"),
        *("--attacks=nominal,fgsm,ifgsm20,pgd20", BFLOAT16),
        *("--running_attacks=autoattack", "--running_examples=1000"),
        *("--set=data.dir={data}", f"--set=train.num_epochs={epochs}"),
        *more,
        *(attacked if method != "standard" else ()),
      ),
      dry=None
      if method not in dry
      else _TINY
      if method == "standard"
      else _TINY_ATTACK,
      leaves="{run}/seed0/standard/checkpoints" if method == "standard" else "",
    )
    for method in methods
  )


SMALL_METHODS = ("standard", "atat", "at", "trades", "alp", "tla")


# --- Single runs of main.py --------------------------------------------------


def _fields(*assignments: str) -> tuple[str, ...]:
  return tuple(f"--config.{assignment}" for assignment in assignments)


_PREACT_FIELDS = _fields(
  "model.name=preact_resnet18",
  "model.normalization=dataset",
  "model.batch_norm_epsilon=1e-5",
  "model.dtype=bfloat16",
)
_TINY_FIELDS = _fields(
  *(flag.removeprefix("--set=") for flag in _TINY if flag.startswith("--set=")),
  "evaluation.attacks=nominal,pgd2",
)
# As it is but for its images: the small comparison's network is tried, too.
_TINY_BUT_NETWORK = tuple(
  flag for flag in _TINY_FIELDS if not flag.startswith("--config.model.")
)


def _main(mode: str, method: str, folder: str, *fields: str) -> tuple[str, ...]:
  return (
    *("main.py", f"--mode={mode}", f"{CONFIG}:{method},modern"),
    f"--workdir={{run}}/{folder}",
    *_fields("data.dir={data}", *fields),
  )


def _sweep() -> tuple[Step, ...]:
  evaluation = (
    "evaluation.attacks=nominal,pgd20,autoattack",
    "evaluation.num_examples=1000",
    "evaluation.batch_norm=('running',)",
    "train.num_epochs=15",
    "train.validate_every_epochs=3.0",
  )
  steps = [
    Step(
      "standard",
      (*_main("run", "standard", "standard", *evaluation), *_PREACT_FIELDS),
      dry=_TINY_FIELDS,
      leaves="{run}/standard/checkpoints",
    )
  ]
  for lambda1, lambda2, p in (
    (1.0, 0.1, 2),
    (0.0, 0.0, 2),
    (1.0, 0.0, 2),
    (0.0, 0.1, 2),
    (4.0, 0.1, 2),
    (0.25, 0.1, 2),
    (1.0, 0.5, 2),
    (1.0, 0.1, 1),
    (0.25, 0.1, 1),
  ):
    name = f"l1_{lambda1:g}-l2_{lambda2:g}-p_{p}"
    fields = (
      "teacher_workdir={run}/standard",
      f"objective.lambda1={lambda1}",
      f"objective.lambda2={lambda2}",
      f"objective.p={p}",
    )
    steps.append(
      Step(
        name,
        (*_main("run", "atat", name, *evaluation, *fields), *_PREACT_FIELDS),
        dry=(*_TINY_FIELDS, "--config.objective.num_steps=1")
        if (lambda1, lambda2, p) in ((0.0, 0.1, 2), (1.0, 0.1, 1))
        else None,
      )
    )
  return tuple(steps)


def _fast() -> tuple[Step, ...]:
  steps = []
  for num_steps, step_size, epochs in (
    (2, 6 / 255, 10),
    (2, 6 / 255, 16),
    (3, 4 / 255, 20),
    (2, 6 / 255, 6),
  ):
    name = f"at-pgd{num_steps}-{epochs}_epochs"
    fields = (
      f"objective.num_steps={num_steps}",
      f"objective.step_size={step_size:.6f}",
      f"train.num_epochs={epochs}",
      f"train.validate_every_epochs={float(epochs)}",
      "train.batch_size=256",
      "train.learning_rate=0.3",
      "evaluation.attacks=nominal,pgd20",
      "evaluation.batch_norm=('running',)",
    )
    for mode in ("train", "evaluate"):
      steps.append(
        Step(
          f"{name}-{mode}",
          (*_main(mode, "at", name, *fields), *_PREACT_FIELDS),
          dry=(*_TINY_BUT_NETWORK, "--config.objective.num_steps=1")
          if (num_steps, epochs) == (2, 10)
          else None,
          leaves=f"{{run}}/{name}/checkpoints" if mode == "train" else "",
        )
      )
  return tuple(steps)


def _autoattack() -> tuple[Step, ...]:
  fields = (
    "model.depth=28",
    "model.dtype=bfloat16",
    "objective.num_steps=3",
    f"objective.step_size={4 / 255:.6f}",
    "train.num_epochs=5",
    "train.validate_every_epochs=1.0",
    "evaluation.attacks=nominal,autoattack",
    "evaluation.num_examples=1000",
    "evaluation.batch_norm=('running',)",
  )
  tiny = (*_TINY_FIELDS, "--config.objective.num_steps=1")
  result = "{run}/autoattack.json"
  return (
    Step(
      "train",
      _main("train", "at", "at", *fields),
      dry=tiny,
      leaves="{run}/at/checkpoints",
    ),
    Step(
      "compare",
      (
        *("benchmarks/autoattack.py", "--reference={reference}"),
        *("--workdir=at={run}/at", "--data_dir={data}"),
        *("--num_examples=1000", "--batch_size=500", f"--out={result}"),
      ),
      dry=(
        *("--num_examples=4", "--batch_size=4", "--num_steps=2"),
        "--num_queries=4",
      ),
      # Without PyTorch or the original: our side alone.
      instead=Step("compare", _main("evaluate", "at", "at", *fields), dry=tiny),
      result=result,
    ),
  )


ENTRIES: dict[str, Entry] = {
  "a": Entry(
    "Step benchmark",
    "images/s, ms, TFLOP/s and MFU of the fused step, beside the same step in"
    " PyTorch (compiled, bf16 autocast, channels-last); top ten kernels of the"
    " best case",
    55,
    "bf16 MFU >= 45 % on WRN-28-10, >= 1.3 times PyTorch",
    _step_cases(),
    data="",
  ),
  "b": Entry(
    "AutoAttack benchmark",
    "`standard` on 1,000 images, WRN-28-10 (trained for 5 epochs), against the"
    " original package",
    15,
    "robust accuracy equal to 0.5 points, >= 2 times as fast",
    _autoattack(),
  ),
  "c": Entry(
    "CIFAR-10 comparison, small",
    "standard, at, alp, tla, trades, atat: PreActResNet-18, 30 epochs one-cycle,"
    " bf16, one recipe and seed",
    25,
    "at about 50 % under PGD-20 and 46 % under AutoAttack; atat not far from it",
    _methods(
      "configs/cifar10.py",
      SMALL_METHODS,
      30,
      (*PREACT, "--set=train.validate_every_epochs=2.0"),
      dry=SMALL_METHODS,
    ),
  ),
  "d": Entry(
    "CIFAR-10, paper size",
    "WRN-32-10: teacher and atat in one window, at in another; 15 epochs, PGD-7",
    45,
    "over 50 % under PGD-20; the paper's 63.81 % is of batch statistics",
    _methods(
      "configs/cifar10.py",
      ("standard", "atat", "at"),
      15,
      attacked=("--set=objective.num_steps=7",),
    ),
  ),
  "e": Entry(
    "lambda and p sweep",
    "which settings of Eq. (7) help under AutoAttack: 9 settings,"
    " PreActResNet-18, 15 epochs",
    25,
    "differences of 1 to 2 points: near the standard error of 1,000 images,"
    " 1.6 points",
    _sweep(),
  ),
  "f": Entry(
    "Time to robustness",
    "least wall time, start and compilation included, to 50 % under PGD-20",
    8,
    "under 2 minutes",
    _fast(),
  ),
  "g": Entry(
    "CIFAR-100 comparison, small",
    "as c; the prepared copy has 5,000 training images, so 60 epochs of them",
    15,
    "low accuracies: a tenth of the data; the order of the methods counts",
    _methods(
      "configs/cifar100.py",
      SMALL_METHODS,
      60,
      (*PREACT, "--set=train.validate_every_epochs=4.0"),
    ),
    data="cifar100",
  ),
}
