"""Which turns of a conversation are trained, and in how many samples, if a template rewrites them."""

from __future__ import annotations

import copy

import pytest
from chats import A1, A2, CALL, CHATS, Q1, R1, R2, TOOLS, byte_level, result, trl_templates
from rows import assistant, trained_text, user

TEMPLATES = {
    name: text for name, text in trl_templates().items() if name in ("qwen3", "deepseek_r1_distill", "gptoss")
}
HISTORY, _ = CHATS["history"]
END = "<|im_end|>\n"


@pytest.fixture(scope="module")
def qwen():
    tokenizer = byte_level(TEMPLATES.values())
    tokenizer.chat_template = TEMPLATES["qwen3"]
    return tokenizer


@pytest.fixture
def read(prepare, qwen):
    """`read(row, ...)`: of each sample the text and what the loss sees, and the summary."""

    def run(row, using=qwen, **config):
        prepared = prepare([row], using=using, chat_template="tokenizer", block_size=512, **config)
        texts = [using.decode(row["input_ids"]) for row in prepared.dataset]
        return texts, [trained_text(using, row) for row in prepared.dataset], prepared.summary

    return run


def answer(reason, text):
    return f"<think>\n{reason}\n</think>\n\n{text}{END}"


UNROLLED = [answer(R1, A1), answer(R2, A2)]


