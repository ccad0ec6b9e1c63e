"""Verdicts compare accuracies on the same images, in the same ball only."""

import json
import re

import pytest
import run_files

from atat_jax import evaluation, report
from atat_jax.errors import UserError
from atat_jax.report import layout, merge
from atat_jax.report import results as results_lib
from atat_jax.runs import comparable, tables


def row(
  attack, accuracy, count=360, model="student", mode="running", **changes
):
  return run_files.result_row(
    model, attack, mode, accuracy, num_examples=count, **changes
  )


def results(*rows):
  return {"format": 1, "rows": list(rows), "diagnostics": {}}


IN_PARTS = (
  row("nominal", 0.96),
  row("ifgsm20", 0.653),
  row("fgsm", 0.80),
  row("nominal", 0.97, 64),
  row("pgd50-margin", 0.75, 64),
  row("autoattack-fast", 0.719, 64),
)
"""I-FGSM on all images leaves less than AutoAttack on the first ones."""


def test_the_strongest_attack_is_named_among_those_on_the_same_images():
  text = report.verdict(results(*IN_PARTS))
  assert re.search(
    r"Under ifgsm20[^,]*, the strongest of the 2 attacks run on these images in"
    r" this ball .* 65\.3% of 360 digits test images",
    text,
  )
  assert "96.0% of the clean images" in text
  assert re.search(
    r"Not compared with these.*: on 64 digits test images \(linf, epsilon 8/255\)"
    r" autoattack-fast[^,]*, the strongest of 2, leaves the student 71\.9%\.",
    text,
  )


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_rows_does_not_change_who_is_compared(order):
  text = report.verdict(results(*IN_PARTS[::order]))
  assert text.startswith("Under ifgsm20")
  assert "strongest of 2, leaves the student 71.9%" in text


