"""Fills in gke_jobset.yaml and prints it, for `kubectl apply -f -`.

  python launch/gke_jobset.py --image=IMAGE --claim=CLAIM --hosts=2 -- \\
    --config=configs/cifar10.py:atat,modern --workdir=/runs/atat

What comes after `--` goes to main.py. The image holds the repository in
/atat_jax, installed; the claim is a volume that all hosts can write, mounted as
/runs. `--dry_run` prints the command of every worker instead.
"""

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import yaml

TEMPLATE = pathlib.Path(__file__).with_suffix(".yaml")


def fill(options: argparse.Namespace, arguments: Sequence[str]) -> Any:
  """Fills in the template.

  Args:
    options: Options of the command.
    arguments: Arguments of main.py.

  Returns:
    The JobSet, as YAML has it.
  """
  jobset = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
  jobset["metadata"]["name"] = options.name
  jobset["spec"]["failurePolicy"]["maxRestarts"] = options.max_restarts
  (worker,) = jobset["spec"]["replicatedJobs"]
  job = worker["template"]["spec"]
  job["parallelism"] = job["completions"] = options.hosts
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  container["image"] = options.image
  container["args"] = list(arguments)
  container["resources"]["limits"]["nvidia.com/gpu"] = options.gpus
  pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = options.claim
  values = {
    "JAX_COORDINATOR_ADDRESS": f"{options.name}-worker-0-0.{options.name}:8476",
    "JAX_NUM_PROCESSES": str(options.hosts),
  }
  for variable in container["env"]:
    if variable["name"] in values:
      variable["value"] = values[variable["name"]]
  return jobset


def commands(jobset: Any) -> list[str]:
  """Returns the command of every worker, as for a shell.

  Args:
    jobset: The JobSet.
  """
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  container = job["template"]["spec"]["containers"][0]
  found = []
  for index in range(job["completions"]):
    # The only variable without a value is the index of the pod.
    variables = [
      f"{one['name']}={shlex.quote(one.get('value', str(index)))}"
      for one in container["env"]
    ]
    words = shlex.join([*container["command"], *container["args"]])
    found.append(f"{' '.join(variables)} {words}")
  return found


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    description=str(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--name", default="atat", help="name of the JobSet")
  parser.add_argument("--image", required=True)
  parser.add_argument(
    "--claim", required=True, help="volume claim for working directories"
  )
  parser.add_argument("--hosts", type=int, default=2)
  parser.add_argument("--gpus", type=int, default=8, help="GPUs a host")
  parser.add_argument("--max_restarts", type=int, default=20)
  parser.add_argument("--dry_run", action="store_true")
  own, rest = list(argv), []
  if "--" in own:
    at = own.index("--")
    own, rest = own[:at], own[at + 1 :]
  options = parser.parse_args(own)
  for name, low in (("hosts", 1), ("gpus", 1), ("max_restarts", 0)):
    if not low <= getattr(options, name) <= 100_000:
      parser.error(
        f"{name}: {getattr(options, name)}; allowed: {low} to 100000"
      )
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
    parser.error(
      f"name: {options.name}; allowed: small letters, digits and -, at most 40"
    )
  if not rest:
    parser.error("arguments of main.py are missing; they come after --")
  return options, rest


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit status."""
  options, arguments = _parse(argv)
  jobset = fill(options, arguments)
  if options.dry_run:
    sys.stdout.writelines(f"{line}\n" for line in commands(jobset))
  else:
    yaml.safe_dump(jobset, sys.stdout, sort_keys=False)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
