"""Facts about samples: lengths, how full the packs are, rows that repeat others."""

from __future__ import annotations

import numpy as np
import pytest
from rows import END, PAIR, Q, assistant, user

from trainers.config.schema import TrainConfig
from trainers.data_report.facts import (
    Bar,
    describe_lengths,
    describe_packing,
    duplicates,
    row_keys,
    sample_hashes,
    shared,
)


def test_a_histogram_has_bars_of_one_width():
    found = describe_lengths(np.asarray([3, 12, 14, 14, 47]))
    assert (found.shortest, found.median, found.most, found.longest) == (3, 14, 47, 47)
    assert found.bars[0] == Bar(0, 4, 1) and found.bars[-1] == Bar(45, 49, 1)
    assert [bar.count for bar in found.bars] == [1, 0, 3, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "lengths", [[7], [512, 512], [1, 8192], [9, 10], range(1, 1000), [3, 15], [9, 130], [99, 211, 100_000]]
)
def test_a_histogram_counts_each_sample_once_in_few_bars(lengths):
    bars = describe_lengths(np.asarray(lengths)).bars
    assert len(bars) <= 12
    assert sum(bar.count for bar in bars) == len(lengths)
    assert bars[0].count and bars[-1].count, "it begins and ends where there are samples"
    for bar in bars:
        assert bar.count == sum(bar.first <= length <= bar.last for length in lengths)


def test_packs_are_as_full_as_their_tokens_say():
    lengths = np.asarray([100, 28, 64])
    config = TrainConfig(trainer="sft", block_size=128)
    found = describe_packing(config, "train", 2, lengths)
    assert found is not None
    assert (found.packs, found.capacity, found.share) == (2, 128, 192 / 256)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("train", {"packing": "none"}),
        ("train", {"trainer": "dpo"}),
        ("valid", {"eval_packing": False}),
    ],
)
def test_where_packs_have_no_fixed_size_nothing_is_said_about_them(part, values):
    config = TrainConfig(**{"trainer": "sft", "block_size": 128, **values})
    assert describe_packing(config, part, 2, np.asarray([100, 28])) is None


def keys_of(prepared):
    return row_keys(prepared.dataset, prepared.rows)


def test_a_duplicate_is_a_row_of_the_same_tokens(prepare):
    texts = ["one", "two", "", "one", "one ", "two", "one"]
    found = duplicates(keys_of(prepare([{"text": text} for text in texts])))
    assert found.first(9) == [(3, 0), (5, 1), (6, 0)]


def test_answers_that_differ_only_in_the_column_differ(prepare):
    """The same ids in other columns: chosen and rejected, exchanged."""
    other = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    assert duplicates(keys_of(prepare([PAIR, other, PAIR], trainer="dpo"))).first(9) == [(2, 0)]


def test_the_samples_of_a_shuffled_row_are_compared_together(prepare):
    """kto makes two samples of a pair and shuffles them. The label is a part of what it learns."""
    pairs = [{**PAIR, "prompt": f"{Q} {i % 20}"} for i in range(40)]
    found = duplicates(keys_of(prepare(pairs, trainer="kto")))
    assert found.first(99) == [(i + 20, i) for i in range(20)]
    row = {"prompt": Q, "completion": "One.", "label": True}
    labelled = prepare([row, {**row, "label": False}, row], trainer="kto")
    assert duplicates(keys_of(labelled)).first(9) == [(2, 0)]


def test_rows_of_several_samples_are_compared_as_rows(prepare):
    texts = ["word " * 60, "word " * 20, "word " * 60]
    prepared = prepare([{"text": text} for text in texts], trainer="mlm", block_size=32)
    assert len(prepared.dataset) > 3
    assert duplicates(keys_of(prepared)).first(9) == [(2, 0)]


def test_a_row_of_two_parts_is_found(prepare):
    texts = [f"Row {i % 7}." for i in range(20)]
    parts = {
        part: prepare([{"text": text} for text in texts], part=part, valid_fraction=0.3)
        for part in ("train", "valid")
    }
    found = shared(keys_of(parts["valid"]), keys_of(parts["train"]))
    train = parts["train"].rows.tolist()
    expected = [
        (row, next(other for other in train if texts[other] == texts[row]))
        for row in parts["valid"].rows.tolist()
        if texts[row] in {texts[other] for other in train}
    ]
    assert expected and found.first(99) == expected
    assert len(shared(keys_of(parts["valid"]), keys_of(prepare([{"text": "other"}])))) == 0


def test_hashes_do_not_depend_on_how_a_table_is_cut(prepare):
    from datasets import concatenate_datasets

    dataset = prepare([{"text": f"Row {i % 3}."} for i in range(9)]).dataset
    parts = concatenate_datasets([dataset.select([0, 1]), dataset.select(range(2, 9))])
    shuffled = dataset.select([4, 2, 0])
    hashes = sample_hashes(dataset)
    assert sample_hashes(parts).tolist() == hashes.tolist()
    assert sample_hashes(shuffled).tolist() == hashes[[4, 2, 0]].tolist()
    assert len(set(hashes.tolist())) == 3


def test_the_cache_has_the_row_of_each_sample(prepare):
    turns = [user(Q), assistant("One."), user(Q), assistant("Two.")]
    rows = [{"messages": turns}, {"messages": [user(Q), assistant(" ")]}, {"messages": turns[:2]}]
    prepared = prepare(rows, chat_template="tokenizer", history="unroll")
    assert prepared.rows.tolist() == [0, 0, 2]
    assert prepared.summary.first_dropped == {"empty completion": [2]}


def test_the_rows_of_a_shuffled_cache_are_those_of_its_samples(prepare, tokenizer):
    rows = [{"prompt": f"{Q} {i}", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(30)]
    prepared = prepare(rows, trainer="kto")
    texts = [tokenizer.decode(sample["completion_ids"]) for sample in prepared.dataset]
    assert texts == [f"It is {row}.{END}" for row in prepared.rows.tolist()]
    assert prepared.rows.tolist() != sorted(prepared.rows.tolist())
