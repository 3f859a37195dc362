"""Which columns of a split contain what."""

from __future__ import annotations

import pytest
from rows import BAD, END, GOOD, PAIR, PAIRS, TEXTS, Q


@pytest.mark.parametrize(
    ("trainer", "row", "missing"),
    [
        *((trainer, {"body": "x"}, "text") for trainer in TEXTS),
        *((trainer, {"prompt": "x"}, "text") for trainer in TEXTS),
        *((trainer, {"instruction": "x", "input": ""}, "text") for trainer in TEXTS),
        *((trainer, {"prompt": "x", "rejected": "y"}, "chosen") for trainer in PAIRS),
        *((trainer, {"prompt": "x", "chosen": "y"}, "rejected") for trainer in PAIRS),
        *((trainer, {"prompt": "x", "text": "y"}, "chosen") for trainer in PAIRS if trainer != "kto"),
        ("kto", {"prompt": "x", "completion": "y"}, "label"),
        ("kto", {"prompt": "x", "label": True}, "text"),
    ],
)
def test_a_missing_column_is_named_with_the_columns_that_exist(refused, trainer, row, missing):
    refused([row], f"there is no column '{missing}'", ", ".join(row), trainer=trainer)


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        ("sft", {"text_column": "gone"}),
        ("sft", {"prompt_text_column": "gone"}),
        ("mlm", {"prompt_format": "{gone}"}),
        ("dpo", {"rejected_text_column": "gone"}),
        ("reward", {"text_column": "gone"}),
        ("kto", {"label_column": "gone"}),
        ("orpo", {"prompt_text_column": "gone"}),
    ],
)
def test_a_column_that_the_config_names_must_exist(refused, trainer, config):
    row = {**PAIR, "text": "x", "completion": "y"}
    refused([row], "there is no column 'gone'", next(iter(config)), trainer=trainer, **config)


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_columns_are_named_in_the_config_as_in_autotrain(texts, trainer):
    row = {"a": GOOD, "b": BAD, "c": Q, "prompt": "not this", "chosen": "nor this"}
    names = {"text_column": "a", "rejected_text_column": "b", "prompt_text_column": "c"}
    assert texts(row, trainer=trainer, **names) == {"prompt": Q, "chosen": GOOD + END, "rejected": BAD + END}


def test_the_label_column_may_have_another_name(prepare):
    rows = [{"ask": Q, "say": GOOD, "liked": "yes"}, {"ask": Q, "say": BAD, "liked": "no"}]
    names = {"prompt_text_column": "ask", "text_column": "say", "label_column": "liked"}
    assert sorted(prepare(rows, trainer="kto", **names).dataset["label"]) == [False, True]
