"""How a report is shown: as text (as_text.py), as a page (as_page.py), or as JSON (as_json.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from trainers.data_report.gather import Counts, Look
from trainers.data_report.shown_rows import ShownRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class View:
    """The base of the views, which shows nothing. The methods are called in their order.

    In a mix, head() and row() are called for one source after the other.
    """

    counts = True  # whether it shows the counts, which need all rows to be encoded

    def __init__(self, stdout: TextIO) -> None:
        self.stdout = stdout

    def head(self, look: Look) -> None:
        """Show where the rows of a source are from, their columns, and the template."""

    def row(self, row: ShownRow, tokenizer: PreTrainedTokenizerBase) -> None:
        """Show a row."""

    def tail(self, counts: Counts) -> None:
        """Show what is known when all rows are encoded."""

    def end(self, problems: Sequence[str]) -> None:
        """End. `problems`: why there are no counts, or none of a part."""
