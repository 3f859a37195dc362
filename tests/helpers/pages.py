"""The fences of the pages: README.md, CONTRIBUTING.md and docs/*.md."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from places import REPO

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TAGS = ("bash", "yaml", "json", "text", "python")
# The first line of a bash fence whose commands cannot run in a test. tests/unit/test_docs.py says what is
# checked instead. The commands of all other bash fences run in tests/distributed/test_docs_commands.py.
MARKERS = ("# needs a package index", "# needs a SLURM cluster", "# needs two machines", "# needs the hub")


@dataclass(frozen=True)
class Fence:
    """A block of code in a page."""

    page: str
    line: int
    tag: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.line}"

    @property
    def marker(self) -> str | None:
        """The line that says what the commands need, or None."""
        first = self.text.splitlines()[0]
        return first if first.startswith("# needs") else None

    @property
    def commands(self) -> list[str]:
        """The lines without comments."""
        words = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [line for line, found in zip(self.text.splitlines(), words, strict=True) if found]


def fences(*tags: str) -> list[Fence]:
    """Return the fences with these tags, in the order of the pages. No tags: all fences."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
            if not tags or match[1] in tags:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Fence(page.stem, line, match[1], match[2]))
    return found


def text_after(page: str, words: str) -> str:
    """Return the first fence of a page after some words."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8").partition(words)[2]
    match = re.search(r"^```[^\n]*\n(.*?)^```$", text, re.M | re.S)
    assert match
    return match[1]
