"""The chat templates that a config can name."""

from __future__ import annotations

from copy import deepcopy

import pytest
from rows import END, GOOD, SYSTEM, TURNS, Q, assistant, trained_text, user

from trainers.config.errors import ConfigError
from trainers.data.templates import set_template

GAINED = {
    "chatml": [],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "alpaca": [],
}


@pytest.mark.parametrize("template", GAINED)
def test_our_templates_add_their_tokens_and_train_on_complete_answers(tokenizer, prepare, template):
    own = deepcopy(tokenizer)
    gained = set_template(own, template)
    assert gained == GAINED[template]
    assert all(len(own(token, add_special_tokens=False)["input_ids"]) == 1 for token in gained)
    (row,) = prepare([{"messages": TURNS}], using=own, chat_template=template).dataset
    assert trained_text(own, row) == GOOD + own.eos_token


FULL = {
    "chatml": f"<|im_start|>user\nAdd.\n\n1, 2{END}\n<|im_start|>assistant\n3{END}\n",
    "zephyr": f"<|user|>\nAdd.\n\n1, 2{END}\n<|assistant|>\n3{END}\n",
    "phi3": "<|user|>\nAdd.\n\n1, 2<|end|>\n<|assistant|>\n3<|end|>\n",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3{END}\n\n",
}


@pytest.mark.parametrize("template", FULL)
def test_each_template_encodes_an_instruction(run_tokenizer, prepare, template):
    own = run_tokenizer(chat_template=template)
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    (found,) = prepare([row], using=own, chat_template=template).dataset
    assert own.decode(found["input_ids"]) == FULL[template]
    trained = [label for label in found["labels"] if label != -100]
    assert own.decode(trained) == f"3{own.eos_token}"
    assert own.bos_token_id not in found["input_ids"]


@pytest.mark.parametrize("template", FULL)
def test_each_template_encodes_a_pair(run_tokenizer, prepare, template):
    own = run_tokenizer(chat_template=template)
    row = {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"}
    (found,) = prepare([row], using=own, chat_template=template, trainer="dpo").dataset
    assert own.decode(found["prompt_ids"] + found["chosen_ids"]) == FULL[template].rstrip("\n")
    assert own.decode(found["rejected_ids"]) == f"4{own.eos_token}"


def test_a_system_turn_replaces_alpacas_preamble(run_tokenizer, prepare):
    own = run_tokenizer(chat_template="alpaca")
    row = {"messages": [SYSTEM, user(Q), assistant(GOOD)]}
    (found,) = prepare([row], using=own, chat_template="alpaca").dataset
    assert own.decode(found["input_ids"]).startswith("Be short.\n\n### Instruction:\n")


def test_a_template_can_be_a_file(run_tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert run_tokenizer(chat_template=str(file)).chat_template == file.read_text()
    file.unlink()
    with pytest.raises(ConfigError, match=r"chat_template: .*own\.jinja cannot be read"):
        run_tokenizer(chat_template=str(file))


def test_one_of_several_templates_is_named(tokenizer):
    own = deepcopy(tokenizer)
    own.chat_template = {"default": "a", "tool_use": "b"}
    set_template(own, "tool_use")
    assert own.chat_template == "b"
    with pytest.raises(ConfigError, match="has no template 'rag'"):
        set_template(own, "rag")


def test_a_preset_is_checked_like_any_other_template(run_tokenizer, refused):
    called = {**assistant(""), "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    for name in FULL:
        own = run_tokenizer(chat_template=name)
        refused(
            [{"messages": [user(Q), called]}], "does not render tool_calls", using=own, chat_template=name
        )
