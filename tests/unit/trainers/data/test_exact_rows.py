"""The values of a row reach the template as the file has them."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from rows import END, GOOD, Q, assistant, user

from trainers.config.schema import TrainConfig
from trainers.data.loading import ROW, open_source

ARGUMENTS = {
    "dates": [{"day": "2026-05-01"}, {"day": "2026-05-02"}],
    "numbers": [{"amount": 40}, {"amount": 2.5}],
    "order": [{"a": 1, "b": 2}, {"b": 1, "a": 2}],
    "nulls": [{"unit": None}, {"unit": "m"}],
    "other keys": [{"a": 1}, {"b": {"c": []}}],
    "other types": [{"a": 1}, {"a": "x"}],
    "long numbers": [{"a": 2**70}, {"a": 1e-20}],
}


def calls(arguments):
    function = {"name": "f", "arguments": arguments}
    return [user(Q), {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


@pytest.fixture
def loaded(tmp_path):
    def load(rows, suffix="jsonl"):
        file = tmp_path / f"train.{suffix}"
        if suffix == "parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(file)
        else:
            file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
        config = TrainConfig(data_path=str(tmp_path), trainer="sft", chat_template="tokenizer")
        return open_source(config, "train").load(config, tmp_path / "raw")[0]

    return load


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_and_tools_of_a_json_file_stay_as_they_are(loaded, kind, suffix):
    rows = [
        {"messages": calls(each), "tools": [{"name": "f", "parameters": each}]} for each in ARGUMENTS[kind]
    ]
    found = loaded(rows, suffix)[:]
    # As text: equal objects may have another order of keys, and 40 equals 40.0.
    assert json.dumps(found["messages"]) == json.dumps([row["messages"] for row in rows])
    assert json.dumps(found["tools"]) == json.dumps([row["tools"] for row in rows])


def test_a_key_that_only_a_late_row_has_is_read(loaded):
    """`datasets` takes the types of a file from its first 10 MB."""
    first = {"messages": [user("x" * 1000), assistant(GOOD)]}
    last = {"messages": calls({"a": 1}), "tools": [{"name": "f"}]}
    found = loaded([first] * 11_000 + [last])
    assert found[11_000] == {**last, "chat_template_kwargs": None, ROW: 11_000}
    assert found[0] == {**first, "tools": None, "chat_template_kwargs": None, ROW: 0}


def test_the_nulls_that_a_type_adds_are_removed(loaded):
    rows = [{"messages": calls({"a": 1})}, {"messages": calls({"b": {"c": 2}})}]
    assert loaded(rows, "parquet")["messages"] == [row["messages"] for row in rows]


def test_blank_lines_are_no_rows(loaded, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"messages": 1}\r\n\r\n  \n{"messages": 2}\n\n')
    config = TrainConfig(data_path=str(tmp_path), trainer="sft", chat_template="tokenizer")
    found = open_source(config, "train").load(config, tmp_path / "raw")[0][:]
    assert found["messages"] == [1, 2] and found[ROW] == [0, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_null_that_means_nothing_does_not_reach_the_template(prepare, tokenizer, suffix):
    """A template that asks whether a key is defined sees one that is null."""
    turn = {"role": "assistant", "content": GOOD, "tool_calls": None, "name": None, "reasoning_content": None}
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.name is defined or m.tool_calls is defined or m.reasoning_content is defined %} (null)"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": [user(Q), turn]}]
    sample = prepare(rows, suffix=suffix, chat_template="tokenizer", using=tokenizer).dataset[0]
    assert tokenizer.decode(sample["input_ids"]) == f"user: {Q}assistant: {GOOD}{END}"
