"""Gather what there is to say about a part of the data, with the code that prepares training.

The functions take the config of one source, its tokenizer and a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data.columns import Columns
from trainers.data.encoders import Encoder
from trainers.data.files import RowPlaces, find_split
from trainers.data.loading import Part, Source, split_of
from trainers.data.prepare import Prepared, Summary, parts, prepare
from trainers.data.sampler import sample_lengths
from trainers.report.column_uses import Use, column_uses
from trainers.report.facts import (
    Keys,
    Lengths,
    Packing,
    Repeats,
    describe_lengths,
    describe_packing,
    duplicates,
    row_keys,
    shared,
)
from trainers.report.template import template_facts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass
class OpenPart:
    """A part of the data: its rows, and what encodes them."""

    source: Source
    raw: Dataset
    columns: Columns
    encoder: Encoder
    places: RowPlaces


def check_part(config: TrainConfig, part: Part) -> None:
    """Check that the run has this part.

    Raises:
        ConfigError: it does not.
    """
    if part not in parts(config):
        raise ConfigError(
            f"--split: the config has no {part} part. Set data.{part}_split or data.{part}_fraction, or give "
            f"--split {' or '.join(parts(config))}."
        )


def open_part(
    source: Source, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> OpenPart:
    """Load the rows of a part. `folder` is for the Arrow files, and must stay while they are used.

    Raises:
        ConfigError: a row cannot be read, or the part would be empty.
    """
    raw, columns = source.load(config, folder)
    return OpenPart(source, raw, columns, Encoder(columns, config, tokenizer), RowPlaces(source.split))


@dataclass
class Look:
    """What is known before all rows are encoded."""

    part: Part
    files: list[str]
    given: int  # rows of the part
    columns: list[Use]
    unused: list[str]
    template: list[tuple[str, str]]
    notes: list[str]  # on the config, as a run prints them


def look(
    opened: OpenPart,
    config: TrainConfig,
    sources: Mapping[str, str],
    notes: list[str],
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[int],
) -> Look:
    """Return how the columns and the template were found."""
    split = opened.source.split
    files = [str(file) for file in split.files] or [f"{split.path} ({split.name})"]
    uses, unused = column_uses(opened.source.names, opened.columns, config, sources, len(opened.raw))
    facts = template_facts(config, sources, tokenizer, new_tokens, opened.columns)
    return Look(opened.source.part, files, len(opened.raw), uses, unused, facts, notes)


@dataclass
class Counts:
    """What is known when all rows are encoded."""

    config: TrainConfig
    part: Part  # that is shown
    summaries: dict[Part, Summary] = field(default_factory=dict)
    problems: dict[Part, str] = field(default_factory=dict)  # why a part cannot be prepared
    lengths: Lengths | None = None
    packing: Packing | None = None
    repeated: Repeats | None = None  # rows of the part that are the same as an earlier one
    # (valid, train): rows of valid that are in train, too
    shared: dict[tuple[Part, Part], Repeats] = field(default_factory=dict)
    places: dict[Part, RowPlaces] = field(default_factory=dict)


def count(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, part: Part) -> Counts:
    """Prepare all parts as a run does, and return the facts about them. The run then finds its cache."""
    found = Counts(config, part)
    keys: dict[Part, Keys] = {}
    for other in parts(config):
        try:
            prepared = prepare(config, tokenizer, other)
        except ConfigError as error:
            found.problems[other] = str(error)
            continue
        found.summaries[other] = prepared.summary
        key, name = split_of(config, other)
        found.places[other] = RowPlaces(find_split(config.data_path, name, key))
        keys[other] = row_keys(prepared.dataset, prepared.rows)
        if other == part:
            _describe(found, prepared, keys[part])
    for first, second in combinations(keys, 2):
        found.shared[second, first] = shared(keys[second], keys[first])
    return found


def _describe(found: Counts, prepared: Prepared, keys: Keys) -> None:
    lengths = sample_lengths(prepared.dataset)
    found.lengths = describe_lengths(lengths)
    found.packing = describe_packing(found.config, found.part, prepared.summary.packs, lengths)
    found.repeated = duplicates(keys)
