"""Loading and tokenizing: once per node, before the process group exists, into a cache keyed by content.

The first rank to take the lock builds the cache; the others wait for it and map the same files. No
collective is open meanwhile, so a long preparation cannot time out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers import chat
from trainers.config import ConfigError, TrainConfig
from trainers.data_files import (
    Split,
    column_names,
    completion_column,
    find_split,
    row_kind,
    rows,
    text_column,
)
from trainers.packing import pack

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 1  # raise it when the same input would give other tokens
MANY_ROWS = 10_000  # from here on, tokenizing in several processes pays for starting them


@dataclass
class Summary:
    """What became of a split: counts of rows and tokens."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0
    blocks: int = 0

    def line(self, name: str) -> str:
        packed = f" in {self.blocks} blocks" if self.blocks != self.rows - self.dropped else ""
        return (
            f"{name}: {self.rows} rows{packed}, {self.tokens} tokens ({self.supervised_tokens} trained on), "
            f"longest {self.longest}, truncated {self.truncated}, without a trained token {self.dropped}"
        )


@dataclass
class Prepared:
    """A split ready to train on: columns input_ids, labels and, when packed, seq_lengths."""

    dataset: Dataset
    summary: Summary


def cache_root() -> Path:
    """Where prepared data lies: $PHALANX_CACHE, or ~/.cache/phalanx."""
    return Path(os.environ.get("PHALANX_CACHE") or Path.home() / ".cache" / "phalanx") / "data"


