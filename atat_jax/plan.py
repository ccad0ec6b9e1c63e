"""Plan of a run: typed, checked and frozen; it knows no configuration.

`config.make_plan` turns a configuration into a plan. Each value is checked by
the dataclass that holds it, before data are loaded or anything is compiled.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from atat_jax import (
  analyses,
  attention,
  checks,
  data,
  evaluation,
  fields,
  optim,
)
from atat_jax.data import mixing
from atat_jax.data.corruptions.published import Published
from atat_jax.errors import UserError, in_section
from atat_jax.evaluation import Protocol, corrupted
from atat_jax.evaluation.protocols import REFILLED
from atat_jax.objectives import Objective
from atat_jax.runs import roles
from atat_jax.training import gradients
from atat_jax.training.options import POLICIES, Options
from atat_jax.typing import BatchNormMode

_MOST_PARAMETERS = 10**10
"""40 GB of weights, and as much momentum: no device holds more."""


def check_seed(name: str, seed: int) -> None:
  """Checks that a seed is a non-negative 32-bit integer.

  Args:
    name: Name of the field, for the message.
    seed: The seed.

  Raises:
    UserError: The seed is out of range.
  """
  if not 0 <= seed < 2**31:
    raise UserError(f"{name}: {seed}; allowed: 0 to {2**31 - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlan:
  """Data set, its location, and the images that a training batch is made of.

  Attributes:
    name: Name in `data.DATASETS`, maybe with a colon and more.
    dir: Directory or file that holds the data; None: the usual place.
    cache_dir: Directory of decoded copies; None: the user's cache.
    source: Format that is read: "auto", or one that the data set knows.
    size: Side in pixels to which pictures are resized and cropped, where the
      data set allows it; 0: they keep their size.
    validation_size: Number of training images held out for validation.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether training images are mirrored at random.
    mix: Name in `mixing.MIXES`.
    mix_alpha: Parameter of the Beta distribution of the mixing ratio.
    extra: File or directory of extra training images, or None.
    extra_fraction: Share of extra images in a batch, where there are any.
    stream: Whether pictures stay on the disk and are read as they are needed;
      the next five fields are about them.
    workers: Processes that read ahead; 0: threads.
    prefetch: Number of batches that are read ahead.
    smallest_crop: Smallest share of a picture that a random crop has; 1: no
      random crop.
    rand_augment: Magnitude of RandAugment on training pictures; 0: none.
    shard_size: Number of test images in memory at a time.
  """

  name: str
  dir: str | None
  cache_dir: str | None
  source: str
  size: int
  validation_size: int
  padding: int
  flip: bool
  mix: str
  mix_alpha: float
  extra: str | None
  extra_fraction: float
  stream: bool = False
  workers: int = 0
  prefetch: int = 2
  smallest_crop: float = 0.08
  rand_augment: float = 0.0
  shard_size: int = 1000

  def __post_init__(self) -> None:
    """Checks every field that can be checked without reading data."""
    fields.check_values(type(self), vars(self), bits=False)
    data.check_name(self.name)
    data.Streaming(**self._reading())
    if self.stream and self.extra:
      raise UserError(f"extra: {self.extra!r} with stream=True; allowed: None")
    checks.positive("validation_size", self.validation_size, integer=True)
    checks.integer("size", self.size, 0, data.LARGEST_SIDE)
    largest = min(self.spec.image_shape[:2])
    if not 0 <= self.padding <= largest:
      raise UserError(
        f"padding: {self.padding}; allowed: 0 to {largest}, the images' side"
      )
    mixing.check(self.mix, self.mix_alpha)
    if not 0 < self.extra_fraction < 1:
      raise UserError(
        f"extra_fraction: {self.extra_fraction}; allowed: between 0 and 1"
      )

  def _reading(self) -> dict[str, Any]:
    """Arguments of `data.Streaming`."""
    return {
      "workers": self.workers,
      "prefetch": self.prefetch,
      "smallest_crop": self.smallest_crop,
      "rand_augment": self.rand_augment,
      "shard_size": self.shard_size,
    }

  @property
  def streaming(self) -> data.Streaming | None:
    """Options of reading pictures on the disk; None: all are read at once."""
    return data.Streaming(**self._reading()) if self.stream else None

  @functools.cached_property
  def spec(self) -> data.DatasetSpec:
    """Description of the data set, which some are read for, once."""
    where = {"data_dir": self.dir, "cache_dir": self.cache_dir}
    try:
      return data.spec(
        self.name,
        **where,
        source=self.source,
        size=self.size,
        streaming=self.streaming,
      )
    except UserError as error:
      # The field has a shorter name than the argument.
      raise UserError(str(error).removeprefix("data_")) from None

  def load(self) -> data.Dataset:
    """Loads the data set.

    Raises:
      UserError: The data are missing or damaged.
    """
    return data.load(
      self.name,
      data_dir=self.dir,
      cache_dir=self.cache_dir,
      validation_size=self.validation_size,
      source=self.source,
      size=self.size,
      streaming=self.streaming,
    )

  def open_extra(self) -> data.Extra | None:
    """Opens the extra images; None where the plan has none.

    Raises:
      UserError: The images are missing, damaged or of another kind.
    """
    if not self.extra:
      return None
    return data.extra.read(self.extra, self.spec, cache_dir=self.cache_dir)

  def num_extra(self, batch_size: int) -> int:
    """Number of extra images in a batch.

    Args:
      batch_size: Size of the whole batch.

    Raises:
      UserError: The batch is too small to hold both kinds of images.
    """
    if not self.extra:
      return 0
    number = round(self.extra_fraction * batch_size)
    if not 0 < number < batch_size:
      raise UserError(
        f"batch_size: {batch_size}; allowed: large enough for both kinds of"
        f" images, with data.extra_fraction = {self.extra_fraction}"
      )
    return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
  """One network to train. Times are shares of the run until its length is known.

  Attributes:
    name: Role of the network: "teacher", "student", or the method of a run
      that has no teacher.
    section: Section of the configuration that holds its numbers, for messages.
    directory: Directory of its files, relative to the working directory or
      absolute.
    objective: Objective that is minimised.
    seed: Seed for this stage's initial weights, batches and attacks.
    num_extra: Number of extra images in a batch.
    mix: Name in `mixing.MIXES`.
    mix_alpha: Parameter of the Beta distribution of the mixing ratio.
    num_epochs: Number of epochs.
    batch_size: Number of images in a batch, extra images included.
    schedule: Name in `optim.SCHEDULES`.
    learning_rate: Highest learning rate.
    boundaries: Schedule "piecewise": shares of the run at which the rate falls.
    factor: Schedule "piecewise": factor of each fall.
    warmup_fraction: Schedules "cosine", "one_cycle" and "triangular": share of
      the run in which the rate rises.
    momentum: Momentum of SGD, or decay of AdamW's first moment.
    nesterov: Whether the momentum is Nesterov's.
    weight_decay: Weight decay of the kernels.
    optimizer: Name in `optim.OPTIMIZERS`.
    second_momentum: Decay of AdamW's second moment.
    clip_norm: Largest norm of the gradient; 0: no clipping.
    accumulate_steps: Number of parts of a batch that are computed in turn.
    remat: Whether cheap results are recomputed rather than kept.
    label_smoothing: Share of every target spread over all classes.
    epsilon_warmup: Share of the run in which the attack's radius rises from 0.
    awp_gamma: Size of the adversarial weight perturbation; 0: none.
    awp_start: Share of the run before the first perturbation.
    ema_decay: Decay of the exponential moving average of the weights; 0: none.
    swa_start: Share of the run before the equal average of the weights; 0: no
      such average.
    statistics_batches: Number of batches that estimate the BatchNorm statistics
      of averaged weights; 0: the statistics are averaged like the weights.
    log_every_steps: Number of steps between log lines.
    steps_per_dispatch: Number of steps in one program.
    validate_every_epochs: Number of epochs between validations.
    nonfinite: Policy on a step that is not finite, one of `options.POLICIES`.
    term_gradients: Whether validations compare the gradients of the loss's
      terms.
    overfitting_alarm: Whether validations also measure a single step, to find
      catastrophic overfitting.
  """

  name: str
  section: str
  directory: pathlib.Path
  objective: Objective
  seed: int
  num_extra: int
  mix: str
  mix_alpha: float
  num_epochs: int
  batch_size: int
  schedule: str
  learning_rate: float
  boundaries: tuple[float, ...]
  factor: float
  warmup_fraction: float
  momentum: float
  nesterov: bool
  weight_decay: float
  clip_norm: float
  accumulate_steps: int
  remat: bool
  label_smoothing: float
  epsilon_warmup: float
  awp_gamma: float
  awp_start: float
  ema_decay: float
  swa_start: float
  statistics_batches: int
  log_every_steps: int
  steps_per_dispatch: int
  validate_every_epochs: float
  optimizer: str = "sgd"
  second_momentum: float = 0.999
  nonfinite: str = "stop"
  term_gradients: bool = True
  overfitting_alarm: bool = True

  def __post_init__(self) -> None:
    """Checks all numbers, also those that the optimizer is made of."""
    fields.check_values(type(self), vars(self), bits=False)
    for field in (
      "num_epochs",
      "batch_size",
      "log_every_steps",
      "steps_per_dispatch",
    ):
      checks.positive(field, getattr(self, field), integer=True)
    checks.positive("validate_every_epochs", self.validate_every_epochs)
    if not all(0 < share < 1 for share in self.boundaries):
      raise UserError(
        f"boundaries: {self.boundaries}; allowed: shares of the run between 0"
        " and 1"
      )
    for field in ("epsilon_warmup", "awp_start", "swa_start"):
      share = getattr(self, field)
      if not 0 <= share < 1:
        raise UserError(
          f"{field}: {share}; allowed: a share of the run, [0, 1)"
        )
    checks.choice("nonfinite", self.nonfinite, POLICIES)
    any_length = 1_000_000  # the number of steps is not known before the data
    self.make_optimizer(any_length)
    self.make_options(any_length)
    if self.batch_size % self.accumulate_steps:
      raise UserError(
        f"accumulate_steps: {self.accumulate_steps}; allowed: a divisor of"
        f" batch_size, {self.batch_size}"
      )

  @property
  def compares_terms(self) -> bool:
    """Whether there are terms of the loss to compare, and they are asked for."""
    return self.term_gradients and gradients.compares_terms(self.objective)

  def make_optimizer(
    self, total_steps: int
  ) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Makes the learning-rate schedule and the optimizer.

    Args:
      total_steps: Number of steps of the run.

    Raises:
      UserError: A number is out of range.
    """
    schedule = optim.make_schedule(
      self.schedule,
      learning_rate=self.learning_rate,
      total_steps=total_steps,
      boundaries=sorted(
        {max(1, round(share * total_steps)) for share in self.boundaries}
      ),
      factor=self.factor,
      warmup_fraction=self.warmup_fraction,
    )
    return schedule, optim.make_optimizer(
      schedule,
      momentum=self.momentum,
      nesterov=self.nesterov,
      weight_decay=self.weight_decay,
      clip_norm=self.clip_norm,
      name=self.optimizer,
      second_momentum=self.second_momentum,
    )

  def make_options(self, total_steps: int) -> Options:
    """Makes the options of the train step, with times in steps.

    Args:
      total_steps: Number of steps of the run.

    Raises:
      UserError: A number is out of range, or two options exclude each other.
    """

    def steps(share: float) -> int:
      # 0 steps would turn the option off.
      return max(1, round(share * total_steps)) if share else 0

    return Options(
      awp_gamma=self.awp_gamma,
      awp_start=steps(self.awp_start),
      ema_decay=self.ema_decay,
      swa_start=steps(self.swa_start),
      statistics_batches=self.statistics_batches,
      label_smoothing=self.label_smoothing,
      epsilon_warmup=steps(self.epsilon_warmup),
      accumulate_steps=self.accumulate_steps,
      remat=self.remat,
      mix=self.mix,
      mix_alpha=self.mix_alpha,
      skips_nonfinite=self.nonfinite == "skip",
      leaves_steps_out=self.nonfinite == "rollback",
    )