@pytest.mark.parametrize(
  "changes",
  [
    {"num_examples": 64},
    {"norm": "l2"},
    {"epsilon": 16 / 255},
    {"split": "validation"},
    {"dataset": "cifar10"},
    {"checkpoint_step": 7},
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_each_difference_of_the_question_keeps_an_attack_out(changes):
  """The attack that is out leaves the least, and must not be the strongest."""
  rows = [row("pgd20", 0.7), row("apgd", 0.6), row("square", 0.1) | changes]
  text = report.verdict(results(*rows))
  assert text.startswith("Under apgd")
  assert "the strongest of the 2 attacks run on these images" in text
  assert re.search(
    r"Not compared .* square\S*.* leaves the student 10\.0%", text
  )
  groups = comparable.attacks(tables.columns(rows), "student")
  assert [len(group.columns) for group in groups] == [2, 1]


def test_another_seed_of_an_attack_is_compared():
  rows = [row("pgd20", 0.7), row("apgd", 0.6, seed=3)]
  text = report.verdict(results(*rows))
  assert "Under apgd, the strongest of the 2 attacks run (" in text
  assert "Not compared" not in text


def test_clean_accuracy_on_other_images_is_said_to_be():
  text = report.verdict(results(row("nominal", 0.9, 100), row("pgd20", 0.5)))
  assert "90.0% of 100 clean images, which are not the same, correctly" in text


def test_batch_statistics_are_compared_on_the_images_of_the_verdict():
  rows = [
    row("pgd20", 0.5),
    row("pgd20", 0.6, mode="batch"),
    row("autoattack", 0.2, 64),
    row("autoattack", 0.9, 64, mode="batch"),
  ]
  text = report.verdict(results(*rows))
  assert "credited with 60.0% under pgd20" in text
  text = report.verdict(results(rows[0], *rows[2:]))
  assert "90.0% under autoattack" in text
  assert "on 64 digits test images (linf, epsilon 8/255), 70.0 points" in text


def test_accuracies_by_class_are_of_the_same_images():
  rows = [dict(one) for one in IN_PARTS]
  for number, one in enumerate(rows):
    one["class_accuracy"] = [number / 10, 0.5]
  found = results_lib.by_class(rows)
  assert found.attack.startswith("ifgsm20")
  assert found.lines[0] == ("class 0", 0.0, 0.1)
  assert "on 360 digits test images" in found.sentence
  del rows[0]["class_accuracy"]
  assert results_lib.by_class(rows).lines[0] == ("class 0", None, 0.1)


def test_labels_tell_the_images_and_the_ball_where_any_differ():
  def labels(*rows):
    return [column.label for column in tables.columns(list(rows))]

  assert labels(*IN_PARTS)[1] == "ifgsm20"  # of the most images
  assert labels(*IN_PARTS)[-1] == "autoattack-fast (num_examples=64)"
  assert labels(row("pgd20", 0.1), row("apgd", 0.1, norm="l2")) == [
    "pgd20",
    "apgd (norm=l2)",
  ]
  # A name that says it need not say it twice.
  assert labels(
    row("pgd20", 0.1), row("square:norm=l2", 0.1, norm="l2"), row("nominal", 1)
  ) == ["pgd20", "square:norm=l2", "nominal"]
  assert labels(row("pgd20", 0.1), row("nominal", 1)) == ["pgd20", "nominal"]


def test_radii_that_differ_look_different():
  rows = [row("pgd20", 0.5), row("pgd20", 0.4, epsilon=0.0314)]
  labels = [column.label for column in tables.columns(rows)]
  assert labels == ["pgd20 (epsilon=8/255)", "pgd20 (epsilon=0.0314)"]
  assert "(linf, epsilon 0.0314)" in report.verdict(results(*rows))


def test_the_printed_table_says_what_cannot_be_compared():
  text = report.results_table(results(*IN_PARTS))
  assert re.search(
    r"same images and in the same ball only: .*ifgsm20.* on 360 digits test"
    r" images \(linf, epsilon 8/255\); pgd50-margin .*, autoattack-fast .* on 64",
    text,
  )
  alike = report.results_table(results(*IN_PARTS[:3]))
  assert "can be compared" not in alike


def write_run(directory, method, rows):
  renamed = [{**one, "model": method} for one in rows]
  return run_files.write_run(directory, renamed, method)


def test_methods_are_ranked_on_the_same_images(tmp_path):
  weaker = [{**one, "accuracy": one["accuracy"] - 0.1} for one in IN_PARTS]
  found = merge.compare(
    [
      write_run(tmp_path / "at", "at", IN_PARTS),
      write_run(tmp_path / "trades", "trades", weaker),
    ]
  )
  (sentence,) = layout.verdict(found)
  assert re.search(
    r"ifgsm20 .*on these images in this ball the one that leaves least; linf,"
    r" epsilon 8/255, 360 images\): at 65\.30 %, trades 55\.30 %\.",
    sentence,
  )
  assert re.search(
    r"on 64 digits test images .* autoattack-fast .* leaves 71\.9% at most",
    sentence,
  )
  missing = merge.compare([tmp_path / "at", tmp_path / "trades"])["missing"]
  assert missing == []


def test_a_method_without_an_attack_ends_the_ranking_on_those_images(tmp_path):
  found = merge.compare(
    [
      write_run(tmp_path / "at", "at", IN_PARTS),
      write_run(tmp_path / "trades", "trades", IN_PARTS[3:]),
    ]
  )
  (sentence,) = layout.verdict(found)
  assert "64 images): at 71.90 %, trades 71.90 %" in sentence
  assert "ifgsm20" not in sentence


def test_rules_compare_one_question_and_keep_the_flags_of_every_attack():
  def steps(name, accuracy, number, **changes):
    return row(name, accuracy, num_steps=number, **changes)

  check = {"title": "t", "rule": "r", "value": 1.0, "message": "m"}
  rows = [
    steps("pgd10", 0.6, 10),
    steps("pgd20", 0.6, 20),
    steps("pgd50", 0.1, 50, norm="l2"),
    row(
      "autoattack", 0.5, 64, diagnostics={"masking": {**check, "flag": True}}
    ),
    row("autoattack", 0.5, diagnostics={"masking": {**check, "flag": False}}),
  ]
  found = evaluation.diagnose(rows, "student")
  assert not found["steps_converged"]["flag"]
  assert "From 10 to 20 steps" in found["steps_converged"]["message"]
  assert found["autoattack_masking"]["flag"]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_rule_that_meets_a_number_that_is_none_flags(bad):
  rows = [
    row("fgsm", 0.6, num_steps=1),
    row("pgd10", 0.5, num_steps=10),
    row("pgd20", 0.5, num_steps=20),
  ]
  rows[bad]["accuracy"] = float("nan")
  found = evaluation.diagnose(rows, "student")
  needs = {
    "iterations_beat_one_step": (0, 2),
    "steps_converged": (1, 2),
  }
  assert {name: found[name]["flag"] for name in needs} == {
    name: bad in rows_of for name, rows_of in needs.items()
  }
  json.dumps(found, allow_nan=False)


COUNTS = {"nonfinite": 1, "nonfinite_points": 0, "nonfinite_gradients": 24}


def test_numbers_that_were_not_finite_are_told_everywhere():
  rows = [row("nominal", 0.9, **dict.fromkeys(COUNTS, 0)), row("pgd20", 0.5)]
  found = evaluation.diagnose(rows, "student")["nonfinite"]
  assert not found["flag"] and found["value"] == 0
  rows[1] |= COUNTS
  found = evaluation.diagnose(rows, "student")["nonfinite"]
  assert found["flag"] and found["value"] == 1
  for text in (
    found["message"],
    report.results_table(results(*rows)),
    results_lib.blocks(rows)[0].lines[1].accuracies[0].nonfinite,
  ):
    assert "1 of 360 images has logits that are not finite" in text
    assert "24 gradients of the attack" in text
  assert "1 number of the table met logits or gradients" in report.verdict(
    results(*rows)
  )


def test_rows_without_counts_say_nothing_of_them():
  rows = [row("pgd20", 0.5)]
  assert "nonfinite" not in evaluation.diagnose(rows, "student")
  assert "not finite" not in report.verdict(results(*rows))
  assert "not finite" not in report.results_table(results(*rows))


def test_all_attacks_of_an_ensemble_are_named_where_the_first_model_fell_early():
  def attacks(*names):
    return [{"attack": n, "numbers": f"{n}'s numbers"} for n in names]

  rows = [
    row("autoattack-fast", 0.0, model="teacher", attacks=attacks("apgd-ce")),
    row("autoattack-fast", 0.4, attacks=attacks("apgd-ce", "apgd-t")),
  ]
  (column,) = tables.columns(rows)
  assert "apgd-t (apgd-t's numbers)" in tables.protocol(column)


def test_a_comparison_tells_the_seed_that_met_the_most(tmp_path):
  few = {"nonfinite": 1, "nonfinite_points": 5, "nonfinite_gradients": 0}
  first = [{**one, "model": "at"} for one in IN_PARTS[:3]]
  second = [dict(one) for one in first]
  first[1] |= few
  second[1] |= {**few, "nonfinite": 3}
  found = merge.compare(
    [
      run_files.write_run(tmp_path / str(seed), rows, "at", seed=seed)
      for seed, rows in enumerate([first, second])
    ]
  )
  told = [one for one in found["rows"] if tables.nonfinite(one)]
  assert [one["attack"] for one in told] == ["ifgsm20"]
  assert told[0]["nonfinite"] == 3
  cells = [c for t in layout.tables(found) for line in t.rows for c in line]
  notes = [note for cell in cells for note in cell.notes]
  assert sum("3 of 360 images have logits" in note for note in notes) == 1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: report.verdict(None), "results: None; allowed: an object"),
    (lambda: report.verdict({}), "results: no list of rows"),
    (lambda: report.results_table({"rows": [{}]}), "results: row 1: no model"),
    (lambda: merge.compare("runs/at"), "workdirs: 'runs/at'; allowed: a list"),
    (lambda: evaluation.diagnose(None, "student"), "rows: None"),
    (lambda: evaluation.diagnose([{}], "student"), "rows: one has no model"),
  ],
)
def test_what_are_no_results_is_refused_in_one_line(call, message):
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
