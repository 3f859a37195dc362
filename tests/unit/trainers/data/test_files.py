"""Rows that cannot be read are reported with their file and their place."""

from __future__ import annotations

import json

import pytest
from rows import TURNS

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("jsonl", b'{"text": "a"}\n{"text": \n', ["train.jsonl:2", "not valid JSON"]),
        ("jsonl", b'{"text": "a"}\n["b"]\n', ["train.jsonl:2", "must be an object"]),
        ("jsonl", b'{"text": "a"}\n{"text": "\\ud800b"}\n', ["train.jsonl:2", "half a surrogate pair"]),
        ("jsonl", b'{"text": "a"}\n{"text": 5}\n', ["train.jsonl: row 2", "text or messages, not int"]),
        ("csv", b"text,n\na,1\nb,2,3\n", ["train.csv:3", "more fields than the header"]),
        ("csv", b"text,n\n\"a\nb\",1\n\"c,3\nd,4\n", ["train.csv:4", "a quote opens in this row"]),
        ("csv", b"text,text\na,b\n", ["train.csv:1", "two columns are named 'text'"]),
        ("csv", b"text,n\ncaf\xe9,1\n", ["train.csv", "not UTF-8"]),
        ("csv", b"text;n\na;1\n", ["there is no column 'text'", "The columns are: text;n"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_reported_with_its_place(refused, suffix, content, words):
    refused(content, *words, suffix=suffix)


def test_the_file_is_named_if_a_split_has_several(tokenizer, tmp_path, monkeypatch):
    from trainers.data import prepare

    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    for part, roles in (("0", ["user", "user"]), ("1", ["user", "wizard"])):
        lines = [json.dumps({"messages": [{"role": role, "content": "q"}, TURNS[1]]}) for role in roles]
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(lines))
    config = TrainConfig(data_path=str(tmp_path), trainer="sft", block_size=64, chat_template="tokenizer")
    with pytest.raises(ConfigError, match=r"train-1\.jsonl: row 2: there is no role 'wizard'"):
        prepare.prepare(config, tokenizer)
