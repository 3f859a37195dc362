"""Encode the rows of a part, before the process group exists, into a cache keyed by content.

One rank per node encodes them, or one rank per job if the nodes share the cache (storage/data_cache.py). The
other ranks wait, and then map the same files. No collective is open during that time, so a long preparation
cannot time out. The cache contains samples. Packs are planned later, from the lengths (sampler.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.config.errors import ConfigError
from trainers.config.json_text import parse_json
from trainers.config.schema import TrainConfig
from trainers.config.text import count_of
from trainers.data.chat_template import training_templates
from trainers.data.encoders import Encoder
from trainers.data.files import place_of
from trainers.data.loading import ROW, Part, Source, open_source
from trainers.data.preference_rows import check_label_balance
from trainers.data.sampler import count_packs
from trainers.data.samples import COUNTS, NUMBER, RowError
from trainers.data.tokens import forget_truncation
from trainers.rank.process import live_terminal, rank
from trainers.storage.data_cache import cache_root, make_once

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 8  # raise it when the same input gives another entry
BATCH_ROWS = 1000  # rows that a worker encodes at a time, if they are short
BATCH_BYTES = 4 * 2**20  # and about how many bytes of them; their samples take ten times that in Python
ROWS = "rows.npy"  # in an entry: the row of each sample
FIRST = 5  # rows that are named of those that are dropped for a reason
SUPERVISED = "supervised.npy"  # next to the samples: for each, its tokens in the loss
MANY_ROWS = 10_000  # from here on, several processes tokenize; below, their start costs more than they save


@dataclass
class Summary:
    """The counts of a split: rows, samples, tokens, and what was cut or dropped."""

    rows: int = 0
    kept: int = 0  # samples; a row may become two for kto, and several for mlm
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    packs: int = 0  # packs of an epoch
    notes: dict[str, int] = field(default_factory=dict)  # what else is said about samples -> samples
    first_dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> its first rows, from 1
    taken: int | None = None  # of a source: samples in an epoch of the mix
    sources: dict[str, Summary] = field(default_factory=dict)  # of a mix

    @property
    def line(self) -> str:
        """The counts in one line, for the log."""
        packed = f" in {count_of(self.packs, 'pack')}" if self.packs != self.kept else ""
        if self.taken is not None:
            word = "epoch" if self.epochs == "1" else "epochs"
            packed = f", {count_of(self.taken, 'sample')}, {self.epochs} {word}"
        elif self.sources:
            packed = f", {count_of(self.kept, 'sample')}{packed}"
        return (
            f"{count_of(self.rows, 'row')}{packed}, {count_of(self.tokens, 'token')} "
            f"({self.supervised_tokens} trained on), longest {self.longest}, "
            f"truncated {self.truncated}, dropped {self.reasons}"
            + "".join(f"; {note}" for note in self.counted_notes)
        )

    @property
    def epochs(self) -> str:
        """How often an epoch of the mix passes over a source."""
        return "" if self.taken is None else f"{self.taken / self.kept:.3g}"

    @property
    def reasons(self) -> str:
        """How many rows were dropped, with the reasons."""
        return ", ".join(f"{count} ({reason})" for reason, count in sorted(self.dropped.items())) or "0"

    @property
    def counted_notes(self) -> list[str]:
        """What else is said about samples."""
        return [f"{count_of(count, 'sample')}: {note}" for note, count in sorted(self.notes.items())]


@dataclass
class Prepared:
    """The samples of a split. config/kinds.py has their columns; kto has one more."""

    dataset: Dataset
    summary: Summary
    key: str  # a hash of all that decides what the samples are
    rows: NDArray[np.int64]  # the row of each sample: its number in the split, from 0
    supervised: NDArray[Any]  # tokens in the loss of each sample, in their order before kto shuffles them
    sources: dict[str, Prepared] = field(default_factory=dict)  # of a mix


def parts(config: TrainConfig) -> list[Part]:
    """Return the parts of the data that a run, or a source of it, uses."""
    found: list[Part] = ["train"]
    found += ["valid"] if config.validates else []
    return found + (["test"] if config.tests else [])


def prepare(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, part: Part = "train", joined: bool = False
) -> Prepared:
    """Load and encode a part of the data, or map the cache of an earlier run.

    `joined`: mixing.py joins the samples with those of other sources, and then pairs those of kto.

    Raises:
        ConfigError: the split, a column or a row does not match the config.
    """
    from datasets import Dataset, load_from_disk

    source = open_source(config, part)
    pairs = config.kind.rows == "labelled" and not joined
    folder = cache_root() / _cache_key(config, tokenizer, source, pairs)

    def make(unfinished: Path) -> None:
        raw, columns = source.load(config, unfinished / "raw")
        data, summary, supervised = _tokenize(raw, source, Encoder(columns, config, tokenizer), tokenizer)
        if pairs and len(data):
            data = mismatched(data, config, part)
        numbers = np.asarray(data[NUMBER][:], dtype=np.int64)
        data.remove_columns(NUMBER).save_to_disk(unfinished / "data")
        np.save(unfinished / ROWS, numbers)
        np.save(unfinished / SUPERVISED, supervised)
        (unfinished / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")
        shutil.rmtree(unfinished / "raw", ignore_errors=True)

    make_once(folder, make, needed=source.bytes)
    summary = Summary(**parse_json((folder / "summary.json").read_text(encoding="utf-8")))
    if summary.kept == 0:
        reasons = ", ".join(f"{count}: {reason}" for reason, count in sorted(summary.dropped.items()))
        raise ConfigError(
            f"data.{source.key}: no row of '{source.split.name}' has a token to train on ({reasons}; "
            f"block_size {config.sequence_length}). Raise block_size, shorten the prompts, or check the rows."
        )
    dataset = load_from_disk(folder / "data")
    assert isinstance(dataset, Dataset)
    summary.packs = count_packs(config, dataset)
    numbers, supervised = (np.load(folder / name, mmap_mode="r") for name in (ROWS, SUPERVISED))
    return Prepared(dataset, summary, folder.name, numbers, supervised)


def _cache_key(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, source: Source, pairs: bool) -> str:
    """Return a hash of the content, the tokenizer, the templates and the config values that change samples.

    A resume compares it too. So the version of a library is not in it, but what a library gives: TRL's
    training templates.
    """
    held_out = (config.valid_fraction, config.test_fraction, config.split_seed)
    twins = training_templates(tokenizer) if config.chat_template is not None else None
    parts = [
        CACHE_VERSION, twins, source.fingerprint, asdict(source.columns), source.part,
        tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.all_special_ids), tokenizer.chat_template,
        tokenizer.eos_token, tokenizer.bos_token, config.trainer,
        config.chat_template, config.prompt_format, config.trains_on_all, config.train_on,
        config.add_eos_token, config.sequence_length, config.max_prompt_length,
        config.max_completion_length, config.packed == "wrapped",
        config.chat_template_kwargs, config.history, config.unrendered, config.system_prompt,
        config.roles_to_train,
        held_out if source.key == "train_split" else None,
        config.data_seed if pairs else None,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _tokenize(
    raw: Dataset, source: Source, encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Summary, NDArray[Any]]:
    """Return the samples, their counts, and how many tokens of each are in the loss."""
    processes = len(os.sched_getaffinity(0)) if len(raw) >= MANY_ROWS else None
    try:
        with _progress():
            data = raw.map(
                _Numbered(encoder),
                batched=True,
                batch_size=_batch_size(raw),
                remove_columns=raw.column_names,
                num_proc=processes,
                features=_features(encoder),
                desc="tokenizing",
            ).with_format(None)  # not that of the rows
    except RowError as error:
        text, number = error.args
        raise ConfigError(f"{place_of(source.split, number)}: {text}") from error
    finally:
        forget_truncation(tokenizer)
    summary, kept, supervised = _count(data, len(raw))
    data = data.remove_columns(list(COUNTS))
    if len(kept) < len(data):
        data = data.select(kept)
    summary.kept = len(data)
    return data, summary, supervised


def _batch_size(raw: Dataset) -> int:
    """Return how many rows a worker encodes at a time, so that its memory does not grow with their length."""
    mean = raw.data.nbytes / len(raw.data)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / mean)))


class _Numbered:
    """A wrapper that passes each row to the encoder with its number in the split."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        numbers = batch[ROW]
        return self.encoder({name: values for name, values in batch.items() if name != ROW}, numbers)


