"""The report on a mix: facts over all sources, rows that two sources have, and the rows of each source."""

from __future__ import annotations

import io
import json
import re
from html import unescape

import numpy as np
import pytest
from inprocess import settings_of, write_split
from rows import END, assistant, user

from trainers.config.errors import ConfigError
from trainers.data.chat import UNROLLED
from trainers.data.loading import open_source
from trainers.data.mixing import prepare_all
from trainers.data_report.as_json import JsonView
from trainers.data_report.as_page import PageView
from trainers.data_report.as_text import TextView
from trainers.data_report.facts import describe_lengths
from trainers.data_report.gather import Rows, count, look, open_part
from trainers.data_report.shown_rows import first_rows
from trainers.data_report.shown_sources import choose_sources
from trainers.data_report.wording import repeat_sentences
from trainers.model.tokenizer import load_tokenizer, tokenizers_of_sources


def turns(*names):
    return [{"messages": [user(f"What is {name}?"), assistant(f"It is {name}.")]} for name in names]


# code: its valid has a row of chat's train, and one of its own; the last row of its train is a duplicate.
SPLITS = {
    "code": {"train": turns("a", "b", "c", "a"), "valid": turns("d", "b")},
    "chat": {"train": turns("d", "e", "c", "f", "g", "h")},
    "last": {"train": turns("z"), "valid": turns("y", "g", "d")},
}
CODE = {"name": "code", "valid_split": "valid", "weight": 1}
CHAT = {"name": "chat", "weight": 1}
LAST = {"name": "last", "valid_split": "valid", "rows": 0}


class Mix:
    """A config with a mix, and its tokenizers."""

    def __init__(self, folder, model, entries, **config):
        for name, splits in SPLITS.items():
            (folder / name).mkdir(exist_ok=True)
            for split, rows in splits.items():
                write_split(folder / name / f"{split}.jsonl", rows)
        mix = [{"path": str(folder / entry["name"]), **entry} for entry in entries]
        values = {"trainer": "sft", "block_size": 128, "chat_template": "tokenizer", "mix": mix, **config}
        self.settings = settings_of(model=str(model), **values)
        self.folder, self.config = folder, self.settings.train
        self.tokenizer, self.new_tokens = load_tokenizer(self.config)
        self.templates = tokenizers_of_sources(self.config, self.tokenizer)

    def count(self, part="train"):
        return count(self.config, self.tokenizer, self.templates, part)

    def show(self, view, part="train", source=None, limit=None):
        for one in choose_sources(self.settings, part, source):
            own = self.templates[one.name]
            opened = open_part(open_source(one.config, part), one.config, own, self.folder / "raw" / one.name)
            view.head(look(opened, one.config, one.values_from, [], own, self.new_tokens, one.name))
            for row in first_rows(opened.raw, opened.encoder, opened.places, own, limit):
                view.row(row, own)
        if view.counts:
            view.tail(self.count(part))
        view.end([])

    def text(self, part="train", source=None):
        stream = io.StringIO()
        self.show(TextView(stream), part, source)
        return stream.getvalue()


@pytest.fixture
def mix(tmp_path, tiny_model, monkeypatch):
    """`mix(*sources, ...)`: a mix of sources that SPLITS has."""
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))

    def make(*entries, **config):
        return Mix(tmp_path, tiny_model, entries or (CODE, CHAT, LAST), **config)

    return make


def section(text, title):
    """Return the lines of a section."""
    return text.partition(f"# {title}\n")[2].split("\n\n")[0].splitlines()


