"""The chat templates that a config can name."""

from __future__ import annotations

from copy import deepcopy

import pytest
from rows import END, GOOD, SYSTEM, TURNS, Q, assistant, trained_text, user

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