def _meaning(protocol: Protocol) -> Protocol:
  """Returns what protocols of different names share if they measure one."""
  options = tuple(sorted(protocol.options))
  return dataclasses.replace(protocol, name="", options=options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
  """Attacks that validate and evaluate a run.

  Attributes:
    validation: Protocol that chooses checkpoints, on the validation split.
    protocols: Protocols of the table, on the test split.
    batch_norm: BatchNorm modes of the table: "running", "batch".
    batch_size: Number of images in a batch.
    batch_statistics_size: Number of images in a batch in the mode "batch".
    num_examples: Number of test images, from the first on; 0: all of them.
    seed: Seed of the attacks.
    teacher: Whether the teacher is evaluated beside the student.
    corruptions: Corrupted test images of the table: "generated", the folder of
      CIFAR-10-C or of a set like it, or "" for none.
  """

  validation: Protocol
  protocols: tuple[Protocol, ...]
  batch_norm: tuple[BatchNormMode, ...]
  batch_size: int
  batch_statistics_size: int
  num_examples: int
  seed: int
  teacher: bool = True
  corruptions: str = ""

  def __post_init__(self) -> None:
    """Checks all numbers."""
    fields.check_values(type(self), vars(self), bits=False)
    check_seed("seed", self.seed)
    for field in ("batch_size", "batch_statistics_size"):
      checks.positive(field, getattr(self, field), integer=True)
    if self.num_examples < 0:
      raise UserError(f"num_examples: {self.num_examples}; allowed: >= 0")
    if not self.batch_norm:
      raise UserError("batch_norm: (); allowed: running, batch")
    for mode in self.batch_norm:
      checks.choice("batch_norm", mode, ("running", "batch"))
    if not self.validation.measures("running"):
      raise UserError(
        f"validation_attack: {self.validation.name!r}; allowed: without"
        " statistics=fixed, as validation has running statistics"
      )
    self._check_modes()

  def _check_modes(self) -> None:
    """Checks that every protocol is measured in some mode."""
    for protocol in self.protocols:
      if any(map(protocol.measures, self.batch_norm)):
        continue
      if protocol.fixed_statistics:
        raise UserError(
          f"attacks: {protocol.name!r} with batch_norm running; allowed: with"
          " batch statistics, which it holds fixed"
        )
      raise UserError(f"attacks: {protocol.name!r} {REFILLED}")

  def protocols_of(self, mode: str) -> tuple[Protocol, ...]:
    """Protocols that are measured in a BatchNorm mode.

    Args:
      mode: "running" or "batch".

    Returns:
      Those of the table that the mode can measure. In the mode "batch" every
      cross-entropy FGSM, I-FGSM and PGD is followed by the same with fixed
      statistics and with the margin loss, each once.
    """
    measured = [one for one in self.protocols if one.measures(mode)]
    if mode == "running":
      return tuple(measured)
    listed = {_meaning(one): one for one in measured}
    found: dict[str, Protocol] = {}
    for protocol in measured:
      found.setdefault(protocol.name, protocol)
      for companion in protocol.companions():
        one = listed.setdefault(_meaning(companion), companion)
        found.setdefault(one.name, one)
    return tuple(found.values())

  @property
  def single_step(self) -> Protocol | None:
    """One step of the validation's radius from the clean image, FGSM in linf.

    None where the validation attack is no more than that, so that a comparison
    would show nothing.
    """
    attack = self.validation
    if attack.epsilon is None or attack.norm is None or attack.num_steps == 1:
      return None
    return evaluation.parse(
      "pgd1:random_start=false",
      epsilon=attack.epsilon,
      step_size=attack.epsilon,
      norm=attack.norm,
    )

  def size_of_batch(self, mode: str) -> int:
    """Number of images in a batch in a BatchNorm mode."""
    return self.batch_statistics_size if mode == "batch" else self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Everything that a run does, checked before any of it is done.

  Attributes:
    data: Data set and augmentation.
    model: Network; all networks of a run have the same architecture.
    model_spec: The network as JSON (`checkpoints.model_spec`).
    stages: Networks to train, in order; the last one is the run's own.
    teacher: Directory of the teacher, relative to the working directory or
      absolute; None: the method has no teacher.
    evaluation: Attacks that validate and evaluate the run.
    figures: Numbers of the analyses.
    profile_steps: First and last step of the profile, from 1; (): no profile.
    record: Configuration that the plan was made from, as plain JSON.
    model_axis: Number of devices that share the large arrays of a training
      state.
  """

  data: DataPlan
  model: nn.Module
  model_spec: dict[str, Any]
  stages: tuple[StagePlan, ...]
  teacher: pathlib.Path | None
  evaluation: EvaluationPlan
  figures: analyses.FigureSettings
  profile_steps: tuple[int, ...]
  record: dict[str, Any]
  model_axis: int = 1

  def __post_init__(self) -> None:
    """Checks the profile, and that the objective's layers exist."""
    steps = self.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
      raise UserError(
        f"profile_steps: {steps}; allowed: (), or a first and a last step, from"
        " 1"
      )
    checks.positive("model_axis", self.model_axis, integer=True)
    single = getattr(self.objective, "takes_single_step", False)
    if single and self.evaluation.single_step is None:
      raise UserError(
        f"evaluation.validation_attack: {self.evaluation.validation.name!r};"
        " allowed: of several steps where objective.attack_method has one, as"
        " it chooses the checkpoint (pgd10)"
      )
    self._check_shards()
    _check_network(self.model, self.data.spec)
    layers = getattr(self.objective, "layers", ())
    layer = getattr(self.objective, "layer", "")
    if layers or layer:
      images = jnp.zeros((1, *self.data.spec.image_shape))
      variables = jax.eval_shape(self.model.init, jax.random.key(0), images)
      names = attention.layer_names(self.model, variables, images)
      try:
        attention.check_layers(layers or (layer,), names)
      except UserError as error:
        field = "layers" if layers else "layer"
        rest = str(error).removeprefix("layers")
        raise UserError(f"objective.{field}{rest}") from None

  def _check_shards(self) -> None:
    """Checks that streamed test images divide into whole batches."""
    if not self.data.stream:
      return
    for mode in self.evaluation.batch_norm:
      size = self.evaluation.size_of_batch(mode)
      if self.data.shard_size % size:
        raise UserError(
          f"data.shard_size: {self.data.shard_size}; allowed: multiples of"
          f" {size}, the images in a batch of the evaluation"
        )

  @property
  def objective(self) -> Objective:
    """Objective of the run's own network."""
    return self.stages[-1].objective

  @property
  def networks(self) -> dict[str, pathlib.Path]:
    """Role of each network of the run to its directory, the teacher first."""
    teacher = {} if self.teacher is None else {roles.TEACHER: self.teacher}
    last = self.stages[-1]
    return {**teacher, last.name: last.directory}

  def open_corruptions(self) -> Published | None:
    """Opens the corrupted test images; None where no folder holds them.

    Raises:
      UserError: They are missing, damaged or of another kind.
    """
    with in_section("evaluation"):
      return corrupted.open_source(
        self.evaluation.corruptions,
        dataset=self.data.spec.name,
        image_shape=self.data.spec.image_shape,
        num_classes=self.data.spec.num_classes,
      )

  @property
  def evaluated(self) -> tuple[str, ...]:
    """Roles of the networks that are evaluated and explained."""
    last = self.stages[-1].name
    return tuple(self.networks) if self.evaluation.teacher else (last,)


@functools.lru_cache(maxsize=16)  # tracing a deep network takes a second
def _check_network(model: nn.Module, spec: data.DatasetSpec) -> None:
  """Checks, without computing anything, that a network takes the images.

  Raises:
    UserError: It cannot be built, is too large, or gives other logits.
  """
  images = jax.ShapeDtypeStruct((2, *spec.image_shape), jnp.float32)
  try:
    logits, variables = jax.eval_shape(
      model.init_with_output, jax.random.key(0), images
    )
  except UserError as error:
    raise UserError(f"model: {error}") from None
  except Exception as error:  # whatever a library says of impossible sizes
    reason = " ".join(str(error).split())[:200]
    raise UserError(
      f"model: {type(model).__name__} cannot be built ({reason}); allowed: a"
      " network that fits the images"
    ) from None
  if logits.shape != (2, spec.num_classes):
    raise UserError(
      f"model: logits {logits.shape}; allowed: [2, {spec.num_classes}] for 2"
      " images"
    )
  parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
  if parameters > _MOST_PARAMETERS:
    raise UserError(
      f"model: {parameters:.3g} parameters; allowed: at most"
      f" {_MOST_PARAMETERS:.0e}"
    )
