"""Which template a run uses, and how it was chosen."""

from __future__ import annotations

import pytest

from trainers.config.schema import TrainConfig
from trainers.data.columns import Columns
from trainers.data_report.template import template_facts

SOURCES = {"chat_template": "c.yaml:9", "train_on": "default"}


@pytest.fixture
def facts(tokenizer):
    def found(own=None, new=(), columns=None, **config):
        values = TrainConfig(**{"trainer": "sft", "model": "m", **config})
        used = own or tokenizer
        return dict(template_facts(values, SOURCES, used, list(new), columns or Columns("text", "text")))

    return found


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "none: texts are joined as they are; chat_template: null (c.yaml:9)"),
        ("tokenizer", "the tokenizer's own; chat_template: tokenizer (c.yaml:9)"),
        ("chatml", "chatml, which is part of Phalanx; chat_template: chatml (c.yaml:9)"),
        ("a.jinja", "the file; chat_template: a.jinja (c.yaml:9)"),
    ],
)
def test_the_template_and_who_chose_it(facts, template, words):
    assert facts(chat_template=template)["template"] == words


def test_several_templates_of_a_tokenizer_are_named(facts, run_tokenizer):
    own = run_tokenizer()
    own.chat_template = {"default": own.chat_template, "tool_use": "{{ tools }}"}
    assert "(default, tool_use)" in facts(own, chat_template="tokenizer")["template"]


def test_where_the_turns_are_marked(facts, run_tokenizer):
    own = run_tokenizer()
    assert facts(own, chat_template="tokenizer")["turns"].startswith("found by rendering")
    own.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert facts(own, chat_template="tokenizer")["turns"].startswith("marked by the template")
    assert "turns" not in facts(own, chat_template="tokenizer", train_on="all")


def test_tokens_that_the_template_adds_are_named(facts, run_tokenizer):
    own = run_tokenizer(chat_template="zephyr")
    ids = [own.convert_tokens_to_ids(word) for word in ("<|user|>", "<|assistant|>")]
    assert facts(own, ids)["new tokens"] == "<|user|>, <|assistant|>, which the vocabulary lacked"


def test_rows_of_tokens_have_no_template(facts):
    assert facts(columns=Columns("tokens", "input_ids"))["template"] == "not used: the rows are tokens"
