"""Pointwise worst case: against a plain loop over images, and what it mixes."""

import base64
import json
import random
import re

import numpy as np
import pytest
import run_files
from html_page import Page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atat_jax import evaluation, figures, report
from atat_jax.drawing.text import broken
from atat_jax.errors import DamagedFileError
from atat_jax.report import layout, merge
from atat_jax.runs import comparable, files, results_format, tables, worst_case


def bits(*correct):
  """Bytes made bit by bit, as `correct` is described."""
  padded = [*correct, *[False] * (-len(correct) % 8)]
  whole = [
    int("".join("01"[one] for one in padded[i : i + 8]), 2)
    for i in range(0, len(padded), 8)
  ]
  return base64.b64encode(bytes(whole)).decode()


def row(attack, correct, mode="running", model="student", **changes):
  return run_files.result_row(
    model,
    attack,
    mode,
    sum(correct) / len(correct),
    num_examples=len(correct),
    correct=bits(*correct),
    **changes,
  )


def worst(*rows):
  return [r for r in worst_case.complete(rows) if tables.is_derived(r)]


SLOW = [HealthCheck.too_slow]  # the machine may be busy

CLEAN = row("nominal", [1, 1, 1, 0])
FGSM = row("fgsm", [1, 1, 0, 0])
PGD = row("pgd20", [1, 0, 1, 0])


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_the_worst_case_is_that_of_a_loop_over_images(data):
  count = data.draw(st.integers(1, 30))
  number = data.draw(st.integers(2, 5))
  seeds = data.draw(st.integers(1, 2))
  lists = st.lists(st.booleans(), min_size=count, max_size=count)
  names = ["fgsm", "pgd20", "apgd", "autoattack", "square"][:number]
  rows = [
    row(name, data.draw(lists), seed=seed)
    for name in ["nominal", *names]
    for seed in range(seeds)
  ]
  correct = [
    all(worst_case.unpack(r)[image] for r in rows) for image in range(count)
  ]
  (found,) = worst(*rows)
  assert found["accuracy"] == pytest.approx(sum(correct) / count)
  assert found["accuracy"] <= min(r["accuracy"] for r in rows)
  fooled = sum(1 - r["accuracy"] for r in rows)
  assert found["accuracy"] >= 1 - fooled - 1e-9
  shuffled = data.draw(st.permutations(rows))
  assert worst(*shuffled) == [found]
  assert found["seed"] == (0 if seeds == 1 else None)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
def test_bits_come_back_and_are_as_described(correct):
  text = worst_case.pack(np.array(correct))
  assert text == bits(*correct)
  found = worst_case.unpack({"correct": text, "num_examples": len(correct)})
  assert found.tolist() == correct


def test_a_row_says_what_it_is_over():
  (found,) = worst(PGD, FGSM, CLEAN)
  assert found["attack"] == "worst_case"
  assert found["worst_of"] == "nominal, fgsm, pgd20"
  assert found["accuracy"] == 0.25
  for field in ("model", "dataset", "split", "num_examples", "norm", "seed"):
    assert found[field] == PGD[field]
  assert results_format.fault({"rows": [found]}, tables.SHOWN) == ""
  # The same attack twice is told apart by what differs.
  other = row("pgd20", [1, 1, 1, 1], seed=3, num_restarts=5)
  (found,) = worst(PGD, other, FGSM)
  assert found["worst_of"] == (
    "fgsm, pgd20 (num_restarts=1, seed=0), pgd20 (num_restarts=5, seed=3)"
  )
  assert found["seed"] is None


@pytest.mark.parametrize(
  ("changes", "number"),
  [
    ({"norm": "l2"}, 0),
    ({"epsilon": 16 / 255}, 0),
    ({"split": "validation"}, 0),
    ({"dataset": "cifar10"}, 0),
    ({"checkpoint_step": 7}, 0),
    ({"model": "teacher"}, 0),
    ({"mode": "batch"}, 0),
    ({"seed": 1}, 1),
    ({"step_size": 0.5}, 1),
    ({"batch_size": 7}, 1),
  ],
)
def test_only_what_answers_one_question_is_combined(changes, number):
  assert len(worst(PGD, row("apgd", [1, 1, 1, 1], **changes))) == number
  short = row("fgsm", [1, 1, 0])
  assert worst(PGD, short) == []


