"""Rows of default, sft and mlm: what the loss sees, what is cut, and what is dropped."""

from __future__ import annotations

import json

import pytest
from rows import END, FORMATS, GOOD, TEXTS, TURNS, Q, assistant, in_format, trained_text

from trainers.config.errors import ConfigError

SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]
CHAT_ROWS = [
    pytest.param({"prompt": Q, "completion": GOOD}, {}, id="prompt-completion"),
    pytest.param({"instruction": Q, "input": "", "output": GOOD}, {}, id="instruction"),
    pytest.param({"messages": TURNS}, {}, id="messages"),
    pytest.param({"text": TURNS}, {}, id="messages-in-text"),
    pytest.param({"text": json.dumps(TURNS)}, {}, id="json-string"),
    pytest.param({"text": repr(TURNS)}, {}, id="python-literal"),
    pytest.param({"c": SHAREGPT}, {"text_column": "c"}, id="sharegpt"),
    pytest.param({"q": Q, "a": GOOD}, {"prompt_text_column": "q", "text_column": "a"}, id="named-columns"),
    pytest.param({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, id="conversational-pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "config"), CHAT_ROWS)
def test_every_form_of_a_chat_row_gives_the_same_tokens(prepare, tokenizer, row, config):
    (found,) = prepare([row], chat_template="tokenizer", **config).dataset
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(found["input_ids"]) == expected
    assert trained_text(tokenizer, found) == GOOD + "<|im_end|>", "the answer and its end, nothing else"
    assert len(found["input_ids"]) == len(found["labels"])


def test_train_on_all_supervises_the_prompt_too(prepare, tokenizer):
    (row,) = prepare([{"messages": TURNS}], chat_template="tokenizer", train_on="all").dataset
    assert Q in trained_text(tokenizer, row)


def test_plain_completion_masks_the_prompt(prepare, tokenizer):
    (row,) = prepare([{"prompt": Q, "completion": f" {GOOD}"}]).dataset
    assert trained_text(tokenizer, row) == f" {GOOD}<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == f"{Q} {GOOD}<|im_end|>"


def test_long_rows_are_cut_and_rows_without_a_trained_token_are_dropped(prepare):
    rows = [{"prompt": "x" * 500, "completion": "y"}, {"prompt": "x ", "completion": "y" * 500}]
    prepared = prepare(rows, block_size=64)
    assert (prepared.summary.rows, prepared.summary.truncated) == (2, 2)
    assert prepared.summary.dropped == {"no trained token": 1}
    (row,) = prepared.dataset
    assert len(row["input_ids"]) == 64
    assert prepared.summary.tokens == 64


def test_errors_in_rows_name_the_row(prepare):
    with pytest.raises(ConfigError, match=r"train\.jsonl: row 1: .*Set chat_template: tokenizer"):
        prepare([{"messages": TURNS}])
    with pytest.raises(ConfigError, match=r"row 1: train_on: completion needs rows .* has plain text"):
        prepare([{"text": "plain"}], train_on="completion")
    with pytest.raises(ConfigError, match=r"row 1: .* has plain text"):
        prepare([{"text": "plain"}], chat_template="tokenizer")
    with pytest.raises(ConfigError, match=r"train\.jsonl:2: the row is not valid JSON"):
        prepare('{"text": "one"}\n{"text": \n')


TRAINED = [
    ("sft", {}, f" {GOOD}{END}"),
    ("sft", {"train_on": "completion"}, f" {GOOD}{END}"),
    ("sft", {"train_on": "all"}, f"{Q} {GOOD}{END}"),
    ("default", {}, f"{Q} {GOOD}{END}"),
    ("default", {"train_on": "completion"}, f" {GOOD}{END}"),
]


@pytest.mark.parametrize(("trainer", "config", "expected"), TRAINED)
def test_train_on_decides_what_the_loss_sees(prepare, tokenizer, trainer, config, expected):
    row = {"prompt": Q, "completion": f" {GOOD}"}
    (found,) = prepare([row], trainer=trainer, **config).dataset
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_stay_unchanged_but_for_padding(prepare, trainer, suffix):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [0, 0, 1, 1]},
    ]
    dataset = prepare(rows, trainer=trainer, suffix=suffix).dataset
    assert dataset["input_ids"][:] == [[5, 6, 7, 8], [5, 6]], "padding is removed"
    assert dataset["labels"][:] == [[-100, -100, 7, 8], [5, 6]]


@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_without_labels_are_trained_on(prepare, trainer):
    (row,) = prepare([{"input_ids": [5, 6, 7]}], trainer=trainer).dataset
    assert row["labels"] == [5, 6, 7]


def test_token_ids_for_mlm_are_cut_into_samples(prepare):
    dataset = prepare([{"input_ids": list(range(5, 15))}], trainer="mlm", block_size=4).dataset
    assert dataset["input_ids"][:] == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]


