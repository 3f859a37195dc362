"""The report as a page: one file that loads nothing, in which text stays text."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser

import pytest
from rows import END, GOOD, PAIR, PROMPT, TURNS

from trainers.config.errors import ConfigError
from trainers.data_report.as_page import BEGINNING, check_output

HOSTILE = (
    "</pre></mark><script>alert(1)</script><img src=x onerror='alert(2)'>\"><svg/onload=alert(3)>"
    "<!-- &lt;b&gt; <style>*{display:none}</style> \x00\x1b[2J \u202e"
)
LOADS = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background")
EMPTY = ("meta", "rect")


class Page(HTMLParser):
    """Reads a page: its tags, its attributes, and the texts of its elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.texts = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in EMPTY:
            self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for tag in dict.fromkeys(self.open):
            self.texts[tag][-1] += data


def test_a_hostile_row_stays_text(page_of):
    text = page_of([{"text": HOSTILE, "<img src=x onerror=alert(4)>\x1b": "1"}], block_size=1024)
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert not {"script", "img", "link", "iframe", "object", "a", "base"} & set(page.tags)
    assert page.tags.count("style") == 1 and page.tags.count("svg") == 1
    names = {name for name, _ in page.attributes}
    assert not names & {*LOADS} and not [name for name in names if name.startswith("on")]
    shown = HOSTILE.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert page.texts["mark"][-1].removesuffix(END) == shown
    assert r"<img src=x onerror=alert(4)>\x1b" in page.texts["p"][0]


def test_the_page_may_load_nothing(page_of):
    page = Page(page_of([{"text": "one"}]))
    assert any(name == "content" and "default-src 'none'" in value for name, value in page.attributes)
    assert "url(" not in page.texts["style"][0] and "@import" not in page.texts["style"][0]


def test_the_page_suits_a_phone_and_a_dark_screen(page_of):
    page = Page(page_of([{"text": "one"}]))
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    style = page.texts["style"][0]
    assert "color-scheme: light dark" in style and "prefers-color-scheme: dark" in style
    assert "overflow-wrap: anywhere" in style and "overflow-x: auto" in style


def test_the_page_has_the_facts_of_the_text(page_of, text_of):
    rows = [{"text": word} for word in ("one", "two", "", "one")]
    page, text = Page(page_of(rows, notes=["a <note>"])), text_of(rows, notes=["a <note>"])
    body = " ".join(page.texts["html"])
    titles = ("#", "row ", "  ")
    facts = [line for line in text.splitlines() if line and not line.startswith(titles) and "█" not in line]
    for line in facts:
        for cell in re.split(r"\s{2,}", line.removeprefix("not used: ")):
            assert cell in body, cell
    assert "dropped: empty text" in body


def test_the_histogram_has_a_bar_and_a_count_for_each_length(page_of, prepare):
    rows = [{"text": text} for text in ("a", "b", "a b", "a b", "c")]
    lengths = sorted(len(sample["input_ids"]) for sample in prepare(rows).dataset)
    assert len(set(lengths)) == 2
    page = Page(page_of(rows))
    texts = page.texts["text"]
    assert texts[0] == f"{lengths[0]} - {lengths[0]}" and texts[1] == str(lengths.count(lengths[0]))
    assert texts[-1] == str(lengths.count(lengths[-1]))
    widths = [int(value) for name, value in page.attributes if name == "width"]
    assert widths[0] == 190 > widths[-1] > 0


def test_what_the_loss_sees_is_marked(page_of):
    page = Page(page_of([{"messages": TURNS}], chat_template="tokenizer"))
    assert page.texts["mark"][-1] == f"{GOOD}{END}"
    assert page.texts["pre"] == [f"\n{PROMPT}{GOOD}{END}\n"]
    assert Page(page_of([PAIR], trainer="dpo")).tags.count("pre") == 2


def test_a_page_is_written_over_and_nothing_else_is(page_of, tmp_path):
    page_of([{"text": "one"}])
    assert "two" in page_of([{"text": "two"}])
    assert (tmp_path / "page.html").read_text().startswith(BEGINNING)
    for name, text in (("notes.html", "<!doctype html>\n<html>mine"), ("empty.html", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"exists, and is no page of phalanx data"):
            check_output(tmp_path / name)
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    with pytest.raises(ConfigError, match="is a link"):
        check_output(tmp_path / "link.html")
    with pytest.raises(ConfigError, match=r"is a folder\. Give a file in it"):
        check_output(tmp_path)
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(ConfigError, match="is no page"):
        check_output(tmp_path / "pipe.html")


def test_a_page_that_cannot_be_written_is_refused_before_the_rows_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written: .*/file is no folder that you can write to"):
        check_output(tmp_path / "file" / "page.html")
    check_output(tmp_path / "new" / "page.html")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"cannot be written: {tmp_path} is no folder"):
        check_output(tmp_path / "new" / "page.html")


def test_facts_have_no_secrets_and_rows_are_as_they_are(page_of):
    secret = "hf_canaryCanaryCanaryCanaryCanary"
    page = Page(page_of([{"text": f"My key is {secret}.", secret: "1"}]))
    assert page.texts["p"][0] == "Not used: (hidden)"
    assert page.texts["mark"][-1] == f"My key is {secret}.{END}"
