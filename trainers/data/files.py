"""Find the files of a split, and check their rows without the heavy libraries.

This module uses only the standard library (and pyarrow for Parquet), so that the launcher can reject bad data
before a rank starts. The CSV and JSON readers here only check, count and list columns. The ranks load the
rows of the same files with `datasets` (prepare.py), whose readers may differ in details.
"""

from __future__ import annotations

import codecs
import csv
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.json_text import parse_json

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
# Python writes a missing number as NaN, which is not JSON: it is null here.
_JSON = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
FIRST_ROWS = 100  # a column that is in none of these rows counts as missing
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Return whether a name means a model or a dataset on the hub: the hub allows it and no path has it."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


@dataclass(frozen=True)
class Split:
    """One split: local files of one format, or a dataset on the hub (then `files` is empty)."""

    path: str
    name: str
    files: tuple[Path, ...] = ()

    @property
    def format(self) -> str:
        """The name of the builder in `datasets`: csv, json or parquet."""
        return {".jsonl": "json"}.get(self.files[0].suffix, self.files[0].suffix[1:])


def find_split(data_path: str, name: str, key: str = "train_split") -> Split:
    """Find the files of a split.

    They are `<path>/<name>.<ext>`, `<path>/<name>-*.<ext>`, `<path>/<name>/*.<ext>`, or the file `<path>`
    itself. A path that does not exist and could be a hub id is taken as a hub id.

    Raises:
        ConfigError: there are no such files. The message lists what the folder contains.
    """
    root = Path(os.path.expanduser(data_path))  # Path.expanduser raises if the user does not exist
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ConfigError(
                f"data.path: {root} has a suffix that is not supported. Allowed: {', '.join(SUFFIXES)}."
            )
        if key != "train_split":
            raise ConfigError(
                f"data.path: {root} is one file, so there is no split '{name}'. Set data.path to the folder "
                f"that contains both files, or hold out rows with {key.replace('split', 'fraction')}: 0.1."
            )
        return Split(data_path, name, (root,))
    if not root.exists():
        if is_hub_id(data_path) and not data_path.endswith(SUFFIXES):
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
        f"data.{key}: there is no split '{name}' in {data_path}. Found: {', '.join(present[:8])}. "
        f"Expected, for example: {data_path}/{name}.jsonl."
    )


def rows(split: Split, limit_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of local CSV and JSON files, in order. Parquet files yield nothing.

    Reads up to about `limit_bytes` of each file, but a JSON array always to its end.

    Raises:
        ConfigError: a row cannot be read. The message has the file and the line.
    """
    for path in split.files:
        if path.suffix == ".jsonl" or (path.suffix == ".json" and not is_array(path)):
            yield from _json_lines(path, limit_bytes)
        elif path.suffix == ".json":
            yield from _json_array(path)
        elif path.suffix == ".csv":
            yield from _csv_rows(path, limit_bytes)


def is_array(path: Path) -> bool:
    """Return whether a JSON file is one array, and not JSON Lines."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


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
        return parse_row(line.decode())
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path}:{number}: the row is not valid JSON: not UTF-8. Fix or remove that line."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: {error}") from None


def parse_row(line: str) -> dict[str, Any]:
    """Return the row of a line of JSON Lines.

    Raises:
        ValueError: it is not JSON of an object. The message is for the user.
    """
    try:
        row = parse_json(line.removeprefix("\ufeff"), _JSON.decode)
        if "\\ud" in line or "\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is not a character
    except (json.JSONDecodeError, UnicodeEncodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "half a surrogate pair"
        raise ValueError(f"the row is not valid JSON: {reason}. Fix or remove that line.") from None
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object, such as {{"text": "..."}}, not {type(row).__name__}.')
    return row


def _json_array(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = parse_json(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise ConfigError(f"{where}: not valid JSON. Fix the file.") from None
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} must be an object, not {type(row).__name__}.")
        yield row


def _csv_rows(path: Path, limit_bytes: int | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        ended = False

        def lines() -> Iterator[str]:
            nonlocal ended
            yield from file
            ended = True

        reader = csv.DictReader(lines())
        read, start = 0, 2
        try:
            reader.fieldnames = _header(path, reader.fieldnames or ())
            for row in reader:
                if ended:  # the file ended before this row did
                    raise ConfigError(
                        f"{path}:{start}: a quote opens in this row and is never closed. Close it."
                    )
                start = reader.line_num + 1
                if None in row:
                    raise ConfigError(
                        f"{path}:{reader.line_num}: the row has more fields than the header "
                        f"({len(reader.fieldnames or [])}). "
                        "Quote fields that contain a comma."
                    )
                read += sum(len(value or "") for value in row.values())
                yield row
                if limit_bytes is not None and read > limit_bytes:
                    return
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8. Save the file as UTF-8.") from None
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            raise ConfigError(f"{where}: the row is not valid CSV: {error}. Fix that line.") from None


def _header(path: Path, names: Sequence[str]) -> list[str]:
    """Return the names of the columns. One without a name (pandas' index) gets the name that pandas gives."""
    duplicates = [name for name in names if name and names.count(name) > 1]
    if duplicates:
        raise ConfigError(f"{path}:1: two columns are named '{duplicates[0]}'. Rename or remove one.")
    return [name or f"Unnamed: {index}" for index, name in enumerate(names)]


def column_names(split: Split) -> list[str]:
    """Return the columns of a local split, from its first rows (CSV, JSON) or its schema (Parquet).

    The list is empty if the split has no row.
    """
    if split.format == "parquet":
        return _parquet_columns(split)
    return list(dict.fromkeys(name for row in islice(rows(split), FIRST_ROWS) for name in row))


def _parquet_columns(split: Split) -> list[str]:
    import pyarrow.parquet as pq

    count = sum(_parquet_rows(path) for path in split.files)
    return list(pq.read_schema(split.files[0]).names) if count else []


def _parquet_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowInvalid:
        raise ConfigError(f"{path}: not a Parquet file, or an incomplete one. Download it again.") from None


class RowPlaces:
    """The places of the rows of a split: files, and numbers in them. Reads a file at most once."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._counts: list[int] = []  # rows of the files that were read

    def find(self, number: int) -> tuple[Path | None, int]:
        """Return the file of row `number` of the split, and the number of the row in it.

        `number` counts from 0 over all files, and the result from 1. A dataset on the hub has no file.
        """
        for index, path in enumerate(self.split.files):
            if index == len(self.split.files) - 1:
                return path, number + 1
            if index == len(self._counts):
                one = Split(self.split.path, self.split.name, (path,))
                parquet = path.suffix == ".parquet"
                self._counts.append(_parquet_rows(path) if parquet else sum(1 for _ in rows(one)))
            if number < self._counts[index]:
                return path, number + 1
            number -= self._counts[index]
        return None, number + 1


def place_of(split: Split, number: int) -> str:
    """Return `file: row N` for row `number` of the split, which counts from 0 over all files."""
    path, row = RowPlaces(split).find(number)
    return f"{path or f'{split.path} ({split.name})'}: row {row}"
