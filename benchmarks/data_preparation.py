"""Compare tokenizing with TRL's SFTTrainer: two ranks prepare the same rows at once.

    python benchmarks/data_preparation.py --data instructions.jsonl --rows 50000

    trl, one process     SFTConfig(dataset_num_proc=None), its default
    trl, all cores       SFTConfig(dataset_num_proc=<cores>)
    phalanx              trainers.data.prepare, as each rank calls it

Both ranks run under `accelerate launch`, from empty caches. The sides take turns. The time is from the JSONL
file to rows that are ready for training (not packed; truncated at --length), without imports. The processor
time of each rank, including its workers, shows whether the ranks did the work twice. For phalanx, every
encoded row is counted too. SFTTrainer tokenizes with `datasets.map`.

--data: JSONL rows of instruction, input and output. They are repeated, with a number in each, up to --rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    MODEL,
    Failed,
    alternate,
    launch,
    need_model,
    need_rows,
    provenance,
    question,
    run,
    spread,
    table,
    write_rows,
)

RANKS = 2
SIDES = ("trl, one process", "trl, all cores", "phalanx")
Result = dict[str, Any]


def rank_main(side: str, work: Path, options: Namespace) -> None:
    """Prepare the rows, and write the time and counts of this rank to a file."""
    prepare = phalanx(work, options) if side == "phalanx" else trl(work, options, side == "trl, all cores")
    began, before = time.time(), processor_seconds()
    dataset = prepare()
    noted = {
        "began": began,
        "ended": time.time(),
        "processor": processor_seconds() - before,
        "rows": len(dataset),
        "tokens": count_tokens(dataset),
    }
    (work / f"{os.environ['RANK']}.json").write_text(json.dumps(noted))


def processor_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def count_tokens(dataset: Any) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.list_value_length(dataset.with_format("arrow")["input_ids"][:])).as_py())


def phalanx(work: Path, options: Namespace) -> Callable[[], Any]:
    from trainers.config.schema import TrainConfig
    from trainers.data import encoders, prepare
    from trainers.model.tokenizer import load_tokenizer

    config = TrainConfig(
        model=str(options.model), trainer="sft", data_path=str(options.data), block_size=options.length,
        model_max_length=options.length, prompt_text_column="prompt", text_column="completion",
        chat_template="tokenizer" if options.chat else None, packing="none",
    )  # fmt: skip
    tokenizer, _ = load_tokenizer(config)
    encode = encoders.Encoder.__call__

    def counted(self: Any, batch: Any, numbers: list[int]) -> Any:
        # Appending one line is atomic, whichever worker writes it.
        with (work / "encoded").open("a") as file:
            file.write(f"{len(numbers)}\n")
        return encode(self, batch, numbers)

    encoders.Encoder.__call__ = counted  # type: ignore[method-assign]
    return lambda: prepare.prepare(config, tokenizer).dataset


def trl(work: Path, options: Namespace, all_cores: bool) -> Callable[[], Any]:
    """Return a function that prepares the rows: SFTTrainer does it in its constructor. The model is tiny."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(work / "out"), use_cpu=True, bf16=False, max_length=options.length, report_to="none",
        dataset_num_proc=os.cpu_count() if all_cores else None,
    )  # fmt: skip

    def prepare() -> Any:
        data = load_dataset("json", data_files=str(options.data), split="train")
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        return trainer.train_dataset

    return prepare


def repeated(data: Sequence[dict[str, Any]], rows: int, chat: bool) -> Iterator[dict[str, Any]]:
    """Yield `rows` rows: the data repeated, with a number in each, so that no two texts are the same."""
    for number, row in enumerate(itertools.islice(itertools.cycle(data), rows)):
        prompt, completion = f"{number}. {question(row)}", row["output"].strip() or "None."
        if chat:
            prompt, completion = turn("user", prompt), turn("assistant", completion)
        yield {"prompt": prompt, "completion": completion}


def turn(role: str, text: str) -> Any:
    return [{"role": role, "content": text}]


def prepare_on_all_ranks(side: str, options: Namespace, root: Path, repeat: int) -> Result:
    """Measure one side once, with its own caches."""
    work = Path(tempfile.mkdtemp(dir=root))
    argv = [*launch(RANKS), str(Path(__file__).resolve()), "--child", side, str(work)]
    argv += ["--model", str(options.model), "--data", str(root / "rows.jsonl")]
    argv += ["--length", str(options.length), *(["--chat"] if options.chat else [])]
    caches = {"HF_DATASETS_CACHE": str(work / "datasets"), "PHALANX_CACHE": str(work / "phalanx")}
    run(argv, work, HF_HUB_OFFLINE="1", **caches)
    ranks = [json.loads((work / f"{rank}.json").read_text()) for rank in range(RANKS)]
    if len({(rank["rows"], rank["tokens"]) for rank in ranks}) != 1:
        raise Failed(f"error: the ranks have different rows: {ranks}")
    encoded = work / "encoded"
    return {
        "seconds": max(rank["ended"] for rank in ranks) - min(rank["began"] for rank in ranks),
        "processor": sorted(rank["processor"] for rank in ranks),
        "rows": ranks[0]["rows"],
        "tokens": ranks[0]["tokens"],
        "encoded": sum(map(int, encoded.read_text().split())) if encoded.exists() else None,
    }


def report(results: dict[str, list[Result]], failed: dict[str, Failed]) -> str:
    head = ["what", "tokens/s", "s", "CPU s of a rank", "of the other", "rows", "tokens", "encoded"]
    rows = []
    for name, runs in results.items():
        last = runs[-1]
        rows.append([
            name,
            spread([run["tokens"] / run["seconds"] for run in runs]),
            spread([run["seconds"] for run in runs], ".1f"),
            spread([run["processor"][1] for run in runs], ".1f"),
            spread([run["processor"][0] for run in runs], ".1f"),
            f"{last['rows']:,}",
            f"{last['tokens']:,}",
            "not counted" if last["encoded"] is None else f"{last['encoded']:,} rows",
        ])  # fmt: skip
    rows += [[name, f"not measured: {reason.reason}", *[""] * 6] for name, reason in failed.items()]
    return table(head, rows)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the model whose tokenizer is used")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chat", action="store_true", help="chat turns for the model's template, not text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        rank_main(options.child[0], Path(options.child[1]), options)
        return 0
    options.model = need_model(options.model)
    data = need_rows(options.data)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root / "rows.jsonl", repeated(data, options.rows, options.chat))
        kinds = {side: partial(prepare_on_all_ranks, side, options, root) for side in options.only}
        results, failed = alternate(kinds, options.repeats, lambda result: f"{result['seconds']:.1f} s")
    print(provenance("datasets", "tokenizers", "transformers", "trl"))
    print(f"{options.rows:,} rows, {RANKS} ranks.\n")
    print(report(results, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
