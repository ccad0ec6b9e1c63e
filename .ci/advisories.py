"""Looks for known vulnerabilities of the installed packages, by pip-audit.

pip-audit asks a database in the network. Where there is none it finds nothing
and says "No known vulnerabilities found"; this says that nothing was audited.
Exit status: 1 for a vulnerability, otherwise 0.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

_COMMAND = (
  sys.executable,
  "-m",
  "pip_audit",
  "--format=json",
  "--progress-spinner=off",
  "--skip-editable",
  "--timeout=15",
)


def _call() -> tuple[str, str]:
  """Returns the output of pip-audit and its last words about itself."""
  try:
    found = subprocess.run(  # noqa: S603 - the line above, without any input
      _COMMAND, capture_output=True, text=True, timeout=900
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    return "", str(error)
  return found.stdout, found.stderr


def _last_line(text: str) -> str:
  lines = text.strip().splitlines()
  return lines[-1] if lines else "no reason given"


def audit(
  call: Callable[[], tuple[str, str]] = _call,
) -> tuple[int, Sequence[str]]:
  """Runs pip-audit and reads its answer.

  Args:
    call: Function that runs it; returns its output and its errors.

  Returns:
    The exit status, and lines to print.
  """
  output, errors = call()
  try:
    packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
  except (ValueError, KeyError, TypeError):
    return 0, [f"advisories: NOT AUDITED, pip-audit: {_last_line(errors)}"]
  skipped = [p for p in packages if "skip_reason" in p]
  audited = [p for p in packages if "skip_reason" not in p]
  if not audited:
    reason = skipped[0]["skip_reason"] if skipped else "no packages"
    return 0, [
      f"advisories: NOT AUDITED, none of {len(packages)} packages could be"
      f" looked up ({reason})"
    ]
  bad = [
    f"  {p['name']} {p['version']}: {found['id']}, mended in"
    f" {', '.join(found['fix_versions']) or 'no version yet'}"
    for p in audited
    for found in p["vulns"]
  ]
  lines = [f"advisories: {len(bad)} in {len(audited)} packages", *bad]
  if skipped:
    names = ", ".join(p["name"] for p in skipped)
    lines.append(f"  not audited: {names}")
  return (1 if bad else 0), lines


if __name__ == "__main__":
  status, said = audit()
  print("\n".join(said))
  sys.exit(status)
