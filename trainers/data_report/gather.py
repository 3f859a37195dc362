"""Gather what there is to say about a part of the data, with the code that prepares training.

open_part() and look() take one source: its config and its tokenizer. count() takes those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError
from trainers.config.mix import sources_of
from trainers.config.schema import TrainConfig
from trainers.data.columns import Columns
from trainers.data.encoders import Encoder
from trainers.data.files import RowPlaces, find_split
from trainers.data.loading import Part, Source, split_of
from trainers.data.mixing import prepare_part
from trainers.data.prepare import Prepared, Summary, parts
from trainers.data.sampler import sample_lengths
from trainers.data_report.column_uses import Use, column_uses
from trainers.data_report.facts import (
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
from trainers.data_report.template import template_facts

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
    name: str = ""  # of the source, in a mix


def look(
    opened: OpenPart,
    config: TrainConfig,
    sources: Mapping[str, str],
    notes: list[str],
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[int],
    name: str = "",
) -> Look:
    """Return how the columns and the template were found. `sources` says where each value is from."""
    split = opened.source.split
    files = [str(file) for file in split.files] or [f"{split.path} ({split.name})"]
    uses, unused = column_uses(opened.source.names, opened.columns, config, sources, len(opened.raw))
    facts = template_facts(config, sources, tokenizer, new_tokens, opened.columns)
    return Look(opened.source.part, files, len(opened.raw), uses, unused, facts, notes, name)


@dataclass(frozen=True)
class Rows:
    """A part of a source. Without a mix, the source has no name."""

    part: Part
    source: str = ""

    def __str__(self) -> str:
        return f"{self.part}, {self.source}" if self.source else self.part

    @property
    def place(self) -> str:
        """The name after `in`."""
        return f"{self.part} of {self.source}" if self.source else self.part


@dataclass
class Counts:
    """What is known when all rows are encoded."""

    config: TrainConfig
    part: Part  # that is shown
    summaries: dict[Part, Summary] = field(default_factory=dict)
    problems: dict[Part, str] = field(default_factory=dict)  # why a part cannot be prepared
    lengths: Lengths | None = None
    packing: Packing | None = None
    repeated: dict[Rows, Repeats] = field(default_factory=dict)  # rows that are the same as an earlier one
    # (valid, train): rows of valid that are in train, too. Also of two sources of the part that is shown.
    shared: dict[tuple[Rows, Rows], Repeats] = field(default_factory=dict)
    places: dict[Rows, RowPlaces] = field(default_factory=dict)


def count(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    templates: Mapping[str, PreTrainedTokenizerBase],
    part: Part,
) -> Counts:
    """Prepare all parts as a run does, and return the facts about them. The run then finds its cache.

    `templates`: the tokenizer of each source of a mix, with its template.
    """
    found = Counts(config, part)
    keys: dict[Rows, Keys] = {}
    for other in parts(config):
        try:
            prepared = prepare_part(config, tokenizer, templates, other)
        except ConfigError as error:
            found.problems[other] = str(error)
            continue
        found.summaries[other] = prepared.summary
        if other == part:
            lengths = sample_lengths(prepared.dataset)
            found.lengths = describe_lengths(lengths)
            found.packing = describe_packing(config, part, prepared.summary.packs, lengths)
        keys |= _keys(config, prepared, other, found.places)
    found.repeated = {rows: duplicates(own) for rows, own in keys.items() if rows.part == part}
    for first, second in combinations(keys, 2):
        if first.part != second.part or first.part == part:
            found.shared[second, first] = shared(keys[second], keys[first])
    return found


def _keys(
    config: TrainConfig, prepared: Prepared, part: Part, places: dict[Rows, RowPlaces]
) -> dict[Rows, Keys]:
    """Return the keys of the rows of each source, and add where the rows are to `places`."""
    configs = {source.name: source.config for source in sources_of(config)} or {"": config}
    found = {}
    for name, own in (prepared.sources or {"": prepared}).items():
        key, split = split_of(configs[name], part)
        places[Rows(part, name)] = RowPlaces(find_split(configs[name].data_path, split, key))
        found[Rows(part, name)] = row_keys(own.dataset, own.rows)
    return found
