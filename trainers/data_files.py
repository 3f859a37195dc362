"""Where the rows of a split lie on disk, and what can be known about them without reading them all.

Light on purpose (standard library; pyarrow only for Parquet): the launcher uses it to refuse bad data before
a rank starts, the ranks to load the same files.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import ConfigError, TrainConfig

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
CHECK_BYTES = 64 * 2**20  # how much of a split the launcher reads before the ranks start
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Split:
    """One split: local files of one format, or a dataset on the hub (`files` empty)."""

    path: str
    name: str
    files: tuple[Path, ...] = ()

    @property
    def format(self) -> str:
        """The builder's name in `datasets`: csv, json or parquet."""
        return {".jsonl": "json"}.get(self.files[0].suffix, self.files[0].suffix[1:])


def find_split(data_path: str, name: str, key: str = "train_split") -> Split:
    """Finds the files of a split: `<path>/<name>.<ext>`, `<path>/<name>-*.<ext>`, `<path>/<name>/*.<ext>`,
    or the file `<path>` itself. A path that does not exist and could be a hub id is taken as one.

    Raises:
        ConfigError: nothing there; the message lists what is.
    """
    root = Path(os.path.expanduser(data_path))  # pathlib's raises where there is no such user
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ConfigError(
                f"data.path: {root} is not a file this project reads. Allowed: {', '.join(SUFFIXES)}."
            )
        if key == "valid_split":
            raise ConfigError(
                f"data.path: {root} is one file, so there is no split '{name}' beside it. Give the folder "
                "that holds both files as data.path, or valid_split: null."
            )
        return Split(data_path, name, (root,))
    if not root.exists():
        if _HUB_ID.fullmatch(data_path) and not data_path.endswith(SUFFIXES):
            return Split(data_path, name)
        raise ConfigError(
            f"data.path: {data_path} does not exist. Give a folder, a file, or a dataset id on the hub."
        )
    for suffix in SUFFIXES:
        found = [root / f"{name}{suffix}"] if (root / f"{name}{suffix}").is_file() else []
        found = found or sorted(root.glob(f"{glob.escape(name)}-*{suffix}"))
        found = found or sorted((root / name).glob(f"*{suffix}"))
        if found:
            return Split(data_path, name, tuple(found))
    present = sorted({p.name for p in root.iterdir() if p.suffix in SUFFIXES or p.is_dir()}) or ["nothing"]
    raise ConfigError(
        f"data.{key}: there is no split '{name}' in {data_path}. There: {', '.join(present[:8])}. "
        f"Expected for example {data_path}/{name}.jsonl."
    )


def rows(split: Split, limit_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of local CSV and JSON files, in order, up to about `limit_bytes`.

    Raises:
        ConfigError: a row that cannot be read, with file and line.
    """
    for path in split.files:
        if path.suffix == ".jsonl" or (path.suffix == ".json" and not _is_array(path)):
            yield from _json_lines(path, limit_bytes)
        elif path.suffix == ".json":
            yield from _json_array(path)
        elif path.suffix == ".csv":
            yield from _csv_rows(path, limit_bytes)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def _json_lines(path: Path, limit_bytes: int | None) -> Iterator[dict[str, Any]]:
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            read += len(line)
            if line.strip():
                yield _json_row(path, number, line)
            if limit_bytes is not None and read > limit_bytes:
                return


def _json_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise ConfigError(
            f"{path}:{number}: the row is not valid JSON: {reason}. Mend or remove that line."
        ) from None
    if not isinstance(row, dict):
        raise ConfigError(
            f'{path}:{number}: a row must be an object, such as {{"text": "..."}}, not {type(row).__name__}.'
        )
    return row


def _json_array(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise ConfigError(f"{where}: not valid JSON. Mend the file.") from None
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} must be an object, not {type(row).__name__}.")
        yield row


def _csv_rows(path: Path, limit_bytes: int | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        read = 0
        try:
            for row in reader:
                if None in row:
                    raise ConfigError(
                        f"{path}:{reader.line_num}: the row has more fields than the header "
                        f"({len(reader.fieldnames or [])}). "
                        "Quote fields that hold a comma."
                    )
                read += sum(len(value or "") for value in row.values())
                yield row
                if limit_bytes is not None and read > limit_bytes:
                    return
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8. Save the file as UTF-8.") from None
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            raise ConfigError(f"{where}: the row is not valid CSV: {error}. Mend that line.") from None


def column_names(split: Split) -> list[str]:
    """The columns of a local split, from its first row, header or schema. Empty: the split has no row."""
    return _parquet_columns(split) if split.format == "parquet" else list(next(rows(split), {}))


def _parquet_columns(split: Split) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    for path in split.files:
        try:
            count += pq.read_metadata(path).num_rows
        except pa.ArrowInvalid:
            raise ConfigError(f"{path}: not a Parquet file, or not whole. Download it anew.") from None
    return list(pq.read_schema(split.files[0]).names) if count else []


def check_split(split: Split, config: TrainConfig, key: str) -> None:
    """Refuses an empty split, a missing column, and rows that cannot be read (as far as CHECK_BYTES).

    Raises:
        ConfigError: what is wrong and where.
    """
    if not split.files:
        return
    remaining = rows(split, CHECK_BYTES)
    columns = _parquet_columns(split) if split.format == "parquet" else list(next(remaining, {}))
    if not columns:
        raise ConfigError(
            f"data.{key}: the split '{split.name}' is empty ({split.files[0]}). It needs at least one row."
        )
    row_kind(columns, config)
    for _ in remaining:
        pass


def row_kind(columns: list[str], config: TrainConfig) -> str:
    """Which kind of row the columns and the config describe: completion, instruction or text.

    `text` covers messages too: the rows themselves tell them apart.

    Raises:
        ConfigError: a column that is named in the config, or needed, is not there.
    """

    def need(name: str, field: str) -> None:
        if name not in columns:
            raise ConfigError(
                f"data.column_mapping.{field}: there is no column '{name}'. The columns are: "
                f"{', '.join(columns)}."
            )

    chosen = config.model_fields_set
    if config.prompt_text_column:
        need(config.prompt_text_column, "prompt_text_column")
        # text_column may be left out where the completion has its usual name.
        need(completion_column(columns, config), "text_column")
        return "completion"
    if "text_column" in chosen or config.text_column in columns:
        need(config.text_column, "text_column")
        return "text"
    if {"prompt", "completion"} <= set(columns):
        return "completion"
    if {"instruction", "output"} <= set(columns):
        return "instruction"
    if "messages" in columns:
        return "text"
    need(config.text_column, "text_column")
    raise AssertionError("unreachable")


def completion_column(columns: list[str], config: TrainConfig) -> str:
    """The column with the completion of a prompt."""
    if "text_column" not in config.model_fields_set and "completion" in columns:
        return "completion"
    return config.text_column


def text_column(columns: list[str], config: TrainConfig) -> str:
    """The column with the text or the messages."""
    if config.text_column not in columns and "messages" in columns:
        return "messages"
    return config.text_column
