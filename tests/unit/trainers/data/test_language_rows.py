"""Rows become token ids and labels: what the loss sees, EOS, BOS, truncation, templates, and the cache."""

from __future__ import annotations

import json

import pytest

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig

Q = "What is a rank?"
A = "One process of many."


def trained_text(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
CHAT_ROWS = [
    pytest.param({"prompt": Q, "completion": A}, {}, id="prompt-completion"),
    pytest.param({"instruction": Q, "input": "", "output": A}, {}, id="instruction"),
    pytest.param({"messages": TURNS}, {}, id="messages"),
    pytest.param({"text": TURNS}, {}, id="messages-in-text"),
    pytest.param({"text": json.dumps(TURNS)}, {}, id="json-string"),
    pytest.param({"text": repr(TURNS)}, {}, id="python-literal"),
    pytest.param({"c": SHAREGPT}, {"text_column": "c"}, id="sharegpt"),
    pytest.param({"q": Q, "a": A}, {"prompt_text_column": "q", "text_column": "a"}, id="named-columns"),
    pytest.param({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, id="conversational-pair"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "config"), CHAT_ROWS)
def test_every_form_of_a_chat_row_gives_the_same_tokens(prepare, tokenizer, row, config):
    (found,) = prepare([row], chat_template="tokenizer", **config).dataset
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(found["input_ids"]) == expected
    assert trained_text(tokenizer, found) == A + "<|im_end|>", "the answer and its end, nothing else"
    assert len(found["input_ids"]) == len(found["labels"])


def test_only_assistant_turns_are_trained_on_and_all_of_them(prepare, tokenizer):
    turns = [{"role": "system", "content": "Be short."}, *TURNS, {"role": "user", "content": "Why?"}]
    turns.append({"role": "assistant", "content": "Speed."})
    (row,) = prepare([{"messages": turns}], chat_template="tokenizer").dataset
    assert trained_text(tokenizer, row) == f"{A}<|im_end|>Speed.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_train_on_all_supervises_the_prompt_too(prepare, tokenizer):
    (row,) = prepare([{"messages": TURNS}], chat_template="tokenizer", train_on="all").dataset
    assert Q in trained_text(tokenizer, row)


def test_text_ends_with_eos_once(prepare, tokenizer):
    rows = prepare([{"text": "A rank."}, {"text": "A rank.<|im_end|>"}]).dataset
    for row in rows:
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert row["labels"][-1] == tokenizer.eos_token_id
    (row,) = prepare([{"text": "A rank."}], add_eos_token=False).dataset
    assert tokenizer.eos_token_id not in row["input_ids"]


def test_bos_is_not_doubled(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    from trainers.data.chat import encode_text

    with_bos = deepcopy(tokenizer)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert encode_text(with_bos, "A rank.", eos=True).input_ids.count(bos) == 1
    assert encode_text(with_bos, "<s>A rank.", eos=True).input_ids.count(bos) == 1


def test_plain_completion_masks_the_prompt(prepare, tokenizer):
    (row,) = prepare([{"prompt": Q + " ", "completion": A}]).dataset
    assert trained_text(tokenizer, row) == A + "<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == f"{Q} {A}<|im_end|>"


def test_instruction_without_a_template_gets_headings(prepare, tokenizer):
    (row,) = prepare([{"instruction": "Add.", "input": "1 and 2", "output": "3"}]).dataset
    text = tokenizer.decode(row["input_ids"])
    assert text == "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3<|im_end|>"
    assert trained_text(tokenizer, row) == "3<|im_end|>"


def test_long_rows_are_cut_and_rows_without_a_trained_token_are_dropped(prepare):
    rows = [{"prompt": "x" * 500, "completion": "y"}, {"prompt": "x ", "completion": "y" * 500}]
    prepared = prepare(rows, block_size=64)
    assert (prepared.summary.rows, prepared.summary.truncated) == (2, 2)
    assert prepared.summary.dropped == {"no trained token": 1}
    (row,) = prepared.dataset
    assert len(row["input_ids"]) == 64
    assert prepared.summary.tokens == 64


def test_a_split_without_any_trained_token_is_an_error(prepare):
    with pytest.raises(
        ConfigError, match=r"no row .* has a token to train on \(1: no trained .* Raise block_size"
    ):
        prepare([{"prompt": "x" * 500, "completion": "y"}], block_size=64)


def test_errors_in_rows_name_the_row(prepare):
    with pytest.raises(ConfigError, match=r"train\.jsonl: row 1: .*Set chat_template: tokenizer"):
        prepare([{"messages": TURNS}])
    with pytest.raises(ConfigError, match=r"row 1: train_on: completion needs rows .* has plain text"):
        prepare([{"text": "plain"}], train_on="completion")
    with pytest.raises(ConfigError, match=r"row 1: .* has plain text"):
        prepare([{"text": "plain"}], chat_template="tokenizer")
    with pytest.raises(ConfigError, match=r"train\.jsonl:2: the row is not valid JSON"):
        prepare('{"text": "one"}\n{"text": \n')


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_all_formats_give_the_same_samples(prepare, tokenizer, tmp_path, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainers.data import prepare as data

    expected = list(prepare([{"text": "one"}, {"text": "two"}]).dataset)
    folder = tmp_path / suffix
    folder.mkdir()
    if suffix == "parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), folder / "train.parquet")
    else:
        content = {"csv": "text\none\ntwo\n", "json": '[{"text": "one"}, {"text": "two"}]'}
        (folder / f"train.{suffix}").write_text(content[suffix])
    config = TrainConfig(data_path=str(folder), trainer="sft", block_size=128, packing="none")
    assert list(data.prepare(config, tokenizer).dataset) == expected


def test_the_cache_is_keyed_by_content_and_settings(prepare, tmp_path):
    cache = tmp_path / "cache" / "data"

    def entries() -> int:
        return sum(path.is_dir() for path in cache.iterdir())

    prepare([{"text": "one"}])
    prepare([{"text": "one"}])
    assert entries() == 1, "the same data is prepared once"
    prepare([{"text": "two"}])
    prepare([{"text": "two"}], block_size=64)
    prepare([{"text": "two"}], train_on="all")
    assert entries() == 4
    assert not list(cache.glob("*.part"))


def test_an_interrupted_preparation_is_not_used(prepare, tmp_path, monkeypatch):
    from trainers.data import prepare as data

    def fails(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_tokenize", fails)
        with pytest.raises(RuntimeError):
            prepare([{"text": "one"}])
    assert len(prepare([{"text": "one"}]).dataset) == 1


GAINED = {
    "chatml": [],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "alpaca": [],
}


@pytest.mark.parametrize("template", GAINED)
def test_our_templates_add_their_tokens_and_train_on_complete_answers(tokenizer, template):
    from copy import deepcopy

    from trainers.data.chat import encode_messages
    from trainers.data.templates import set_template

    own = deepcopy(tokenizer)
    gained = set_template(own, template)
    assert gained == GAINED[template]
    assert all(len(own(token, add_special_tokens=False)["input_ids"]) == 1 for token in gained)
    encoded = encode_messages(own, TURNS, train_all=False)
    supervised = own.decode([label for label in encoded.labels if label != -100])
    assert supervised == A + own.eos_token


def test_a_template_that_rewrites_turns_is_refused(tokenizer):
    from copy import deepcopy

    from trainers.data.chat import encode_messages

    odd = deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="Set train_on: all"):
        encode_messages(odd, TURNS, train_all=False)
    assert encode_messages(odd, TURNS, train_all=True).labels


def test_logging_steps_follow_autotrain(prepare):
    from trainers.loop.arguments import logging_steps

    data = {"train": prepare([{"text": f"row {i}"} for i in range(40)])}
    assert logging_steps(TrainConfig(batch_size=2), data) == 4
    assert logging_steps(TrainConfig(batch_size=64), data) == 1
    assert logging_steps(TrainConfig(logging_steps=7), data) == 7


def test_a_hub_dataset_is_loaded_by_configuration_and_split(monkeypatch, tmp_path, tokenizer):
    """A test cannot use the hub, so `load_dataset` is replaced."""
    import datasets

    from trainers.data import prepare

    as_turns = {}

    def load_dataset(path, name, split, token):
        as_turns.update(path=path, name=name, split=split, token=token)
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    config = TrainConfig(
        data_path="org/rows", trainer="sft", block_size=64, token="secret", train_split="en:train"
    )
    assert len(prepare.prepare(config, tokenizer).dataset) == 1
    assert as_turns == {"path": "org/rows", "name": "en", "split": "train", "token": "secret"}


def test_a_hub_that_does_not_answer_is_reported(monkeypatch, tokenizer):
    import datasets

    from trainers.data import prepare

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"org/rows \(train\) cannot be loaded from the hub: offline"):
        prepare.prepare(TrainConfig(data_path="org/rows", trainer="sft"), tokenizer)