def prepare(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, split_name: str, key: str, packed: bool
) -> Prepared:
    """Loads, tokenizes and packs a split, or maps the cache of an earlier run.

    Raises:
        ConfigError: the split, a column or a row is not as the config says.
    """
    from datasets import load_from_disk
    from filelock import FileLock

    split = find_split(config.data_path, split_name, key)
    source = None if split.files else _from_hub(split, config)
    columns = column_names(split) if source is None else source.column_names
    if not columns or (source is not None and len(source) == 0):
        raise ConfigError(f"data.{key}: the split '{split_name}' is empty. It needs at least one row.")
    kind = row_kind(columns, config)
    fingerprint = _files_digest(split) if source is None else source._fingerprint
    folder = cache_root() / _key(config, tokenizer, fingerprint, columns, packed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
            raw = source if source is not None else _load_files(split, part / "raw")
            data, summary = _tokenize(raw, kind, config, tokenizer, packed)
            data.save_to_disk(part / "data")
            (part / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")
            shutil.rmtree(part / "raw", ignore_errors=True)
            part.rename(folder)
    summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    if summary.blocks == 0:
        raise ConfigError(
            f"data.{key}: no row of '{split_name}' has a token to train on within block_size "
            f"{config.sequence_length}. "
            "Raise block_size, or shorten the prompts."
        )
    return Prepared(load_from_disk(folder / "data"), summary)


def _from_hub(split: Split, config: TrainConfig) -> Dataset:
    """A split of a hub dataset; `config:split` names a configuration too."""
    from datasets import Dataset, load_dataset

    name, _, part = split.name.rpartition(":")
    try:
        data = load_dataset(split.path, name=name or None, split=part, token=config.token)
    except Exception as error:
        # The hub's failures are many classes; all say that these rows cannot be had.
        raise ConfigError(
            f"data.path: {split.path} ({split.name}) cannot be loaded from the hub: {error}"
        ) from error
    assert isinstance(data, Dataset)
    return data


def _load_files(split: Split, cache: Path) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    files = [str(file) for file in split.files]
    try:
        data = load_dataset(split.format, data_files=files, split="train", cache_dir=str(cache))
    except DatasetGenerationError:
        for _ in rows(split):  # names the file and line, where a row is at fault
            pass
        raise
    assert isinstance(data, Dataset)
    return data


def _files_digest(split: Split) -> str:
    digest = hashlib.blake2b()
    for file in split.files:
        digest.update(file.suffix.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _key(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    columns: list[str],
    packed: bool,
) -> str:
    """Content + tokenizer + template + what the config says of rows."""
    parts = [
        CACHE_VERSION, fingerprint, columns, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        tokenizer.eos_token, tokenizer.bos_token, config.chat_template, text_column(columns, config),
        completion_column(columns, config), config.prompt_text_column, config.train_on, config.add_eos_token,
        config.sequence_length, packed,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _tokenize(
    raw: Dataset, kind: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, packed: bool
) -> tuple[Dataset, Summary]:
    columns = raw.column_names
    encoder = _Encoder(kind, config, tokenizer, columns)
    processes = os.cpu_count() if len(raw) >= MANY_ROWS else None
    data = raw.map(encoder, with_indices=True, remove_columns=columns, num_proc=processes, desc="tokenizing")
    counts = data.with_format("numpy")
    summary = Summary(
        rows=len(data),
        longest=int(counts["length"][:].max()),
        truncated=int((counts["length"][:] > config.sequence_length).sum()),
        dropped=int((counts["supervised"][:] == 0).sum()),
    )
    data = data.filter(lambda count: count > 0, input_columns="supervised")
    if len(data):
        summary.tokens = int(data.with_format("numpy")["length"][:].clip(max=config.sequence_length).sum())
        summary.supervised_tokens = int(data.with_format("numpy")["supervised"][:].sum())
    data = data.remove_columns(["length", "supervised"])
    if packed and len(data):
        data = pack(data, config.sequence_length)
    summary.blocks = len(data)
    return data, summary


class _Encoder:
    """Row -> input_ids, labels, its full length in tokens, and how many are trained on."""

    def __init__(
        self, kind: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, columns: list[str]
    ) -> None:
        self.kind, self.config, self.tokenizer = kind, config, tokenizer
        self.text, self.completion = text_column(columns, config), completion_column(columns, config)
        self.prompt = config.prompt_text_column or "prompt"

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        encoded = self.encode(row, index)
        limit = self.config.sequence_length
        labels = encoded.labels[:limit]
        # The first token of a sequence is predicted from nothing, so it is never trained on.
        supervised = sum(label != chat.IGNORED for label in labels[1:])
        return {
            "input_ids": encoded.input_ids[:limit],
            "labels": labels,
            "length": len(encoded.input_ids),
            "supervised": supervised,
        }

    def encode(self, row: dict[str, Any], index: int) -> chat.Encoded:
        config, train_all = self.config, self.config.train_on == "all"
        if self.kind == "text":
            turns = chat.parse_messages(row[self.text])
            if turns is None and config.train_on == "completion":
                raise ConfigError(
                    f"train_on: completion needs rows that tell the completion, and row {index + 1} has "
                    f"plain text in column '{self.text}'. Set train_on: auto, or name a prompt_text_column."
                )
            if turns is None and config.chat_template is None:
                return chat.encode_text(
                    self.tokenizer, self.string(row, self.text, index), config.add_eos_token
                )
            if turns is None:
                raise ConfigError(
                    f"chat_template: {config.chat_template} needs messages, and row {index + 1} has "
                    f"plain text in column '{self.text}'. Set chat_template: null."
                )
            if config.chat_template is None:
                raise ConfigError(
                    f"chat_template: column '{self.text}' holds messages (row {index + 1}), which need a "
                    "template. Set chat_template: tokenizer, chatml or zephyr."
                )
            return chat.encode_messages(self.tokenizer, turns, train_all)
        if self.kind == "instruction":
            prompt, completion = self.instruction(row, index), self.string(row, "output", index)
        else:
            prompt, completion = row[self.prompt], row[self.completion]
        before, after = chat.parse_messages(prompt), chat.parse_messages(completion)
        if config.chat_template is not None:
            turns = before or [{"role": "user", "content": str(prompt)}]
            turns = turns + (after or [{"role": "assistant", "content": str(completion)}])
            return chat.encode_messages(self.tokenizer, turns, train_all)
        prompt = self.string(row, self.prompt, index) if self.kind == "completion" else prompt
        completion = self.string(row, self.completion, index) if self.kind == "completion" else completion
        return chat.encode_completion(self.tokenizer, prompt, completion, train_all, config.add_eos_token)

    def instruction(self, row: dict[str, Any], index: int) -> str:
        """instruction and input as one prompt.

        A chat turn, or Alpaca's headings where there is no template.
        """
        asked, given = self.string(row, "instruction", index), row.get("input") or ""
        if self.config.chat_template is not None:
            return f"{asked}\n\n{given}" if given else asked
        part = f"### Input:\n{given}\n\n" if given else ""
        return f"### Instruction:\n{asked}\n\n{part}### Response:\n"

    def string(self, row: dict[str, Any], column: str, index: int) -> str:
        value = row[column]
        if not isinstance(value, str):
            raise ConfigError(
                f"data: row {index + 1}: column '{column}' must hold text, not {type(value).__name__}."
            )
        return value
