"""Made-up results such as a run leaves, for tests of tables and pages."""

import json

_STEPS = {"fgsm": 1, "pgd7": 7, "pgd10": 10}


def result_row(model, attack, batch_norm, accuracy, **changes):
  """A row of `results.json`."""
  attacked = attack != "nominal"
  return {
    "model": model,
    "dataset": "digits",
    "split": "test",
    "num_examples": 297,
    "attack": attack,
    "norm": "linf" if attacked else None,
    "epsilon": 8 / 255 if attacked else None,
    "step_size": (8 if attack == "fgsm" else 2) / 255 if attacked else None,
    "num_steps": _STEPS.get(attack, 20) if attacked else None,
    "num_restarts": 1 if attacked else None,
    "loss": "cross_entropy" if attacked else None,
    "batch_norm": batch_norm,
    "batch_size": 100,
    "seed": 0,
    "accuracy": accuracy,
    "seconds": 1.0,
  } | changes


ACCURACIES = {
  ("teacher", "running"): {"nominal": 0.9832, "fgsm": 0.31, "pgd20": 0.0135},
  ("student", "running"): {"nominal": 0.9697, "fgsm": 0.79, "pgd20": 0.7138},
  ("teacher", "batch"): {"nominal": 0.9765, "fgsm": 0.4, "pgd20": 0.05},
  ("student", "batch"): {"nominal": 0.9596, "fgsm": 0.84, "pgd20": 0.7778},
}


def results(accuracies=ACCURACIES):
  """Content of `results.json` of a run with a teacher and a student."""
  rows = [
    result_row(model, attack, batch_norm, accuracy, seed=17)
    for (model, batch_norm), columns in accuracies.items()
    for attack, accuracy in columns.items()
  ]
  return {
    "format": 1,
    "run": {
      "config": {
        "method": "atat",
        "model": {"name": "wide_resnet", "depth": 14, "width": 2},
      },
      "commit": "0123abcd",
      "devices": ["cpu", "cpu"],
      "versions": {"jax": "0.10.2"},
      "command": "python main.py --config=configs/digits.py",
      "date": "2026-09-01",
      "checkpoints": {"student": {"step": 2000, "which": "best"}},
      "num_parameters": {"teacher": 77754, "student": 77754},
    },
    "rows": rows,
    "diagnostics": {
      "student_more_steps": {
        "rule": "more steps never help the network",
        "value": 0.01,
        "flag": False,
        "message": "PGD-20 is as strong as it should be.",
      },
      "student_batch_statistics": {
        "title": "Batch statistics give a higher accuracy",
        "rule": "batch minus running <= 0.02",
        "value": 0.064,
        "flag": True,
        "message": "These are two classifiers.",
      },
      "student_zero_gradients": {
        "rule": "fewer than 1 in 100",
        "value": None,
        "flag": False,
        "message": "There were no gradients to count.",
      },
    },
  }


def save(workdir, found):
  """Writes `results.json`."""
  (workdir / "results.json").write_text(json.dumps(found))


def write_run(workdir, rows, method="at", seed=0, rates=(), **fields):
  """Writes a finished run; `fields` are those of its objective."""
  config = {
    "seed": seed,
    "method": method,
    "objective": {"epsilon": 8 / 255, **fields},
    "train": {"batch_size": 64},
    "model": {"name": "wide_resnet", "depth": 8, "width": 2},
    "evaluation": {"attacks": f"whatever {seed}"},
    "teacher_workdir": f"teachers/{seed}",
  }
  run = {
    "config": config,
    "commit": "0123abcd",
    "devices": ["cpu"],
    "num_parameters": {"student": 12345, method: 12345},
  }
  workdir.mkdir(parents=True)
  save(workdir, {"format": 1, "run": run, "rows": rows, "diagnostics": {}})
  lines = [
    {"split": "train", "step": step, "images_per_second": rate}
    for step, rate in enumerate(rates)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)
  return workdir
