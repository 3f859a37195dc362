"""The shapes that rows of public data sets have: each is read as it is, and gives these texts."""

from __future__ import annotations

import json

import pytest
from rows import BAD, END, GOOD, PROMPT, SYSTEM, TURNS, Q, assistant, trained_text, user

from trainers.data.templates import CHATML


def told(role, text):
    return f"<|im_start|>{role}\n{text}{END}\n"


ANSWER = told("assistant", GOOD)
ASKED = told("user", Q)
BRIEF = told("system", "Be short.")
EARLIER = told("user", "Hi") + told("assistant", "Hello")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
# The test's template: ChatML, with tools and calls as JSON.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    + CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name + call.function.arguments | tojson }}{% endfor %}",
    )
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}},
    }
]
OFFERED = told("tools", json.dumps(TOOLS))

# Row, text, what the loss sees (the ends of turns are left out).
SHAPES = {
    "conversations": ({"conversations": TURNS}, ASKED + ANSWER, [GOOD]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}],
            "system": "Be short.",
        },
        BRIEF + ASKED + ANSWER,
        [GOOD],
    ),
    "sharegpt with calls": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
                {"from": "observation", "value": "A rank."},
                {"from": "gpt", "value": GOOD},
            ],
            "tools": json.dumps(TOOLS),
        },
        OFFERED + ASKED + told("assistant", 'look{"at": 1}') + told("tool", "A rank.") + ANSWER,
        ['look{"at": 1}', GOOD],
    ),
    "tools as objects": ({"messages": TURNS, "tools": TOOLS}, OFFERED + ASKED + ANSWER, [GOOD]),
    "arguments as text": (
        {"messages": [user(Q), {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}]}]},
        ASKED + told("assistant", 'look{"at": 1}'),
        ['look{"at": 1}'],
    ),
    "openai's function_call": (
        {"messages": [user(Q), {"role": "assistant", "function_call": {"name": "look", "arguments": "{}"}}]},
        ASKED + told("assistant", "look{}"),
        ["look{}"],
    ),
    "content as parts": (
        {"messages": [user([{"type": "text", "text": Q}]), assistant([{"type": "text", "text": GOOD}])]},
        ASKED + ANSWER,
        [GOOD],
    ),
    "alpaca with system and history": (
        {"system": "Be short.", "history": [["Hi", "Hello"]], "instruction": Q, "input": "", "output": GOOD},
        BRIEF + EARLIER + ASKED + ANSWER,
        [GOOD],
    ),
    "tatsu-lab/alpaca": (
        {"instruction": Q, "input": "", "output": GOOD, "text": f"Below is an instruction. {Q} {GOOD}"},
        ASKED + ANSWER,
        [GOOD],
    ),
    "roles of other names": (
        {"messages": [
            {"role": "Human", "content": Q}, {"role": "bot", "content": "A"},
            {"role": "ipython", "content": "B"}, {"role": "MODEL", "content": "C"},
            {"role": "User", "content": "D"}, {"role": "chatgpt", "content": GOOD},
        ]},
        ASKED + told("assistant", "A") + told("tool", "B") + told("assistant", "C") + told("user", "D")
        + ANSWER,
        ["A", "C", GOOD],
    ),
    "late and second system turns": (
        {"messages": [SYSTEM, user("Hi"), assistant("Hello"), SYSTEM, *TURNS]},
        BRIEF + EARLIER + BRIEF + ASKED + ANSWER,
        ["Hello", GOOD],
    ),
    "a leading assistant turn": (
        {"messages": [assistant("Hello"), *TURNS]},
        told("assistant", "Hello") + ASKED + ANSWER,
        ["Hello", GOOD],
    ),
    "user and assistant": ({"user": Q, "assistant": GOOD}, ASKED + ANSWER, [GOOD]),
    "role and text": (
        {"messages": [{"role": "user", "text": Q}, {"role": "assistant", "text": GOOD}]},
        ASKED + ANSWER,
        [GOOD],
    ),
    "messages as prompt and completion": (
        {"prompt": [user("Hi"), assistant("Hello"), user(Q)], "completion": [assistant(GOOD)]},
        EARLIER + ASKED + ANSWER,
        [GOOD],
    ),
    "weight": (
        {"messages": [user("Hi"), {**assistant("Hello"), "weight": 0}, *TURNS]},
        EARLIER + ASKED + ANSWER,
        [GOOD],
    ),
    "train": (
        {"messages": [user("Hi"), {**assistant("Hello"), "train": False}, *TURNS]},
        EARLIER + ASKED + ANSWER,
        [GOOD],
    ),
    "a call as the last turn": (
        {"messages": [user(Q), {**assistant(""), "tool_calls": [CALL]}]},
        ASKED + told("assistant", 'look{"at": 1}'),
        ['look{"at": 1}'],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def chatty(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


NESTED = ("sharegpt with calls", "tools as objects", "content as parts", "a call as the last turn")


@pytest.mark.parametrize(
    ("shape", "suffix"), [*((shape, "jsonl") for shape in SHAPES), *((shape, "parquet") for shape in NESTED)]
)
def test_a_row_of_this_shape_is_read_as_it_is(prepare, chatty, shape, suffix):
    row, text, seen = SHAPES[shape]
    prepared = prepare([row], suffix=suffix, using=chatty, chat_template="tokenizer", block_size=512)
    (found,) = prepared.dataset
    assert chatty.decode(found["input_ids"]) == text
    assert trained_text(chatty, found) == "".join(f"{part}{END}" for part in seen)
    assert not prepared.summary.notes


LONGER = [*TURNS, user("Why?"), assistant("Speed.")]
OTHER_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 2}}}
PAIRS = {
    "one message object": (
        {"prompt": Q, "chosen": assistant(GOOD), "rejected": assistant(BAD)}, PROMPT, GOOD, BAD,
    ),
    "a prompt in front of several turns": (
        {"prompt": [SYSTEM, user(Q)], "chosen": LONGER[1:],
         "rejected": [assistant(GOOD), *LONGER[2:3], assistant("?")]},
        BRIEF + ASKED + ANSWER + told("user", "Why?") + "<|im_start|>assistant\n", "Speed.", "?",
    ),
    "pairs that differ in more than the last turn": (
        {"chosen": LONGER, "rejected": [user(Q), assistant(BAD), *LONGER[2:3], assistant("?")]},
        PROMPT,
        f"{GOOD}{END}\n" + told("user", "Why?") + "<|im_start|>assistant\nSpeed.",
        f"{BAD}{END}\n" + told("user", "Why?") + "<|im_start|>assistant\n?",
    ),
    "dialogues of hh-rlhf": (
        {"chosen": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {Q}\n\nAssistant: {GOOD}",
         "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {Q}\n\nAssistant: {BAD}"},
        EARLIER + PROMPT, GOOD, BAD,
    ),
    "answers that differ only in a call": (
        {"prompt": Q, "chosen": [{**assistant(""), "tool_calls": [CALL]}],
         "rejected": [{**assistant(""), "tool_calls": [OTHER_CALL]}]},
        PROMPT, 'look{"at": 1}', 'look{"at": 2}',
    ),
    "json as an answer": (
        {"prompt": Q, "chosen": '[{"name": "Bob"}]', "rejected": "[]"}, PROMPT, '[{"name": "Bob"}]', "[]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "trainer"),
    [*((shape, "dpo") for shape in PAIRS), ("pairs that differ in more than the last turn", "kto")],
)
def test_a_pair_of_this_shape_is_read_as_it_is(prepare, chatty, shape, trainer):
    row, prompt, chosen, rejected = PAIRS[shape]
    limits = {"block_size": 512, "max_prompt_length": 400}
    prepared = prepare([row], trainer=trainer, using=chatty, chat_template="tokenizer", **limits)
    answers = {"chosen": chosen + END, "rejected": rejected + END}
    if trainer == "dpo":
        (found,) = prepared.dataset
        assert {name: chatty.decode(found[f"{name}_ids"]) for name in answers} == answers
        assert chatty.decode(found["prompt_ids"]) == prompt
    else:
        found = {("chosen" if row["label"] else "rejected"): row for row in prepared.dataset}
        assert {name: chatty.decode(row["completion_ids"]) for name, row in found.items()} == answers
        assert {chatty.decode(row["prompt_ids"]) for row in found.values()} == {prompt}


def test_kto_reads_histories(prepare, chatty):
    rows = [
        {"prompt": [user("Hi"), assistant("Hello"), user(Q)], "completion": [assistant(text)], "label": label}
        for text, label in ((GOOD, True), (BAD, False))
    ]
    dataset = prepare(rows, trainer="kto", using=chatty, chat_template="tokenizer").dataset
    assert {chatty.decode(row["prompt_ids"]) for row in dataset} == {EARLIER + PROMPT}
    assert {chatty.decode(row["completion_ids"]) for row in dataset} == {GOOD + END, BAD + END}


def test_dialogues_without_a_template_are_split_at_the_last_answer(prepare, tokenizer):
    texts = [f"\n\nHuman: {Q}\n\nAssistant: {answer}" for answer in (GOOD, BAD)]
    (row,) = prepare([{"chosen": texts[0], "rejected": texts[1]}], trainer="dpo").dataset
    assert tokenizer.decode(row["prompt_ids"]) == f"\n\nHuman: {Q}\n\nAssistant:"
    assert tokenizer.decode(row["chosen_ids"]) == f" {GOOD}{END}"


ANSWERS = ['[{"name": "Bob"}]', "[]", "[1] A footnote", '[{"role": "admin", "content": "x"}]']


@pytest.mark.parametrize("template", ["tokenizer", None])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_answer_that_is_json_is_text(prepare, tokenizer, suffix, template):
    rows = [{"prompt": Q, "completion": answer} for answer in ANSWERS]
    dataset = prepare(rows, suffix=suffix, chat_template=template).dataset
    found = [trained_text(tokenizer, row) for row in dataset]
    assert found == [answer + END for answer in ANSWERS]


def test_a_text_column_with_one_row_of_json_is_text(prepare, tokenizer):
    texts = ["A rank.", json.dumps(TURNS), "[]"]
    dataset = prepare([{"text": text} for text in texts]).dataset
    assert [tokenizer.decode(row["input_ids"]) for row in dataset] == [text + END for text in texts]


def test_a_held_out_part_reads_its_columns_as_the_split_does(prepare, tokenizer):
    rows = [{"text": text} for text in ("A rank.", "Another rank.", json.dumps(TURNS))]
    for part in ("train", "valid"):
        for seed in range(3):  # one of the seeds holds out the row that looks like messages
            dataset = prepare(rows, part=part, valid_fraction=0.34, split_seed=seed).dataset
            texts = {tokenizer.decode(row["input_ids"]) for row in dataset}
            assert texts <= {row["text"] + END for row in rows}


def test_a_column_that_a_plain_text_cannot_use_is_counted(prepare):
    summary = prepare([{"prompt": Q, "completion": f" {GOOD}", "system": "Be short."}]).summary
    assert summary.notes == {"the column system is not used without a template": 1}
    assert "1 sample: the column system is not used without a template" in summary.line


@pytest.mark.parametrize("image", [{"type": "image", "url": "x"}, {"type": "image_url", "image_url": "x"}])
def test_an_image_is_refused_by_name(refused, chatty, image):
    turns = [user([{"type": "text", "text": Q}, image]), assistant([{"type": "text", "text": GOOD}])]
    refused([{"messages": turns}], "row 1: a part of a message must be text, not image", using=chatty,
            chat_template="tokenizer")  # fmt: skip
