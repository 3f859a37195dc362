"""Fixtures for the report: the text and the page of rows."""

from __future__ import annotations

import io

import pytest

from trainers.config.schema import TrainConfig
from trainers.data.loading import open_source
from trainers.report.gather import Chosen, count, look, open_part
from trainers.report.shown_rows import first_rows


@pytest.fixture
def reported(prepare, tokenizer, tmp_path):
    """`reported(view, rows, ...)` shows the rows of a part with a view."""

    def show(view, rows, part="train", limit=5, notes=None, **config):
        prepare(rows, **config)
        values = TrainConfig(
            **{"data_path": str(tmp_path / "data"), "trainer": "sft", "block_size": 128, **config}
        )
        opened = open_part(open_source(values, part), values, tokenizer, tmp_path / "raw")
        chosen = Chosen(values, {}, values, tokenizer, {})
        view.head(look(opened, chosen, notes or [], []))
        for row in first_rows(opened.raw, opened.encoder, opened.places, tokenizer, limit):
            view.row(row, tokenizer)
        view.tail(count(chosen, part))
        view.end([])

    return show


@pytest.fixture
def text_of(reported):
    """`text_of(rows, ...)`: the report as text."""
    from trainers.report.as_text import TextView

    def read(rows, terminal=False, **config):
        stream = io.StringIO()
        view = TextView(stream)
        view.terminal = terminal
        reported(view, rows, **config)
        return stream.getvalue()

    return read


@pytest.fixture
def page_of(reported, tmp_path):
    """`page_of(rows, ...)`: the report as a page."""
    from trainers.report.as_page import PageView

    def read(rows, **config):
        reported(PageView(io.StringIO(), tmp_path / "page.html"), rows, **config)
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return read
