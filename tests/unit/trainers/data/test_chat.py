"""Messages become token ids: their roles, the template, BOS and EOS, and what is trained on."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from rows import EACH, GOOD, OTHER, PAIRS, SYSTEM, TEXTS, TURNS, assistant, in_format, trained_text, user

from trainers.data.tokens import Tokens

BAD_TURNS = [
    pytest.param([{"role": "wizard", "content": "x"}, TURNS[1]], "no role 'wizard'", id="unknown-role"),
    pytest.param([{"content": "x"}, TURNS[1]], "a message must be", id="no-role"),
    pytest.param([{"role": "user"}, TURNS[1]], "a message must be", id="no-content"),
    pytest.param([user(None), TURNS[1]], "a message must be", id="null-content"),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "suffix"), [*EACH, ("sft", "parquet"), ("dpo", "parquet")])
@pytest.mark.parametrize(("turns", "words"), BAD_TURNS)
def test_messages_that_are_not_a_conversation_are_refused(refused, tokenizer, trainer, suffix, turns, words):
    good, bad = {"messages": TURNS}, {"messages": turns}
    if trainer in PAIRS:
        good, bad = ({"chosen": row["messages"], "rejected": OTHER} for row in (good, bad))
    refused(in_format(suffix, good, bad), f"train.{suffix}: row 2", words, trainer=trainer, suffix=suffix,
            chat_template="tokenizer", using=tokenizer)  # fmt: skip


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto"])
def test_a_row_without_a_message_is_counted(dropped, tokenizer, trainer):
    good, empty = {"messages": TURNS}, {"messages": []}
    if trainer == "dpo":
        good, empty = ({"chosen": row["messages"], "rejected": OTHER} for row in (good, empty))
    if trainer == "kto":
        good, empty = ({**row, "label": True} for row in (good, empty))
        good = [good, {**good, "label": False}]
    rows = [*(good if isinstance(good, list) else [good]), empty]
    reason = "empty text" if trainer == "sft" else "empty completion"
    assert dropped(rows, trainer=trainer, chat_template="tokenizer", using=tokenizer) == {reason: 1}


@pytest.mark.parametrize("trainer", TEXTS)
def test_an_object_is_no_conversation(refused, tokenizer, trainer):
    refused([{"messages": user("x")}], "row 1", "must hold text or messages, not dict", trainer=trainer,
            chat_template="tokenizer", using=tokenizer)  # fmt: skip


@pytest.mark.parametrize("trainer", (*TEXTS, *PAIRS))
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "must hold text or messages, not int"),
        (["a", "b"], "a message must be"),
        ([None], "a message must be"),
    ],
)
def test_messages_that_are_not_a_list_of_turns_are_refused(refused, tokenizer, trainer, value, words):
    row = {"prompt": "q", "chosen": value, "rejected": value} if trainer in PAIRS else {"messages": value}
    refused([row], "train.jsonl: row 1", words, trainer=trainer, chat_template="tokenizer", using=tokenizer)


@pytest.mark.parametrize("trainer", (*TEXTS, *PAIRS))
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
    ids=["raises", "index", "arithmetic", "syntax"],
)
def test_a_template_that_fails_is_reported_with_the_row(refused, tokenizer, trainer, template, words):
    odd = deepcopy(tokenizer)
    odd.chat_template = template
    row = {"chosen": TURNS, "rejected": OTHER} if trainer in PAIRS else {"messages": TURNS}
    refused([row], "train.jsonl: row 1: chat_template: the template rejects the turns (user", words,
            trainer=trainer, chat_template="tokenizer", using=odd)  # fmt: skip


def test_only_assistant_turns_are_trained_on_and_all_of_them(prepare, tokenizer):
    turns = [SYSTEM, *TURNS, user("Why?"), assistant("Speed.")]
    (row,) = prepare([{"messages": turns}], chat_template="tokenizer").dataset
    assert trained_text(tokenizer, row) == f"{GOOD}<|im_end|>Speed.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_rewrites_turns_is_refused(prepare, refused, tokenizer):
    odd = deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = {"chat_template": "tokenizer", "using": odd}
    refused([{"messages": TURNS}], "row 1: chat_template:", "train_on: all", **config)
    (row,) = prepare([{"messages": TURNS}], train_on="all", **config).dataset
    assert odd.decode(row["input_ids"]) == f"2{TURNS[0]['content']}{GOOD}"


def test_text_ends_with_eos_once(prepare, tokenizer):
    rows = prepare([{"text": "A rank."}, {"text": "A rank.<|im_end|>"}]).dataset
    for row in rows:
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert row["labels"][-1] == tokenizer.eos_token_id
    (row,) = prepare([{"text": "A rank."}], add_eos_token=False).dataset
    assert tokenizer.eos_token_id not in row["input_ids"]


def test_bos_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_bos = deepcopy(tokenizer)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    for text in ("A rank.", "<s>A rank."):
        found = Tokens(with_bos).joined("", text, eos=True, everything=True)
        assert found.input_ids.count(bos) == 1
        assert len(found.input_ids) == len(found.labels)


@pytest.mark.parametrize("trainer", ["default", "sft", "dpo", "orpo", "kto", "reward"])
def test_no_system_turn_is_invented(prepare, tokenizer, trainer):
    row = {"chosen": TURNS, "rejected": OTHER, "messages": TURNS}
    for found in prepare([row], trainer=trainer, chat_template="tokenizer").dataset:
        for name in ("input_ids", "prompt_ids", "chosen_ids"):
            assert "system" not in tokenizer.decode(found.get(name, []))


THOUGHT = {**assistant(GOOD), "reasoning_content": "Ranks are processes."}


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto", "reward", "mlm"])
def test_a_field_that_the_template_does_not_render_is_named(refused, tokenizer, trainer):
    row = (
        {"chosen": [TURNS[0], THOUGHT], "rejected": OTHER}
        if trainer in PAIRS
        else {"messages": [TURNS[0], THOUGHT]}
    )
    words = ("row 1: chat_template: this template does not render reasoning_content", "unrendered: drop")
    refused([row], *words, trainer=trainer, chat_template="tokenizer", using=tokenizer)


def test_rows_with_a_field_that_is_not_rendered_can_be_dropped(dropped):
    rows = [{"messages": TURNS}, {"messages": [TURNS[0], THOUGHT]}]
    found = dropped(rows, chat_template="tokenizer", unrendered="drop")
    assert found == {"not rendered by the template: reasoning_content": 1}


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_an_answer_that_the_template_cuts_is_refused(refused, tokenizer, trainer):
    odd = deepcopy(tokenizer)
    odd.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('##')[-1]"
    )
    cut = [TURNS[0], assistant("## A heading, ## and more")]
    row = {"chosen": cut, "rejected": OTHER} if trainer in PAIRS else {"messages": cut}
    refused([row], "row 1", "does not render all of an answer", trainer=trainer, using=odd,
            chat_template="tokenizer")  # fmt: skip


def test_a_variable_of_the_conversation_is_refused_by_name(refused, tokenizer):
    row = {"messages": TURNS, "chat_template_kwargs": {"messages": [], "thinking": True}}
    refused([row], "row 1", "chat_template_kwargs: messages is set for each conversation", using=tokenizer,
            chat_template="tokenizer")  # fmt: skip


def test_a_cell_with_a_part_of_a_list_is_named_as_such(refused, tokenizer):
    good, bad = ({"messages": text} for text in (json.dumps(TURNS), '[{"role": "user", "content": "x'))
    refused([good, good, bad], "row 3", "must be a list as JSON, and this text is not", suffix="csv",
            chat_template="tokenizer", using=tokenizer)  # fmt: skip