@pytest.mark.parametrize("history", ["auto", "unroll"])
def test_each_trained_turn_is_a_sample_as_at_inference(read, qwen, history):
    texts, trained, summary = read({"messages": HISTORY}, history=history)
    assert trained == UNROLLED
    for number, text in zip((1, 3), texts, strict=True):
        prompt = qwen.apply_chat_template(HISTORY[:number], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
        assert text == qwen.apply_chat_template(HISTORY[: number + 1], tokenize=False)
    assert (summary.rows, summary.kept) == (1, 2)
    assert summary.notes == {"unrolled: one sample for each trained turn": 2}
    assert R1 not in texts[1]


def test_only_the_last_turn_is_trained(read):
    for config in ({"history": "last"}, {"train_on": "last"}):
        texts, trained, summary = read({"messages": HISTORY}, **config)
        assert trained == UNROLLED[1:]
        assert R1 not in texts[0] and summary.notes == {}


def test_the_training_template_keeps_the_reasoning_of_all_turns(read):
    texts, trained, summary = read({"messages": HISTORY}, history="keep")
    assert trained == ["".join(UNROLLED)]
    assert R1 in texts[0]
    assert summary.notes["history: keep"] == 1


def test_all_tokens_of_a_history_are_the_templates_text_and_what_it_leaves_out_is_counted(read, qwen):
    texts, _, summary = read({"messages": HISTORY}, train_on="all")
    assert texts == [qwen.apply_chat_template(HISTORY, tokenize=False)]
    assert summary.notes == {"the template leaves out the reasoning of earlier turns": 1}
    texts, _, summary = read({"messages": HISTORY}, train_on="all", history="keep")
    assert R1 in texts[0] and R2 in texts[0]


def test_a_turn_that_is_not_trained_makes_no_sample(read):
    turns = [HISTORY[0], {**HISTORY[1], "weight": 0}, *HISTORY[2:]]
    assert read({"messages": turns})[1] == UNROLLED[1:]
    turns = [*HISTORY[:3], {**HISTORY[3], "train": False}]
    assert read({"messages": turns})[1] == UNROLLED[:1]


@pytest.mark.parametrize("weight", [0.5, -1, 2])
def test_a_weight_between_0_and_1_is_refused(refused, qwen, weight):
    turns = [user(Q1), {**assistant(A1), "weight": weight}]
    refused([{"messages": turns}], "row 1: the weight of a message must be 0 or 1", using=qwen,
            chat_template="tokenizer")  # fmt: skip


def test_reasoning_that_the_template_drops_from_every_answer_follows_the_prompt_of_inference(read, qwen):
    """R1's distills: a prompt ends with <think>, and the template removes the reasoning of each answer."""
    distill = copy.copy(qwen)
    distill.chat_template = TEMPLATES["deepseek_r1_distill"]
    turns = [user(Q1), assistant(f"<think>\n{R1}\n</think>\n\n{A1}")]
    (text,), (trained,), summary = read({"messages": turns}, using=distill)
    prompt = distill.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and text.removeprefix(prompt).startswith(f"{R1}\n</think>\n\n{A1}")
    assert R1 in trained and summary.notes == {}


def test_options_of_the_config_and_of_a_row_reach_the_template(read):
    row = {"messages": [user(Q1), assistant(A1)], "chat_template_kwargs": {"enable_thinking": False}}
    (text,), _, _ = read(row)
    assert text.endswith(answer("", A1))
    assert read({"messages": row["messages"]}, chat_template_kwargs={"enable_thinking": False})[0] == [text]


def test_other_roles_can_be_trained(read):
    _, (trained,), _ = read({"messages": [user(Q1), assistant(A1)]}, roles_to_train=["user", "assistant"])
    assert trained == f"{Q1}<|im_end|>{answer('', A1)}"


def test_tools_choose_among_several_templates(prepare, qwen):
    both = copy.copy(qwen)
    marked = "{{ 'TOOLS ' if tools else '' }}" + TEMPLATES["qwen3"]
    both.chat_template = {"default": TEMPLATES["qwen3"], "tool_use": marked}
    rows = [{"messages": [user(Q1), assistant(A1)], "tools": tools} for tools in (TOOLS, None)]
    prepared = prepare(rows, using=both, chat_template="tokenizer", block_size=1024)
    texts = [both.decode(row["input_ids"]) for row in prepared.dataset]
    assert texts[0].startswith("TOOLS ") and not texts[1].startswith("TOOLS ")


def test_a_system_prompt_is_for_conversations_without_one(read):
    turns = [user(Q1), assistant(A1)]
    ours, theirs = ({"role": "system", "content": text} for text in ("Ours.", "Theirs."))
    expected = read({"messages": [ours, *turns]})[0]
    assert read({"messages": turns}, system_prompt="Ours.")[0] == expected
    assert read({"messages": turns, "system": "Ours."}, system_prompt="Not this.")[0] == expected
    with_own = {"messages": [theirs, *turns]}
    assert read(with_own, system_prompt="Ours.")[0] == read(with_own)[0]


def test_the_reasoning_of_a_call_is_in_the_prompt_of_the_answer_as_at_inference(prepare, qwen):
    """gpt-oss leaves this reasoning out when the answer is there."""
    oss = copy.copy(qwen)
    oss.chat_template = TEMPLATES["gptoss"]
    messages, _ = copy.deepcopy(CHATS["tool call"])
    messages[1]["thinking"], messages[3]["thinking"] = R1, R2
    rows = [{"messages": messages}]
    prepared = prepare(rows, using=oss, chat_template="tokenizer", block_size=512)
    prompt = oss.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    _, second = (oss.decode(row["input_ids"]) for row in prepared.dataset)
    assert R1 in prompt and second.startswith(prompt)
    assert R2 in trained_text(oss, prepared.dataset[1]) and R1 in trained_text(oss, prepared.dataset[0])
    assert "the prompt has other tokens at inference" not in prepared.summary.notes
    pair = {"chosen": messages, "rejected": [*messages[:3], assistant("No")]}
    (row,) = prepare([pair], trainer="dpo", using=oss, chat_template="tokenizer", max_prompt_length=400,
                     block_size=512).dataset  # fmt: skip
    assert oss.decode(row["prompt_ids"]) == prompt


@pytest.mark.parametrize("said", [{"reasoning_content": R1}, {"thinking": R1}, {"content": A2}])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_an_answer_follows_its_call_once(prepare, qwen, said, trainer):
    """gpt-oss renders a call with reasoning in another way once the answer is there."""
    oss = copy.copy(qwen)
    oss.chat_template = TEMPLATES["gptoss"]
    before = [user(Q1), {**assistant(""), **said, "tool_calls": [CALL]}, result("Result1", "look")]
    row = {"messages": [*before, assistant(A1)]}
    if trainer == "dpo":
        row = {"chosen": row["messages"], "rejected": [*before, assistant("No.")]}
    sample = prepare(
        [row], using=oss, chat_template="tokenizer", trainer=trainer, block_size=2048, max_prompt_length=1024
    ).dataset[-1]
    ids = sample["input_ids"] if trainer == "sft" else sample["prompt_ids"] + sample["chosen_ids"]
    if "reasoning_content" in said:  # the template has another name for it
        before[1] = {**assistant(""), "thinking": R1, "tool_calls": [CALL]}
    asked = oss.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    assert oss.decode(ids) == f"{asked}<|channel|>final<|message|>{A1}<|return|>"


@pytest.mark.parametrize("content", ["y", "i", "AI"])
def test_an_answer_without_a_question_is_found_by_its_place(prepare, qwen, content):
    """The words of the answer are in the system turn of the template, too."""
    tokenizer = copy.copy(qwen)
    tokenizer.chat_template = (
        "<|im_start|>system\nYou are an AI assistant, really.<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    [row] = prepare([{"messages": [assistant(content)]}], using=tokenizer, chat_template="tokenizer").dataset
    assert trained_text(tokenizer, row) == f"{content}<|im_end|>"


def test_the_words_of_a_trained_result_are_not_those_of_its_tag(read):
    row = {"messages": [user(Q1), {**assistant(""), "tool_calls": [CALL]}, result("res", "look")]}
    texts, trained, _ = read(row, roles_to_train=["tool"])
    assert trained == ["res\n</tool_response><|im_end|>"] and "<tool_response>\nres" in texts[0]
