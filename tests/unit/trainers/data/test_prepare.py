"""The preparation of a split: its rows in each format, its parts, its summary, and the cache."""

from __future__ import annotations

import json

import pytest
from chats import byte_level, trl_templates
from rows import EACH, PAIR, PAIRS, TURNS, Q

from trainers.config.errors import DISK_FAILED, ConfigError
from trainers.config.schema import TrainConfig
from trainers.rank.failures import code_of


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


@pytest.mark.parametrize(
    ("trainer", "suffix"),
    [("default", "jsonl"), ("sft", "csv"), ("mlm", "jsonl"), ("dpo", "jsonl"), ("kto", "csv")],
)
def test_rows_of_a_megabyte_are_cut_or_dropped(prepare, trainer, suffix):
    long = "word " * 200_000
    row = {**PAIR, "chosen": long} if trainer in PAIRS else {"text": long}
    short = PAIR if trainer in PAIRS else {"text": "A rank."}
    summary = prepare([short, row], trainer=trainer, suffix=suffix).summary
    assert summary.rows == 2
    assert summary.truncated + sum(summary.dropped.values()) == (trainer != "mlm")
    assert summary.longest > 100_000 or trainer in ("mlm", "reward")


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


def test_only_what_trl_gives_is_in_the_key(prepare, monkeypatch):
    """A resume compares it: it must not be refused for a version of TRL, but for a training template."""
    import importlib.metadata

    from trl import chat_template_utils

    source = trl_templates()["qwen3"]
    every_token = byte_level([source])
    every_token.chat_template = source
    plain = {"rows": [{"text": "one"}], "using": every_token}
    templated = {"rows": [{"messages": TURNS}], "using": every_token, "chat_template": "tokenizer"}
    before = prepare(**plain).key, prepare(**templated).key
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata.Distribution, "version", "99")
        assert (prepare(**plain).key, prepare(**templated).key) == before
    changed = chat_template_utils.get_training_chat_template(every_token) + " "
    monkeypatch.setattr(chat_template_utils, "get_training_chat_template", lambda _: changed)
    assert prepare(**plain).key == before[0]
    assert prepare(**templated).key != before[1]


def test_an_interrupted_preparation_is_not_used(prepare, tmp_path, monkeypatch):
    from trainers.data import prepare as data

    def fails(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_tokenize", fails)
        with pytest.raises(RuntimeError):
            prepare([{"text": "one"}])
    assert len(prepare([{"text": "one"}]).dataset) == 1


def test_a_split_without_any_trained_token_is_an_error(prepare):
    with pytest.raises(
        ConfigError, match=r"no row .* has a token to train on \(1: no trained .* Raise block_size"
    ):
        prepare([{"prompt": "x" * 500, "completion": "y"}], block_size=64)


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


def test_the_row_is_named_when_several_processes_tokenize(refused, monkeypatch):
    from trainers.data import prepare

    monkeypatch.setattr(prepare, "MANY_ROWS", 2)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 2)
    rows = [{"messages": TURNS}] * 3 + [{"messages": [{"role": "wizard", "content": "x"}]}]
    refused(rows, "train.jsonl: row 4", "no role 'wizard'", chat_template="tokenizer")


def test_the_summary_of_pairs_counts_tokens_rows_and_answers(prepare):
    summary = prepare([PAIR, PAIR], trainer="dpo").summary
    (row,) = {json.dumps(found) for found in prepare([PAIR, PAIR], trainer="dpo").dataset}
    sizes = {name: len(ids) for name, ids in json.loads(row).items()}
    assert summary.tokens == 2 * sum(sizes.values())
    assert summary.supervised_tokens == 2 * (sizes["chosen_ids"] + sizes["rejected_ids"])
    assert summary.longest == sizes["prompt_ids"] + sizes["chosen_ids"]
    assert (summary.rows, summary.kept, summary.truncated, summary.dropped) == (2, 2, 0, {})


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


def test_a_mismatched_completion_is_that_of_the_sample_before(prepare):
    rows = [{"prompt": Q, "completion": f"Answer {i}.", "label": i % 2 == 0} for i in range(5)]
    dataset = prepare(rows, trainer="kto").dataset
    own = [row["completion_ids"] for row in dataset]
    assert [row["KL_completion_ids"] for row in dataset] == [own[-1], *own[:-1]]


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


def test_a_full_disk_of_the_cache_is_a_disk_error_that_says_so(prepare, monkeypatch, tmp_path):
    """datasets raises an OSError without a number: it looks at the space before it writes."""
    from datasets import builder

    monkeypatch.setattr(builder, "has_sufficient_disk_space", lambda *arguments, **named: False)
    with pytest.raises(
        OSError, match=r"the prepared data needs about .* or more, and the disk of the"
    ) as raised:
        prepare([{"text": "one"}] * 9)
    assert code_of(raised.value) == DISK_FAILED
    assert raised.value.filename == str(tmp_path / "cache" / "data") and "PHALANX_CACHE" in str(raised.value)
    assert not list((tmp_path / "cache" / "data").glob("*.part"))


def test_a_worker_holds_few_rows_at_a_time_if_they_are_long(prepare, monkeypatch):
    from trainers.data import encoders

    sizes, encode = [], encoders.Encoder.__call__
    monkeypatch.setattr(
        encoders.Encoder,
        "__call__",
        lambda self, batch, numbers: sizes.append(len(numbers)) or encode(self, batch, numbers),
    )
    prepare([{"text": "one"}] * 1200)
    prepare([{"text": "a" * 2**20}] * 5)
    assert sizes == [1000, 200, 3, 2]