def test_batches_of_another_size_are_another_classifier_in_batch_mode():
  rows = [
    row(name, correct, mode="batch", batch_size=size)
    for size in (50, 100)
    for name, correct in (("fgsm", [1, size == 50]), ("pgd20", [1, 1]))
  ]
  assert [(r["batch_size"], r["accuracy"]) for r in worst(*rows)] == [
    (50, 1.0),
    (100, 0.5),
  ]
  text = tables.protocol(tables.columns(worst(*rows))[0])
  assert text.endswith("those of the batch that each attack made")


def test_clean_images_count_only_on_the_same_images():
  right = row("fgsm", [1, 1, 1, 1]), row("pgd20", [1, 1, 1, 1])
  assert worst(CLEAN, *right)[0]["accuracy"] == 0.75
  for other in (
    row("nominal", [0, 0, 0]),
    row("nominal", [0, 0, 0, 0], mode="batch"),
    row("nominal", [0, 0, 0, 0], model="teacher"),
    row("nominal", [0, 0, 0, 0], checkpoint_step=3),
  ):
    assert worst(other, *right)[0]["accuracy"] == 1.0
  assert worst(CLEAN, FGSM) == []  # one attack


def test_rows_of_earlier_versions_take_no_part():
  old = {k: v for k, v in FGSM.items() if k != "correct"}
  assert worst(old, PGD, CLEAN) == []
  (found,) = worst(old, PGD, row("apgd", [1, 1, 1, 1]))
  assert found["worst_of"] == "pgd20, apgd"


def test_a_worst_case_that_a_file_claims_is_not_believed(tmp_path):
  (claimed,) = worst(PGD, FGSM)
  rows = [PGD, {**claimed, "accuracy": 1.0}, FGSM]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  found = files.read_results(tmp_path)["rows"]
  assert found == [PGD, FGSM, claimed]
  alone = [PGD, {**claimed, "accuracy": 1.0}]
  run_files.save(tmp_path, {"format": 1, "rows": alone})
  assert files.read_results(tmp_path)["rows"] == [PGD]


@pytest.mark.parametrize(
  ("correct", "message"),
  [
    (bits(1, 0, 1, 0, 0, 0, 0, 0, 1), "allowed: base64 of 4 bits in 1 bytes"),
    (bits(1, 0, 1, 0, 1), "allowed: base64 of 4 bits in 1 bytes"),
    ("", "allowed: base64 of 4 bits in 1 bytes"),
    ("oA", "allowed: base64 of 4 bits in 1 bytes"),
    ("<b>==", "allowed: base64 of 4 bits in 1 bytes"),
    ("é===", "allowed: base64 of 4 bits in 1 bytes"),
    (3, "correct: 3; allowed: text"),
    (bits(1, 1, 1, 0), "correct: 3 of 4 images, accuracy 0.5; allowed"),
  ],
)
def test_damaged_bits_are_refused_in_one_line(tmp_path, correct, message):
  rows = [FGSM, {**PGD, "correct": correct}]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  with pytest.raises(DamagedFileError, match=message) as error:
    files.read_results(tmp_path)
  assert "row 2: " in str(error.value) and "\n" not in str(error.value)


def test_a_number_of_images_that_no_file_has_takes_no_memory():
  huge = {**PGD, "num_examples": 10**12}
  assert "row 1: correct: " in results_format.fault({"rows": [huge]})


def test_a_worst_case_is_no_attack():
  rows = worst_case.complete([CLEAN, FGSM, PGD])
  (group,) = comparable.attacks(tables.columns(rows), "student")
  assert [c.label for c in group.columns] == ["fgsm", "pgd20"]
  assert group.strongest.label in ("fgsm", "pgd20")
  assert group.worst_case.accuracy("student", "running") == 0.25
  rows = [*rows[:3], {**rows[3], "accuracy": 0.0}]
  assert evaluation.diagnose(rows, "student") == evaluation.diagnose(
    rows[:3], "student"
  )


