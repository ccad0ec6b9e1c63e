"""Options of the train step, for every objective; all off by default.

Times are steps of the run, counted from 0. Each option is described where it is
implemented: `batch` (label smoothing, mixing, the attack's warm-up), `awp`,
`accumulation`, `averaging`. `docs/training.md` lists them all.
"""

import dataclasses

from atat_jax import checks, fields
from atat_jax.data import mixing
from atat_jax.errors import UserError

POLICIES = ("stop", "skip", "rollback")
"""Policies on a step that is not finite (`training.soundness`)."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the train step, static: an option that is off costs nothing.

  Attributes:
    awp_gamma: Size of the adversarial weight perturbation, relative to the
      norm of each tensor; 0: none.
    awp_start: First step with a weight perturbation.
    ema_decay: Decay of the exponential moving average of the weights; 0: none.
    swa_start: First step whose weights enter the equal average; 0: none.
    statistics_batches: Number of batches that estimate the statistics of the
      averaged weights; 0: statistics are averaged like the weights.
    label_smoothing: Share of every target that is spread over all classes.
    epsilon_warmup: Number of steps in which the attack's epsilon rises from 0.
    accumulate_steps: Number of parts in which a batch is computed, one after
      another.
    remat: Whether the student's backward pass keeps only the results of
      convolutions and matrix products and recomputes the rest, to save memory.
    mix: Mixing of images, one of `mixing.MIXES`.
    mix_alpha: Parameter of the Beta distribution of the mixing weight.
    skips_nonfinite: Whether a step that is not finite changes nothing.
    leaves_steps_out: Whether the host can have steps change nothing.
  """

  awp_gamma: float = 0.0
  awp_start: int = 0
  ema_decay: float = 0.0
  swa_start: int = 0
  statistics_batches: int = 0
  label_smoothing: float = 0.0
  epsilon_warmup: int = 0
  accumulate_steps: int = 1
  remat: bool = False
  mix: str = "none"
  mix_alpha: float = 1.0
  skips_nonfinite: bool = False
  leaves_steps_out: bool = False

  def __post_init__(self) -> None:
    """Refuses values out of range and options that exclude each other."""
    fields.check_values(type(self), vars(self), bits=False)
    checks.not_negative("awp_gamma", self.awp_gamma)
    for name in ("ema_decay", "label_smoothing"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"{name}: {getattr(self, name)}; allowed: [0, 1)")
    for name in (
      "awp_start",
      "swa_start",
      "statistics_batches",
      "epsilon_warmup",
    ):
      checks.not_negative(name, getattr(self, name))
    checks.positive("accumulate_steps", self.accumulate_steps, integer=True)
    if self.ema_decay and self.swa_start:
      raise UserError(
        f"ema_decay: {self.ema_decay} with swa_start; allowed: one average,"
        " the other one 0"
      )
    if self.swa_start and not self.statistics_batches:
      raise UserError(
        "statistics_batches: 0; allowed: > 0 with swa_start (50 will do), as"
        " an average of far apart weights has statistics of its own"
      )
    mixing.check(self.mix, self.mix_alpha)

  @property
  def guards(self) -> bool:
    """Whether steps can be left out."""
    return self.skips_nonfinite or self.leaves_steps_out

  @property
  def averages(self) -> bool:
    """Whether averaged weights are kept beside the trained ones."""
    return bool(self.ema_decay or self.swa_start)

  @property
  def estimates(self) -> bool:
    """Whether the statistics of the averaged weights are estimated."""
    return self.averages and bool(self.statistics_batches)


OFF = Options()
"""All options off."""
