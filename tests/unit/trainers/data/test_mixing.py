"""A mix: shares of an epoch, the draw, the cache of each source, and the samples of each trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import ROWS, settings_of, write_split

from trainers.config.errors import ConfigError
from trainers.config.kinds import KINDS
from trainers.config.mix import Source
from trainers.config.schema import TrainConfig
from trainers.data import mixing
from trainers.data.collators import PieceDataset
from trainers.data.packing import whole_samples
from trainers.data.sampler import sample_lengths
from trainers.model.tokenizer import tokenizers_of_sources


def sources(**shares: dict[str, Any]) -> list[Source]:
    return [
        Source(number, name, share.get("weight"), share.get("rows"), TrainConfig())
        for number, (name, share) in enumerate(shares.items())
    ]


@pytest.mark.parametrize(
    ("shares", "sizes", "taken"),
    [
        ([{}, {}], [300, 700], [300, 700]),
        ([{"weight": 3}, {"weight": 7}], [300, 700], [300, 700]),
        ([{"weight": 1}, {"weight": 1}], [300, 700], [500, 500]),
        ([{"weight": 9}, {"weight": 1}], [300, 700], [900, 100]),
        ([{"rows": 10}, {"weight": 1}, {"weight": 3}], [300, 70, 30], [10, 25, 75]),
        ([{"rows": 700}, {}], [300, 5], [700, 5]),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], [3, 3, 4], [4, 3, 3]),
        ([{"weight": 0.2}, {"weight": 0.7}, {"weight": 0.1}], [10, 10, 10], [6, 21, 3]),
    ],
)
def test_the_shares_of_an_epoch(shares, sizes, taken):
    """Sources with a weight share as many samples as they have together; no sample is lost in rounding."""
    named = sources(**{f"n{number}": share for number, share in enumerate(shares)})
    assert mixing.samples_of_epoch(named, sizes) == taken


def test_a_weight_that_leaves_no_sample_is_refused():
    with pytest.raises(ConfigError, match=r"data.mix\[1\].weight: 0.001 of 1.001 leaves none of the 20 sam"):
        mixing.samples_of_epoch(sources(a={"weight": 1}, b={"weight": 0.001}), [10, 10])


def test_a_source_is_passed_over_as_often_as_it_fits():
    chosen = mixing.draw(sources(a={}, b={}), [4, 10], [11, 3], seed=42)
    times = np.bincount(chosen, minlength=14)
    assert sorted(times[:4]) == [2, 3, 3, 3]
    assert sorted(times[4:]) == [0] * 7 + [1] * 3
    assert list(chosen) != sorted(chosen)


def test_the_draw_depends_on_the_seed_and_the_name_alone():
    def of(name: str, seed: int, *others: str) -> list[int]:
        """Return the samples of this source, from those that are drawn."""
        named = sources(**{name: {}, **{other: {} for other in others}})
        chosen = mixing.draw(named, [50] * len(named), [20] * len(named), seed)
        return sorted(chosen[chosen < 50])

    assert of("a", 1) == of("a", 1) == of("a", 1, "b", "c")
    assert of("a", 1) != of("a", 2)
    assert of("a", 1) != of("b", 1)


def test_the_order_of_an_epoch_is_fixed():
    """Golden numbers: another order would be another run."""
    chosen = mixing.draw(sources(code={}, chat={}), [3, 4], [5, 2], seed=42)
    assert chosen.tolist() == [1, 0, 4, 2, 1, 2, 6]


@pytest.fixture
def mixed(tokenizer, masked_tokenizer, tmp_path: Path, monkeypatch):
    """mixed(sources, **config) -> the parts of a mix. A source has `rows_of`, its rows; else ROWS."""
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))

    def prepare(*given: dict[str, Any], **config: Any) -> dict[str, Any]:
        mix = []
        for number, source in enumerate(given):
            path = tmp_path / source.get("name", f"s{number}") / "train.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_split(path, source.get("rows_of", ROWS))
            mix.append({"path": str(path.parent), **{k: v for k, v in source.items() if k != "rows_of"}})
        values = {"trainer": "sft", "block_size": 128, "packing": "none", "mix": mix, **config}
        settings = settings_of(**{"model": str(tmp_path), **values}).train
        used = masked_tokenizer if settings.trainer == "mlm" else tokenizer
        return mixing.prepare_all(settings, used, {source["name"]: used for source in settings.mix or []})

    return prepare


def entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()}


def numbered(*numbers: int) -> list[dict[str, str]]:
    return [{"text": f"row {number}"} for number in numbers]


@pytest.mark.parametrize("trainer", KINDS)
def test_one_source_gives_the_samples_of_the_single_form(mixed, prepare, trainer):
    """Bit for bit, in the same order; and from the same entry of the cache, where nothing is joined."""
    part = {"trainer": trainer, "valid_fraction": 0.34, "data_seed": 42}
    mix = mixed({}, **part)
    for name in ("train", "valid"):
        single = prepare(ROWS, part=name, **part)
        assert list(mix[name].dataset) == list(single.dataset)
        assert mix[name].dataset.features == single.dataset.features
        [own] = mix[name].sources.values()
        assert (own.key == single.key) == (trainer != "kto" or name == "valid")


def test_another_weight_prepares_nothing_anew(mixed, tmp_path):
    one = mixed({"name": "a", "weight": 1}, {"name": "b", "weight": 1}, valid_fraction=0.34)
    before = entries(tmp_path)
    two = mixed({"name": "a", "weight": 1}, {"name": "b", "weight": 2}, valid_fraction=0.34)
    assert entries(tmp_path) == before
    assert one["train"].key != two["train"].key
    assert one["valid"].key == two["valid"].key
    mixed({"name": "a", "weight": 1}, {"name": "b", "weight": 1, "valid_fraction": 0.5}, valid_fraction=0.34)
    assert len(entries(tmp_path) - before) == 2


@pytest.mark.parametrize("change", [{"data_seed": 7}, {"seed": 7}])
def test_the_key_of_the_rows_depends_on_the_seed(mixed, change):
    given = ({"name": "a", "rows": 2}, {"name": "b"})
    assert mixed(*given)["train"].key == mixed(*given)["train"].key
    assert mixed(*given)["train"].key != mixed(*given, **change)["train"].key


def test_the_samples_of_a_mix_are_numbers_into_the_files(mixed, tokenizer):
    mix = mixed(
        {"name": "a", "rows_of": numbered(0, 1), "rows": 5},
        {"name": "b", "rows_of": numbered(2, 3, 4, 5), "rows": 2},
    )["train"]
    assert mix.dataset._indices is not None
    assert mix.dataset.data.nbytes == sum(own.dataset.data.nbytes for own in mix.sources.values())
    texts = [tokenizer.decode(row["input_ids"]) for row in mix.dataset]
    counts = [sum(text.startswith(f"row {number}") for text in texts) for number in range(6)]
    assert sorted(counts[:2]) == [2, 3] and sorted(counts[2:]) == [0, 0, 1, 1]
    assert sample_lengths(mix.dataset).tolist() == [len(row["input_ids"]) for row in mix.dataset]


def test_the_counts_of_each_source(mixed):
    train = mixed(
        {"name": "code", "rows_of": [*numbered(0, 1), {"text": ""}], "weight": 3},
        {"name": "chat", "rows_of": [{"text": "a longer row of text"}] * 2, "weight": 1},
    )["train"]
    code, chat = (train.summary.sources[name] for name in ("code", "chat"))
    assert (code.rows, code.kept, code.taken, code.dropped) == (3, 2, 3, {"empty text": 1})
    assert (chat.rows, chat.kept, chat.taken) == (2, 2, 1)
    lengths = [len(row["input_ids"]) for row in train.dataset]
    assert train.summary.tokens == sum(lengths) == code.tokens + chat.tokens
    trained = [sum(label != -100 for label in row["labels"][1:]) for row in train.dataset]
    assert train.summary.supervised_tokens == sum(trained)
    assert train.supervised.tolist() == trained
    assert code.line.startswith("3 rows, 3 samples, 1.5 epochs, ") and "1 (empty text)" in code.line
    assert chat.line.startswith("2 rows, 1 sample, 0.5 epochs, ")
    assert train.summary.line.startswith("5 rows, 4 samples, ")


def test_a_source_without_a_validation_split_is_not_evaluated(mixed):
    mix = mixed({"name": "a", "valid_fraction": 0.5}, {"name": "b"})
    assert list(mix["valid"].sources) == ["a"] and "test" not in mix
    assert mixing.spans(mix["valid"]) == {"a": range(3)}


def test_a_source_with_no_rows_is_only_evaluated(mixed):
    mix = mixed(
        {"name": "a", "weight": 1},
        {"name": "b", "rows": 0, "valid_fraction": 0.5},
        {"name": "c", "weight": 1},
    )
    assert list(mix["train"].sources) == ["a", "c"] and list(mix["valid"].sources) == ["b"]
    assert len(mix["train"].dataset) == 12


def test_kto_pairs_completions_of_the_mix(mixed, tmp_path):
    """A pair may join two sources, and neither file has the pairs."""
    rows = [
        [{"prompt": "q", "completion": f"{name} {i}", "label": i % 2 == 0} for i in range(8)] for name in "ab"
    ]
    given = [{"name": name, "rows_of": own} for name, own in zip("ab", rows, strict=True)]
    train = mixed(*given, trainer="kto")["train"]
    pairs = [(row["completion_ids"][0], row["KL_completion_ids"][0]) for row in train.dataset]
    assert len({one for one, _ in pairs}) == 2
    assert any(one != other for one, other in pairs)
    assert all("KL_completion_ids" not in own.dataset.column_names for own in train.sources.values())
    before = entries(tmp_path)
    mixed(*given, trainer="kto")
    assert entries(tmp_path) == before


def test_kto_needs_both_labels_in_the_mix_and_not_in_each_source(mixed):
    wanted = [{"prompt": "q", "completion": f"yes {i}", "label": True} for i in range(3)]
    unwanted = [{"prompt": "q", "completion": f"no {i}", "label": False} for i in range(3)]
    mixed({"name": "a", "rows_of": wanted}, {"name": "b", "rows_of": unwanted}, trainer="kto")
    with pytest.raises(ConfigError, match="all 6 samples have the label True"):
        mixed({"name": "a", "rows_of": wanted}, {"name": "b", "rows_of": wanted}, trainer="kto")


def test_a_sample_that_an_epoch_has_twice_has_two_masks(mixed):
    train = mixed({"rows_of": numbered(0), "rows": 2}, trainer="mlm")["train"].dataset
    pieces = PieceDataset(train, whole_samples([3, 3]), range(2))
    assert [sample["number"] for sample in pieces.__getitems__([1, 0])] == [1, 0]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"train_split": "nothing"}, r"data.mix\[1\].train_split: there is no split 'nothing'"),
        ({"column_mapping": {"text": "no"}}, r"data.mix\[1\].column_mapping.text_column: there is no column"),
        ({"rows_of": [{"text": ""}]}, r"data.mix\[1\].train_split: no row of 'train' has a token"),
        ({"rows_of": [{"text": 3}]}, r"data.mix\[1\] \(b\): .*b/train.jsonl: row 1: "),
    ],
)
def test_an_error_names_the_source(mixed, second, message):
    with pytest.raises(ConfigError, match=message):
        mixed({"name": "a"}, {"name": "b", **second})


def test_each_source_is_rendered_with_its_template(tiny_model, monkeypatch, tmp_path):
    from trainers.model.tokenizer import load_tokenizer

    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    write_split(tmp_path / "train.jsonl", [{"prompt": "Hi", "completion": "Yes"}])
    names = ("tokenizer", "phi3", "zephyr", None)
    mix = [{"path": str(tmp_path), "name": str(name), "chat_template": name} for name in names]
    config = settings_of(
        model=str(tiny_model), trainer="sft", mix=mix, chat_template="chatml", block_size=128
    ).train
    tokenizer, new = load_tokenizer(config)
    templates = tokenizers_of_sources(config, tokenizer)
    train = mixing.prepare_all(config, tokenizer, templates)["train"]
    texts = {name: tokenizer.decode(own.dataset[0]["input_ids"]) for name, own in train.sources.items()}
    assert texts["tokenizer"].startswith("<|im_start|>user\nHi")
    assert texts["phi3"].startswith("<|user|>\nHi<|end|>\n<|assistant|>\nYes<|end|>")
    assert texts["zephyr"].startswith("<|user|>\nHi<|im_end|>\n<|assistant|>\nYes<|im_end|>")
    assert texts["None"] == "HiYes<|im_end|>"
    # One vocabulary: a token of a template has one id, and is new to the model only once.
    assert sorted(tokenizer.convert_ids_to_tokens(new)) == [
        "<|assistant|>",
        "<|end|>",
        "<|system|>",
        "<|user|>",
    ]
    assert len(train.sources["zephyr"].dataset[0]["input_ids"]) < 20
    assert tokenizer.eos_token == "<|im_end|>"
    assert {len(own) for own in templates.values()} == {len(tokenizer)}
