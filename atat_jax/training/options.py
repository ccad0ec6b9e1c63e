"""What any objective can be combined with: data only, everything off.

Times are steps of the run, from 0. What the options do is written where they
are done: `inputs` (label smoothing, mixing, the attack's warm-up), `awp`,
`accumulation`, `averaging`. `docs/training.md` lists them all.
"""

import dataclasses

from atat_jax import checks
from atat_jax.data import mixing
from atat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the train step; hashable, so that what is off costs nothing.

  Attributes:
    awp_gamma: Size of the adversarial weight perturbation, relative to the
      norm of each tensor; 0: none.
    awp_start: The first step that has it.
    ema_decay: Of the exponential moving average of the weights; 0: none.
    swa_start: The first step whose weights enter the equal average; 0: none.
    statistics_batches: Batches that estimate the statistics of averaged
      weights; 0: statistics are averaged as the weights are.
    label_smoothing: Share of every target spread over all classes.
    epsilon_warmup: Steps in which the attack's epsilon rises from 0.
    accumulate_steps: Parts of a batch that are computed one after another.
    remat: Whether the student's backward pass keeps the results of convolutions
      and matrix products only and computes the rest again, for memory.
    mix: One of `mixing.MIXES`.
    mix_alpha: Of its Beta distribution.
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

  def __post_init__(self) -> None:
    """Refuses values out of range, and what does not go together."""
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
  def averages(self) -> bool:
    """Whether there are averaged weights beside the trained ones."""
    return bool(self.ema_decay or self.swa_start)

  @property
  def estimates(self) -> bool:
    """Whether statistics of the averaged weights are estimated."""
    return self.averages and bool(self.statistics_batches)


OFF = Options()
"""No option at all."""