def test_token_ids_that_are_too_long_are_cut(prepare):
    prepared = prepare([{"input_ids": list(range(5, 100))}], block_size=16)
    assert len(prepared.dataset[0]["input_ids"]) == 16
    assert prepared.summary.truncated == 1


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_texts_are_dropped(dropped, trainer, suffix):
    rows = [{"text": "A rank."}, {"text": ""}, {"text": " \n "}, {"text": None}]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"empty text": 3}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_prompts_and_completions_are_dropped(dropped, trainer, suffix):
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "b"), ("a", ""), ("a", None), (" ", "b"))]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"empty completion": 2, "empty prompt": 1}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_messages_are_dropped(dropped, tokenizer, trainer, suffix):
    rows = in_format(suffix, {"messages": TURNS}, {"messages": None}, {"messages": [TURNS[0], assistant("")]})
    found = dropped(rows, trainer=trainer, suffix=suffix, chat_template="tokenizer", using=tokenizer)
    assert found == {"empty text": 1, "empty completion": 1}


@pytest.mark.parametrize("trainer", TEXTS)
def test_a_template_needs_messages(refused, tokenizer, trainer):
    refused([{"text": "plain"}], "row 1", "needs messages", "Set chat_template: null", trainer=trainer,
            chat_template="tokenizer", using=tokenizer)  # fmt: skip


def test_a_row_whose_prompt_fills_block_size_is_dropped(dropped):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "x" * 500, "completion": "b"}]
    assert dropped(rows) == {"no trained token": 1}


IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("trainer", TEXTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [6, 7]}, "lists of equal length"),
        ({"attention_mask": [1]}, "lists of equal length"),
        ({"input_ids": [5, 6, 99999]}, "integers from 0 to 383"),
        ({"input_ids": [5, 6, -1]}, "integers from 0 to 383"),
        ({"labels": [5, 6, 99999]}, "labels must be token ids, or -100"),
        ({"labels": [5, 6, -1]}, "labels must be token ids, or -100"),
    ],
)
def test_malformed_token_ids_are_refused(refused, trainer, suffix, change, words):
    refused([IDS, {**IDS, **change}], f"train.{suffix}: row 2", words, trainer=trainer, suffix=suffix)


@pytest.mark.parametrize("trainer", TEXTS)
@pytest.mark.parametrize("ids", ["5 6 7", 5, [5.0, 6.5], ["5", "6"]])
def test_token_ids_of_another_type_are_refused(refused, trainer, ids):
    refused([{"input_ids": ids}], "train.jsonl: row 1", "input_ids", trainer=trainer)


@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_token_ids_are_dropped(dropped, trainer):
    nothing = {"input_ids": [], "labels": [], "attention_mask": []}
    padding = {**IDS, "attention_mask": [0, 0, 0]}
    rows = [IDS, nothing, padding, dict.fromkeys(IDS)]
    assert dropped(rows, trainer=trainer) == {"empty text": 3}


@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_without_a_trained_token_are_dropped(dropped, trainer):
    rows = [IDS, {**IDS, "labels": [-100] * 3}, {**IDS, "labels": [5, -100, -100]}]
    assert dropped(rows, trainer=trainer) == {"no trained token": 2}
