"""Write the table of docs/data.md: what becomes of each kind of conversation with each template of TRL.

python docs/make_templates_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parent / "data.md"
HEAD, END = "<!-- the table of templates: make docs -->", "<!-- end of the table -->"
sys.path.insert(0, str(PAGE.parent.parent / "tests" / "helpers"))


def page(text: str) -> str:
    """Return the page with a new table."""
    from chats import support_table

    before, _, rest = text.partition(HEAD)
    _, _, after = rest.partition(END)
    return f"{before}{HEAD}\n\n{support_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
