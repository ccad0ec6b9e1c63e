"""Which accuracies may be compared: those that answer the same question.

One attack is stronger than another only if it leaves less of the same images,
in the same ball, of the same classifier. Runs are often evaluated in parts (a
slow attack on the first images, another radius), so whatever names the
strongest attack, or the weakest method, does so within one group of these, and
says what it leaves out.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from atat_jax.runs import tables

T = TypeVar("T")


class Question(NamedTuple):
  """Images, ball and classifier of an accuracy; equal for comparable rows.

  Attributes:
    dataset: Name of the data set.
    split: Name of the split.
    num_examples: Number of images, from the first on.
    norm: Norm of the ball.
    epsilon: Radius, to six digits, as files may round it.
    checkpoint_step: Step of the checkpoint, where it is known.
  """

  dataset: str | None
  split: str | None
  num_examples: int
  norm: str | None
  epsilon: float | None
  checkpoint_step: int | None

  def on_same_images(self, other: "Question") -> bool:
    """Whether both are about the same images and the same classifier."""
    ball = {"norm": None, "epsilon": None}
    return self._replace(**ball) == other._replace(**ball)  # type: ignore[arg-type]

  def describe(self) -> str:
    """Returns images and ball in words."""
    images = f"{self.dataset} {self.split} images".replace("None ", "")
    count = f"{self.num_examples:,} {images}"
    if self.norm is None:
      return count
    radius = tables.exact_pixels(self.epsilon)
    return f"{count} ({self.norm}, epsilon {radius})"


def question(row: Mapping[str, Any]) -> Question:
  """Returns the question that a row of `results.json` answers."""
  epsilon = row.get("epsilon")
  return Question(
    dataset=row.get("dataset"),
    split=row.get("split"),
    num_examples=row["num_examples"],
    norm=row.get("norm"),
    epsilon=None if epsilon is None else float(f"{epsilon:.6g}"),
    checkpoint_step=row.get("checkpoint_step"),
  )


def grouped(
  found: Iterable[T],
  key: Callable[[T], Hashable],
  num_examples: Callable[[T], int],
) -> list[list[T]]:
  """Groups what is comparable: the most images first, then the most members.

  Args:
    found: Rows or columns.
    key: One of them to what must be the same.
    num_examples: One of them to its number of images.

  Returns:
    Groups; equally large ones in order of appearance.
  """
  groups: dict[Hashable, list[T]] = {}
  for one in found:
    groups.setdefault(key(one), []).append(one)
  return sorted(
    groups.values(), key=lambda group: (-num_examples(group[0]), -len(group))
  )


class Attacks(NamedTuple):
  """Attacks that answer one question.

  Attributes:
    question: Images and ball.
    columns: Their results.
    strongest: The one that leaves the least accuracy.
    worst_case: The worst case over them, image by image, where which images
      they leave is known of at least two.
  """

  question: Question
  columns: list[tables.Column]
  strongest: tables.Column
  worst_case: tables.Column | None


def attacks(
  columns: Sequence[tables.Column], model: str, batch_norm: str = "running"
) -> list[Attacks]:
  """Groups the attacks on one classifier by the question that they answer.

  Args:
    columns: Columns of a table; clean images are left out, and a worst case is
      no attack.
    model: Name of the model.
    batch_norm: BatchNorm mode.

  Returns:
    Groups, that of the most images, then of the most attacks, first.
  """
  pair = model, batch_norm

  def own(column: tables.Column) -> tables.Row:
    return column.rows[pair]

  present = [column for column in columns if pair in column.rows]
  worst = [column for column in present if column.derived]

  def made(group: list[tables.Column]) -> Attacks:
    asked = question(own(group[0]))
    found = [column for column in worst if question(own(column)) == asked]
    least = [
      min(some, key=lambda column: own(column)["accuracy"], default=None)
      for some in (group, found)
    ]
    return Attacks(asked, group, *least)  # type: ignore[arg-type]

  return [
    made(group)
    for group in grouped(
      (c for c in present if not c.nominal and not c.derived),
      lambda column: question(own(column)),
      lambda column: own(column)["num_examples"],
    )
  ]


def clean(
  columns: Sequence[tables.Column],
  model: str,
  asked: Question | None = None,
  batch_norm: str = "running",
) -> tables.Column | None:
  """Returns the clean accuracies of the images of a question.

  Args:
    columns: Columns of a table.
    model: Name of the model.
    asked: The question; None: that of the most images.
    batch_norm: BatchNorm mode.

  Returns:
    A column, or None where they were not measured on these images.
  """
  pair = model, batch_norm
  found = [c for c in columns if c.nominal and pair in c.rows]
  if asked is None:
    return max(found, key=lambda c: c.rows[pair]["num_examples"], default=None)
  return next(
    (c for c in found if asked.on_same_images(question(c.rows[pair]))), None
  )


def left_out(
  others: Sequence[tuple[Question, str, str]], subject: str = ""
) -> str:
  """Says which accuracies are not compared with the ones told, and why.

  Args:
    others: Question, name of its strongest attack, and what that leaves, for
      each group.
    subject: The classifier or methods, in words.

  Returns:
    One sentence; "" if there are none.
  """
  if not others:
    return ""
  parts = "; ".join(
    f"on {asked.describe()} {name} leaves{subject} {accuracy}"
    for asked, name, accuracy in others
  )
  return (
    "Not compared with these, as other images, another ball or another"
    f" checkpoint is another question: {parts}."
  )


def note(columns: Sequence[tables.Column]) -> str:
  """Says which columns of a table may be compared, "" where all may.

  Args:
    columns: Columns of a table.
  """
  asked: dict[Question, list[str]] = {}
  for column in columns:
    if not column.nominal:
      key = question(column.protocol)._replace(checkpoint_step=None)
      asked.setdefault(key, []).append(column.label)
  if len(asked) < 2:
    return ""
  parts = "; ".join(
    f"{', '.join(labels)} on {key.describe()}" for key, labels in asked.items()
  )
  return (
    "Accuracies can be compared on the same images and in the same ball only:"
    f" {parts}."
  )