def _features(encoder: Encoder) -> Features:
    """Return the types of the columns. Token ids have 32 bits; `datasets` gives Python's integers 64."""
    from datasets import Features, List, Value

    counts = {"length": "int32", "supervised": "int32", "truncated": "bool", "dropped": "string"}
    counts[NUMBER] = "int64"
    tokens = {
        name: List(Value("int32")) if empty == [] else Value("bool") for name, empty in encoder.empty.items()
    }
    notes = {"notes": List(Value("string"))}
    return Features({**tokens, **{name: Value(kind) for name, kind in counts.items()}, **notes})


@contextmanager
def _progress() -> Iterator[None]:
    """Show a progress bar on rank 0 while the block runs, if a person watches the terminal."""
    import datasets

    if rank() != 0 or not live_terminal():
        yield
        return
    datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()


def _count(data: Dataset, given: int) -> tuple[Summary, NDArray[Any], NDArray[Any]]:
    """Return the summary of a split, the samples that are kept, and the tokens of each in the loss."""
    names = [*(name for name in COUNTS if name != "notes"), NUMBER]
    counts = data.select_columns(names).with_format("numpy")[:]
    kept = np.asarray([not reason for reason in counts["dropped"]], dtype=bool)
    reasons: dict[str, list[int]] = {}
    for index in np.flatnonzero(~kept):
        reasons.setdefault(str(counts["dropped"][index]), []).append(int(counts[NUMBER][index]) + 1)
    lists = [name for name in data.column_names if name.endswith("ids")]
    tokens = 0
    for name in lists:
        tokens += sum(len(chunk.flatten()) for chunk in data.with_format("arrow").data.column(name).chunks)
    summary = Summary(
        rows=given,
        tokens=tokens,
        supervised_tokens=int(counts["supervised"][kept].sum()),
        longest=int(counts["length"].max()),
        truncated=int(counts["truncated"].sum()),
        dropped={reason: len(rows) for reason, rows in reasons.items()},
        first_dropped={reason: list(dict.fromkeys(rows))[:FIRST] for reason, rows in reasons.items()},
        notes=dict(
            Counter(data.with_format("arrow").data.column("notes").combine_chunks().flatten().to_pylist())
        ),
    )
    return summary, np.flatnonzero(kept), counts["supervised"][kept].astype(np.int32)


def mismatched(data: Dataset, config: TrainConfig, part: Part) -> Dataset:
    """Add to each sample of kto the completion of the sample before it.

    The paper estimates the KL divergence from such mismatched pairs (arXiv 2402.01306). TRL builds the pairs
    inside groups of batch_size samples, so they would change with the batch size. Here they are built over
    the full split. TRL reads the samples in this order in each epoch, so they are shuffled here, once.
    """
    from datasets import concatenate_datasets

    if part == "train":
        check_label_balance(data["label"][:])
        data = data.shuffle(seed=config.data_seed).flatten_indices()
    # An evaluation is not shuffled: neighbours may answer the same prompt, so it pairs in a random order.
    order = np.arange(len(data))
    if part != "train":
        order = np.random.default_rng(config.data_seed).permutation(order)
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    before = data.select(partner).select_columns("completion_ids").flatten_indices()
    return concatenate_datasets([data, before.rename_column("completion_ids", "KL_completion_ids")], axis=1)