def test_rows_that_two_sources_have_are_found(mix):
    """A row of valid is sought in train of each source. A source that is only evaluated has no train."""
    made = mix()
    found = made.count()
    assert {rows: repeats.first(9) for rows, repeats in found.repeated.items()} == {
        Rows("train", "code"): [(3, 0)],
        Rows("train", "chat"): [],
    }
    named = {pair: repeats.first(9) for pair, repeats in found.shared.items() if len(repeats)}
    assert named == {
        (Rows("train", "chat"), Rows("train", "code")): [(2, 2)],
        (Rows("valid", "code"), Rows("train", "code")): [(1, 1)],
        (Rows("valid", "code"), Rows("train", "chat")): [(0, 0)],
        (Rows("valid", "last"), Rows("train", "chat")): [(1, 4), (2, 0)],
    }
    assert list(repeat_sentences(found)) == [
        "train, code: 1 row is a duplicate of an earlier row: row 4 (as row 1)",
        "train, chat: 1 row is in train of code, too: row 3 (as row 3)",
        "valid, code: 1 row is in train of code, too: row 2 (as row 2)",
        "valid, code: 1 row is in train of chat, too: row 1 (as row 1)",
        "valid, last: 2 rows are in train of chat, too: row 2 (as row 5), row 3 (as row 1)",
    ]
    assert list(repeat_sentences(made.count("valid"))) == [
        "valid: no row is a duplicate of an earlier row of its source",
        "valid, last: 1 row is in valid of code, too: row 3 (as row 1)",
        *list(repeat_sentences(found))[2:],
    ]


def test_where_no_two_sources_have_a_row_a_line_says_so(mix):
    found = mix({"name": "last"}, {"name": "code", "valid_split": "valid", "rows": 2}).count()
    assert list(repeat_sentences(found))[1:] == [
        "train: no row is in two sources",
        "valid, code: 1 row is in train of code, too: row 2 (as row 2)",
    ]
    found = mix({"name": "chat"}, {"name": "last"}).count()
    assert list(repeat_sentences(found)) == [
        "train: no row is a duplicate of an earlier row of its source",
        "train: no row is in two sources",
    ]


def test_sources_that_render_differently_are_named(mix):
    """Their rows cannot be compared by their tokens."""
    made = mix(CODE, {**CHAT, "chat_template": "zephyr", "system_prompt": "Be short."})
    *_, last = repeat_sentences(made.count())
    assert last.startswith("the sources differ in chat_template, system_prompt, so the same conversation ")


def test_the_facts_are_those_of_the_epoch_of_the_mix(mix):
    made = mix()
    prepared = prepare_all(made.config, made.tokenizer, made.templates)
    found = made.count()
    lengths = [len(sample["input_ids"]) for sample in prepared["train"].dataset]
    assert len(lengths) == 10 and found.lengths == describe_lengths(np.asarray(lengths))
    assert found.packing.packs == prepared["train"].summary.packs
    assert found.packing.share == sum(lengths) / (128 * found.packing.packs)
    assert found.summaries == {part: one.summary for part, one in prepared.items()}


def test_the_text_has_a_table_of_the_sources(mix):
    text = mix().text()
    titles, *lines = [re.split(r"\s{2,}", line) for line in section(text, "sources")]
    table = [dict(zip(titles, line, strict=True)) for line in lines if line[0] == "train"]
    names = ("source", "rows", "samples", "in an epoch", "epochs", "dropped")
    assert [tuple(row[name] for name in names) for row in table] == [
        ("code", "4", "4", "5", "1.25", "0"),
        ("chat", "6", "6", "5", "0.833", "0"),
    ]
    assert [line[:4] for line in lines[2:]] == [["valid", "code", "2", "2"], ["valid", "last", "3", "3"]]
    sums = [int(row["tokens"]) for row in table]
    total = f"train: 10 rows, 10 samples in 3 packs, {sum(sums)} tokens "
    assert section(text, "counts")[0].startswith(total)


def test_each_source_has_its_columns_its_template_and_its_rows(mix):
    made = mix(CODE, {**CHAT, "chat_template": "zephyr"})
    text = made.text()
    for name, rows in (("code", 4), ("chat", 6)):
        assert f"# data\ntrain, {name}: {rows} rows of {made.folder}/{name}/train.jsonl\n" in text
    assert "; chat_template: tokenizer (test chat_template)" in section(text, "template of code")[1]
    assert section(text, "template of chat")[1] == (
        "template    zephyr, which is part of Phalanx; chat_template: zephyr (data.mix[1].chat_template)"
    )
    code, chat = text.split("# data\n")[1:]
    assert "⟦<|im_start|>user" in code and "⟦<|user|>" not in code
    assert "⟦<|user|>" in chat and f"It is e.{END}" in chat