def test_worst_cases_over_other_attacks_never_share_a_column():
  batch = [row(r["attack"], [1, 1, 1, 1], mode="batch") for r in (FGSM, PGD)]
  restarts = [
    row("fgsm", [1, 1, 1, 1], model="teacher"),
    row("pgd20", [1, 1, 1, 1], model="teacher", num_restarts=5),
  ]
  apgd = row("apgd", [1, 1, 1, 1])

  def labels(*rows):
    found = tables.columns(worst(*rows))
    return [column.label for column in found]

  assert labels(FGSM, PGD, *batch) == ["worst_case"]
  assert labels(FGSM, PGD, apgd, *batch) == [
    "worst_case (3 attacks)",
    "worst_case (2 attacks)",
  ]
  assert labels(FGSM, PGD, *batch, row("nominal", [1, 1, 1, 1])) == [
    "worst_case (2 attacks, with nominal)",
    "worst_case (2 attacks, without nominal)",
  ]
  # On other images there is nothing to tell apart but these.
  short = [row(r["attack"], [1, 1]) for r in (FGSM, PGD)]
  assert labels(FGSM, PGD, apgd, *short) == [
    "worst_case (num_examples=4)",
    "worst_case (num_examples=2)",
  ]
  # The names are the same, the attacks are not.
  assert labels(FGSM, PGD, *restarts) == [
    "worst_case (2 attacks, with pgd20 (num_restarts=1))",
    "worst_case (2 attacks, with pgd20 (num_restarts=5))",
  ]


def test_the_worst_case_comes_last():
  aa = row("autoattack", [1, 0, 0, 0])
  rows = worst_case.complete([PGD, aa, CLEAN, FGSM])
  random.Random(0).shuffle(rows)
  found = tables.in_paper_order(tables.columns(rows))
  assert [column.label for column in found] == [
    "nominal",
    "fgsm",
    "pgd20",
    "autoattack",
    "worst_case",
  ]
  assert json.dumps(worst_case.complete(rows), allow_nan=False)


# --- Shown -------------------------------------------------------------------

RUNS = (
  row("nominal", [1, 1, 1, 0], model="teacher"),
  row("fgsm", [1, 0, 0, 0], model="teacher"),
  row("pgd20", [0, 1, 0, 0], model="teacher"),
  *(CLEAN, FGSM, PGD),
  *(
    row(r["attack"], [1, 1, 1, 1], mode="batch", batch_size=4)
    for r in (CLEAN, FGSM, PGD)
  ),
)


def content(*rows):
  return {"format": 1, "rows": worst_case.complete(rows), "diagnostics": {}}


def test_the_verdict_names_the_strongest_attack_and_the_worst_case():
  text = report.verdict(content(*RUNS))
  assert text.startswith("Under fgsm, the strongest of the 2 attacks run (")
  assert re.search(
    r"In the worst case over all 2 attacks, image by image, the student"
    r" classifies 25\.0% correctly \(95% confidence: 4\.6% to 69\.9%\), 25\.0"
    r" points less than under fgsm alone, the teacher 0\.0%\.",
    text,
  )
  old = {**row("apgd", [1, 1, 1, 0]), "correct": None}
  assert "worst case over 2 of the 3 attacks (of the others" in report.verdict(
    content(*RUNS, old)
  )
  assert "worst case" not in report.verdict(content(CLEAN, FGSM, old))


