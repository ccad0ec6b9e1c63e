"""Text of figures: names that others chose, drawn letter by letter.

Matplotlib reads what stands between two dollar signs as mathematics, and leaves
a line whose name begins with an underscore out of the legend.
"""

import re


def plain(text: object) -> str:
  """Returns text that matplotlib draws as it is.

  Args:
    text: Name of a network, a class or an attack, or a sentence with such names.

  Returns:
    The text, dollar signs escaped, and unprintable letters, but for line ends,
    replaced.
  """
  found = "".join(
    letter
    if letter.isprintable() or letter == "\n"
    else "\N{REPLACEMENT CHARACTER}"
    for letter in str(text)
  ).replace("$", r"\$")
  # A space without width: what follows it is no longer the first letter.
  return f"\N{ZERO WIDTH SPACE}{found}" if found.startswith("_") else found


def broken(text: str, width: int) -> str:
  """Breaks the name of an attack into lines, behind spaces and colons.

  Args:
    text: The name, which may be as long as the numbers it tells.
    width: Letters that a line holds; a longer part stays whole.
  """
  lines = [""]
  for part in re.split("(?<=[ :])", text):
    if lines[-1] and len(lines[-1] + part.rstrip()) > width:
      lines.append("")
    lines[-1] += part
  return "\n".join(line.rstrip() for line in lines)
