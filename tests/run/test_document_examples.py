"""Python in the documents that is marked as runnable runs as it is written."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCK = re.compile(
  r"^<!-- runnable -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = {
  path.name: blocks
  for path in sorted(ROOT.glob("docs/*.md"))
  if (blocks := BLOCK.findall(path.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_blocks_of_a_page_run_one_after_the_other(name):
  # A class is looked up in its module by those that print or copy it.
  names: dict = {"__name__": "__main__"}
  for number, block in enumerate(EXAMPLES[name]):
    exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_a_mark_stands_before_a_block_of_python():
  for name, blocks in EXAMPLES.items():
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text.count("<!-- runnable -->") == len(blocks)
  assert sum(map(len, EXAMPLES.values())) >= 7
