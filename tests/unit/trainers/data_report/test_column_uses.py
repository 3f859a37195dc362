"""How the columns of a split were found."""

from __future__ import annotations

import pytest
from rows import TURNS

from trainers.config.schema import TrainConfig
from trainers.data.column_kinds import with_messages
from trainers.data.columns import find_columns
from trainers.data_report.column_uses import USUAL, column_uses


@pytest.fixture
def uses():
    """`uses(row, ...)`: the uses of the columns of a split with this row, and the other columns."""
    from datasets import Dataset

    def found(row, **config):
        values = TrainConfig(**{"trainer": "sft", **config})
        columns = with_messages(find_columns(list(row), values), Dataset.from_list([row]))
        sources = {name: f"c.yaml:{number}" for number, name in enumerate(config, start=5)}
        used, unused = column_uses(row, columns, values, sources, 1)
        return {use.column: (use.what, use.found, use.holds) for use in used}, unused

    return found


def test_columns_of_the_config_and_of_usual_names(uses):
    found, unused = uses({"question": "a", "completion": "b", "id": "c"}, prompt_text_column="question")
    assert found == {
        "question": ("the prompt", "prompt_text_column (c.yaml:5)", "text"),
        "completion": ("the completion", USUAL, "text"),
    }
    assert unused == ["id"]


def test_a_column_of_messages_says_so(uses):
    row = {"messages": TURNS, "tools": "[]", "system": "Be short."}
    found, unused = uses(row, chat_template="chatml")
    assert found["messages"] == ("the conversation", USUAL, "messages, as in most rows")
    assert set(found) == {"messages", "tools", "system"} and unused == []


def test_without_a_template_its_columns_are_not_used(uses):
    found, unused = uses({"text": "a", "tools": "[]", "system": "Be short."})
    assert set(found) == {"text"} and unused == ["tools", "system"]


def test_the_parts_of_a_prompt_and_of_an_instruction(uses):
    row = {"a": "1", "b": "2", "completion": "c"}
    found, _ = uses(row, prompt_format="{a}: {b}, {a}")
    assert found["a"] == found["b"] == ("part of the prompt", "prompt_format (c.yaml:5)", "")
    found, unused = uses({"instruction": "a", "output": "b", "history": [["c", "d"]], "text": "e"})
    assert set(found) == {"instruction", "output", "history"} and unused == ["text"]


@pytest.mark.parametrize(
    ("trainer", "row"),
    [
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("kto", {"prompt": "a", "completion": "b", "label": "true"}),
        ("reward", {"chosen": "b", "rejected": "c"}),
        ("sft", {"input_ids": [1], "labels": [1], "attention_mask": [1]}),
        ("sft", {"user": "a", "assistant": "b"}),
    ],
)
def test_every_needed_column_is_named_once(uses, trainer, row):
    found, unused = uses(row, trainer=trainer)
    assert list(found) == sorted(row, key=list(found).index) and set(found) == set(row) and unused == []
    assert {how for _, how, _ in found.values()} == {USUAL}
