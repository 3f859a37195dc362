"""The rows as JSON are the samples that training gets."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rows import PAIR, TURNS, Q, assistant, user

from trainers.config.schema import TrainConfig
from trainers.data.loading import open_source
from trainers.data_report.as_json import as_json
from trainers.data_report.gather import open_part
from trainers.data_report.shown_rows import first_rows

ANSWERED = [*TURNS, user("And a step?"), assistant("One update.")]
LONG = "word " * 70
ROWS = {
    "text": [{"text": "one"}, {"text": " "}, {"text": LONG}],
    "messages": [{"messages": ANSWERED}, {"messages": [user(Q), assistant("")]}, {"messages": TURNS}],
    "pair": [PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": LONG}],
    "labelled": [{"prompt": Q, "completion": f"Answer {i}.", "label": i % 2 == 0} for i in range(5)],
}
CASES = {
    "packed wrapped": ("text", {"trainer": "default"}),
    "cut at block_size": ("text", {"block_size": 32}),
    "messages": ("messages", {"chat_template": "tokenizer"}),
    "unrolled": ("messages", {"chat_template": "tokenizer", "history": "unroll"}),
    "dpo": ("pair", {"trainer": "dpo", "block_size": 64}),
    "reward": ("pair", {"trainer": "reward", "block_size": 64}),
    "kto": ("labelled", {"trainer": "kto"}),
    "kto with pairs": ("pair", {"trainer": "kto"}),
    "mlm": ("text", {"trainer": "mlm", "block_size": 32}),
}


@pytest.fixture
def printed(prepare, tokenizer, masked_tokenizer, tmp_path):
    """`printed(rows, ...)`: the rows as JSON, and what a run prepares of the same file."""

    def read(rows, part="train", limit=None, suffix="jsonl", **config):
        prepared = prepare(rows, part=part, suffix=suffix, **config)
        values = {"trainer": "sft", "block_size": 128, "packing": "none", **config}
        settings = TrainConfig(data_path=str(tmp_path / "data"), **values)
        own = masked_tokenizer if values["trainer"] == "mlm" else tokenizer
        opened = open_part(open_source(settings, part), settings, own, tmp_path / "raw")
        shown = first_rows(opened.raw, opened.encoder, opened.places, own, limit)
        lines = [json.dumps(as_json(row, own)) for row in shown]
        return [json.loads(line) for line in lines], prepared

    return read


@pytest.mark.parametrize(("rows", "config"), CASES.values(), ids=CASES)
def test_the_samples_are_those_of_the_run(printed, rows, config):
    given = ROWS[rows]
    found, prepared = printed(given, **config)
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5][: len(given)]
    columns = [name for name in prepared.dataset.column_names if name not in ("number", "KL_completion_ids")]
    samples = [
        (row["row"] - 1, {name: sample[name] for name in columns})
        for row in found
        for sample in row.get("samples", [])
    ]
    expected = [
        (int(row), {name: sample[name] for name in columns})
        for row, sample in zip(prepared.rows, prepared.dataset, strict=True)
    ]
    if config.get("trainer") == "kto":  # which is shuffled, once
        samples, expected = (sorted(pairs, key=repr) for pairs in (samples, expected))
    assert samples == expected
    reasons = Counter(row["dropped"] for row in found if "dropped" in row)
    assert reasons == prepared.summary.dropped
    assert all(("samples" in row) != ("dropped" in row) for row in found)


def test_each_sample_has_its_texts(printed, tokenizer):
    (row,), _ = printed([{"messages": TURNS}], chat_template="tokenizer")
    (sample,) = row["samples"]
    assert sample["text"] == tokenizer.decode(sample["input_ids"])
    assert {label for label in sample["labels"] if label != -100} < set(sample["input_ids"])
    (row,), _ = printed([PAIR], trainer="dpo")
    (sample,) = row["samples"]
    assert set(sample) == {"prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"}
    assert sample["prompt"] == Q and sample["chosen"].startswith(PAIR["chosen"])
    rows, _ = printed(ROWS["labelled"], trainer="kto")
    assert set(rows[0]["samples"][0]) == {"prompt", "completion", "prompt_ids", "completion_ids", "label"}


def test_a_conversation_that_is_unrolled_has_several_samples(printed):
    (row,), _ = printed([{"messages": ANSWERED}], chat_template="tokenizer", history="unroll")
    first, second = row["samples"]
    assert second["input_ids"][: len(first["input_ids"])] == first["input_ids"]


def test_a_malformed_row_has_its_error_and_the_others_their_samples(printed, prepare, tmp_path, tokenizer):
    prepare([{"prompt": "a", "completion": "b"}])
    rows = [{"messages": TURNS}, {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": TURNS}]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(data_path=str(tmp_path / "data"), trainer="sft", chat_template="tokenizer")
    opened = open_part(open_source(config, "train"), config, tokenizer, tmp_path / "raw")
    shown = first_rows(opened.raw, opened.encoder, opened.places, tokenizer, None)
    found = [as_json(row, tokenizer) for row in shown]
    assert found[1] == {
        "row": 2,
        "error": "there is no role 'wizard'. Allowed: system, user, assistant, tool.",
    }
    assert [sorted(row) for row in found] == [["row", "samples"], ["error", "row"], ["row", "samples"]]


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_row_that_is_held_out_keeps_its_number_in_the_file(printed, part):
    rows = [{"text": f"Row {i}."} for i in range(1, 21)]
    found, _ = printed(rows, part=part, valid_fraction=0.2)
    assert len(found) == (16 if part == "train" else 4)
    for row in found:
        assert row["samples"][0]["text"].startswith(f"Row {row['row']}.")


def test_rows_of_several_files_are_counted_in_each(printed, tmp_path, tokenizer):
    printed([{"text": "one"}])
    (tmp_path / "data" / "train.jsonl").unlink()
    for name, count in (("a", 2), ("b", 0), ("c", 3)):
        rows = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(1, count + 1))
        (tmp_path / "data" / f"train-{name}.jsonl").write_text(rows)
    config = TrainConfig(data_path=str(tmp_path / "data"), trainer="sft")
    opened = open_part(open_source(config, "train"), config, tokenizer, tmp_path / "raw")
    shown = list(first_rows(opened.raw, opened.encoder, opened.places, tokenizer, 4))
    found = [as_json(row, tokenizer) for row in shown]
    assert [(row["file"][-7:], row["row"]) for row in found] == [
        ("a.jsonl", 1), ("a.jsonl", 2), ("c.jsonl", 1), ("c.jsonl", 2),
    ]  # fmt: skip
    assert [row["samples"][0]["text"][:3] for row in found] == ["a 1", "a 2", "c 1", "c 2"]


def test_rows_of_the_hub_are_counted_in_their_split(tokenizer, tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"text": f"Row {i}."} for i in range(1, 9)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    config = TrainConfig(data_path="org/rows", trainer="sft", valid_fraction=0.5)
    opened = open_part(open_source(config, "valid"), config, tokenizer, tmp_path / "raw")
    shown = list(first_rows(opened.raw, opened.encoder, opened.places, tokenizer, None))
    assert len(shown) == 4
    for row in shown:
        assert row.file is None
        assert tokenizer.decode(row.samples[0]["input_ids"]).startswith(f"Row {row.number}.")


def test_only_some_rows_are_read_if_only_some_are_asked_for(printed):
    found, _ = printed([{"text": f"Row {i}."} for i in range(9)], limit=2)
    assert [row["row"] for row in found] == [1, 2]
    found, _ = printed([{"text": "one"}], limit=9)
    assert len(found) == 1
