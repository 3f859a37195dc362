"""Print what is known about a part as text, for a terminal, a pipe or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from trainers.config.redaction import redacted
from trainers.config.text import count_of, printable
from trainers.data.preview import ShownText, marked, shown_texts
from trainers.report.facts import Bar
from trainers.report.gather import Counts, Look
from trainers.report.shown_rows import ShownRow
from trainers.report.view import View
from trainers.report.wording import (
    count_sentences,
    length_sentence,
    packing_sentence,
    repeat_sentences,
    where,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = 600, 300  # characters of a part of a text that are shown
WIDTH = 40  # characters of the longest bar


class TextView(View):
    """Prints each part of the report as soon as it is known."""

    def __init__(self, stdout: TextIO) -> None:
        super().__init__(stdout)
        self.terminal = stdout.isatty()

    def head(self, look: Look) -> None:
        table = [(use.column, use.what, use.found, use.holds) for use in look.columns]
        self._print("# data", where(look), "", "# columns", *_table(table))
        if look.unused:
            self._print(f"not used: {', '.join(look.unused)}")
        mark = "dim text" if self.terminal else "text in ⟦ ⟧"
        self._print("", "# template", *_table(look.template))
        if look.notes:
            self._print("", "# notes", *look.notes)
        self._print("", f"# rows of {look.label} as the model sees them; {mark} is not in the loss")

    def row(self, row: ShownRow, tokenizer: PreTrainedTokenizerBase) -> None:
        print(row_text(row, tokenizer, self.terminal), file=self.stdout, flush=True)

    def tail(self, counts: Counts) -> None:
        self._print("", "# counts", *count_sentences(counts))
        if counts.lengths is not None:
            self._print("", f"# lengths of {counts.label}", length_sentence(counts, counts.lengths))
            self._print(*_histogram(counts.lengths.bars))
            self._print("", f"# packing of {counts.label}", packing_sentence(counts))
        if repeats := list(repeat_sentences(counts)):
            self._print("", "# rows that repeat others", *repeats)

    def _print(self, *lines: str) -> None:
        """Print lines of facts, without secrets and without what a terminal obeys."""
        for line in lines:
            print(printable(redacted(line), ""), file=self.stdout, flush=True)


def row_text(row: ShownRow, tokenizer: PreTrainedTokenizerBase, terminal: bool) -> str:
    """Return a row as the model sees it. It is the user's own text, so no secret is hidden in it."""
    if row.error:
        return f"{row.name}: error: {printable(row.error, '')}"
    lines = [f"{row.name}: dropped: {row.dropped}"] if row.dropped else []
    for number, sample in enumerate(row.samples, start=1):
        several = f", sample {number} of {len(row.samples)}" if len(row.samples) > 1 else ""
        for text in shown_texts(sample, tokenizer):
            name = f", {text.name}" if text.name else ""
            lines.append(f"{row.name}{several}{name}: {count_of(text.tokens, 'token')}")
            lines.append(_indented(text, terminal))
    return "\n".join(lines)


def _indented(text: ShownText, terminal: bool) -> str:
    shown = "".join(marked(_cut(printable(part)), trained, terminal) for part, trained in text.parts)
    return "\n".join(f"  {line}" for line in shown.split("\n"))


def _cut(text: str) -> str:
    """Return the start and the end of a long text."""
    left_out = len(text) - START - END
    return text if left_out < 50 else f"{text[:START]} [... {left_out} characters ...] {text[-END:]}"


def _histogram(bars: Sequence[Bar]) -> Iterator[str]:
    """Yield a line for each bar. A bar that is not empty has at least one block."""
    most = max(bar.count for bar in bars)
    wide = len(str(bars[-1].last))
    for bar in bars:
        blocks = "█" * -(-bar.count * WIDTH // most)
        yield f"{bar.first:>{wide}} - {bar.last:>{wide}}  {blocks}{' ' if blocks else ''}{bar.count}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
