"""The README: short, with two commands that CI and newcomers can run."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_a_minute():
  assert len(README.splitlines()) <= 130


def test_the_test_command_is_one_line_in_a_bash_block():
  lines = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)
    for line in block.splitlines()
    if line.endswith("python -m pytest -n auto")
  ]
  assert len(lines) == 1  # .ci/run takes it from here
  assert "pip install -e '.[test]'" in lines[0]


def test_nothing_is_announced_as_a_result():
  tables = [line for line in README.splitlines() if line.startswith("|")]
  assert len(tables) > 3
  assert not re.search(r"waiting|pending|TODO|TBD", README)
