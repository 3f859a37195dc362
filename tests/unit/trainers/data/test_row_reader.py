"""The columns of a row become a prompt, turns or a label."""

from __future__ import annotations

import pytest
from rows import BAD, END, FORMATS, GOOD, LABELLED, OTHER, PAIRS, TEXTS, TURNS, Q, trained_text


def test_instruction_without_a_template_gets_headings(prepare, tokenizer):
    (row,) = prepare([{"instruction": "Add.", "input": "1 and 2", "output": "3"}]).dataset
    text = tokenizer.decode(row["input_ids"])
    assert text == "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3<|im_end|>"
    assert trained_text(tokenizer, row) == "3<|im_end|>"


def test_instruction_and_input_form_the_prompt(texts):
    row = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    assert texts(row, trainer="dpo")["prompt"] == (
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    found = texts(row, trainer="dpo", chat_template="tokenizer")["prompt"]
    assert found == f"<|im_start|>user\nAdd.\n\n1 and 2{END}\n<|im_start|>assistant\n"


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_prompt_format_joins_several_columns(texts, trainer):
    row = {"question": Q, "the context": None, "n.o": 7, "chosen": GOOD, "rejected": BAD}
    found = texts(row, trainer=trainer, prompt_format="{{Q{n.o}}}: {question}{the context}\n")
    assert found["prompt"] == "{Q7}: What is a rank?\n"


def test_prompt_format_joins_several_columns_before_a_completion(prepare, tokenizer):
    row = {"question": Q, "context": "Ranks.", "answer": GOOD}
    format = "{context} {question}"
    (found,) = prepare([row], prompt_format=format, text_column="answer").dataset
    assert tokenizer.decode(found["input_ids"]) == f"Ranks. {Q}{GOOD}{END}"
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == GOOD + END


@pytest.mark.parametrize("trainer", (*TEXTS, *PAIRS))
def test_messages_need_a_template(refused, trainer):
    row = {"chosen": TURNS, "rejected": OTHER} if trainer in PAIRS else {"messages": TURNS}
    refused([row], "train.jsonl: row 1", "Set chat_template: tokenizer", trainer=trainer)
    row = {"prompt": TURNS[:1], "completion": TURNS[1:], "chosen": TURNS[1:], "rejected": OTHER[1:]}
    refused([row], "row 1", "Set chat_template: tokenizer", trainer=trainer)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("yes", "no"),
    [(True, False), (1, 0), (1.0, 0.0), ("True", "False"), ("yes", "no"), ("1", "0"), (" TRUE", "false ")],
)
def test_all_spellings_of_a_label_are_read(prepare, tokenizer, suffix, yes, no):
    rows = [
        {"prompt": Q, "completion": GOOD, "label": yes},
        {"prompt": Q, "completion": BAD, "label": no},
    ]
    dataset = prepare(rows, trainer="kto", suffix=suffix).dataset
    found = {tokenizer.decode(row["completion_ids"]): row["label"] for row in dataset}
    assert found == {GOOD + END: True, BAD + END: False}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("label", ["maybe", "", "2"])
def test_a_label_must_be_true_or_false(refused, suffix, label):
    rows = [{**row, "label": str(row["label"])} for row in LABELLED] + [{**LABELLED[0], "label": label}]
    refused(rows, f"train.{suffix}: row 3", "column 'label' must be true or false", repr(label),
            trainer="kto", suffix=suffix)  # fmt: skip


def test_a_label_must_not_be_nan(refused):
    rows = [{**LABELLED[0], "label": 1.0}, {**LABELLED[1], "label": float("nan")}]
    refused(rows, "train.parquet: row 2", "must be true or false, not nan", trainer="kto", suffix="parquet")
