"""All benchmarks against PyTorch and of the step, by one command.

  python -m benchmarks.run --reference=../auto-attack --out=benchmarks/results/cpu
  python -m benchmarks.run --smoke --out=runs/smoke

Each part writes a JSON file with its command, commit, machine and versions;
`benchmarks.compare` compares two of them. `--smoke` runs all parts, small, to
see that they run: its times mean nothing.
"""

import argparse
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.setting import ROOT, say

_TINY = ["--model", "wrn-8-1", "--repeats", "1"]

# Name to (module, arguments).
PARTS: dict[str, tuple[str, list[str]]] = {
  "step": (
    "step",
    ["--model", "wrn-10-1", "wrn-16-4", "--peer", "eager", "--repeats", "7"],
  ),
  "gradients": (
    "step",
    ["--model", "wrn-10-1", "wrn-16-4", "--peer", "eager", "--compile_only"],
  ),
  "compiling": ("step", ["--model", "wrn-32-10", "--compile_only"]),
  "attacks": (
    "attacks",
    ["--model", "wrn-10-1", "wrn-16-4", "--batch_size", "32", "--repeats", "3"],
  ),
  "scaling": ("scaling", []),
  "savings": ("savings", ["--model", "wrn-10-1", "wrn-16-4"]),
  "maps": ("maps", ["--model", "wrn-10-1", "wrn-16-4"]),
}
SMOKE: dict[str, tuple[str, list[str]]] = {
  "step": (
    "step",
    [
      *_TINY,
      *("--batch_size", "4", "--num_steps", "1", "--size", "8"),
      *("--peer", "eager"),
    ],
  ),
  "attacks": ("attacks", [*_TINY, "--attack", "fgsm", "--batch_size", "4"]),
  "scaling": (
    "scaling",
    ["--axis", "batch_size", "--values", "2", "4", "--repeats", "1", "--smoke"],
  ),
  "savings": (
    "savings",
    [
      *_TINY,
      *("--batch_size", "4"),
      *("--saving", "maps: through the head only"),
    ],
  ),
  "maps": ("maps", ["--smoke"]),
}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add("--smoke", action="store_true", help="small, only to see that all runs")
  add("--part", nargs="+", choices=PARTS, default=list(PARTS))
  add("--reference", help="clone of fra31/auto-attack; without, no APGD")
  add("--out", type=pathlib.Path, required=True, help="folder of the results")
  args = made.parse_args(argv)
  parts = SMOKE if args.smoke else PARTS
  for name in args.part:
    if name not in parts:
      continue
    module, flags = parts[name]
    flags = [*flags, f"--out={args.out / name}.json"]
    if module == "attacks" and not args.smoke:
      if args.reference:
        flags.append(f"--reference={args.reference}")
      else:
        say("attacks: without APGD; --reference names the original package")
        flags += ["--attack", "fgsm", "pgd20"]
    say(f"{name}: python -m benchmarks.{module} {' '.join(flags)}")
    if args.smoke:  # one process: less to import
      importlib.import_module(f"benchmarks.{module}").main(flags)
    else:
      command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
      subprocess.run(command, cwd=ROOT, check=True)
  say(f"results: {args.out}")


if __name__ == "__main__":
  main()
