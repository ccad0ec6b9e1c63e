"""Text of figures: names that others chose, drawn letter by letter.

Matplotlib reads what stands between two dollar signs as mathematics, and leaves
a line whose name begins with an underscore out of the legend.
"""


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
