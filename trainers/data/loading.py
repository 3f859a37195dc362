"""Find and load the rows of a part of the data: train, valid or test.

Rows of local files are converted once, into Arrow files that are mapped and not held in memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.config.text import count_of
from trainers.data.column_kinds import ROWS_READ, with_messages
from trainers.data.columns import Columns, find_columns
from trainers.data.exact_rows import LINE, exact_lines, exact_structs
from trainers.data.files import Split, column_names, find_split, is_array, rows
from trainers.rank.library_patches import replaced

if TYPE_CHECKING:
    from datasets import Dataset

ROW = "__row__"  # a column with the number of a row in its split, so that a message can name the row

Part = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Source:
    """Where the rows of a part come from. The rows are not loaded yet, unless they come from the hub."""

    part: Part
    key: str  # of the config, for messages: train_split, valid_split or test_split
    split: Split
    names: list[str]  # of all columns
    columns: Columns  # by their names; load() also tells which hold messages
    fingerprint: str  # a hash of the content
    on_hub: Dataset | None

    @property
    def bytes(self) -> int:
        """The size of the local files."""
        return sum(file.stat().st_size for file in self.split.files)

    def load(self, config: TrainConfig, folder: Path) -> tuple[Dataset, Columns]:
        """Return the rows of the part, with their numbers in ROW, and the columns.

        `folder` is for the Arrow files of local rows. They must stay until the rows are not needed any more.

        Raises:
            ConfigError: a row cannot be read, or the part would be empty.
        """
        raw = self.on_hub if self.on_hub is not None else _load_files(self.split, folder)
        lines = self.on_hub is None and self.split.format == "json"
        part = _held_out(raw, config, self.part)
        part = exact_lines(part, self.split, self.names) if lines else exact_structs(part)
        first = exact_lines(raw, self.split, self.names) if lines else raw.select_columns(self.columns.named)
        return part, with_messages(self.columns, first[:ROWS_READ])


def open_source(config: TrainConfig, part: Part) -> Source:
    """Find the rows of a part.

    Raises:
        ConfigError: there is no such split, it is empty, or a column is missing.
    """
    key, name = split_of(config, part)
    split = find_split(config.data_path, name, key)
    on_hub = None if split.files else _from_hub(split, config)
    names = column_names(split) if on_hub is None else on_hub.column_names
    if not names or (on_hub is not None and len(on_hub) == 0):
        raise ConfigError(f"data.{key}: the split '{name}' is empty. It needs at least one row.")
    fingerprint = _files_digest(split) if on_hub is None else on_hub._fingerprint
    return Source(part, key, split, names, find_columns(names, config), fingerprint, on_hub)


def split_of(config: TrainConfig, part: Part) -> tuple[str, str]:
    """Return the config key that a part comes from, and the name of its split."""
    named = {"valid": config.valid_split, "test": config.test_split}.get(part)
    return (f"{part}_split", named) if named is not None else ("train_split", config.train_split)


def _held_out(raw: Dataset, config: TrainConfig, part: Part) -> Dataset:
    """Return the rows of a part, in their order. A seeded draw holds out valid_fraction and test_fraction.

    Raises:
        ConfigError: a part would be empty.
    """
    import numpy as np

    raw = raw.add_column(ROW, np.arange(len(raw)))
    if split_of(config, part)[0] != "train_split":
        return raw
    sizes = {"valid": config.valid_fraction, "test": config.test_fraction}
    counts = {name: round(share * len(raw)) for name, share in sizes.items()}
    counts["train"] = len(raw) - sum(counts.values())
    for name, share in (*sizes.items(), ("train", 1.0)):
        if share and counts[name] < 1:
            raise ConfigError(
                f"data.{'valid_fraction' if name == 'train' else name + '_fraction'}: it leaves none of the "
                f"{count_of(len(raw), 'row')} for {name}. Give more rows, or set another fraction."
            )
    if counts["train"] == len(raw):
        return raw
    order = np.random.default_rng(config.split_seed).permutation(len(raw))
    ends = np.cumsum([counts["test"], counts["valid"]])
    chosen = dict(zip(("test", "valid", "train"), np.split(order, ends), strict=True))[part]
    return raw.select(np.sort(chosen))


def _from_hub(split: Split, config: TrainConfig) -> Dataset:
    """Load a split of a dataset on the hub. The name `config:split` selects a configuration too."""
    from datasets import Dataset, load_dataset

    name, _, part = split.name.rpartition(":")
    try:
        data = load_dataset(split.path, name=name or None, split=part, token=config.token)
    except Exception as error:
        # The hub raises errors of many classes. All of them mean that the rows cannot be loaded.
        raise ConfigError(
            f"data.path: {split.path} ({split.name}) cannot be loaded from the hub: {error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


def _load_files(split: Split, cache: Path) -> Dataset:
    """Load local files with `datasets`, into Arrow files in `cache`. Rows of JSON stay text."""
    import datasets
    from datasets import Dataset, Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder, options = split.format, {}
    if builder == "csv":
        # Read every column as text: numbers must not be parsed, and "NA" must not become an empty value.
        text = Features({name: Value("string") for name in column_names(split)})
        options = {"features": text, "keep_default_na": False}
    elif builder == "json":
        if any(map(is_array, split.files)):
            return Dataset.from_dict({LINE: [json.dumps(row) for row in rows(split)]})
        builder, options = "text", {"encoding": "utf-8-sig"}
    files = [str(file) for file in split.files]
    try:
        # datasets would report the load of local files to the hub, and wait for it where there is no network.
        with replaced(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False):
            data = load_dataset(builder, data_files=files, split="train", cache_dir=str(cache), **options)
    except DatasetGenerationError as error:
        for _ in rows(split):  # raises an error with file and line if a row is malformed
            pass
        reason = error.__cause__ or error
        raise ConfigError(
            f"data.path: the rows of {', '.join(files)} have different types: {reason}. The values of a "
            "column must have one type."
        ) from error
    assert isinstance(data, Dataset)
    return _without_blank_lines(data) if builder == "text" else data


def _without_blank_lines(lines: Dataset) -> Dataset:
    import numpy as np
    import pyarrow.compute as pc

    given = [pc.not_equal(pc.utf8_trim_whitespace(chunk), "") for chunk in lines.data.column(LINE).chunks]
    kept = np.concatenate([np.asarray(chunk) for chunk in given]) if given else np.zeros(0, dtype=bool)
    return lines if kept.all() else lines.select(np.flatnonzero(kept))


def _files_digest(split: Split) -> str:
    digest = hashlib.blake2b()
    for file in split.files:
        digest.update(file.suffix.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
