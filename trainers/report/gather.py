"""Gather what there is to say about a part of the data, with the code that prepares training.

The functions take the config of one source, its tokenizer and a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError
from trainers.config.mix import FIELDS, sources_of
from trainers.config.mix import Source as MixSource
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.data.columns import Columns
from trainers.data.encoders import Encoder
from trainers.data.files import RowPlaces, find_split
from trainers.data.loading import Part, Source, split_of
from trainers.data.mixing import prepare_all
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
class Chosen:
    """The data that is shown: that of a run, or one source of its mix."""

    config: TrainConfig  # of a run that has only this source
    sources: Mapping[str, str]  # field -> where its value is from
    whole: TrainConfig  # of the run
    tokenizer: PreTrainedTokenizerBase
    templates: Mapping[str, PreTrainedTokenizerBase]  # the tokenizer of each source, with its template
    source: MixSource | None = None

    @property
    def name(self) -> str:
        return self.source.name if self.source else ""

    @property
    def own(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the template of the source."""
        return self.templates[self.name] if self.source else self.tokenizer


def label_of(part: Part, name: str) -> str:
    return f"{part}, {name}" if name else part


def source_named(config: TrainConfig, name: str | None) -> MixSource | None:
    """Return the source of this name, or None if the config has no mix.

    Raises:
        ConfigError: there is no such source, or several and no name.
    """
    sources = {source.name: source for source in sources_of(config)}
    if not sources and name is not None:
        raise ConfigError("--source: the config has no data.mix, so it has no sources. Leave --source out.")
    if not sources:
        return None
    if name is None and len(sources) == 1:
        return next(iter(sources.values()))
    if name not in sources:
        what = "is needed" if name is None else f"there is no source '{name}'"
        raise ConfigError(f"--source: {what}. The sources are: {', '.join(sources)}.")
    return sources[name]


def origins(settings: Settings, source: MixSource | None) -> Mapping[str, str]:
    """Return where the values of a source are from: field -> its own entry, or what it takes from `data`."""
    if source is None:
        return settings.sources
    found = dict(settings.sources)
    whole, own = settings.train, source.config
    for name in FIELDS:
        taken = name in whole.model_fields_set and getattr(whole, name) == getattr(own, name)
        if name not in own.model_fields_set:
            found[name] = "default"
        elif not taken:
            found[name] = f"{settings.sources['mix']}, {source.key}"
    return found


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
    label: str  # the part, with its source where there are several
    files: list[str]
    given: int  # rows of the part
    columns: list[Use]
    unused: list[str]
    template: list[tuple[str, str]]
    notes: list[str]  # on the config, as a run prints them


def look(opened: OpenPart, chosen: Chosen, notes: list[str], new_tokens: list[int]) -> Look:
    """Return how the columns and the template were found."""
    split = opened.source.split
    files = [str(file) for file in split.files] or [f"{split.path} ({split.name})"]
    config, sources = chosen.config, chosen.sources
    uses, unused = column_uses(opened.source.names, opened.columns, config, sources, len(opened.raw))
    facts = template_facts(config, sources, chosen.own, new_tokens, opened.columns)
    part = opened.source.part
    label = label_of(part, chosen.name)
    if chosen.source and chosen.source.rows == 0 and part == "train":
        notes = [f"{chosen.source.key}.rows: 0, so the run does not train on these rows.", *notes]
    return Look(part, label, files, len(opened.raw), uses, unused, facts, notes)


@dataclass
class Counts:
    """What is known when all rows are encoded. A label is a part, with its source where there are several."""

    config: TrainConfig
    part: Part  # that is shown
    label: str
    summaries: dict[str, Summary] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # why something cannot be prepared
    lengths: Lengths | None = None
    packing: Packing | None = None
    repeated: Repeats | None = None  # rows of the part that are the same as an earlier one
    # (valid, train): rows of valid that are in train, too
    shared: dict[tuple[str, str], Repeats] = field(default_factory=dict)
    places: dict[str, RowPlaces] = field(default_factory=dict)


def count(chosen: Chosen, part: Part) -> Counts:
    """Prepare all parts as a run does, and return the facts about them. The run then finds its cache."""
    found = Counts(chosen.config, part, label_of(part, chosen.name))
    keys: dict[tuple[Part, str], Keys] = {}
    for (other, name), (config, prepared) in _prepared(chosen, found).items():
        label = label_of(other, name)
        key, split = split_of(config, other)
        found.places[label] = RowPlaces(find_split(config.data_path, split, key))
        keys[other, name] = row_keys(prepared.dataset, prepared.rows)
        if label == found.label:
            _describe(found, prepared, keys[other, name], bool(name))
    for second, first in product(keys, keys):
        if second[1] == chosen.name and _is_compared(second, first):
            found.shared[label_of(*second), label_of(*first)] = shared(keys[second], keys[first])
    return found


def _is_compared(second: tuple[Part, str], first: tuple[Part, str]) -> bool:
    """Return whether rows of `second` should not be in `first`: an earlier part, or another source."""
    order = ("train", "valid", "test")
    earlier = order.index(first[0]) < order.index(second[0])
    return earlier or (first[0] == second[0] == "train" and first[1] != second[1])


def _prepared(chosen: Chosen, found: Counts) -> dict[tuple[Part, str], tuple[TrainConfig, Prepared]]:
    """Prepare each part of each source. What cannot be prepared is a problem."""
    if chosen.name:
        sources = {source.name: source.config for source in sources_of(chosen.whole)}
        try:
            all_parts = prepare_all(chosen.whole, chosen.tokenizer, chosen.templates)
        except ConfigError as error:
            found.problems["the mix"] = str(error)
            return {}
        for part, prepared in all_parts.items():
            for name, summary in prepared.summary.sources.items():
                found.summaries[label_of(part, name)] = summary
            found.summaries[part] = prepared.summary
        return {
            (part, name): (sources[name], own)
            for part, prepared in all_parts.items()
            for name, own in prepared.sources.items()
        }
    alone: dict[tuple[Part, str], tuple[TrainConfig, Prepared]] = {}
    for part in parts(chosen.config):
        try:
            alone[part, ""] = chosen.config, prepare(chosen.config, chosen.tokenizer, part)
            found.summaries[part] = alone[part, ""][1].summary
        except ConfigError as error:
            found.problems[part] = str(error)
    return alone


def _describe(found: Counts, prepared: Prepared, keys: Keys, joined: bool) -> None:
    # The samples of kto get the answer of another one when the sources are joined.
    unpaired = joined and found.part == "train" and found.config.kind.rows == "labelled"
    lengths = sample_lengths(prepared.dataset, prompts=1 if unpaired else 2)
    found.lengths = describe_lengths(lengths)
    found.packing = describe_packing(found.config, found.part, prepared.summary.packs, lengths)
    found.repeated = duplicates(keys)
