"""scikit-learn's handwritten digits: real data, no download, minutes on a CPU.

  python main.py --config=configs/digits.py --workdir=runs/digits

A teacher and an ATAT student, a WRN-8-2 on 8 x 8 pixels, attacked with
epsilon 0.2 (a fifth of the range from black to white).

After a colon a method, as in configs/digits.py:trades; a name in
`atat_jax.objectives.OBJECTIVES` (default: atat), or a named setting of one, in
`SETTINGS`, such as atat_mixture: the controls of ATAT. All are trained alike; only
those that need a teacher train one.

Expected: three to four minutes on 2 CPU cores with empty caches. Accuracy in %
(running statistics, linf, epsilon 0.2), mean of five seeds and their range; other
machines round otherwise, which moves numbers as another seed does
(docs/results.md, "Over seeds and machines"):

  network               nominal        fgsm           pgd20        pgd20-margin
  teacher           99.2 (99-100)   5.4 (3-9)     0.1 (0-0.3)     0.4 (0-0.8)
  student           96.8 (95-98)   81.5 (79-83)  75.7 (73-78)    73.0 (71-76)

All methods and the controls of ATAT: docs/reproduction.md.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(choice: str = "atat") -> ConfigDict:
  """Returns the default configuration, made small; all methods train alike."""
  config = default.get_config(choice, recipes=("modern",))
  config.data.update(name="digits", validation_size=180, padding=0, flip=False)
  config.model.update(
    depth=8, width=2, strides=(1, 1, 2), normalization="dataset"
  )
  for training in (config.train, config.teacher):
    training.update(
      batch_size=64,
      schedule="one_cycle",
      learning_rate=0.2,
      warmup_fraction=0.25,
      weight_decay=5e-4,
      log_every_steps=19,
      validate_every_epochs=2.0,
    )
  config.teacher.num_epochs = 8
  config.train.num_epochs = 24
  default.update_attack(
    config,
    epsilon=0.2,
    step_size=0.05,
    num_steps=7,
    attack_batch_norm="batch",
    attack_moves_statistics=True,
    student_batch_norm="mixture",
  )
  config.evaluation.update(epsilon=0.2, step_size=0.05, batch_size=360)
  # A few, in seconds; `python -m atat_jax.explain` makes all and larger ones.
  config.figures.update(
    analyses="attention,shift,landscape,steps",
    num_images=6,
    indices=(0, 1),
    num_examples=100,
    num_steps=50,
  )
  if config.method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
