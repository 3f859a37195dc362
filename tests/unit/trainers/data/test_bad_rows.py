"""Malformed rows are errors that name the file and the row. Rows without use are dropped and counted."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig

TEXTS = ("default", "sft", "mlm")
PAIRS = ("reward", "dpo", "orpo", "kto")
FORMATS = ("jsonl", "csv", "parquet")
EACH = [(trainer, suffix) for trainer in (*TEXTS, *PAIRS) for suffix in ("jsonl", "csv")]
PAIR = {"prompt": "What is a rank?", "chosen": "A process.", "rejected": "A number."}
LABELLED = [
    {"prompt": "What is a rank?", "completion": "A process.", "label": True},
    {"prompt": "What is a rank?", "completion": "A number.", "label": False},
]
TURNS = [{"role": "user", "content": "What is a rank?"}, {"role": "assistant", "content": "A process."}]
OTHER = [TURNS[0], {"role": "assistant", "content": "A number."}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def in_format(suffix, *rows):
    """Return rows for this format. In a CSV file, lists are JSON."""
    if suffix != "csv":
        return list(rows)
    return [
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]


@pytest.fixture
def dropped(prepare):
    """`dropped(rows, ...)`: the count per reason. The line of the summary must contain the reasons."""

    def check(rows, **config):
        summary = prepare(rows, **config).summary
        assert summary.rows == len(rows)
        for reason, count in summary.dropped.items():
            assert f"{count} ({reason})" in summary.line
        return summary.dropped

    return check


@pytest.fixture
def refused(prepare):
    """`refused(rows, words, ...)`: prepare raises a ConfigError of one line that holds all the words."""

    def check(rows, *words, **config):
        with pytest.raises(ConfigError) as error:
            prepare(rows, **config)
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message

    return check


@pytest.mark.parametrize(
    ("trainer", "row", "missing"),
    [
        *((trainer, {"body": "x"}, "text") for trainer in TEXTS),
        *((trainer, {"prompt": "x"}, "text") for trainer in TEXTS),
        *((trainer, {"instruction": "x", "input": ""}, "text") for trainer in TEXTS),
        *((trainer, {"prompt": "x", "rejected": "y"}, "chosen") for trainer in PAIRS),
        *((trainer, {"prompt": "x", "chosen": "y"}, "rejected") for trainer in PAIRS),
        *((trainer, {"prompt": "x", "text": "y"}, "chosen") for trainer in PAIRS if trainer != "kto"),
        ("kto", {"prompt": "x", "completion": "y"}, "label"),
        ("kto", {"prompt": "x", "label": True}, "text"),
    ],
)
def test_a_missing_column_is_named_with_the_columns_that_exist(refused, trainer, row, missing):
    refused([row], f"there is no column '{missing}'", ", ".join(row), trainer=trainer)


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        ("sft", {"text_column": "gone"}),
        ("sft", {"prompt_text_column": "gone"}),
        ("mlm", {"prompt_format": "{gone}"}),
        ("dpo", {"rejected_text_column": "gone"}),
        ("reward", {"text_column": "gone"}),
        ("kto", {"label_column": "gone"}),
        ("orpo", {"prompt_text_column": "gone"}),
    ],
)
def test_a_column_that_the_config_names_must_exist(refused, trainer, config):
    row = {**PAIR, "text": "x", "completion": "y"}
    refused([row], "there is no column 'gone'", next(iter(config)), trainer=trainer, **config)


@pytest.mark.parametrize("trainer", ["dpo", "orpo", "kto"])
def test_answers_without_a_prompt_are_refused(refused, trainer):
    row = {"chosen": "a", "rejected": "b"}
    refused([row], "train.jsonl: row 1", f"{trainer} needs a prompt", trainer=trainer)
    refused([row], "row 1", "needs messages or a prompt column", trainer=trainer, chat_template="tokenizer")
    answers = {"chosen": TURNS[1:], "rejected": OTHER[1:]}
    refused([answers], "row 1", "contains only an answer", "prompt_text_column", trainer=trainer,
            chat_template="tokenizer")  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_texts_are_dropped(dropped, trainer, suffix):
    rows = [{"text": "A rank."}, {"text": ""}, {"text": " \n "}, {"text": None}]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"empty text": 3}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_prompts_and_completions_are_dropped(dropped, trainer, suffix):
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "b"), ("a", ""), ("a", None), (" ", "b"))]
    assert dropped(rows, trainer=trainer, suffix=suffix) == {"empty completion": 2, "empty prompt": 1}


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
@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_messages_are_dropped(dropped, tokenizer, trainer, suffix):
    rows = in_format(suffix, {"messages": TURNS}, {"messages": None}, {"messages": [TURNS[0], assistant("")]})
    found = dropped(rows, trainer=trainer, suffix=suffix, chat_template="tokenizer", using=tokenizer)
    assert found == {"empty text": 1, "empty completion": 1}


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


@pytest.mark.parametrize(
    ("trainer", "row", "reason"),
    [
        ("default", {"text": ""}, "1: empty text"),
        ("mlm", {"text": ""}, "1: empty text"),
        ("sft", {"prompt": "a", "completion": ""}, "1: empty completion"),
        *((trainer, {**PAIR, "rejected": PAIR["chosen"]}, "1: chosen equals rejected") for trainer in PAIRS),
    ],
)
def test_a_split_that_loses_every_row_is_an_error(refused, trainer, row, reason):
    refused([row], "data.train_split: no row of 'train'", reason, trainer=trainer)


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


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("label", ["maybe", "", "2"])
def test_a_label_must_be_true_or_false(refused, suffix, label):
    rows = [{**row, "label": str(row["label"])} for row in LABELLED] + [{**LABELLED[0], "label": label}]
    refused(rows, f"train.{suffix}: row 3", "column 'label' must be true or false", repr(label),
            trainer="kto", suffix=suffix)  # fmt: skip


def test_a_label_must_not_be_nan(refused):
    rows = [{**LABELLED[0], "label": 1.0}, {**LABELLED[1], "label": float("nan")}]
    refused(rows, "train.parquet: row 2", "must be true or false, not nan", trainer="kto", suffix="parquet")


@pytest.mark.parametrize(
    "rows", [LABELLED[:1] * 3, [LABELLED[0], {**LABELLED[1], "completion": ""}]], ids=["all", "all-that-stay"]
)
def test_labels_that_are_all_the_same_are_refused(refused, rows):
    refused(rows, "label_column", "have the label True", "both wanted and unwanted", trainer="kto")


BAD_TURNS = [
    pytest.param([{"role": "wizard", "content": "x"}, TURNS[1]], "no role 'wizard'", id="unknown-role"),
    pytest.param([TURNS[0], {"role": "system", "content": "x"}, TURNS[1]], "a system turn must be the first",
                 id="system-late"),
    pytest.param([{"content": "x"}, TURNS[1]], "a message must be", id="no-role"),
    pytest.param([{"role": "user"}, TURNS[1]], "a message must be", id="no-content"),
    pytest.param([user(None), TURNS[1]], "a message must be", id="null-content"),
    pytest.param([], "at least one message", id="no-turns"),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "suffix"), [*EACH, ("sft", "parquet"), ("dpo", "parquet")])
@pytest.mark.parametrize(("turns", "words"), BAD_TURNS)
def test_messages_that_are_not_a_conversation_are_refused(refused, tokenizer, trainer, suffix, turns, words):
    good, bad = {"messages": TURNS}, {"messages": turns}
    if trainer in PAIRS:
        good, bad = ({"chosen": row["messages"], "rejected": OTHER} for row in (good, bad))
    refused(in_format(suffix, good, bad), f"train.{suffix}: row 2", words, trainer=trainer, suffix=suffix,
            chat_template="tokenizer", using=tokenizer)  # fmt: skip


@pytest.mark.parametrize("trainer", (*TEXTS, *PAIRS))
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"role": "user", "content": "x"}, "must hold text or messages, not dict"),
        (5, "must hold text or messages, not int"),
        (["a", "b"], "a message must be"),
        ([None], "a message must be"),
    ],
)
def test_messages_that_are_not_a_list_of_turns_are_refused(refused, tokenizer, trainer, value, words):
    row = {"prompt": "q", "chosen": value, "rejected": value} if trainer in PAIRS else {"messages": value}
    refused([row], "train.jsonl: row 1", words, trainer=trainer, chat_template="tokenizer", using=tokenizer)


@pytest.mark.parametrize("trainer", (*TEXTS, *PAIRS))
def test_messages_need_a_template(refused, trainer):
    row = {"chosen": TURNS, "rejected": OTHER} if trainer in PAIRS else {"messages": TURNS}
    refused([row], "train.jsonl: row 1", "Set chat_template: tokenizer", trainer=trainer)
    row = {"prompt": TURNS[:1], "completion": TURNS[1:], "chosen": TURNS[1:], "rejected": OTHER[1:]}
    refused([row], "row 1", "Set chat_template: tokenizer", trainer=trainer)


@pytest.mark.parametrize("trainer", TEXTS)
def test_a_template_needs_messages(refused, tokenizer, trainer):
    refused([{"text": "plain"}], "row 1", "needs messages", "Set chat_template: null", trainer=trainer,
            chat_template="tokenizer", using=tokenizer)  # fmt: skip


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


def test_a_row_whose_prompt_fills_block_size_is_dropped(dropped):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "x" * 500, "completion": "b"}]
    assert dropped(rows) == {"no trained token": 1}


@pytest.mark.parametrize("trainer", ["dpo", "orpo", "kto"])
def test_a_pair_whose_prompt_leaves_no_room_for_an_answer_is_dropped(dropped, trainer):
    rows = [PAIR, {**PAIR, "prompt": "x" * 500}]
    found = dropped(rows, trainer=trainer, block_size=64, max_prompt_length=64)
    assert found == {"the prompt leaves no room for a completion": 1}
    assert dropped(rows, trainer=trainer, block_size=64, max_prompt_length=32) == {}


def test_a_reward_pair_longer_than_block_size_is_dropped(dropped):
    rows = [PAIR, {**PAIR, "prompt": "x" * 500}, {**PAIR, "rejected": "x" * 500}]
    assert dropped(rows, trainer="reward") == {"longer than block_size": 2}


@pytest.mark.parametrize(("trainer", "suffix"), EACH)
def test_rows_of_a_megabyte_are_cut_or_dropped(prepare, trainer, suffix):
    long = "word " * 200_000
    row = {**PAIR, "chosen": long} if trainer in PAIRS else {"text": long}
    short = PAIR if trainer in PAIRS else {"text": "A rank."}
    summary = prepare([short, row], trainer=trainer, suffix=suffix).summary
    assert summary.rows == 2
    assert summary.truncated + sum(summary.dropped.values()) == (trainer != "mlm")
    assert summary.longest > 100_000 or trainer in ("mlm", "reward")


@pytest.mark.parametrize(("trainer", "suffix"), EACH)
def test_emoji_and_other_scripts_stay_unchanged(prepare, tokenizer, masked_tokenizer, trainer, suffix):
    text = "🙂 👩‍👩‍👧 日本 é"
    row = {**PAIR, "chosen": text} if trainer in PAIRS else {"text": text}
    used = masked_tokenizer if trainer == "mlm" else tokenizer
    dataset = prepare([row], trainer=trainer, suffix=suffix).dataset
    found = [
        used.decode(ids, skip_special_tokens=True)
        for sample in dataset
        for name, ids in sample.items()
        if name in ("input_ids", "chosen_ids", "completion_ids")
    ]
    assert any(decoded.endswith(text) for decoded in found), found


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("bom", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(
    ("suffix", "lines"),
    [
        ("jsonl", ['{"text": "one"}', '{"text": "two"}', ""]),
        ("jsonl", ['{"text": "one"}', "", '{"text": "two"}']),
        ("json", ['[{"text": "one"},', '{"text": "two"}]', ""]),
        ("csv", ["text,n", "one,1", "two,2", ""]),
        ("csv", ["text,n", "", '"one",1', "", "two,2"]),
        ("csv", [",text", "0,one", "1,two"]),
    ],
)
def test_byte_order_marks_and_line_ends_are_not_part_of_a_row(prepare, tokenizer, suffix, lines, end, bom):
    rows = prepare(bom + end.join(lines).encode(), suffix=suffix).dataset
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["one<|im_end|>", "two<|im_end|>"]


def test_nan_and_na_in_a_csv_file_are_text(prepare, tokenizer):
    """No value is guessed: an empty field is empty, and nan and NA are text."""
    prepared = prepare(b"n,text\n1,nan\n2,NA\n3,\n4\n5,NaN\n", suffix="csv")
    assert prepared.summary.dropped == {"empty text": 2}
    texts = [tokenizer.decode(row["input_ids"][:-1]) for row in prepared.dataset]
    assert texts == ["nan", "NA", "NaN"]


def test_nan_in_a_json_file_is_an_empty_text(prepare):
    assert prepare('{"text": "a"}\n{"text": NaN}\n').summary.dropped == {"empty text": 1}


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


def test_the_row_is_named_when_several_processes_tokenize(refused, monkeypatch):
    from trainers.data import prepare

    monkeypatch.setattr(prepare, "MANY_ROWS", 2)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 2)
    rows = [{"messages": TURNS}] * 3 + [{"messages": [{"role": "wizard", "content": "x"}]}]
    refused(rows, "train.jsonl: row 4", "no role 'wizard'", chat_template="tokenizer")


IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("trainer", TEXTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [6, 7]}, "lists of equal length"),
        ({"attention_mask": [1]}, "lists of equal length"),
        ({"input_ids": [5, 6, 99999]}, "integers from 0 to 383"),
        ({"input_ids": [5, 6, -1]}, "integers from 0 to 383"),
        ({"labels": [5, 6, 99999]}, "labels must be token ids, or -100"),
        ({"labels": [5, 6, -1]}, "labels must be token ids, or -100"),
    ],
)
def test_malformed_token_ids_are_refused(refused, trainer, suffix, change, words):
    refused([IDS, {**IDS, **change}], f"train.{suffix}: row 2", words, trainer=trainer, suffix=suffix)


@pytest.mark.parametrize("trainer", TEXTS)
@pytest.mark.parametrize("ids", ["5 6 7", 5, [5.0, 6.5], ["5", "6"]])
def test_token_ids_of_another_type_are_refused(refused, trainer, ids):
    refused([{"input_ids": ids}], "train.jsonl: row 1", "input_ids", trainer=trainer)


@pytest.mark.parametrize("trainer", TEXTS)
def test_empty_token_ids_are_dropped(dropped, trainer):
    nothing = {"input_ids": [], "labels": [], "attention_mask": []}
    padding = {**IDS, "attention_mask": [0, 0, 0]}
    rows = [IDS, nothing, padding, dict.fromkeys(IDS)]
    assert dropped(rows, trainer=trainer) == {"empty text": 3}


@pytest.mark.parametrize("trainer", ["default", "sft"])
def test_token_ids_without_a_trained_token_are_dropped(dropped, trainer):
    rows = [IDS, {**IDS, "labels": [-100] * 3}, {**IDS, "labels": [5, -100, -100]}]
    assert dropped(rows, trainer=trainer) == {"no trained token": 2}


@pytest.mark.parametrize(
    ("fractions", "words"),
    [
        ({"valid_fraction": 0.1}, ["data.valid_fraction", "it leaves none of the 3 rows for valid"]),
        ({"test_fraction": 0.1}, ["data.test_fraction", "it leaves none of the 3 rows for test"]),
        (
            {"valid_fraction": 0.5, "test_fraction": 0.49},
            ["data.valid_fraction", "it leaves none of the 3 rows for train"],
        ),
    ],
)
def test_a_fraction_that_leaves_a_part_empty_is_refused(refused, fractions, words):
    refused([{"text": word} for word in ("one", "two", "three")], *words, **fractions)


def test_a_reference_with_another_tokenizer_is_refused(tiny_model, tiny_masked_model, tokenizer):
    from trainers.model.load import load_reference

    config = TrainConfig(model=str(tiny_model), model_ref=str(tiny_masked_model), trainer="dpo")
    with pytest.raises(
        ConfigError, match=r"^model_ref: the tokenizer of .* differs from that of .* same family\.$"
    ):
        load_reference(config, tokenizer)


def test_mlm_refuses_a_causal_model(tiny_model):
    from trainers.model.tokenizer import load_tokenizer

    with pytest.raises(ConfigError, match=r"has no mask token, so it is not a masked LM"):
        load_tokenizer(TrainConfig(model=str(tiny_model), trainer="mlm"))


def test_a_template_that_the_tokenizer_does_not_have_is_refused(tiny_masked_model):
    from trainers.model.tokenizer import load_tokenizer

    config = TrainConfig(model=str(tiny_masked_model), trainer="mlm", chat_template="tokenizer")
    with pytest.raises(
        ConfigError, match=r"chat_template: the tokenizer of this model has none\. Use chatml"
    ):
        load_tokenizer(config)