def test_what_is_said_about_some_rows_names_their_source(mix, monkeypatch):
    """The rows that are dropped, and notes on samples."""
    long = {"messages": [message for row in turns("e", "f") for message in row["messages"]]}
    empty = {"messages": [user("x"), assistant(" ")]}
    monkeypatch.setitem(SPLITS["chat"], "train", [*turns("e"), long, empty])
    text = mix(CODE, {**CHAT, "history": "unroll"}).text()
    assert section(text, "counts")[1:3] == [
        "train, chat: dropped (empty completion): row 3",
        f"train, chat: 2 samples: {UNROLLED}",
    ]
    assert section(text, "sources")[2].endswith("1 (empty completion)")


def test_the_page_has_the_facts_of_the_text(mix, tmp_path):
    made = mix()
    made.show(PageView(io.StringIO(), tmp_path / "page.html"))
    page = unescape(re.sub(r"<[^>]*>", "\n", (tmp_path / "page.html").read_text()))
    titles = ("#", "row ", "  ")
    lines = made.text().splitlines()
    facts = [line for line in lines if line and not line.startswith(titles) and "█" not in line]
    assert len(facts) > 20
    for line in facts:
        for cell in re.split(r"\s{2,}", line):
            assert f"\n{cell}\n" in page, cell
    names = ("code", "chat")
    rows = [page.index(f"\nRows of train of {name}, as the model sees them\n") for name in names]
    assert rows[0] < page.index("It is b.") < rows[1] < page.index("It is h.")


def test_json_has_the_samples_of_the_run_for_each_source(mix):
    """In the order of the mix, each with its template."""
    made = mix({**CHAT, "chat_template": "zephyr"}, CODE, LAST)
    prepared = prepare_all(made.config, made.tokenizer, made.templates)
    for part, names in (("train", ["chat", "code"]), ("valid", ["code", "last"])):
        stream = io.StringIO()
        made.show(JsonView(stream), part)
        found = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert list(dict.fromkeys(row["source"] for row in found)) == names == list(prepared[part].sources)
        for name in names:
            own = [row for row in found if row["source"] == name]
            assert [row["row"] for row in own] == list(range(1, len(SPLITS[name][part]) + 1))
            samples = [{key: row["samples"][0][key] for key in ("input_ids", "labels")} for row in own]
            assert samples == list(prepared[part].sources[name].dataset)


def test_a_source_is_chosen_by_its_name(mix):
    made = mix()
    assert [one.name for one in choose_sources(made.settings, "train")] == ["code", "chat"]
    assert [one.name for one in choose_sources(made.settings, "valid", "last")] == ["last"]
    text = made.text(source="chat")
    assert "# rows of train of chat" in text and "# rows of train of code" not in text
    assert section(text, "sources")[1].startswith("train  code"), "the facts are those of the mix"


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("train", "cod", "there is no source 'cod' in data.mix. Allowed: code, chat, last."),
        ("train", "last", "last has no train part. Give --split valid, or one of these sources: code, chat."),
        ("valid", "chat", "chat has no valid part. Give --split train, or one of these sources: code, last."),
    ],
)
def test_a_source_that_is_not_there_is_refused(mix, part, name, message):
    with pytest.raises(ConfigError) as error:
        choose_sources(mix().settings, part, name)
    assert str(error.value) == f"--source: {message}"


def test_without_a_mix_no_source_has_a_name(tmp_path):
    settings = settings_of(data_path=str(tmp_path), trainer="sft")
    assert [one.name for one in choose_sources(settings, "train")] == [""]
    with pytest.raises(ConfigError, match=r"^--source: the config has no data\.mix"):
        choose_sources(settings, "train", "code")
