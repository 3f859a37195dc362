"""Write what is known about a part as one page of HTML: no script, nothing loaded, all text escaped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainers.config.errors import ConfigError
from trainers.config.redaction import redacted
from trainers.config.text import count_of, printable
from trainers.data.preview import shown_texts
from trainers.rank import no_links
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

# The first lines of a page. A file that begins with them was written by this module.
BEGINNING = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="phalanx data">\n'
STYLE = """
:root { color-scheme: light dark;
  --line: #ccc; --mark: #d6f5d6; --bar: #4a7fb5; --faint: #666; --bad: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --mark: #1e4620; --bar: #7fb0e0; --faint: #aaa; --bad: #ff8a80; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; }
tr { border-bottom: 1px solid var(--line); }
p, li, h1, h3 { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .3rem;
      padding: .6rem; margin: .3rem 0; max-height: 30rem; overflow-y: auto; color: var(--faint);
      font: .85rem/1.5 ui-monospace, monospace; }
mark { background: var(--mark); color: CanvasText; }
.bad { color: var(--bad); } svg { width: 100%; max-width: 32rem; font: 11px system-ui, sans-serif; }
svg text { fill: CanvasText; } svg rect { fill: var(--bar); }
""".strip()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def check_output(path: Path) -> None:
    """Check that a page can be written to a path, and that there is no file, or an earlier page.

    Raises:
        ConfigError: there is something else, or its folder cannot be written to.
    """
    if path.is_symlink():
        raise ConfigError(f"--html: {path} is a link. Give a file.")
    if path.is_dir():
        raise ConfigError(f"--html: {path} is a folder. Give a file in it, for example {path / 'data.html'}.")
    if path.exists() and not (path.is_file() and _is_page(path)):
        raise ConfigError(f"--html: {path} exists, and is no page of phalanx data. Give another name.")
    above = next(part for part in path.absolute().parents if part.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--html: {path} cannot be written: {above} is no folder that you can write to.")


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING.encode()
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be read: {error.strerror}.") from None


class PageView(View):
    """Collects the page, and writes it at the end."""

    def __init__(self, stdout: TextIO, path: Path) -> None:
        super().__init__(stdout)
        check_output(path)
        self.path = path
        self.top = ""
        self.facts: list[str] = []
        self.rows: list[str] = []  # they come last, since they may be many

    def head(self, look: Look) -> None:
        self.label = look.label
        table = [(use.column, use.what, use.found, use.holds) for use in look.columns]
        unused = f"<p>Not used: {_text(', '.join(look.unused))}</p>" if look.unused else ""
        self.title = f"Data: {look.label}"
        self.top = (
            f"<h1>{_text(where(look))}</h1>\n"
            f"<h2>Columns</h2>\n{_table(table, ('column', 'what', 'found by', 'holds'))}{unused}\n"
            f"<h2>Template</h2>\n{_table(look.template)}"
            + (f"\n<h2>Notes</h2>\n{_list(look.notes)}" if look.notes else "")
        )

    def row(self, row: ShownRow, tokenizer: PreTrainedTokenizerBase) -> None:
        name = _text(row.name)
        if row.error:
            self.rows.append(f'<h3>{name}</h3>\n<p class="bad">error: {_text(row.error)}</p>')
            return
        dropped = f'<p class="bad">dropped: {_text(row.dropped)}</p>\n' if row.dropped else ""
        self.rows.append(f"<h3>{name}</h3>\n{dropped}")
        for number, sample in enumerate(row.samples, start=1):
            several = f"sample {number} of {len(row.samples)}, " if len(row.samples) > 1 else ""
            for text in shown_texts(sample, tokenizer):
                label = f"{several}{text.name + ', ' if text.name else ''}{count_of(text.tokens, 'token')}"
                # A page leaves out the first line break of <pre>, so there is one more.
                parts = "".join(_part(part, trained) for part, trained in text.parts)
                self.rows.append(f'<div>{_text(label)}</div>\n<pre dir="auto">\n{parts}</pre>')

    def tail(self, counts: Counts) -> None:
        self.facts.append(f"<h2>Counts</h2>\n{_list(count_sentences(counts))}")
        if (lengths := counts.lengths) is not None:
            self.facts.append(
                f"<h2>Lengths of {counts.label}</h2>\n<p>{_text(length_sentence(counts, lengths))}</p>\n"
                f"{_histogram(lengths.bars)}\n"
                f"<h2>Packing of {counts.label}</h2>\n<p>{_text(packing_sentence(counts))}</p>"
            )
        if repeats := list(repeat_sentences(counts)):
            self.facts.append(f"<h2>Rows that repeat others</h2>\n{_list(repeats)}")

    def end(self, problems: Sequence[str]) -> None:
        errors = "".join(f'<p class="bad">error: {_text(problem)}</p>\n' for problem in problems)
        parts = [
            BEGINNING,
            f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(self.title)}</title>\n<style>\n{STYLE}\n</style>\n",
            errors,
            self.top,
            *self.facts,
            f"<h2>Rows of {self.label}, as the model sees them</h2>",
            "<p>The loss sees <mark>marked text</mark>.</p>",
            *self.rows,
            "</html>\n",
        ]
        no_links.write(self.path.absolute().parent, self.path.absolute(), "\n".join(parts))
        print(redacted(f"page: {self.path}"), file=self.stdout)


def _text(text: str) -> str:
    """Return a fact for HTML, without secrets."""
    return escape(printable(redacted(text), ""))


def _part(text: str, trained: bool) -> str:
    """Return a part of a row for HTML. It is the user's own text, so no secret is hidden in it."""
    safe = escape(printable(text))
    return f"<mark>{safe}</mark>" if trained else safe


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _table(rows: Sequence[Sequence[str]], titles: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def _histogram(bars: Sequence[Bar]) -> str:
    """Return a histogram as SVG: a line for each bar, with its bounds before it and its count behind it."""
    most = max(bar.count for bar in bars)
    lines = []
    for index, bar in enumerate(bars):
        y, width = 18 * index, max(1, round(190 * bar.count / most)) if bar.count else 0
        lines.append(
            f'<text x="92" y="{y + 13}" text-anchor="end">{bar.first} - {bar.last}</text>'
            f'<rect x="100" y="{y + 3}" width="{width}" height="13"/>'
            f'<text x="{106 + width}" y="{y + 13}">{bar.count}</text>'
        )
    label = "How many samples have how many tokens"
    return f'<svg viewBox="0 0 360 {18 * len(bars)}" role="img" aria-label="{label}">{"".join(lines)}</svg>'