def test_the_page_the_picture_and_the_printed_table_show_it(tmp_path):
  run_files.save(tmp_path, {"format": 1, "rows": list(RUNS)})
  rows = Page(report.write_report(tmp_path)).rows
  running, batch = (r for r in rows if r[0].startswith("worst_case"))
  assert running[0] == (
    "worst_case derived, image by image: correct under every one of nominal,"
    " fgsm, pgd20; linf, epsilon 8/255"
  )
  assert [cell.split()[0] for cell in running[1:3]] == ["0.00", "25.00"]
  assert "of the batch that each attack made" in batch[0]
  assert running[-1] == batch[-1] == ""  # it takes no time
  text = report.results_table(files.read_results(tmp_path))
  head, _, _, student, *_ = text.splitlines()
  assert head.split("|")[-2].strip() == "worst_case"
  assert student.split("|")[-2].strip() == "25.00"
  assert "worst_case: derived, image by image: correct under every" in text


def write_run(folder, method, rows, seed=0):
  renamed = [{**one, "model": method} for one in rows]
  return run_files.write_run(folder, renamed, method, seed)


def test_a_comparison_merges_and_pairs_worst_cases_by_seed(tmp_path):
  runs = {
    ("at", 0): ([1, 1, 1, 0], [0, 1, 1, 1]),
    ("at", 1): ([1, 1, 0, 0], [0, 1, 1, 1]),
    ("trades", 0): ([1, 1, 0, 0], [0, 0, 1, 1]),
    ("trades", 1): ([1, 1, 0, 0], [1, 0, 1, 1]),
  }
  found = merge.compare(
    [
      write_run(
        tmp_path / f"{method}{seed}",
        method,
        [row("fgsm", fgsm), row("pgd20", pgd)],
        seed,
      )
      for (method, seed), (fgsm, pgd) in runs.items()
    ]
  )
  at, trades = (r for r in found["rows"] if r["attack"] == "worst_case")
  assert at["accuracies"] == {"0": 0.5, "1": 0.25}
  assert trades["accuracies"] == {"0": 0.0, "1": 0.25}
  assert merge.paired_difference(at, trades) == {
    "accuracy": 0.25,
    "standard_error": pytest.approx(np.std([0.5, 0], ddof=1) / 2**0.5),
    "num_runs": 2,
  }
  assert merge.paired_difference(at, {"accuracies": {"2": 0.1}}) is None
  (sentence,) = layout.verdict(found)
  assert "pgd20 (of the attacks" in sentence or "fgsm (of the" in sentence
  assert (
    "In the worst case over 2 attacks, image by image: at 37.50 ± 12.50 %,"
    " trades 12.50 ± 12.50 %." in sentence
  )


def test_worst_cases_over_other_attacks_are_never_merged(tmp_path):
  def run(seed, **changes):
    rows = [FGSM, {**PGD, **changes}]
    return write_run(tmp_path / str(seed), "at", rows, seed)

  found = merge.compare([run(0), run(1, num_restarts=5), run(2)])
  worst_cases = [r for r in found["rows"] if r["attack"] == "worst_case"]
  assert [r["num_runs"] for r in worst_cases] == [2, 1]
  assert [re.sub(".* has ", "", text) for text in found["missing"]] == [
    "no pgd20 (num_restarts=5) with running statistics.",
    "no pgd20 (num_restarts=1) with running statistics.",
    "no pgd20 (num_restarts=5) with running statistics.",
  ]
  (shown,) = layout.tables(found)
  assert "worst_case (2 attacks, with pgd20 (num_restarts=5))" in shown.head


def test_long_names_leave_room_for_the_bars(tmp_path):
  """Matplotlib warns, which is an error here, where axes are squeezed."""
  rows = [
    row("fgsm", [1] * 8, mode=mode, num_restarts=restarts, model=model)
    for mode in ("running", "batch")
    for model, restarts in (("teacher", 1), ("student", 5))
  ]
  long = "square:norm=linf:num_queries=3:epsilon=0.2:seed_of_the_search=1"
  rows += [{**one, "attack": long} for one in rows]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  (path,) = figures.draw_results(tmp_path)
  assert path.exists()
  name = "worst_case (num_examples=16, 2 attacks), derived"
  lines = broken(name, 24).split("\n")
  assert " ".join(lines) == name and max(map(len, lines)) <= 24
