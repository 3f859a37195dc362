"""Put the sources of `data.mix` together.

Each source is prepared as a run of its own would be, with its own entry in the cache. An epoch then is a list
of numbers: which samples of which source, drawn with a seed. So another weight prepares nothing anew, and no
token is copied. Only kto, and a reference that scores all samples before training, need the mix as a file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainers.config.errors import ConfigError
from trainers.config.mix import Source, sources_of
from trainers.config.schema import TrainConfig
from trainers.config.text import count_of
from trainers.data.loading import Part
from trainers.data.packing import Ints
from trainers.data.prepare import Prepared, Summary, mismatched, parts, prepare
from trainers.data.sampler import count_packs, sample_lengths
from trainers.storage.data_cache import cache_root, make_once

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MIX_VERSION = 1  # raise it when the same sources and shares give another epoch


def prepare_all(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, PreTrainedTokenizerBase]
) -> dict[Part, Prepared]:
    """Prepare all parts of a run's data. `templates`: the tokenizer of each source, with its template.

    Raises:
        ConfigError: the data of the run, or of one of its sources, does not match the config.
    """
    sources = sources_of(config)
    if not sources:
        return {part: prepare(config, tokenizer, part) for part in parts(config)}
    return {part: _mix(config, sources, templates, part) for part in parts(config)}


def _mix(
    config: TrainConfig,
    sources: Sequence[Source],
    templates: Mapping[str, PreTrainedTokenizerBase],
    part: Part,
) -> Prepared:
    """Return a part of a mix: an epoch of training, or all rows that the sources evaluate."""
    from datasets import concatenate_datasets

    used = [s for s in sources if part in parts(s.config) and (part != "train" or s.trains)]
    found: dict[str, Prepared] = {}
    for source in used:
        with source.named():
            found[source.name] = prepare(source.config, templates[source.name], part, joined=part == "train")
    data = concatenate_datasets([prepared.dataset for prepared in found.values()])
    sizes = [len(prepared.dataset) for prepared in found.values()]
    taken, chosen = sizes, np.arange(len(data))
    if part == "train":
        taken = samples_of_epoch(used, sizes)
        chosen = draw(used, sizes, taken, config.seed if config.data_seed is None else config.data_seed)
        if len(used) > 1 or len(chosen) != len(data):
            data = data.select(chosen)
    key = _key(found, chosen, config, part)
    if part == "train" and (config.kind.rows == "labelled" or config.precompute_ref_log_probs):
        data = _as_file(data, key, config)
    summary = _summary(found, taken if part == "train" else None, chosen)
    if part == "train":
        summary.packs = count_packs(config, data)
    else:  # each source is evaluated in packs of its own
        summary.packs = sum(prepared.summary.packs for prepared in found.values())
    rows = np.concatenate([prepared.rows for prepared in found.values()])[chosen]
    supervised = np.concatenate([prepared.supervised for prepared in found.values()])[chosen]
    return Prepared(data, summary, key, rows, supervised, found)


def samples_of_epoch(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """Return how many samples of each source an epoch has. `sizes`: how many each source has.

    Sources with a weight share as many samples as they have together. The largest remainders are rounded up,
    so that no sample is lost. A source with `rows` has as many, and one with neither has all its samples.

    Raises:
        ConfigError: a weight is so small that no sample is left.
    """
    weights = np.asarray([source.weight or 0.0 for source in sources])
    total = sum(size for source, size in zip(sources, sizes, strict=True) if source.weight)
    taken = [source.rows or size for source, size in zip(sources, sizes, strict=True)]
    if not total:
        return taken
    shares = total * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    for number in np.argsort(counts - shares, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    for number, source in enumerate(sources):
        if source.weight:
            taken[number] = int(counts[number])
            if not taken[number]:
                raise ConfigError(
                    f"{source.key}.weight: {source.weight:g} of {weights.sum():g} leaves none of the "
                    f"{count_of(total, 'sample')} of an epoch for {source.name}. Raise it."
                )
    return taken


def draw(sources: Sequence[Source], sizes: Sequence[int], taken: Sequence[int], seed: int) -> Ints:
    """Return the samples of an epoch, as numbers in all sources one after the other.

    A source is passed over as often as it fits; a seeded draw adds the rest. The draw of a source depends on
    its name, not on the other sources. Several sources are mixed in a seeded order.
    """
    chosen, first = [], 0
    for source, size, count in zip(sources, sizes, taken, strict=True):
        passes, rest = divmod(count, size)
        order = np.random.default_rng((seed, 3, *source.name.encode())).permutation(size)
        chosen += [first + np.tile(np.arange(size), passes), first + np.sort(order[:rest])]
        first += size
    all_samples = np.concatenate(chosen).astype(np.int64)
    return np.random.default_rng((seed, 0, 2)).permutation(all_samples) if len(sources) > 1 else all_samples


def _key(found: Mapping[str, Prepared], chosen: Ints, config: TrainConfig, part: Part) -> str:
    """Return a hash of all that decides what the samples are, and their order."""
    digest = hashlib.blake2b(digest_size=16)
    paired = config.data_seed if config.kind.rows == "labelled" else None
    keys = {name: prepared.key for name, prepared in found.items()}
    digest.update(json.dumps([MIX_VERSION, part, keys, paired]).encode())
    digest.update(chosen.astype("<i8").tobytes())
    return digest.hexdigest()


def _as_file(data: Dataset, key: str, config: TrainConfig) -> Dataset:
    """Return the mix from a file of its own in the cache. For kto, its samples are paired there."""
    from datasets import Dataset, load_from_disk

    def load(folder: Path) -> Dataset:
        loaded = load_from_disk(folder)
        assert isinstance(loaded, Dataset)
        return loaded

    def make(unfinished: Path) -> None:
        if config.kind.rows != "labelled":
            data.save_to_disk(unfinished / "data")
            return
        data.save_to_disk(unfinished / "raw")
        mismatched(load(unfinished / "raw"), config, "train").save_to_disk(unfinished / "data")
        shutil.rmtree(unfinished / "raw")

    folder = cache_root() / key
    make_once(folder, make, needed=int(data.data.nbytes))
    return load(folder / "data")


def _summary(found: Mapping[str, Prepared], taken: Sequence[int] | None, chosen: Ints) -> Summary:
    """Return the counts of a mix, and those of each source. `taken`: its samples in an epoch of training."""
    summaries = {name: prepared.summary for name, prepared in found.items()}
    if taken is not None:
        ends = np.cumsum([len(prepared.dataset) for prepared in found.values()])
        source_of = np.searchsorted(ends, chosen, side="right")
        tokens = np.concatenate([sample_lengths(prepared.dataset, prompts=1) for prepared in found.values()])
        trained = np.concatenate([prepared.supervised for prepared in found.values()])
        for number, (name, count) in enumerate(zip(summaries, taken, strict=True)):
            drawn = chosen[source_of == number]
            summaries[name] = replace(
                summaries[name],
                taken=count,
                tokens=int(tokens[drawn].sum()),
                supervised_tokens=int(trained[drawn].sum()),
            )
    each = list(summaries.values())
    return Summary(
        rows=sum(one.rows for one in each),
        kept=len(chosen),
        tokens=sum(one.tokens for one in each),
        supervised_tokens=sum(one.supervised_tokens for one in each),
        longest=max(one.longest for one in each),
        truncated=sum(one.truncated for one in each),
        dropped=dict(sum((Counter(one.dropped) for one in each), Counter())),
        notes=dict(sum((Counter(one.notes) for one in each), Counter())),
        sources=summaries,
    )


def spans(prepared: Prepared) -> dict[str, range]:
    """Return where the samples of each source are in an evaluation."""
    found, first = {}, 0
    for name, source in prepared.sources.items():
        found[name] = range(first, first + len(source.dataset))
        first += len(source.dataset)
    return found
