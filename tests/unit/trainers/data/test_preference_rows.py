"""Rows of reward, dpo, orpo and kto: the prompt and its answers, what is cut, and what is dropped."""

from __future__ import annotations

import json

import pytest
from rows import (
    BAD,
    END,
    FORMATS,
    GOOD,
    LABELLED,
    OTHER,
    PAIR,
    PAIRS,
    PROMPT,
    SYSTEM,
    TURNS,
    Q,
    assistant,
    in_format,
    user,
)

CONVERSATIONS = [
    pytest.param(PAIR, id="text"),
    pytest.param({"chosen": TURNS, "rejected": OTHER}, id="messages"),
    pytest.param({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": OTHER[1:]}, id="prompt-apart"),
    pytest.param({"prompt": TURNS[:1], "chosen": GOOD, "rejected": BAD}, id="answers-as-text"),
    pytest.param({"prompt": Q, "chosen": TURNS[1:], "rejected": OTHER[1:]}, id="prompt-as-text"),
    pytest.param({"prompt": "Something else", "chosen": TURNS, "rejected": OTHER},
                 id="prompt-and-complete-conversations"),
    pytest.param({"prompt": "", "chosen": TURNS, "rejected": OTHER},
                 id="empty-prompt-and-complete-conversations"),
    pytest.param({"chosen": json.dumps(TURNS), "rejected": repr(OTHER)}, id="json-and-python-literal"),
    pytest.param({"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}, id="instruction"),
]  # fmt: skip


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
@pytest.mark.parametrize("row", CONVERSATIONS)
def test_every_form_of_a_pair_gives_the_same_tokens(texts, trainer, row):
    found = texts(row, trainer=trainer, chat_template="tokenizer")
    assert found == {"prompt": PROMPT, "chosen": GOOD + END, "rejected": BAD + END}


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_without_a_template_texts_stay_unchanged(texts, trainer):
    found = texts({"prompt": f"{Q}\n", "chosen": GOOD, "rejected": BAD}, trainer=trainer)
    assert found == {"prompt": f"{Q}\n", "chosen": GOOD + END, "rejected": BAD + END}


@pytest.mark.parametrize("template", ["tokenizer", None])
def test_answers_end_with_eos_once_and_nothing_follows(prepare, tokenizer, template):
    rows = [PAIR, {"prompt": Q, "chosen": GOOD + END, "rejected": BAD + END}] if template is None else [PAIR]
    for row in prepare(rows, trainer="dpo", chat_template=template).dataset:
        for name in ("chosen_ids", "rejected_ids"):
            assert row[name].count(tokenizer.eos_token_id) == 1
            assert row[name][-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in row["chosen_ids"]


def test_no_eos_is_added_without_add_eos_token(texts):
    assert texts(PAIR, trainer="dpo", add_eos_token=False)["chosen"] == GOOD


def test_the_last_turn_is_the_answer_and_the_turns_before_it_the_prompt(texts):
    before = [SYSTEM, user(Q), assistant("A process."), user("Of what?")]
    row = {"chosen": [*before, assistant(GOOD)], "rejected": [*before, assistant(BAD)]}
    found = texts(row, trainer="dpo", chat_template="tokenizer")
    assert found["prompt"] == (
        f"<|im_start|>system\nBe short.{END}\n<|im_start|>user\n{Q}{END}\n"
        f"<|im_start|>assistant\nA process.{END}\n<|im_start|>user\nOf what?{END}\n<|im_start|>assistant\n"
    )
    assert (found["chosen"], found["rejected"]) == (GOOD + END, BAD + END)


def test_the_end_of_a_prompt_and_the_start_of_an_answer_are_kept(prepare, tokenizer):
    row = {"prompt": "x" * 50 + "END", "chosen": "START" + "y" * 50, "rejected": "START" + "z" * 50}
    config = {"trainer": "dpo", "max_prompt_length": 8, "max_completion_length": 12}
    prepared = prepare([row], **config)
    (found,) = prepared.dataset
    full = {name: prepare([row], trainer="dpo").dataset[0][name] for name in found}
    assert found["prompt_ids"] == full["prompt_ids"][-8:]
    assert found["chosen_ids"] == full["chosen_ids"][:12]
    assert found["rejected_ids"] == full["rejected_ids"][:12]
    assert tokenizer.decode(found["prompt_ids"]).endswith("END")
    assert prepared.summary.truncated == 1


def test_block_size_bounds_prompt_and_answer_together(prepare):
    row = {"prompt": "x" * 50, "chosen": "y" * 50, "rejected": "z"}
    (found,) = prepare([row], trainer="dpo", block_size=40, max_prompt_length=30).dataset
    assert [len(found[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [30, 10, 2]


def test_block_size_as_a_list_sets_all_three_lengths(prepare, tmp_path):
    from inprocess import settings_of

    lengths = settings_of(trainer="dpo", block_size=[40, 16, 8]).train
    assert (lengths.sequence_length, lengths.max_prompt_length, lengths.max_completion_length) == (40, 16, 8)
    row = {"prompt": "x" * 50, "chosen": "y" * 50, "rejected": "z" * 50}
    config = {name: getattr(lengths, name) for name in ("max_prompt_length", "max_completion_length")}
    (found,) = prepare([row], trainer="dpo", block_size=[40, 16, 8], **config).dataset
    assert [len(ids) for ids in found.values()] == [16, 8, 8]


def test_a_reward_sees_complete_texts(texts):
    found = texts(PAIR, trainer="reward", chat_template="tokenizer")
    assert found == {"chosen": PROMPT + GOOD + END, "rejected": PROMPT + BAD + END}
    assert texts(PAIR, trainer="reward") == {"chosen": Q + GOOD + END, "rejected": Q + BAD + END}


def test_a_reward_needs_no_prompt_column(texts):
    row = {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}
    assert texts(row, trainer="reward") == {"chosen": f"{Q} {GOOD}{END}", "rejected": f"{Q} {BAD}{END}"}


def test_a_reward_pair_is_dropped_and_never_cut(prepare):
    prepared = prepare([PAIR, {**PAIR, "chosen": "x" * 500}], trainer="reward")
    assert (prepared.summary.truncated, prepared.summary.dropped) == (0, {"longer than block_size": 1})
    assert len(prepared.dataset) == 1


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_a_pair_becomes_a_wanted_and_an_unwanted_completion(prepare, tokenizer, row):
    prepared = prepare([row], trainer="kto", chat_template="tokenizer")
    found = {tokenizer.decode(found["completion_ids"]): found["label"] for found in prepared.dataset}
    assert found == {GOOD + END: True, BAD + END: False}
    assert {tokenizer.decode(found["prompt_ids"]) for found in prepared.dataset} == {PROMPT}
    assert (prepared.summary.rows, prepared.summary.kept) == (1, 2)


def test_a_labelled_conversation_is_split_at_its_last_turn(prepare, tokenizer):
    rows = [{"messages": turns, "label": label} for turns, label in ((TURNS, True), (OTHER, False))]
    dataset = prepare(rows, trainer="kto", text_column="messages", chat_template="tokenizer").dataset
    assert {tokenizer.decode(row["prompt_ids"]) for row in dataset} == {PROMPT}


@pytest.mark.parametrize("trainer", ["dpo", "orpo", "kto"])
def test_answers_without_a_prompt_are_refused(refused, trainer):
    row = {"chosen": "a", "rejected": "b"}
    refused([row], "train.jsonl: row 1", f"{trainer} needs a prompt", trainer=trainer)
    refused([row], "row 1", "needs messages or a prompt column", trainer=trainer, chat_template="tokenizer")
    answers = {"chosen": TURNS[1:], "rejected": OTHER[1:]}
    refused([answers], "row 1", "contains only an answer", "prompt_text_column", trainer=trainer,
            chat_template="tokenizer")  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", PAIRS)
def test_empty_answers_and_prompts_are_dropped(dropped, trainer, suffix):
    rows = [PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": None}, {**PAIR, "prompt": " "}]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"empty completion": 2, "empty prompt": 1}


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_labelled_completions_are_dropped(dropped, suffix):
    rows = [*LABELLED, {**LABELLED[0], "completion": ""}, {**LABELLED[1], "prompt": None}]
    assert dropped(rows, trainer="kto", suffix=suffix) == {"empty completion": 1, "empty prompt": 1}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", PAIRS)
def test_empty_last_turns_are_dropped(dropped, trainer, suffix):
    rows = in_format(
        suffix,
        {"chosen": TURNS, "rejected": OTHER},
        {"chosen": TURNS, "rejected": [TURNS[0], assistant(" ")]},
        {"chosen": None, "rejected": OTHER},
    )
    assert dropped(rows, trainer=trainer, suffix=suffix, chat_template="tokenizer") == {"empty completion": 2}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", PAIRS)
def test_equal_answers_are_dropped(dropped, trainer, suffix):
    rows = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"chosen equals rejected": 1}


@pytest.mark.parametrize("trainer", ["dpo", "orpo", "kto"])
def test_answers_that_differ_only_where_they_are_cut_are_dropped(dropped, trainer):
    rows = [PAIR, {**PAIR, "chosen": "x" * 100 + "a", "rejected": "x" * 100 + "b"}]
    assert dropped(rows, trainer=trainer, block_size=64) == {"chosen equals rejected after the cut": 1}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", PAIRS)
def test_answers_to_different_conversations_are_dropped(dropped, trainer, suffix):
    rows = in_format(
        suffix,
        {"chosen": TURNS, "rejected": OTHER},
        {"chosen": TURNS, "rejected": [user("Another question"), OTHER[1]]},
    )
    found = dropped(rows, trainer=trainer, suffix=suffix, chat_template="tokenizer")
    assert found == {"chosen and rejected differ before their last turn": 1}


@pytest.mark.parametrize("trainer", PAIRS)
def test_a_pair_of_text_and_messages_is_refused(refused, trainer):
    rows = in_format("csv", {"prompt": "q", "chosen": TURNS, "rejected": "plain"})
    refused(rows, "train.csv: row 1", "both be text or both messages", trainer=trainer, suffix="csv",
            chat_template="tokenizer")  # fmt: skip


@pytest.mark.parametrize("trainer", PAIRS)
def test_a_conversation_must_end_with_the_assistant(refused, trainer):
    asked = [*TURNS, user("Why?")]
    rows = [{"chosen": TURNS, "rejected": OTHER}, {"chosen": asked, "rejected": asked}]
    refused(rows, "train.jsonl: row 2", "the last turn of 'chosen' must be the assistant's, not user's",
            trainer=trainer, chat_template="tokenizer")  # fmt: skip


@pytest.mark.parametrize(
    "rows", [LABELLED[:1] * 3, [LABELLED[0], {**LABELLED[1], "completion": ""}]], ids=["all", "all-that-stay"]
)
def test_labels_that_are_all_the_same_are_refused(refused, rows):
    refused(rows, "label_column", "have the label True", "both wanted and unwanted", trainer="kto")


@pytest.mark.parametrize("trainer", ["dpo", "orpo", "kto"])
def test_a_pair_whose_prompt_leaves_no_room_for_an_answer_is_dropped(dropped, trainer):
    rows = [PAIR, {**PAIR, "prompt": "x" * 500}]
    found = dropped(rows, trainer=trainer, block_size=64, max_prompt_length=64)
    assert found == {"the prompt leaves no room for a completion": 1}
    assert dropped(rows, trainer=trainer, block_size=64, max_prompt_length=32) == {}


def test_a_reward_pair_longer_than_block_size_is_dropped(dropped):
    rows = [PAIR, {**PAIR, "prompt": "x" * 500}, {**PAIR, "rejected": "x" * 500}]
    assert dropped(rows, trainer="reward") == {"longer than block_size": 2}
