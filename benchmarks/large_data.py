"""Measure time and memory of preparing a file that may be larger than the memory.

    python benchmarks/large_data.py --data instructions.jsonl [--rows 100000,1000000] [--chat] [--length 1024]

--data: JSONL rows of instruction, input and output. They are repeated, with a number in each, up to each
number of rows. One process prepares the file as rank 0 of a run does, with its workers, from an empty cache,
then opens it again as the other ranks do, and plans an epoch of packs.

Memory is that of all processes together, sampled: what they hold, without the pages of mapped files, which
the system can take back (Pss_Anon).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_preparation import repeated
from measure import MODEL, REPO, Failed, need_model, need_rows, provenance, table, write_rows
from run_processes import members

MIB = 2**20
SECONDS = 0.1  # between two samples of the memory
COLUMNS = ("rows", "file", "cache", "prepared in", "memory: before", "highest", "after", "opened again in")


def child(options: Namespace) -> None:
    """Prepare the rows twice, and print what each took."""
    from trainers.config.schema import TrainConfig
    from trainers.data.prepare import prepare
    from trainers.model.tokenizer import load_tokenizer

    config = TrainConfig(
        model=str(options.model), trainer="sft", data_path=str(options.data), block_size=options.length,
        model_max_length=options.length, prompt_text_column="prompt", text_column="completion",
        chat_template="tokenizer" if options.chat else None,
    )  # fmt: skip
    tokenizer, _ = load_tokenizer(config)
    report = {"before": own_memory(os.getpid())}
    for name in ("made", "opened"):
        began = time.monotonic()
        prepared = prepare(config, tokenizer)
        report |= {name: time.monotonic() - began, f"{name}_memory": own_memory(os.getpid())}
    report |= {"samples": len(prepared.dataset), "tokens": prepared.summary.tokens}
    print(json.dumps(report))


def own_memory(pid: int) -> int:
    """Return the bytes of a process that are no pages of files, with its share of shared ones."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon")), 0)


def highest_memory(mark: Path, process: subprocess.Popen[str]) -> int:
    """Return the most memory that the processes of a run held together, until the process ends."""
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(own_memory, members(mark))))
        time.sleep(SECONDS)
    return most


def measured(rows: int, data: Sequence[dict[str, Any]], options: Namespace) -> list[str]:
    """Prepare a file of so many rows in a new process, and return the cells of its line.

    Raises:
        Failed: the process ended with an error.
    """
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work, file = Path(folder), Path(folder) / "rows.jsonl"
        size = write_rows(file, repeated(data, rows, options.chat)).stat().st_size
        mark = work / "mark"
        mark.mkdir()
        argv = [sys.executable, str(Path(__file__).resolve()), "--child", "--data", str(file)]
        argv += ["--model", str(options.model), "--length", str(options.length)]
        argv += ["--chat"] if options.chat else []
        caches = {"HF_DATASETS_CACHE": str(work / "datasets"), "PHALANX_CACHE": str(work / "cache")}
        environ = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(mark), "HF_HUB_OFFLINE": "1"} | caches
        with (work / "log").open("w+") as log:
            process = subprocess.Popen(argv, env=environ, cwd=work, stdout=log, stderr=log, text=True)
            most = highest_memory(mark, process)
            log.seek(0)
            lines = log.read().strip().splitlines()
        if process.returncode != 0:
            raise Failed("\n".join(lines[-20:]))
        found = json.loads(lines[-1])
        cache = sum(each.stat().st_size for each in (work / "cache").rglob("*") if each.is_file())
    print(f"{rows:,} rows: {found['samples']:,} samples, {found['tokens']:,} tokens", file=sys.stderr)
    sizes = (found["before"], most, found["opened_memory"])
    return [
        f"{rows:,}", f"{size / MIB:,.0f} MiB", f"{cache / MIB:,.0f} MiB", f"{found['made']:.1f} s",
        *(f"{each / MIB:,.0f} MiB" for each in sizes), f"{found['opened']:.2f} s",
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the model whose tokenizer is used")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chat", action="store_true", help="chat turns for the model's template, not text")
    parser.add_argument("--work", type=Path, help="a folder on the disk to use. Default: $TMPDIR")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options)
        return 0
    options.model = need_model(options.model)
    data = need_rows(options.data)
    try:
        lines = [measured(int(rows), data, options) for rows in options.rows.split(",")]
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    print(provenance("datasets", "tokenizers", "transformers", "trl"))
    print(table(COLUMNS, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
