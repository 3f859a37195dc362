"""Compare packing a million rows with TRL's pack_dataset: the plan, and reading an epoch in batches.

    python benchmarks/packing.py --rows 1000000 --length 2048

The measured part begins with tokenized rows on disk, and ends with the batches of one epoch.

    trl        writes the packed rows to a new file, once for all epochs; an epoch reads a pack as one row
    phalanx    plans only numbers, again in each epoch, and writes nothing; an epoch reads each row of a pack

So `trl` plans once, and `phalanx` plans in each epoch. Both read in each epoch, through the collator that
their trainer uses. SFTTrainer lets TRL plan 1,000 rows at a time (the default of `datasets.map`); `all rows
at once` is what a user can do by hand. Each side runs in a new process.

Lengths are log-normal (seeded), like those of instruction data; tokens are random. Peak memory includes the
pages of mapped files, which the system can take back, and the imported libraries. `own, grown` is the memory
that the process allocated in the measured part (sampled).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    Failed,
    PeakOwnMemory,
    alternate,
    log_normal_lengths,
    peak_memory,
    provenance,
    run,
    spread,
    table,
)

VOCABULARY = 49152
Result = dict[str, Any]


def make(folder: Path, options: Namespace) -> Result:
    """Write tokenized rows in the form of `datasets`: input_ids in 4 bytes, labels in 8."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    lengths = log_normal_lengths(options.rows, options.mean, options.length, options.seed)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    ids = np.random.default_rng(options.seed).integers(0, VOCABULARY, int(lengths.sum()), dtype=np.int32)
    columns = {"input_ids": pa.array(ids), "labels": pa.array(ids.astype(np.int64))}
    lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    Dataset(InMemoryTable(pa.table(lists))).save_to_disk(folder)
    return {"tokens": int(lengths.sum()), "longest": int(lengths.max())}


def phalanx(folder: Path, options: Namespace, read: bool) -> Result:
    """Plan the packs, and with `read` also read every pack as the trainer does."""
    from datasets import load_from_disk

    from trainers.data.collators import FlatCollator, PieceDataset
    from trainers.data.packing import plan_packs, whole_samples
    from trainers.data.sampler import sample_lengths

    rows = load_from_disk(folder).with_format("numpy")
    with PeakOwnMemory() as own:
        began = time.perf_counter()
        lengths = sample_lengths(rows)
        order, offsets = plan_packs(lengths, options.length, options.seed)
        result = {"plan": time.perf_counter() - began, "packs": len(offsets) - 1}
        if read:
            pieces, collate = PieceDataset(rows, whole_samples(lengths)), FlatCollator()
            packs = itertools.pairwise(offsets)
            result |= count(collate(pieces.__getitems__(order[a:b].tolist())) for a, b in packs)
    return result | {"grown": own.grown}


def trl(folder: Path, options: Namespace, batch: int, read: bool) -> Result:
    """Write the packed file, and with `read` also read every pack in a random order, as the trainer does."""
    import numpy as np
    from datasets import load_from_disk
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = load_from_disk(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as written, PeakOwnMemory() as own:
        target = {"cache_file_name": f"{written}/packed.arrow", "load_from_cache_file": False}
        began = time.perf_counter()
        packed = pack_dataset(rows, options.length, "bfd", {"batch_size": batch, **target})
        result = {"plan": time.perf_counter() - began, "packs": len(packed)}
        if read:
            collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
            order = np.random.default_rng(options.seed).permutation(len(packed)).tolist()
            result |= count(collate(packed.__getitems__([number])) for number in order)
    return result | {"grown": own.grown}


def count(batches: Any) -> Result:
    """Iterate over all batches; return the seconds and the tokens."""
    began = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {"read": time.perf_counter() - began, "tokens": tokens}


def child(what: str, folder: Path, options: Namespace) -> Result:
    jobs: dict[str, Callable[[], Result]] = {
        "make": partial(make, folder, options),
        "phalanx-plan": partial(phalanx, folder, options, False),
        "phalanx-read": partial(phalanx, folder, options, True),
        "trl-plan": partial(trl, folder, options, 1000, False),
        "trl-read": partial(trl, folder, options, 1000, True),
        "trl-all-plan": partial(trl, folder, options, options.rows, False),
        "trl-all-read": partial(trl, folder, options, options.rows, True),
    }
    return jobs[what]() | {"memory": peak_memory()}


# side -> its name in the table, and what it does before it reads an epoch.
SIDES = {
    "trl": ("trl (1,000 rows at a time)", "plan and write"),
    "trl-all": ("trl (all rows at once)", "plan and write"),
    "phalanx": ("phalanx", "plan"),
}


def start(options: Namespace, work: Path, job: str, repeat: int = 0) -> Result:
    """Do a job in a new process."""
    argv = [sys.executable, str(Path(__file__).resolve()), "--child", job, str(work / "rows")]
    for name in ("rows", "mean", "length", "seed"):
        argv += [f"--{name}", str(getattr(options, name))]
    printed = run(argv, work, HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    result: Result = json.loads(printed.splitlines()[-1])
    return result


def report(results: dict[str, list[Result]], failed: dict[str, Failed], tokens: int, capacity: int) -> str:
    """Return the table, with two rows for each side: only the plan, and an epoch."""
    head = ["what", "s to pack", "s to read all packs", "peak memory", "own, grown", "packs", "efficiency"]
    rows = []
    for name, runs in results.items():
        packs, given = runs[0]["packs"], runs[0].get("tokens", tokens)
        assert given == tokens, f"{name}: {given} tokens in the packs, {tokens} in the rows"
        rows.append([
            name,
            spread([run["plan"] for run in runs], ".2f"),
            spread([run["read"] for run in runs], ".1f") if "read" in runs[0] else "",
            f"{spread([run['memory'] / 2**20 for run in runs])} MiB",
            f"{spread([run['grown'] / 2**20 for run in runs])} MiB",
            f"{packs:,}",
            f"{tokens / (packs * capacity):.4f}",
        ])  # fmt: skip
    rows += [[name, f"not measured: {reason.reason}", *[""] * 5] for name, reason in failed.items()]
    return table(head, rows)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--mean", type=float, default=200, help="mean tokens of a row, before the longest are cut"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest row and of a pack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--no-reading", action="store_true", help="measure only the plans")
    parser.add_argument("--child", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = start(options, work, "make")
        kinds: dict[str, Callable[[int], Result]] = {}
        for side in options.sides:
            name, does = SIDES[side]
            kinds[f"{name}, {does}"] = partial(start, options, work, f"{side}-plan")
            if not options.no_reading:
                kinds[f"{name}, {does}, read an epoch"] = partial(start, options, work, f"{side}-read")
        results, failed = alternate(
            kinds, options.repeats, lambda result: f"{result['plan'] + result.get('read', 0):.1f} s"
        )
    tokens = rows["tokens"]
    print(provenance("datasets", "pyarrow", "torch", "trl"))
    mean = tokens / options.rows
    print(f"{options.rows:,} rows, {mean:.0f} tokens a row, the longest {rows['longest']:,}.\n")
    print(report(results, failed, tokens, options.length))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
