"""Samples from preference rows and token ids, held-out rows, chat templates, and the example in the log."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from trainers.config.schema import TrainConfig

Q, GOOD, BAD = "What is a rank?", "One process of many.", "A number."
PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
SYSTEM = {"role": "system", "content": "Be short."}
ASKED = {"role": "user", "content": Q}
END = "<|im_end|>"
PROMPT = f"<|im_start|>user\n{Q}{END}\n<|im_start|>assistant\n"


def answer(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def texts(prepare, tokenizer):
    """`texts(row, ...)`: the decoded columns of the first sample."""

    def read(row, **config):
        found = prepare([row], **config).dataset[0]
        return {name.removesuffix("_ids"): tokenizer.decode(ids) for name, ids in found.items()}

    return read


CONVERSATIONS = [
    pytest.param(PAIR, id="text"),
    pytest.param({"chosen": [ASKED, answer(GOOD)], "rejected": [ASKED, answer(BAD)]}, id="messages"),
    pytest.param({"prompt": [ASKED], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]}, id="prompt-apart"),
    pytest.param({"prompt": [ASKED], "chosen": GOOD, "rejected": BAD}, id="answers-as-text"),
    pytest.param({"prompt": Q, "chosen": [answer(GOOD)], "rejected": [answer(BAD)]}, id="prompt-as-text"),
    pytest.param({"prompt": "Something else", "chosen": [ASKED, answer(GOOD)],
                  "rejected": [ASKED, answer(BAD)]}, id="prompt-and-complete-conversations"),
    pytest.param({"prompt": "", "chosen": [ASKED, answer(GOOD)], "rejected": [ASKED, answer(BAD)]},
                 id="empty-prompt-and-complete-conversations"),
    pytest.param({"chosen": json.dumps([ASKED, answer(GOOD)]), "rejected": repr([ASKED, answer(BAD)])},
                 id="json-and-python-literal"),
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
    before = [SYSTEM, ASKED, answer("A process."), {"role": "user", "content": "Of what?"}]
    row = {"chosen": [*before, answer(GOOD)], "rejected": [*before, answer(BAD)]}
    found = texts(row, trainer="dpo", chat_template="tokenizer")
    assert found["prompt"] == (
        f"<|im_start|>system\nBe short.{END}\n<|im_start|>user\n{Q}{END}\n"
        f"<|im_start|>assistant\nA process.{END}\n<|im_start|>user\nOf what?{END}\n<|im_start|>assistant\n"
    )
    assert (found["chosen"], found["rejected"]) == (GOOD + END, BAD + END)


@pytest.mark.parametrize("trainer", ["default", "sft", "dpo", "orpo", "kto", "reward"])
def test_no_system_turn_is_invented(prepare, tokenizer, trainer):
    row = {
        "chosen": [ASKED, answer(GOOD)],
        "rejected": [ASKED, answer(BAD)],
        "messages": [ASKED, answer(GOOD)],
    }
    for found in prepare([row], trainer=trainer, chat_template="tokenizer").dataset:
        for name in ("input_ids", "prompt_ids", "chosen_ids"):
            assert "system" not in tokenizer.decode(found.get(name, []))


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


def test_the_summary_of_pairs_counts_tokens_rows_and_answers(prepare):
    summary = prepare([PAIR, PAIR], trainer="dpo").summary
    (row,) = {json.dumps(found) for found in prepare([PAIR, PAIR], trainer="dpo").dataset}
    sizes = {name: len(ids) for name, ids in json.loads(row).items()}
    assert summary.tokens == 2 * sum(sizes.values())
    assert summary.supervised_tokens == 2 * (sizes["chosen_ids"] + sizes["rejected_ids"])
    assert summary.longest == sizes["prompt_ids"] + sizes["chosen_ids"]
    assert (summary.rows, summary.kept, summary.truncated, summary.dropped) == (2, 2, 0, {})


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


def test_the_label_column_may_have_another_name(prepare):
    rows = [{"ask": Q, "say": GOOD, "liked": "yes"}, {"ask": Q, "say": BAD, "liked": "no"}]
    names = {"prompt_text_column": "ask", "text_column": "say", "label_column": "liked"}
    assert sorted(prepare(rows, trainer="kto", **names).dataset["label"]) == [False, True]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_a_pair_becomes_a_wanted_and_an_unwanted_completion(prepare, tokenizer, row):
    prepared = prepare([row], trainer="kto", chat_template="tokenizer")
    found = {tokenizer.decode(found["completion_ids"]): found["label"] for found in prepared.dataset}
    assert found == {GOOD + END: True, BAD + END: False}
    assert {tokenizer.decode(found["prompt_ids"]) for found in prepared.dataset} == {PROMPT}
    assert (prepared.summary.rows, prepared.summary.kept) == (1, 2)


def test_a_labelled_conversation_is_split_at_its_last_turn(prepare, tokenizer):
    rows = [
        {"messages": [ASKED, answer(text)], "label": label} for text, label in ((GOOD, True), (BAD, False))
    ]
    dataset = prepare(rows, trainer="kto", text_column="messages", chat_template="tokenizer").dataset
    assert {tokenizer.decode(row["prompt_ids"]) for row in dataset} == {PROMPT}


def test_a_mismatched_completion_is_that_of_the_sample_before(prepare):
    rows = [{"prompt": Q, "completion": f"Answer {i}.", "label": i % 2 == 0} for i in range(5)]
    dataset = prepare(rows, trainer="kto").dataset
    own = [row["completion_ids"] for row in dataset]
    assert [row["KL_completion_ids"] for row in dataset] == [own[-1], *own[:-1]]


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_columns_are_named_in_the_config_as_in_autotrain(texts, trainer):
    row = {"a": GOOD, "b": BAD, "c": Q, "prompt": "not this", "chosen": "nor this"}
    names = {"text_column": "a", "rejected_text_column": "b", "prompt_text_column": "c"}
    assert texts(row, trainer=trainer, **names) == {"prompt": Q, "chosen": GOOD + END, "rejected": BAD + END}


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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_stay_unchanged_but_for_padding(prepare, trainer, suffix):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [0, 0, 1, 1]},
    ]
    dataset = prepare(rows, trainer=trainer, suffix=suffix).dataset
    assert dataset["input_ids"][:] == [[5, 6, 7, 8], [5, 6]], "padding is removed"
    assert dataset["labels"][:] == [[-100, -100, 7, 8], [5, 6]]


@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_without_labels_are_trained_on(prepare, trainer):
    (row,) = prepare([{"input_ids": [5, 6, 7]}], trainer=trainer).dataset
    assert row["labels"] == [5, 6, 7]


def test_token_ids_for_mlm_are_cut_into_samples(prepare):
    dataset = prepare([{"input_ids": list(range(5, 15))}], trainer="mlm", block_size=4).dataset
    assert dataset["input_ids"][:] == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]


def test_token_ids_that_are_too_long_are_cut(prepare):
    prepared = prepare([{"input_ids": list(range(5, 100))}], block_size=16)
    assert len(prepared.dataset[0]["input_ids"]) == 16
    assert prepared.summary.truncated == 1


ROWS = [{"text": f"Row {i}."} for i in range(20)]


@pytest.fixture
def split(prepare, tokenizer):
    """`split(part, ...)`: the texts of a part of ROWS."""

    def read(part, **config):
        config = {"valid_fraction": 0.2, "test_fraction": 0.1, **config}
        dataset = prepare(ROWS, part=part, **config).dataset
        return [tokenizer.decode(row["input_ids"][:-1]) for row in dataset]

    return read


def test_fractions_divide_the_rows(split):
    parts = {part: split(part) for part in ("train", "valid", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 14, "valid": 4, "test": 2}
    found = [text for texts in parts.values() for text in texts]
    assert sorted(found) == sorted(row["text"] for row in ROWS)


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_what_is_held_out_depends_only_on_split_seed(split, part):
    first = split(part)
    assert split(part, seed=7, data_seed=8, trainer="default") == first
    assert split(part, split_seed=7) != first


def test_without_fractions_every_row_is_trained_on(split):
    found = split("train", valid_fraction=0.0, test_fraction=0.0)
    assert found == [row["text"] for row in ROWS]


def test_named_splits_take_no_rows_from_the_training_split(tokenizer, tmp_path, monkeypatch):
    from trainers.data import prepare

    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    for name in ("train", "dev", "final"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    config = TrainConfig(data_path=str(tmp_path), trainer="sft", valid_split="dev", test_split="final",
                         block_size=64)  # fmt: skip
    assert prepare.parts(config) == ["train", "valid", "test"]
    found = {part: prepare.prepare(config, tokenizer, part).dataset[0] for part in prepare.parts(config)}
    texts = {part: tokenizer.decode(row["input_ids"][:-1]) for part, row in found.items()}
    assert texts == {"train": "train", "valid": "dev", "test": "final"}


def test_a_named_split_and_a_fraction_can_be_combined(tokenizer, tmp_path, monkeypatch):
    from trainers.data import prepare

    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"text": "dev"}) + "\n")
    config = TrainConfig(data_path=str(tmp_path), trainer="sft", valid_split="dev", test_fraction=0.25,
                         block_size=64, packing="none")  # fmt: skip
    sizes = {part: len(prepare.prepare(config, tokenizer, part).dataset) for part in prepare.parts(config)}
    assert sizes == {"train": 15, "valid": 1, "test": 5}


@pytest.fixture
def load(tiny_model, tokenizer, tmp_path):
    """`load(pad=..., **config)`: the tokenizer as a run loads it, from a folder whose pad token is `pad`."""
    from trainers.model.tokenizer import load_tokenizer

    def loaded(pad="<pad>", **config):
        own = deepcopy(tokenizer)
        own.pad_token = pad
        own.save_pretrained(tmp_path / "tokenizer")
        for file in ("config.json", "model.safetensors"):
            (tmp_path / "tokenizer" / file).write_bytes((tiny_model / file).read_bytes())
        return load_tokenizer(TrainConfig(model=str(tmp_path / "tokenizer"), **config))[0]

    return loaded


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("pad", [END, None, "<pad>"])
def test_padding_is_not_the_end_of_a_turn(load, pad, trainer):
    found = load(pad=pad, trainer=trainer)
    assert found.pad_token == "<pad>"
    assert found.pad_token_id != found.eos_token_id
    found = load(pad=pad, trainer=trainer, chat_template="phi3")
    assert found.eos_token == "<|end|>"
    assert found.pad_token_id not in (None, found.eos_token_id)


FULL = {
    "chatml": f"<|im_start|>user\nAdd.\n\n1, 2{END}\n<|im_start|>assistant\n3{END}\n",
    "zephyr": f"<|user|>\nAdd.\n\n1, 2{END}\n<|assistant|>\n3{END}\n",
    "phi3": "<|user|>\nAdd.\n\n1, 2<|end|>\n<|assistant|>\n3<|end|>\n",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3{END}\n\n",
}


@pytest.mark.parametrize("template", FULL)
def test_each_template_encodes_an_instruction(load, prepare, template):
    own = load(chat_template=template)
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    (found,) = prepare([row], using=own, chat_template=template).dataset
    assert own.decode(found["input_ids"]) == FULL[template]
    trained = [label for label in found["labels"] if label != -100]
    assert own.decode(trained) == f"3{own.eos_token}"
    assert own.bos_token_id not in found["input_ids"]


@pytest.mark.parametrize("template", FULL)
def test_each_template_encodes_a_pair(load, prepare, template):
    own = load(chat_template=template)
    row = {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"}
    (found,) = prepare([row], using=own, chat_template=template, trainer="dpo").dataset
    assert own.decode(found["prompt_ids"] + found["chosen_ids"]) == FULL[template].rstrip("\n")
    assert own.decode(found["rejected_ids"]) == f"4{own.eos_token}"


def test_a_system_turn_replaces_alpacas_preamble(load, prepare):
    own = load(chat_template="alpaca")
    row = {"messages": [SYSTEM, ASKED, answer(GOOD)]}
    (found,) = prepare([row], using=own, chat_template="alpaca").dataset
    assert own.decode(found["input_ids"]).startswith("Be short.\n\n### Instruction:\n")


TRAINED = [
    ("sft", {}, GOOD + END),
    ("sft", {"train_on": "completion"}, GOOD + END),
    ("sft", {"train_on": "all"}, f"{Q} {GOOD}{END}"),
    ("default", {}, f"{Q} {GOOD}{END}"),
    ("default", {"train_on": "completion"}, GOOD + END),
]


@pytest.mark.parametrize(("trainer", "config", "expected"), TRAINED)
def test_train_on_decides_what_the_loss_sees(prepare, tokenizer, trainer, config, expected):
    row = {"prompt": f"{Q} ", "completion": GOOD}
    (found,) = prepare([row], trainer=trainer, **config).dataset
    assert tokenizer.decode([label for label in found["labels"] if label != -100]) == expected


def test_the_example_marks_what_is_masked(prepare, tokenizer):
    from trainers.data.preview import show_example

    (row,) = prepare([{"prompt": f"{Q}\n", "completion": GOOD}]).dataset
    assert show_example(row, tokenizer, terminal=False) == f"example: ⟦{Q}\\n⟧{GOOD}{END}"
    assert show_example(row, tokenizer, terminal=True) == f"example: \033[2m{Q}\\n\033[0m{GOOD}{END}"


def test_the_example_of_a_pair_shows_both_answers(prepare, tokenizer):
    from trainers.data.preview import show_example

    (row,) = prepare([PAIR], trainer="dpo").dataset
    assert show_example(row, tokenizer, terminal=False) == (
        f"example, chosen: ⟦{Q}⟧{GOOD}{END}\nexample, rejected: ⟦{Q}⟧{BAD}{END}"
    )


def test_the_example_of_kto_shows_whether_it_is_wanted(prepare, tokenizer):
    from trainers.data.preview import show_example

    shown = {show_example(row, tokenizer, terminal=False) for row in prepare([PAIR], trainer="kto").dataset}
    assert shown == {
        f"example, completion (wanted): ⟦{Q}⟧{GOOD}{END}",
        f"example, completion (unwanted): ⟦{Q}⟧{BAD}{END}",
    }


def test_a_long_example_is_cut_and_shows_its_length(prepare, tokenizer):
    from trainers.data.preview import show_example

    (row,) = prepare([{"text": "x" * 3000}], block_size=2048).dataset
    shown = show_example(row, tokenizer, terminal=False)
    assert len(shown) < 1100
    assert shown.endswith(f"... ({len(row['input_ids'])} tokens)")


def test_mismatched_answers_of_an_evaluation_are_from_other_prompts(prepare):
    """A pair becomes two neighbours with the same prompt."""
    rows = [
        {"prompt": f"Question {i}? ", "chosen": f"Right {i}.", "rejected": f"Wrong {i}."} for i in range(40)
    ]
    held_out = prepare(rows, trainer="kto", part="valid", valid_fraction=0.5).dataset
    assert len(held_out) == 40
    own = {}
    for row in held_out:
        own.setdefault(tuple(row["prompt_ids"]), set()).add(tuple(row["completion_ids"]))
    same = sum(tuple(row["KL_completion_ids"]) in own[tuple(row["prompt_ids"])] for row in held_out)
    assert same <= 4, "only by chance, not for every second sample"
    assert sorted(map(tuple, held_out["KL_completion_ids"])) == sorted(map(tuple, held_out["completion_ids"]))
