"""Pages as a reader of their HTML sees them."""

import html.parser


class Page(html.parser.HTMLParser):
  """Parsed page; refuses tags that are not balanced.

  Attributes:
    source: The HTML.
    text: All text but the style.
    tags: (tag, attributes) of every element, in order.
    rows: Text of the cells of every table row, small print included.
    headings: Text of the second-level headings.
  """

  VOID = frozenset({"meta", "img", "wbr"})

  def __init__(self, path):
    super().__init__()
    self.source = path.read_text(encoding="utf-8")
    self.open, self.tags, self.rows, self.text = [], [], [], ""
    self.headings = []
    self.feed(self.source)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    elif tag == "span" and {"td", "th"} & set(self.open):
      self.rows[-1][-1] += " "  # small print has a line of its own

  def handle_endtag(self, tag):
    assert self.open.pop() == tag
    if tag in ("td", "th"):
      self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

  def handle_data(self, data):
    if not self.open or self.open[-1] == "style":
      return
    self.text += data
    if {"td", "th"} & set(self.open):
      self.rows[-1][-1] += data
    if self.open[-1] == "h2":
      self.headings.append(data)

  def assert_asks_for_nothing(self):
    """No script, nothing fetched."""
    assert not {tag for tag, _ in self.tags} & {"script", "link", "iframe"}
    for tag, attrs in self.tags:
      assert not any(name.startswith("on") for name in attrs)
      for name in ("src", "href", "srcset", "action"):
        if name in attrs:
          assert tag == "img" and attrs[name].startswith("data:image/png;")
    assert "url(" not in self.source and "@import" not in self.source
    policy = next(a for t, a in self.tags if t == "meta" and "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")
